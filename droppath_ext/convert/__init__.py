"""Bring any model to drop, fuse or skip: the calls of its drop paths, with its own modules and parameters."""

from .conversion import convert, restore
from .rates import drop_path_rates, set_drop_path_rate
from .report import ConversionReport, ConvertedSite

__all__ = [
    "ConversionReport",
    "ConvertedSite",
    "convert",
    "drop_path_rates",
    "restore",
    "set_drop_path_rate",
]
