"""The public functions: arguments are checked and the path is chosen here."""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Sequence

from torch import Generator, Tensor
from torch.compiler import is_compiling

from . import reference
from ._native import _C, BINARY, REBUILD
from .checks import (
    DTYPES,
    check_add_inputs,
    check_batched,
    check_branch,
    check_device,
    check_dim,
    check_drawn_from,
    check_gamma,
    check_generator,
    check_input,
    check_keep,
    check_kind,
    check_mode,
    check_not_recomputed,
    check_output,
    check_sampling,
    check_unchanged,
    checked_drop_prob,
    checked_host_drop_prob,
    is_dtensor,
    versions,
)
from .reference import is_jit_tracing
from .sampling import Samples, buffers_kept, draw_samples, module_of
from .shards import on_shards
from .tracing import (
    is_recorded,
    record,
    scripted_draw_keep,
    scripted_drop_path,
    scripted_drop_path_add,
    scripted_stochastic_depth,
    scripts_as,
)


@functools.cache
def _warn_once(sentence: str) -> None:
    frame, level = sys._getframe(), 1
    while frame.f_back and str(frame.f_globals.get("__package__")).startswith("droppath_ext"):
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, stacklevel=level)


def _warn_without_kernels(x: Tensor) -> None:
    if BINARY is None:
        _warn_once(
            "droppath_ext is used without its native extension, so every call takes the slower composite path. With a "
            f"C++ compiler at hand, this builds it, where DROPPATH_EXT_NATIVE=0 is not set: {REBUILD}"
        )
    elif not _C.has_cuda and isinstance(x, Tensor) and x.is_cuda:
        _warn_once(
            "droppath_ext was built without CUDA, so CUDA tensors take the slower composite path. "
            f"With an nvcc at hand, this builds the kernels: DROPPATH_EXT_CUDA=1 {REBUILD}"
        )


