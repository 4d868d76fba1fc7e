#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>

TORCH_LIBRARY(droppath_ext, m) {
  m.def(
      "drop_path(Tensor x, float drop_prob, bool scale_by_keep, bool per_sample, Generator? generator=None)"
      " -> (Tensor out, Tensor keep)",
      {at::Tag::nondeterministic_seeded});
  m.def("drop_path_backward(Tensor grad, Tensor keep, float scale) -> Tensor");
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

double keep_scale(double drop_prob, bool scale_by_keep) {
  return scale_by_keep && drop_prob < 1.0 ? 1.0 / (1.0 - drop_prob) : 1.0;
}

std::optional<Rows> find_rows(const at::Tensor& x, const at::Tensor& out, int64_t keep_size) {
  const auto sizes = x.sizes();
  if (x.is_contiguous() && out.is_contiguous()) {
    const int64_t length = keep_size == 0 ? 0 : x.numel() / keep_size;
    return Rows{keep_size, length, keep_size, length, 0};
  }
  // Dimensions from the innermost outwards, as they lie in the memory of out; those of size 1 lie anywhere.
  c10::SmallVector<int64_t, 6> dims;
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    if (sizes[dim] != 1) {
      dims.push_back(dim);
    }
  }
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return out.stride(a) < out.stride(b); });

  Rows rows{1, 1, 1, 0, 0};
  auto dim = dims.begin();
  // With one keep mask entry in all, the samples are an inner dimension like any other.
  for (; dim != dims.end() && (*dim != 0 || keep_size == 1); ++dim) {
    if (x.stride(*dim) != rows.length) {
      return std::nullopt;
    }
    rows.length *= sizes[*dim];
  }
  if (dim != dims.end()) {
    rows.count = rows.samples = sizes[0];
    rows.sample_stride = x.stride(0);
    ++dim;
  }
  if (dim != dims.end()) {
    rows.outer_stride = x.stride(*dim);
  }
  for (int64_t outer = 1; dim != dims.end(); ++dim) {
    if (x.stride(*dim) != rows.outer_stride * outer) {
      return std::nullopt;
    }
    outer *= sizes[*dim];
    rows.count = outer * rows.samples;
  }
  return rows;
}

Input with_rows(const at::Tensor& x, const at::Tensor& out, int64_t keep_size) {
  if (const auto rows = find_rows(x, out, keep_size)) {
    return {x, *rows};
  }
  const at::Tensor copy = at::empty_like(out).copy_(x);
  return {copy, find_rows(copy, out, keep_size).value()};
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

}  // namespace

TORCH_LIBRARY_IMPL(droppath_ext, Meta, m) {
  m.impl("drop_path", &drop_path_meta);
  m.impl("drop_path_backward", &drop_path_backward_meta);
}

}  // namespace droppath_ext
