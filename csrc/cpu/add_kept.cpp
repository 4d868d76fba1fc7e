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
  using F = at::opmath_type<TO>;
  constexpr bool kHasResidual = !std::is_void_v<TR>;
  const Rows rows = find_rows(out, sources.entries());
  const auto factors = make_factors<F>(out, gamma, scale);
  const Factors<F> one(1);
  const bool is_copy = !kHasResidual && std::is_same_v<TX, TO> && !gamma && scale == 1.0;
  const bool in_place = kHasResidual && residual->is_same(out);
  const Store store = in_place ? Store::kCached : store_of(out);
  const Input x_rows = with_rows(x, out, rows, sources.is_index());
  const auto* x_data = x_rows.tensor.const_data_ptr<TX>();
  auto* out_data = out.mutable_data_ptr<TO>();
  Input residual_rows;
  const TR* residual_data = nullptr;
  if constexpr (kHasResidual) {
    residual_rows = with_rows(*residual, out, rows);
    residual_data = residual_rows.tensor.const_data_ptr<TR>();
  }
  const RowCost cost = in_place ? RowCost{3, 0} : kHasResidual ? RowCost{3, 2} : RowCost{2, 1};
  parallel_rows(rows, SourceLookup(sources), cost, [&](const RowPart& part) {
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

void add_kept_cpu(const at::Tensor& out, const std::optional<at::Tensor>& residual, const at::Tensor& x,
                  const std::optional<at::Tensor>& gamma, const Sources& sources, double scale) {
  prepare(sources, x.size(0));
  if (out.numel() == 0) {
    return;
  }
  const auto run = [&](auto kernel) { kernel(out, residual, x, gamma, sources, scale); };
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
