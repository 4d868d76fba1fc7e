"""Drop rates: one for each block of a network, and those of a model that is already built."""

import copy
import re
from collections.abc import Sequence

import torch
from torch import nn

from ..modules import DropPath
from .drops import NAMES, drop_path_kind
from .mount import is_mounted, unmount
from .report import ConversionReport, ConvertedSite

SCHEDULES = ("linear", "uniform", "stagewise")


def drop_path_rates(rate: float, depth: int | Sequence[int], schedule: str = "linear") -> list[float]:
    """The drop rate of each block of a network.

    Args:
        rate: The highest rate, in [0, 1].
        depth: The number of blocks, or the number of blocks of each stage.
        schedule: "linear": from 0 in the first block to ``rate`` in the last (Huang et al., timm, torchvision).
            "uniform": ``rate`` in every block (DINOv2). "stagewise": from 0 in the first stage to ``rate`` in the
            last, the same within a stage; ``depth`` then is a sequence.

    Returns:
        As many rates as there are blocks.

    Raises:
        ValueError: ``rate`` is outside [0, 1], ``depth`` is no number of blocks, ``schedule`` is unknown, or
            "stagewise" got no stages.

    Source: Huang et al., "Deep Networks with Stochastic Depth", section 3, https://arxiv.org/abs/1603.09382.
    """
    if not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must be a number in [0, 1], but got {rate!r}")
    stages = [depth] if isinstance(depth, int) else depth
    if not isinstance(stages, Sequence) or any(
        isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 0 for blocks in stages
    ):
        raise ValueError(f"depth must be a number of blocks, or one for each stage, but got {depth!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule must be "linear", "uniform" or "stagewise", but got {schedule!r}')
    if schedule == "uniform":
        return [float(rate)] * sum(stages)
    if schedule == "linear":
        return _rise(rate, sum(stages))
    if isinstance(depth, int):
        raise ValueError(
            f'schedule="stagewise" takes the blocks of each stage, as in depth=[3, 3, 9, 3], but got {depth}'
        )
    return [at for at, blocks in zip(_rise(rate, len(stages)), stages, strict=True) for _ in range(blocks)]


def _rise(rate: float, steps: int) -> list[float]:
    return [float(at) for at in torch.linspace(0.0, rate, steps, dtype=torch.float64, device="cpu")]


def set_drop_path_rate(model: nn.Module, rate: float, schedule: str = "linear") -> ConversionReport:
    """Set the drop rates of a model that is already built, in place; also where it was built with a rate of 0.

    Blocks are the modules that hold drop paths, in the order in which the model registers them; all drop paths of a
    block have the same rate. Where ``nn.Identity`` stands in the place of a drop path, as most libraries build it for
    a rate of 0, a drop path is put there: one of the class of the model's others, or ``droppath_ext.DropPath``. A
    converted model is planned anew where that happens, in its next training call.

    Args:
        model: Any module with drop paths, or with ``nn.Identity`` in their places.
        rate: The highest rate, in [0, 1].
        schedule: As for ``drop_path_rates``; the stages of "stagewise" are the lists or sequences that hold the blocks.

    Returns:
        A report with a row for each drop path.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: ``rate`` or ``schedule`` is not allowed, or the model has no place for a drop path.

    Early stochastic depth ("Dropout Reduces Underfitting", https://arxiv.org/abs/2303.01500): call it with a rate for
    the first epochs, and with 0 from then on; late stochastic depth is the reverse.
    """
    from .conversion import conversion_of, convert_again

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, but got {type(model).__name__}")
    places = _places(model)
    if not places:
        raise ValueError(
            "model has no drop path, and no nn.Identity in the place of one (an attribute named drop_path, say)"
        )
    blocks = list(dict.fromkeys(block for _, block in places))
    stages: dict[str, int] = {}
    for block in blocks:
        stage = block.rpartition(".")[0]
        stages[stage] = stages.get(stage, 0) + 1
    depth = list(stages.values()) if schedule == "stagewise" else len(blocks)
    rates = dict(zip(blocks, drop_path_rates(rate, depth, schedule), strict=True))
    pattern = next((module for module in model.modules() if drop_path_kind(module) is not None), None)
    conversion = conversion_of(model)
    inserted: set[nn.Module] = set()
    sites = []
    for path, block in places:
        module = model.get_submodule(path)
        if drop_path_kind(module) is None and rates[block] > 0.0:
            module = _new_drop_path(pattern)
            model.set_submodule(path, module)
            inserted.add(module)
        kind = drop_path_kind(module)
        if kind is not None:
            setattr(module, kind.rate, rates[block])
        name = type(model.get_submodule(block)).__name__
        sites.append(ConvertedSite(path, block, name, rates[block], "keep" if is_mounted(module) else "none"))
    if conversion is not None and inserted:
        return convert_again(model, conversion, inserted)
    return ConversionReport("keep" if conversion is None else conversion.residual, sites)


def _places(model: nn.Module) -> list[tuple[str, str]]:
    """The paths of all drop paths, and of what stands in the place of one; each with the path of its block."""
    places = []
    for path, module in model.named_modules():
        stands_in = type(module) is nn.Identity and NAMES.search(path.rpartition(".")[2])
        if stands_in or drop_path_kind(module) is not None:
            places.append((path, _block_of(model, path)))
    return places


def _block_of(model: nn.Module, path: str) -> str:
    """The block that a drop path belongs to: the element of the network's lists of blocks that it stands in."""
    block = path.rpartition(".")[0]
    while type(model.get_submodule(block)) in (nn.Sequential, nn.ModuleList) and block:
        block = block.rpartition(".")[0]
    numbered = re.match(r"(.*\.|)\d+(?=\.|$)", block)
    return numbered[0] if numbered else block


def _new_drop_path(pattern: nn.Module | None) -> nn.Module:
    """Like the model's other drop paths, or this project's own."""
    if pattern is None:
        return DropPath()
    module = copy.deepcopy(pattern)
    if is_mounted(module):
        unmount(module)
    return module
