#include "ops.h"

#include <ATen/DimVector.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

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
  // out[i] = x[index[i]], zeros where that is -1. inverse[b]: which i takes sample b, -1 if none does; one at most.
  m.def("gather(Tensor x, Tensor index, Tensor inverse) -> Tensor");
  // drop_path_add of samples that are elsewhere: out[b] = residual[b] + gamma * y[slots[b]] * scale, the residual where
  // the slot is -1. kept is the inverse of slots; both are empty where y has a row for each sample.
  m.def("scatter_add(Tensor y, Tensor residual, Tensor? gamma, Tensor slots, Tensor kept, float scale) -> Tensor");
  // The same in place, residual[kept[k]] += y[k], for tensors of one dtype: what is dropped is not even read.
  m.def("scatter_add_(Tensor(a!) residual, Tensor y, Tensor slots, Tensor kept) -> ()");
  m.def(
      "scatter_add_backward(Tensor grad, Tensor? y, Tensor? gamma, Tensor slots, Tensor kept, float scale,"
      " ScalarType dtype, bool[2] output_mask) -> (Tensor grad_y, Tensor grad_gamma)");
  // A subset of `count` samples of x, of which only the number of samples and the device matter: for each sample its
  // place among the kept ones, or -1; and the kept ones in ascending order.
  m.def("draw_fixed(Tensor x, SymInt count, Generator? generator=None) -> (Tensor slots, Tensor kept)",
        {at::Tag::nondeterministic_seeded});
}

namespace droppath_ext {

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

at::Tensor drop_path_backward(const at::Tensor& grad, const at::Tensor& keep, double scale) {
  static const auto op = find_op<decltype(drop_path_backward)>("droppath_ext::drop_path_backward");
  return op.call(grad, keep, scale);
}

std::tuple<at::Tensor, at::Tensor> drop_path_add(const at::Tensor& x, const at::Tensor& residual,
                                                 const std::optional<at::Tensor>& gamma, double drop_prob,
                                                 bool scale_by_keep, bool per_sample,
                                                 const std::optional<at::Generator>& generator) {
  static const auto op = find_op<decltype(drop_path_add)>("droppath_ext::drop_path_add");
  return op.call(x, residual, gamma, drop_prob, scale_by_keep, per_sample, generator);
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_backward(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                                          const std::optional<at::Tensor>& gamma,
                                                          const at::Tensor& keep, double scale, at::ScalarType dtype,
                                                          std::array<bool, 2> output_mask) {
  static const auto op = find_op<decltype(drop_path_add_backward)>("droppath_ext::drop_path_add_backward");
  return op.call(grad, x, gamma, keep, scale, dtype, output_mask);
}

at::Tensor gather(const at::Tensor& x, const at::Tensor& index, const at::Tensor& inverse) {
  static const auto op = find_op<decltype(gather)>("droppath_ext::gather");
  return op.call(x, index, inverse);
}

at::Tensor scatter_add(const at::Tensor& y, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                       const at::Tensor& slots, const at::Tensor& kept, double scale) {
  static const auto op = find_op<decltype(scatter_add)>("droppath_ext::scatter_add");
  return op.call(y, residual, gamma, slots, kept, scale);
}

void scatter_add_(const at::Tensor& residual, const at::Tensor& y, const at::Tensor& slots, const at::Tensor& kept) {
  static const auto op = find_op<decltype(scatter_add_)>("droppath_ext::scatter_add_");
  op.call(residual, y, slots, kept);
}

std::tuple<at::Tensor, at::Tensor> scatter_add_backward(const at::Tensor& grad, const std::optional<at::Tensor>& y,
                                                        const std::optional<at::Tensor>& gamma, const at::Tensor& slots,
                                                        const at::Tensor& kept, double scale, at::ScalarType dtype,
                                                        std::array<bool, 2> output_mask) {
  static const auto op = find_op<decltype(scatter_add_backward)>("droppath_ext::scatter_add_backward");
  return op.call(grad, y, gamma, slots, kept, scale, dtype, output_mask);
}

std::tuple<at::Tensor, at::Tensor> draw_fixed(const at::Tensor& x, c10::SymInt count,
                                              const std::optional<at::Generator>& generator) {
  static const auto op = find_op<decltype(draw_fixed)>("droppath_ext::draw_fixed");
  return op.call(x, std::move(count), generator);
}

namespace {

bool is_half_precision(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

// Whether a kernel for x of `dtype` reads this one beside it.
bool is_same_or_wider(at::ScalarType other, at::ScalarType dtype) {
  return other == dtype || (is_half_precision(dtype) && other == at::kFloat);
}

void check_dtype(const at::Tensor& tensor, const char* name) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(is_half_precision(dtype) || dtype == at::kFloat || dtype == at::kDouble, name,
                   " must be float16, bfloat16, float32 or float64, but got ", c10::getDtypeNames(dtype).first);
}

void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& x, const char* x_name = "x") {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, " must be on ", x.device(), ", where ", x_name,
                    " is, but got ", tensor.device());
}

}  // namespace

