#include "layout.h"

#include <ATen/DimVector.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <numeric>

namespace droppath_ext {

// On the CPU without the dispatcher's share of an allocation, which a tiny tensor would notice.
at::Tensor allocate_like(const at::Tensor& x, at::ScalarType dtype) {
  return x.is_cpu() && x.is_non_overlapping_and_dense() ? at::detail::empty_strided_cpu(x.sizes(), x.strides(), dtype)
                                                        : at::empty_like(x, x.options().dtype(dtype));
}

at::Tensor allocate(c10::SymIntArrayRef sizes, at::ScalarType dtype, const at::Tensor& x) {
  return x.is_cpu() ? at::detail::empty_cpu(C10_AS_INTARRAYREF_SLOW(sizes), dtype)
                    : at::empty_symint(sizes, x.options().dtype(dtype));
}

// at::empty_like of a narrowed x would do for fewer samples; there may be more.
at::Tensor allocate_samples(const at::Tensor& x, c10::SymInt samples, at::ScalarType dtype) {
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

at::Tensor dense_layout_of(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense() ? x : allocate_like(x, x.scalar_type());
}

at::Tensor dense_sources(const at::Tensor& sources) {
  if (sources.is_neg() || sources._is_zerotensor()) {
    return sources.clone(at::MemoryFormat::Contiguous);
  }
  const at::Tensor dense = sources.contiguous();
  // Those of a mask are single bytes.
  const bool is_aligned =
      !is_index(dense) || !dense.is_cpu() || reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % sizeof(int64_t) == 0;
  return is_aligned ? dense : dense.clone();
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
  RowStrides strides{rows.length, rows.outer_stride()};
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
    } else if (out.stride(dim) == rows.outer_stride()) {
      strides.outer = x.stride(dim);
    }
  }
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    if (x.size(dim) == 1 || is_sample(dim)) {
      continue;
    }
    const int64_t expected = is_inner(dim) ? out.stride(dim) : strides.outer * (out.stride(dim) / rows.outer_stride());
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
      is_gathered ? allocate_samples(out, x.size(0), x.scalar_type()) : at::empty_like(out, x.options());
  copy.copy_(x);
  return {copy, find_row_strides(copy, out, rows, is_gathered).value()};
}

at::ScalarType add_dtype(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma) {
  const auto dtype = c10::promoteTypes(x.scalar_type(), residual.scalar_type());
  // As everywhere in torch, a tensor without dimensions widens nothing.
  return gamma && gamma->dim() > 0 ? c10::promoteTypes(dtype, gamma->scalar_type()) : dtype;
}

std::optional<int64_t> gamma_dim(const at::Tensor& x, const at::Tensor& gamma) {
  const int64_t first = x.dim() - gamma.dim();
  if (first >= 0 && gamma.sym_numel() == 1) {
    return std::nullopt;
  }
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
  TORCH_CHECK_VALUE(false,
                    "gamma must broadcast along one dim of a sample, as [D] or [C, 1, 1] do, or have one element, but "
                    "got shape ",
                    gamma.sym_sizes(), " for x of shape ", x.sym_sizes());
}

Channels find_channels(const at::Tensor& out, const at::Tensor& gamma) {
  const auto dim = gamma_dim(out, gamma);
  if (!dim) {  // one channel, as long as a row
    return {out.size(0) == 1 ? out.numel() : out.stride(0), 1};
  }
  return {out.stride(*dim), out.size(*dim)};
}

}  // namespace droppath_ext
