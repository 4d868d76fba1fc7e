#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

TORCH_LIBRARY(droppath_ext, m) {
  m.def(
      "drop_path(Tensor x, float drop_prob, bool scale_by_keep, bool per_sample, Generator? generator=None)"
      " -> (Tensor out, Tensor keep)",
      {at::Tag::nondeterministic_seeded});
  m.def("drop_path_backward(Tensor grad, Tensor keep, float scale) -> Tensor");
  // keep is empty if drop_prob is 0: there is no mask then.
  m.def(
      "drop_path_add(Tensor x, Tensor residual, Tensor? gamma, float drop_prob, bool scale_by_keep, bool per_sample,"
      " Generator? generator=None) -> (Tensor out, Tensor keep)",
      {at::Tag::nondeterministic_seeded});
  // x is read for the gradient of gamma alone; dtype is that of x. What output_mask does not ask for comes back empty.
  m.def(
      "drop_path_add_backward(Tensor grad, Tensor? x, Tensor? gamma, Tensor keep, float scale, ScalarType dtype,"
      " bool[2] output_mask) -> (Tensor grad_x, Tensor grad_gamma)");
}

namespace droppath_ext {

std::tuple<at::Tensor, at::Tensor> drop_path(const at::Tensor& x, double drop_prob, bool scale_by_keep, bool per_sample,
                                             const std::optional<at::Generator>& generator) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("droppath_ext::drop_path", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, double, bool, bool,
                                                                       const std::optional<at::Generator>&)>();
  return op.call(x, drop_prob, scale_by_keep, per_sample, generator);
}

at::Tensor drop_path_backward(const at::Tensor& grad, const at::Tensor& keep, double scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("droppath_ext::drop_path_backward", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, double)>();
  return op.call(grad, keep, scale);
}

std::tuple<at::Tensor, at::Tensor> drop_path_add(const at::Tensor& x, const at::Tensor& residual,
                                                 const std::optional<at::Tensor>& gamma, double drop_prob,
                                                 bool scale_by_keep, bool per_sample,
                                                 const std::optional<at::Generator>& generator) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("droppath_ext::drop_path_add", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                                       const std::optional<at::Tensor>&, double, bool,
                                                                       bool, const std::optional<at::Generator>&)>();
  return op.call(x, residual, gamma, drop_prob, scale_by_keep, per_sample, generator);
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_backward(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                                          const std::optional<at::Tensor>& gamma,
                                                          const at::Tensor& keep, double scale, at::ScalarType dtype,
                                                          std::array<bool, 2> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("droppath_ext::drop_path_add_backward", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(
                                 const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                                 const at::Tensor&, double, at::ScalarType, std::array<bool, 2>)>();
  return op.call(grad, x, gamma, keep, scale, dtype, output_mask);
}

void check_input(const at::Tensor& x, const char* name) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble, name,
                   " must be float16, bfloat16, float32 or float64, but got ", c10::getDtypeNames(dtype).first);
  TORCH_CHECK_VALUE(x.dim() > 0, name, " must have at least one dimension, the samples, but got a 0-dim tensor");
}

void check_drop_prob(double drop_prob) {
  TORCH_CHECK_VALUE(drop_prob >= 0.0 && drop_prob <= 1.0, "drop_prob must be in [0, 1], but got ", drop_prob);
}

void check_keep(const at::Tensor& keep, const at::Tensor& x) {
  TORCH_CHECK_TYPE(keep.scalar_type() == at::kBool, "keep must be bool, but got ",
                   c10::getDtypeNames(keep.scalar_type()).first);
  TORCH_CHECK_VALUE(keep.device() == x.device(), "keep must be on ", x.device(), ", but got ", keep.device());
  TORCH_CHECK_VALUE(keep.dim() == 1 && (keep.sym_size(0) == 1 || keep.sym_size(0) == x.sym_size(0)),
                    "keep must have one entry for each of ", x.sym_size(0), " samples, or one in all, but got shape ",
                    keep.sym_sizes());
}

namespace {

bool is_half_precision(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, " must be on ", x.device(), ", where x is, but got ",
                    tensor.device());
}

}  // namespace

