// Graph nodes written by hand, as those of torch's own ops are. torch::autograd::Function would save that, but it keeps
// lists of inputs, maps of saved values and sets of outputs: a fifth of the host time of a tiny drop_path_add, forward
// and backward (measured).
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

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

// A tensor that a node saves, or none, which costs nothing: an empty SavedVariable would.
class Saved {
 public:
  Saved() = default;
  explicit Saved(const at::Tensor& tensor) : variable(std::in_place, tensor, /*is_output=*/false) {}

  explicit operator bool() const { return variable.has_value(); }
  at::Tensor get() const { return variable->unpack(); }
  std::optional<at::Tensor> get_optional() const { return variable ? std::optional(get()) : std::nullopt; }

  std::optional<torch::autograd::SavedVariable> variable;
};

// A node whose gradients are computed from what it saves: Derived has
//   kName;
//   differentiate(grads, needs): the gradients of the inputs, of which `needs` says which are asked for;
//   for_members(self, f), which calls f with each of its members, a Saved or a number.
template <typename Derived, size_t kInputs>
class SavingNode : public torch::autograd::Node {
 public:
  using Variables = torch::autograd::variable_list;
  using Needs = std::array<bool, kInputs>;

  std::string name() const override { return Derived::kName; }

  // Whoever asks for the tensors from then on is told that the graph was freed.
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    Derived::for_members(derived(), [](auto& member) {
      if constexpr (is_saved<decltype(member)>) {
        if (member) {
          member.variable->reset_data();
        }
      }
    });
  }

  Variables apply(Variables&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return derived().differentiate(std::move(grads), needs());
  }

  // Compiled autograd asks for what decides the graph, then for the graph: a call of `differentiate_packed`, whose
  // arguments are all that the node holds, with the saved tensors replaced by those of the graph.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    Derived::for_members(static_cast<const Derived&>(*this), [&](const auto& member) {
      if constexpr (is_saved<decltype(member)>) {
        args.collect(static_cast<bool>(member));
        if (member) {
          args.collect(*member.variable, /*is_output=*/false);
        }
      } else {
        args.collect(member);
      }
    });
  }

  Variables apply_with_saved(const Variables& grads, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    torch::dynamo::autograd::PackedArgs packed;
    Derived::for_members(derived(), [&](auto& member) {
      if constexpr (is_saved<decltype(member)>) {
        if (member) {
          swap.before(*member.variable);
        }
        packed.pack(member.get_optional());
      } else {
        packed.pack(member);
      }
    });
    packed.pack(needs());
    std::vector<at::TypePtr> schema;
    for (const auto& value : packed.vec()) {
      schema.emplace_back(value.isTensor() ? at::TensorType::get() : value.type());
    }
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const std::string function =
        compiler->bind_function(swap.get_py_compiler(), name(), &differentiate_packed, std::move(schema),
                                /*is_custom_function=*/true, /*is_traceable=*/true);
    const auto metadata =
        torch::dynamo::autograd::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            torch::dynamo::autograd::get_input_metadata(next_edges()));
    Variables result =
        compiler->call_function(swap.get_py_compiler(), "apply_functional", function, grads, packed.vec(), metadata);
    Derived::for_members(derived(), [&](auto& member) {
      if constexpr (is_saved<decltype(member)>) {
        if (member) {
          swap.after(*member.variable);
        }
      }
    });
    return result;
  }

 private:
  template <typename Member>
  static constexpr bool is_saved = std::is_same_v<std::decay_t<Member>, Saved>;

  static Variables differentiate_packed(const Variables& grads, const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    Derived node;
    Derived::for_members(node, [&](auto& member) {
      if constexpr (is_saved<decltype(member)>) {
        const auto tensor = packed.unpack<std::optional<at::Tensor>>();
        member = tensor && tensor->defined() ? Saved(*tensor) : Saved();
      } else {
        member = packed.unpack<std::decay_t<decltype(member)>>();
      }
    });
    const auto needs = packed.unpack<Needs>();
    return node.differentiate(Variables(grads), needs);
  }

  Needs needs() const {
    Needs needs;
    for (size_t i = 0; i < kInputs; ++i) {
      needs[i] = task_should_compute_output(i);
    }
    return needs;
  }

  Derived& derived() { return static_cast<Derived&>(*this); }
};

}  // namespace droppath_ext
