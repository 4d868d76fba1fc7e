// gamma_grad of backend.h.
#include "gamma_grad.cuh"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>

#include "launch.h"
#include "launcher.cuh"

namespace droppath_ext {
namespace {

template <typename TG, typename TX, typename TGamma>
void gamma_grad(const at::Tensor& grad_x, bool writes_grad_x, const at::Tensor& grad_gamma, const at::Tensor& grad,
                const at::Tensor& x, const at::Tensor& gamma, const Sources& sources, double scale) {
  using F = Opmath<TX>;
  constexpr int kWidth = kVectorWidth<TG, TX>;
  const Rows rows = find_rows(grad_x, sources.entries());
  const Channels channels = find_channels(grad_x, gamma);
  const Input x_rows = with_rows(x, grad_x, rows);
  const Input grad_rows = with_rows(grad, grad_x, rows, sources.is_index());
  const at::Tensor dense_gamma = gamma.contiguous();
  BackwardArgs<TG, TX, TGamma> args{writes_grad_x ? static_cast<TX*>(grad_x.mutable_data_ptr()) : nullptr,
                                    nullptr,
                                    data_of<TG>(grad_rows.tensor),
                                    data_of<TX>(x_rows.tensor),
                                    source_lookup(sources, grad.size(0)),
                                    Gamma<TGamma>{},
                                    rows,
                                    x_rows.strides,
                                    grad_rows.strides,
                                    static_cast<F>(scale)};
  at::Tensor parts;
  const auto run = [&](auto width, auto is_innermost) {
    constexpr int kLaunchWidth = decltype(width)::value;
    const auto kernel = gamma_grad_kernel<TG, TX, TGamma, kLaunchWidth, decltype(is_innermost)::value>;
    args.gamma = gamma_operand<TGamma, kLaunchWidth>(dense_gamma, channels);
    const PeriodTiling tiling = PeriodTiling::make(channels, kLaunchWidth);
    const Periods periods = Periods::make(rows, channels);
    // One wave, so that few parts are left to sum.
    const int64_t wave = std::max<int64_t>(blocks_of_a_wave(kernel, tiling.threads()) / tiling.tiles, 1);
    const int64_t count = std::min(ceil_div(periods.count, int64_t{tiling.periods} * kPeriodsInFlight), wave);
    parts = at::empty({count * tiling.segments, channels.count},
                      grad.options().dtype(sizeof(F) == 8 ? at::kDouble : at::kFloat));
    args.parts = parts.mutable_data_ptr<F>();
    const int64_t stride = count * tiling.periods;
    launch(kernel, count * tiling.tiles, tiling.threads(), args, tiling, periods, stride,
           periods.locate(stride, /*row_of_period=*/0, rows));
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

  launch<Start::kEarly>(sum_parts_kernel<TGamma, F>, ceil_div(channels.count, kSumChannels), kSumThreads,
                        static_cast<TGamma*>(grad_gamma.mutable_data_ptr()), args.parts, parts.size(0), channels.count,
                        args.scale, args.sources.factor);
}

void gamma_grad_cuda(const at::Tensor& grad_x, bool writes_grad_x, const at::Tensor& grad_gamma, const at::Tensor& grad,
                     const at::Tensor& x, const at::Tensor& gamma, const Sources& sources, double scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto run = [&](auto kernel) { kernel(grad_x, writes_grad_x, grad_gamma, grad, x, gamma, sources, scale); };
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (grad.scalar_type() == x.scalar_type()) {
      run(gamma_grad<T, T, T>);
    } else if constexpr (sizeof(T) == 2) {
      run(gamma.scalar_type() == x.scalar_type() ? gamma_grad<float, T, T> : gamma_grad<float, T, float>);
    }
  });
}

const bool gamma_grad_is_entered = (backend_of(at::DeviceType::CUDA).gamma_grad = &gamma_grad_cuda, true);

}  // namespace
}  // namespace droppath_ext