void check_add_inputs(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma) {
  check_input(x, "x");
  check_input(residual, "residual");
  check_device(residual, "residual", x);
  if (gamma) {
    check_input(*gamma, "gamma");
    check_device(*gamma, "gamma", x);
  }
  TORCH_CHECK_VALUE(residual.sym_sizes().equals(x.sym_sizes()), "residual must have the shape of x, ", x.sym_sizes(),
                    ", but got ", residual.sym_sizes(), ": expand it first, say by residual.expand_as(x)");
  if (gamma) {
    gamma_dim(x, *gamma);
  }
  TORCH_CHECK_TYPE(is_fused_mix(x, residual, gamma), "no kernel combines x of dtype ", x.scalar_type(),
                   " with residual of dtype ", residual.scalar_type(),
                   gamma ? c10::str(" and gamma of dtype ", gamma->scalar_type()) : "",
                   "; droppath_ext.drop_path_add does");
}

void check_add_backward_inputs(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                               const std::optional<at::Tensor>& gamma, const at::Tensor& keep, at::ScalarType dtype,
                               std::array<bool, 2> output_mask) {
  check_input(grad, "grad");
  if (keep.sym_numel() != 0) {
    check_keep(keep, grad);
  }
  TORCH_CHECK_VALUE(!output_mask[1] || (x && gamma), "the gradient of gamma needs both x and gamma");
  if (gamma) {
    check_input(*gamma, "gamma");
    gamma_dim(grad, *gamma);
  }
  if (x) {
    TORCH_CHECK_VALUE(x->sym_sizes().equals(grad.sym_sizes()), "x must have the shape of grad, ", grad.sym_sizes(),
                      ", but got ", x->sym_sizes());
    TORCH_CHECK_TYPE(x->scalar_type() == dtype, "x must be of dtype ", dtype, ", but got ", x->scalar_type());
  }
  TORCH_CHECK_TYPE(dtype == grad.scalar_type() || (grad.scalar_type() == at::kFloat && is_half_precision(dtype)),
                   "grad must be of dtype ", dtype, " or a wider one that a kernel serves, but got ",
                   grad.scalar_type());
}

bool is_fused_mix(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma) {
  const auto dtype = x.scalar_type();
  const auto is_same_or_wider = [&](const at::Tensor& other) {
    return other.scalar_type() == dtype || (is_half_precision(dtype) && other.scalar_type() == at::kFloat);
  };
  return is_same_or_wider(residual) && (!gamma || is_same_or_wider(*gamma));
}

at::ScalarType add_dtype(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma) {
  const auto dtype = c10::promoteTypes(x.scalar_type(), residual.scalar_type());
  return gamma ? c10::promoteTypes(dtype, gamma->scalar_type()) : dtype;
}

double keep_scale(double drop_prob, bool scale_by_keep) {
  return scale_by_keep && drop_prob < 1.0 ? 1.0 / (1.0 - drop_prob) : 1.0;
}

Rows find_rows(const at::Tensor& out, int64_t keep_size) {
  if (keep_size <= 1 || out.numel() == 0) {
    const int64_t samples = out.numel() == 0 ? keep_size : 1;
    return {samples, out.numel(), samples};
  }
  // In a dense tensor the stride of the samples is the number of elements that lie inside of them.
  const int64_t length = out.stride(0);
  return {out.numel() / length, length, out.size(0)};
}

namespace {

std::optional<RowStrides> find_row_strides(const at::Tensor& x, const at::Tensor& out, const Rows& rows) {
  RowStrides strides{rows.length, rows.length * rows.samples};
  if (x.strides() == out.strides() || x.numel() == 0) {
    return strides;
  }
  const auto is_inner = [&](int64_t dim) { return out.stride(dim) < rows.length; };
  const auto is_sample = [&](int64_t dim) { return dim == 0 && rows.samples > 1; };
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    if (x.size(dim) == 1) {
      continue;
    }
    if (is_sample(dim)) {
      strides.sample = x.stride(dim);
    } else if (out.stride(dim) == rows.length * rows.samples) {
      strides.outer = x.stride(dim);
    }
  }
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    if (x.size(dim) == 1 || is_sample(dim)) {
      continue;
    }
    const int64_t expected =
        is_inner(dim) ? out.stride(dim) : strides.outer * (out.stride(dim) / (rows.length * rows.samples));
    if (x.stride(dim) != expected) {
      return std::nullopt;
    }
  }
  return strides;
}

}  // namespace

