#include "loops.h"

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "../draws.h"

// The levels by name need GCC 12; elsewhere the loops are compiled once, for vectors of 16 bytes.
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#define DROPPATH_X86_LEVELS
// GCC 12 says this of its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
// Vectors are never handed over in registers: what takes them is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define DROPPATH_INLINE inline __attribute__((always_inline))
#define DROPPATH_INLINE_LAMBDA __attribute__((always_inline))

namespace droppath_ext {
namespace {

constexpr uintptr_t kLineBytes = 64;  // a cache line, which is streamed as a whole
// Shorter spans are streamed only if they begin and end with a line: else too much of them is written into lines that
// the next span streams (measured on Zen 4: 132 bytes take 1.2 times as long, 516 bytes 0.9).
constexpr uintptr_t kStreamedSpanBytes = 512;

// The bits of an element.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// The compiler's own vectors: +, * and comparisons are written as for numbers.
template <typename T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;

// Streamed stores become visible to other threads only behind a fence.
void end_stream() {
#ifdef DROPPATH_X86_LEVELS
  _mm_sfence();
#endif
}

}  // namespace

#define DROPPATH_LEVEL 1
namespace baseline {
#include "loops.inc"
}
#undef DROPPATH_LEVEL

#ifdef DROPPATH_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define DROPPATH_LEVEL 3
namespace x86_64_v3 {
#include "loops.inc"
}
#undef DROPPATH_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define DROPPATH_LEVEL 4
namespace x86_64_v4 {
#include "loops.inc"
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
Function choose(Function v4, Function v3, Function v1) {
  static const int level = choose_level();
  return level == 4 ? v4 : level == 3 ? v3 : v1;
}
#define DROPPATH_CHOOSE(...) choose(&x86_64_v4::__VA_ARGS__, &x86_64_v3::__VA_ARGS__, &baseline::__VA_ARGS__)
#else
#define DROPPATH_CHOOSE(...) (&baseline::__VA_ARGS__)
#endif

}  // namespace

template <typename TO, typename TR, typename TX>
void add_rows(const Addition<TO, TR, TX>& addition, Range range) {
  DROPPATH_CHOOSE(add_rows<TO, TR, TX>)(addition, range);
  if (addition.streams) {
    end_stream();
  }
}

template <typename TG, typename TX>
void backward_rows(const Backward<TG, TX>& backward, Range range, ChannelSums<at::opmath_type<TG>>& sums) {
  DROPPATH_CHOOSE(backward_rows<TG, TX>)(backward, range, sums);
  if (backward.streams) {
    end_stream();
  }
}

void draw_samples(bool* keep, uint64_t seed, uint64_t offset, uint64_t threshold, int64_t begin, int64_t end) {
  DROPPATH_CHOOSE(draw_samples)(keep, seed, offset, threshold, begin, end);
}

#define DROPPATH_ADD(TO, TR, TX) template void add_rows<TO, TR, TX>(const Addition<TO, TR, TX>&, Range)
#define DROPPATH_BACKWARD(TG, TX) \
  template void backward_rows<TG, TX>(const Backward<TG, TX>&, Range, ChannelSums<at::opmath_type<TG>>&)
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
