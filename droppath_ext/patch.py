"""Swap this project's drop_path into timm."""

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from .functional import drop_path
from .tracing import scripts_as


def _drop_path_scripted_as(timms_own: Callable[..., Any]) -> Callable[..., Any]:
    """``drop_path`` but for torch.jit.script, which compiles timm's own.

    What torch.jit.script compiled for one of timm's modules it keeps for the next, whether the patch is then in force
    or not. A copy of the function, for a wrapper would cost every call a second one.
    """
    ours = FunctionType(drop_path.__code__, drop_path.__globals__, drop_path.__name__, drop_path.__defaults__)
    ours.__kwdefaults__ = drop_path.__kwdefaults__
    ours.__annotations__ = drop_path.__annotations__
    ours.__doc__ = drop_path.__doc__
    ours.__module__ = timms_own.__module__  # where pickle finds it
    return scripts_as(lambda: timms_own)(ours)


class TimmPatch:
    """A patch in force, until ``undo()`` or the end of its ``with`` block."""

    _in_force = 0
    _timms_own: Callable[..., Any] | None = None
    _ours: Any = None

    def __init__(self) -> None:
        try:
            from timm.layers import drop
        except ImportError as error:
            raise ImportError(f"patch_timm() needs timm: pip install timm ({error})") from error
        if TimmPatch._in_force == 0:
            TimmPatch._timms_own = drop.drop_path
            TimmPatch._ours = _drop_path_scripted_as(drop.drop_path)
        TimmPatch._in_force += 1
        self._active = True
        drop.drop_path = TimmPatch._ours

    def undo(self) -> None:
        """Take the patch back; timm's own function returns with the last one. Further calls do nothing."""
        if not self._active:
            return
        self._active = False
        TimmPatch._in_force -= 1
        if TimmPatch._in_force == 0:
            for name, module in list(sys.modules.items()):  # timm.models.layers copies the name when it is imported
                if name.partition(".")[0] == "timm" and vars(module).get("drop_path") is TimmPatch._ours:
                    vars(module)["drop_path"] = TimmPatch._timms_own

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
