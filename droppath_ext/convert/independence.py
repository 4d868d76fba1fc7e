"""Does a branch treat every sample by itself? Only then may dropped samples be left out of it."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .preserve import preserved
from .trace import CannotPlan

SAMPLES = 4  # of the example, that are looked at


@dataclass
class Independence:
    batched: tuple[int, ...]  # which of the values from outside hold samples
    seconds: float | None  # that the branch takes, forward and backward; None if it cannot be run


def independence(root: nn.Module, branch: Callable[..., Any], residual: Tensor, outside: list[Any]) -> Independence:
    """Run a branch on samples of the example, and find which of the values from outside are taken with them.

    Raises:
        CannotPlan: why dropped samples cannot be left out.
    """
    size = residual.shape[0]
    candidates = [
        i for i, value in enumerate(outside) if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
    ]
    if residual.is_meta:
        return Independence(tuple(candidates), None)
    if size < 3:
        raise CannotPlan(f"it takes an example of 3 samples to see whether the branch mixes them, but got {size}")
    with preserved(root), torch.no_grad():
        before = [(name, buffer.clone()) for name, buffer in root.named_buffers()]
        batched = _find_batched(root, branch, residual, outside, candidates)
        for (name, value), buffer in zip(before, root.buffers(), strict=True):
            if not torch.equal(value, buffer):
                raise CannotPlan(f"the branch changes the buffer {name}")
    with preserved(root):
        seconds = _time(root, branch, residual, outside)
    return Independence(batched, seconds)


def _find_batched(
    root: nn.Module, branch: Callable[..., Any], residual: Tensor, outside: list[Any], candidates: list[int]
) -> tuple[int, ...]:
    seed = 0
    everything = torch.arange(min(residual.shape[0], SAMPLES))
    last = len(everything) - 1

    def run(batched: tuple[int, ...], samples: Tensor, x: Tensor = residual) -> Tensor:
        index = samples.to(x.device)
        values = [value[index] if i in batched else value for i, value in enumerate(outside)]
        taken = x[index]
        version = taken._version
        torch.manual_seed(seed)
        y = branch(taken, *values)
        if not isinstance(y, Tensor) or y.shape != taken.shape:
            raise CannotPlan("the branch has not the shape of what it is added to")
        if taken._version != version:
            raise CannotPlan("the branch writes to its input")
        return y

    why = "no value of it has samples"
    for count in range(len(candidates), -1, -1):
        for batched in itertools.combinations(candidates, count):
            try:
                whole = run(batched, everything)
                with _WithoutDropout():
                    expected = run(batched, everything)
                    subsets = [torch.tensor(subset) for subset in ([0, last], [1], list(range(1, last + 1)))]
                    agree = all(
                        _close(run(batched, subset), expected[subset.to(expected.device)]) for subset in subsets
                    )
            except CannotPlan:
                raise
            except Exception as error:
                why = f"it cannot run on some of the samples ({type(error).__name__})"
                continue
            if not agree:
                why = "samples have other results when others are left out"
                continue
            for sample in sorted({0, 1, last}):
                changed = residual.clone()
                changed[sample] = changed[sample] * 50 + 20
                others = [i for i in range(last + 1) if i != sample]
                if not torch.equal(run(batched, everything, changed)[others], whole[others]):
                    raise CannotPlan("samples depend on each other in the branch")
            return batched
    raise CannotPlan(f"the branch does not treat samples by themselves: {why}")


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-5 if a.dtype in (torch.float32, torch.float64) else 2e-2
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def _time(root: nn.Module, branch: Callable[..., Any], residual: Tensor, outside: list[Any]) -> float:
    """Seconds of a forward and backward on the whole example: the second of two."""
    parameters = [p for p in root.parameters() if p.requires_grad]
    seconds = 0.0
    with torch.enable_grad():
        for _ in range(2):
            x = residual.detach().clone().requires_grad_()
            _synchronize(x)
            begin = time.perf_counter()
            y = branch(x, *outside)
            if not y.requires_grad:
                raise CannotPlan("the branch has no gradient")
            torch.autograd.grad(y.sum(), [x, *parameters], allow_unused=True)
            _synchronize(x)
            seconds = time.perf_counter() - begin
    return seconds


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


class _WithoutDropout(TorchFunctionMode):
    """Dropout does nothing, for the thread that enters."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            elif "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        elif "dropout" in name:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)
