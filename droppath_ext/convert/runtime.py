"""What the generated code calls, beside the public functions."""

import enum
import functools
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.modules.module
from torch import nn
from torch.compiler import is_compiling

# Training calls of a converted module for which the original ran: an entry of the module's __dict__.
MISSED = "_droppath_ext_missed"

_has_any_global_hook = torch.nn.modules.module._has_any_global_hook


def missed(module: nn.Module) -> None:
    """Count a training call whose arguments were not those of the plan."""
    if not is_compiling():
        module.__dict__[MISSED] = module.__dict__.get(MISSED, 0) + 1


def watched(*modules: nn.Module) -> bool:
    """Whether a hook waits for a call of one of the modules, which the generated code does not make."""
    for module in modules:
        if (
            module._forward_pre_hooks
            or module._forward_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__  # set by hand, as accelerate does
        ):
            return True
    return bool(_has_any_global_hook())


class Unplanned(Exception):
    """What a call has computed is not what its plan assumes: the original is to run."""


def expect(value: Any, planned: Any) -> None:
    """Give up unless a call has returned what it did when it was planned."""
    if not same(value, planned):
        raise Unplanned


def same(value: Any, planned: Any) -> bool:
    """Whether an argument is what it was in the plan: None, a number, a string, or a tuple or list of such."""
    if isinstance(planned, tuple | list):
        return (
            isinstance(value, tuple | list)
            and len(value) == len(planned)
            and all(same(a, b) for a, b in zip(value, planned, strict=True))
        )
    return type(value) is type(planned) and bool(value == planned)


def identity(value: Any) -> tuple[Any, ...] | None:
    """What tells a function, class or constant from others, in a form that source text can hold; None for others."""
    if isinstance(value, MethodType):
        return identity(value.__func__)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        bound = tuple(part if is_plain(part) else identity(part) for part in (*cells, *(value.__defaults__ or ())))
        return value.__module__, value.__qualname__, value.__code__.co_firstlineno, bound
    if isinstance(value, functools.partial):
        is_known = is_plain(value.args) and is_plain(value.keywords)
        return (identity(value.func), value.args, value.keywords) if is_known else None
    if isinstance(value, enum.Enum | torch.dtype | torch.device | torch.layout | torch.memory_format):
        return type(value).__name__, str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__module__, value.__qualname__
    return None


def is_plain(value: Any) -> bool:
    """Whether the value can be written into source text, and compared there."""
    if type(value) in (tuple, list, set, frozenset, torch.Size):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(is_plain(key) and is_plain(part) for key, part in value.items())
    return value is None or type(value) in (bool, int, float, str)
