"""The public functions: arguments are checked and the path is chosen here."""

import functools
import warnings
from collections.abc import Callable, Sequence

from torch import Generator, Tensor
from torch.compiler import is_compiling

from . import reference
from ._native import _C, REBUILD
from .checks import (
    DTYPES,
    check_batched,
    check_branch,
    check_gamma,
    check_gatherable,
    check_generator,
    check_mode,
    check_output,
    check_sampling,
    checked_drop_prob,
)
from .sampling import Samples, draw_samples
from .tracing import (
    is_jit_tracing,
    is_recorded,
    record,
    scripted_drop_path,
    scripted_drop_path_add,
    scripted_stochastic_depth,
    scripts_as,
)


@functools.cache
def _warn_once_without_kernels() -> None:
    warnings.warn(
        "droppath_ext was built without CUDA, so CUDA tensors take the slower composite path. "
        f"With an nvcc at hand, this builds the kernels: DROPPATH_EXT_CUDA=1 {REBUILD}",
        stacklevel=4,
    )


def _warn_without_kernels(x: Tensor) -> None:
    if not _C.has_cuda and x.is_cuda:
        _warn_once_without_kernels()


@scripts_as(lambda: scripted_drop_path)
def drop_path(
    x: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    mode: str = "row",
    generator: Generator | None = None,
) -> Tensor:
    """Stochastic depth: zero each sample of x with probability ``drop_prob``, and scale the others by 1 / keep_prob.

    A drop-in for ``timm.layers.drop_path`` in one pass over memory: dropped samples are not even read. Kept samples are
    multiplied in float32 (float64 for float64) and rounded once; dropped ones are exactly +0, also where x is NaN or
    Inf, and so are their gradients.

    Args:
        x: Tensor [B, ...] of float16, bfloat16, float32 or float64, of any layout; dim 0 counts the samples.
        drop_prob: Probability p in [0, 1] that a sample is dropped.
        training: If False, x itself is returned, as for ``drop_prob=0``.
        scale_by_keep: Scale kept samples by 1 / (1 - p), so that the expectation is x.
        mode: "row" draws for each sample, "batch" once for the whole batch (torchvision's names).
        generator: Random number generator of x's device. Default: torch's own, so ``torch.manual_seed`` reproduces.

    Returns:
        Tensor of the shape, dtype, device and (for dense x) strides of x; x itself where nothing can be dropped.

    Raises:
        ValueError: ``drop_prob`` is outside [0, 1], ``mode`` is unknown, or x is 0-dimensional.
        TypeError: x is not of a floating-point dtype listed above, or ``drop_prob`` is not a number.

    Source: Huang et al., "Deep Networks with Stochastic Depth", https://arxiv.org/abs/1603.09382, drawn per sample.
    """
    drop_prob = checked_drop_prob(drop_prob)
    if mode != "row":  # the default costs no call
        check_mode(mode)
    if drop_prob == 0.0 or not training:
        return x
    if not is_compiling():  # where Inductor fuses the composite with its neighbours, as no opaque kernel can be
        out = _C.drop_path(x, drop_prob, scale_by_keep, mode == "row", generator)
        if out is not None:
            return out
        if is_recorded(x):
            return record(drop_path, (x,), x, drop_prob, training, scale_by_keep, mode=mode, generator=generator)
        _warn_without_kernels(x)
    return reference.drop_path(x, drop_prob, scale_by_keep, mode, generator)


