#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>

#include "../keep_mask.h"
#include "../ops.h"
#include "parallel_rows.h"
#include "scale_span.h"

namespace droppath_ext {
namespace {

// at::empty_like without the dispatcher's share of it, which a tiny tensor would notice.
at::Tensor allocate_like(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense() ? at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type())
                                          : at::empty_like(x);
}

at::Tensor scale_kept(const at::Tensor& x, const at::Tensor& keep, double scale) {
  at::Tensor out = allocate_like(x);
  if (out.numel() == 0) {
    return out;
  }
  const Input input = with_rows(x, out, keep.numel());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "drop_path", [&] {
    auto* out_data = out.mutable_data_ptr<scalar_t>();
    const auto* x_data = input.x.const_data_ptr<scalar_t>();
    const auto* keep_data = keep.const_data_ptr<bool>();
    const auto& rows = input.rows;
    // out[r, i] = keep[sample of r] ? x[r, i] * scale : 0
    parallel_rows(rows, keep_data, {2, 1}, [&](int64_t row, int64_t column, int64_t n, bool is_kept) {
      scalar_t* to = out_data + row * rows.length + column;
      if (is_kept) {
        scale_span<scalar_t>(to, x_data + rows.input_offset(row) + column, n, scale);
      } else {
        std::memset(static_cast<void*>(to), 0, n * sizeof(scalar_t));
      }
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> drop_path_cpu(const at::Tensor& x, double drop_prob, bool scale_by_keep,
                                                 bool per_sample, const std::optional<at::Generator>& generator) {
  check_input(x, "x");
  check_drop_prob(drop_prob);
  auto* cpu_generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  uint64_t seed = 0;
  {
    std::lock_guard<std::mutex> lock(cpu_generator->mutex_);
    seed = cpu_generator->random64();
  }
  at::Tensor keep = draw_keep_mask(seed, /*offset=*/0, keep_size(x, per_sample).expect_int(), drop_prob);
  at::Tensor out = scale_kept(x, keep, keep_scale(drop_prob, scale_by_keep));
  return {std::move(out), std::move(keep)};
}

at::Tensor drop_path_backward_cpu(const at::Tensor& grad, const at::Tensor& keep, double scale) {
  check_input(grad, "grad");
  check_keep(keep, grad);
  return scale_kept(grad, keep.contiguous(), scale);
}

}  // namespace

at::Tensor draw_keep_mask(uint64_t seed, uint64_t offset, int64_t size, double drop_prob) {
  at::Tensor keep = at::detail::empty_cpu({size}, at::kBool);
  auto* data = keep.mutable_data_ptr<bool>();
  const uint64_t threshold = keep_threshold(drop_prob);
  parallel_for(size, kGrainSize / 16, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      data[sample] = draw_keep(seed, offset, sample, threshold);
    }
  });
  return keep;
}

TORCH_LIBRARY_IMPL(droppath_ext, CPU, m) {
  m.impl("drop_path", &drop_path_cpu);
  m.impl("drop_path_backward", &drop_path_backward_cpu);
}

}  // namespace droppath_ext
