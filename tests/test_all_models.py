"""Promise: `make test-all-models` finds every family of timm that takes a rate, and sees a difference."""

import importlib
import inspect

import block_equality
import pytest
import torch
from block_equality import Call, compare
from model_zoo import LIBRARIES, timm_candidates, timm_families
from torch import nn

from droppath_ext.convert import convert
from droppath_ext.convert.drops import drop_path_kind

timm = pytest.importorskip("timm", exc_type=ImportError)


def _takes_rate(family):
    module = importlib.import_module(f"timm.models.{family}")
    classes = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
    return any("drop_path_rate" in inspect.signature(cls.__init__).parameters for cls in classes)


def test_every_family_of_timm_is_found():
    found = set()
    for candidate in timm_candidates():
        if candidate.family in found:
            continue
        try:
            with torch.device("meta"):
                model, _ = candidate.build(None)
        except TypeError:  # it takes no rate
            continue
        if any(drop_path_kind(module) is not None for module in model.modules()):
            found.add(candidate.family)
    families = {family for family in timm_families() if _takes_rate(family)}
    assert families <= found, families - found
    assert len(found - {"vision_transformer, in parallel"}) >= 77


WHOLE = [
    ("torchvision", "efficientnet_b0"),
    ("transformers", "segformer"),
    ("transformers", "poolformer"),
]


@pytest.mark.parametrize(("library", "family"), WHOLE)
def test_whole_models(library, family):
    """float64, the same masks: outputs, gradients and buffers; the evaluation bit for bit."""
    pytest.importorskip(library, exc_type=ImportError)
    candidate = next(c for c in LIBRARIES[library]() if c.family == family)
    model, example = candidate.build(64)
    call = Call("", model, (), example) if isinstance(example, dict) else Call("", model, (example,))
    assert compare(call).faults == []


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop_path = timm.layers.DropPath(0.5)

    def forward(self, x):
        return x + self.drop_path(self.linear(x))


def test_a_difference_is_seen(monkeypatch):
    call = Call("", Block(), (torch.randn(4, 3, 8),))
    assert compare(call).faults == []

    def inexact(model, *args, **options):
        report = convert(model, *args, **options)
        model.block.linear.weight.data *= 1 + 1e-9
        return report

    monkeypatch.setattr(block_equality, "convert", inexact)
    seen = [fault.partition(" differ")[0] for fault in compare(call).faults]
    assert seen == [
        f"{level}: {what}"
        for level in ("keep", "fuse", "skip")
        for what in ("the evaluation is another", "outputs", "gradients")
    ]