void check_input(const at::Tensor& x, const char* name) {
  check_dtype(x, name);
  TORCH_CHECK_VALUE(x.dim() > 0, name, " must have at least one dimension, the samples, but got a 0-dim tensor");
}

void check_drop_prob(double drop_prob) {
  TORCH_CHECK_VALUE(drop_prob >= 0.0 && drop_prob <= 1.0, "drop_prob must be in [0, 1], but got ", drop_prob);
}

void check_count(const at::Tensor& x, const c10::SymInt& count) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x must have at least one dimension, the samples, but got a 0-dim tensor");
  TORCH_CHECK_VALUE(count >= 1 && count <= x.sym_size(0), "count must be between 1 and the ", x.sym_size(0),
                    " samples of x, but got ", count);
}

void check_keep(const at::Tensor& keep, const at::Tensor& x, bool may_be_empty) {
  TORCH_CHECK_TYPE(keep.scalar_type() == at::kBool, "keep must be bool, but got ",
                   c10::getDtypeNames(keep.scalar_type()).first);
  TORCH_CHECK_VALUE(keep.device() == x.device(), "keep must be on ", x.device(), ", but got ", keep.device());
  if (may_be_empty && keep.sym_numel() == 0) {
    return;
  }
  TORCH_CHECK_VALUE(keep.dim() == 1 && (keep.sym_size(0) == 1 || keep.sym_size(0) == x.sym_size(0)),
                    "keep must have one entry for each of ", x.sym_size(0), " samples, or one in all, but got shape ",
                    keep.sym_sizes());
}

void check_index(const at::Tensor& index, const char* index_name, const at::Tensor& inverse, const char* inverse_name,
                 const at::Tensor& x) {
  for (const auto& [tensor, name] : {std::pair(&index, index_name), std::pair(&inverse, inverse_name)}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kLong, name, " must be int64, but got ",
                     c10::getDtypeNames(tensor->scalar_type()).first);
    TORCH_CHECK_VALUE(tensor->dim() == 1, name, " must have one dimension, but got shape ", tensor->sym_sizes());
    check_device(*tensor, name, x);
  }
  TORCH_CHECK_VALUE(inverse.sym_size(0) == x.sym_size(0), inverse_name, " must have one entry for each of ",
                    x.sym_size(0), " samples, but got ", inverse.sym_size(0));
}

