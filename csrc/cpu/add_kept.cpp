// add_kept of backend.h: one pass over a tensor, for every op and for the backwards without the gradient of gamma.
#include <type_traits>

#include "../backend.h"
#include "operands.h"
#include "parallel_rows.h"

namespace droppath_ext {
namespace {

// TR is void where there is no residual; the residual may be `out` itself.
template <typename TO, typename TR, typename TX>
void add_kept(const at::Tensor& out, const std::optional<at::Tensor>& residual, const at::Tensor& x,
              const std::optional<at::Tensor>& gamma, const Sources& sources, double scale) {
  constexpr bool kHasResidual = !std::is_void_v<TR>;
  const Rows rows = find_rows(out, sources.entries());
  const auto factors = make_factors<at::opmath_type<TO>>(out, gamma, scale);
  const bool in_place = kHasResidual && residual->is_same(out);
  const Input x_rows = with_rows(x, out, rows, sources.is_index());
  bool joins = x_rows.strides.sample == rows.length;
  Input residual_rows;
  Operand<TR> residual_operand{};
  if constexpr (kHasResidual) {
    residual_rows = with_rows(*residual, out, rows);
    residual_operand = {residual_rows.tensor.const_data_ptr<TR>(), residual_rows.strides};
    joins = joins && residual_rows.strides.sample == rows.length;
  }
  const Addition<TO, TR, TX> addition{rows,
                                      SourceReader(sources),
                                      joins,
                                      out.mutable_data_ptr<TO>(),
                                      residual_operand,
                                      {x_rows.tensor.const_data_ptr<TX>(), x_rows.strides},
                                      factors,
                                      /*is_copy=*/!gamma && scale == 1.0,
                                      in_place,
                                      /*streams=*/!in_place && is_streamed(out)};
  const RowCost cost = in_place ? RowCost{3, 0} : kHasResidual ? RowCost{3, 2} : RowCost{2, 1};
  parallel_rows(rows, addition.sources, cost, [&](Range range, int /*thread*/) { add_rows(addition, range); });
}

void add_kept_cpu(const at::Tensor& out, const std::optional<at::Tensor>& residual, const at::Tensor& x,
                  const std::optional<at::Tensor>& gamma, const Sources& sources, double scale) {
  draw(sources);
  if (out.numel() == 0) {
    return;
  }
  const auto run = [&](auto kernel) { kernel(out, residual, x, gamma, sources, scale_of(sources, scale)); };
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "add_kept", [&] {
    if (out.scalar_type() == x.scalar_type()) {
      run(residual ? add_kept<scalar_t, scalar_t, scalar_t> : add_kept<scalar_t, void, scalar_t>);
    } else if constexpr (sizeof(scalar_t) == 2) {
      run(residual->scalar_type() == out.scalar_type() ? add_kept<float, float, scalar_t>
                                                       : add_kept<float, scalar_t, scalar_t>);
    } else if constexpr (std::is_same_v<scalar_t, float>) {  // the gradient of a half-precision x
      AT_DISPATCH_REDUCED_FLOATING_TYPES(out.scalar_type(), "add_kept", [&] { run(add_kept<scalar_t, void, float>); });
    }
  });
}

const bool add_kept_is_entered = (backend_of(at::kCPU).add_kept = &add_kept_cpu, true);

}  // namespace
}  // namespace droppath_ext
