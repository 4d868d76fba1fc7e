// Derivatives: a graph node for each function that people call. The ops that these and their gradients are made of are
// differentiated in ATen: that is rare, and there ATen's own derivatives are free.
#include <ATen/DimVector.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "checks.h"
#include "layout.h"
#include "node.h"
#include "ops.h"

namespace droppath_ext {
namespace {

using torch::autograd::variable_list;

// A graph node costs more than a tiny forward: build it only where somebody will ask for gradients.
bool needs_graph(const at::Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }
bool needs_graph(const std::optional<at::Tensor>& x) { return x && needs_graph(*x); }

// The nodes have no forward mode: they would lose the tangent without a word.
bool is_dual(const at::Tensor& x) { return x._fw_grad(/*level=*/0).defined(); }
bool is_dual(const std::optional<at::Tensor>& x) { return x && is_dual(*x); }

// Whether an op of given sources is to be differentiated: called by itself, in a backward under create_graph, or in a
// graph that the kernels built and that meets a tangent only now (forward over reverse).
template <typename... Tensors>
bool is_differentiated(const Tensors&... tensors) {
  return (... || (is_dual(tensors) || needs_graph(tensors)));
}

bool keeps_all(const at::Tensor& sources) { return !is_index(sources) && sources.sym_numel() == 0; }

// In ATen, for samples of an output: x, or `other` (a tensor or a number) where `sources` names no sample.
template <typename Other>
at::Tensor mask_sourceless(const at::Tensor& x, const at::Tensor& sources, const Other& other) {
  if (keeps_all(sources)) {
    return x;
  }
  const at::Tensor has_source = is_index(sources) ? sources.ge(0) : sources;
  at::SymDimVector shape(x.dim(), 1);
  shape[0] = has_source.sym_size(0);
  return at::where(has_source.view_symint(shape), x, other);
}

// In ATen: the samples of x that `sources` names, zeros where it names none.
at::Tensor select_sources(const at::Tensor& x, const at::Tensor& sources) {
  if (!is_index(sources)) {
    return mask_sourceless(x, sources, 0);
  }
  if (x.sym_size(0) == 0) {  // index_select has nothing to select from, not even for an entry that is masked
    at::SymDimVector sizes(x.sym_sizes());
    sizes[0] = sources.sym_size(0);
    return at::zeros_symint(sizes, x.options());
  }
  return mask_sourceless(at::index_select(x, 0, sources.clamp_min(0)), sources, 0);
}

struct DropPathBackward final : SavingNode<DropPathBackward, 1> {
  static constexpr auto kName = "DropPathBackward";

  Saved keep;
  Saved factor;
  double scale = 1;

  template <typename Self, typename F>
  static void for_members(Self& self, const F& f) {
    f(self.keep);
    f(self.factor);
    f(self.scale);
  }

  variable_list differentiate(variable_list&& grads, const Needs& /*needs*/) {
    return {grads[0].defined() ? scale_kept(grads[0], keep.get(), scale, factor.get_optional()) : at::Tensor()};
  }
};

// residual + gamma * x[source] * scale: drop_path_add and scatter_add.
struct AddKeptBackward final : SavingNode<AddKeptBackward, 3> {
  static constexpr auto kName = "AddKeptBackward";
  enum Input { kX, kResidual, kGamma };

  Saved x;        // only for the gradient of gamma
  Saved gamma;    // for the gradient of x; that of gamma needs its shape and dtype, too
  Saved sources;  // of the gradient of x: the keep mask, or the index that undoes the one of x; not of an addition
  Saved factor;
  double scale = 1;
  at::ScalarType dtype = at::kFloat;  // of x
  bool is_addition = false;           // and nothing else

  template <typename Self, typename F>
  static void for_members(Self& self, const F& f) {
    f(self.x);
    f(self.gamma);
    f(self.sources);
    f(self.factor);
    f(self.scale);
    f(self.dtype);
    f(self.is_addition);
  }

