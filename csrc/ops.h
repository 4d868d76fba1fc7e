// The native ops, and what their CPU and CUDA kernels share. The schemas are at the top of ops.cpp.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "rows.h"

namespace droppath_ext {

// Calls through the dispatcher, so autograd, fake tensors and the backend each take their turn.
std::tuple<at::Tensor, at::Tensor> drop_path(const at::Tensor& x, double drop_prob, bool scale_by_keep, bool per_sample,
                                             const std::optional<at::Generator>& generator);
at::Tensor drop_path_backward(const at::Tensor& grad, const at::Tensor& keep, double scale);

// Each raises one sentence that names the argument, its value and the rule.
void check_input(const at::Tensor& x, const char* name);
void check_drop_prob(double drop_prob);
void check_keep(const at::Tensor& keep, const at::Tensor& x);

// 1 / keep_prob, or 1 where nothing is kept or scaled.
double keep_scale(double drop_prob, bool scale_by_keep);

// Entries of the keep mask: one draw per sample, or one for the whole batch.
inline c10::SymInt keep_size(const at::Tensor& x, bool per_sample) {
  return per_sample ? x.sym_size(0) : c10::SymInt(1);
}

// The keep mask of a CPU call, or of a CUDA call with this generator state: bool[size] on the CPU.
at::Tensor draw_keep_mask(uint64_t seed, uint64_t offset, int64_t size, double drop_prob);

// The rows of x against a dense output, one keep mask entry for each sample (keep_size of them); nothing if the layout
// of x has no such rows.
std::optional<Rows> find_rows(const at::Tensor& x, const at::Tensor& out, int64_t keep_size);

// An input that surely has rows against `out`: x itself, or else a copy of it in the layout of `out`.
struct Input {
  at::Tensor x;
  Rows rows;
};
Input with_rows(const at::Tensor& x, const at::Tensor& out, int64_t keep_size);

}  // namespace droppath_ext
