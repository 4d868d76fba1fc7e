#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "../ops.h"
#include "add_kept.cuh"
#include "draw_fixed.cuh"
#include "gamma_grad.cuh"
#include "launch.h"

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

// gamma for vectors of kWidth elements; dense, and alive until the kernel is queued.
template <typename T, int kWidth>
Gamma<T> gamma_operand(const at::Tensor& gamma, const Channels& channels, double scale) {
  const auto* values = data_of<T>(gamma);
  const bool is_whole = channels.inner == 1 && channels.count % kWidth == 0 && is_aligned<kWidth>(values);
  const double rest = std::is_same_v<Opmath<T>, float> ? scale - static_cast<float>(scale) : 0.0;
  return {values, is_whole, channels, static_cast<float>(rest)};
}

// For each sample: out = x[source] * scale (* gamma) (+ residual), or where it is dropped the residual or 0. There are
// `entries` sources. TR and TGamma are void where there is no residual and no gamma.
template <typename TO, typename TR, typename TX, typename TGamma>
void add_kept(const at::Tensor& out, const at::Tensor* residual, const at::Tensor& x, const at::Tensor* gamma,
              const Sources& sources, int64_t entries, double scale) {
  constexpr int kWidth = kVectorWidth<TO, TX>;
  constexpr bool kHasGamma = !std::is_void_v<TGamma>;
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
  if constexpr (kHasGamma) {
    dense_gamma = gamma->contiguous();
  }
  const auto run = [&](auto width) {
    constexpr int kLaunchWidth = decltype(width)::value;
    Gamma<TGamma> operand{};
    ChannelPlace gamma_step{};
    if constexpr (kHasGamma) {
      operand = gamma_operand<TGamma, kLaunchWidth>(dense_gamma, find_channels(out, gamma_dim(out, *gamma)), scale);
      if (out.numel() != 0) {
        gamma_step = operand.channels.place_of(kThreads * kLaunchWidth);
      }
    }
    const Tiling tiling = Tiling::make(rows, kThreads * kUnroll<TR, TGamma>, kLaunchWidth);
    launch(add_kept_kernel<TO, TR, TX, TGamma, kLaunchWidth>, tiling.tiles(rows), kThreads, out_data, residual_data,
           x_data, sources, operand, gamma_step, rows, x_rows.strides, residual_rows.strides, tiling,
           /*in_place=*/static_cast<const void*>(out_data) == residual_data, static_cast<Opmath<TO>>(scale));
  };
  if (vectorizes) {
    run(std::integral_constant<int, kWidth>());
  } else {
    run(std::integral_constant<int, 1>());
  }
}

template <typename F>
void dispatch(at::ScalarType dtype, const F& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "droppath_ext", [&] { body(Native<scalar_t>()); });
}

// The gradient of gamma, and that of x unless grad_x is null. `layout` is dense, of x's shape, and lies in memory as
// grad_x does.
template <typename TG, typename TX, typename TGamma>
at::Tensor backward_kept(const at::Tensor* grad_x, const at::Tensor& layout, const at::Tensor& grad,
                         const at::Tensor& x, const at::Tensor& gamma, const Sources& sources, int64_t entries,
                         double scale) {
  using F = Opmath<TX>;
  constexpr int kWidth = kVectorWidth<TG, TX>;
  const Rows rows = find_rows(layout, entries);
  const Channels channels = find_channels(layout, gamma_dim(layout, gamma));
  const Input x_rows = with_rows(x, layout, rows);
  const Input grad_rows = with_rows(grad, layout, rows, sources.kind == Sources::kIndex);
  const at::Tensor dense_gamma = gamma.contiguous();
  BackwardArgs<TG, TX, TGamma> args{grad_x == nullptr ? nullptr : static_cast<TX*>(grad_x->mutable_data_ptr()),
                                    nullptr,
                                    data_of<TG>(grad_rows.tensor),
                                    data_of<TX>(x_rows.tensor),
                                    sources,
                                    Gamma<TGamma>{},
                                    rows,
                                    x_rows.strides,
                                    grad_rows.strides,
                                    static_cast<F>(scale)};
  at::Tensor parts;
  const auto run = [&](auto width, auto is_innermost) {
    constexpr int kLaunchWidth = decltype(width)::value;
    const auto kernel = gamma_grad_kernel<TG, TX, TGamma, kLaunchWidth, decltype(is_innermost)::value>;
    args.gamma = gamma_operand<TGamma, kLaunchWidth>(dense_gamma, channels, scale);
    const LineTiling tiling = LineTiling::make(channels, kLaunchWidth);
    const Lines lines = Lines::make(rows, channels);
    // One wave, so that few parts are left to sum.
    const int64_t wave = std::max<int64_t>(blocks_of_a_wave(kernel, tiling.threads()) / tiling.tiles, 1);
    const int64_t count = std::min(ceil_div(lines.count, int64_t{tiling.lines} * kLinesInFlight), wave);
    parts = at::empty({count * tiling.segments, channels.count},
                      grad.options().dtype(sizeof(F) == 8 ? at::kDouble : at::kFloat));
    args.parts = parts.mutable_data_ptr<F>();
    const int64_t stride = count * tiling.lines;
    launch(kernel, count * tiling.tiles, tiling.threads(), args, tiling, lines, stride,
           lines.place_of(stride, /*row_of_line=*/0, rows));
  };
  // A vector holds whole channels, or parts of two at most.
  const bool is_innermost = channels.inner == 1;
  const bool vectorizes = rows.length % kWidth == 0 && channels.period() % kWidth == 0 &&
                          (is_innermost ? channels.count % kWidth == 0 : channels.inner >= kWidth) &&
                          is_vectorizable<kWidth>(args.grad, grad_rows.strides) &&
                          is_vectorizable<kWidth>(args.x, x_rows.strides) && is_aligned<kWidth>(args.grad_x);
  if (!vectorizes) {
    run(std::integral_constant<int, 1>(), std::false_type());
  } else if (is_innermost) {
    run(std::integral_constant<int, kWidth>(), std::true_type());
  } else {
    run(std::integral_constant<int, kWidth>(), std::false_type());
  }

  at::Tensor grad_gamma = at::empty_like(gamma, at::MemoryFormat::Contiguous);
  launch<Start::kEarly>(sum_parts_kernel<TGamma, F>, ceil_div(channels.count, kSumChannels), kSumThreads,
                        static_cast<TGamma*>(grad_gamma.mutable_data_ptr()), args.parts, parts.size(0), channels.count,
                        args.scale);
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
    add_kept<T, void, T, void>(out, nullptr, x, nullptr, sources, entries, scale);
  });
}