  void save(const at::Tensor& x_input, const std::optional<at::Tensor>& gamma_input, const at::Tensor& sources_input,
            double scale_input, const std::optional<at::Tensor>& factor_input = std::nullopt) {
    if (needs_graph(gamma_input)) {
      x = Saved(x_input);
    }
    if (gamma_input && (needs_graph(x_input) || needs_graph(gamma_input))) {
      gamma = Saved(*gamma_input);
    }
    scale = scale_input;
    dtype = x_input.scalar_type();
    is_addition = keeps_all(sources_input) && !gamma_input && scale == 1.0 && !factor_input;
    if (!is_addition) {
      sources = Saved(sources_input);
    }
    if (factor_input) {
      factor = Saved(*factor_input);
    }
  }

  variable_list differentiate(variable_list&& grads, const Needs& needs) {
    variable_list result(3);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) {
      return result;
    }
    const bool needs_x = needs[kX];
    const bool needs_gamma = x && needs[kGamma];
    if (needs[kResidual]) {
      result[kResidual] = grad;  // the engine casts what is not of the input's dtype
    }
    if (is_addition) {
      result[kX] = grad;
    } else if (needs_x || needs_gamma) {
      auto [grad_x, grad_gamma] =
          add_kept_backward(grad, needs_gamma ? x.get_optional() : std::nullopt, gamma.get_optional(), sources.get(),
                            scale, dtype, {needs_x, needs_gamma}, factor.get_optional());
      result[kX] = needs_x ? std::move(grad_x) : at::Tensor();
      result[kGamma] = needs_gamma ? std::move(grad_gamma) : at::Tensor();
    }
    return result;
  }
};

at::Tensor gather(const at::Tensor& x, const at::Tensor& index, const at::Tensor& inverse);

// Outputs: the samples, and x if it was handed through.
struct GatherBackward final : SavingNode<GatherBackward, 1> {
  static constexpr auto kName = "GatherBackward";

  Saved index;
  Saved inverse;

  template <typename Self, typename F>
  static void for_members(Self& self, const F& f) {
    f(self.index);
    f(self.inverse);
  }

  // Adds the samples' gradient to that of x; in place if nobody else holds it.
  variable_list differentiate(variable_list&& grads, const Needs& /*needs*/) {
    const at::Tensor& grad_samples = grads[0];
    at::Tensor grad_x = grads.size() > 1 ? std::move(grads[1]) : at::Tensor();
    if (!grad_samples.defined()) {
      return {grad_x};
    }
    // The functions below have derivatives, but no tangents.
    if (is_dual(grad_samples) || (grad_x.defined() && is_dual(grad_x))) {
      const at::Tensor scattered = select_sources(grad_samples, inverse.get());
      return {grad_x.defined() ? at::add(grad_x, scattered) : scattered};
    }
    if (!grad_x.defined()) {
      return {gather(grad_samples, inverse.get(), index.get())};
    }
    if (at::GradMode::is_enabled() || !is_ours_alone(grad_x) || !is_plain(grad_samples)) {
      return {scatter_add(grad_samples, grad_x, std::nullopt, inverse.get(), index.get(), /*scale=*/1.0)};
    }
    const at::Tensor slots = inverse.get();  // once: under checkpointing it is recomputed
    check_add_kept_inputs(grad_samples, grad_x, std::nullopt, slots);
    add_kept_(grad_x, grad_samples, slots);
    return {std::move(grad_x)};
  }

 private:
  // Whether its memory holds its values: add_kept_ takes no turn through the dispatcher, which would see to that.
  static bool is_plain(const at::Tensor& grad) {
    return !at::isTensorSubclassLike(grad) && !grad.is_nested() && grad.layout() == at::kStrided &&
           !grad._is_zerotensor() && !grad.is_neg() && grad.has_storage();
  }

