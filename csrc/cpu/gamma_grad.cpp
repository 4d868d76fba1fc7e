// gamma_grad of backend.h.
#include <algorithm>

#include "../backend.h"
#include "operands.h"
#include "parallel_rows.h"

namespace droppath_ext {
namespace {

// The sums of one thread, for each channel. Many terms are summed as sums of sums, which rounds less.
template <typename F>
class ChannelSums {
 public:
  explicit ChannelSums(int64_t channels)
      : channels_(channels), size_(channels + Factors<F>::kBlock), sums_(2 * size_, F(0)) {}

  // Where to add terms, `limit` of them at most before they are counted.
  F* parts() { return sums_.data(); }
  int64_t limit() const { return 64 * size_; }

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

  // What lies beyond the last channel belongs to the first ones again, as in Factors.
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
  c10::SmallVector<F, 4 * Factors<F>::kBlock> sums_;  // parts, then totals
  int64_t pending_ = 0;
};

template <typename TG, typename TX>
void gamma_grad(const at::Tensor& grad_x, bool writes_grad_x, const at::Tensor& grad_gamma, const at::Tensor& grad,
                const at::Tensor& x, const at::Tensor& gamma, const Sources& sources, double scale) {
  using F = at::opmath_type<TG>;
  const Rows rows = find_rows(grad_x, sources.entries());
  const auto factors = make_factors<F>(grad_x, gamma, scale);
  const int64_t channels = factors.channels().count;
  const Input x_rows = with_rows(x, grad_x, rows);
  const Input grad_rows = with_rows(grad, grad_x, rows, sources.is_index());
  const auto* x_data = x_rows.tensor.const_data_ptr<TX>();
  const auto* grad_data = grad_rows.tensor.const_data_ptr<TG>();
  TX* grad_x_data = writes_grad_x ? grad_x.mutable_data_ptr<TX>() : nullptr;
  const Store store = writes_grad_x ? store_of(grad_x) : Store::kCached;
  const RowCost cost = writes_grad_x ? RowCost{3, 1} : RowCost{2, 0};

  c10::SmallVector<ChannelSums<F>, 1> sums;
  for (int thread = 0; thread < row_threads(rows); ++thread) {
    sums.emplace_back(channels);
  }
  parallel_rows(rows, SourceLookup(sources), cost, [&](const RowPart& part) {
    const int64_t place = part.row * rows.length + part.column;
    TX* to = grad_x_data == nullptr ? nullptr : grad_x_data + place;
    if (part.is_kept()) {
      const TG* from = grad_data + grad_rows.strides.offset_of(part.source, part.place.outer) + part.column;
      const TX* values = x_data + x_rows.strides.offset_of(part.place.sample, part.place.outer) + part.column;
      auto& thread_sums = sums[part.thread];
      for (int64_t i = 0, n; i < part.size; i += n) {
        n = std::min(part.size - i, thread_sums.limit());
        backward_span<TG, TX>(to == nullptr ? nullptr : to + i, thread_sums.parts(), from + i, values + i, factors,
                              place + i, n, store);
        thread_sums.count(n);
      }
    } else if (to != nullptr) {
      fill_span(to, nullptr, part.size * sizeof(TX), store);
    }
  });

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gamma.scalar_type(), "gamma", [&] {
    auto* data = grad_gamma.mutable_data_ptr<scalar_t>();
    for (int64_t channel = 0; channel < channels; ++channel) {
      F total = 0;
      for (const auto& thread_sums : sums) {
        total += thread_sums.total(channel);
      }
      data[channel] = static_cast<scalar_t>(total * static_cast<F>(scale));
    }
  });
}

void gamma_grad_cpu(const at::Tensor& grad_x, bool writes_grad_x, const at::Tensor& grad_gamma, const at::Tensor& grad,
                    const at::Tensor& x, const at::Tensor& gamma, const Sources& sources, double scale) {
  prepare(sources, grad.size(0));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "gamma_grad", [&] {
    const auto run = [&](auto kernel) { kernel(grad_x, writes_grad_x, grad_gamma, grad, x, gamma, sources, scale); };
    if (grad.scalar_type() == x.scalar_type()) {
      run(gamma_grad<scalar_t, scalar_t>);
    } else if constexpr (sizeof(scalar_t) == 2) {
      run(gamma_grad<float, scalar_t>);
    }
  });
}

const bool gamma_grad_is_entered = (backend_of(at::kCPU).gamma_grad = &gamma_grad_cpu, true);

}  // namespace
}  // namespace droppath_ext
