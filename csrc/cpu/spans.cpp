#include "spans.h"

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

// The levels by name need GCC 12; elsewhere the plain loops serve.
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#define DROPPATH_X86_LEVELS
// GCC 12 says this of its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define DROPPATH_INLINE inline __attribute__((always_inline))
#define DROPPATH_INLINE_LAMBDA __attribute__((always_inline))

namespace droppath_ext {
namespace {

constexpr int64_t kLineBytes = 64;  // a cache line, which is streamed as a whole

// Writes whole lines past the caches: `to` is aligned to one, `from` too.
template <int kBytes>
DROPPATH_INLINE void stream_lines(void* to, const void* from) {
#ifdef DROPPATH_X86_LEVELS
  for (int i = 0; i < kBytes / 16; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(static_cast<const __m128i*>(from) + i));
  }
#else
  std::memcpy(to, from, kBytes);
#endif
}

// Streamed stores become visible to other threads only behind a fence.
void end_stream() {
#ifdef DROPPATH_X86_LEVELS
  _mm_sfence();
#endif
}

}  // namespace

#define DROPPATH_LEVEL 1
namespace baseline {
#include "span_loops.inc"
}
#undef DROPPATH_LEVEL

#ifdef DROPPATH_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define DROPPATH_LEVEL 3
namespace x86_64_v3 {
#include "span_loops.inc"
}
#undef DROPPATH_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define DROPPATH_LEVEL 4
namespace x86_64_v4 {
#include "span_loops.inc"
}
#undef DROPPATH_LEVEL
#pragma GCC pop_options
#endif

namespace {

#ifdef DROPPATH_X86_LEVELS
// The best level that the machine has and ATEN_CPU_CAPABILITY allows.
int choose_level() {
  const std::string allowed = at::get_cpu_capability();
  if (allowed == "AVX512" && __builtin_cpu_supports("x86-64-v4")) {
    return 4;
  }
  return allowed != "DEFAULT" && __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
}

template <typename Function>
Function choose(Function v4, Function v3, Function baseline) {
  static const int level = choose_level();
  return level == 4 ? v4 : level == 3 ? v3 : baseline;
}
#define DROPPATH_CHOOSE(...) choose(&x86_64_v4::__VA_ARGS__, &x86_64_v3::__VA_ARGS__, &baseline::__VA_ARGS__)
#else
#define DROPPATH_CHOOSE(...) (&baseline::__VA_ARGS__)
#endif

}  // namespace

template <typename TO, typename TR, typename TX>
void add_span(TO* out, const TR* residual, const TX* x, const Factors<at::opmath_type<TO>>& factors, int64_t place,
              int64_t n, Store store) {
  DROPPATH_CHOOSE(add_span<TO, TR, TX>)(out, residual, x, factors, place, n, store);
  if (store == Store::kStreamed) {
    end_stream();
  }
}

template <typename TG, typename TX>
void backward_span(TX* grad_x, at::opmath_type<TG>* sums, const TG* grad, const TX* x,
                   const Factors<at::opmath_type<TG>>& factors, int64_t place, int64_t n, Store store) {
  DROPPATH_CHOOSE(backward_span<TG, TX>)(grad_x, sums, grad, x, factors, place, n, store);
  if (store == Store::kStreamed) {
    end_stream();
  }
}

void fill_span(void* out, const void* source, int64_t n, Store store) {
  auto* to = static_cast<char*>(out);
  const auto* from = static_cast<const char*>(source);
  const auto fill = [&](int64_t bytes) {
    if (from != nullptr) {
      std::memcpy(to, from, bytes);
      from += bytes;
    } else {
      std::memset(to, 0, bytes);
    }
    to += bytes;
    n -= bytes;
  };
  if (store == Store::kStreamed) {
    fill(std::min<int64_t>(n, (kLineBytes - reinterpret_cast<uintptr_t>(to) % kLineBytes) % kLineBytes));
    alignas(kLineBytes) char line[kLineBytes] = {};
    for (; n >= kLineBytes; n -= kLineBytes, to += kLineBytes) {
      if (from != nullptr) {
        std::memcpy(line, from, kLineBytes);
        from += kLineBytes;
      }
      stream_lines<kLineBytes>(to, line);
    }
    end_stream();
  }
  fill(n);
}

#define DROPPATH_ADD(TO, TR, TX)                                                                                       \
  template void add_span<TO, TR, TX>(TO*, const TR*, const TX*, const Factors<at::opmath_type<TO>>&, int64_t, int64_t, \
                                     Store)
#define DROPPATH_BACKWARD(TG, TX)                                                      \
  template void backward_span<TG, TX>(TX*, at::opmath_type<TG>*, const TG*, const TX*, \
                                      const Factors<at::opmath_type<TG>>&, int64_t, int64_t, Store)
#define DROPPATH_SAME(T)    \
  DROPPATH_ADD(T, void, T); \
  DROPPATH_ADD(T, T, T);    \
  DROPPATH_BACKWARD(T, T)
// A half-precision branch in a float32 network: both ways, and with the residual in either dtype.
#define DROPPATH_MIXED(T)        \
  DROPPATH_ADD(float, float, T); \
  DROPPATH_ADD(float, T, T);     \
  DROPPATH_ADD(float, void, T);  \
  DROPPATH_ADD(T, void, float);  \
  DROPPATH_BACKWARD(float, T)

DROPPATH_SAME(double);
DROPPATH_SAME(float);
DROPPATH_SAME(at::BFloat16);
DROPPATH_SAME(at::Half);
DROPPATH_MIXED(at::BFloat16);
DROPPATH_MIXED(at::Half);

}  // namespace droppath_ext
