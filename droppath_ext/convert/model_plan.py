"""The plans of all blocks of a model that call drop paths."""

from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .drops import drop_path_kind
from .mount import mount
from .observe import Caller, Observer
from .plan import BlockPlan, Conversion, Outcome, plan_block
from .preserve import preserved, unsharded
from .report import ConvertedSite
from .trace import Call, CannotPlan

HIGHEST_PARENT = 3  # levels above the caller in which the addition is looked for


@dataclass
class ModelPlan:
    """What is to be mounted, and the sites of the report."""

    sources: list[tuple[nn.Module, str]] = field(default_factory=list)
    sites: list[ConvertedSite] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)

    def mount(self) -> None:
        for module, source in self.sources:
            mount(module, source)


def plan_model(model: nn.Module, observer: Observer, goal: Conversion, chosen: dict[nn.Module, str]) -> ModelPlan:
    """Plan every module that calls a drop path; changes nothing."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module, mode in observer.training.items():
            module.training = mode
        with preserved(model):
            return _Plans(model, observer, goal, chosen).all()
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Plans:
    def __init__(self, model: nn.Module, observer: Observer, goal: Conversion, chosen: dict[nn.Module, str]) -> None:
        self.observer = observer
        self.goal = goal
        self.chosen = chosen
        self.paths = {module: path for path, module in model.named_modules()}
        self.cache: dict[object, BlockPlan | CannotPlan] = {}

    def all(self) -> ModelPlan:
        callers = list(self.observer.callers.values())
        plans: dict[nn.Module, tuple[Caller, BlockPlan | CannotPlan]] = {}
        for caller in callers:
            plans[caller.module] = caller, self._plan(caller, frozenset())
        covered: dict[nn.Module, nn.Module] = {}  # callers that are inlined into another block
        if self.goal.residual != "keep":
            self._inline(plans, covered)
        result = ModelPlan()
        for module, (_, plan) in plans.items():
            if module not in covered and isinstance(plan, BlockPlan) and plan.source is not None:
                result.sources.append((module, plan.source))
        for caller in callers:
            result.sites += self._sites(caller, plans, covered)
        result.uncalled = [path for module, path in self.chosen.items() if module not in self.observer.called]
        return result

    def _plan(self, caller: Caller, inline: frozenset[nn.Module]) -> BlockPlan | CannotPlan:
        if self.goal.residual == "keep":
            return BlockPlan(None)
        module = caller.module
        key = (_structure(module), _kinds_of(caller.call), frozenset(_paths_in(module, inline)), self._choice(module))
        if key not in self.cache:
            try:
                if "forward" in module.__dict__:
                    raise CannotPlan("its forward was set by hand")
                with unsharded(module):
                    self.cache[key] = plan_block(module, caller.call, self.goal, self.chosen.__contains__, inline)
            except CannotPlan as error:
                self.cache[key] = error
            except Exception as error:  # what nobody has foreseen must not keep a model from training
                self.cache[key] = CannotPlan(f"planning it failed ({type(error).__name__}: {error})")
        return self.cache[key]

    def _choice(self, module: nn.Module) -> tuple[bool, ...]:
        return tuple(m in self.chosen for m in module.modules() if drop_path_kind(m) is not None)

    def _inline(
        self, plans: dict[nn.Module, tuple[Caller, BlockPlan | CannotPlan]], covered: dict[nn.Module, nn.Module]
    ) -> None:
        """Where the dropped branch is a block's output, the addition stands in a module that calls the block."""
        inlined: dict[nn.Module, frozenset[nn.Module]] = {}
        for _ in range(HIGHEST_PARENT):
            pending: dict[nn.Module, tuple[Caller, frozenset[nn.Module]]] = {}
            for module, (caller, plan) in plans.items():
                if module in covered or not isinstance(plan, BlockPlan) or not plan.is_output or caller.parent is None:
                    continue
                parent = caller.parent
                before = pending.get(parent.module, (parent, inlined.get(parent.module, frozenset())))[1]
                pending[parent.module] = parent, before | {module} | inlined.get(module, frozenset())
            if not pending:
                return
            for module, (parent, inline) in pending.items():
                plan = self._plan(parent, inline)
                if not isinstance(plan, BlockPlan) or (plan.source is None and not plan.is_output):
                    continue
                plans[module] = parent, plan
                inlined[module] = inline
                covered.update(dict.fromkeys(inline, module))

    def _sites(
        self,
        caller: Caller,
        plans: dict[nn.Module, tuple[Caller, BlockPlan | CannotPlan]],
        covered: dict[nn.Module, nn.Module],
    ) -> list[ConvertedSite]:
        block = caller.module
        while block in covered:
            block = covered[block]
        plan = plans[block][1]
        outcomes: dict[nn.Module, list[Outcome]] = {}
        if isinstance(plan, BlockPlan):
            for path, outcome in plan.outcomes:
                outcomes.setdefault(block.get_submodule(path), []).append(outcome)
        sites = []
        for drop in caller.drops:
            kind = drop_path_kind(drop)
            assert kind is not None
            if drop not in self.chosen:
                outcome = Outcome("none", "left out by filter")
            elif self.goal.residual == "keep":
                outcome = Outcome("keep")
            elif isinstance(plan, CannotPlan):
                outcome = Outcome("keep", str(plan))
            else:
                found = outcomes.get(drop, [])
                outcome = found.pop(0) if found else Outcome("keep", "the plan of its block does not call it")
            path = self.paths[drop]
            where, name = self.paths[block], type(block).__name__
            sites.append(ConvertedSite(path, where, name, kind.rate_of(drop), outcome.level, outcome.why, block))
        return sites


# --- which blocks are equal ---


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """All that the forward of a module may depend on, but for the values of its tensors and the rates."""
    kind = drop_path_kind(module)
    rate = None if kind is None else kind.rate
    members = [
        (name, _member(value))
        for name, value in sorted(module.__dict__.items())
        if name not in _BOOKKEEPING and name != rate
    ]
    tensors = [
        (name, None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    ]
    children = [(name, None if child is None else _structure(child)) for name, child in module._modules.items()]
    return type(module), tuple(members), tuple(tensors), tuple(children)


_BOOKKEEPING = set(nn.Module().__dict__) - {"training"}


def _member(value: Any) -> object:
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_member, value))
    if isinstance(value, FunctionType | type):
        return value
    return id(value)


def _kinds_of(call: Call) -> tuple[Any, ...]:
    def kind(value: Any) -> object:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype, value.device
        return _member(value)

    return tuple(map(kind, call.args)), tuple((name, kind(value)) for name, value in sorted(call.kwargs.items()))


def _paths_in(module: nn.Module, inline: frozenset[nn.Module]) -> list[str]:
    return [path for path, child in module.named_modules() if child in inline]
