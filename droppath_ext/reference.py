"""The composite path: the whole contract in a few ATen ops.

It serves whatever the native extension does not (``functional.drop_path`` chooses), and it is the executable
specification that the tests compare the kernels with.
"""

import torch
from torch import Generator, Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_input(x: Tensor, name: str = "x") -> None:
    """Raise unless ``name`` has a floating-point dtype and a batch dimension. The kernels' own checks read the same."""
    if x.dtype not in DTYPES:
        dtype = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, but got {dtype}")
    if x.is_nested and x.layout is not torch.jagged:
        raise TypeError(f"{name} must be a nested tensor of layout torch.jagged, but got {x.layout}")
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, the samples, but got a 0-dim tensor")


def keep_scale(drop_prob: float, scale_by_keep: bool) -> float:
    """1 / keep_prob, or 1 where nothing is kept or scaled."""
    return 1.0 / (1.0 - drop_prob) if scale_by_keep and drop_prob < 1.0 else 1.0


def draw_keep_mask(x: Tensor, drop_prob: float, mode: str = "row", generator: Generator | None = None) -> Tensor:
    """Draw which samples of x are kept: bool [B], or [1] if ``mode`` is "batch"."""
    size = x.shape[0] if mode == "row" else 1
    # new_empty keeps what x is, say a DTensor; nested tensors have none. float32: float16 is too coarse for some p.
    like = x.values() if x.is_nested else x
    return like.new_empty((size,), dtype=torch.float32).bernoulli_(1.0 - drop_prob, generator=generator) != 0


def apply_keep_mask(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """x * scale where the sample is kept, rounded once; +0 where it is dropped, whatever x holds there."""
    keep = keep.view(-1, *[1] * (x.ndim - 1))
    scaled = x * scale  # ATen multiplies by a Python number in float32 for half types and in float64 for float64
    # Only where() keeps the strides of x, but it knows no nested tensors.
    return scaled.masked_fill(~keep, 0.0) if x.is_nested else torch.where(keep, scaled, 0.0)


def drop_path(x: Tensor, drop_prob: float, scale_by_keep: bool, mode: str, generator: Generator | None) -> Tensor:
    """``functional.drop_path`` in training; drop_prob and mode are valid."""
    check_input(x)
    keep = draw_keep_mask(x, drop_prob, mode, generator)
    return apply_keep_mask(x, keep, keep_scale(drop_prob, scale_by_keep))
