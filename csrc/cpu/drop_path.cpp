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

// For each sample: out = x[source] * factors (+ residual), or where it is dropped the residual or 0. `sources` is a
// keep mask or an index. TR is void where there is no residual; the residual may be `out` itself.
template <typename TO, typename TR, typename TX>
void add_kept(const at::Tensor& out, const at::Tensor* residual, const at::Tensor& x,
              const std::optional<at::Tensor>& gamma, const at::Tensor& sources, double scale) {
  using F = at::opmath_type<TO>;
  constexpr bool kHasResidual = !std::is_void_v<TR>;
  const Rows rows = find_rows(out, sources.numel());
  const auto factors = make_factors<F>(out, gamma, scale);
  const Factors<F> one(1);
  const bool is_copy = !kHasResidual && std::is_same_v<TX, TO> && !gamma && scale == 1.0;
  const bool in_place = kHasResidual && residual->is_same(out);
  const Store store = in_place ? Store::kCached : store_of(out);
  const Input x_rows = with_rows(x, out, rows, is_index(sources));
  const auto* x_data = x_rows.tensor.const_data_ptr<TX>();
  auto* out_data = out.mutable_data_ptr<TO>();
  Input residual_rows;
  const TR* residual_data = nullptr;
  if constexpr (kHasResidual) {
    residual_rows = with_rows(*residual, out, rows);
    residual_data = residual_rows.tensor.const_data_ptr<TR>();
  }
  const RowCost cost = in_place ? RowCost{3, 0} : kHasResidual ? RowCost{3, 2} : RowCost{2, 1};
  parallel_rows(rows, Sources(sources), cost, [&](const RowPart& part) {
    const int64_t place = part.row * rows.length + part.column;
    TO* to = out_data + place;
    const TR* from = residual_data;
    if constexpr (kHasResidual) {
      from += residual_rows.strides.offset_of(part.place.sample, part.place.outer) + part.column;
    }
    if (part.is_kept()) {
      const TX* source = x_data + x_rows.strides.offset_of(part.source, part.place.outer) + part.column;
      if (is_copy) {
        fill_span(to, source, part.size * sizeof(TO), store);
      } else {
        add_span<TO, TR, TX>(to, from, source, factors, place, part.size, store);
      }
    } else if (in_place) {
      // There already.
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

// For each sample of x: grad_x = grad[source] * factors, or 0 where it is dropped, unless grad_x is null. Returns the
// gradient of gamma, for each channel the sum of grad * x * scale over what is kept. `layout` is dense, of x's shape,
// and grad_x, if not null, lies in memory as it does.
template <typename TG, typename TX>
at::Tensor backward_kept(const at::Tensor* grad_x, const at::Tensor& layout, const at::Tensor& grad,
                         const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& sources, double scale) {
  using F = at::opmath_type<TG>;
  const Rows rows = find_rows(layout, sources.numel());
  const auto factors = make_factors<F>(layout, gamma, scale);
  const int64_t channels = factors.channels().count;
  const Input x_rows = with_rows(x, layout, rows);
  const Input grad_rows = with_rows(grad, layout, rows, is_index(sources));
  const auto* x_data = x_rows.tensor.const_data_ptr<TX>();
  const auto* grad_data = grad_rows.tensor.const_data_ptr<TG>();
  TX* grad_x_data = grad_x == nullptr ? nullptr : grad_x->mutable_data_ptr<TX>();
  const Store store = grad_x == nullptr ? Store::kCached : store_of(*grad_x);
  const RowCost cost = grad_x == nullptr ? RowCost{2, 0} : RowCost{3, 1};

  c10::SmallVector<ChannelSums<F>, 1> sums;
  for (int thread = 0; thread < row_threads(rows); ++thread) {
    sums.emplace_back(channels);
  }
  parallel_rows(rows, Sources(sources), cost, [&](const RowPart& part) {
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

// out = x[source] * scale, or 0 where it is dropped.
void scale_kept(const at::Tensor& out, const at::Tensor& x, const at::Tensor& sources, double scale) {
  if (out.numel() != 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "scale_kept", [&] {
      add_kept<scalar_t, void, scalar_t>(out, nullptr, x, std::nullopt, sources, scale);
    });
  }
}

// out = residual + x[source] * gamma * scale, or the residual where it is dropped.
void add_kept_to(const at::Tensor& out, const at::Tensor& residual, const at::Tensor& x,
                 const std::optional<at::Tensor>& gamma, const at::Tensor& sources, double scale) {
  if (out.numel() == 0) {
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "add_kept_to", [&] {
    if (out.scalar_type() == x.scalar_type()) {
      add_kept<scalar_t, scalar_t, scalar_t>(out, &residual, x, gamma, sources, scale);
    } else if constexpr (sizeof(scalar_t) == 2) {
      if (residual.scalar_type() == out.scalar_type()) {
        add_kept<float, float, scalar_t>(out, &residual, x, gamma, sources, scale);
      } else {
        add_kept<float, scalar_t, scalar_t>(out, &residual, x, gamma, sources, scale);
      }
    }
  });
}

// The backward of add_kept_to: writes the gradient of x into grad_x, unless it is null, and returns that of gamma,
// empty if nobody needs it.
at::Tensor add_kept_backward(const at::Tensor* grad_x, const at::Tensor& grad, const std::optional<at::Tensor>& x,
                             const std::optional<at::Tensor>& gamma, const at::Tensor& sources, double scale,
                             at::ScalarType dtype, bool needs_gamma) {
  const bool sums = needs_gamma && x->numel() != 0;
  at::Tensor grad_gamma =
      needs_gamma && !sums ? at::zeros_like(*gamma, at::MemoryFormat::Contiguous) : at::detail::empty_cpu({0}, dtype);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "add_kept_backward", [&] {
    const auto run = [&](auto grad_type) {
      using TG = decltype(grad_type);
      if (sums) {
        const at::Tensor dense_grad = is_index(sources) ? grad : dense_like(grad);
        const at::Tensor layout = grad_x != nullptr ? *grad_x : is_index(sources) ? dense_like(*x) : dense_grad;
        grad_gamma = backward_kept<TG, scalar_t>(grad_x, layout, dense_grad, *x, *gamma, sources, scale);
      } else if (grad_x != nullptr && grad_x->numel() != 0) {
        add_kept<scalar_t, void, TG>(*grad_x, nullptr, grad, gamma, sources, scale);
      }
    };
    if (grad.scalar_type() == dtype) {
      run(scalar_t());
    } else if constexpr (sizeof(scalar_t) == 2) {
      run(float());
    }
  });
  return grad_gamma;
}

std::tuple<at::Tensor, at::Tensor> drop_path_cpu(const at::Tensor& x, double drop_prob, bool scale_by_keep,
                                                 bool per_sample, const std::optional<at::Generator>& generator) {
  check_input(x, "x");
  check_drop_prob(drop_prob);
  at::Tensor keep = draw_keep_mask(generator, keep_size(x, per_sample).expect_int(), drop_prob);
  at::Tensor out = allocate_like(x, x.scalar_type());
  scale_kept(out, x, keep, keep_scale(drop_prob, scale_by_keep));
  return {std::move(out), std::move(keep)};
}

at::Tensor drop_path_backward_cpu(const at::Tensor& grad, const at::Tensor& keep, double scale) {
  check_input(grad, "grad");
  check_keep(keep, grad);
  at::Tensor grad_x = allocate_like(grad, grad.scalar_type());
  scale_kept(grad_x, grad, keep.contiguous(), scale);
  return grad_x;
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_cpu(const at::Tensor& x, const at::Tensor& residual,
                                                     const std::optional<at::Tensor>& gamma, double drop_prob,
                                                     bool scale_by_keep, bool per_sample,
                                                     const std::optional<at::Generator>& generator) {
  check_add_inputs(x, residual, gamma);
  check_drop_prob(drop_prob);
  at::Tensor keep = drop_prob == 0.0 ? at::detail::empty_cpu({0}, at::kBool)
                                     : draw_keep_mask(generator, keep_size(x, per_sample).expect_int(), drop_prob);
  at::Tensor out = allocate_like(x, add_dtype(x, residual, gamma));
  add_kept_to(out, residual, x, gamma, keep, keep_scale(drop_prob, scale_by_keep));
  return {std::move(out), std::move(keep)};
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_backward_cpu(const at::Tensor& grad,
                                                              const std::optional<at::Tensor>& x,
                                                              const std::optional<at::Tensor>& gamma,
                                                              const at::Tensor& keep, double scale,
                                                              at::ScalarType dtype, std::array<bool, 2> output_mask) {
  check_add_backward_inputs(grad, x, gamma, keep, dtype, output_mask);
  at::Tensor grad_x = output_mask[0] ? allocate_like(grad, dtype) : at::detail::empty_cpu({0}, dtype);
  at::Tensor grad_gamma = add_kept_backward(output_mask[0] ? &grad_x : nullptr, grad, x, gamma, keep.contiguous(),
                                            scale, dtype, output_mask[1]);
  return {std::move(grad_x), std::move(grad_gamma)};
}

// An index as the kernels read it: dense, and within the samples that it counts.
at::Tensor readable_index(const at::Tensor& index, int64_t samples) {
  at::Tensor dense = index.contiguous();
  const auto* data = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i) {
    TORCH_CHECK_INDEX(data[i] >= kDropped && data[i] < samples, "an index must be between -1 and ", samples - 1,
                      ", but got ", data[i]);
  }
  return dense;
}

at::Tensor gather_cpu(const at::Tensor& x, const at::Tensor& index, const at::Tensor& inverse) {
  check_input(x, "x");
  check_index(index, "index", inverse, "inverse", x);
  at::Tensor out = empty_samples(x, index.size(0), x.scalar_type());
  scale_kept(out, x, readable_index(index, x.size(0)), /*scale=*/1.0);
  return out;
}

// What the samples of residual are made from, and what those of y.
at::Tensor sources_of(const at::Tensor& index, int64_t samples, bool gathers) {
  return gathers ? readable_index(index, samples) : at::detail::empty_cpu({0}, at::kBool);
}

at::Tensor scatter_add_cpu(const at::Tensor& y, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                           const at::Tensor& slots, const at::Tensor& kept, double scale) {
  check_scatter_add_inputs(y, residual, gamma, slots, kept);
  at::Tensor out = allocate_like(residual, add_dtype(y, residual, gamma));
  add_kept_to(out, residual, y, gamma, sources_of(slots, y.size(0), is_gathered(slots, kept)), scale);
  return out;
}

void scatter_add_inplace_cpu(const at::Tensor& residual, const at::Tensor& y, const at::Tensor& slots,
                             const at::Tensor& kept) {
  check_scatter_add_inplace_inputs(residual, y, slots, kept);
  add_kept_to(residual, residual, y, std::nullopt, sources_of(slots, y.size(0), is_gathered(slots, kept)),
              /*scale=*/1.0);
}

std::tuple<at::Tensor, at::Tensor> scatter_add_backward_cpu(const at::Tensor& grad, const std::optional<at::Tensor>& y,
                                                            const std::optional<at::Tensor>& gamma,
                                                            const at::Tensor& slots, const at::Tensor& kept,
                                                            double scale, at::ScalarType dtype,
                                                            std::array<bool, 2> output_mask) {
  check_scatter_add_backward_inputs(grad, y, gamma, slots, kept, dtype, output_mask);
  const bool gathers = is_gathered(slots, kept);
  at::Tensor grad_y = output_mask[0] ? empty_samples(grad, gathers ? kept.size(0) : grad.size(0), dtype)
                                     : at::detail::empty_cpu({0}, dtype);
  at::Tensor grad_gamma = add_kept_backward(output_mask[0] ? &grad_y : nullptr, grad, y, gamma,
                                            sources_of(kept, grad.size(0), gathers), scale, dtype, output_mask[1]);
  return {std::move(grad_y), std::move(grad_gamma)};
}

}  // namespace

TORCH_LIBRARY_IMPL(droppath_ext, CPU, m) {
  m.impl("drop_path", &drop_path_cpu);
  m.impl("drop_path_backward", &drop_path_backward_cpu);
  m.impl("drop_path_add", &drop_path_add_cpu);
  m.impl("drop_path_add_backward", &drop_path_add_backward_cpu);
  m.impl("gather", &gather_cpu);
  m.impl("scatter_add", &scatter_add_cpu);
  m.impl("scatter_add_", &scatter_add_inplace_cpu);
  m.impl("scatter_add_backward", &scatter_add_backward_cpu);
}

}  // namespace droppath_ext
