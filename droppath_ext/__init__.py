"""Stochastic depth (DropPath) for PyTorch that does not compute what it drops."""

from .convert import convert, drop_path_rates, restore, set_drop_path_rate
from .functional import draw_keep, drop_path, drop_path_add, stochastic_depth
from .modules import DropPath, DropPathAdd, StochasticDepth
from .patch import patch_timm
from .version import __version__

__all__ = [
    "DropPath",
    "DropPathAdd",
    "StochasticDepth",
    "__version__",
    "convert",
    "draw_keep",
    "drop_path",
    "drop_path_add",
    "drop_path_rates",
    "patch_timm",
    "restore",
    "set_drop_path_rate",
    "stochastic_depth",
]