@scripts_as(lambda: scripted_drop_path_add)
def drop_path_add(
    x: Tensor,
    residual: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    gamma: Tensor | None = None,
    mode: str = "row",
    generator: Generator | None = None,
) -> Tensor:
    """The end of a residual block, ``residual + drop_path(gamma * x)``, in one pass over memory.

    LayerScale, mask, scale and addition in one kernel: a dropped sample of the result is the residual, bit for bit, and
    x is not read there. The backward is one pass, too; the gradient of ``residual`` is the incoming
    gradient itself. Everything is computed in float32 (float64 if the result is float64) and rounded once. Where
    nothing can be dropped (``drop_prob=0`` or not ``training``) the result is ``residual + gamma * x``.

    One kernel serves x, residual and gamma of one dtype, a float16 or bfloat16 x with a float32 residual, and a float16
    or bfloat16 x and residual with a float32 gamma; other mixtures are computed in a few ATen operations.

    Args:
        x: The branch's output: Tensor [B, ...] of float16, bfloat16, float32 or float64; dim 0 counts the samples.
        residual: What the branch is added to: Tensor of the shape and device of x, of any such dtype and any layout.
        drop_prob: Probability p in [0, 1] that a sample of the branch is dropped.
        training: If False, nothing is dropped.
        scale_by_keep: Scale kept samples of the branch by 1 / (1 - p), so that their expectation is gamma * x.
        gamma: LayerScale's weight, along one dim of a sample: [D] for the last dim, [C, 1, 1] for the channels of
            [B, C, H, W]. Default: 1.
        mode: "row" draws for each sample, "batch" once for the whole batch.
        generator: Random number generator of x's device. Default: torch's own.

    Returns:
        Tensor of the shape and (for dense x) strides of x, of the dtype that ``residual + gamma * x`` has. Never an
        alias of an argument.

    Raises:
        ValueError: ``drop_prob`` is outside [0, 1], ``mode`` is unknown, x is 0-dimensional, ``residual`` has another
            shape than x, ``gamma`` does not broadcast along one dim of a sample, or the devices differ.
        TypeError: A tensor is not of a floating-point dtype listed above, or ``drop_prob`` is not a number.

    Source: Huang et al., "Deep Networks with Stochastic Depth", https://arxiv.org/abs/1603.09382; gamma: Touvron et
    al., "Going deeper with Image Transformers" (LayerScale), https://arxiv.org/abs/2103.17239.
    """
    drop_prob = checked_drop_prob(drop_prob)
    if mode != "row":  # the default costs no call
        check_mode(mode)
    p = drop_prob if training else 0.0
    # A jit trace of the evaluation is of ATen ops, which run where this package is missing.
    if not is_compiling() and (p > 0.0 or not is_jit_tracing()):
        out = _C.drop_path_add(x, residual, gamma, p, scale_by_keep, mode == "row", generator)
        if out is not None:
            return out
        tensors = (x, residual, gamma)
        if is_recorded(*tensors):
            options = {"gamma": gamma, "mode": mode, "generator": generator}
            return record(drop_path_add, tensors, x, residual, drop_prob, training, scale_by_keep, **options)
        _warn_without_kernels(x)
    return reference.drop_path_add(x, residual, p, scale_by_keep, gamma, mode, generator)


