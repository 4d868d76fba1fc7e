"""The checks of arguments: each raises one sentence that names the argument, the rule and what it got.

The native ops check what reaches them in the same words.
"""

import contextlib
import inspect
import math
import numbers
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Generator, Tensor
from torch.compiler import is_compiling
from torch.jit._trace import TracerWarning

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODES = ("row", "batch")
SAMPLINGS = ("bernoulli", "fixed")

# torch.jit.trace warns where shapes are compared; a check that passes leaves nothing in the trace.
warnings.filterwarnings("ignore", category=TracerWarning, module=re.escape(__name__))


def checked_drop_prob(drop_prob: float | Tensor) -> float | Tensor:
    """``drop_prob`` as a float, or as it is if it is a 0-dim tensor, whose value only the device may know.

    Raise unless it is a number in [0, 1], a Python or NumPy one, or such a tensor.
    """
    if type(drop_prob) is float:
        p = drop_prob
    else:
        _check_number(drop_prob)
        if isinstance(drop_prob, Tensor):
            return drop_prob
        try:
            p = float(drop_prob)
        except (OverflowError, ValueError):  # of an integer beyond all floats, and of Decimal's signalling NaN
            p = math.nan
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"drop_prob must be in [0, 1], but got {drop_prob!r}")
    return p


def checked_host_drop_prob(drop_prob: float | Tensor, function: str) -> float:
    """``drop_prob`` as a float, where the host needs its value: of tensors only those on the CPU have one there."""
    p = checked_drop_prob(drop_prob)
    if isinstance(p, float):
        return p
    if is_compiling() or not p.is_cpu:
        where = "inside a compiled function" if is_compiling() else f"on {p.device}"
        raise TypeError(
            f"drop_prob of {function} must be a number, for the host needs it, but got a tensor {where}: "
            "pass float(drop_prob)"
        )
    value: object = None
    with contextlib.suppress(RuntimeError):
        value = p.item()
    if not isinstance(value, float | int):  # where there is an error, or a symbol
        raise TypeError(
            f"drop_prob of {function} must be a number, for the host needs it, but got a tensor that has none here, as "
            "inside torch.func.vmap or a trace"
        )
    return float(checked_drop_prob(value))


def _check_number(drop_prob: object) -> None:
    shape, dtype = getattr(drop_prob, "shape", ()), str(getattr(drop_prob, "dtype", ""))
    is_number = isinstance(drop_prob, numbers.Real | Decimal) or hasattr(drop_prob, "dtype")
    if not is_number or len(shape) > 0 or "complex" in dtype or isinstance(drop_prob, str):
        what = f"a tensor of shape {list(shape)}" if len(shape) > 0 else repr(drop_prob)
        raise TypeError(f"drop_prob must be a number in [0, 1], but got {what}")


