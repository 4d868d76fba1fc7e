#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../keep_mask.h"
#include "../ops.h"
#include "scale_span.h"

namespace droppath_ext {
namespace {

// Elements below which a second thread costs more than it saves; ATen's own value.
constexpr int64_t kGrainSize = at::internal::GRAIN_SIZE;

// For small work at::parallel_for still asks OpenMP where it runs; a tiny tensor should not pay for that.
template <typename F>
void parallel_for(int64_t size, int64_t grain_size, const F& body) {
  if (size <= grain_size) {
    body(0, size);
  } else {
    at::parallel_for(0, size, grain_size, body);
  }
}

// out[r, i] = keep[sample of r] ? x[r, i] * scale : 0, for the elements [begin, end) of out.
template <typename T>
void scale_kept_range(T* out, const T* x, const bool* keep, const Rows& rows, at::opmath_type<T> scale, int64_t begin,
                      int64_t end) {
  int64_t row = divide(begin, rows.length);
  int64_t column = begin - row * rows.length;
  int64_t sample = rows.sample_of(row);
  while (begin < end) {
    const int64_t n = std::min(rows.length - column, end - begin);
    if (keep[sample]) {
      scale_span<T>(out + begin, x + rows.input_offset(row) + column, n, scale);
    } else {
      std::memset(static_cast<void*>(out + begin), 0, n * sizeof(T));
    }
    begin += n;
    column = 0;
    ++row;
    sample = sample + 1 == rows.samples ? 0 : sample + 1;
  }
}

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
    parallel_for(out.numel(), kGrainSize, [&](int64_t begin, int64_t end) {
      scale_kept_range<scalar_t>(out_data, x_data, keep_data, input.rows, scale, begin, end);
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
