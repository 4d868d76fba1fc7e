#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "layout.h"

namespace droppath_ext {

double keep_scale(double drop_prob, bool scale_by_keep) {
  return scale_by_keep && drop_prob < 1.0 ? 1.0 / (1.0 - drop_prob) : 1.0;
}

// The ops: check, allocate, call the backend. A meta tensor has none.
namespace {

void run_add_kept(const at::Tensor& out, const std::optional<at::Tensor>& residual, const at::Tensor& x,
                  const std::optional<at::Tensor>& gamma, const Sources& sources, double scale) {
  if (!out.is_meta()) {
    backend_of(out.device().type()).add_kept(out, residual, x, gamma, sources, scale);
  }
}

// An empty keep mask, to be drawn.
Sources new_mask(const at::Tensor& x, bool per_sample, double drop_prob,
                 const std::optional<at::Generator>& generator) {
  return {allocate({per_sample ? x.sym_size(0) : c10::SymInt(1)}, at::kBool, x), /*is_drawn=*/true, drop_prob,
          generator};
}

std::tuple<at::Tensor, at::Tensor> drop_path_op(const at::Tensor& x, double drop_prob, bool scale_by_keep,
                                                bool per_sample, const std::optional<at::Generator>& generator) {
  check_input(x, "x");
  check_drop_prob(drop_prob);
  Sources keep = new_mask(x, per_sample, drop_prob, generator);
  at::Tensor out = allocate_like(x, x.scalar_type());
  run_add_kept(out, std::nullopt, x, std::nullopt, keep, keep_scale(drop_prob, scale_by_keep));
  return {std::move(out), std::move(keep.tensor)};
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_op(const at::Tensor& x, const at::Tensor& residual,
                                                    const std::optional<at::Tensor>& gamma, double drop_prob,
                                                    bool scale_by_keep, bool per_sample,
                                                    const std::optional<at::Generator>& generator) {
  check_add_inputs(x, residual, gamma);
  check_drop_prob(drop_prob);
  Sources keep =
      drop_prob == 0.0 ? Sources{allocate({0}, at::kBool, x)} : new_mask(x, per_sample, drop_prob, generator);
  at::Tensor out = allocate_like(x, add_dtype(x, residual, gamma));
  run_add_kept(out, residual, x, gamma, keep, keep_scale(drop_prob, scale_by_keep));
  return {std::move(out), std::move(keep.tensor)};
}

std::tuple<at::Tensor, at::Tensor> draw_fixed_op(const at::Tensor& x, c10::SymInt count,
                                                 const std::optional<at::Generator>& generator) {
  check_drawn_from(x);
  check_count(count, x.sym_size(0));
  at::Tensor slots = allocate({x.sym_size(0)}, at::kLong, x);
  at::Tensor kept = allocate({std::move(count)}, at::kLong, x);
  if (!slots.is_meta()) {
    backend_of(slots.device().type()).draw_fixed(slots, kept, generator);
  }
  return {std::move(slots), std::move(kept)};
}

std::tuple<at::Tensor, at::Tensor> draw_keep_op(const at::Tensor& x, const at::Tensor& drop_prob, bool scale_by_keep,
                                                bool per_sample, const std::optional<at::Generator>& generator) {
  check_drawn_from(x);
  check_rate(drop_prob, x);
  at::Tensor keep = allocate({per_sample ? x.sym_size(0) : c10::SymInt(1)}, at::kBool, x);
  at::Tensor factor = allocate({}, at::kDouble, x);
  if (!keep.is_meta()) {
    backend_of(keep.device().type()).draw_keep(keep, factor, drop_prob, scale_by_keep, generator);
  }
  return {std::move(keep), std::move(factor)};
}

Sources given_sources(const at::Tensor& sources, const std::optional<at::Tensor>& factor) {
  check_factor(factor, sources);
  Sources given{dense_sources(sources)};
  if (factor) {
    given.factor = *factor;
  }
  return given;
}

at::Tensor scale_kept_op(const at::Tensor& x, const at::Tensor& sources, double scale,
                         const std::optional<at::Tensor>& factor) {
  check_input(x, "x");
  check_sources(sources, x);
  const Sources given = given_sources(sources, factor);
  at::Tensor out =
      is_index(sources) ? allocate_samples(x, sources.sym_size(0), x.scalar_type()) : allocate_like(x, x.scalar_type());
  run_add_kept(out, std::nullopt, x, std::nullopt, given, scale);
  return out;
}

at::Tensor add_kept_op(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                       const at::Tensor& sources, double scale, const std::optional<at::Tensor>& factor) {
  check_add_kept_inputs(x, residual, gamma, sources);
  const Sources given = given_sources(sources, factor);
  at::Tensor out = allocate_like(residual, add_dtype(x, residual, gamma));
  run_add_kept(out, residual, x, gamma, given, scale);
  return out;
}

std::tuple<at::Tensor, at::Tensor> add_kept_backward_op(const at::Tensor& given_grad,
                                                        const std::optional<at::Tensor>& x,
                                                        const std::optional<at::Tensor>& gamma,
                                                        const at::Tensor& sources, double scale, at::ScalarType dtype,
                                                        std::array<bool, 2> output_mask,
                                                        const std::optional<at::Tensor>& factor) {
  check_backward_inputs(given_grad, x, gamma, sources, dtype, output_mask);
  // A wider gamma makes a wider output, whose gradient this is; whoever calls the op may give another one.
  const at::Tensor grad = gamma && gamma->scalar_type() != dtype ? given_grad.to(gamma->scalar_type()) : given_grad;
  const auto [needs_x, needs_gamma] = output_mask;
  at::Tensor grad_x = !needs_x            ? allocate({0}, dtype, grad)
                      : is_index(sources) ? allocate_samples(grad, sources.sym_size(0), dtype)
                                          : allocate_like(grad, dtype);
  at::Tensor grad_gamma =
      needs_gamma ? allocate(gamma->sym_sizes(), gamma->scalar_type(), grad) : allocate({0}, dtype, grad);
  if (grad.is_meta()) {
    return {std::move(grad_x), std::move(grad_gamma)};
  }
  const Sources given = given_sources(sources, factor);
  if (needs_gamma && x->numel() != 0) {
    const at::Tensor layout = needs_x ? grad_x : dense_layout_of(is_index(sources) ? *x : grad);
    backend_of(grad.device().type()).gamma_grad(layout, needs_x, grad_gamma, grad, *x, *gamma, given, scale);
    return {std::move(grad_x), std::move(grad_gamma)};
  }
  if (needs_gamma) {
    grad_gamma.zero_();
  }
  if (needs_x) {
    run_add_kept(grad_x, std::nullopt, grad, gamma, given, scale);
  }
  return {std::move(grad_x), std::move(grad_gamma)};
}

void register_ops(torch::Library& m) {
  m.impl("drop_path", &drop_path_op);
  m.impl("drop_path_add", &drop_path_add_op);
  m.impl("draw_keep", &draw_keep_op);
  m.impl("draw_fixed", &draw_fixed_op);
  m.impl("scale_kept", &scale_kept_op);
  m.impl("add_kept", &add_kept_op);
  m.impl("add_kept_backward", &add_kept_backward_op);
}

}  // namespace

TORCH_LIBRARY_IMPL(droppath_ext, Meta, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(droppath_ext, CPU, m) { register_ops(m); }
#ifdef DROPPATH_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(droppath_ext, CUDA, m) { register_ops(m); }
#endif

Backend& backend_of(at::DeviceType device) {
  static std::array<Backend, 2> backends{};  // the CPU's and CUDA's
  return backends[device == at::kCPU ? 0 : 1];
}

void add_kept_(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& slots) {
  RECORD_FUNCTION("droppath_ext::add_kept_", std::vector<c10::IValue>());  // for profilers, which see only ops
  run_add_kept(residual, residual, x, std::nullopt, {dense_sources(slots)}, /*scale=*/1.0);
}

// The same through the dispatcher.
namespace {

template <typename Function>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> drop_path(const at::Tensor& x, double drop_prob, bool scale_by_keep, bool per_sample,
                                             const std::optional<at::Generator>& generator) {
  static const auto op = find_op<decltype(drop_path)>("droppath_ext::drop_path");
  return op.call(x, drop_prob, scale_by_keep, per_sample, generator);
}

std::tuple<at::Tensor, at::Tensor> drop_path_add(const at::Tensor& x, const at::Tensor& residual,
                                                 const std::optional<at::Tensor>& gamma, double drop_prob,
                                                 bool scale_by_keep, bool per_sample,
                                                 const std::optional<at::Generator>& generator) {
  static const auto op = find_op<decltype(drop_path_add)>("droppath_ext::drop_path_add");
  return op.call(x, residual, gamma, drop_prob, scale_by_keep, per_sample, generator);
}

std::tuple<at::Tensor, at::Tensor> draw_fixed(const at::Tensor& x, c10::SymInt count,
                                              const std::optional<at::Generator>& generator) {
  static const auto op = find_op<decltype(draw_fixed)>("droppath_ext::draw_fixed");
  return op.call(x, std::move(count), generator);
}

std::tuple<at::Tensor, at::Tensor> draw_keep(const at::Tensor& x, const at::Tensor& drop_prob, bool scale_by_keep,
                                             bool per_sample, const std::optional<at::Generator>& generator) {
  static const auto op = find_op<decltype(draw_keep)>("droppath_ext::draw_keep");
  return op.call(x, drop_prob, scale_by_keep, per_sample, generator);
}

at::Tensor scale_kept(const at::Tensor& x, const at::Tensor& sources, double scale,
                      const std::optional<at::Tensor>& factor) {
  static const auto op = find_op<decltype(scale_kept)>("droppath_ext::scale_kept");
  return op.call(x, sources, scale, factor);
}

at::Tensor add_kept(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                    const at::Tensor& sources, double scale, const std::optional<at::Tensor>& factor) {
  static const auto op = find_op<decltype(add_kept)>("droppath_ext::add_kept");
  return op.call(x, residual, gamma, sources, scale, factor);
}

std::tuple<at::Tensor, at::Tensor> add_kept_backward(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                                     const std::optional<at::Tensor>& gamma, const at::Tensor& sources,
                                                     double scale, at::ScalarType dtype,
                                                     std::array<bool, 2> output_mask,
                                                     const std::optional<at::Tensor>& factor) {
  static const auto op = find_op<decltype(add_kept_backward)>("droppath_ext::add_kept_backward");
  return op.call(grad, x, gamma, sources, scale, dtype, output_mask, factor);
}

}  // namespace droppath_ext
