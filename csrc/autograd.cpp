// Derivatives: one graph node per forward op. The backward ops are differentiated through the formulas
// below, in ATen: second derivatives are rare, and there the formulas' own derivatives are free.
#include <ATen/DimVector.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "node.h"
#include "ops.h"

namespace droppath_ext {
namespace {

using torch::autograd::variable_list;

// A graph node costs more than a tiny forward: build it only where somebody will ask for gradients.
bool needs_graph(const at::Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }
bool needs_graph(const std::optional<at::Tensor>& x) { return x && needs_graph(*x); }

// The nodes have no forward mode: they would lose the tangent without a word.
bool is_dual(const at::Tensor& x) { return x._fw_grad(/*level=*/0).defined(); }
bool is_dual(const std::optional<at::Tensor>& x) { return x && is_dual(*x); }

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

// gather in ATen.
at::Tensor gather_formula(const at::Tensor& x, const at::Tensor& index) {
  return mask_dropped(at::index_select(x, 0, index.clamp_min(0)), index.ge(0));
}

struct DropPathBackward final : torch::autograd::Node {
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

// residual + gamma * x * scale over the kept samples: drop_path_add and scatter_add, whose derivatives differ in how
// they know these samples.
struct AddBackward : torch::autograd::Node {
  enum Input { kX, kResidual, kGamma };

  Saved x;      // only for the gradient of gamma
  Saved gamma;  // for the gradient of x; that of gamma needs its shape and dtype, too
  double scale = 1;
  at::ScalarType dtype = at::kFloat;  // of x
  bool is_addition = false;           // and nothing else

  void save(const at::Tensor& x_input, const std::optional<at::Tensor>& gamma_input, double scale_input,
            bool keeps_all) {
    if (needs_graph(gamma_input)) {
      x = Saved(x_input);
    }
    if (gamma_input && (needs_graph(x_input) || needs_graph(gamma_input))) {
      gamma = Saved(*gamma_input);
    }
    scale = scale_input;
    dtype = x_input.scalar_type();
    is_addition = keeps_all && !gamma_input && scale == 1.0;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x.release();
    gamma.release();
    release_samples();
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
    if (is_addition) {
      result[kX] = grad;
    } else if (needs_x || needs_gamma) {
      auto [grad_x, grad_gamma] =
          differentiate(grad, needs_gamma ? x.get_optional() : std::nullopt, {needs_x, needs_gamma});
      result[kX] = needs_x ? std::move(grad_x) : at::Tensor();
      result[kGamma] = needs_gamma ? std::move(grad_gamma) : at::Tensor();
    }
    return result;
  }

 private:
  virtual void release_samples() = 0;
  virtual std::tuple<at::Tensor, at::Tensor> differentiate(const at::Tensor& grad,
                                                           const std::optional<at::Tensor>& saved_x,
                                                           std::array<bool, 2> output_mask) = 0;
};

struct DropPathAddBackward final : AddBackward {
  Saved keep;  // without entries where nothing is dropped

  std::string name() const override { return "DropPathAddBackward"; }

 private:
  void release_samples() override { keep.release(); }

  std::tuple<at::Tensor, at::Tensor> differentiate(const at::Tensor& grad, const std::optional<at::Tensor>& saved_x,
                                                   std::array<bool, 2> output_mask) override {
    return drop_path_add_backward(grad, saved_x, gamma.get_optional(), keep.get(), scale, dtype, output_mask);
  }
};

struct ScatterAddBackward final : AddBackward {
  Saved slots;
  Saved kept;

  std::string name() const override { return "ScatterAddBackward"; }

 private:
  void release_samples() override {
    slots.release();
    kept.release();
  }

  std::tuple<at::Tensor, at::Tensor> differentiate(const at::Tensor& grad, const std::optional<at::Tensor>& saved_y,
                                                   std::array<bool, 2> output_mask) override {
    return scatter_add_backward(grad, saved_y, gamma.get_optional(), slots.get(), kept.get(), scale, dtype,
                                output_mask);
  }
};

struct GatherBackward final : torch::autograd::Node {
  Saved index;
  Saved inverse;

  std::string name() const override { return "GatherBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    index.release();
    inverse.release();
  }

  // Of the rows and, where it was handed through, of x: into that one's own memory if nobody else has it, as the engine
  // adds up gradients.
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const at::Tensor& grad_rows = grads[0];
    at::Tensor grad_x = grads.size() > 1 ? std::move(grads[1]) : at::Tensor();
    if (!grad_rows.defined()) {
      return {grad_x};
    }
    // The ops below have derivatives, but no tangents.
    if (is_dual(grad_rows) || (grad_x.defined() && is_dual(grad_x))) {
      const at::Tensor rows = gather_formula(grad_rows, inverse.get());
      return {grad_x.defined() ? at::add(grad_x, rows) : rows};
    }
    if (!grad_x.defined()) {
      return {gather(grad_rows, inverse.get(), index.get())};
    }
    if (at::GradMode::is_enabled() || !is_ours_alone(grad_x)) {
      return {scatter_add(grad_rows, grad_x, std::nullopt, inverse.get(), index.get(), /*scale=*/1.0)};
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    scatter_add_(grad_x, grad_rows, inverse.get(), index.get());
    return {std::move(grad_x)};
  }

