// Derivatives: one graph node per forward op. The backward ops are differentiated through the formulas
// below, in ATen: second derivatives are rare, and there the formulas' own derivatives are free.
#include <ATen/DimVector.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "node.h"
#include "ops.h"

namespace droppath_ext {
namespace {

using torch::autograd::variable_list;

struct DropPathBackward : torch::autograd::Node {
  Saved keep;
  double scale = 1;

  std::string name() const override { return "DropPathBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    keep.release();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {grads[0].defined() ? drop_path_backward(grads[0], keep.get(), scale) : at::Tensor()};
  }
};

struct DropPathAddBackward : torch::autograd::Node {
  enum Input { kX, kResidual, kGamma };

  Saved keep;   // without entries where nothing is dropped
  Saved x;      // only for the gradient of gamma
  Saved gamma;  // for the gradient of x; that of gamma needs its shape and dtype, too
  double scale = 1;
  at::ScalarType dtype = at::kFloat;  // of x
  bool has_mask = true;

  std::string name() const override { return "DropPathAddBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    keep.release();
    x.release();
    gamma.release();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(3);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) {
      return result;
    }
    const bool needs_x = task_should_compute_output(kX);
    const bool needs_gamma = x && task_should_compute_output(kGamma);
    if (task_should_compute_output(kResidual)) {
      result[kResidual] = grad;  // the engine casts what is not of the input's dtype
    }
    if (!has_mask && !gamma) {
      result[kX] = grad;  // a plain addition
    } else if (needs_x || needs_gamma) {
      auto [grad_x, grad_gamma] =
          drop_path_add_backward(grad, needs_gamma ? x.get_optional() : std::nullopt, gamma.get_optional(), keep.get(),
                                 scale, dtype, {needs_x, needs_gamma});
      result[kX] = needs_x ? std::move(grad_x) : at::Tensor();
      result[kGamma] = needs_gamma ? std::move(grad_gamma) : at::Tensor();
    }
    return result;
  }
};

// The nodes have no forward mode: they would lose the tangent without a word.
bool is_dual(const at::Tensor& x) { return x._fw_grad(/*level=*/0).defined(); }
bool is_dual(const std::optional<at::Tensor>& x) { return x && is_dual(*x); }

void check_not_dual(const std::optional<at::Tensor>& tensor, const char* name, const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(!is_dual(tensor), "torch.ops.droppath_ext.", op, " has no forward-mode derivative, but ",
                              name, " carries a tangent; droppath_ext.", op, " has one");
}

// A graph node costs more than a tiny forward: build it only where somebody will ask for gradients.
bool needs_graph(const at::Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }
bool needs_graph(const std::optional<at::Tensor>& x) { return x && needs_graph(*x); }

// Whether a backward op is itself to be differentiated: under create_graph, or because a graph that the kernels built
// meets a tangent only now (forward over reverse).
template <typename... Tensors>
bool is_differentiated(const Tensors&... tensors) {
  return (... || (is_dual(tensors) || needs_graph(tensors)));
}

at::Tensor mask_dropped(const at::Tensor& x, const at::Tensor& keep) {
  if (keep.sym_numel() == 0) {
    return x;
  }
  at::SymDimVector shape(x.dim(), 1);
  shape[0] = keep.sym_size(0);
  return at::where(keep.view_symint(shape), x, 0);
}

std::tuple<at::Tensor, at::Tensor> drop_path_autograd(const at::Tensor& x, double drop_prob, bool scale_by_keep,
                                                      bool per_sample, const std::optional<at::Generator>& generator) {
  check_not_dual(x, "x", "drop_path");
  const auto node = needs_graph(x) ? make_node<DropPathBackward>(x) : NodePointer<DropPathBackward>();
  auto result = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return drop_path(x, drop_prob, scale_by_keep, per_sample, generator);
  }();
  if (node) {
    node->keep = Saved(std::get<1>(result));
    node->scale = keep_scale(drop_prob, scale_by_keep);
    set_outputs(node, std::get<0>(result));
  }
  return result;
}

at::Tensor drop_path_backward_autograd(const at::Tensor& grad, const at::Tensor& keep, double scale) {
  if (is_differentiated(grad)) {
    check_keep(keep, grad);
    return mask_dropped(at::mul(grad, scale), keep);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return drop_path_backward(grad, keep, scale);
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_autograd(const at::Tensor& x, const at::Tensor& residual,
                                                          const std::optional<at::Tensor>& gamma, double drop_prob,
                                                          bool scale_by_keep, bool per_sample,
                                                          const std::optional<at::Generator>& generator) {
  check_not_dual(x, "x", "drop_path_add");
  check_not_dual(residual, "residual", "drop_path_add");
  check_not_dual(gamma, "gamma", "drop_path_add");
  const auto node = needs_graph(x) || needs_graph(residual) || needs_graph(gamma)
                        ? make_node<DropPathAddBackward>(x, residual, gamma)
                        : NodePointer<DropPathAddBackward>();
  auto result = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return drop_path_add(x, residual, gamma, drop_prob, scale_by_keep, per_sample, generator);
  }();
  if (node) {
    node->keep = Saved(std::get<1>(result));
    if (needs_graph(gamma)) {
      node->x = Saved(x);
    }
    if (gamma && (needs_graph(x) || needs_graph(gamma))) {
      node->gamma = Saved(*gamma);
    }
    node->scale = keep_scale(drop_prob, scale_by_keep);
    node->dtype = x.scalar_type();
    node->has_mask = drop_prob != 0.0;
    set_outputs(node, std::get<0>(result));
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_backward_autograd(
    const at::Tensor& grad, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& gamma,
    const at::Tensor& keep, double scale, at::ScalarType dtype, std::array<bool, 2> output_mask) {
  if (!is_differentiated(grad, x, gamma)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return drop_path_add_backward(grad, x, gamma, keep, scale, dtype, output_mask);
  }
  check_add_backward_inputs(grad, x, gamma, keep, dtype, output_mask);
  const auto opmath = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor scaled = mask_dropped(at::mul(grad.to(opmath), scale), keep);
  const auto options = grad.options().dtype(dtype);
  at::Tensor grad_x = at::empty({0}, options);
  at::Tensor grad_gamma = at::empty({0}, options);
  if (output_mask[0]) {
    // Masked again behind gamma, which may be infinite.
    grad_x = (gamma ? mask_dropped(at::mul(scaled, gamma->to(opmath)), keep) : scaled).to(dtype);
  }
  if (output_mask[1]) {
    const at::Tensor product = at::mul(scaled, mask_dropped(x->to(opmath), keep));
    grad_gamma = product.sum_to_size_symint(gamma->sym_sizes()).to(gamma->scalar_type());
  }
  return {std::move(grad_x), std::move(grad_gamma)};
}

}  // namespace

TORCH_LIBRARY_IMPL(droppath_ext, Autograd, m) {
  m.impl("drop_path", &drop_path_autograd);
  m.impl("drop_path_backward", &drop_path_backward_autograd);
  m.impl("drop_path_add", &drop_path_add_autograd);
  m.impl("drop_path_add_backward", &drop_path_add_backward_autograd);
  m.impl("draw_fixed", torch::CppFunction::makeFallthrough());  // integers have no derivatives
}

}  // namespace droppath_ext
