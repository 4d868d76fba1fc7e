// Tensors as rows, strides and channels, and outputs in the layout of their inputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "rows.h"

namespace droppath_ext {

// at::empty_like, of another dtype.
at::Tensor allocate_like(const at::Tensor& x, at::ScalarType dtype);

// Contiguous, where x is.
at::Tensor allocate(c10::SymIntArrayRef sizes, at::ScalarType dtype, const at::Tensor& x);

// Of `samples` samples of x, dense, its dimensions nested in memory as those of x are.
at::Tensor allocate_samples(const at::Tensor& x, c10::SymInt samples, at::ScalarType dtype);

// A dense tensor in the layout that at::empty_like gives: x itself if it is dense, else one without values.
at::Tensor dense_layout_of(const at::Tensor& x);

// `sources` as it can be read from memory: contiguous, not yet to be negated, not zeros that are nowhere, and aligned
// to its entries, as a tensor made from a buffer need not be.
at::Tensor dense_sources(const at::Tensor& sources);

// Whether `sources`, see backend.h, is an index; otherwise it is a keep mask.
inline bool is_index(const at::Tensor& sources) { return sources.scalar_type() == at::kLong; }

// Splits dense `out` into rows; with one entry or none the whole tensor is one row.
Rows find_rows(const at::Tensor& out, int64_t entries);

// An input addressed row by row; copied if its strides do not fit those of `out`. If gathered, its samples are not
// those of `out`.
struct Input {
  at::Tensor tensor;
  RowStrides strides;
};
Input with_rows(const at::Tensor& x, const at::Tensor& out, const Rows& rows, bool is_gathered = false);

// The dtype of residual + gamma * x.
at::ScalarType add_dtype(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma);

// The dimension of x along which gamma has entries; nothing if it has but one.
std::optional<int64_t> gamma_dim(const at::Tensor& x, const at::Tensor& gamma);
Channels find_channels(const at::Tensor& out, const at::Tensor& gamma);

}  // namespace droppath_ext
