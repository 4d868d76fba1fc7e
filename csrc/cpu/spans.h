// The vectorised inner loops over dense memory. Compiled for several x86-64 levels and chosen when the library loads,
// so that one portable wheel runs at the machine's full vector width.
#pragma once

#include <ATen/OpMathType.h>
#include <c10/util/SmallVector.h>

#include <cstdint>

#include "../rows.h"

namespace droppath_ext {

// What x is multiplied by, element for element: the scale alone, or gamma * scale.
template <typename F>
class Factors {
 public:
  static constexpr int64_t kBlock = 64;  // elements that a loop takes at most at once

  explicit Factors(F scale) : channels_{INT64_MAX, 1}, values_(1, scale) {}

  // value_of(channel) gives one for each channel.
  template <typename ValueOf>
  Factors(Channels channels, const ValueOf& value_of) : channels_(channels), values_(channels.count + kBlock) {
    // The first ones once more at the end, so that any block of neighbours can be read at once.
    for (size_t i = 0; i < values_.size(); ++i) {
      values_[i] = i < static_cast<size_t>(channels.count) ? value_of(i) : values_[i - channels.count];
    }
  }

  const Channels& channels() const { return channels_; }
  const F* values() const { return values_.data(); }

 private:
  Channels channels_;
  c10::SmallVector<F, 2 * kBlock> values_;  // small tensors should not pay for an allocation
};

// How the output is written: past the caches where it is too large to be found there later anyway.
enum class Store { kCached, kStreamed };

// out = x * factors (+ residual), n elements, the first of them at `place` in the memory of the whole output. Rounded
// once. TR is void where there is no residual; the residual may be out itself.
template <typename TO, typename TR, typename TX>
void add_span(TO* out, const TR* residual, const TX* x, const Factors<at::opmath_type<TO>>& factors, int64_t place,
              int64_t n, Store store);

// The backward of gamma * x: grad_x = grad * factors, unless grad_x is null, and sums[channel] += grad * x.
template <typename TG, typename TX>
void backward_span(TX* grad_x, at::opmath_type<TG>* sums, const TG* grad, const TX* x,
                   const Factors<at::opmath_type<TG>>& factors, int64_t place, int64_t n, Store store);

// Copies n bytes, or writes zeros if there is no source.
void fill_span(void* out, const void* source, int64_t n, Store store);

}  // namespace droppath_ext
