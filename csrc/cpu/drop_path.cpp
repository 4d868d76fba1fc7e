#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#include "../ops.h"
#include "parallel_rows.h"
#include "spans.h"

namespace droppath_ext {
namespace {

// An output that is larger leaves the last-level cache before anybody reads it, and so may go to memory at once,
// without its lines being read first (measured with a reader right behind: 1.2 times as fast from here on, slower
// below).
constexpr size_t kStreamedBytes = size_t{8} << 20;

Store store_of(const at::Tensor& out) { return out.nbytes() < kStreamedBytes ? Store::kCached : Store::kStreamed; }

// at::empty_like without the dispatcher's share of it, which a tiny tensor would notice.
at::Tensor allocate_like(const at::Tensor& x, at::ScalarType dtype) {
  return x.is_non_overlapping_and_dense() ? at::detail::empty_strided_cpu(x.sizes(), x.strides(), dtype)
                                          : at::empty_like(x, x.options().dtype(dtype));
}

// The entries of a mask that all the rows share or have one each of; without entries, everything is kept.
const bool* mask_data(const at::Tensor& keep) {
  static constexpr bool kAllKept = true;
  return keep.numel() == 0 ? &kAllKept : keep.const_data_ptr<bool>();
}

// gamma * scale for each channel, or the scale alone.
template <typename F>
Factors<F> make_factors(const at::Tensor& out, const std::optional<at::Tensor>& gamma, double scale) {
  if (!gamma) {
    return Factors<F>(static_cast<F>(scale));
  }
  const int64_t dim = gamma_dim(out, *gamma);
  const int64_t stride = gamma->stride(dim - out.dim() + gamma->dim());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gamma->scalar_type(), "gamma", [&] {
    const auto* data = gamma->const_data_ptr<scalar_t>();
    return Factors<F>(find_channels(out, dim),
                      [&](int64_t i) { return static_cast<F>(static_cast<double>(data[i * stride]) * scale); });
  });
}

// out = keep ? x * factors (+ residual) : residual or 0, row by row. TR is void where there is no residual.
template <typename TO, typename TR, typename TX>
void add_kept(const at::Tensor& out, const at::Tensor* residual, const at::Tensor& x,
              const std::optional<at::Tensor>& gamma, const at::Tensor& keep, double scale) {
  using F = at::opmath_type<TO>;
  const Rows rows = find_rows(out, keep.numel());
  const auto factors = make_factors<F>(out, gamma, scale);
  const Factors<F> one(1);
  const Store store = store_of(out);
  const Input x_rows = with_rows(x, out, rows);
  const auto* x_data = x_rows.tensor.const_data_ptr<TX>();
  auto* out_data = out.mutable_data_ptr<TO>();
  Input residual_rows;
  const TR* residual_data = nullptr;
  if constexpr (!std::is_void_v<TR>) {
    residual_rows = with_rows(*residual, out, rows);
    residual_data = residual_rows.tensor.const_data_ptr<TR>();
  }
  const RowCost cost = residual == nullptr ? RowCost{2, 1} : RowCost{3, 2};
  parallel_rows(rows, mask_data(keep), cost, [&](const RowPart& part) {
    const int64_t place = part.row * rows.length + part.column;
    TO* to = out_data + place;
    const TR* from = residual_data;
    if constexpr (!std::is_void_v<TR>) {
      from += residual_rows.strides.offset_of(part.row, rows) + part.column;
    }
    if (part.is_kept) {
      const TX* source = x_data + x_rows.strides.offset_of(part.row, rows) + part.column;
      add_span<TO, TR, TX>(to, from, source, factors, place, part.size, store);
    } else if constexpr (std::is_void_v<TR> || std::is_same_v<TR, TO>) {
      fill_span(to, from, part.size * sizeof(TO), store);
    } else {
      add_span<TO, void, TR>(to, nullptr, from, one, place, part.size, store);
    }
  });
}

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

// grad_x = keep ? grad * factors : 0, unless grad_x is null; returns the gradient of gamma, for each channel the sum of
// grad * x * scale over what is kept. grad is dense.
template <typename TG, typename TX>
at::Tensor backward_kept(const at::Tensor* grad_x, const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gamma,
                         const at::Tensor& keep, double scale) {
  using F = at::opmath_type<TG>;
  const Rows rows = find_rows(grad, keep.numel());
  const auto factors = make_factors<F>(grad, gamma, scale);
  const int64_t channels = factors.channels().count;
  const Input x_rows = with_rows(x, grad, rows);
  const auto* x_data = x_rows.tensor.const_data_ptr<TX>();
  const auto* grad_data = grad.const_data_ptr<TG>();
  TX* grad_x_data = grad_x == nullptr ? nullptr : grad_x->mutable_data_ptr<TX>();
  const Store store = grad_x == nullptr ? Store::kCached : store_of(*grad_x);
  const RowCost cost = grad_x == nullptr ? RowCost{2, 0} : RowCost{3, 1};

  c10::SmallVector<ChannelSums<F>, 1> sums;
  for (int thread = 0; thread < row_threads(rows); ++thread) {
    sums.emplace_back(channels);
  }
  parallel_rows(rows, mask_data(keep), cost, [&](const RowPart& part) {
    const int64_t place = part.row * rows.length + part.column;
    TX* to = grad_x_data == nullptr ? nullptr : grad_x_data + place;
    if (part.is_kept) {
      const TX* source = x_data + x_rows.strides.offset_of(part.row, rows) + part.column;
      auto& thread_sums = sums[part.thread];
      for (int64_t i = 0, n; i < part.size; i += n) {
        n = std::min(part.size - i, thread_sums.limit());
        backward_span<TG, TX>(to == nullptr ? nullptr : to + i, thread_sums.parts(), grad_data + place + i, source + i,
                              factors, place + i, n, store);
        thread_sums.count(n);
      }
    } else if (to != nullptr) {
      fill_span(to, nullptr, part.size * sizeof(TX), store);
    }
  });

  at::Tensor grad_gamma = at::detail::empty_cpu(gamma.sizes(), gamma.scalar_type());
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
  return grad_gamma;
}

at::Tensor scale_kept(const at::Tensor& x, const at::Tensor& keep, double scale) {
  at::Tensor out = allocate_like(x, x.scalar_type());
  if (out.numel() != 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "drop_path", [&] {
      add_kept<scalar_t, void, scalar_t>(out, nullptr, x, std::nullopt, keep, scale);
    });
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> drop_path_cpu(const at::Tensor& x, double drop_prob, bool scale_by_keep,
                                                 bool per_sample, const std::optional<at::Generator>& generator) {
  check_input(x, "x");
  check_drop_prob(drop_prob);
  at::Tensor keep = draw_keep_mask(generator, keep_size(x, per_sample).expect_int(), drop_prob);
  at::Tensor out = scale_kept(x, keep, keep_scale(drop_prob, scale_by_keep));
  return {std::move(out), std::move(keep)};
}

at::Tensor drop_path_backward_cpu(const at::Tensor& grad, const at::Tensor& keep, double scale) {
  check_input(grad, "grad");
  check_keep(keep, grad);
  return scale_kept(grad, keep.contiguous(), scale);
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_cpu(const at::Tensor& x, const at::Tensor& residual,
                                                     const std::optional<at::Tensor>& gamma, double drop_prob,
                                                     bool scale_by_keep, bool per_sample,
                                                     const std::optional<at::Generator>& generator) {
  check_add_inputs(x, residual, gamma);
  check_drop_prob(drop_prob);
  at::Tensor keep = drop_prob == 0.0 ? at::detail::empty_cpu({0}, at::kBool)
                                     : draw_keep_mask(generator, keep_size(x, per_sample).expect_int(), drop_prob);
  const auto dtype = add_dtype(x, residual, gamma);
  at::Tensor out = allocate_like(x, dtype);
  if (out.numel() != 0) {
    const double scale = keep_scale(drop_prob, scale_by_keep);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "drop_path_add", [&] {
      if (dtype == x.scalar_type()) {
        add_kept<scalar_t, scalar_t, scalar_t>(out, &residual, x, gamma, keep, scale);
      } else if constexpr (sizeof(scalar_t) == 2) {
        if (residual.scalar_type() == dtype) {
          add_kept<float, float, scalar_t>(out, &residual, x, gamma, keep, scale);
        } else {
          add_kept<float, scalar_t, scalar_t>(out, &residual, x, gamma, keep, scale);
        }
      }
    });
  }
  return {std::move(out), std::move(keep)};
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_backward_cpu(const at::Tensor& grad,
                                                              const std::optional<at::Tensor>& x,
                                                              const std::optional<at::Tensor>& gamma,
                                                              const at::Tensor& keep, double scale,
                                                              at::ScalarType dtype, std::array<bool, 2> output_mask) {
  check_add_backward_inputs(grad, x, gamma, keep, dtype, output_mask);
  const at::Tensor dense_keep = keep.contiguous();
  at::Tensor grad_x = output_mask[0] ? allocate_like(grad, dtype) : at::detail::empty_cpu({0}, dtype);
  at::Tensor grad_gamma = at::detail::empty_cpu({0}, dtype);
  if (grad.numel() == 0) {
    return {grad_x, output_mask[1] ? at::zeros_like(*gamma, at::MemoryFormat::Contiguous) : grad_gamma};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "drop_path_add_backward", [&] {
    const auto run = [&](auto grad_type) {
      using TG = decltype(grad_type);
      if (output_mask[1]) {
        grad_gamma = backward_kept<TG, scalar_t>(output_mask[0] ? &grad_x : nullptr, dense_like(grad), *x, *gamma,
                                                 dense_keep, scale);
      } else if (output_mask[0]) {
        add_kept<scalar_t, void, TG>(grad_x, nullptr, grad, gamma, dense_keep, scale);
      }
    };
    if (grad.scalar_type() == dtype) {
      run(scalar_t());
    } else if constexpr (sizeof(scalar_t) == 2) {
      run(float());
    }
  });
  return {std::move(grad_x), std::move(grad_gamma)};
}

}  // namespace

TORCH_LIBRARY_IMPL(droppath_ext, CPU, m) {
  m.impl("drop_path", &drop_path_cpu);
  m.impl("drop_path_backward", &drop_path_backward_cpu);
  m.impl("drop_path_add", &drop_path_add_cpu);
  m.impl("drop_path_add_backward", &drop_path_add_backward_cpu);
}

}  // namespace droppath_ext