  // What the engine asks before it adds to a gradient in place.
  static bool is_ours_alone(const at::Tensor& grad) {
    return is_plain(grad) && grad.is_non_overlapping_and_dense() && grad.use_count() == 1 &&
           grad.storage().use_count() == 1;
  }
};

void check_not_dual(const std::optional<at::Tensor>& tensor, const char* name, const char* op, const char* function) {
  TORCH_CHECK_NOT_IMPLEMENTED(!is_dual(tensor), "torch.ops.droppath_ext.", op, " has no forward-mode derivative, but ",
                              name, " carries a tangent; droppath_ext.", function, " has one");
}

// A node for these inputs if one of them needs a gradient.
template <typename T, typename... Tensors>
NodePointer<T> make_node_if_needed(const Tensors&... inputs) {
  return (... || needs_graph(inputs)) ? make_node<T>(inputs...) : NodePointer<T>();
}

std::tuple<at::Tensor, at::Tensor> drop_path_autograd(const at::Tensor& x, double drop_prob, bool scale_by_keep,
                                                      bool per_sample, const std::optional<at::Generator>& generator) {
  check_not_dual(x, "x", "drop_path", "drop_path");
  const auto node = make_node_if_needed<DropPathBackward>(x);
  auto result = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return drop_path(x, drop_prob, scale_by_keep, per_sample, generator);
  }();
  if (node) {
    node->keep = Saved(std::get<1>(result));
    node->scale = keep_scale(drop_prob, scale_by_keep);
    set_outputs(node, std::get<0>(result));
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor> drop_path_add_autograd(const at::Tensor& x, const at::Tensor& residual,
                                                          const std::optional<at::Tensor>& gamma, double drop_prob,
                                                          bool scale_by_keep, bool per_sample,
                                                          const std::optional<at::Generator>& generator) {
  check_not_dual(x, "x", "drop_path_add", "drop_path_add");
  check_not_dual(residual, "residual", "drop_path_add", "drop_path_add");
  check_not_dual(gamma, "gamma", "drop_path_add", "drop_path_add");
  const auto node = make_node_if_needed<AddKeptBackward>(x, residual, gamma);
  auto result = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return drop_path_add(x, residual, gamma, drop_prob, scale_by_keep, per_sample, generator);
  }();
  if (node) {
    node->save(x, gamma, /*sources=*/std::get<1>(result), keep_scale(drop_prob, scale_by_keep));
    set_outputs(node, std::get<0>(result));
  }
  return result;
}

// The ops of given sources are differentiated in ATen: right for any index, also one that names a sample twice.

// x * scale * factor, of the dtype of x, rounded once. To be selected from behind: the scale may be infinite.
at::Tensor scaled(const at::Tensor& x, double scale, const std::optional<at::Tensor>& factor) {
  if (!factor) {
    return at::mul(x, scale);
  }
  const auto opmath = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::mul(at::mul(x.to(opmath), scale), factor->to(opmath)).to(x.scalar_type());
}

at::Tensor scale_kept_autograd(const at::Tensor& x, const at::Tensor& sources, double scale,
                               const std::optional<at::Tensor>& factor) {
  if (is_differentiated(x)) {
    check_input(x, "x");
    check_sources(sources, x);
    check_factor(factor, sources);
    return select_sources(scaled(x, scale, factor), sources);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return scale_kept(x, sources, scale, factor);
}

at::Tensor add_kept_autograd(const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                             const at::Tensor& sources, double scale, const std::optional<at::Tensor>& factor) {
  if (!is_differentiated(x, residual, gamma)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return add_kept(x, residual, gamma, sources, scale, factor);
  }
  check_add_kept_inputs(x, residual, gamma, sources);
  check_factor(factor, sources);
  const auto dtype = add_dtype(x, residual, gamma);
  const auto opmath = dtype == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor branch = select_sources(x.to(opmath), sources);
  if (gamma) {
    // Masked again behind gamma, which may be infinite.
    branch = mask_sourceless(at::mul(branch, gamma->to(opmath)), sources, 0);
  }
  // Dropped samples are the residual bit for bit, a zero's sign included.
  const at::Tensor sum = at::add(residual.to(opmath), scaled(branch, scale, factor));
  return mask_sourceless(sum.to(dtype), sources, residual.to(dtype));
}

std::tuple<at::Tensor, at::Tensor> add_kept_backward_autograd(const at::Tensor& grad,
                                                              const std::optional<at::Tensor>& x,
                                                              const std::optional<at::Tensor>& gamma,
                                                              const at::Tensor& sources, double scale,
                                                              at::ScalarType dtype, std::array<bool, 2> output_mask,
                                                              const std::optional<at::Tensor>& factor) {
  if (!is_differentiated(grad, x, gamma)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return add_kept_backward(grad, x, gamma, sources, scale, dtype, output_mask, factor);
  }
  check_backward_inputs(grad, x, gamma, sources, dtype, output_mask);
  check_factor(factor, sources);
  const auto opmath = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor scaled_grad = select_sources(scaled(grad.to(opmath), scale, factor), sources);
  const auto options = grad.options().dtype(dtype);
  at::Tensor grad_x = at::empty({0}, options);
  at::Tensor grad_gamma = at::empty({0}, options);
  if (output_mask[0]) {
    grad_x = (gamma ? mask_sourceless(at::mul(scaled_grad, gamma->to(opmath)), sources, 0) : scaled_grad).to(dtype);
  }
  if (output_mask[1]) {
    const at::Tensor product = at::mul(scaled_grad, mask_sourceless(x->to(opmath), sources, 0));
    grad_gamma = product.sum_to_size_symint(gamma->sym_sizes()).to(gamma->scalar_type());
  }
  return {std::move(grad_x), std::move(grad_gamma)};
}

// If hands_through, also returns an alias of x as this node's second output.
std::tuple<at::Tensor, at::Tensor> gather_autograd(const at::Tensor& x, const at::Tensor& index,
                                                   const at::Tensor& inverse, bool hands_through) {
  const auto node = make_node_if_needed<GatherBackward>(x);
  at::AutoDispatchBelowADInplaceOrView guard;
  std::tuple<at::Tensor, at::Tensor> result{scale_kept(x, index, /*scale=*/1.0), hands_through ? x : at::Tensor()};
  if (node) {
    node->index = Saved(index);
    node->inverse = Saved(inverse);
    if (hands_through) {
      std::get<1>(result) = x.detach();
      set_outputs(node, std::get<0>(result), std::get<1>(result));
    } else {
      set_outputs(node, std::get<0>(result));
    }
  }
  return result;
}

at::Tensor gather(const at::Tensor& x, const at::Tensor& index, const at::Tensor& inverse) {
  return std::get<0>(gather_autograd(x, index, inverse, /*hands_through=*/false));
}

}  // namespace

at::Tensor scale_kept_by_mask(const at::Tensor& x, const at::Tensor& keep, double scale,
                              const std::optional<at::Tensor>& factor) {
  const auto node = make_node_if_needed<DropPathBackward>(x);
  at::Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return scale_kept(x, keep, scale, factor);
  }();
  if (node) {
    node->keep = Saved(keep);
    node->scale = scale;
    if (factor) {
      node->factor = Saved(*factor);
    }
    set_outputs(node, out);
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> gather_with_x(const at::Tensor& x, const at::Tensor& index,
                                                 const at::Tensor& inverse) {
  return gather_autograd(x, index, inverse, /*hands_through=*/true);
}

at::Tensor scatter_add(const at::Tensor& y, const at::Tensor& residual, const std::optional<at::Tensor>& gamma,
                       const at::Tensor& slots, const at::Tensor& kept, double scale,
                       const std::optional<at::Tensor>& factor) {
  const auto node = make_node_if_needed<AddKeptBackward>(y, residual, gamma);
  at::Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return add_kept(y, residual, gamma, slots, scale, factor);
  }();
  if (node) {
    node->save(y, gamma, /*sources=*/kept, scale, factor);
    set_outputs(node, out);
  }
  return out;
}

TORCH_LIBRARY_IMPL(droppath_ext, Autograd, m) {
  m.impl("drop_path", &drop_path_autograd);
  m.impl("drop_path_add", &drop_path_add_autograd);
  m.impl("draw_keep", torch::CppFunction::makeFallthrough());  // a mask has no derivative, and a rate gets none
  m.impl("draw_fixed", torch::CppFunction::makeFallthrough());
  m.impl("scale_kept", &scale_kept_autograd);
  m.impl("add_kept", &add_kept_autograd);
  m.impl("add_kept_backward", &add_kept_backward_autograd);
}

}  // namespace droppath_ext
