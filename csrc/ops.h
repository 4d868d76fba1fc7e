// The native ops as C++ functions.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace droppath_ext {

// The ops of schemas.cpp, called through the dispatcher: autograd, fake tensors and the device each take their turn.
std::tuple<at::Tensor, at::Tensor> drop_path(const at::Tensor& x, double drop_prob, bool scale_by_keep, bool per_sample,
                                             const std::optional<at::Generator>& generator);
std::tuple<at::Tensor, at::Tensor> drop_path_add(const at::Tensor& x, const at::Tensor& residual,
                                                 const std::optional<at::Tensor>& gamma, double drop_prob,
                                                 bool scale_by_keep, bool per_sample,
                                                 const std::optional<at::Generator>& generator);
std::tuple<at::Tensor, at::Tensor> draw_fixed(const at::Tensor& x, c10::SymInt count,
                                              const std::optional<at::Generator>& generator);
std::tuple<at::Tensor, at::Tensor> draw_keep(const at::Tensor& x, const at::Tensor& drop_prob, bool scale_by_keep,
                                             bool per_sample, const std::optional<at::Generator>& generator);
at::Tensor scale_kept(const at::Tensor& x, const at::Tensor& sources, double scale,
                      const std::optional<at::Tensor>& factor = std::nullopt);
at::Tensor add_kept(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                    const at::Tensor& sources, double scale, const std::optional<at::Tensor>& factor = std::nullopt);
std::tuple<at::Tensor, at::Tensor> add_kept_backward(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                                                     const std::optional<at::Tensor>& gamma, const at::Tensor& sources,
                                                     double scale, at::ScalarType dtype,
                                                     std::array<bool, 2> output_mask,
                                                     const std::optional<at::Tensor>& factor = std::nullopt);

// add_kept by the index `slots` into the memory of residual, which is dense, of the dtype of x and nobody else's: what
// is dropped is not even read. No op, for no graph would know of it.
void add_kept_(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& slots);

// scale_kept by a keep mask, of which its gradient makes use, too.
at::Tensor scale_kept_by_mask(const at::Tensor& x, const at::Tensor& keep, double scale,
                              const std::optional<at::Tensor>& factor);

// What stochastic_depth is made of: a gather and its way back, whose gradients need the index that undoes theirs.
//
// Sample index[i] of x for each i, plus an alias of x from the same graph node. Use the alias as the residual: both
// gradients then meet in that node and are added in one pass. `inverse` undoes `index`; both are -1 for none.
std::tuple<at::Tensor, at::Tensor> gather_with_x(const at::Tensor& x, const at::Tensor& index,
                                                 const at::Tensor& inverse);
// add_kept by the index `slots`, which `kept` undoes; or by a keep mask, which is both; without entries, of all
// samples.
at::Tensor scatter_add(const at::Tensor& y, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                       const at::Tensor& slots, const at::Tensor& kept, double scale,
                       const std::optional<at::Tensor>& factor = std::nullopt);

// 1 / keep_prob, or 1 where nothing is kept or scaled.
double keep_scale(double drop_prob, bool scale_by_keep);

}  // namespace droppath_ext
