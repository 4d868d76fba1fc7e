#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../ops.h"
#include "add_kept.cuh"
#include "draw_fixed.cuh"
#include "gamma_grad.cuh"

namespace droppath_ext {
namespace {

// The types that ATen stores and the kernels compute with.
template <typename T>
struct NativeType {
  using type = T;
};
template <>
struct NativeType<at::Half> {
  using type = __half;
};
template <>
struct NativeType<at::BFloat16> {
  using type = __nv_bfloat16;
};
template <typename T>
using Native = typename NativeType<T>::type;

template <typename T>
const T* data_of(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

unsigned check_blocks(int64_t blocks) {
  TORCH_CHECK_VALUE(blocks <= std::numeric_limits<int32_t>::max(), "x is too large for one launch: ", blocks,
                    " blocks, at most ", std::numeric_limits<int32_t>::max());
  return static_cast<unsigned>(blocks);
}

// Whether a vector of kWidth elements may be loaded from there.
template <int kWidth, typename T>
bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % (sizeof(T) * kWidth) == 0;
}

template <int kWidth, typename T>
bool is_vectorizable(const T* data, const RowStrides& strides) {
  return is_aligned<kWidth>(data) && strides.sample % kWidth == 0 && strides.outer % kWidth == 0;
}

// Vectors of 16 bytes, of the narrower of two types.
template <typename T, typename U>
constexpr int kVectorWidth = 16 / std::min(sizeof(T), sizeof(U));

// gamma as the kernels read it beside elements of type TX: dense, and of that dtype or the one that is computed in.
template <typename TX>
at::Tensor readable_gamma(const at::Tensor& gamma) {
  constexpr bool kIsWide = std::is_same_v<TX, Opmath<TX>>;
  const bool converts = kIsWide && gamma.element_size() != sizeof(TX);
  return (converts ? gamma.to(at::kFloat) : gamma).contiguous();
}

template <typename TX, int kWidth>
Gamma gamma_operand(const at::Tensor& gamma, const Channels& channels, double scale) {
  const void* values = gamma.const_data_ptr();
  const bool is_wide = gamma.element_size() != sizeof(TX);
  const bool is_aligned = reinterpret_cast<uintptr_t>(values) % (gamma.element_size() * kWidth) == 0;
  const auto rest = std::is_same_v<Opmath<TX>, float> ? scale - static_cast<float>(scale) : 0.0;
  return {values, is_wide, channels.inner == 1 && channels.count % kWidth == 0 && is_aligned, channels,
          static_cast<float>(rest)};
}

template <typename TO, typename TR, typename TX, int kWidth, bool kHasGamma>
void launch_add_kept(TO* out, const TR* residual, const TX* x, const Sources& sources, const Gamma& gamma,
                     const Rows& rows, const RowStrides& strides, const RowStrides& residual_strides, double scale) {
  const Tiling tiling = Tiling::make(rows, kThreads * kUnroll<TR, kHasGamma>, kWidth);
  const unsigned blocks = check_blocks(tiling.tiles(rows));
  if (blocks == 0) {
    return;
  }
  add_kept_kernel<TO, TR, TX, kWidth, kHasGamma><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      out, residual, x, sources, gamma, rows, strides, residual_strides, tiling,
      /*in_place=*/static_cast<const void*>(out) == residual, static_cast<Opmath<TO>>(scale));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// For each sample: out = x[source] * scale (* gamma) (+ residual), or where it is dropped the residual or 0. There are
// `entries` sources. TR is void where there is no residual.
template <typename TO, typename TR, typename TX, bool kHasGamma>
void add_kept(const at::Tensor& out, const at::Tensor* residual, const at::Tensor& x, const at::Tensor* gamma,
              const Sources& sources, int64_t entries, double scale) {
  constexpr int kWidth = kVectorWidth<TO, TX>;
  const Rows rows = find_rows(out, entries);
  const Input x_rows = with_rows(x, out, rows, sources.kind == Sources::kIndex);
  auto* out_data = static_cast<TO*>(out.mutable_data_ptr());
  const auto* x_data = data_of<TX>(x_rows.tensor);
  bool vectorizes =
      rows.length % kWidth == 0 && is_aligned<kWidth>(out_data) && is_vectorizable<kWidth>(x_data, x_rows.strides);
  Input residual_rows{};
  const TR* residual_data = nullptr;
  if constexpr (!std::is_void_v<TR>) {
    residual_rows = with_rows(*residual, out, rows);
    residual_data = data_of<TR>(residual_rows.tensor);
    vectorizes = vectorizes && is_vectorizable<kWidth>(residual_data, residual_rows.strides);
  }
  at::Tensor dense_gamma;
  Channels channels{1, 1};
  if constexpr (kHasGamma) {
    dense_gamma = readable_gamma<TX>(*gamma);
    channels = find_channels(out, gamma_dim(out, *gamma));
  }
  const auto launch = [&](auto width) {
    constexpr int kLaunchWidth = decltype(width)::value;
    Gamma operand{};
    if constexpr (kHasGamma) {
      operand = gamma_operand<TX, kLaunchWidth>(dense_gamma, channels, scale);
    }
    launch_add_kept<TO, TR, TX, kLaunchWidth, kHasGamma>(out_data, residual_data, x_data, sources, operand, rows,
                                                         x_rows.strides, residual_rows.strides, scale);
  };
  if (vectorizes) {
    launch(std::integral_constant<int, kWidth>());
  } else {
    launch(std::integral_constant<int, 1>());
  }
}

int64_t multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <typename F>
void dispatch(at::ScalarType dtype, const F& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "droppath_ext", [&] { body(Native<scalar_t>()); });
}

// The gradient of gamma, and that of x unless grad_x is null. `layout` is dense, of x's shape, and lies in memory as
// grad_x does, with whole channels in its rows.
template <typename TG, typename TX>
at::Tensor backward_kept(const at::Tensor* grad_x, const at::Tensor& layout, const at::Tensor& grad,
                         const at::Tensor& x, const at::Tensor& gamma, const Sources& sources, int64_t entries,
                         double scale) {
  using F = Opmath<TX>;
  constexpr int kWidth = kVectorWidth<TG, TX>;
  const Rows rows = find_rows(layout, entries);
  const Channels channels = find_channels(layout, gamma_dim(layout, gamma));
  const Input x_rows = with_rows(x, layout, rows);
  const Input grad_rows = with_rows(grad, layout, rows, sources.kind == Sources::kIndex);
  const at::Tensor dense_gamma = readable_gamma<TX>(gamma);
  BackwardArgs<TG, TX> args{grad_x == nullptr ? nullptr : static_cast<TX*>(grad_x->mutable_data_ptr()),
                            nullptr,
                            data_of<TG>(grad_rows.tensor),
                            data_of<TX>(x_rows.tensor),
                            sources,
                            Gamma{},
                            rows,
                            x_rows.strides,
                            grad_rows.strides,
                            static_cast<F>(scale)};
  const auto vectorizes = [&](auto width) {
    constexpr int kTriedWidth = decltype(width)::value;
    return (channels.inner == 1 ? channels.count : channels.inner) % kTriedWidth == 0 &&
           is_vectorizable<kTriedWidth>(args.grad, grad_rows.strides) && is_aligned<kTriedWidth>(args.grad_x) &&
           is_vectorizable<kTriedWidth>(args.x, x_rows.strides);
  };
  const auto stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor parts;
  const auto allocate_parts = [&](int64_t count) {
    parts = at::empty({count, channels.count}, grad.options().dtype(sizeof(F) == 8 ? at::kDouble : at::kFloat));
    args.parts = parts.mutable_data_ptr<F>();
  };
  const auto launch = [&](auto width) {
    constexpr int kLaunchWidth = decltype(width)::value;
    args.gamma = gamma_operand<TX, kLaunchWidth>(dense_gamma, channels, scale);
    if (channels.inner == 1) {
      const Columns columns = Columns::make(channels.count, kLaunchWidth);
      const int64_t lines = layout.numel() / channels.count;
      // One wave of blocks, so that few parts are left to sum.
      const int64_t wave = std::max<int64_t>(4 * multiprocessors() / columns.tiles, 1);
      const int64_t lines_of_block = columns.lines * kLinesInFlight;
      const int64_t count = std::min((lines + lines_of_block - 1) / lines_of_block, wave);
      allocate_parts(count);
      columns_backward_kernel<TG, TX, kLaunchWidth>
          <<<check_blocks(count * columns.tiles), kThreads, 0, stream>>>(args, columns, count);
    } else {
      constexpr int kSegmentsOfBlock = kThreads / kWarp;
      const Segments segments = Segments::make(channels.inner);
      const int64_t planes = layout.numel() / channels.inner;
      allocate_parts(planes / channels.count * segments.count);
      const int64_t blocks = (planes * segments.count + kSegmentsOfBlock - 1) / kSegmentsOfBlock;
      planes_backward_kernel<TG, TX, kLaunchWidth>
          <<<check_blocks(blocks), kThreads, 0, stream>>>(args, segments, planes);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  // Planes of 14 * 14 are no whole vectors of 8, but of 4.
  constexpr auto kWide = std::integral_constant<int, kWidth>{};
  constexpr auto kNarrow = std::integral_constant<int, kWidth == 8 ? 4 : 1>{};
  if (vectorizes(kWide)) {
    launch(kWide);
  } else if (vectorizes(kNarrow)) {
    launch(kNarrow);
  } else {
    launch(std::integral_constant<int, 1>());
  }

  at::Tensor grad_gamma = at::empty_like(gamma, at::MemoryFormat::Contiguous);
  const unsigned blocks = check_blocks((channels.count + kWarp - 1) / kWarp);
  dispatch(gamma.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<Opmath<T>, Opmath<TX>>) {
      sum_parts_kernel<T, Opmath<TX>><<<blocks, kThreads, 0, stream>>>(
          static_cast<T*>(grad_gamma.mutable_data_ptr()), args.parts, parts.size(0), channels.count, args.scale);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return grad_gamma;
}

// The state that the next draw starts from; the generator moves on.
at::PhiloxCudaState next_philox_state(at::Device device, const std::optional<at::Generator>& generator) {
  auto* cuda_generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(device.index()));
  const std::lock_guard<std::mutex> lock(cuda_generator->mutex_);
  return cuda_generator->philox_cuda_state(/*increment=*/4);
}

Sources saved_mask(const at::Tensor& keep) {
  Sources sources{};
  sources.kind = keep.numel() == 0 ? Sources::kAllKept : Sources::kSavedMask;
  sources.keep = const_cast<bool*>(keep.const_data_ptr<bool>());  // only a drawn mask is written
  return sources;
}

Sources drawn_mask(const at::Tensor& keep, double drop_prob, const std::optional<at::Generator>& generator) {
  Sources sources{};
  sources.kind = Sources::kDrawnMask;
  sources.keep = keep.mutable_data_ptr<bool>();
  sources.philox = next_philox_state(keep.device(), generator);
  sources.threshold = keep_threshold(drop_prob);
  return sources;
}

// Of an input of so many samples; index is dense.
Sources indexed(const at::Tensor& index, int64_t samples) {
  Sources sources{};
  sources.kind = Sources::kIndex;
  sources.index = index.const_data_ptr<int64_t>();
  sources.limit = samples;
  return sources;
}

at::Tensor empty_mask(const at::Tensor& x, int64_t size) { return at::empty({size}, x.options().dtype(at::kBool)); }

// out = x[source] * scale, or 0 where it is dropped.
void scale_kept(const at::Tensor& out, const at::Tensor& x, const Sources& sources, int64_t entries, double scale) {
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    add_kept<T, void, T, false>(out, nullptr, x, nullptr, sources, entries, scale);
  });
}

// out = residual + x[source] * gamma * scale, or the residual where it is dropped.
void add_kept_to(const at::Tensor& out, const at::Tensor& residual, const at::Tensor& x,
                 const std::optional<at::Tensor>& gamma, const Sources& sources, int64_t entries, double scale) {
  const at::Tensor* gamma_pointer = gamma ? &*gamma : nullptr;
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel) { kernel(out, &residual, x, gamma_pointer, sources, entries, scale); };
    if (out.scalar_type() == x.scalar_type()) {
      run(gamma ? add_kept<T, T, T, true> : add_kept<T, T, T, false>);
    } else if constexpr (sizeof(T) == 2) {
      if (residual.scalar_type() == x.scalar_type()) {
        run(add_kept<float, T, T, true>);
      } else {
        run(gamma ? add_kept<float, float, T, true> : add_kept<float, float, T, false>);
      }
    }
  });
}

