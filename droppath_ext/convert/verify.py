"""Does a planned block compute what it did? Compared on the example, forward and backward, with nothing dropped.

A graph does not show all that a forward does: autocast and no_grad around a part of it, writes into tensors that
something else holds, functions with gradients of their own, Python's random numbers.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..checks import is_dtensor
from .drops import DropPathKind, drop_path_kind
from .preserve import preserved
from .runtime import MISSED
from .trace import Call, CannotPlan


def verify(root: nn.Module, call: Call, planned: Callable[..., Any]) -> None:
    """Compare ``planned``, a forward, with that of ``root``.

    Raises:
        CannotPlan: they differ.
    """
    tensors = [leaf for leaf in tree_flatten((call.args, call.kwargs))[0] if isinstance(leaf, Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        return
    if any(map(is_dtensor, tensors)):
        raise CannotPlan("it was called with DTensors: plan it with an example of plain tensors")
    root.__dict__.pop(MISSED, None)
    try:
        # At a rate above 0 a drop path returns no alias of its input, which the forward may write to.
        with _members_set_to(root, lambda kind: {"forward": _copied}):
            expected = _run(root, call, type(root).forward)
        with _members_set_to(root, lambda kind: {kind.rate: 0.0}):
            actual = _run(root, call, planned)
    except Exception as error:
        raise CannotPlan(f"it cannot be run by itself ({type(error).__name__})") from error
    if root.__dict__.pop(MISSED, 0):
        raise CannotPlan("its example does not meet the conditions of its plan")
    for what, values, others in zip(("result", "input", "buffer", "gradient"), expected, actual, strict=True):
        # Of all of them: the gradient of a bias before BatchNorm is rounding errors.
        largest = max(map(_largest, values), default=0.0)
        if len(values) != len(others) or not all(_agree(a, b, largest) for a, b in zip(values, others, strict=True)):
            raise CannotPlan(f"its forward does more than its graph shows: the {what} is another")


@contextlib.contextmanager
def _members_set_to(root: nn.Module, members: Callable[[DropPathKind], dict[str, Any]]) -> Iterator[None]:
    """With other members of all drop paths of a block."""
    drops = [(module.__dict__, kind) for module in root.modules() if (kind := drop_path_kind(module)) is not None]
    before = [[(own, name, own.get(name, _NOTHING)) for name in members(kind)] for own, kind in drops]
    try:
        for own, kind in drops:
            own.update(members(kind))
        yield
    finally:
        for own, name, value in itertools.chain(*before):
            if value is _NOTHING:
                del own[name]
            else:
                own[name] = value


_NOTHING = object()


def _copied(*args: Tensor, **kwargs: Tensor) -> Tensor:
    """A drop path that drops nothing."""
    return torch.clone(*args, *kwargs.values())


def _run(root: nn.Module, call: Call, forward: Callable[..., Any]) -> tuple[list[Any], ...]:
    """What it returns; its inputs and the buffers afterwards; and the gradients."""
    leaves: list[Tensor] = []

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        if copy.is_floating_point():
            leaves.append(copy.requires_grad_())
            return copy.clone()  # no leaf, which nobody may write to
        return copy

    with preserved(root), torch.enable_grad():
        torch.manual_seed(0)
        args, kwargs = tree_map(fresh, (call.args, call.kwargs))
        out = tree_flatten(forward(root, *args, **kwargs))[0]
        inputs = tree_flatten((args, kwargs))[0]
        buffers = [buffer.clone() for buffer in root.buffers()]
        total = [
            (value.float() * torch.linspace(0.5, 1.5, value.numel(), device=value.device).view(value.shape)).sum()
            for value in out
            if isinstance(value, Tensor) and value.requires_grad
        ]
        wanted = [*leaves, *(parameter for parameter in root.parameters() if parameter.requires_grad)]
        gradients = list(torch.autograd.grad(torch.stack(total).sum(), wanted, allow_unused=True)) if total else []
    return out, inputs, buffers, gradients


def _largest(value: Any) -> float:
    is_float = isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0
    return float(value.detach().abs().max()) if is_float else 0.0


def _agree(a: Any, b: Any, largest: float) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape or a.requires_grad != b.requires_grad:
        return False
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 5e-2)
    noise = 64 * torch.finfo(a.dtype).eps * largest if a.is_floating_point() else 0.0
    atol = max(tolerance * _largest(a), noise)
    return torch.allclose(a.detach(), b.detach(), rtol=tolerance, atol=atol, equal_nan=True)
