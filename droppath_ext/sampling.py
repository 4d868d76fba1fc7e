"""Which samples ``stochastic_depth`` computes: drawn on the host ("bernoulli") or on the device ("fixed")."""

import contextlib
import functools
import math
import operator
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from . import reference
from ._native import _C


class Samples(NamedTuple):
    """The K of B samples that a branch is computed for, and the way back.

    K is 1 at least, so that every parameter gets a gradient: if all samples are dropped, the branch is computed for
    sample 0, a stand-in that is added to none. Where it takes batch statistics, K is 2 at least, with another one.
    """

    taken_from: Tensor  # int64 [K]: the sample that each of the taken is
    kept: Tensor  # int64 [K]: the sample that each of the taken is added to; -1 for stand-ins
    slots: Tensor  # int64 [B]: the place among the taken of what is added to each sample; -1 if it is dropped
    places: Tensor  # int64 [B]: the place among the taken of each sample, added to it or not; -1 if it is not there
    any_kept: bool = True  # as far as the host knows


def module_of(branch: Callable[..., Tensor]) -> nn.Module | None:
    """The module that computes the branch: itself, or what it is a method, a partial call or a wrapper of."""
    while not isinstance(owner := getattr(branch, "__self__", branch), nn.Module):
        if isinstance(branch, functools.partial):
            branch = branch.func
        elif hasattr(branch, "__wrapped__"):
            branch = branch.__wrapped__
        else:
            return None
    return owner


_lock = threading.Lock()
_put_aside: dict[nn.Module, tuple[int, dict[str, Tensor | None]]] = {}  # how often, and the buffers


@contextlib.contextmanager
def buffers_kept(module: nn.Module | None) -> Iterator[None]:
    """Gives the module copies of its buffers meanwhile: running statistics know nothing of what happens.

    Other threads that run it then do so with the copies.
    """
    modules = [] if module is None else [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    with _lock:
        for m in modules:
            count, originals = _put_aside.get(m, (0, dict(m._buffers)))
            _put_aside[m] = count + 1, originals
            if count == 0:
                for name, buffer in originals.items():
                    if buffer is not None and not is_lazy(buffer):
                        m._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        with _lock:
            for m in modules:
                count, originals = _put_aside.pop(m)
                if count > 1:
                    _put_aside[m] = count - 1, originals
                    continue
                for name, buffer in originals.items():
                    if buffer is None or not is_lazy(buffer):
                        m._buffers[name] = buffer


def takes_batch_statistics(branch: Callable[..., Tensor]) -> bool:
    """Whether there is a BatchNorm, which refuses to take the statistics of a single sample."""
    module = module_of(branch)
    if module is None:
        return False
    return any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in module.modules())


def fixed_count(size: int, drop_prob: float) -> int:
    """How many of ``size`` samples "fixed" keeps."""
    if drop_prob >= 1.0:
        return 0
    if not is_compiling():
        return max(1, round(size * (1.0 - drop_prob)))
    # Dynamo cannot round a rate that varies, but it can compare one: the graph is for one number of samples.
    size = operator.index(size)
    highest = _highest_rates(size)
    low, high = 1, size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if drop_prob <= highest[middle] else (low, middle - 1)
    return low


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _highest_rates(size: int) -> list[float]:
    """For each count the highest rate at which "fixed" keeps as many of ``size`` samples."""
    rates = []
    for count in range(size + 1):
        rate = 1.0 - (count - 0.5) / size if size else 0.0
        while round(size * (1.0 - rate)) < count:
            rate = math.nextafter(rate, -math.inf)
        while rate < 1.0 and round(size * (1.0 - math.nextafter(rate, math.inf))) >= count:
            rate = math.nextafter(rate, math.inf)
        rates.append(rate)
    return rates


def draw_samples(
    x: Tensor,
    branch: Callable[..., Tensor],
    drop_prob: float,
    scale_by_keep: bool,
    sampling: str,
    mode: str,
    keep: Tensor | None,
    generator: Generator | None,
) -> tuple[Samples | None, float]:
    """Draw which samples of x are kept, None for all of them; and the scale of the branch. x has samples."""
    if sampling == "fixed" and keep is None:
        return _draw_fixed(x, branch, drop_prob, scale_by_keep, generator)
    if is_compiling():
        found: tuple[Samples, float] = _find_samples_between_graphs(
            x, branch, drop_prob, scale_by_keep, mode, keep, generator
        )
        return found
    samples, count = _find_samples(x, branch, drop_prob, mode, keep, generator)
    return samples if count < x.shape[0] else None, reference.keep_scale(drop_prob, scale_by_keep)


