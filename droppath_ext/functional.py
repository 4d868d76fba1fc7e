"""The public functions: arguments are checked and the path is chosen here."""

import functools
import warnings
from collections.abc import Callable, Sequence

from torch import Generator, Tensor
from torch.compiler import is_compiling

from . import reference, sampling as _sampling
from ._native import _C, REBUILD

MODES = ("row", "batch")


def check_drop_prob(drop_prob: float) -> None:
    """Raise unless ``drop_prob`` is a number in [0, 1]."""
    try:
        valid = 0.0 <= drop_prob <= 1.0
    except TypeError:
        raise TypeError(f"drop_prob must be a number in [0, 1], but got {drop_prob!r}") from None
    if not valid:
        raise ValueError(f"drop_prob must be in [0, 1], but got {drop_prob!r}")


def check_mode(mode: str) -> None:
    """Raise unless ``mode`` is "row" or "batch"."""
    if mode not in MODES:
        raise ValueError(f'mode must be "row" or "batch", but got {mode!r}')


@functools.cache
def _warn_without_kernels() -> None:
    warnings.warn(
        "droppath_ext was built without CUDA, so CUDA tensors take the slower composite path. "
        f"With an nvcc at hand, this builds the kernels: DROPPATH_EXT_CUDA=1 {REBUILD}",
        stacklevel=3,
    )


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
    check_drop_prob(drop_prob)
    check_mode(mode)
    if drop_prob == 0.0 or not training:
        return x
    if not is_compiling():  # where Inductor fuses the composite with its neighbours, as no opaque kernel can be
        out = _C.drop_path(x, drop_prob, scale_by_keep, mode == "row", generator)
        if out is not None:
            return out
        if not _C.has_cuda and x.is_cuda:
            _warn_without_kernels()
    return reference.drop_path(x, drop_prob, scale_by_keep, mode, generator)


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
    x is not read there. The backward is one pass, too, and deterministic; the gradient of ``residual`` is the incoming
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
    check_drop_prob(drop_prob)
    check_mode(mode)
    if not training:
        drop_prob = 0.0
    if not is_compiling():
        out = _C.drop_path_add(x, residual, gamma, drop_prob, scale_by_keep, mode == "row", generator)
        if out is not None:
            return out
        if not _C.has_cuda and x.is_cuda:
            _warn_without_kernels()
    return reference.drop_path_add(x, residual, drop_prob, scale_by_keep, gamma, mode, generator)


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
    """``x + drop_path(gamma * branch(x))``, where the branch of a dropped sample is not computed."""
    check_drop_prob(drop_prob)
    _sampling.check_sampling(sampling)
    _sampling.check_generator(generator, sampling, x)
    reference.check_input(x)
    if gamma is not None:
        reference.check_gamma(gamma, x)
    _check_batched(batched, x)
    samples, scale = None, 1.0
    if training and drop_prob > 0.0 and x.shape[0] > 0:
        samples, scale = _sampling.draw(x, drop_prob, scale_by_keep, sampling, generator)
    if samples is None:
        rows, residual = x, x
    else:
        rows, residual = _gather(x, samples), x
        batched = [_gather(tensor, samples) for tensor in batched]
    y = branch(rows, *batched)
    _check_output(y, rows)
    if samples is None:
        return reference.scatter_add(y, residual, gamma, None, None, scale)
    return reference.scatter_add(y, residual, gamma, samples.slots, samples.kept, scale)


def _gather(x: Tensor, samples: _sampling.Samples) -> Tensor:
    return reference.gather(x, samples.taken, samples.slots)


def _check_output(y: Tensor, rows: Tensor) -> None:
    reference.check_dtype(y, "the output of branch")
    reference.check_device(y, "the output of branch", rows)
    if y.shape != rows.shape:
        raise ValueError(
            f"branch must return the shape of its input, {list(rows.shape)}, but returned {list(y.shape)}"
        )


def _check_batched(batched: Sequence[Tensor], x: Tensor) -> None:
    for i, tensor in enumerate(batched):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"batched[{i}] must be a Tensor, but got {type(tensor).__name__}")
        if tensor.ndim == 0 or tensor.shape[0] != x.shape[0]:
            raise ValueError(
                f"batched[{i}] must have the {x.shape[0]} samples of x along dim 0, but got shape {list(tensor.shape)}"
            )
        reference.check_device(tensor, f"batched[{i}]", x)
