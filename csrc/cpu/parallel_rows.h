// How the rows of a tensor are shared out among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>

#include <cstdint>

#include "../backend.h"
#include "../rows.h"

namespace droppath_ext {

// Elements below which a second thread costs more than it saves; ATen's own value.
constexpr int64_t kGrainSize = at::internal::GRAIN_SIZE;

// For each sample of an output, the sample of the input that it is made from, or kDropped.
class SourceLookup {
 public:
  explicit SourceLookup(const Sources& sources) {
    if (sources.is_index()) {
      index_ = sources.tensor.const_data_ptr<int64_t>();
    } else if (sources.entries() != 0) {
      keep_ = sources.tensor.const_data_ptr<bool>();
    }
  }

  int64_t operator()(int64_t sample) const {
    if (index_ != nullptr) {
      return index_[sample];
    }
    return keep_ == nullptr || keep_[sample] ? sample : kDropped;
  }

 private:
  const int64_t* index_ = nullptr;
  const bool* keep_ = nullptr;
};

// Memory accesses for one element of a kept and of a dropped row. Threads get equal shares of these, not of the
// elements: the one with fewer kept samples would wait for the others (measured: up to 1.3 times as long).
struct RowCost {
  int64_t kept;
  int64_t dropped;

  int64_t operator()(bool is_kept) const { return is_kept ? kept : dropped; }
};

// A place in the rows' elements.
struct RowPosition {
  int64_t row;
  int64_t column;
};

// The cost of one run of rows, sample after sample.
inline int64_t cost_of_samples(const Rows& rows, const SourceLookup& sources, RowCost cost) {
  int64_t kept = 0;
  for (int64_t sample = 0; sample < rows.samples; ++sample) {
    kept += sources(sample) != kDropped;
  }
  return rows.length * (kept * cost.kept + (rows.samples - kept) * cost.dropped);
}

// Where `work` units of cost are done; columns are cut at whole cache lines. Needs rows that are not empty.
inline RowPosition position_after(int64_t work, int64_t samples_cost, const Rows& rows, const SourceLookup& sources,
                                  RowCost cost) {
  constexpr int64_t kColumns = 64;
  const auto cost_of = [&](int64_t sample) { return cost(sources(sample) != kDropped); };
  const int64_t outer = work / samples_cost;
  work -= outer * samples_cost;
  int64_t sample = 0;
  while (outer * rows.samples + sample < rows.count && work >= rows.length * cost_of(sample)) {
    work -= rows.length * cost_of(sample);
    ++sample;
  }
  return {outer * rows.samples + sample, work == 0 ? 0 : work / cost_of(sample) / kColumns * kColumns};
}

// Part of a row, and which thread works on it.
struct RowPart {
  int64_t row;
  int64_t column;
  int64_t size;
  RowPlace place;
  int64_t source;  // a sample of the input, or kDropped
  int thread;

  bool is_kept() const { return source != kDropped; }
};

// Threads that parallel_rows takes at most.
inline int row_threads(const Rows& rows) { return rows.count * rows.length <= kGrainSize ? 1 : at::get_num_threads(); }

// Calls body(RowPart) in parallel, for parts that together make up all the rows. `sources` knows each sample.
// Which thread gets what depends on nothing but the arguments and the number of threads.
template <typename F>
void parallel_rows(const Rows& rows, const SourceLookup& sources, RowCost cost, const F& body) {
  const auto run = [&](RowPosition begin, RowPosition end, int thread) {
    RowPlace place = rows.place_of(begin.row);
    for (int64_t column = begin.column; begin.row <= end.row; ++begin.row, column = 0) {
      const int64_t size = (begin.row == end.row ? end.column : rows.length) - column;
      if (size > 0) {
        body(RowPart{begin.row, column, size, place, sources(place.sample), thread});
      }
      if (++place.sample == rows.samples) {
        place = {0, place.outer + 1};
      }
    }
  };
  if (row_threads(rows) == 1) {
    run({0, 0}, {rows.count, 0}, 0);
    return;
  }
  const int64_t samples_cost = cost_of_samples(rows, sources, cost);
  at::parallel_for(0, rows.count / rows.samples * samples_cost, kGrainSize * cost.kept,
                   [&](int64_t begin, int64_t end) {
                     run(position_after(begin, samples_cost, rows, sources, cost),
                         position_after(end, samples_cost, rows, sources, cost), at::get_thread_num());
                   });
}

}  // namespace droppath_ext
