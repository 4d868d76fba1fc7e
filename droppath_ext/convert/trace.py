"""A block's training forward as a graph of torch.fx, for arguments of the kind that one call had."""

import collections
import contextlib
import gc
import inspect
import math
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.fx._symbolic_trace
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from .mount import own_forward
from .reads import Condition, Reads


class CannotPlan(Exception):
    """Why a block, or a site, does not reach the level that was asked for."""


@dataclass
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Trace:
    """The graph, whose placeholders are the tensors among the arguments."""

    root: nn.Module
    graph: fx.Graph
    parameters: dict[str, Any]  # of the forward, with the value in that call; in place of tensors their placeholders
    value: Callable[[fx.Node], Any]  # of a node in that call
    known: dict[fx.Node, Any]  # values that were computed before
    # Which of shape, dtype and device of tensors control flow, or an integer, depends on; the batch's size is none.
    consulted: set[str]
    conditions: list[Condition]  # what else it depends on
    inlined: list[str] = field(default_factory=list)  # modules whose calls the graph does not show
    frozen: list[str] = field(default_factory=list)  # modules that must stay in evaluation mode


def submodule(root: nn.Module, path: str) -> nn.Module:
    return root.get_submodule(path)


def attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


# --- what is LayerScale ---

_layer_scales: dict[tuple[object, ...], bool] = {}
VIEWS = {"view", "reshape", "unsqueeze", "contiguous"}


def mul_operands(node: Any) -> tuple[Any, Any] | None:
    return _operands(node, {operator.mul, operator.imul, torch.mul, torch.multiply}, {"mul", "mul_", "multiply"})


def add_operands(node: Any) -> tuple[Any, Any] | None:
    return _operands(node, {operator.add, operator.iadd, torch.add}, {"add", "add_"})


def _operands(node: Any, functions: set[Any], methods: set[str]) -> tuple[Any, Any] | None:
    if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
        return None
    if (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    ):
        return node.args[0], node.args[1]
    return None


def is_layer_scale(module: nn.Module) -> bool:
    """Whether the module multiplies its input with a view of its only parameter, and does nothing else."""
    if type(module).__module__.startswith("torch.nn") or any(module.children()) or any(module.buffers()):
        return False
    if len(module._parameters) != 1 or None in module._parameters.values():
        return False
    key = (type(module), module.__dict__.get("inplace"))
    if key not in _layer_scales:
        _layer_scales[key] = _multiplies(module)
    return _layer_scales[key]


def _multiplies(module: nn.Module) -> bool:
    try:
        graph = fx.Tracer().trace(module)
    except Exception:
        return False
    ops = [node.op for node in graph.nodes if not (node.op == "call_method" and node.target in VIEWS)]
    product = next((node for node in graph.nodes if mul_operands(node)), None)
    return ops.count("placeholder") == 1 and len(ops) == 4 and product is not None and "get_attr" in ops


# --- expressions of shapes ---

_SHAPE_FUNCTIONS = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
    operator.neg, operator.pow, min, max, len, int, float, round, torch.Size,
}  # fmt: skip
_PREDICATES = {
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_,
    operator.not_,
}  # fmt: skip


