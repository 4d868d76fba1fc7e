// gamma_grad of backend.h.
#include <algorithm>

#include "../backend.h"
#include "operands.h"
#include "parallel_rows.h"

namespace droppath_ext {
namespace {

template <typename TG, typename TX>
void gamma_grad(const at::Tensor& grad_x, bool writes_grad_x, const at::Tensor& grad_gamma, const at::Tensor& grad,
                const at::Tensor& x, const at::Tensor& gamma, const Sources& sources, double scale) {
  using F = at::opmath_type<TG>;
  const Rows rows = find_rows(grad_x, sources.entries());
  const auto factors = make_factors<F>(grad_x, gamma, scale);
  const Input x_rows = with_rows(x, grad_x, rows);
  const Input grad_rows = with_rows(grad, grad_x, rows, sources.is_index());
  const Backward<TG, TX> backward{
      rows,
      SourceReader(sources),
      /*joins=*/x_rows.strides.sample == rows.length && grad_rows.strides.sample == rows.length,
      writes_grad_x ? grad_x.mutable_data_ptr<TX>() : nullptr,
      {grad_rows.tensor.const_data_ptr<TG>(), grad_rows.strides},
      {x_rows.tensor.const_data_ptr<TX>(), x_rows.strides},
      factors,
      /*streams=*/writes_grad_x && is_streamed(grad_x)};
  const RowCost cost = writes_grad_x ? RowCost{3, 1} : RowCost{2, 0};
  c10::SmallVector<ChannelSums<F>, 1> sums;
  for (int thread = 0; thread < row_threads(rows); ++thread) {
    sums.emplace_back(factors);
  }
  parallel_rows(rows, backward.sources, cost,
                [&](Range range, int thread) { backward_rows(backward, range, sums[thread]); });

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gamma.scalar_type(), "gamma", [&] {
    auto* data = grad_gamma.mutable_data_ptr<scalar_t>();
    for (int64_t channel = 0; channel < factors.channels().count; ++channel) {
      F total = 0;
      for (const auto& thread_sums : sums) {
        total += thread_sums.total(channel);
      }
      // Of nothing but dropped samples it is zero, whatever the scale.
      data[channel] = static_cast<scalar_t>(total == 0 ? total : total * static_cast<F>(scale));
    }
  });
}

void gamma_grad_cpu(const at::Tensor& grad_x, bool writes_grad_x, const at::Tensor& grad_gamma, const at::Tensor& grad,
                    const at::Tensor& x, const at::Tensor& gamma, const Sources& sources, double scale) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "gamma_grad", [&] {
    const auto run = [&](auto kernel) {
      kernel(grad_x, writes_grad_x, grad_gamma, grad, x, gamma, sources, scale_of(sources, scale));
    };
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
