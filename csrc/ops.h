// The native ops, and what their CPU and CUDA kernels share. The schemas are at the top of ops.cpp.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "rows.h"

namespace droppath_ext {

// Calls through the dispatcher, so autograd, fake tensors and the backend each take their turn.
std::tuple<at::Tensor, at::Tensor> drop_path(const at::Tensor& x, double drop_prob, bool scale_by_keep, bool per_sample,
                                             const std::optional<at::Generator>& generator);
at::Tensor drop_path_backward(const at::Tensor& grad, const at::Tensor& keep, double scale);
std::tuple<at::Tensor, at::Tensor> drop_path_add(const at::Tensor& x, const at::Tensor& residual,
                                                 const std::optional<at::Tensor>& gamma, double drop_prob,
                                                 bool scale_by_keep, bool per_sample,
                                                 const std::optional<at::Generator>& generator);
std::tuple<at::Tensor, at::Tensor> drop_path_add_backward(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                                          const std::optional<at::Tensor>& gamma,
                                                          const at::Tensor& keep, double scale, at::ScalarType dtype,
                                                          std::array<bool, 2> output_mask);
at::Tensor gather(const at::Tensor& x, const at::Tensor& index, const at::Tensor& inverse);
at::Tensor scatter_add(const at::Tensor& y, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                       const at::Tensor& slots, const at::Tensor& kept, double scale);
void scatter_add_(const at::Tensor& residual, const at::Tensor& y, const at::Tensor& slots, const at::Tensor& kept);
std::tuple<at::Tensor, at::Tensor> scatter_add_backward(const at::Tensor& grad, const std::optional<at::Tensor>& y,
                                                        const std::optional<at::Tensor>& gamma, const at::Tensor& slots,
                                                        const at::Tensor& kept, double scale, at::ScalarType dtype,
                                                        std::array<bool, 2> output_mask);
std::tuple<at::Tensor, at::Tensor> draw_fixed(const at::Tensor& x, c10::SymInt count,
                                              const std::optional<at::Generator>& generator);

// gather, and x itself beside it: as the second output of one graph node, x takes the gradient that meets it elsewhere
// through that node, which adds the rows' gradients to it in one pass.
std::tuple<at::Tensor, at::Tensor> gather_with_x(const at::Tensor& x, const at::Tensor& index,
                                                 const at::Tensor& inverse);

// Each raises one sentence that names the argument, its value and the rule.
void check_input(const at::Tensor& x, const char* name);
void check_drop_prob(double drop_prob);
void check_count(const at::Tensor& x, const c10::SymInt& count);
void check_keep(const at::Tensor& keep, const at::Tensor& x, bool may_be_empty = false);
void check_index(const at::Tensor& index, const char* index_name, const at::Tensor& inverse, const char* inverse_name,
                 const at::Tensor& x);
void check_add_inputs(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma);
void check_scatter_add_inputs(const at::Tensor& y, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                              const at::Tensor& slots, const at::Tensor& kept);
void check_scatter_add_inplace_inputs(const at::Tensor& residual, const at::Tensor& y, const at::Tensor& slots,
                                      const at::Tensor& kept);
void check_add_backward_inputs(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                               const std::optional<at::Tensor>& gamma, const at::Tensor& keep, at::ScalarType dtype,
                               std::array<bool, 2> output_mask);
void check_scatter_add_backward_inputs(const at::Tensor& grad, const std::optional<at::Tensor>& y,
                                       const std::optional<at::Tensor>& gamma, const at::Tensor& slots,
                                       const at::Tensor& kept, at::ScalarType dtype, std::array<bool, 2> output_mask);

// Whether one kernel combines these dtypes: all equal, a half-precision x with a float32 residual, or half-precision x
// and residual with a float32 gamma.
bool is_fused_mix(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma);

// The dtype of residual + gamma * x.
at::ScalarType add_dtype(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma);

// 1 / keep_prob, or 1 where nothing is kept or scaled.
double keep_scale(double drop_prob, bool scale_by_keep);

// Entries of the keep mask: one draw per sample, or one for the whole batch. A mask without entries, of drop_path_add
// where nothing is dropped, keeps every sample.
inline c10::SymInt keep_size(const at::Tensor& x, bool per_sample) {
  return per_sample ? x.sym_size(0) : c10::SymInt(1);
}
inline c10::SymInt add_keep_size(const at::Tensor& x, double drop_prob, bool per_sample) {
  return drop_prob == 0.0 ? c10::SymInt(0) : keep_size(x, per_sample);
}

// The keep mask of a CPU call, or of a CUDA call with this generator state: bool[size] on the CPU.
at::Tensor draw_keep_mask(const std::optional<at::Generator>& generator, int64_t size, double drop_prob);
at::Tensor draw_keep_mask(uint64_t seed, uint64_t offset, int64_t size, double drop_prob);

// What draw_fixed gives on the CPU, or on CUDA with this generator state; on the CPU.
std::tuple<at::Tensor, at::Tensor> fixed_samples(uint64_t seed, uint64_t offset, int64_t size, int64_t count);

// Independent draws on the host, so that the number of kept samples, the last result, is known at once: the row of each
// sample, -1 if it is dropped, [size]; and the samples that are kept, or -1 if there is none, [max(kept, 1)]. int64, on
// the device.
std::tuple<at::Tensor, at::Tensor, int64_t> draw_bernoulli(int64_t size, double drop_prob, at::Device device,
                                                           const std::optional<at::Generator>& generator);

// An empty tensor of `samples` samples of x, dense, its dimensions nested in memory as those of x are.
at::Tensor empty_samples(const at::Tensor& x, c10::SymInt samples, at::ScalarType dtype);

// The samples of an input that those of an output are made from: `sources` is a keep mask (bool; without entries,
// everything is kept), or an index (int64).
inline bool is_index(const at::Tensor& sources) { return sources.scalar_type() == at::kLong; }

// Whether scatter_add finds the rows of y by an index: not where y has one for each sample.
inline bool is_gathered(const at::Tensor& slots, const at::Tensor& kept) {
  return slots.sym_numel() != 0 || kept.sym_numel() != 0;
}

// The rows of a dense output: one sample for each of these entries, or all as one where there is one or none.
Rows find_rows(const at::Tensor& out, int64_t entries);

// An input with rows against an output: the tensor itself, or a copy of it in the layout of the output. If gathered,
// its samples are not those of the output.
struct Input {
  at::Tensor tensor;
  RowStrides strides;
};
Input with_rows(const at::Tensor& x, const at::Tensor& out, const Rows& rows, bool is_gathered = false);

// grad itself, or a dense copy in the layout that at::empty_like gives.
at::Tensor dense_like(const at::Tensor& grad);

// The dimension of x along which gamma has entries.
int64_t gamma_dim(const at::Tensor& x, const at::Tensor& gamma);
Channels find_channels(const at::Tensor& out, int64_t gamma_dim);

}  // namespace droppath_ext
