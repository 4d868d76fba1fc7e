// How the rows of a tensor are shared out among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>

#include <algorithm>
#include <cstdint>

#include "../backend.h"
#include "../rows.h"

namespace droppath_ext {

// Elements below which a second thread costs more than it saves; ATen's own value.
constexpr int64_t kGrainSize = at::internal::GRAIN_SIZE;

// For each sample of an output, the sample of the input that it is made from, or kDropped.
class SourceReader {
 public:
  explicit SourceReader(const Sources& sources) {
    if (sources.is_index()) {
      index_ = sources.tensor.const_data_ptr<int64_t>();
    } else if (sources.entries() != 0) {
      keep_ = reinterpret_cast<const uint8_t*>(sources.tensor.const_data_ptr<bool>());
    }
  }

  int64_t operator()(int64_t sample) const {
    if (index_ != nullptr) {
      return index_[sample];
    }
    return keep_ == nullptr || keep_[sample] ? sample : kDropped;
  }

  // How many samples from this one on, up to `end`, are made from neighbours, or are all dropped.
  int64_t count_alike(int64_t sample, int64_t end) const {
    int64_t last = sample + 1;
    if (index_ != nullptr) {
      const int64_t step = index_[sample] == kDropped ? 0 : 1;
      while (last < end && index_[last] == index_[last - 1] + step) {
        ++last;
      }
    } else if (keep_ != nullptr) {
      while (last < end && keep_[last] == keep_[sample]) {
        ++last;
      }
    } else {
      last = end;
    }
    return last - sample;
  }

  int64_t count_kept(int64_t begin, int64_t end) const {
    if (index_ != nullptr) {
      return end - begin - std::count(index_ + begin, index_ + end, kDropped);
    }
    return end - begin - (keep_ == nullptr ? 0 : std::count(keep_ + begin, keep_ + end, 0));
  }

 private:
  const int64_t* index_ = nullptr;
  const uint8_t* keep_ = nullptr;  // a tensor of bool may hold any byte: a view of other numbers, say
};

// Positions in the memory of the output.
struct Range {
  int64_t begin;
  int64_t end;
};

// Neighbouring elements of the output, all of them dropped, or made from neighbours.
struct Run {
  int64_t position;
  int64_t size;
  RowLocation row;  // of the first element
  int64_t column;   // in that row
  int64_t source;   // that row's sample of the input, or kDropped

  bool is_kept() const { return source != kDropped; }
};

// Memory accesses for one element of a kept and of a dropped row. Threads get equal shares of these, not of the
// elements: the one with fewer kept samples would wait for the others (measured: up to 1.3 times as long).
struct RowCost {
  int64_t kept;
  int64_t dropped;
};

// The cost of one row of each of these samples.
inline int64_t cost_of_samples(int64_t begin, int64_t end, const Rows& rows, const SourceReader& sources,
                               RowCost cost) {
  const int64_t kept = sources.count_kept(begin, end);
  return rows.length * (kept * cost.kept + (end - begin - kept) * cost.dropped);
}

// The position where `work` units of cost are done, at the begin of a row or whole cache lines into it.
inline int64_t position_after(int64_t work, int64_t samples_cost, const Rows& rows, const SourceReader& sources,
                              RowCost cost) {
  constexpr int64_t kColumns = 64;
  const int64_t outer = work / samples_cost;
  work -= outer * samples_cost;
  int64_t sample = 0;
  // In steps, the last of which are single samples: there may be very many.
  for (const int64_t step : {4096, 64, 1}) {
    for (int64_t step_cost; sample + step <= rows.samples; sample += step, work -= step_cost) {
      step_cost = cost_of_samples(sample, sample + step, rows, sources, cost);
      if (work < step_cost) {
        break;
      }
    }
  }
  const int64_t row_begin = rows.row_at({sample, outer}) * rows.length;
  if (work == 0) {  // samples that cost nothing may have been passed behind the last row
    return std::min(row_begin, rows.count * rows.length);
  }
  const int64_t column = work / (sources(sample) == kDropped ? cost.dropped : cost.kept);
  return row_begin + column / kColumns * kColumns;
}

// Threads that parallel_rows takes at most.
inline int row_threads(const Rows& rows) { return rows.count * rows.length <= kGrainSize ? 1 : at::get_num_threads(); }

// Calls body(Range, thread) in parallel, for ranges that together make up all the rows, which are not empty. `sources`
// knows each sample. Which thread gets what depends on nothing but the arguments and the number of threads.
template <typename F>
void parallel_rows(const Rows& rows, const SourceReader& sources, RowCost cost, const F& body) {
  if (row_threads(rows) == 1) {
    body(Range{0, rows.count * rows.length}, 0);
    return;
  }
  const int64_t samples_cost = cost_of_samples(0, rows.samples, rows, sources, cost);
  at::parallel_for(0, rows.rows_of_sample() * samples_cost, kGrainSize * cost.kept, [&](int64_t begin, int64_t end) {
    body(Range{position_after(begin, samples_cost, rows, sources, cost),
               position_after(end, samples_cost, rows, sources, cost)},
         at::get_thread_num());
  });
}

}  // namespace droppath_ext
