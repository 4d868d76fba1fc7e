// Graph nodes written by hand, as those of torch's own ops are. torch::autograd::Function would save that, but it keeps
// lists of inputs, maps of saved values and sets of outputs: a fifth of the host time of a tiny drop_path_add, forward
// and backward (measured).
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/version.h>

#include <mutex>
#include <optional>
#include <utility>

namespace droppath_ext {

#define DROPPATH_INTRUSIVE_NODES (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14)

#if DROPPATH_INTRUSIVE_NODES
template <typename T>
using NodePointer = c10::intrusive_ptr<T>;
#else
template <typename T>
using NodePointer = std::shared_ptr<T>;
#endif

// A node of type T whose gradients belong to these inputs, in this order. An input may be an optional tensor.
template <typename T, typename... Tensors>
NodePointer<T> make_node(const Tensors&... inputs) {
  if (const auto& functorch = at::functorch::functorchTLSAccessor()) {
    functorch->checkSupportsCppAutogradFunction();  // transforms would be wrong without a word
  }
#if DROPPATH_INTRUSIVE_NODES
  auto node = c10::make_intrusive<T>();
#else
  auto node = std::shared_ptr<T>(new T(), torch::autograd::deleteNode);
#endif
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

// Lets the node, which by now holds all it saves, receive the gradients of these outputs, in this order.
template <typename T, typename... Tensors>
void set_outputs(const NodePointer<T>& node, const Tensors&... outputs) {
  (torch::autograd::set_history(outputs, node), ...);
#if DROPPATH_INTRUSIVE_NODES
  torch::autograd::fire_node_creation_hooks(node);
#endif
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
