"""Who calls which drop path with what: seen in one forward."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .drops import drop_path_kind
from .trace import Call


@dataclass
class Caller:
    """A module whose forward calls drop paths, in the first of its calls."""

    module: nn.Module
    call: Call
    parent: "Caller | None"
    drops: list[nn.Module] = field(default_factory=list)  # in the order of their calls


class Observer:
    """Records the calls of the drop paths in a model, from ``start`` to ``stop``."""

    def __init__(self) -> None:
        self.callers: dict[nn.Module, Caller] = {}
        self.called: set[nn.Module] = set()
        self.training: dict[nn.Module, bool] = {}  # the modes in which the forward ran
        self._stack: list[Caller] = []
        self._handles: list[RemovableHandle] = []

    def start(self, model: nn.Module) -> None:
        for module in model.modules():
            self._handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parent = self._stack[-1] if self._stack else None
        if drop_path_kind(module) is not None:
            self.called.add(module)
            if parent is not None:
                caller = self.callers.setdefault(parent.module, parent)
                if caller is parent:
                    caller.drops.append(module)
        self._stack.append(Caller(module, Call(args, kwargs), parent))

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if self._stack:
            self._stack.pop()
