// Graph nodes written by hand, as those of torch's own ops are. torch::autograd::Function would save that, but it keeps
// lists of inputs, maps of saved values and sets of outputs: a fifth of the host time of a tiny drop_path_add, forward
// and backward (measured).
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace droppath_ext {

// How torch holds its nodes: std::shared_ptr until 2.12, c10::intrusive_ptr since.
template <typename T>
using NodePointer = std::conditional_t<
    std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<torch::autograd::Node>>,
    std::shared_ptr<T>, c10::intrusive_ptr<T>>;

// A node of type T whose gradients belong to these inputs, in this order. An input may be an optional tensor.
template <typename T, typename... Tensors>
NodePointer<T> make_node(const Tensors&... inputs) {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) {
    functorch->checkSupportsCppAutogradFunction();  // transforms would be wrong without a word
  }
  NodePointer<T> node;
  if constexpr (std::is_same_v<NodePointer<T>, std::shared_ptr<T>>) {
    node.reset(new T(), [](auto* pointer) { deleteNode(pointer); });  // torch's own: a deep graph must not recurse
  } else {
    node = c10::make_intrusive<T>();
  }
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

// Calls the hooks of torch.autograd.graph.node_creation_hook, which torch has since 2.14.
template <typename Pointer>
auto announce(const Pointer& node, int) -> decltype(fire_node_creation_hooks(node)) {
  fire_node_creation_hooks(node);
}
template <typename Pointer>
void announce(const Pointer& /*node*/, long) {}

// Lets the node, which by now holds all it saves, receive the gradients of these outputs, in this order.
template <typename Pointer, typename... Tensors>
void set_outputs(const Pointer& node, const Tensors&... outputs) {
  (torch::autograd::set_history(outputs, node), ...);
  announce(node, 0);
}

// A tensor that a node saves; none is one, too.
class Saved {
 public:
  Saved() = default;
  explicit Saved(const at::Tensor& tensor) : variable(tensor, /*is_output=*/false), is_defined_(true) {}

  explicit operator bool() const { return is_defined_; }
  at::Tensor get() const { return variable.unpack(); }
  std::optional<at::Tensor> get_optional() const { return is_defined_ ? std::optional(get()) : std::nullopt; }

  torch::autograd::SavedVariable variable;

 private:
  bool is_defined_ = false;
};

// A node that computes `differentiate` out of what it saves. Derived has kName, and for_saved(self, f), which calls f
// with each of its Saved; `key` is whatever else decides what it computes.
template <typename Derived>
struct SavingNode : torch::autograd::Node {
  using Variables = torch::autograd::variable_list;

  std::string name() const override { return Derived::kName; }

  // Whoever asks for the tensors from then on is told that the graph was freed.
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    Derived::for_saved(derived(), [](Saved& saved) { saved.variable.reset_data(); });
  }

  Variables apply(Variables&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return derived().differentiate(std::move(grads));
  }

  // Compiled autograd traces apply with the saved tensors replaced, once for each key.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const auto& node = static_cast<const Derived&>(*this);
    Derived::for_saved(node, [&](const Saved& saved) { args.collect(saved.variable, /*is_output=*/false); });
    node.collect_key(args);
  }

  Variables apply_with_saved(const Variables& grads, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    Derived::for_saved(derived(), [&](Saved& saved) { swap.before(saved.variable); });
    Variables result = apply(Variables(grads));
    Derived::for_saved(derived(), [&](Saved& saved) { swap.after(saved.variable); });
    return result;
  }

 private:
  Derived& derived() { return static_cast<Derived&>(*this); }
};

}  // namespace droppath_ext