// out = residual + x[source] * gamma * scale, or the residual where it is dropped.
void add_kept_to(const at::Tensor& out, const at::Tensor& residual, const at::Tensor& x,
                 const std::optional<at::Tensor>& gamma, const Sources& sources, int64_t entries, double scale) {
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel) {
      kernel(out, &residual, x, gamma ? &*gamma : nullptr, sources, entries, scale);
    };
    if (out.scalar_type() == x.scalar_type()) {
      run(gamma ? add_kept<T, T, T, T> : add_kept<T, T, T, void>);
    } else if constexpr (sizeof(T) == 2) {
      if (residual.scalar_type() == x.scalar_type()) {
        run(add_kept<float, T, T, float>);  // float32 for gamma alone
      } else if (!gamma) {
        run(add_kept<float, float, T, void>);
      } else {
        run(gamma->scalar_type() == x.scalar_type() ? add_kept<float, float, T, T> : add_kept<float, float, T, float>);
      }
    }
  });
}

// Calls body with values of the types of x, of its gradient and of gamma: those of one dtype, or half precision that
// meets float32.
template <typename F>
void dispatch_backward(at::ScalarType dtype, const at::Tensor& grad, const std::optional<at::Tensor>& gamma,
                       const F& body) {
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    if (grad.scalar_type() == dtype) {
      body(T(), T(), T());
    } else if constexpr (sizeof(T) == 2) {
      if (!gamma || gamma->scalar_type() == dtype) {
        body(T(), float(), T());
      } else {
        body(T(), float(), float());
      }
    }
  });
}

// The backward of add_kept_to: writes the gradient of x into grad_x, unless it is null, and returns that of gamma,
// empty if nobody needs it.
at::Tensor add_kept_backward(const at::Tensor* grad_x, const at::Tensor& given_grad, const std::optional<at::Tensor>& x,
                             const std::optional<at::Tensor>& gamma, const Sources& sources, int64_t entries,
                             double scale, at::ScalarType dtype, bool needs_gamma) {
  // A float32 gamma makes a float32 output, whose gradient this is; whoever calls the op may give another one.
  const at::Tensor grad = gamma && gamma->scalar_type() != dtype ? given_grad.to(gamma->scalar_type()) : given_grad;
  const bool is_gathered = sources.kind == Sources::kIndex;
  const auto options = grad.options().dtype(dtype);
  if (!needs_gamma || x->numel() == 0) {
    if (grad_x != nullptr) {
      dispatch_backward(dtype, grad, gamma, [&](auto x_type, auto grad_type, auto gamma_type) {
        using TX = decltype(x_type);
        using TG = decltype(grad_type);
        (gamma ? add_kept<TX, void, TG, decltype(gamma_type)> : add_kept<TX, void, TG, void>)(*grad_x, nullptr, grad,
                                                                                              gamma ? &*gamma : nullptr,
                                                                                              sources, entries, scale);
      });
    }
    return needs_gamma ? at::zeros_like(*gamma, at::MemoryFormat::Contiguous) : at::empty({0}, options);
  }
  const at::Tensor dense_grad = is_gathered ? grad : dense_like(grad);
  const at::Tensor layout = grad_x != nullptr ? *grad_x : is_gathered ? dense_like(*x) : dense_grad;
  at::Tensor grad_gamma;
  dispatch_backward(dtype, grad, gamma, [&](auto x_type, auto grad_type, auto gamma_type) {
    grad_gamma = backward_kept<decltype(grad_type), decltype(x_type), decltype(gamma_type)>(
        grad_x, layout, dense_grad, *x, *gamma, sources, entries, scale);
  });
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
  launch(draw_fixed_kernel, 1, kDrawThreads, slots.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr<int64_t>(),
         next_philox_state(x.device(), generator), size, kept.numel());
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
