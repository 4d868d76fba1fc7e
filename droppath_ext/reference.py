"""The composite path: the whole contract in a few ATen ops.

It serves whatever the native extension does not (``functional`` chooses), and it is the executable
specification that the tests compare the kernels with.
"""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.compiler import is_compiling

from ._native import _C
from .checks import check_add_inputs, check_input, is_dtensor

is_jit_tracing = torch._C._is_tracing  # torch.jit.is_tracing, which takes three times as long


def keep_scale(drop_prob: float, scale_by_keep: bool) -> float:
    """1 / keep_prob, or 1 where nothing is kept or scaled."""
    return 1.0 / (1.0 - drop_prob) if scale_by_keep and drop_prob < 1.0 else 1.0


def rate_of(drop_prob: Tensor) -> Tensor:
    """A rate that only its device knows, float32, or float64 if it is; it gets no gradient."""
    return drop_prob.detach().to(torch.float64 if drop_prob.dtype is torch.float64 else torch.float32)


def clamped(drop_prob: Tensor) -> Tensor:
    """Such a rate in [0, 1]; NaN drops nothing."""
    return rate_of(drop_prob).nan_to_num(nan=0.0).clamp(0.0, 1.0)


def clamped_keep_scale(rate: Tensor, scale_by_keep: bool) -> Tensor:
    """``keep_scale`` of such a rate."""
    return torch.where(rate < 1.0, 1.0 / (1.0 - rate), 1.0) if scale_by_keep else torch.ones_like(rate)


def draw_keep_mask(x: Tensor, drop_prob: float | Tensor, mode: str, generator: Generator | None) -> Tensor:
    """Draw which samples of x are kept, in eager mode the same ones as the kernels; drop_prob, if a tensor, clamped."""
    per_sample = mode == "row"
    if not is_compiling() and _is_mapped():  # where a new tensor may have a draw for each entry, and x, say, has none
        size = x.shape[0] if per_sample else 1
        return torch.rand(size, device=x.device, generator=generator) < 1.0 - drop_prob
    if isinstance(drop_prob, Tensor):
        drawn = _C.draw_keep_at(x, drop_prob, False, per_sample, generator) if draws_natively(x) else None
        return _draws(x, mode).uniform_(generator=generator) < 1.0 - drop_prob if drawn is None else drawn[0]
    if draws_natively(x):
        keep = _C.draw_keep(x, drop_prob, per_sample, generator)
        if keep is not None:
            return keep
    return draw_keep_mask_in_aten(x, drop_prob, mode, generator)


def draw_keep_mask_in_aten(
    x: Tensor, drop_prob: float, mode: str = "row", generator: Generator | None = None
) -> Tensor:
    """Draw which samples of x are kept: bool [B], or [1] if ``mode`` is "batch". Also compiled by torch.jit.script."""
    draws = _draws(x, mode)
    if is_compiling():  # a rate that bernoulli_ is given is a constant of the graph: another rate, another graph
        return draws.uniform_(generator=generator) < 1.0 - drop_prob
    return draws.bernoulli_(1.0 - drop_prob, generator=generator) != 0


def draws_natively(x: Tensor) -> bool:
    """Whether what is drawn for x may be what the kernels would draw, so that one seed gives one mask.

    In a graph it may not: compilers merge two draws of one op. vmap says itself how often is drawn, a DTensor where.
    """
    return not (is_compiling() or is_jit_tracing() or is_dtensor(x) or _is_mapped())


def _is_mapped() -> bool:
    """Whether this runs in torch.func.vmap."""
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(transform.key() == torch._C._functorch.TransformType.Vmap for transform in transforms)


def _draws(x: Tensor, mode: str) -> Tensor:
    size = x.shape[0] if mode == "row" else 1
    # new_empty keeps what x is, say a DTensor; nested tensors have none. float32: float16 is too coarse for some p.
    like = x.values() if x.is_nested else x
    return like.new_empty((size,), dtype=torch.float32)


def mask_dropped(x: Tensor, keep: Tensor, value: float) -> Tensor:
    """x where the sample is kept, ``value`` where it is dropped, whatever x holds there."""
    keep = keep.view([-1] + [1] * (x.ndim - 1))
    # Only where() keeps the strides of x, but it knows no nested tensors.
    return x.masked_fill(~keep, value) if x.is_nested else torch.where(keep, x, value)


