// Vectors of elements, and the type that is computed in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <type_traits>

namespace droppath_ext {

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

template <typename T, int kWidth>
__device__ inline Vector<T, kWidth> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}

// In wide stores by name: of a struct the compiler may make one for each element.
template <typename T, int kWidth>
__device__ inline void store_vector(T* to, const Vector<T, kWidth>& vector) {
  using Wide = std::conditional_t<sizeof(vector) % sizeof(uint4) == 0, uint4, uint2>;
  if constexpr (sizeof(vector) % sizeof(Wide) == 0) {
#pragma unroll
    for (int i = 0; i < sizeof(vector) / sizeof(Wide); ++i) {
      __stwb(reinterpret_cast<Wide*>(to) + i, reinterpret_cast<const Wide*>(&vector)[i]);
    }
  } else {
    *to = vector.values[0];
  }
}

__device__ inline float to_opmath(__half x) { return __half2float(x); }
__device__ inline float to_opmath(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_opmath(float x) { return x; }
__device__ inline double to_opmath(double x) { return x; }

template <typename T>
struct OpmathType {
  using type = float;
};
template <>
struct OpmathType<double> {
  using type = double;
};
template <typename T>
using Opmath = typename OpmathType<T>::type;

// Rounds once, to nearest even.
template <typename T>
__device__ inline T from_opmath(Opmath<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

}  // namespace droppath_ext
