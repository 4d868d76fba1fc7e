"""What becomes of the calls of drop paths in a block: found in its graph, and rewritten there."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..checks import check_gamma_shape
from ..functional import drop_path_add
from .drops import DropPathKind, drop_path_kind
from .emit import Branch, block_source
from .independence import independence
from .mount import make_class
from .runtime import expect
from .trace import (
    VIEWS,
    Call,
    CannotPlan,
    Trace,
    add_operands,
    attribute,
    is_shape,
    mul_operands,
    submodule,
    trace_call,
)
from .verify import verify

LEVELS = ("keep", "fuse", "skip")


@dataclass(frozen=True)
class Conversion:
    """What a model is converted to: the arguments of ``convert`` that its plans depend on."""

    residual: str  # the level
    min_drop_prob: float | None = None
    sampling: str = "bernoulli"


# Host time that skipping costs a site over fusing it, in seconds: two gathers and two scatters, which are Python.
SKIP_COST = 50e-6
LOWEST_SKIPPED_RATE = 0.02


@dataclass
class Outcome:
    """What was done with one call of a drop path, and why not more."""

    level: str
    why: str = ""


@dataclass
class BlockPlan:
    """The source of a block's class, None if nothing is fused or skipped, and the outcome of each call in order."""

    source: str | None
    outcomes: list[tuple[str, Outcome]] = field(default_factory=list)  # by the path of the drop path in the block
    is_output: frozenset[str] = frozenset()  # drop paths whose result is the block's own


@dataclass
class Site:
    """residual + drop(gamma * y), in a graph: numbers that the dropped branch is multiplied with are part of y."""

    drop: fx.Node
    kind: DropPathKind
    add: fx.Node
    y: fx.Node
    residual: fx.Node
    gamma: fx.Node | None
    chain: set[fx.Node]  # what stands between y and the addition


def plan_block(
    root: nn.Module,
    call: Call,
    goal: Conversion,
    is_chosen: Callable[[nn.Module], bool],
    inline: frozenset[nn.Module] = frozenset(),
) -> BlockPlan:
    """Plan the forward of ``root`` for calls like this one.

    Raises:
        CannotPlan: why the forward has no graph.
    """
    try:
        trace = trace_call(root, call, inline, follow_shapes=False)
    except CannotPlan:
        trace = trace_call(root, call, inline, follow_shapes=True)
    _follow_in_place(trace)
    _unstack(trace)
    planner = _Planner(trace, goal)
    outcomes = []
    is_output = set()
    for node in list(trace.graph.nodes):
        if node.op != "call_module":
            continue
        module = submodule(root, str(node.target))
        kind = drop_path_kind(module)
        if kind is None or not is_chosen(module):
            continue
        outcomes.append((str(node.target), planner.plan(node, kind)))
        if any(user.op == "output" for user in node.users):
            is_output.add(str(node.target))
    source = None
    if any(outcome.level != "keep" for _, outcome in outcomes):
        source = block_source(trace, planner.swallowed, planner.branches, gives_up=bool(planner.checks))
        try:
            verify(root, call, make_class(type(root), source).forward)
        except CannotPlan as error:
            if goal.residual != "skip" or all(outcome.level != "skip" for _, outcome in outcomes):
                raise
            plan = plan_block(root, call, Conversion("fuse"), is_chosen, inline)
            for _, outcome in plan.outcomes:
                outcome.why = outcome.why or str(error)
            return plan
    return BlockPlan(source, outcomes, frozenset(is_output))