namespace {

// The dtypes and devices of the three.
void check_operands(const at::Tensor& x, const char* x_name, const at::Tensor& residual,
                    const std::optional<at::Tensor>& gamma) {
  check_input(x, x_name);
  check_input(residual, "residual");
  check_device(residual, "residual", x, x_name);
  if (gamma) {
    check_dtype(*gamma, "gamma");
    check_device(*gamma, "gamma", x, x_name);
  }
}

void check_fused_mix(const at::Tensor& x, const char* x_name, const at::Tensor& residual,
                     const std::optional<at::Tensor>& gamma, const char* function) {
  TORCH_CHECK_TYPE(is_fused_mix(x, residual, gamma), "no kernel combines ", x_name, " of dtype ", x.scalar_type(),
                   " with residual of dtype ", residual.scalar_type(),
                   gamma ? c10::str(" and gamma of dtype ", gamma->scalar_type()) : "", "; droppath_ext.", function,
                   " does");
}

// What the gradients of x (or y) and gamma need, but for which samples they are.
void check_backward_operands(const at::Tensor& grad, const std::optional<at::Tensor>& x, const char* x_name,
                             c10::SymIntArrayRef x_sizes, const std::optional<at::Tensor>& gamma, at::ScalarType dtype,
                             std::array<bool, 2> output_mask) {
  TORCH_CHECK_TYPE(is_same_or_wider(grad.scalar_type(), dtype), "no kernel reads grad of dtype ", grad.scalar_type(),
                   " for ", x_name, " of dtype ", dtype);
  TORCH_CHECK_VALUE(!output_mask[1] || (x && gamma), "the gradient of gamma needs both ", x_name, " and gamma");
  if (gamma) {
    check_device(*gamma, "gamma", grad, "grad");
    TORCH_CHECK_TYPE(is_same_or_wider(gamma->scalar_type(), dtype), "no kernel reads gamma of dtype ",
                     gamma->scalar_type(), " for ", x_name, " of dtype ", dtype);
    gamma_dim(grad, *gamma);
  }
  if (x) {
    check_device(*x, x_name, grad, "grad");
    TORCH_CHECK_TYPE(x->scalar_type() == dtype, x_name, " must be of dtype ", dtype, ", but got ", x->scalar_type());
    TORCH_CHECK_VALUE(x->sym_sizes().equals(x_sizes), x_name, " must have the shape ", x_sizes, ", but got ",
                      x->sym_sizes());
  }
}

}  // namespace

void check_add_inputs(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma) {
  check_operands(x, "x", residual, gamma);
  TORCH_CHECK_VALUE(residual.sym_sizes().equals(x.sym_sizes()), "residual must have the shape of x, ", x.sym_sizes(),
                    ", but got ", residual.sym_sizes(), ": expand it first, say by residual.expand_as(x)");
  if (gamma) {
    gamma_dim(x, *gamma);
  }
  check_fused_mix(x, "x", residual, gamma, "drop_path_add");
}

void check_scatter_add_inputs(const at::Tensor& y, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                              const at::Tensor& slots, const at::Tensor& kept) {
  check_operands(y, "y", residual, gamma);
  if (is_gathered(slots, kept)) {
    check_index(slots, "slots", kept, "kept", y);
    TORCH_CHECK_VALUE(slots.sym_size(0) == residual.sym_size(0), "slots must have one entry for each of ",
                      residual.sym_size(0), " samples of residual, but got ", slots.sym_size(0));
  } else {
    TORCH_CHECK_VALUE(y.sym_size(0) == residual.sym_size(0), "y must have the ", residual.sym_size(0),
                      " samples of residual where there are no slots, but got ", y.sym_size(0));
  }
  TORCH_CHECK_VALUE(y.sym_sizes().slice(1).equals(residual.sym_sizes().slice(1)),
                    "a sample of y must have the shape of one of residual, ", residual.sym_sizes().slice(1),
                    ", but got ", y.sym_sizes().slice(1));
  if (gamma) {
    gamma_dim(y, *gamma);
  }
  check_fused_mix(y, "y", residual, gamma, "stochastic_depth");
}

void check_scatter_add_inplace_inputs(const at::Tensor& residual, const at::Tensor& y, const at::Tensor& slots,
                                      const at::Tensor& kept) {
  check_scatter_add_inputs(y, residual, std::nullopt, slots, kept);
  TORCH_CHECK_TYPE(residual.scalar_type() == y.scalar_type(), "residual must be of the dtype of y, ", y.scalar_type(),
                   ", but got ", residual.scalar_type());
  TORCH_CHECK_VALUE(residual.is_non_overlapping_and_dense(),
                    "residual must be dense to be changed in place, but has strides ", residual.sym_strides());
}