def _find_samples(
    x: Tensor,
    branch: Callable[..., Tensor],
    drop_prob: float,
    mode: str,
    keep: Tensor | None,
    generator: Generator | None,
) -> tuple[Samples, int]:
    """The samples that the mask names, or else those of a draw on the host; and how many are kept."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            'sampling="bernoulli" and keep decide on the host how many samples are computed, which a CUDA graph cannot '
            'replay: capture with sampling="fixed"'
        )
    try:
        if keep is None:
            slots, kept, count = _C.draw_bernoulli(x.shape[0], drop_prob, x.device, generator, mode == "row")
        else:
            slots, kept, count = _C.index_kept(keep, x.shape[0], x.device)
    except RuntimeError as error:
        explained = _explained(error, keep)
        if explained is None:
            raise
        raise explained from error
    return _samples(slots, kept, branch, count > 0), count


def _explained(error: RuntimeError, keep: Tensor | None) -> RuntimeError | None:
    """What torch says where the host cannot know what it needs, in words that help; None of other errors."""
    text = str(error)
    if "randomness on an unbatched tensor" in text:
        return RuntimeError(
            'sampling="bernoulli" draws once for all of torch.func.vmap, which randomness="different" does not allow: '
            'use sampling="fixed"'
        )
    if any(
        part in text
        for part in (
            *("_local_scalar_dense", ".item()", "data pointer", "is not allocated", "meta tensor"),
            "data-dependent expression",
        )
    ):
        what = 'sampling="bernoulli" needs the number of kept samples' if keep is None else "keep must have its values"
        return RuntimeError(
            f"{what} on the host, where fake tensors, traces and transforms have no numbers: use "
            'sampling="fixed"' + ("" if keep is None else " without keep")
        )
    return None


@torch.compiler.disable(reason="the number of kept samples is drawn on the host, and decides the shapes behind it")  # type: ignore[untyped-decorator]
def _find_samples_between_graphs(
    x: Tensor,
    branch: Callable[..., Tensor],
    drop_prob: float,
    scale_by_keep: bool,
    mode: str,
    keep: Tensor | None,
    generator: Generator | None,
) -> tuple[Samples, float]:
    """What follows is compiled once for all numbers of kept samples but 1, a whole batch included."""
    samples, _ = _find_samples(x, branch, drop_prob, mode, keep, generator)
    if samples.taken_from is samples.kept:  # else a graph would be for batches of which a sample is kept alone
        samples = samples._replace(taken_from=samples.kept.clone())
    if samples.places is samples.slots:
        samples = samples._replace(places=samples.slots.clone())
    for index in samples[:4]:  # the batch may be dynamic, too
        torch._dynamo.maybe_mark_dynamic(index, 0)
    return samples._replace(any_kept=True), reference.keep_scale(drop_prob, scale_by_keep)


def _draw_fixed(
    x: Tensor,
    branch: Callable[..., Tensor],
    drop_prob: float,
    scale_by_keep: bool,
    generator: Generator | None,
) -> tuple[Samples | None, float]:
    size = x.shape[0]
    count = fixed_count(size, drop_prob)
    scale = size / count if scale_by_keep and count else 1.0
    if count == size:
        return None, scale
    if count == 0:
        slots = torch.full((size,), -1, device=x.device)
        kept = slots[:1]
    else:
        drawn = None if is_compiling() else _C.draw_fixed(x, count, generator)
        slots, kept = reference.draw_fixed(x, count, generator) if drawn is None else drawn
    return _samples(slots, kept, branch, count > 0), scale


def _samples(slots: Tensor, kept: Tensor, branch: Callable[..., Tensor], any_kept: bool) -> Samples:
    # kept == [-1], all dropped, is possible only where K == 1; testing K needs no synchronisation.
    if kept.shape[0] > 1:
        return Samples(kept, kept, slots, slots)
    taken_from, places, size = kept.clamp(min=0), slots, slots.shape[0]
    if size > 1 and takes_batch_statistics(branch):
        other = (taken_from + 1) % size
        places = slots.scatter(0, other, 1) if any_kept else slots
        taken_from, kept = torch.cat([taken_from, other]), torch.cat([kept, torch.full_like(other, -1)])
    return Samples(taken_from, kept, slots, places, any_kept)
