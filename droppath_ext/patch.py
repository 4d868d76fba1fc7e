"""Swap this project's drop_path into timm."""

from collections.abc import Callable
from typing import Any

from .functional import drop_path


class TimmPatch:
    """A patch in force, until ``undo()`` or the end of its ``with`` block."""

    _in_force = 0
    _timms_own: Callable[..., Any] | None = None

    def __init__(self) -> None:
        try:
            from timm.layers import drop
        except ImportError as error:
            raise ImportError(f"patch_timm() needs timm: pip install timm ({error})") from error
        self._module: Any = drop
        if TimmPatch._in_force == 0:
            TimmPatch._timms_own = drop.drop_path
        TimmPatch._in_force += 1
        self._active = True
        drop.drop_path = drop_path

    def undo(self) -> None:
        """Take the patch back; timm's own function returns with the last one. Further calls do nothing."""
        if not self._active:
            return
        self._active = False
        TimmPatch._in_force -= 1
        if TimmPatch._in_force == 0:
            self._module.drop_path = TimmPatch._timms_own

    def __enter__(self) -> "TimmPatch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def patch_timm() -> TimmPatch:
    """Let every timm model, existing or yet to be built, run this project's ``drop_path``.

    timm's modules look the function up when they are called, so replacing that one name reaches them all; parameters
    and ``state_dict`` stay as they are. Call it once for good, or as ``with patch_timm(): ...``.

    Returns:
        A handle whose ``undo()`` gives timm its own function back.

    Raises:
        ImportError: timm is not installed.
    """
    return TimmPatch()