void check_add_backward_inputs(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                               const std::optional<at::Tensor>& gamma, const at::Tensor& keep, at::ScalarType dtype,
                               std::array<bool, 2> output_mask) {
  check_input(grad, "grad");
  check_keep(keep, grad, /*may_be_empty=*/true);
  check_backward_operands(grad, x, "x", grad.sym_sizes(), gamma, dtype, output_mask);
}

void check_scatter_add_backward_inputs(const at::Tensor& grad, const std::optional<at::Tensor>& y,
                                       const std::optional<at::Tensor>& gamma, const at::Tensor& slots,
                                       const at::Tensor& kept, at::ScalarType dtype, std::array<bool, 2> output_mask) {
  check_input(grad, "grad");
  at::SymDimVector sizes(grad.sym_sizes());
  if (is_gathered(slots, kept)) {
    check_index(kept, "kept", slots, "slots", grad);
    sizes[0] = kept.sym_size(0);
  }
  check_backward_operands(grad, y, "y", sizes, gamma, dtype, output_mask);
}

bool is_fused_mix(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma) {
  const auto dtype = x.scalar_type();
  return is_same_or_wider(residual.scalar_type(), dtype) && (!gamma || is_same_or_wider(gamma->scalar_type(), dtype));
}

at::ScalarType add_dtype(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma) {
  const auto dtype = c10::promoteTypes(x.scalar_type(), residual.scalar_type());
  return gamma ? c10::promoteTypes(dtype, gamma->scalar_type()) : dtype;
}

double keep_scale(double drop_prob, bool scale_by_keep) {
  return scale_by_keep && drop_prob < 1.0 ? 1.0 / (1.0 - drop_prob) : 1.0;
}

at::Tensor empty_samples(const at::Tensor& x, c10::SymInt samples, at::ScalarType dtype) {
  at::SymDimVector sizes(x.sym_sizes());
  sizes[0] = std::move(samples);
  at::DimVector dims(x.dim());  // the outermost first
  std::iota(dims.begin(), dims.end(), 0);
  bool is_expanded = false;
  for (const auto& stride : x.sym_strides()) {
    is_expanded = is_expanded || stride == 0;
  }
  if (!is_expanded) {
    // The stride of a single sample means nothing.
    const auto first = dims.begin() + (x.sym_size(0) == 1 ? 1 : 0);
    std::stable_sort(first, dims.end(), [&](int64_t a, int64_t b) { return x.sym_stride(a) > x.sym_stride(b); });
  }
  at::SymDimVector strides(x.dim());
  c10::SymInt stride = 1;
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    strides[*dim] = stride;
    stride *= sizes[*dim].max(1);
  }
  return at::empty_strided_symint(sizes, strides, x.options().dtype(dtype));
}

Rows find_rows(const at::Tensor& out, int64_t entries) {
  if (entries <= 1 || out.numel() == 0) {
    const int64_t samples = out.numel() == 0 ? entries : 1;
    return {samples, out.numel(), samples};
  }
  // In a dense tensor the stride of the samples is the number of elements that lie inside of them.
  const int64_t length = out.stride(0);
  return {out.numel() / length, length, out.size(0)};
}

