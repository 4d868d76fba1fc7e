"""Stochastic depth (DropPath) for PyTorch as fast as the hardware allows."""

from .functional import drop_path
from .modules import DropPath
from .patch import patch_timm
from .version import __version__

__all__ = ["DropPath", "__version__", "drop_path", "patch_timm"]
