// What a device provides for the ops of ops.cpp.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "layout.h"

namespace droppath_ext {

// Which sample of an input each sample of an output is made from.
struct Sources {
  // A keep mask, bool: no entries keep every sample, one serves them all. Or an index, int64, -1 for none. Dense.
  at::Tensor tensor;
  // The mask is yet to be drawn, by the pass that asks for it, with this generator (or the default one).
  bool is_drawn = false;
  double drop_prob = 0;
  std::optional<at::Generator> generator = std::nullopt;
  // The scale that a pass is given is multiplied by this, float64 [], if it is defined.
  at::Tensor factor;

  bool is_index() const { return droppath_ext::is_index(tensor); }
  int64_t entries() const { return tensor.numel(); }
};

// Arguments are checked, outputs allocated.
struct Backend {
  // out = residual + x[source] * gamma * scale, or the residual where there is no source; without a residual, 0. The
  // residual may be out itself.
  void (*add_kept)(const at::Tensor& out, const std::optional<at::Tensor>& residual, const at::Tensor& x,
                   const std::optional<at::Tensor>& gamma, const Sources& sources, double scale);
  // grad_x = grad[source] * gamma * scale, 0 where there is no source, if it is to be written; grad_gamma = the sum of
  // grad[source] * x * scale over all dimensions but that of gamma, in a fixed order. grad_x is dense; x is not empty.
  void (*gamma_grad)(const at::Tensor& grad_x, bool writes_grad_x, const at::Tensor& grad_gamma, const at::Tensor& grad,
                     const at::Tensor& x, const at::Tensor& gamma, const Sources& sources, double scale);
  // The two results of the op draw_keep.
  void (*draw_keep)(const at::Tensor& keep, const at::Tensor& factor, const at::Tensor& drop_prob, bool scale_by_keep,
                    const std::optional<at::Generator>& generator);
  // The two indices of the op draw_fixed.
  void (*draw_fixed)(const at::Tensor& slots, const at::Tensor& kept, const std::optional<at::Generator>& generator);
};

// Every source file of a device enters its function when the library is loaded. A library that is loaded later replaces
// it: tests run the CUDA kernels' source on the host, and gpu-tune measures variants.
Backend& backend_of(at::DeviceType device);

}  // namespace droppath_ext
