// Vectors of elements, and the type that is computed in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace droppath_ext {

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

__device__ inline float to_opmath(__half x) { return __half2float(x); }
__device__ inline float to_opmath(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_opmath(float x) { return x; }
__device__ inline double to_opmath(double x) { return x; }

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

// kWidth elements, as memory has them. Two elements of 16 bits share a part: taken apart by the load, a vector would be
// waited for before the next one is asked for.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  static constexpr bool kIsPacked = sizeof(T) == 2 && kWidth % 2 == 0;
  static constexpr int kParts = kIsPacked ? kWidth / 2 : kWidth;
  using Part = std::conditional_t<kIsPacked, uint32_t, T>;

  Part parts[kParts];

  // The element alone in its part.
  __device__ void set_part(int part, T element) {
    if constexpr (kIsPacked) {
      uint16_t bits;
      memcpy(&bits, &element, sizeof(T));
      parts[part] = bits;
    } else {
      parts[part] = element;
    }
  }

  __device__ T element(int i) const {
    if constexpr (kIsPacked) {
      const auto bits = static_cast<uint16_t>(parts[i / 2] >> (i % 2 * 16));
      T element;
      memcpy(&element, &bits, sizeof(T));
      return element;
    } else {
      return parts[i];
    }
  }

  __device__ void to_opmath(Opmath<T> (&to)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      to[i] = droppath_ext::to_opmath(element(i));
    }
  }

  // Two at a time where the hardware rounds so.
  static __device__ Vector from_opmath(const Opmath<T> (&from)[kWidth]) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if constexpr (!kIsPacked) {
        vector.parts[i] = droppath_ext::from_opmath<T>(from[i]);
      } else if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
        memcpy(&vector.parts[i], &pair, sizeof(pair));
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
        memcpy(&vector.parts[i], &pair, sizeof(pair));
      }
    }
    return vector;
  }
};

template <typename T, int kWidth>
__device__ inline Vector<T, kWidth> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}

// What one store moves: 16 bytes, or all that a shorter vector has.
template <size_t kBytes>
struct WordType {
  using type = uint4;
};
template <>
struct WordType<8> {
  using type = uint2;
};
template <>
struct WordType<4> {
  using type = unsigned int;
};
template <>
struct WordType<2> {
  using type = unsigned short;
};

// Every element of an output is stored here. In words by name: of a struct the compiler may make one store for each
// element.
template <typename T, int kWidth>
__device__ inline void store_vector(T* to, const Vector<T, kWidth>& vector) {
  using Word = typename WordType<sizeof(vector)>::type;
  constexpr int kWords = sizeof(vector) / sizeof(Word);
  Word words[kWords];
  memcpy(words, &vector, sizeof(vector));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    __stwb(reinterpret_cast<Word*>(to) + i, words[i]);
  }
}

}  // namespace droppath_ext
