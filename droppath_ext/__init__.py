"""Stochastic depth (DropPath) for PyTorch as fast as the hardware allows."""

from .functional import drop_path, drop_path_add
from .modules import DropPath, DropPathAdd
from .patch import patch_timm
from .version import __version__

__all__ = ["DropPath", "DropPathAdd", "__version__", "drop_path", "drop_path_add", "patch_timm"]