Input with_rows(const at::Tensor& x, const at::Tensor& out, const Rows& rows) {
  if (const auto strides = find_row_strides(x, out, rows)) {
    return {x, *strides};
  }
  const at::Tensor copy = at::empty_like(out, x.options()).copy_(x);
  return {copy, find_row_strides(copy, out, rows).value()};
}

int64_t gamma_dim(const at::Tensor& x, const at::Tensor& gamma) {
  const auto size = [&](int64_t dim) { return gamma.sym_size(dim - x.dim() + gamma.dim()); };
  const int64_t first = x.dim() - gamma.dim();
  for (int64_t dim = x.dim() - 1; first >= 0 && dim >= std::max<int64_t>(first, 1); --dim) {
    if (size(dim) == x.sym_size(dim) && gamma.sym_numel() == size(dim)) {
      return dim;
    }
  }
  TORCH_CHECK_VALUE(false, "gamma must broadcast along one dim of a sample, as [D] or [C, 1, 1] do, but got shape ",
                    gamma.sym_sizes(), " for x of shape ", x.sym_sizes());
}

Channels find_channels(const at::Tensor& out, const at::Tensor& gamma) {
  const int64_t dim = gamma_dim(out, gamma);
  return {out.size(dim) == 1 ? 1 : out.stride(dim), out.size(dim)};
}

namespace {

std::tuple<at::Tensor, at::Tensor> drop_path_meta(const at::Tensor& x, double drop_prob, bool /*scale_by_keep*/,
                                                  bool per_sample, const std::optional<at::Generator>& /*generator*/) {
  check_input(x, "x");
  check_drop_prob(drop_prob);
  return {at::empty_like(x), at::empty_symint({keep_size(x, per_sample)}, x.options().dtype(at::kBool))};
}

at::Tensor drop_path_backward_meta(const at::Tensor& grad, const at::Tensor& keep, double /*scale*/) {
  check_input(grad, "grad");
  check_keep(keep, grad);
  return at::empty_like(grad);
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_meta(const at::Tensor& x, const at::Tensor& residual,
                                                      const std::optional<at::Tensor>& gamma, double drop_prob,
                                                      bool /*scale_by_keep*/, bool per_sample,
                                                      const std::optional<at::Generator>& /*generator*/) {
  check_add_inputs(x, residual, gamma);
  check_drop_prob(drop_prob);
  return {at::empty_like(x, x.options().dtype(add_dtype(x, residual, gamma))),
          at::empty_symint({add_keep_size(x, drop_prob, per_sample)}, x.options().dtype(at::kBool))};
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_backward_meta(const at::Tensor& grad,
                                                               const std::optional<at::Tensor>& x,
                                                               const std::optional<at::Tensor>& gamma,
                                                               const at::Tensor& keep, double /*scale*/,
                                                               at::ScalarType dtype, std::array<bool, 2> output_mask) {
  check_add_backward_inputs(grad, x, gamma, keep, dtype, output_mask);
  const auto options = grad.options().dtype(dtype);
  return {output_mask[0] ? at::empty_like(grad, options) : at::empty({0}, options),
          output_mask[1] ? at::empty_like(*gamma, at::MemoryFormat::Contiguous) : at::empty({0}, options)};
}

}  // namespace

TORCH_LIBRARY_IMPL(droppath_ext, Meta, m) {
  m.impl("drop_path", &drop_path_meta);
  m.impl("drop_path_backward", &drop_path_backward_meta);
  m.impl("drop_path_add", &drop_path_add_meta);
  m.impl("drop_path_add_backward", &drop_path_add_backward_meta);
}

}  // namespace droppath_ext