def check_dim(dim: int, x: Tensor) -> None:
    """Raise unless ``dim`` is a dimension of x."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int, but got {dim!r}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be a dimension of x, of which there are {x.ndim}, but got {dim}")
    if x.is_nested and dim % x.ndim != 0:
        raise ValueError(f"dim must be 0 for a nested tensor, whose samples are its parts, but got {dim}")


def check_sample_dim(sample_dim: int) -> None:
    """Raise unless ``sample_dim`` can be the dimension of a tensor."""
    if not isinstance(sample_dim, int) or isinstance(sample_dim, bool):
        raise TypeError(f"sample_dim must be an int, but got {sample_dim!r}")


def check_keep(keep: Tensor, size: int, generator: Generator | None) -> None:
    """Raise unless ``keep`` is a mask of ``size`` samples, and takes the place of a draw. Where it is, is not asked."""
    if not isinstance(keep, Tensor):
        raise TypeError(f"keep must be a Tensor, but got {type(keep).__name__}")
    if keep.dtype is not torch.bool:
        raise TypeError(f"keep must be bool, but got {str(keep.dtype).removeprefix('torch.')}")
    if keep.layout is not torch.strided:
        raise TypeError(f"keep must be a dense tensor, but got one of layout {keep.layout}")
    if keep.shape not in ((size,), (1,)):
        raise ValueError(f"keep must have an entry for each of the {size} samples, or one, but got {list(keep.shape)}")
    if generator is not None:
        raise ValueError("keep and generator exclude each other: with keep nothing is drawn")


def check_mode(mode: str) -> None:
    """Raise unless ``mode`` is "row" or "batch"."""
    if mode not in MODES:
        raise ValueError(f'mode must be "row" or "batch", but got {mode!r}')


def check_sampling(sampling: str) -> None:
    """Raise unless ``sampling`` is "bernoulli" or "fixed"."""
    if sampling not in SAMPLINGS:
        raise ValueError(f'sampling must be "bernoulli" or "fixed", but got {sampling!r}')


def check_branch(branch: Callable[..., Tensor]) -> None:
    """Raise unless ``branch`` can be called."""
    if not callable(branch):
        raise TypeError(f"branch must be callable, but got {type(branch).__name__}")


def check_dtype(x: Tensor, name: str) -> None:
    """Raise unless ``name`` is a dense or nested tensor of a floating-point dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, but got {type(x).__name__}")
    if x.dtype not in DTYPES:
        dtype = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, but got {dtype}")
    if x.layout not in (torch.strided, torch.jagged):
        raise TypeError(f"{name} must be a dense tensor, but got one of layout {x.layout}")


def check_input(x: Tensor, name: str = "x") -> None:
    """Raise unless ``name`` has such a dtype and a batch dimension. The kernels' own checks read the same."""
    check_dtype(x, name)
    if x.is_nested and x.layout is not torch.jagged:
        raise TypeError(f"{name} must be a nested tensor of layout torch.jagged, but got {x.layout}")
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, the samples, but got a 0-dim tensor")


def check_drawn_from(x: Tensor) -> None:
    """Raise unless x is a tensor that has samples, of any dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, but got {type(x).__name__}")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, the samples, but got a 0-dim tensor")


def check_device(tensor: Tensor, name: str, x: Tensor) -> None:
    """Raise unless ``name`` is where x is."""
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, where x is, but got {tensor.device}")


def check_kind(tensor: Tensor, name: str, x: Tensor) -> None:
    """Raise where a DTensor meets a plain tensor."""
    if is_compiling() or is_dtensor(tensor) == is_dtensor(x):
        return
    if is_dtensor(x):
        raise TypeError(
            f"{name} must be a DTensor, for x is one, but got a plain tensor: "
            f"torch.distributed.tensor.distribute_tensor({name}, x.device_mesh) makes it one"
        )
    raise TypeError(f"{name} must be a plain tensor, for x is one, but got a DTensor: use {name}.full_tensor()")


def check_gamma(gamma: Tensor, x: Tensor, sample_dim: int = 0) -> None:
    """Raise unless gamma can be multiplied with each sample of x."""
    check_dtype(gamma, "gamma")
    check_device(gamma, "gamma", x)
    check_kind(gamma, "gamma", x)
    check_gamma_shape(gamma, x, sample_dim)


def check_gamma_shape(gamma: Tensor, x: Tensor, sample_dim: int = 0) -> None:
    """Raise unless gamma has one element, or one for each index of one dimension of a sample of x and size 1 elsewhere.

    Also compiled by torch.jit.script, hence the loops.
    """
    first = x.ndim - gamma.ndim  # the dimension of x that gamma's first one meets
    long = 0
    for size in gamma.shape:
        if size != 1:
            long += 1
    fits = long == 0
    if sample_dim < 0:
        sample_dim += x.ndim
    for dim, size in enumerate(gamma.shape):
        if long == 1 and size != 1 and first + dim != sample_dim and size == x.shape[first + dim]:
            fits = True
    if first < 0 or not fits:
        raise ValueError(
            "gamma must broadcast along one dim of a sample, as [D] or [C, 1, 1] do, or have one element, "
            f"but got shape {list(gamma.shape)} for x of shape {list(x.shape)}"
        )


def check_add_inputs(x: Tensor, residual: Tensor, gamma: Tensor | None) -> None:
    """Raise unless x, residual and gamma can be combined. The kernels' own checks read the same."""
    check_input(x)
    check_input(residual, "residual")
    check_device(residual, "residual", x)
    check_kind(residual, "residual", x)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {list(x.shape)}, but got {list(residual.shape)}: "
            "expand it first, say by residual.expand_as(x)"
        )
    if gamma is not None:
        check_gamma(gamma, x)