class _Planner:
    """Rewrites the graph of a block, one site after the other."""

    def __init__(self, trace: Trace, goal: Conversion) -> None:
        self.trace = trace
        self.root = trace.root
        self.graph = trace.graph
        self.goal = goal
        self.swallowed: dict[str, fx.Node] = {}  # placeholders for modules that are not called any more, by path
        self.branches: list[Branch] = []
        self.sums: set[fx.Node] = set()  # what was put in place of the additions
        self.folded: set[fx.Node] = set()  # parts of results that are assumed to be None
        self.checks: list[fx.Node] = []  # of these

    def plan(self, drop: fx.Node, kind: DropPathKind) -> Outcome:
        try:
            site = self._match(drop, kind)
        except CannotPlan as error:
            return Outcome("keep", str(error))
        why = ""
        if self.goal.residual == "skip":
            try:
                self._skip(site)
            except CannotPlan as error:
                why = str(error)
            else:
                return Outcome("skip")
        self._fuse(site)
        return Outcome("fuse", why)

    # --- finding ---

    def _match(self, drop: fx.Node, kind: DropPathKind) -> Site:
        last, user, gamma = drop, next(iter(drop.users), drop), None
        if len(drop.users) != 1:
            raise CannotPlan(self._why_not_added(drop, user, f"the dropped branch is used {len(drop.users)} times"))
        factors, chain = [], {drop, *drop.all_input_nodes}
        while (operands := mul_operands(user)) is not None and len(user.users) == 1:
            factor = operands[1] if operands[0] is last else operands[0]
            if isinstance(factor, int | float) or self._is_scalar(factor):
                factors.append(factor)
            elif gamma is None and self._is_gamma(factor):
                gamma = factor
            else:
                break
            chain.add(user)
            last, user = user, next(iter(user.users))
        operands = add_operands(user)
        if operands is None:
            goes_to = f"the dropped branch is not added to anything: it goes to {_describe(user)}"
            raise CannotPlan(self._why_not_added(drop, user, goes_to))
        residual = operands[1] if operands[0] is last else operands[0]
        if not isinstance(residual, fx.Node) or residual is last:
            raise CannotPlan("the dropped branch is added to no other tensor")
        y = next(iter((*drop.args, *drop.kwargs.values())))
        if not isinstance(y, fx.Node):
            raise CannotPlan("the drop path is called with no tensor of the block's")
        if gamma is None and (operands := mul_operands(y)) is not None and len(y.users) == 1:
            for factor, rest in (operands, operands[::-1]):
                if self._is_gamma(factor) and isinstance(rest, fx.Node):
                    gamma, y = factor, rest
                    break
        self._check_values(y, residual, gamma)
        with self.graph.inserting_before(user):
            for factor in factors:
                y = self.graph.call_function(operator.mul, (y, factor))
        return Site(drop, kind, user, y, residual, gamma, chain)

    def _why_not_added(self, drop: fx.Node, user: fx.Node, otherwise: str) -> str:
        """In some models upstream drops something else than a branch; what they do is kept."""
        if user.op == "call_module" and drop_path_kind(submodule(self.root, str(user.target))) is not None:
            return f"it is dropped once more, by {user.target}: upstream has two drop paths in series"
        if all(node.op == "placeholder" for node in drop.all_input_nodes):
            return "upstream drops the block's input here, not a branch"
        behind = {drop}
        for node in self.graph.nodes:
            if not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
                operands = add_operands(node)
                if operands is not None and not behind.issuperset(operands):
                    return otherwise
        if any(node.op == "call_module" for node in behind - {drop}):
            return "upstream drops more than a branch here: nothing is added to it, so a dropped sample is lost whole"
        return otherwise

    def _is_gamma(self, node: object) -> bool:
        """Whether the node is a parameter of the block, or a view of one."""
        while isinstance(node, fx.Node) and (
            (node.op == "call_method" and node.target in VIEWS) or node.target is operator.getitem
        ):
            node = node.args[0]
        return (
            isinstance(node, fx.Node)
            and node.op == "get_attr"
            and isinstance(attribute(self.root, str(node.target)), Tensor)
        )

    def _is_scalar(self, node: object) -> bool:
        """Whether the node is a parameter or buffer of the block that is one number."""
        return isinstance(node, fx.Node) and self._is_gamma(node) and self._value(node).numel() == 1

    def _check_values(self, y: fx.Node, residual: fx.Node, gamma: fx.Node | None) -> None:
        tensors = [self._value(node) for node in (y, residual)]
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim == 0:
                raise CannotPlan("what is added are no tensors of floating-point numbers with samples")
        if tensors[0].shape != tensors[1].shape:
            raise CannotPlan(
                f"the branch, {list(tensors[0].shape)}, is added to another shape, {list(tensors[1].shape)}"
            )
        if gamma is not None:
            try:
                check_gamma_shape(self._value(gamma), tensors[0])
            except ValueError as error:
                raise CannotPlan(str(error)) from None

    def _value(self, node: fx.Node) -> Any:
        """In the call that was traced."""
        try:
            return self.trace.value(node)
        except CannotPlan:
            raise
        except Exception as error:
            raise CannotPlan(f"its graph cannot be run ({type(error).__name__})") from error

    # --- fuse ---

    def _swallow(self, path: str) -> fx.Node:
        if path not in self.swallowed:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                self.swallowed[path] = self.graph.placeholder(f"dp_module_{len(self.swallowed)}")
        return self.swallowed[path]

    def _fuse(self, site: Site) -> None:
        with self.graph.inserting_before(site.add):
            drop = self._swallow(str(site.drop.target))
            settings = {
                name: self.graph.call_function(getattr, (drop, value)) if is_attribute else value
                for name, value, is_attribute in site.kind.settings()
            }
            if site.gamma is not None:
                settings["gamma"] = site.gamma
            new = self.graph.call_function(drop_path_add, (site.y, site.residual), settings)
        self._replace(site, new)

    def _replace(self, site: Site, new: fx.Node) -> None:
        self.trace.known[new] = self._value(site.add)
        self.sums.add(new)
        site.add.replace_all_uses_with(new)
        chain = [site.add]
        while chain:
            node = chain.pop()
            if node.users or node._erased or node.op == "placeholder":
                continue
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            chain += [i for i in inputs if i is site.drop or mul_operands(i) is not None or _is_read(i)]

    # --- skip ---

    def _skip(self, site: Site) -> None:
        if site.kind.mode_of(submodule(self.root, str(site.drop.target))) == "batch":
            raise CannotPlan("it drops the whole batch at once")
        inside, outside = self._slice(site)
        self._check_structure(inside)
        branch = Branch(len(self.branches), site.kind, site.gamma is not None, self.goal.sampling)
        branch.copy_nodes(inside, outside, site.residual, site.y)
        residual, values = self._value(site.residual), [*map(self._value, outside)]
        found = independence(self.root, branch.function(self.root), residual, values)
        branch.batched = found.batched
        branch.shared = tuple(
            i
            for i, value in enumerate(values)
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] != residual.shape[0]
        )
        branch.min_rate = self._min_rate(found.seconds)
        gamma = () if site.gamma is None else (site.gamma,)
        with self.graph.inserting_before(site.add):
            drop = self._swallow(str(site.drop.target))
            arguments = (self._swallow(""), drop, site.residual, *outside, *gamma)
            new = self.graph.create_node("call_function", branch.call, arguments, name="skipped")
        self.branches.append(branch)
        self._replace(site, new)
        for node in reversed(inside):
            if not node.users and not node._erased:
                self.graph.erase_node(node)

    def _slice(self, site: Site) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes of the branch, and the values that it reads beside the residual.

        A value that is used outside, too, is computed outside.
        """
        shared: set[fx.Node] = set()
        while True:
            inside: set[fx.Node] = set()
            outside: list[fx.Node] = []
            pending = [site.y]
            while pending:
                node = pending.pop()
                if node is site.residual or node in inside or node in outside:
                    continue
                if node.op == "placeholder" or node in shared or node in self.sums:
                    outside.append(node)
                else:
                    inside.add(node)
                    pending += node.all_input_nodes
            used_outside = {
                node
                for node in inside
                if node is not site.y
                and not _is_read(node)
                and any(user not in inside | site.chain | self.folded and _is_alive(user) for user in node.users)
            }
            if not used_outside:
                break
            if not any([self._fold_nones(node, inside) for node in used_outside]):
                shared |= used_outside
        if not any(node.op == "call_module" or _is_heavy(node) for node in inside):
            raise CannotPlan("there is nothing in the branch that is worth skipping")
        if any(user not in inside | site.chain for user in site.y.users):
            raise CannotPlan("the branch's output is used elsewhere, too")
        inside |= {node for node in self.folded if inside.issuperset(node.all_input_nodes)}
        inside |= {node for node in self.checks if inside.issuperset(node.all_input_nodes)}
        return [node for node in self.graph.nodes if node in inside], outside

    def _fold_nones(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        """What a call returns beside the branch's value, say None in place of attention weights, is None for all calls.

        Where it is not, the generated code gives up and the original runs.
        """
        items = [user for user in node.users if user not in inside | self.folded and _is_alive(user)]
        if not items or not all(item.target is operator.getitem and _is_none(self._value(item)) for item in items):
            return False
        for item in items:
            value = self._value(item)
            put = partial(_replaced, item, value)
            for user in list(item.users):
                user.args, user.kwargs = fx.node.map_arg(user.args, put), fx.node.map_arg(user.kwargs, put)
            with self.graph.inserting_after(item):
                self.checks.append(self.graph.call_function(expect, (item, value)))
            self.folded.add(item)
        return True

    def _check_structure(self, inside: list[fx.Node]) -> None:
        for node in inside:
            if node.op != "call_module":
                continue
            for inner, module in submodule(self.root, str(node.target)).named_modules():
                name = type(module).__name__
                if _is_batch_norm(module):
                    if module.training:
                        raise CannotPlan(f"{name} in the branch takes its statistics of the whole batch")
                    path = f"{node.target}.{inner}" if inner else str(node.target)
                    self.trace.frozen += [path] if path not in self.trace.frozen else []
                if _ROUTERS.search(name):
                    raise CannotPlan(f"{name} in the branch routes samples together")

    def _min_rate(self, seconds: float | None) -> float:
        """From which rate on skipping pays; in whole percents, so that equal blocks share their source."""
        if self.goal.min_drop_prob is not None:
            return self.goal.min_drop_prob
        if seconds is None:  # nothing was run
            return LOWEST_SKIPPED_RATE
        rate = max(LOWEST_SKIPPED_RATE, SKIP_COST / seconds)
        if rate >= 1.0:
            raise CannotPlan(f"the branch takes {seconds * 1e6:.0f} µs, and skipping it costs {SKIP_COST * 1e6:.0f}")
        return -(-rate * 100 // 1) / 100


def _follow_in_place(trace: Trace) -> None:
    """What uses a tensor after a statement such as ``x.mul_(2)`` uses the result of that statement."""
    nodes = list(trace.graph.nodes)
    for i, node in enumerate(nodes):
        is_in_place = node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
        if is_in_place and isinstance(node.args[0], fx.Node):
            later = set(nodes[i + 1 :])
            node.args[0].replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _unstack(trace: Trace) -> None:
    """residual + stack([a, b, ...]).sum(0) as residual + a + b + ..., each of them added by itself."""
    graph = trace.graph
    for stack in list(graph.nodes):
        if stack.target is not torch.stack or stack.kwargs.get("dim", [*stack.args, 0, 0][1]) != 0:
            continue
        parts = stack.args[0] if stack.args else stack.kwargs.get("tensors")
        if not isinstance(parts, list | tuple) or len(stack.users) != 1:
            continue
        total = next(iter(stack.users))
        is_sum = total.target is torch.sum or (total.op, total.target) == ("call_method", "sum")
        if not is_sum or len(total.users) != 1:
            continue
        if (*total.args[1:], *total.kwargs.items()) not in ((0,), (("dim", 0),)):
            continue
        operands = add_operands(next(iter(total.users)))
        if operands is None or operands[0] is operands[1]:
            continue
        addition = next(iter(total.users))
        with graph.inserting_before(addition):
            result = operands[1] if operands[0] is total else operands[0]
            for part in parts:
                result = graph.call_function(operator.add, (result, part))
        addition.replace_all_uses_with(result)
        for node in (addition, total, stack):
            graph.erase_node(node)


_ROUTERS = re.compile(r"MoE|Mixture|Router|Expert")
_HEAVY = {"linear", "matmul", "conv1d", "conv2d", "conv3d", "einsum", "bmm", "scaled_dot_product_attention"}


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in type(module).__name__


def _is_heavy(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", node.target) in _HEAVY


def _replaced(item: fx.Node, value: Any, argument: fx.Node) -> Any:
    return value if argument is item else argument


def _is_none(value: object) -> bool:
    return value is None or (type(value) is tuple and all(part is None for part in value))


def _is_read(node: fx.Node) -> bool:
    """Whether the node costs nothing: it may be computed twice."""
    return node.op == "get_attr" or is_shape(node)


def _is_alive(node: fx.Node) -> bool:
    return bool(node.users) or node.op == "output"


def _describe(node: fx.Node) -> str:
    if node.op == "output":
        return "the block's output"
    return str(getattr(node.target, "__name__", node.target))
