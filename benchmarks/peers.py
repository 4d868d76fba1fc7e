"""What this project is compared with: each peer's drop path, in training mode with one draw per sample, and around it
the end of a residual block."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from droppath_ext import drop_path, drop_path_add

# formula(p, x), formula(p, x, residual) or formula(p, x, residual, gamma): the three ops of workloads.py.
Formula = Callable[..., Tensor]

OURS = "droppath_ext"
COPY = "copy"
COMPILED = {"timm": "timm compiled", OURS: "droppath_ext compiled"}

LEFT_OUT: dict[str, str] = {}  # a sentence for each peer that cannot be imported

# A torchvision built for another torch fails with a RuntimeError while it registers its operators; timm imports it.
try:
    from timm.layers.drop import drop_path as timm_drop_path
except (ImportError, RuntimeError) as error:
    timm_drop_path = None
    LEFT_OUT["timm"] = f"timm is left out, because it cannot be imported: {error}"
try:
    from torchvision.ops import stochastic_depth
except (ImportError, RuntimeError) as error:
    stochastic_depth = None
    LEFT_OUT["torchvision"] = f"torchvision is left out, because it cannot be imported: {error}"


def floor_formula(x: Tensor, p: float) -> Tensor:
    """The oldest formula, as transformers and mmcv still write it."""
    keep_prob = 1 - p
    keep = keep_prob + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    return x.div(keep_prob) * keep.floor_()


def ours(p: float, x: Tensor, residual: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
    if residual is None:
        return drop_path(x, p, True)
    return drop_path_add(x, residual, p, True, gamma=gamma)


def block_end(peer: Callable[[Tensor, float], Tensor]) -> Formula:
    """The end of a residual block as models write it, LayerScale, drop path, addition, or what the op has of these."""

    def formula(p: float, x: Tensor, residual: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
        branch = peer(x if gamma is None else x * gamma, p)
        return branch if residual is None else residual + branch

    return formula


def eager_formulas() -> dict[str, Formula]:
    """This project first, then every peer there is."""
    formulas = {OURS: ours}
    if timm_drop_path:
        formulas["timm"] = block_end(partial(timm_drop_path, training=True))
    if stochastic_depth:
        formulas["torchvision"] = block_end(partial(stochastic_depth, mode="row"))
    formulas["floor formula"] = block_end(floor_formula)
    return formulas
