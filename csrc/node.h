// Graph nodes written by hand, as those of torch's own ops are. torch::autograd::Function would save that, but it keeps
// lists of inputs, maps of saved values and sets of outputs: a fifth of the host time of a tiny drop_path_add, forward
// and backward (measured).
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>
#include <optional>
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
  explicit Saved(const at::Tensor& tensor) : variable_(tensor, /*is_output=*/false), is_defined_(true) {}

  explicit operator bool() const { return is_defined_; }
  at::Tensor get() const { return variable_.unpack(); }
  std::optional<at::Tensor> get_optional() const { return is_defined_ ? std::optional(get()) : std::nullopt; }
  // Whoever asks for it from then on is told that the graph was freed.
  void release() { variable_.reset_data(); }

 private:
  torch::autograd::SavedVariable variable_;
  bool is_defined_ = false;
};

}  // namespace droppath_ext