namespace {

std::optional<RowStrides> find_row_strides(const at::Tensor& x, const at::Tensor& out, const Rows& rows,
                                           bool is_gathered) {
  RowStrides strides{rows.length, rows.length * rows.samples};
  if ((x.strides() == out.strides() && !is_gathered) || x.numel() == 0 || out.numel() == 0) {
    return strides;
  }
  const auto is_inner = [&](int64_t dim) { return out.stride(dim) < rows.length; };
  const auto is_sample = [&](int64_t dim) { return dim == 0 && (rows.samples > 1 || is_gathered); };
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

Input with_rows(const at::Tensor& x, const at::Tensor& out, const Rows& rows, bool is_gathered) {
  if (const auto strides = find_row_strides(x, out, rows, is_gathered)) {
    return {x, *strides};
  }
  const at::Tensor copy =
      is_gathered ? empty_samples(out, x.size(0), x.scalar_type()) : at::empty_like(out, x.options());
  copy.copy_(x);
  return {copy, find_row_strides(copy, out, rows, is_gathered).value()};
}

at::Tensor dense_like(const at::Tensor& grad) {
  return grad.is_non_overlapping_and_dense() ? grad : at::empty_like(grad).copy_(grad);
}

int64_t gamma_dim(const at::Tensor& x, const at::Tensor& gamma) {
  const int64_t first = x.dim() - gamma.dim();
  const auto is_only_long_dim = [&](int64_t dim) {
    for (int64_t other = first; other < x.dim(); ++other) {
      if (gamma.sym_size(other - first) != (other == dim ? x.sym_size(dim) : c10::SymInt(1))) {
        return false;
      }
    }
    return true;
  };
  for (int64_t dim = x.dim() - 1; first >= 0 && dim >= std::max<int64_t>(first, 1); --dim) {
    if (is_only_long_dim(dim)) {
      return dim;
    }
  }
  TORCH_CHECK_VALUE(false, "gamma must broadcast along one dim of a sample, as [D] or [C, 1, 1] do, but got shape ",
                    gamma.sym_sizes(), " for x of shape ", x.sym_sizes());
}

Channels find_channels(const at::Tensor& out, int64_t gamma_dim) {
  return {out.size(gamma_dim) == 1 ? 1 : out.stride(gamma_dim), out.size(gamma_dim)};
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

at::Tensor gather_meta(const at::Tensor& x, const at::Tensor& index, const at::Tensor& inverse) {
  check_input(x, "x");
  check_index(index, "index", inverse, "inverse", x);
  return empty_samples(x, index.sym_size(0), x.scalar_type());
}

at::Tensor scatter_add_meta(const at::Tensor& y, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                            const at::Tensor& slots, const at::Tensor& kept, double /*scale*/) {
  check_scatter_add_inputs(y, residual, gamma, slots, kept);
  return at::empty_like(residual, residual.options().dtype(add_dtype(y, residual, gamma)));
}

void scatter_add_inplace_meta(const at::Tensor& residual, const at::Tensor& y, const at::Tensor& slots,
                              const at::Tensor& kept) {
  check_scatter_add_inplace_inputs(residual, y, slots, kept);
}

std::tuple<at::Tensor, at::Tensor> scatter_add_backward_meta(const at::Tensor& grad, const std::optional<at::Tensor>& y,
                                                             const std::optional<at::Tensor>& gamma,
                                                             const at::Tensor& slots, const at::Tensor& kept,
                                                             double /*scale*/, at::ScalarType dtype,
                                                             std::array<bool, 2> output_mask) {
  check_scatter_add_backward_inputs(grad, y, gamma, slots, kept, dtype, output_mask);
  const auto options = grad.options().dtype(dtype);
  const auto samples = is_gathered(slots, kept) ? kept.sym_size(0) : grad.sym_size(0);
  return {output_mask[0] ? empty_samples(grad, samples, dtype) : at::empty({0}, options),
          output_mask[1] ? at::empty_like(*gamma, at::MemoryFormat::Contiguous) : at::empty({0}, options)};
}

std::tuple<at::Tensor, at::Tensor> draw_fixed_meta(const at::Tensor& x, c10::SymInt count,
                                                   const std::optional<at::Generator>& /*generator*/) {
  check_count(x, count);
  const auto options = x.options().dtype(at::kLong);
  return {at::empty_symint({x.sym_size(0)}, options), at::empty_symint({count}, options)};
}

}  // namespace

TORCH_LIBRARY_IMPL(droppath_ext, Meta, m) {
  m.impl("drop_path", &drop_path_meta);
  m.impl("drop_path_backward", &drop_path_backward_meta);
  m.impl("drop_path_add", &drop_path_add_meta);
  m.impl("drop_path_add_backward", &drop_path_add_backward_meta);
  m.impl("gather", &gather_meta);
  m.impl("scatter_add", &scatter_add_meta);
  m.impl("scatter_add_", &scatter_add_inplace_meta);
  m.impl("scatter_add_backward", &scatter_add_backward_meta);
  m.impl("draw_fixed", &draw_fixed_meta);
}

}  // namespace droppath_ext
