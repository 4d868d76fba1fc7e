// Derivatives: one torch::autograd::Function per forward op. The backward ops are differentiated through the formulas
// below, in ATen: second derivatives are rare, and there the formulas' own derivatives are free.
#include <ATen/DimVector.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace droppath_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct DropPath : torch::autograd::Function<DropPath> {
  // The mask leaves by reference: as a second output it would cost the bookkeeping of a variable.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, double drop_prob, bool scale_by_keep,
                            bool per_sample, const std::optional<at::Generator>& generator, at::Tensor* keep) {
    at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor out;
    std::tie(out, *keep) = drop_path(x, drop_prob, scale_by_keep, per_sample, generator);
    ctx->save_for_backward({*keep});
    ctx->saved_data["scale"] = keep_scale(drop_prob, scale_by_keep);
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    if (grads[0].defined()) {
      result[0] = drop_path_backward(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["scale"].toDouble());
    }
    return result;
  }
};

// Tensor::to, which takes its time to find that there is nothing to do.
at::Tensor cast(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

struct DropPathAdd : torch::autograd::Function<DropPathAdd> {
  // Places among the tensors of the inputs, as needs_input_grad counts them, and in what backward returns.
  enum Input { kX, kResidual, kGamma };

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& residual,
                            const std::optional<at::Tensor>& gamma, double drop_prob, bool scale_by_keep,
                            bool per_sample, const std::optional<at::Generator>& generator, at::Tensor* keep) {
    at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor out;
    std::tie(out, *keep) = drop_path_add(x, residual, gamma, drop_prob, scale_by_keep, per_sample, generator);
    const bool needs_gamma_grad = gamma && gamma->requires_grad();
    // gamma's shape and dtype are needed for its gradient, too.
    ctx->save_for_backward({*keep, needs_gamma_grad ? x : at::Tensor(),
                            gamma && (x.requires_grad() || needs_gamma_grad) ? *gamma : at::Tensor()});
    ctx->saved_data["scale"] = keep_scale(drop_prob, scale_by_keep);
    ctx->saved_data["dtype"] = x.scalar_type();
    ctx->saved_data["residual_dtype"] = residual.scalar_type();
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(8);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) {
      return result;
    }
    const auto saved = ctx->get_saved_variables();
    const auto defined = [](const at::Tensor& tensor) {
      return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
    };
    const bool needs_x = ctx->needs_input_grad(kX);
    const bool needs_gamma = saved[2].defined() && ctx->needs_input_grad(kGamma);
    const auto dtype = ctx->saved_data["dtype"].toScalarType();
    if (saved[0].sym_numel() == 0 && !saved[2].defined()) {
      // Neither mask nor gamma: a plain addition.
      result[kX] = needs_x ? cast(grad, dtype) : at::Tensor();
    } else if (needs_x || needs_gamma) {
      auto [grad_x, grad_gamma] =
          drop_path_add_backward(grad, needs_gamma ? defined(saved[1]) : std::nullopt, defined(saved[2]), saved[0],
                                 ctx->saved_data["scale"].toDouble(), dtype, {needs_x, needs_gamma});
      result[kX] = needs_x ? grad_x : at::Tensor();
      result[kGamma] = needs_gamma ? grad_gamma : at::Tensor();
    }
    if (ctx->needs_input_grad(kResidual)) {
      result[kResidual] = cast(grad, ctx->saved_data["residual_dtype"].toScalarType());
    }
    return result;
  }
};

// torch::autograd::Function has no forward mode: it would lose the tangent without a word.
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
  if (!needs_graph(x)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return drop_path(x, drop_prob, scale_by_keep, per_sample, generator);
  }
  at::Tensor keep;
  at::Tensor out = DropPath::apply(x, drop_prob, scale_by_keep, per_sample, generator, &keep);
  return {std::move(out), std::move(keep)};
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
  if (!needs_graph(x) && !needs_graph(residual) && !needs_graph(gamma)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return drop_path_add(x, residual, gamma, drop_prob, scale_by_keep, per_sample, generator);
  }
  at::Tensor keep;
  at::Tensor out = DropPathAdd::apply(x, residual, gamma, drop_prob, scale_by_keep, per_sample, generator, &keep);
  return {std::move(out), std::move(keep)};
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
}

}  // namespace droppath_ext