// The backward of add_kept_to: writes the gradient of x into grad_x, unless it is null, and returns that of gamma,
// empty if nobody needs it.
at::Tensor add_kept_backward(const at::Tensor* grad_x, const at::Tensor& grad, const std::optional<at::Tensor>& x,
                             const std::optional<at::Tensor>& gamma, const Sources& sources, int64_t entries,
                             double scale, at::ScalarType dtype, bool needs_gamma) {
  const bool is_gathered = sources.kind == Sources::kIndex;
  const auto options = grad.options().dtype(dtype);
  const bool sums = needs_gamma && x->numel() != 0;
  at::Tensor grad_gamma =
      needs_gamma && !sums ? at::zeros_like(*gamma, at::MemoryFormat::Contiguous) : at::empty({0}, options);
  at::Tensor dense_grad, layout, spread_grad_x;
  if (sums) {
    dense_grad = is_gathered ? grad : dense_like(grad);
    layout = grad_x != nullptr ? *grad_x : is_gathered ? dense_like(*x) : dense_grad;
    const Channels channels = find_channels(layout, gamma_dim(layout, *gamma));
    if (find_rows(layout, entries).length % (channels.inner * channels.count) != 0) {
      // A channel is spread over the samples, say in [B, C] stored as [C, B].
      layout = at::empty(layout.sizes(), options);
      if (grad_x != nullptr) {
        spread_grad_x = *grad_x;
        grad_x = &layout;
      }
    }
  }
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto grad_type) {
      using TG = decltype(grad_type);
      if (sums) {
        grad_gamma = backward_kept<TG, T>(grad_x, layout, dense_grad, *x, *gamma, sources, entries, scale);
      } else if (grad_x != nullptr) {
        (gamma ? add_kept<T, void, TG, true> : add_kept<T, void, TG, false>)(*grad_x, nullptr, grad,
                                                                             gamma ? &*gamma : nullptr, sources,
                                                                             entries, scale);
      }
    };
    if (grad.scalar_type() == dtype) {
      run(T());
    } else if constexpr (sizeof(T) == 2) {
      run(float());
    }
  });
  if (spread_grad_x.defined()) {
    spread_grad_x.copy_(layout);
  }
  return grad_gamma;
}

