"""Stochastic depth (DropPath) for PyTorch as fast as the hardware allows."""

from .functional import drop_path, drop_path_add, stochastic_depth
from .modules import DropPath, DropPathAdd, StochasticDepth
from .patch import patch_timm
from .version import __version__

__all__ = [
    "DropPath",
    "DropPathAdd",
    "StochasticDepth",
    "__version__",
    "drop_path",
    "drop_path_add",
    "patch_timm",
    "stochastic_depth",
]