@scripts_as(scripted_stochastic_depth)
def stochastic_depth(
    x: Tensor,
    branch: Callable[..., Tensor],
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    gamma: Tensor | None = None,
    batched: Sequence[Tensor] = (),
    sampling: str = "bernoulli",
    generator: Generator | None = None,
) -> Tensor:
    """A residual block that does not compute what it drops: ``x + drop_path(gamma * branch(x, *batched))``.

    The branch runs on the kept samples alone, gathered in one pass; one pass puts them back: LayerScale, scale and
    addition in one kernel, in float32 (float64 if the result is float64), rounded once. A dropped sample of the result
    is that of x, bit for bit. Both backward passes are as short.

    The result has the distribution of ``drop_path`` for a branch that treats every sample by itself, as attention,
    LayerNorm and MLPs do. It has not where samples meet in the branch: BatchNorm takes its statistics of the kept
    samples alone, attention across samples sees only them, and so does the routing of a mixture of experts with a
    capacity.

    Where nothing is dropped (``drop_prob=0``, not ``training``, or by luck) the branch gets x itself, and the result is
    ``x + gamma * branch(x, *batched)``, scaled.

    Args:
        x: Tensor [B, ...] of float16, bfloat16, float32 or float64, of any layout; dim 0 counts the samples. Neither a
            DTensor nor a nested tensor.
        branch: Called once, as ``branch(taken, *batched_taken)`` with the K kept samples, [K, ...]. Returns a tensor of
            that shape, of any such dtype and layout. It must not write to its input, nor to x.
        drop_prob: Probability p in [0, 1] that a sample is dropped.
        training: If False, nothing is dropped.
        scale_by_keep: Scale the branch by 1 / keep probability, so that its expectation is gamma * branch(x).
        gamma: LayerScale's weight, along one dim of a sample: [D] for the last dim, [C, 1, 1] for the channels of
            [B, C, H, W]. Default: 1.
        batched: Further tensors [B, ...] of any dtype whose kept samples the branch is called with, say masks.
        sampling: How the kept samples are drawn.
            "bernoulli": for each sample by itself, as ``drop_path`` does, on the host: K is known without waiting for
            the device, and varies. If all samples are dropped the branch still runs, on the first one, and counts for
            nothing: every parameter gets a gradient, zero if the branch is finite there, as distributed training needs.
            x then has no gradient through the branch, not even through what the branch computes beside its output.
            "fixed": K = max(1, round(B * (1 - p))) distinct samples, drawn on the device of x, scaled by B / K. Nothing
            depends on the host, so CUDA graphs capture it, and shapes are static. The effective drop rate is 1 - K / B,
            never 1 for p < 1; samples are not independent. With p = 1 all are dropped.
        generator: Random number generator, for "bernoulli" of the CPU, for "fixed" of x's device. Default: torch's own.

    Returns:
        Tensor of the shape and (for dense x) strides of x, of the dtype that ``x + gamma * branch(x)`` has.

    Raises:
        ValueError: ``drop_prob`` is outside [0, 1], ``sampling`` is unknown, x is 0-dimensional, ``gamma`` does not
            broadcast along one dim of a sample, a tensor of ``batched`` has not B samples, the branch returns another
            shape, the generator is of another device than the one that draws, or devices differ.
        TypeError: A tensor is not of a floating-point dtype listed above, or an argument is of another type.
        RuntimeError: The branch wrote to its input or to x; or "bernoulli" while a CUDA graph is captured: use "fixed".

    Under ``torch.compile``, "fixed" is compiled whole, anew for each B; "bernoulli" breaks the graph once, where it
    draws, and what follows is compiled for any K. ``torch.func.vmap`` with ``randomness="different"`` needs "fixed".

    Source: Huang et al., "Deep Networks with Stochastic Depth", https://arxiv.org/abs/1603.09382; subsets of the batch:
    Oquab et al., "DINOv2", https://arxiv.org/abs/2304.07193.
    """
    drop_prob = checked_drop_prob(drop_prob)
    check_sampling(sampling)
    check_branch(branch)
    compiling = is_compiling()
    if not compiling and is_recorded(x, gamma):
        options = {"gamma": gamma, "batched": batched, "sampling": sampling, "generator": generator}
        return record(stochastic_depth, (x, gamma), x, branch, drop_prob, training, scale_by_keep, **options)
    check_gatherable(x)
    check_generator(generator, sampling, x)
    if gamma is not None:
        check_gamma(gamma, x)
    check_batched(batched, x)
    if not compiling:
        _warn_without_kernels(x)
    samples, scale = None, 1.0
    dropping = training and drop_prob > 0.0
    if dropping and not compiling and is_jit_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record stochastic_depth in training, for it would keep the same samples for good: "
            "trace the evaluation, or use torch.compile or torch.export"
        )
    if dropping and x.shape[0] > 0:
        samples, scale = draw_samples(x, drop_prob, scale_by_keep, sampling, generator)
    if samples is None:
        taken, residual = x, x
    else:
        taken, residual = _gather(x, samples)
        batched = [_gather(tensor, samples)[0] for tensor in batched]
    versions = _versions(x, taken)
    y = branch(taken, *batched)
    if _versions(x, taken) != versions:
        raise RuntimeError("branch must not change its input or x in place: where nothing is dropped, its input is x")
    check_output(y, taken)
    return _scatter_add(y, residual, gamma, samples, scale)


def _versions(*tensors: Tensor) -> list[int]:
    """What in-place changes count up; nothing where nobody counts."""
    return [] if is_compiling() else [tensor._version for tensor in tensors if not tensor.is_inference()]


def _gather(x: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """The taken samples of x, and x: to be used in place of x where the gradients of both shall meet in one pass."""
    if x.dtype not in DTYPES:
        return x.index_select(0, samples.taken_from), x
    pair = None if is_compiling() else _C.gather(x, samples.taken_from, samples.slots)
    return (reference.gather(x, samples.taken_from, samples.slots), x) if pair is None else pair


def _scatter_add(y: Tensor, residual: Tensor, gamma: Tensor | None, samples: Samples | None, scale: float) -> Tensor:
    slots, kept = (None, None) if samples is None else (samples.slots, samples.kept)
    fused = not is_compiling() and not is_jit_tracing()  # as in drop_path_add; training is not traced
    out = _C.scatter_add(y, residual, gamma, slots, kept, scale) if fused else None
    return reference.scatter_add(y, residual, gamma, slots, kept, scale) if out is None else out
