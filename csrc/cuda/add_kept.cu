// add_kept of backend.h: one pass over a tensor, for every op and for the backwards without the gradient of gamma.
#include "add_kept.cuh"

#include <c10/cuda/CUDAGuard.h>

#include "launch.h"
#include "launcher.cuh"

namespace droppath_ext {
namespace {

// Vectors that a thread moves: alone, with vectors of gamma (more of those would spill, and so would two of float64 or
// of several dtypes), and with a residual or single entries of gamma, which give it enough to load. Measured on an H100
// and an H200.
constexpr int kVectorsAlone = 4;
constexpr int kVectorsWithGamma = 2;
constexpr int kVectorsWithMore = 1;

// TR and TGamma are void where there is no residual and no gamma.
template <typename TO, typename TR, typename TX, typename TGamma>
void add_kept(const at::Tensor& out, const std::optional<at::Tensor>& residual, const at::Tensor& x,
              const std::optional<at::Tensor>& gamma, const Sources& sources, double scale) {
  constexpr int kWidth = kVectorWidth<TO, TX>;
  constexpr bool kHasGamma = !std::is_void_v<TGamma>;
  const Rows rows = find_rows(out, sources.entries());
  const Input x_rows = with_rows(x, out, rows, sources.is_index());
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
  const SourceLookup lookup = source_lookup(sources, x.size(0));
  const auto run = [&](auto width, auto vectors, auto is_aligned, const Gamma<TGamma>& operand) {
    constexpr int kLaunchWidth = decltype(width)::value;
    constexpr int kVectors = decltype(vectors)::value;
    ChannelLocation gamma_step{};
    if constexpr (kHasGamma) {
      if (out.numel() != 0) {
        gamma_step = operand.channels.locate(kThreads * kLaunchWidth);
      }
    }
    const Tiling tiling = Tiling::make(rows, kThreads * kVectors, kLaunchWidth);
    launch(add_kept_kernel<TO, TR, TX, TGamma, kLaunchWidth, kVectors, decltype(is_aligned)::value>, tiling.tiles(rows),
           kThreads, out_data, residual_data, x_data, lookup, operand, gamma_step, rows, x_rows.strides,
           residual_rows.strides, tiling,
           /*in_place=*/static_cast<const void*>(out_data) == residual_data, static_cast<Opmath<TO>>(scale));
  };
  using Scalar = std::integral_constant<int, 1>;
  using Width = std::integral_constant<int, kWidth>;
  using Alone = std::integral_constant<int, kVectorsAlone>;
  constexpr bool kIsOneDtype = std::is_same_v<TO, TX> && std::is_same_v<TGamma, TX> && sizeof(TX) < sizeof(double);
  using WithGamma = std::integral_constant<int, kIsOneDtype ? kVectorsWithGamma : kVectorsWithMore>;
  using WithMore = std::integral_constant<int, kVectorsWithMore>;
  if constexpr (kHasGamma) {
    const Channels channels = find_channels(out, *gamma);
    const auto operand = gamma_operand<TGamma, kWidth>(dense_gamma, channels);
    if (!vectorizes) {
      run(Scalar(), WithMore(), std::false_type(), gamma_operand<TGamma, 1>(dense_gamma, channels));
    } else if (operand.is_aligned) {
      run(Width(), WithGamma(), std::true_type(), operand);
    } else {
      run(Width(), WithMore(), std::false_type(), operand);
    }
  } else {
    using Vectors = std::conditional_t<std::is_void_v<TR>, Alone, WithMore>;
    vectorizes ? run(Width(), Vectors(), std::false_type(), {}) : run(Scalar(), Vectors(), std::false_type(), {});
  }
}

void add_kept_cuda(const at::Tensor& out, const std::optional<at::Tensor>& residual, const at::Tensor& x,
                   const std::optional<at::Tensor>& gamma, const Sources& sources, double scale) {
  const c10::cuda::CUDAGuard guard(out.device());
  const auto run = [&](auto kernel) { kernel(out, residual, x, gamma, sources, scale); };
  const auto is_float = [&](const std::optional<at::Tensor>& tensor) {
    return tensor && tensor->scalar_type() == at::kFloat;
  };
  // The narrower of two dtypes is that of the branch.
  const bool is_wider = out.element_size() > x.element_size();
  dispatch(is_wider ? x.scalar_type() : out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (out.scalar_type() == x.scalar_type()) {
      if (residual) {
        run(gamma ? add_kept<T, T, T, T> : add_kept<T, T, T, void>);
      } else {
        run(gamma ? add_kept<T, void, T, T> : add_kept<T, void, T, void>);
      }
    } else if constexpr (sizeof(T) == 2) {
      if (!residual) {  // the gradient of a half-precision x
        run(!gamma            ? add_kept<T, void, float, void>
            : is_float(gamma) ? add_kept<T, void, float, float>
                              : add_kept<T, void, float, T>);
      } else if (!is_float(residual)) {
        run(add_kept<float, T, T, float>);  // float32 for gamma alone
      } else {
        run(!gamma            ? add_kept<float, float, T, void>
            : is_float(gamma) ? add_kept<float, float, T, float>
                              : add_kept<float, float, T, T>);
      }
    }
  });
}

const bool add_kept_is_entered = (backend_of(at::DeviceType::CUDA).add_kept = &add_kept_cuda, true);

}  // namespace
}  // namespace droppath_ext
