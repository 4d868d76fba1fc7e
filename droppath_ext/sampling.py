"""Which samples ``stochastic_depth`` computes: drawn on the host ("bernoulli") or on the device ("fixed")."""

import contextlib
import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm

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
    any_kept: bool = True  # as far as the host knows


def module_of(branch: Callable[..., Tensor]) -> nn.Module | None:
    """The module that computes the branch: itself, or what it is a method of."""
    owner = getattr(branch, "__self__", branch)
    return owner if isinstance(owner, nn.Module) else None


@contextlib.contextmanager
def buffers_kept(module: nn.Module | None) -> Iterator[None]:
    """Gives the module copies of its buffers meanwhile: running statistics know nothing of what happens."""
    buffers = [] if module is None else [(m, name) for m in module.modules() for name in m._buffers]
    originals = [m._buffers[name] for m, name in buffers]
    copies = {id(buffer): buffer.clone() for buffer in originals if buffer is not None}
    try:
        for (m, name), buffer in zip(buffers, originals, strict=True):
            m._buffers[name] = copies.get(id(buffer))
        yield
    finally:
        for (m, name), buffer in zip(buffers, originals, strict=True):
            m._buffers[name] = buffer


def _takes_batch_statistics(branch: Callable[..., Tensor]) -> bool:
    """Whether there is a BatchNorm, which refuses to take the statistics of a single sample."""
    module = module_of(branch)
    return module is not None and any(isinstance(m, _BatchNorm) and m.training for m in module.modules())


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
        samples, scale = _find_samples_between_graphs(x, branch, drop_prob, scale_by_keep, mode, keep, generator)
        return samples, scale
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
    size = x.shape[0]
    if keep is None and mode == "row":
        slots, kept, count = _draw_bernoulli(size, drop_prob, x.device, generator)
    else:
        if keep is None:
            keep = torch.tensor([_draw_bernoulli(1, drop_prob, torch.device("cpu"), generator)[2] == 1])
        slots, kept, count = _C.index_kept(keep.cpu().expand(size).contiguous(), x.device)
    return _samples(slots, kept, branch, count > 0), count


def _draw_bernoulli(
    size: int, drop_prob: float, device: torch.device, generator: Generator | None
) -> tuple[Tensor, Tensor, int]:
    try:
        return _C.draw_bernoulli(size, drop_prob, device, generator)
    except RuntimeError as error:
        if "_local_scalar_dense" in str(error):
            raise RuntimeError(
                'sampling="bernoulli" needs the number of kept samples on the host, where fake tensors and traces have '
                'no numbers: use sampling="fixed"'
            ) from error
        if "randomness on an unbatched tensor" in str(error):
            raise RuntimeError(
                'sampling="bernoulli" draws once for all of torch.func.vmap, which randomness="different" does not '
                'allow: use sampling="fixed"'
            ) from error
        raise


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
    for index in (samples.taken_from, samples.kept, samples.slots):  # the batch may be dynamic, too
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
        return Samples(kept, kept, slots)
    taken_from, size = kept.clamp(min=0), slots.shape[0]
    if size > 1 and _takes_batch_statistics(branch):
        other = (taken_from + 1) % size
        taken_from, kept = torch.cat([taken_from, other]), torch.cat([kept, torch.full_like(other, -1)])
    return Samples(taken_from, kept, slots, any_kept)
