"""Which samples ``stochastic_depth`` computes: drawn on the host ("bernoulli") or on the device ("fixed")."""

import math
import operator
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.compiler import is_compiling

from . import reference
from ._native import _C


class Samples(NamedTuple):
    """The K of B samples that a branch is computed for, and the way back.

    K is 1 at least, so that every parameter gets a gradient: if all samples are dropped, the branch is computed for
    sample 0, which is then added to none.
    """

    taken_from: Tensor  # int64 [K]: the sample that each of the taken is
    kept: Tensor  # int64 [K]: the sample that each of the taken is added to; taken_from, or [-1] if all are dropped
    slots: Tensor  # int64 [B]: the place among the taken of what is added to each sample; -1 if it is dropped


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
    x: Tensor, drop_prob: float, scale_by_keep: bool, sampling: str, generator: Generator | None
) -> tuple[Samples | None, float]:
    """Draw which samples of x are kept, None for all of them; and the scale of the branch. x has samples."""
    if sampling == "fixed":
        return _draw_fixed(x, drop_prob, scale_by_keep, generator)
    if is_compiling():
        samples, scale = _draw_bernoulli_between_graphs(x, drop_prob, scale_by_keep, generator)
        return samples, scale
    samples, count = _draw_bernoulli(x, drop_prob, generator)
    return samples if count < x.shape[0] else None, reference.keep_scale(drop_prob, scale_by_keep)


def _draw_bernoulli(x: Tensor, drop_prob: float, generator: Generator | None) -> tuple[Samples, int]:
    """The samples, and how many are kept."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            'sampling="bernoulli" draws the number of kept samples on the host, which a CUDA graph cannot replay: '
            'capture with sampling="fixed"'
        )
    slots, kept, count = _C.draw_bernoulli(x.shape[0], drop_prob, x.device, generator)
    return _samples(slots, kept), count


@torch.compiler.disable(reason="the number of kept samples is drawn on the host, and decides the shapes behind it")  # type: ignore[untyped-decorator]
def _draw_bernoulli_between_graphs(
    x: Tensor, drop_prob: float, scale_by_keep: bool, generator: Generator | None
) -> tuple[Samples, float]:
    """What follows is compiled once for all numbers of kept samples but 1, a whole batch included."""
    samples, _ = _draw_bernoulli(x, drop_prob, generator)
    if samples.taken_from is samples.kept:  # else a graph would be for batches of which a sample is kept alone
        samples = samples._replace(taken_from=samples.kept.clone())
    torch._dynamo.maybe_mark_dynamic(samples.taken_from, 0)
    torch._dynamo.maybe_mark_dynamic(samples.kept, 0)
    return samples, reference.keep_scale(drop_prob, scale_by_keep)


def _draw_fixed(
    x: Tensor, drop_prob: float, scale_by_keep: bool, generator: Generator | None
) -> tuple[Samples | None, float]:
    size = x.shape[0]
    count = fixed_count(size, drop_prob)
    scale = size / count if scale_by_keep and count else 1.0
    if count == size:
        return None, scale
    if count == 0:
        slots = torch.full((size,), -1, device=x.device)
        kept = slots[:1]
    elif not is_compiling() and _C.uses_fused_path(x):
        slots, kept = _C.draw_fixed(x, count, generator)
    else:
        slots, kept = reference.draw_fixed(x, count, generator)
    return _samples(slots, kept), scale


def _samples(slots: Tensor, kept: Tensor) -> Samples:
    # kept == [-1], all dropped, is possible only where K == 1; testing K needs no synchronisation.
    taken_from = kept if kept.shape[0] > 1 else kept.clamp(min=0)
    return Samples(taken_from, kept, slots)
