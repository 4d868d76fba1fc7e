"""Which modules are drop paths, and how they store what ``drop_path`` is called with."""

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .preserve import preserved_generators

NAMES = re.compile(r"drop_?path|stochastic_?depth|drop_?connect", re.IGNORECASE)
RATES = ("drop_prob", "p")  # timm, transformers, MONAI and mmcv; torchvision


@dataclass(frozen=True)
class DropPathKind:
    """How the modules of a class store their settings: the name of an attribute, or the value itself."""

    rate: str
    scale_by_keep: str | bool
    mode: str  # the attribute "mode", or the value "row" or "batch"

    def settings(self) -> Iterator[tuple[str, Any, bool]]:
        """The stored arguments of ``drop_path``: the name, the attribute or value, and whether it is an attribute."""
        yield "drop_prob", self.rate, True
        yield "training", "training", True
        if self.scale_by_keep is not True:
            yield "scale_by_keep", self.scale_by_keep, isinstance(self.scale_by_keep, str)
        if self.mode != "row":
            yield "mode", self.mode, self.mode == "mode"

    def rate_of(self, module: nn.Module) -> float:
        return float(getattr(module, self.rate) or 0.0)

    def mode_of(self, module: nn.Module) -> str:
        return str(module.mode) if self.mode == "mode" else self.mode


_kinds: dict[tuple[object, ...], DropPathKind | None] = {}


def drop_path_kind(module: nn.Module) -> DropPathKind | None:
    """How this drop path stores its settings; None if the module is none.

    A drop path is recognised by three things, not by a list of classes: the name of its class, a rate among its
    attributes, and that it drops samples and scales the others when it is called.
    """
    cls = type(module)
    if not any(NAMES.search(base.__name__) for base in cls.__mro__):
        return None
    rate = next((name for name in RATES if _is_rate(module.__dict__.get(name, ""))), None)
    if module.__dict__.get("sample_dim", 0) != 0:  # ours, and what is emitted drops along dim 0
        return None
    if rate is None or any(module.children()) or any(module.parameters()) or any(module.buffers()):
        return None
    if len(inspect.signature(cls.forward).parameters) != 2:  # what else it is told would be lost
        return None
    settings = {name: value for name, value in module.__dict__.items() if name not in (*nn.Module().__dict__, rate)}
    key = (cls, rate, repr(sorted(settings.items(), key=str)))
    if key not in _kinds:
        _kinds[key] = _kind_by_behaviour(module, rate)
    return _kinds[key]


def _is_rate(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _kind_by_behaviour(module: nn.Module, rate: str) -> DropPathKind | None:
    """Calls a copy on 64 samples of 16 x 3 ones each, until some are kept: of 4, about 3."""
    x = torch.ones(64, 16, 3, device="cpu")
    copy = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__[rate] = 0.25
    try:
        with torch.no_grad(), preserved_generators(), torch.device("cpu"):
            copy.training = False
            if not torch.equal(copy.forward(x), x):
                return None
            copy.training = True
            for seed in range(64):
                torch.manual_seed(seed)
                out = copy.forward(x.clone())
                if out.any():
                    break
    except Exception:  # whatever it is, it is called in another way than a drop path
        return None
    samples = out[:, 0, 0]
    scale = float(samples.max())
    scales = math.isclose(scale, 4 / 3, rel_tol=1e-6)
    if not (scales or scale == 1.0) or not torch.equal(out, samples.view(64, 1, 1).expand_as(x)):
        return None
    if not ((samples == 0.0) | (samples == scale)).all():
        return None
    mode = "batch" if bool(samples.all()) else "row"
    if mode == "row" and not 32 <= int(samples.count_nonzero()) < 64:  # it keeps what it should drop
        return None
    if "mode" in module.__dict__:
        if module.__dict__["mode"] != mode:
            return None
        mode = "mode"
    scale_by_keep: str | bool = scales
    if "scale_by_keep" in module.__dict__:
        if bool(module.__dict__["scale_by_keep"]) != scale_by_keep:
            return None
        scale_by_keep = "scale_by_keep"
    return DropPathKind(rate, scale_by_keep, mode)