def is_dtensor(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether x is a DTensor. Nobody has one before its module is loaded, which takes a while."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(x, distributed.DTensor)


def check_batched(batched: Sequence[Tensor | None], x: Tensor, dim: int = 0) -> None:
    """Raise unless ``batched`` holds tensors with the samples of x along ``dim``, where x is, or None."""
    if isinstance(batched, Tensor) or not isinstance(batched, Sequence):
        raise TypeError(f"batched must be a sequence of tensors, but got {type(batched).__name__}")
    for i, tensor in enumerate(batched):
        name = f"batched[{i}]"
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, but got {type(tensor).__name__}")
        if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] != x.shape[dim]:
            along = f" along dim {dim}" if dim else ""
            raise ValueError(
                f"{name} must have the {x.shape[dim]} samples of x{along}, but got shape {list(tensor.shape)}"
            )
        check_device(tensor, name, x)
        if not is_dtensor(x):
            check_kind(tensor, name, x)


def check_not_recomputed(generator: Generator | None) -> None:
    """Raise unless ``generator`` is one, or if torch.utils.checkpoint will draw from it again: another mask."""
    if generator is None:
        return
    if not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator, but got {type(generator).__name__}")
    checkpoint = sys.modules.get("torch.utils.checkpoint")
    if checkpoint is None or is_compiling():
        return
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            raise RuntimeError(
                "generator must be None inside torch.utils.checkpoint, which keeps the state of the default generators "
                "alone and would compute the backward with another mask: leave it out, or draw the mask outside and "
                "pass it as keep"
            )
        frame = frame.f_back


def check_generator(generator: Generator | None, sampling: str, x: Tensor) -> None:
    """Raise unless ``generator`` is one of the device that draws."""
    if generator is None:
        return
    if not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator, but got {type(generator).__name__}")
    device = "cpu" if sampling == "bernoulli" else x.device.type
    if generator.device.type != device:
        where = "the host" if sampling == "bernoulli" else "the device of x"
        raise ValueError(
            f'generator must be a {device} generator, for sampling="{sampling}" draws on {where}, '
            f"but got one of {generator.device}"
        )


def check_output(y: Tensor, taken: Tensor) -> None:
    """Raise unless y, computed from ``taken``, can be added to it."""
    name = "the output of branch"
    if isinstance(y, tuple | list):
        raise TypeError(
            f"{name} must be a Tensor, but got a {type(y).__name__} of {len(y)}: let branch return the one to add, as "
            "lambda rows: attention(rows, rows, rows)[0] does"
        )
    check_dtype(y, name)
    check_device(y, name, taken)
    if y.shape != taken.shape:
        raise ValueError(f"{name} must have the shape of its input, {list(taken.shape)}, but got {list(y.shape)}")


def versions(*tensors: Tensor) -> list[int]:
    """What in-place changes count up; nothing where nobody counts."""
    return [] if is_compiling() else [tensor._version for tensor in tensors if not tensor.is_inference()]


def check_unchanged(before: list[int], x: Tensor, taken: Tensor) -> None:
    """Raise unless the versions of x and the branch's input are those of before."""
    if versions(x, taken) != before:
        raise RuntimeError("branch must not change its input or x in place: where nothing is dropped, its input is x")
