// The vectorised loops. Compiled for several x86-64 levels and chosen when the library loads, so that one portable
// wheel runs at the machine's full vector width.
#pragma once

#include <ATen/OpMathType.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <numeric>

#include "../rows.h"
#include "parallel_rows.h"

namespace droppath_ext {

// What x is multiplied by, element for element: the scale alone, or gamma * scale.
template <typename F>
class Factors {
 public:
  static constexpr int64_t kBlock = 16;  // elements that a loop takes at most at once

  explicit Factors(F scale) : channels_{INT64_MAX, 1}, values_(1, scale) {}

  // value_of(channel) gives one for each channel.
  template <typename ValueOf>
  Factors(Channels channels, const ValueOf& value_of) : channels_(channels) {
    // Channels that change with every element are read in blocks of neighbours. Few channels are repeated up to a whole
    // number of blocks: sums are then loaded just as they were stored a few blocks before, which a core does without
    // waiting for the cache. Behind the period comes one block more, so that each block can be read at once.
    if (channels.inner == 1) {
      const int64_t blocks = std::lcm(channels.count, kBlock);
      period_ = blocks <= 64 * kBlock ? blocks : channels.count;
    }
    values_.resize(channels.inner == 1 ? period_ + kBlock : channels.count);
    for (int64_t i = 0; i < size(); ++i) {
      values_[i] = i < channels.count ? value_of(i) : values_[i - channels.count];
    }
  }

  const Channels& channels() const { return channels_; }
  bool is_uniform() const { return channels_.inner == INT64_MAX; }
  bool is_innermost() const { return channels_.inner == 1; }
  // Entries behind which a block begins anew, where channels are innermost.
  int64_t period() const { return period_; }
  int64_t size() const { return static_cast<int64_t>(values_.size()); }
  const F* values() const { return values_.data(); }

 private:
  Channels channels_;
  int64_t period_ = 0;
  c10::SmallVector<F, 4 * kBlock> values_;  // small tensors should not pay for an allocation
};

// The sums of one thread over grad * x, for each channel. Many terms are summed as sums of sums, which rounds less.
template <typename F>
class ChannelSums {
 public:
  explicit ChannelSums(const Factors<F>& factors)
      : channels_(factors.channels().count), size_(factors.size()), sums_(2 * size_, F(0)) {}

  // Where to add terms, `limit` of them at most before they are counted. Entries are those of the factors.
  F* parts() { return sums_.data(); }
  int64_t limit() const { return 64 * (size_ + Factors<F>::kBlock); }

  void count(int64_t terms) {
    pending_ += terms;
    if (pending_ >= limit()) {
      for (int64_t i = 0; i < size_; ++i) {
        sums_[size_ + i] += sums_[i];
        sums_[i] = 0;
      }
      pending_ = 0;
    }
  }

  F total(int64_t channel) const {
    F sum = 0;
    for (int64_t i = channel; i < size_; i += channels_) {
      sum += sums_[size_ + i] + sums_[i];
    }
    return sum;
  }

 private:
  int64_t channels_;
  int64_t size_;
  c10::SmallVector<F, 8 * Factors<F>::kBlock> sums_;  // parts, then totals
  int64_t pending_ = 0;
};

// An input that is addressed row by row.
template <typename T>
struct Operand {
  const T* data;
  RowStrides strides;

  // Where a run begins, by its row's sample of this input.
  const T* at(int64_t source, const Run& run) const {
    return data + strides.offset_of(source, run.row.outer) + run.column;
  }
};

// out = x[source] * factors (+ residual), or where a sample is dropped the residual or 0. TR is void where there is no
// residual.
template <typename TO, typename TR, typename TX>
struct Addition {
  Rows rows;
  SourceReader sources;
  bool joins;  // see for_runs
  TO* out;
  Operand<TR> residual;
  Operand<TX> x;
  const Factors<at::opmath_type<TO>>& factors;
  bool is_copy;   // x[source] itself
  bool in_place;  // the residual is out
  bool streams;   // long spans are written past the caches
};

// The backward of gamma * x: grad_x = grad[source] * factors, or 0 where a sample is dropped, unless grad_x is null;
// and the sums of grad[source] * x for each channel.
template <typename TG, typename TX>
struct Backward {
  Rows rows;
  SourceReader sources;
  bool joins;
  TX* grad_x;
  Operand<TG> grad;
  Operand<TX> x;
  const Factors<at::opmath_type<TG>>& factors;
  bool streams;
};

// Each does one thread's range, and what it has streamed is there for every thread once it returns. Results are rounded
// once.
template <typename TO, typename TR, typename TX>
void add_rows(const Addition<TO, TR, TX>& addition, Range range);
template <typename TG, typename TX>
void backward_rows(const Backward<TG, TX>& backward, Range range, ChannelSums<at::opmath_type<TG>>& sums);

// keep[sample] = draw_keep(seed, offset, sample, threshold) for begin <= sample < end.
void draw_samples(bool* keep, uint64_t seed, uint64_t offset, uint64_t threshold, int64_t begin, int64_t end);

}  // namespace droppath_ext