@scripts_as(lambda: scripted_drop_path)
def drop_path(
    x: Tensor,
    drop_prob: float | Tensor = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    mode: str = "row",
    dim: int = 0,
    keep: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Stochastic depth: zero each sample of x with probability ``drop_prob``, and scale the others by 1 / keep_prob.

    A drop-in for ``timm.layers.drop_path`` in one pass over memory: dropped samples are not even read. Kept samples are
    multiplied in float32 (float64 for float64) and rounded once; dropped ones are exactly +0, also where x is NaN or
    Inf, and so are their gradients.

    Args:
        x: Tensor [B, ...] of float16, bfloat16, float32 or float64, of any layout.
        drop_prob: Probability p in [0, 1] that a sample is dropped. A 0-dim tensor on the device of x is read there, so
            that a schedule may change it without a word to the host, in a CUDA graph, too: it is clamped to [0, 1], NaN
            drops nothing, and it gets no gradient.
        training: If False, x itself is returned, as for ``drop_prob=0``.
        scale_by_keep: Scale kept samples by 1 / (1 - p), so that the expectation is x.
        mode: "row" draws for each sample, "batch" once for the whole batch (torchvision's names).
        dim: Which dim counts the samples, say 1 for [N, B, D]. Nothing is copied for that.
        keep: Mask of the samples that are kept, bool [B] or [1] for all, in place of a draw: one mask for several
            branches, towers or ranks (:func:`droppath_ext.draw_keep` draws one). ``drop_prob`` then only scales.
        generator: Random number generator of x's device. Default: torch's own, so ``torch.manual_seed`` reproduces.

    Returns:
        Tensor of the shape, dtype, device and (for dense x) strides of x; x itself where nothing can be dropped, but a
        copy of it if that is known from a tensor alone.

    Raises:
        ValueError: ``drop_prob`` is a number outside [0, 1], ``mode`` is unknown, x is 0-dimensional or without this
            ``dim``, ``keep`` has another shape or comes with a generator, or devices differ.
        TypeError: x is not of a floating-point dtype listed above, ``keep`` is not bool, or ``drop_prob`` is neither a
            number nor a 0-dim tensor.
        RuntimeError: A generator is given inside ``torch.utils.checkpoint``, which would not restore its state.

    Source: Huang et al., "Deep Networks with Stochastic Depth", https://arxiv.org/abs/1603.09382, drawn per sample.
    """
    # What is as usual costs no call.
    if (
        type(drop_prob) is float
        and 0.0 <= drop_prob <= 1.0
        and mode == "row"
        and keep is None
        and generator is None
        and dim == 0
    ):
        if drop_prob == 0.0 or not training:
            return x
        if not is_compiling():  # where Inductor fuses the composite with its neighbours, as no opaque kernel can be
            out = _C.drop_path(x, drop_prob, scale_by_keep, True, None)
            if out is not None:
                return out
    return _drop_path(x, checked_drop_prob(drop_prob), training, scale_by_keep, mode, dim, keep, generator)


def _drop_path(
    x: Tensor,
    drop_prob: float | Tensor,
    training: bool,
    scale_by_keep: bool,
    mode: str,
    dim: int,
    keep: Tensor | None,
    generator: Generator | None,
) -> Tensor:
    """``drop_path`` of whatever it can be called with."""
    check_mode(mode)
    is_nothing = not training or (keep is None and isinstance(drop_prob, float) and drop_prob == 0.0)
    if not is_compiling() and is_recorded(x, keep):
        if is_nothing:
            return x
        options = {"mode": mode, "dim": dim, "keep": keep, "generator": generator}
        return record(drop_path, (x, keep), x, drop_prob, training, scale_by_keep, **options)
    if dim != 0 or keep is not None:
        check_input(x)
        dim = _checked_dim(x, dim, keep, generator)
    if is_nothing:
        return x
    if keep is not None:
        check_device(keep, "keep", x)
        check_kind(keep, "keep", x)
    if dim != 0:
        return _drop_path(x.movedim(dim, 0), drop_prob, True, scale_by_keep, mode, 0, keep, generator).movedim(0, dim)
    if isinstance(drop_prob, Tensor):
        drop_prob = _known_rate(drop_prob, x)
    if not is_compiling():
        check_not_recomputed(generator)
        if not isinstance(drop_prob, float):
            drawn = _draw_at(x, drop_prob, scale_by_keep, mode, keep, generator)
            out = None if drawn is None else _C.scale_kept(x, drawn[0], 1.0, drawn[1])
        elif keep is None:
            out = _C.drop_path(x, drop_prob, scale_by_keep, mode == "row", generator)
        else:
            out = _C.scale_kept(x, keep, reference.keep_scale(drop_prob, scale_by_keep))
        if out is not None:
            return out
        _warn_without_kernels(x)
    return reference.drop_path(x, drop_prob, scale_by_keep, mode, generator, keep)


def _checked_dim(x: Tensor, dim: int, keep: Tensor | None, generator: Generator | None) -> int:
    """The sample dimension, counted from the front. Raise unless x has it, and keep, if given, is a mask of samples."""
    check_dim(dim, x)
    if keep is not None:
        check_keep(keep, x.shape[dim], generator)
    return dim % x.ndim


def _draw_at(
    x: Tensor, drop_prob: Tensor, scale_by_keep: bool, mode: str, keep: Tensor | None, generator: Generator | None
) -> tuple[Tensor, Tensor] | None:
    """The mask, drawn unless it is given, and the scale, at a rate that only the device knows; None without kernels."""
    if not _C.uses_fused_path(x) or not _C.uses_fused_path(drop_prob):
        return None
    if keep is not None:
        return keep, reference.clamped_keep_scale(reference.clamped(drop_prob).double(), scale_by_keep)
    return _C.draw_keep_at(x, reference.rate_of(drop_prob), scale_by_keep, mode == "row", generator)


def _known_rate(drop_prob: Tensor, x: Tensor) -> float | Tensor:
    """The rate as a number if the host knows it, that is on the CPU; clamped as there."""
    if drop_prob.is_cpu and not is_compiling() and _C.uses_fused_path(drop_prob):
        with contextlib.suppress(RuntimeError):  # of make_fx, which lets nobody see values
            p = float(drop_prob.detach())
            return min(max(p, 0.0), 1.0) if p == p else 0.0
    check_device(drop_prob, "drop_prob", x)
    return drop_prob


@scripts_as(lambda: scripted_drop_path_add)
def drop_path_add(
    x: Tensor,
    residual: Tensor,
    drop_prob: float | Tensor = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    gamma: Tensor | None = None,
    mode: str = "row",
    dim: int = 0,
    keep: Tensor | None = None,
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
        x: The branch's output: Tensor [B, ...] of float16, bfloat16, float32 or float64.
        residual: What the branch is added to: Tensor of the shape and device of x, of any such dtype and any layout.
        drop_prob: Probability p in [0, 1] that a sample of the branch is dropped; or a 0-dim tensor, as for
            :func:`droppath_ext.drop_path`.
        training: If False, nothing is dropped.
        scale_by_keep: Scale kept samples of the branch by 1 / (1 - p), so that their expectation is gamma * x.
        gamma: LayerScale's weight, along one dim of a sample: [D] for the last dim, [C, 1, 1] for the channels of
            [B, C, H, W]; or one element, as ReZero and SkipInit have. Default: 1.
        mode: "row" draws for each sample, "batch" once for the whole batch.
        dim: Which dim counts the samples, say 1 for [N, B, D]. Nothing is copied for that.
        keep: Mask of the samples whose branch is kept, bool [B] or [1] for all, in place of a draw
            (:func:`droppath_ext.draw_keep`). ``drop_prob`` then only scales.
        generator: Random number generator of x's device. Default: torch's own.

    Returns:
        Tensor of the shape and (for dense x) strides of x, of the dtype that ``residual + gamma * x`` has. Never an
        alias of an argument.

    Raises:
        ValueError: ``drop_prob`` is a number outside [0, 1], ``mode`` is unknown, x is 0-dimensional or without this
            ``dim``, ``residual`` has another shape than x, ``gamma`` does not broadcast along one dim of a sample,
            ``keep`` has another shape or comes with a generator, or the devices differ.
        TypeError: A tensor is not of a floating-point dtype listed above, ``keep`` is not bool, or ``drop_prob`` is
            neither a number nor a 0-dim tensor.
        RuntimeError: A generator is given inside ``torch.utils.checkpoint``, which would not restore its state.

    Source: Huang et al., "Deep Networks with Stochastic Depth", https://arxiv.org/abs/1603.09382; gamma: Touvron et
    al., "Going deeper with Image Transformers" (LayerScale), https://arxiv.org/abs/2103.17239.
    """
    if (
        type(drop_prob) is float
        and 0.0 <= drop_prob <= 1.0
        and mode == "row"
        and keep is None
        and generator is None
        and dim == 0
    ):
        p = drop_prob if training else 0.0
        if not is_compiling():
            out = _C.drop_path_add(x, residual, gamma, p, scale_by_keep, True, None)
            if out is not None:
                return out
    drop_prob = checked_drop_prob(drop_prob)
    return _drop_path_add(x, residual, drop_prob, training, scale_by_keep, gamma, mode, dim, keep, generator)


def _drop_path_add(
    x: Tensor,
    residual: Tensor,
    drop_prob: float | Tensor,
    training: bool,
    scale_by_keep: bool,
    gamma: Tensor | None,
    mode: str,
    dim: int,
    keep: Tensor | None,
    generator: Generator | None,
) -> Tensor:
    """``drop_path_add`` of whatever it can be called with."""
    check_mode(mode)
    tensors = (x, residual, gamma, keep)
    if not is_compiling() and is_recorded(*tensors):
        options = {"gamma": gamma, "mode": mode, "dim": dim, "keep": keep, "generator": generator}
        return record(drop_path_add, tensors, x, residual, drop_prob, training, scale_by_keep, **options)
    if dim != 0 or keep is not None:
        check_add_inputs(x, residual, None)
        dim = _checked_dim(x, dim, keep, generator)
    if not training:
        drop_prob, keep = 0.0, None
    if keep is not None:
        check_device(keep, "keep", x)
        check_kind(keep, "keep", x)
    if dim != 0:
        first = (x.movedim(dim, 0), residual.movedim(dim, 0))
        gamma = _samples_first(gamma, x, dim)
        return _drop_path_add(*first, drop_prob, True, scale_by_keep, gamma, mode, 0, keep, generator).movedim(0, dim)
    if isinstance(drop_prob, Tensor):
        drop_prob = _known_rate(drop_prob, x)
    if not is_compiling():
        if keep is not None or not isinstance(drop_prob, float) or drop_prob > 0.0:
            check_not_recomputed(generator)
        if not isinstance(drop_prob, float):
            drawn = _draw_at(x, drop_prob, scale_by_keep, mode, keep, generator)
            out = None if drawn is None else _C.scatter_add(x, residual, gamma, drawn[0], drawn[0], 1.0, drawn[1])
        elif keep is None:
            out = _C.drop_path_add(x, residual, gamma, drop_prob, scale_by_keep, mode == "row", generator)
        else:
            scale = reference.keep_scale(drop_prob, scale_by_keep)
            out = _C.scatter_add(x, residual, gamma, keep, keep, scale)
        if out is not None:
            return out
        _warn_without_kernels(x)
    return reference.drop_path_add(x, residual, drop_prob, scale_by_keep, gamma, mode, generator, keep)


def _samples_first(gamma: Tensor | None, x: Tensor, dim: int) -> Tensor | None:
    """gamma for x with ``dim`` moved to the front."""
    if gamma is None:
        return None
    check_gamma(gamma, x, dim)
    if gamma.ndim == 0:  # which widens no dtype
        return gamma
    return gamma.reshape([1] * (x.ndim - gamma.ndim) + list(gamma.shape)).movedim(dim, 0)


@scripts_as(scripted_stochastic_depth)
def stochastic_depth(
    x: Tensor,
    branch: Callable[..., Tensor],
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    gamma: Tensor | None = None,
    batched: Sequence[Tensor | None] = (),
    sampling: str = "bernoulli",
    mode: str = "row",
    dim: int = 0,
    keep: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """A residual block that does not compute what it drops: ``x + drop_path(gamma * branch(x, *batched))``.

    The branch runs on the kept samples alone, gathered in one pass; one pass puts them back: LayerScale, scale and
    addition in one kernel, in float32 (float64 if the result is float64), rounded once. A dropped sample of the result
    is that of x, bit for bit. Both backward passes are as short.

    The result has the distribution of ``drop_path`` for a branch that treats every sample by itself, as attention,
    LayerNorm and MLPs do. It has not where samples meet in the branch: BatchNorm takes its statistics of the kept
    samples alone (of a second one, too, where one is kept and the branch is a module or a method of one), attention
    across samples sees only them, and so does the routing of a mixture of experts with a capacity.

    Where nothing is dropped (``drop_prob=0``, not ``training``, or by luck) the branch gets x itself, and the result is
    ``x + gamma * branch(x, *batched)``, scaled.

    Args:
        x: Tensor [B, ...] of float16, bfloat16, float32 or float64, of any layout. A nested tensor only where nothing
            is dropped. Of a DTensor that is sharded along its samples each rank skips among its own, and the branch
            gets the rows of its rank as a DTensor; placed otherwise, x needs ``keep`` (docs/composition.md).
        branch: Called once, as ``branch(taken, *batched_taken)`` with the K kept samples, [K, ...]. Returns a tensor of
            that shape, of any such dtype and layout. It must not write to its input, nor to x.
        drop_prob: Probability p in [0, 1] that a sample is dropped; a number, or a 0-dim tensor on the CPU that
            holds one.
        training: If False, nothing is dropped.
        scale_by_keep: Scale the branch by 1 / keep probability, so that its expectation is gamma * branch(x).
        gamma: LayerScale's weight, along one dim of a sample: [D] for the last dim, [C, 1, 1] for the channels of
            [B, C, H, W]. Default: 1.
        batched: Further tensors [B, ...] of any dtype whose kept samples the branch is called with, say masks; None
            stays None.
        sampling: How the kept samples are drawn.
            "bernoulli": for each sample by itself, as ``drop_path`` does, on the host: K is known without waiting for
            the device, and varies. If all samples are dropped the branch still runs, on the first one, a stand-in that
            counts for nothing: every parameter gets a gradient, zero if the branch is finite there, as distributed
            training needs; x has none through the branch, not even through what it computes beside its output; and if
            the branch is a module or a method of one, its buffers stay as they are, in eager mode.
            "fixed": K = max(1, round(B * (1 - p))) distinct samples, drawn on the device of x, scaled by B / K. Nothing
            depends on the host, so CUDA graphs capture it, and shapes are static. The effective drop rate is 1 - K / B,
            never 1 for p < 1; samples are not independent. With p = 1 all are dropped.
        mode: "row" draws for each sample; "batch", with "bernoulli" sampling, draws once: all samples or a stand-in.
        dim: Which dim of x, of the branch's input and output, and of ``batched`` counts the samples.
        keep: Mask of the samples that are kept, bool [B] or [1] for all, in place of a draw
            (:func:`droppath_ext.draw_keep`); ``drop_prob`` then only scales. On the CPU, or where x is, for which the
            host then waits.
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
    # What is as usual costs no call.
    if type(drop_prob) is not float or not 0.0 <= drop_prob <= 1.0:
        drop_prob = checked_host_drop_prob(drop_prob, "stochastic_depth")
    if sampling != "bernoulli":
        check_sampling(sampling)
    if mode != "row":
        check_mode(mode)
        if sampling == "fixed":
            raise ValueError('mode must be "row" with sampling="fixed", but got "batch", which draws once for all')
    check_branch(branch)
    compiling = is_compiling()
    if not compiling and is_recorded(x, gamma, keep):
        options: dict[str, object] = {"gamma": gamma, "batched": batched, "sampling": sampling}
        options |= {"mode": mode, "dim": dim, "keep": keep, "generator": generator}
        return record(stochastic_depth, (x, gamma, keep), x, branch, drop_prob, training, scale_by_keep, **options)
    check_input(x)
    if dim != 0 or keep is not None:
        dim = _checked_dim(x, dim, keep, generator)
    if generator is not None:
        check_generator(generator, sampling, x)
    first, gamma_of_first = x, gamma
    if dim != 0:
        first, gamma_of_first = x.movedim(dim, 0), _samples_first(gamma, x, dim)
    elif gamma is not None:
        check_gamma(gamma, x)
    if type(batched) is not tuple or batched:
        check_batched(batched, x, dim)
    if not compiling:
        _warn_without_kernels(x)
    dropping = training and (drop_prob > 0.0 or keep is not None)
    if dropping:
        if x.is_nested:
            raise TypeError("x must not be a nested tensor: its samples cannot be gathered")
        if generator is not None:
            check_not_recomputed(generator)
        if not compiling and is_jit_tracing():
            raise RuntimeError(
                "torch.jit.trace cannot record stochastic_depth in training, for it would keep the same samples for "
                "good: trace the evaluation, or use torch.compile or torch.export"
            )
        if is_dtensor(x):
            options = {"gamma": gamma, "batched": batched, "sampling": sampling, "mode": mode}
            options |= {"dim": dim, "keep": keep, "generator": generator}
            out: Tensor = on_shards(stochastic_depth, x, branch, drop_prob, scale_by_keep, **options)
            return out
        if keep is not None:
            check_kind(keep, "keep", x)
    samples, scale = None, 1.0
    taken, residual = x, first
    if dropping and x.shape[dim] > 0:
        samples, scale = draw_samples(first, branch, drop_prob, scale_by_keep, sampling, mode, keep, generator)
    if samples is not None:
        taken, residual = _gather(first, samples)
        taken = taken.movedim(0, dim) if dim != 0 else taken
        batched = [_taken(tensor, samples, dim) for tensor in batched]
    before = versions(x, taken)
    if samples is None or samples.any_kept or compiling:
        y = branch(taken, *batched)
    else:
        with buffers_kept(module_of(branch)):
            y = branch(taken, *batched)
    check_unchanged(before, x, taken)
    check_output(y, taken)
    if dim == 0:
        return _scatter_add(y, residual, gamma, samples, scale)
    return _scatter_add(y.movedim(dim, 0), residual, gamma_of_first, samples, scale).movedim(0, dim)


@scripts_as(lambda: scripted_draw_keep)
def draw_keep(
    x: Tensor,
    drop_prob: float | Tensor,
    mode: str = "row",
    generator: Generator | None = None,
    *,
    dim: int = 0,
) -> Tensor:
    """Draw a mask to be given as ``keep`` to several calls: which samples of x are kept.

    It is the mask that ``drop_path`` would draw, with the same state of the generator.

    Args:
        x: Tensor [B, ...] of which only the number of samples and the device count.
        drop_prob: Probability p in [0, 1] that a sample is dropped; or a 0-dim tensor on the device of x.
        mode: "row" draws for each sample, "batch" once for the whole batch.
        generator: Random number generator of x's device. Default: torch's own.
        dim: Which dim of x counts the samples.

    Returns:
        Tensor of bool, [B], or [1] if ``mode`` is "batch", on the device of x.

    Raises:
        ValueError: ``drop_prob`` is a number outside [0, 1], ``mode`` is unknown, or x has not this ``dim``.
        TypeError: ``drop_prob`` is neither a number nor a 0-dim tensor.
        RuntimeError: A generator is given inside ``torch.utils.checkpoint``, which would not restore its state.
    """
    drop_prob = checked_drop_prob(drop_prob)
    check_mode(mode)
    if not is_compiling() and is_recorded(x):
        return record(draw_keep, (x,), x, drop_prob, mode, generator, dim=dim)
    check_drawn_from(x)
    check_dim(dim, x)
    check_not_recomputed(generator)
    if isinstance(drop_prob, Tensor):
        drop_prob = _known_rate(drop_prob, x)
        drop_prob = reference.clamped(drop_prob) if isinstance(drop_prob, Tensor) else drop_prob
    return reference.draw_keep_mask(x.movedim(dim, 0) if dim % x.ndim else x, drop_prob, mode, generator)


def _gather(x: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """The taken samples of x, and x: to be used in place of x where the gradients of both shall meet in one pass."""
    if x.dtype not in DTYPES:
        return x.index_select(0, samples.taken_from), x
    pair = None if is_compiling() else _C.gather(x, samples.taken_from, samples.places)
    return (reference.gather(x, samples.taken_from, samples.places), x) if pair is None else pair


def _taken(tensor: Tensor | None, samples: Samples, dim: int) -> Tensor | None:
    """The taken samples of a tensor of ``batched``."""
    if tensor is None:
        return None
    if dim == 0:
        return _gather(tensor, samples)[0]
    return _gather(tensor.movedim(dim, 0), samples)[0].movedim(0, dim)


def _scatter_add(y: Tensor, residual: Tensor, gamma: Tensor | None, samples: Samples | None, scale: float) -> Tensor:
    slots, kept = (None, None) if samples is None else (samples.slots, samples.kept)
    out = None if is_compiling() else _C.scatter_add(y, residual, gamma, slots, kept, scale)
    return reference.scatter_add(y, residual, gamma, slots, kept, scale) if out is None else out