 private:
  static bool is_ours_alone(const at::Tensor& grad) {
    return grad.is_non_overlapping_and_dense() && grad.use_count() == 1 && grad.has_storage() &&
           grad.storage().use_count() == 1 && !at::isTensorSubclassLike(grad);
  }
};

void check_not_dual(const std::optional<at::Tensor>& tensor, const char* name, const char* op, const char* function) {
  TORCH_CHECK_NOT_IMPLEMENTED(!is_dual(tensor), "torch.ops.droppath_ext.", op, " has no forward-mode derivative, but ",
                              name, " carries a tangent; droppath_ext.", function, " has one");
}

// The gradients of x and gamma in ATen, for a grad of the samples of x.
std::tuple<at::Tensor, at::Tensor> add_backward_formula(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                                        const std::optional<at::Tensor>& gamma, const at::Tensor& keep,
                                                        double scale, at::ScalarType dtype,
                                                        std::array<bool, 2> output_mask) {
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

std::tuple<at::Tensor, at::Tensor> drop_path_autograd(const at::Tensor& x, double drop_prob, bool scale_by_keep,
                                                      bool per_sample, const std::optional<at::Generator>& generator) {
  check_not_dual(x, "x", "drop_path", "drop_path");
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
  check_not_dual(x, "x", "drop_path_add", "drop_path_add");
  check_not_dual(residual, "residual", "drop_path_add", "drop_path_add");
  check_not_dual(gamma, "gamma", "drop_path_add", "drop_path_add");
  const auto node = needs_graph(x) || needs_graph(residual) || needs_graph(gamma)
                        ? make_node<DropPathAddBackward>(x, residual, gamma)
                        : NodePointer<DropPathAddBackward>();
  auto result = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return drop_path_add(x, residual, gamma, drop_prob, scale_by_keep, per_sample, generator);
  }();
  if (node) {
    node->save(x, gamma, keep_scale(drop_prob, scale_by_keep), /*keeps_all=*/drop_prob == 0.0);
    node->keep = Saved(std::get<1>(result));
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
  return add_backward_formula(grad, x, gamma, keep, scale, dtype, output_mask);
}

// gather with a graph; x beside the rows, which takes its gradient through the same node, if hands_through.
std::tuple<at::Tensor, at::Tensor> gather_autograd(const at::Tensor& x, const at::Tensor& index,
                                                   const at::Tensor& inverse, bool hands_through) {
  check_not_dual(x, "x", "gather", "stochastic_depth");
  const auto node = needs_graph(x) ? make_node<GatherBackward>(x) : NodePointer<GatherBackward>();
  at::AutoDispatchBelowADInplaceOrView guard;
  std::tuple<at::Tensor, at::Tensor> result{gather(x, index, inverse), hands_through ? x : at::Tensor()};
  if (node) {
    node->index = Saved(index);
    node->inverse = Saved(inverse);
    if (hands_through) {
      std::get<1>(result) = x.detach();
      set_outputs(node, std::get<0>(result), std::get<1>(result));
    } else {
      set_outputs(node, std::get<0>(result));
    }
  }
  return result;
}

at::Tensor scatter_add_autograd(const at::Tensor& y, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                                const at::Tensor& slots, const at::Tensor& kept, double scale) {
  check_not_dual(y, "y", "scatter_add", "stochastic_depth");
  check_not_dual(residual, "residual", "scatter_add", "stochastic_depth");
  check_not_dual(gamma, "gamma", "scatter_add", "stochastic_depth");
  const auto node = needs_graph(y) || needs_graph(residual) || needs_graph(gamma)
                        ? make_node<ScatterAddBackward>(y, residual, gamma)
                        : NodePointer<ScatterAddBackward>();
  at::Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return scatter_add(y, residual, gamma, slots, kept, scale);
  }();
  if (node) {
    node->save(y, gamma, scale, /*keeps_all=*/!is_gathered(slots, kept));
    node->slots = Saved(slots);
    node->kept = Saved(kept);
    set_outputs(node, out);
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> scatter_add_backward_autograd(const at::Tensor& grad,
                                                                 const std::optional<at::Tensor>& y,
                                                                 const std::optional<at::Tensor>& gamma,
                                                                 const at::Tensor& slots, const at::Tensor& kept,
                                                                 double scale, at::ScalarType dtype,
                                                                 std::array<bool, 2> output_mask) {
  if (!is_differentiated(grad, y, gamma)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return scatter_add_backward(grad, y, gamma, slots, kept, scale, dtype, output_mask);
  }
  check_scatter_add_backward_inputs(grad, y, gamma, slots, kept, dtype, output_mask);
  if (!is_gathered(slots, kept)) {
    return add_backward_formula(grad, y, gamma, kept, scale, dtype, output_mask);
  }
  return add_backward_formula(gather_formula(grad, kept), y, gamma, kept.ge(0), scale, dtype, output_mask);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> gather_with_x(const at::Tensor& x, const at::Tensor& index,
                                                 const at::Tensor& inverse) {
  return gather_autograd(x, index, inverse, /*hands_through=*/true);
}

TORCH_LIBRARY_IMPL(droppath_ext, Autograd, m) {
  m.impl("drop_path", &drop_path_autograd);
  m.impl("drop_path_backward", &drop_path_backward_autograd);
  m.impl("drop_path_add", &drop_path_add_autograd);
  m.impl("drop_path_add_backward", &drop_path_add_backward_autograd);
  m.impl("gather", [](const at::Tensor& x, const at::Tensor& index, const at::Tensor& inverse) {
    return std::get<0>(gather_autograd(x, index, inverse, /*hands_through=*/false));
  });
  m.impl("scatter_add", &scatter_add_autograd);
  m.impl("scatter_add_backward", &scatter_add_backward_autograd);
  m.impl("draw_fixed", torch::CppFunction::makeFallthrough());  // integers have no derivatives
}

}  // namespace droppath_ext