std::tuple<at::Tensor, at::Tensor> drop_path_cuda(const at::Tensor& x, double drop_prob, bool scale_by_keep,
                                                  bool per_sample, const std::optional<at::Generator>& generator) {
  check_input(x, "x");
  check_drop_prob(drop_prob);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor keep = empty_mask(x, keep_size(x, per_sample).expect_int());
  at::Tensor out = at::empty_like(x);
  scale_kept(out, x, drawn_mask(keep, drop_prob, generator), keep.numel(), keep_scale(drop_prob, scale_by_keep));
  return {std::move(out), std::move(keep)};
}

at::Tensor drop_path_backward_cuda(const at::Tensor& grad, const at::Tensor& keep, double scale) {
  check_input(grad, "grad");
  check_keep(keep, grad);
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor dense_keep = keep.contiguous();
  at::Tensor grad_x = at::empty_like(grad);
  scale_kept(grad_x, grad, saved_mask(dense_keep), keep.numel(), scale);
  return grad_x;
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_cuda(const at::Tensor& x, const at::Tensor& residual,
                                                      const std::optional<at::Tensor>& gamma, double drop_prob,
                                                      bool scale_by_keep, bool per_sample,
                                                      const std::optional<at::Generator>& generator) {
  check_add_inputs(x, residual, gamma);
  check_drop_prob(drop_prob);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor keep = empty_mask(x, add_keep_size(x, drop_prob, per_sample).expect_int());
  const Sources sources = drop_prob == 0.0 ? saved_mask(keep) : drawn_mask(keep, drop_prob, generator);
  at::Tensor out = at::empty_like(x, x.options().dtype(add_dtype(x, residual, gamma)));
  add_kept_to(out, residual, x, gamma, sources, keep.numel(), keep_scale(drop_prob, scale_by_keep));
  return {std::move(out), std::move(keep)};
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_backward_cuda(const at::Tensor& grad,
                                                               const std::optional<at::Tensor>& x,
                                                               const std::optional<at::Tensor>& gamma,
                                                               const at::Tensor& keep, double scale,
                                                               at::ScalarType dtype, std::array<bool, 2> output_mask) {
  check_add_backward_inputs(grad, x, gamma, keep, dtype, output_mask);
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor dense_keep = keep.contiguous();
  const auto options = grad.options().dtype(dtype);
  at::Tensor grad_x = output_mask[0] ? at::empty_like(grad, options) : at::empty({0}, options);
  at::Tensor grad_gamma = add_kept_backward(output_mask[0] ? &grad_x : nullptr, grad, x, gamma, saved_mask(dense_keep),
                                            keep.numel(), scale, dtype, output_mask[1]);
  return {std::move(grad_x), std::move(grad_gamma)};
}

at::Tensor gather_cuda(const at::Tensor& x, const at::Tensor& index, const at::Tensor& inverse) {
  check_input(x, "x");
  check_index(index, "index", inverse, "inverse", x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor dense_index = index.contiguous();
  at::Tensor out = empty_samples(x, index.size(0), x.scalar_type());
  scale_kept(out, x, indexed(dense_index, x.size(0)), index.size(0), /*scale=*/1.0);
  return out;
}

at::Tensor scatter_add_cuda(const at::Tensor& y, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                            const at::Tensor& slots, const at::Tensor& kept, double scale) {
  check_scatter_add_inputs(y, residual, gamma, slots, kept);
  const c10::cuda::CUDAGuard guard(y.device());
  const at::Tensor dense_slots = slots.contiguous();
  const Sources sources = is_gathered(slots, kept) ? indexed(dense_slots, y.size(0)) : Sources{};
  at::Tensor out = at::empty_like(residual, residual.options().dtype(add_dtype(y, residual, gamma)));
  add_kept_to(out, residual, y, gamma, sources, slots.numel(), scale);
  return out;
}

void scatter_add_inplace_cuda(const at::Tensor& residual, const at::Tensor& y, const at::Tensor& slots,
                              const at::Tensor& kept) {
  check_scatter_add_inplace_inputs(residual, y, slots, kept);
  const c10::cuda::CUDAGuard guard(y.device());
  const at::Tensor dense_slots = slots.contiguous();
  const Sources sources = is_gathered(slots, kept) ? indexed(dense_slots, y.size(0)) : Sources{};
  add_kept_to(residual, residual, y, std::nullopt, sources, slots.numel(), /*scale=*/1.0);
}

std::tuple<at::Tensor, at::Tensor> scatter_add_backward_cuda(const at::Tensor& grad, const std::optional<at::Tensor>& y,
                                                             const std::optional<at::Tensor>& gamma,
                                                             const at::Tensor& slots, const at::Tensor& kept,
                                                             double scale, at::ScalarType dtype,
                                                             std::array<bool, 2> output_mask) {
  check_scatter_add_backward_inputs(grad, y, gamma, slots, kept, dtype, output_mask);
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor dense_kept = kept.contiguous();
  const bool gathers = is_gathered(slots, kept);
  const Sources sources = gathers ? indexed(dense_kept, grad.size(0)) : Sources{};
  at::Tensor grad_y = output_mask[0] ? empty_samples(grad, gathers ? kept.size(0) : grad.size(0), dtype)
                                     : at::empty({0}, grad.options().dtype(dtype));
  at::Tensor grad_gamma = add_kept_backward(output_mask[0] ? &grad_y : nullptr, grad, y, gamma, sources, kept.numel(),
                                            scale, dtype, output_mask[1]);
  return {std::move(grad_y), std::move(grad_gamma)};
}

std::tuple<at::Tensor, at::Tensor> draw_fixed_cuda(const at::Tensor& x, c10::SymInt count,
                                                   const std::optional<at::Generator>& generator) {
  check_count(x, count);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto options = x.options().dtype(at::kLong);
  const int64_t size = x.size(0);
  at::Tensor slots = at::empty({size}, options);
  at::Tensor kept = at::empty({count.expect_int()}, options);
  draw_fixed_kernel<<<1, kDrawThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      slots.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr<int64_t>(), next_philox_state(x.device(), generator),
      size, kept.numel());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {std::move(slots), std::move(kept)};
}

}  // namespace

TORCH_LIBRARY_IMPL(droppath_ext, CUDA, m) {
  m.impl("drop_path", &drop_path_cuda);
  m.impl("drop_path_backward", &drop_path_backward_cuda);
  m.impl("drop_path_add", &drop_path_add_cuda);
  m.impl("drop_path_add_backward", &drop_path_add_backward_cuda);
  m.impl("gather", &gather_cuda);
  m.impl("scatter_add", &scatter_add_cuda);
  m.impl("scatter_add_", &scatter_add_inplace_cuda);
  m.impl("scatter_add_backward", &scatter_add_backward_cuda);
  m.impl("draw_fixed", &draw_fixed_cuda);
}

}  // namespace droppath_ext
