// Derivatives: one torch::autograd::Function per op. drop_path is linear in x, so the derivative of either op is
// drop_path_backward.
#include <ATen/DimVector.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace droppath_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void save(AutogradContext* ctx, const at::Tensor& keep, double scale) {
  ctx->save_for_backward({keep});
  ctx->saved_data["scale"] = scale;
  ctx->set_materialize_grads(false);
}

at::Tensor backward_of(AutogradContext* ctx, const at::Tensor& grad) {
  if (!grad.defined()) {
    return {};
  }
  return drop_path_backward(grad, ctx->get_saved_variables()[0], ctx->saved_data["scale"].toDouble());
}

struct DropPath : torch::autograd::Function<DropPath> {
  // The mask leaves by reference: as a second output it would cost the bookkeeping of a variable.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, double drop_prob, bool scale_by_keep,
                            bool per_sample, const std::optional<at::Generator>& generator, at::Tensor* keep) {
    at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor out;
    std::tie(out, *keep) = drop_path(x, drop_prob, scale_by_keep, per_sample, generator);
    save(ctx, *keep, keep_scale(drop_prob, scale_by_keep));
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {backward_of(ctx, grads[0]), {}, {}, {}, {}, {}};
  }
};

struct DropPathBackward : torch::autograd::Function<DropPathBackward> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& grad, const at::Tensor& keep, double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, keep, scale);
    return drop_path_backward(grad, keep, scale);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {backward_of(ctx, grads[0]), {}, {}};
  }
};

// torch::autograd::Function has no forward mode: it would lose the tangent without a word.
bool is_dual(const at::Tensor& x) { return x._fw_grad(/*level=*/0).defined(); }

// A graph node costs more than a tiny forward: build it only where somebody will ask for gradients.
bool needs_graph(const at::Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }

std::tuple<at::Tensor, at::Tensor> drop_path_autograd(const at::Tensor& x, double drop_prob, bool scale_by_keep,
                                                      bool per_sample, const std::optional<at::Generator>& generator) {
  TORCH_CHECK_NOT_IMPLEMENTED(!is_dual(x), "torch.ops.droppath_ext.drop_path has no forward-mode derivative, but x ",
                              "carries a tangent; droppath_ext.drop_path has one");
  if (!needs_graph(x)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return drop_path(x, drop_prob, scale_by_keep, per_sample, generator);
  }
  at::Tensor keep;
  at::Tensor out = DropPath::apply(x, drop_prob, scale_by_keep, per_sample, generator, &keep);
  return {std::move(out), std::move(keep)};
}

at::Tensor drop_path_backward_autograd(const at::Tensor& grad, const at::Tensor& keep, double scale) {
  if (is_dual(grad)) {
    // Forward over reverse: a graph built by the kernels meets a tangent only now. The composite formula carries it.
    check_keep(keep, grad);
    at::DimVector shape(grad.dim(), 1);
    shape[0] = keep.size(0);
    return at::where(keep.view(shape), at::mul(grad, scale), 0);
  }
  if (!needs_graph(grad)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return drop_path_backward(grad, keep, scale);
  }
  return DropPathBackward::apply(grad, keep, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(droppath_ext, Autograd, m) {
  m.impl("drop_path", &drop_path_autograd);
  m.impl("drop_path_backward", &drop_path_backward_autograd);
}

}  // namespace droppath_ext