def apply_keep_mask(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """x * scale where the sample is kept, rounded once; +0 where it is dropped, whatever x holds there."""
    # ATen multiplies by a Python number in float32 for half types and in float64 for float64.
    return mask_dropped(x * scale, keep, 0.0)


def add_dtype(x: Tensor, residual: Tensor, gamma: Tensor | None) -> torch.dtype:
    """The dtype of residual + gamma * x."""
    # torch.result_type, which Dynamo cannot trace: a 0-dim tensor widens nothing.
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return dtype if gamma is None or gamma.ndim == 0 else torch.promote_types(dtype, gamma.dtype)


def add_kept(x: Tensor, residual: Tensor, gamma: Tensor | None, keep: Tensor | None, scale: float) -> Tensor:
    """residual + gamma * x * scale where the sample is kept, rounded once; the residual itself where it is dropped.

    Without a keep mask every sample is kept.
    """
    dtype = add_dtype(x, residual, gamma)
    opmath = torch.float64 if dtype is torch.float64 else torch.float32
    branch = x.to(opmath)
    if gamma is not None:
        if keep is not None:
            # Also before gamma: its gradient must not meet the NaN of a dropped sample, not even times zero.
            branch = mask_dropped(branch, keep, 0.0)
        branch = branch * gamma.to(opmath)
    branch = branch * scale
    if keep is not None:
        branch = mask_dropped(branch, keep, -0.0)  # adding -0, unlike +0, changes no number
    return (branch + residual.to(opmath)).to(dtype)


def gather(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Sample ``index[i]`` of x for each i, zeros where the index is -1.

    Every sample is taken once at most: ``inverse`` says by which i, -1 for by none.
    """
    return _Gather.apply(x, index, inverse) if is_compiling() else _gather(x, index)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return mask_dropped(_index_select(x, index.clamp(min=0)), index >= 0, 0.0)


def _index_select(x: Tensor, index: Tensor) -> Tensor:
    """Samples of x, whose channels stay last: index_select by itself forgets that."""
    if is_compiling() or x.ndim < 3 or x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return x.index_select(0, index)
    return x.movedim(1, -1).index_select(0, index).movedim(-1, 1)


class _Gather(torch.autograd.Function):
    """Its backward gathers, too: unlike that of index_select, which adds into zeros, Inductor can fuse it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _gather(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, *ctx.saved_tensors), None, None


def scatter_add(
    y: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    slots: Tensor | None,
    kept: Tensor | None,
    scale: float,
) -> Tensor:
    """residual + gamma * y[slots] * scale, rounded once; the residual itself where the slot is -1.

    ``kept`` is the inverse of ``slots``; without both, y has all samples.
    """
    if slots is None or kept is None:
        return add_kept(y, residual, gamma, None, scale)
    return add_kept(gather(y, slots, kept), residual, gamma, slots >= 0, scale)


def draw_fixed(x: Tensor, count: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw ``count`` distinct samples of x: the slots int64 [B], and the samples, int64 [count], ascending."""
    drawn = _C.draw_fixed_for(x, count, generator) if draws_natively(x) else None
    return draw_fixed_in_aten(x, count, generator) if drawn is None else drawn


def draw_fixed_in_aten(x: Tensor, count: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """``draw_fixed`` where no kernel may draw."""
    size = x.shape[0]
    kept = torch.randperm(size, generator=generator, device=x.device)[:count].sort().values
    slots = torch.full((size,), -1, device=x.device)
    return slots.scatter(0, kept, torch.arange(count, device=x.device)), kept


def drop_path(
    x: Tensor,
    drop_prob: float | Tensor,
    scale_by_keep: bool,
    mode: str,
    generator: Generator | None,
    keep: Tensor | None = None,
) -> Tensor:
    """``functional.drop_path`` in training, of dim 0; the other arguments are valid."""
    check_input(x)
    if not isinstance(drop_prob, Tensor):
        keep = draw_keep_mask(x, drop_prob, mode, generator) if keep is None else keep
        return apply_keep_mask(x, keep, keep_scale(drop_prob, scale_by_keep))
    rate = clamped(drop_prob)
    keep = draw_keep_mask(x, rate, mode, generator) if keep is None else keep
    return mask_dropped(_scaled(x, rate, scale_by_keep, x.dtype), keep, 0.0).to(x.dtype)


def _scaled(x: Tensor, rate: Tensor, scale_by_keep: bool, dtype: torch.dtype) -> Tensor:
    """x times the scale, computed as what becomes of this dtype, and not rounded to it."""
    opmath = torch.float64 if dtype is torch.float64 else torch.float32
    return x.to(opmath) * clamped_keep_scale(rate.to(opmath), scale_by_keep)


def drop_path_add(
    x: Tensor,
    residual: Tensor,
    drop_prob: float | Tensor,
    scale_by_keep: bool,
    gamma: Tensor | None,
    mode: str,
    generator: Generator | None,
    keep: Tensor | None = None,
) -> Tensor:
    """``functional.drop_path_add`` of dim 0, without a mask if drop_prob is 0; the other arguments are valid."""
    check_add_inputs(x, residual, gamma)
    if not isinstance(drop_prob, Tensor):
        if keep is None and drop_prob > 0.0:
            keep = draw_keep_mask(x, drop_prob, mode, generator)
        return add_kept(x, residual, gamma, keep, keep_scale(drop_prob, scale_by_keep))
    rate = clamped(drop_prob)
    keep = draw_keep_mask(x, rate, mode, generator) if keep is None else keep
    dtype = add_dtype(x, residual, gamma)
    return add_kept(_scaled(x, rate, scale_by_keep, dtype), residual, gamma, keep, 1.0).to(dtype)
