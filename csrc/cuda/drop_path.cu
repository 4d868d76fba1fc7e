#include "drop_path.cuh"

#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "../ops.h"

namespace droppath_ext {
namespace {

// The scalar types that the kernels compute with.
template <typename T>
struct Native {
  using type = T;
};
template <>
struct Native<at::Half> {
  using type = __half;
};
template <>
struct Native<at::BFloat16> {
  using type = __nv_bfloat16;
};

template <typename T, int kWidth, typename Mask>
void launch(T* out, const T* x, const Mask& mask, const Rows& rows, double scale) {
  const Tiling tiling = Tiling::make(rows, kWidth);
  const int64_t tiles = tiling.tiles(rows);
  TORCH_CHECK_VALUE(tiles <= std::numeric_limits<int32_t>::max(), "x is too large for one launch: ", tiles,
                    " blocks, at most ", std::numeric_limits<int32_t>::max());
  if (tiles == 0) {
    return;
  }
  scale_kept_kernel<T, kWidth><<<static_cast<unsigned>(tiles), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      out, x, mask, rows, tiling, static_cast<typename Opmath<T>::type>(scale));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// 16-byte accesses, if every row starts and ends on such a boundary in both tensors.
template <typename T, int kWidth>
bool is_vectorizable(const T* out, const T* x, const Rows& rows) {
  const auto addresses = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(x);
  return addresses % (sizeof(T) * kWidth) == 0 && rows.length % kWidth == 0 && rows.sample_stride % kWidth == 0 &&
         rows.outer_stride % kWidth == 0;
}

template <typename Mask>
void scale_kept(const at::Tensor& out, const at::Tensor& x, const Mask& mask, int64_t keep_size, double scale) {
  const Input input = with_rows(x, out, keep_size);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "drop_path", [&] {
    using T = typename Native<scalar_t>::type;
    constexpr int kWidth = 16 / sizeof(T);
    auto* out_data = reinterpret_cast<T*>(out.mutable_data_ptr<scalar_t>());
    const auto* x_data = reinterpret_cast<const T*>(input.x.const_data_ptr<scalar_t>());
    if (is_vectorizable<T, kWidth>(out_data, x_data, input.rows)) {
      launch<T, kWidth>(out_data, x_data, mask, input.rows, scale);
    } else {
      launch<T, 1>(out_data, x_data, mask, input.rows, scale);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> drop_path_cuda(const at::Tensor& x, double drop_prob, bool scale_by_keep,
                                                  bool per_sample, const std::optional<at::Generator>& generator) {
  check_input(x, "x");
  check_drop_prob(drop_prob);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty_like(x);
  at::Tensor keep = at::empty({keep_size(x, per_sample).expect_int()}, x.options().dtype(at::kBool));
  auto* cuda_generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(x.device().index()));
  at::PhiloxCudaState philox;
  {
    std::lock_guard<std::mutex> lock(cuda_generator->mutex_);
    philox = cuda_generator->philox_cuda_state(/*increment=*/4);
  }
  const DrawnMask mask{philox, keep_threshold(drop_prob), keep.mutable_data_ptr<bool>()};
  scale_kept(out, x, mask, keep.numel(), keep_scale(drop_prob, scale_by_keep));
  return {std::move(out), std::move(keep)};
}

at::Tensor drop_path_backward_cuda(const at::Tensor& grad, const at::Tensor& keep, double scale) {
  check_input(grad, "grad");
  check_keep(keep, grad);
  const c10::cuda::CUDAGuard guard(grad.device());
  at::Tensor grad_x = at::empty_like(grad);
  const at::Tensor dense_keep = keep.contiguous();
  scale_kept(grad_x, grad, SavedMask{dense_keep.const_data_ptr<bool>()}, keep.numel(), scale);
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_IMPL(droppath_ext, CUDA, m) {
  m.impl("drop_path", &drop_path_cuda);
  m.impl("drop_path_backward", &drop_path_backward_cuda);
}

}  // namespace droppath_ext
