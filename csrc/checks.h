// What is asked of the native ops' arguments. Each check raises one sentence that names the argument, its value and the
// rule.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace droppath_ext {

void check_input(const at::Tensor& x, const char* name);
// Nobody keeps a storage from being resized under the tensors that lie in it.
void check_memory(const at::Tensor& tensor, const char* name);
void check_drop_prob(double drop_prob);
void check_count(const c10::SymInt& count, const c10::SymInt& samples);
void check_drawn_from(const at::Tensor& x);
// A rate and a factor that only the device knows.
void check_rate(const at::Tensor& drop_prob, const at::Tensor& x);
void check_factor(const std::optional<at::Tensor>& factor, const at::Tensor& sources);
// For an input x: a keep mask of its samples, or an index of any length.
void check_sources(const at::Tensor& sources, const at::Tensor& x);
// A keep mask of so many samples, for the host.
void check_keep(const at::Tensor& keep, int64_t samples);
void check_samples(int64_t samples);
void check_add_inputs(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma);
void check_add_kept_inputs(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                           const at::Tensor& sources);
void check_backward_inputs(const at::Tensor& grad, const std::optional<at::Tensor>& x,
                           const std::optional<at::Tensor>& gamma, const at::Tensor& sources, at::ScalarType dtype,
                           std::array<bool, 2> output_mask);

// Whether one kernel combines these dtypes: all equal, a half-precision x with a float32 residual, or half-precision x
// and residual with a float32 gamma.
bool is_fused_mix(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma);

}  // namespace droppath_ext
