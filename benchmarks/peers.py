"""What drop_path is compared with: each formula once, as `op(x, p)` in training mode, one draw per sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from droppath_ext import drop_path

Op = Callable[[Tensor, float], Tensor]

OURS = "droppath_ext"
COPY = "copy"
COMPILED = {"timm": "timm compiled", OURS: "droppath_ext compiled"}

LEFT_OUT: list[str] = []  # one sentence for each peer that cannot be imported

# A torchvision built for another torch fails with a RuntimeError while it registers its operators; timm imports it.
try:
    from timm.layers.drop import drop_path as timm_drop_path
except (ImportError, RuntimeError) as error:
    timm_drop_path = None
    LEFT_OUT.append(f"timm is left out, because it cannot be imported: {error}")
try:
    from torchvision.ops import stochastic_depth
except (ImportError, RuntimeError) as error:
    stochastic_depth = None
    LEFT_OUT.append(f"torchvision is left out, because it cannot be imported: {error}")


def floor_formula(x: Tensor, p: float) -> Tensor:
    """The oldest formula, as transformers and mmcv still write it."""
    keep_prob = 1 - p
    keep = keep_prob + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    return x.div(keep_prob) * keep.floor_()


def eager_ops() -> dict[str, Op]:
    """This project first, then every peer there is."""
    ops: dict[str, Op] = {OURS: lambda x, p: drop_path(x, p, True)}
    if timm_drop_path:
        ops["timm"] = lambda x, p: timm_drop_path(x, p, True)
    if stochastic_depth:
        ops["torchvision"] = lambda x, p: stochastic_depth(x, p, "row")
    ops["floor formula"] = floor_formula
    return ops


def compiled(op: Op, p: float) -> Callable[[Tensor], Tensor]:
    """`op` under torch.compile with p fixed, as it is in a module."""
    return torch.compile(lambda x: op(x, p), fullgraph=True, dynamic=False)
