// What the host side of the kernels shares: types, alignment, and operands made of tensors.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "../backend.h"
#include "../layout.h"
#include "operands.cuh"

namespace droppath_ext {

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

// Calls body with a value of the type that the kernels compute with.
template <typename F>
void dispatch(at::ScalarType dtype, const F& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "droppath_ext", [&] { body(Native<scalar_t>()); });
}

// gamma for vectors of kWidth elements; dense, and alive until the kernel is queued.
template <typename T, int kWidth>
Gamma<T> gamma_operand(const at::Tensor& gamma, const Channels& channels) {
  const auto* values = data_of<T>(gamma);
  const bool is_whole = channels.inner == 1 && channels.count % kWidth == 0 && is_aligned<kWidth>(values);
  return {values, is_whole, channels};
}

// For an input of `samples` samples.
SourceLookup source_lookup(const Sources& sources, int64_t samples);

// The state that the next draw starts from; the generator moves on.
at::PhiloxCudaState next_philox_state(at::Device device, const std::optional<at::Generator>& generator);

}  // namespace droppath_ext