def is_shape(node: fx.Node) -> bool:
    """Whether the node is made of the shapes, dtypes and devices of tensors alone."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "__len__")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return bool(node.args[1] in ("shape", "dtype", "device", "ndim", "is_cuda"))
    known = node.target in _SHAPE_FUNCTIONS or node.target in _PREDICATES
    inputs = node.all_input_nodes
    return (known or getattr(node.target, "__module__", "") == "math") and bool(inputs) and all(map(is_shape, inputs))


def _consulted(node: fx.Node) -> set[str]:
    """What an expression of shapes is made of: "shape", "dtype" or "device"."""
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("dtype", "device", "is_cuda"):
        return {"dtype" if node.args[1] == "dtype" else "device"}
    if node.op == "call_method" or node.target is getattr:
        return {"shape"}
    return set().union(*map(_consulted, node.all_input_nodes))


def reads_batch_size(node: fx.Node) -> bool:
    """Whether an expression of shapes reads dim 0 of a tensor."""
    if node.op == "call_method":
        return node.target == "numel" or (node.target == "size" and node.args[1:] in ((0,), ()))
    if node.target is getattr:
        return bool(node.args[1] == "shape")  # a whole shape, which is not indexed
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_whole_shape(node.args[0]):
        index = node.args[1]
        return index == 0 if isinstance(index, int) else isinstance(index, slice) and not index.start
    both_whole = len(node.all_input_nodes) == 2 and all(map(_is_whole_shape, node.all_input_nodes))
    if node.target is len or (node.target in (operator.eq, operator.ne) and both_whole):
        return False
    return any(map(reads_batch_size, node.all_input_nodes))


def _is_whole_shape(node: fx.Node) -> bool:
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return node.target == "size" and len(node.args) == 1


# --- the tracer ---


class _ValuedProxy(fx.Proxy):
    """A proxy that answers for its value in the call: control flow on shapes follows it."""

    tracer: "_Tracer"

    def __len__(self) -> int:
        self.tracer.need_shape(self.node, "len", batch=True)
        return len(self.tracer.value(self.node))

    def __index__(self) -> int:
        self.tracer.need_shape(self.node, "an index")
        return int(self.tracer.value(self.node).__index__())

    def __int__(self) -> int:
        self.tracer.need_shape(self.node, "int")
        return int(self.tracer.value(self.node))

    def __float__(self) -> float:
        self.tracer.need_shape(self.node, "float")
        return float(self.tracer.value(self.node))


class _Tracer(fx.Tracer):
    """Children are leaves, but for LayerScale and those in ``inline``. What other threads call is not traced."""

    def __init__(self, root: nn.Module, call: Call, inline: frozenset[nn.Module], follow_shapes: bool) -> None:
        super().__init__(autowrap_modules=(math,), param_shapes_constant=True)
        self.call = call
        self.inline = inline
        self.follow_shapes = follow_shapes
        self.consulted: set[str] = set()
        self.known: dict[fx.Node, Any] = {}
        self.parameters: dict[str, Any] = {}
        self.inlined: list[str] = []
        self.reads = Reads(root)
        self.proxies: list[weakref.ref[fx.Proxy]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        with self.reads.paused():
            if m in self.inline or is_layer_scale(m):
                self.inlined.append(module_qualified_name)
                return False
            return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.reads.is_idle:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.reads.is_idle:
            return attr_val
        with self.reads.paused():
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _ValuedProxy(node, self) if self.follow_shapes else super().proxy(node)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def to_bool(self, obj: fx.Proxy) -> bool:
        if not self.follow_shapes:
            return super().to_bool(obj)
        self.need_shape(obj.node, "a condition")
        return bool(self.value(obj.node))

    def need_shape(self, node: fx.Node, what: str, *, batch: bool = False) -> None:
        if not self.follow_shapes:
            raise TraceError(f"{what} of a traced value")
        if not is_shape(node):
            raise CannotPlan(f"control flow depends on the values of a tensor ({what})")
        if not batch and reads_batch_size(node):
            raise CannotPlan(f"control flow depends on the number of samples ({what})")
        self.consulted |= _consulted(node)

    def value(self, node: fx.Node) -> Any:
        if node not in self.known:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
            self.known[node] = self._compute(node, args, kwargs)
        return self.known[node]

    def _compute(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.reads.paused(), torch.no_grad():
            if node.op == "get_attr":
                return attribute(self.root, str(node.target))
            if node.op == "call_module":
                return submodule(self.root, str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        cls: Any = type(self.root)
        forward = own_forward(cls)
        signature = inspect.signature(forward)
        try:
            bound = signature.bind(self.root, *self.call.args, **self.call.kwargs)
        except TypeError as error:
            raise CannotPlan(f"its arguments do not fit its signature: {error}") from None
        names = list(signature.parameters)
        for name, value in list(bound.arguments.items())[1:]:
            bound.arguments[name], self.parameters[name] = self._stand_in(name, value)
        for name in names[1:]:
            parameter = signature.parameters[name]
            if name in self.parameters:
                continue
            if parameter.default is not inspect.Parameter.empty:
                self.parameters[name] = self._stand_in(name, parameter.default)[1]
            else:  # *args or **kwargs without any
                self.parameters[name] = () if parameter.kind is parameter.VAR_POSITIONAL else {}

        def run() -> Any:
            with self.reads.recording():
                return forward(*bound.args, **bound.kwargs)

        return run, []

    def _stand_in(self, name: str, value: Any) -> tuple[Any, Any]:
        """An argument with proxies in place of its tensors, and with their nodes."""
        if isinstance(value, Tensor):
            proxy = self.create_proxy("placeholder", name, (), {})
            self.known[proxy.node] = value.detach().clone()  # which the forward may write to
            return proxy, proxy.node
        if type(value) in (tuple, list, torch.Size):
            pairs = [self._stand_in(f"{name}_{i}", part) for i, part in enumerate(value)]
            kind = list if type(value) is list else tuple
            return kind(pair[0] for pair in pairs), kind(pair[1] for pair in pairs)
        if type(value) is dict and all(isinstance(key, str) for key in value):
            parts = {key: self._stand_in(f"{name}_{key}", part) for key, part in value.items()}
            return {key: pair[0] for key, pair in parts.items()}, {key: pair[1] for key, pair in parts.items()}
        if value is None or type(value) in (bool, int, float, str):  # can be written into source text
            return value, value
        raise CannotPlan(f"its argument {name} is a {type(value).__name__}")


_lock = threading.Lock()


def trace_call(root: nn.Module, call: Call, inline: frozenset[nn.Module], *, follow_shapes: bool) -> Trace:
    """Trace the forward of ``root``, without a change to the module.

    Raises:
        CannotPlan: why there is no graph.
    """
    tracer = _Tracer(root, call, inline, follow_shapes)
    with _lock, _unchanged(root):
        try:
            graph = tracer.trace(root)
        except CannotPlan:
            raise
        except Exception as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise CannotPlan(f"its forward cannot be traced ({type(error).__name__}: {line[:120]})") from error
    if tracer.reads.refusal:
        raise CannotPlan(tracer.reads.refusal)
    if _any_alive(tracer.proxies):
        raise CannotPlan("its forward keeps a tensor for longer than the call")
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            raise CannotPlan("its forward makes a tensor that the graph would keep for good")
    trace = Trace(
        root,
        graph,
        tracer.parameters,
        tracer.value,
        tracer.known,
        tracer.consulted,
        list(tracer.reads.conditions),
        tracer.inlined,
    )
    _erase_nothings(trace)
    called = {*trace.inlined, *(node.target for node in graph.nodes if node.op == "call_module")}
    for path, name in tracer.reads.children.items():
        if path not in called:
            trace.conditions.append(Condition(path, "type(", f").__name__ == {name!r}"))
    return trace


def _any_alive(proxies: list["weakref.ref[fx.Proxy]"]) -> bool:
    """Not counting those in cycles that nothing leads to; a collection of all that is old is seldom needed."""
    for collect in (lambda: None, partial(gc.collect, 1), gc.collect):
        collect()
        if all(proxy() is None for proxy in proxies):
            return False
    return True


def _erase_nothings(trace: Trace) -> None:
    """Calls of nn.Identity, and what nobody uses and only reads."""
    graph = trace.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and type(submodule(trace.root, str(node.target))) is nn.Identity:
            trace.inlined.append(str(node.target))
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        reads = node.op == "get_attr" or is_shape(node) or node.target in (operator.getitem, getattr)
        if reads and not node.users:
            graph.erase_node(node)


@contextlib.contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Attributes that the forward writes are put back; that it writes any is no matter of the graph."""
    before = {module: dict(module.__dict__) for module in root.modules()}
    containers = [
        (name, value, value.copy())
        for members in before.values()
        for name, value in members.items()
        if isinstance(value, list | dict | set | collections.deque) and name not in nn.Module().__dict__
    ]
    buffers = {module: dict(module._buffers) for module in root.modules()}
    constants = set(root.__dict__)
    changed: list[str] = []
    try:
        yield
    finally:
        for name in set(root.__dict__) - constants:
            if name.startswith("_tensor_constant"):
                del root.__dict__[name]
        for module, tensors in buffers.items():
            for name, tensor in tensors.items():
                if module._buffers.get(name) is not tensor:
                    changed.append(name)
                    module._buffers[name] = tensor
        for module, members in before.items():
            for name, value in list(module.__dict__.items()):
                if name not in members:
                    changed.append(name)
                    del module.__dict__[name]
                elif members[name] is not value:
                    changed.append(name)
                    module.__dict__[name] = members[name]
        for name, value, content in containers:
            if not _has_members(value, content):
                changed.append(name)
                value.clear()
                (value.extend if isinstance(value, list | collections.deque) else value.update)(content)
    if changed:
        raise CannotPlan(f"its forward writes to its attribute {changed[0]}")


def _has_members(container: Any, members: Any) -> bool:
    """The same ones: equal tensors are not."""
    if isinstance(container, dict):
        return list(map(id, container.values())) == list(map(id, members.values())) and list(container) == list(members)
    return list(map(id, container)) == list(map(id, members))
