"""What the public functions are to torch.fx and torch.jit, which record calls or read source instead of running it."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Generator, Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import reference
from .checks import check_gamma_shape

Function = TypeVar("Function", bound=Callable[..., Any])


def is_recorded(*tensors: Any) -> bool:
    """Whether one of the arguments stands for a tensor without being one, as a Proxy of torch.fx does.

    Subclasses of Tensor do not count: what they see are the ATen ops of the composite path.
    """
    return has_torch_function(tensors) and not all(isinstance(t, Tensor | None) for t in tensors)


def record(function: Callable[..., Tensor], tensors: tuple[Any, ...], *args: Any, **kwargs: Any) -> Tensor:
    """Let the arguments that ``is_recorded`` found record the call: one node in a graph of torch.fx."""
    try:
        out: Tensor = handle_torch_function(function, tensors, *args, **kwargs)
    except NotImplementedError as error:
        raise TypeError(
            f"torch.fx cannot record this call of {function.__name__}: {error}. A graph holds numbers, tensors and "
            "submodules of the model that is traced. Make branch one of these, or hide the function that makes the "
            "call from the trace with torch.fx.wrap"
        ) from error
    return out


def scripts_as(find: Callable[[], Callable[..., Any]]) -> Callable[[Function], Function]:
    """Let torch.jit.script compile what ``find`` returns in place of the function that is decorated.

    torch.jit asks a function for this attribute; a test of torch.jit.is_scripting() would be part of every call.
    """

    def mark(function: Function) -> Function:
        function.__dict__["__prepare_scriptable__"] = find
        return function

    return mark


def _check_scripted(drop_prob: float, mode: str) -> None:
    if not (drop_prob >= 0.0 and drop_prob <= 1.0):
        raise ValueError(f"drop_prob must be in [0, 1], but got {drop_prob}")
    if mode != "row" and mode != "batch":
        raise ValueError(f'mode must be "row" or "batch", but got {mode}')


def _check_scripted_dtype(x: Tensor, name: str) -> None:
    # A dtype is a number in TorchScript: its name cannot be told.
    if x.dtype not in [torch.float16, torch.bfloat16, torch.float32, torch.float64]:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64")


def _check_scripted_input(x: Tensor, name: str) -> None:
    _check_scripted_dtype(x, name)
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, the samples, but got a 0-dim tensor")


def _check_scripted_keep(keep: Tensor | None, size: int, generator: Generator | None) -> None:
    if keep is not None:
        if keep.dtype != torch.bool:
            raise TypeError("keep must be bool")
        if keep.ndim != 1 or (keep.shape[0] != size and keep.shape[0] != 1):
            raise ValueError(
                f"keep must have an entry for each of the {size} samples, or one, but got {list(keep.shape)}"
            )
        if generator is not None:
            raise ValueError("keep and generator exclude each other: with keep nothing is drawn")


def scripted_draw_keep(
    x: Tensor, drop_prob: float, mode: str = "row", generator: Generator | None = None, dim: int = 0
) -> Tensor:
    """``functional.draw_keep`` in TorchScript."""
    _check_scripted(drop_prob, mode)
    return reference.draw_keep_mask_in_aten(x.movedim(dim, 0), drop_prob, mode, generator)


def scripted_drop_path(
    x: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    mode: str = "row",
    dim: int = 0,
    keep: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """``functional.drop_path`` in TorchScript, which knows no keyword-only arguments: the composite path."""
    _check_scripted(drop_prob, mode)
    if not training or (drop_prob == 0.0 and keep is None):
        return x
    _check_scripted_input(x, "x")
    x = x.movedim(dim, 0)
    _check_scripted_keep(keep, x.shape[0], generator)
    if keep is None:
        keep = reference.draw_keep_mask_in_aten(x, drop_prob, mode, generator)
    return reference.apply_keep_mask(x, keep, reference.keep_scale(drop_prob, scale_by_keep)).movedim(0, dim)


def scripted_drop_path_add(
    x: Tensor,
    residual: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    gamma: Tensor | None = None,
    mode: str = "row",
    dim: int = 0,
    keep: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """``functional.drop_path_add`` in TorchScript: the composite path."""
    _check_scripted(drop_prob, mode)
    _check_scripted_input(x, "x")
    _check_scripted_input(residual, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {x.shape}, but got {residual.shape}: expand it first")
    if gamma is not None:
        _check_scripted_dtype(gamma, "gamma")
        check_gamma_shape(gamma, x, dim)
        if dim != 0 and gamma.ndim > 0:
            gamma = gamma.reshape([1] * (x.ndim - gamma.ndim) + list(gamma.shape)).movedim(dim, 0)
    x = x.movedim(dim, 0)
    _check_scripted_keep(keep, x.shape[0], generator)
    if not training:
        drop_prob = 0.0
        keep = None
    elif keep is None and drop_prob > 0.0:
        keep = reference.draw_keep_mask_in_aten(x, drop_prob, mode, generator)
    scale = reference.keep_scale(drop_prob, scale_by_keep)
    return reference.add_kept(x, residual.movedim(dim, 0), gamma, keep, scale).movedim(0, dim)


def scripted_stochastic_depth() -> NoReturn:
    """There is none: TorchScript knows no functions as arguments."""
    raise TypeError(
        "torch.jit.script cannot compile stochastic_depth, whose branch is a function: use torch.compile or "
        "torch.export, or torch.jit.trace for the evaluation"
    )
