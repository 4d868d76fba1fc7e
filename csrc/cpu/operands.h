// What both passes over a tensor take: its sources, how its output is stored, and the factors of x.
#pragma once

#include <ATen/Dispatch.h>

#include <cstring>

#include "../backend.h"
#include "../layout.h"
#include "loops.h"

namespace droppath_ext {

// Draws the keep mask if that is still to be done.
void draw(const Sources& sources);

// Outputs of 8 MiB and more are streamed, past the caches: they leave the last-level cache before anybody reads them.
// Measured on 2 Zen 4 cores with a reader behind: 1.2 times as fast from here on, slower below.
constexpr size_t kStreamedBytes = size_t{8} << 20;

inline bool is_streamed(const at::Tensor& out) { return out.nbytes() >= kStreamedBytes; }

// The scale times its factor, which lies on the host here.
inline double scale_of(const Sources& sources, double scale) {
  return sources.factor.defined() ? scale * sources.factor.item<double>() : scale;
}

// gamma * scale for each channel, or the scale alone.
template <typename F>
Factors<F> make_factors(const at::Tensor& out, const std::optional<at::Tensor>& gamma, double scale) {
  if (!gamma) {
    return Factors<F>(static_cast<F>(scale));
  }
  const auto dim = gamma_dim(out, *gamma);
  const int64_t stride = dim ? gamma->stride(*dim - out.dim() + gamma->dim()) : 0;
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gamma->scalar_type(), "gamma", [&] {
    const auto* data = gamma->const_data_ptr<scalar_t>();
    return Factors<F>(find_channels(out, *gamma), [&](int64_t i) {
      scalar_t value;  // a tensor made from a buffer is aligned to nothing
      std::memcpy(&value, data + i * stride, sizeof(value));
      return static_cast<F>(static_cast<double>(value) * scale);
    });
  });
}

}  // namespace droppath_ext
