"""A training step of models as they are, and of the same brought to each level of convert()."""

import copy
import math
from collections.abc import Collection, Sequence
from functools import partial
from unittest import mock

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from training import Trainer, as_named, autocast, compare, create, describe, photographs, with_references
from workloads import (
    AS_IS,
    COMPILED_SUFFIX,
    CONVERT_LEVELS,
    CONVERT_MODELS,
    NO_DROP_PATH,
    SKIP_FIXED,
    WITHOUT_BRANCHES,
    Rated,
)

from droppath_ext import convert, set_drop_path_rate
from droppath_ext.convert import ConversionReport, ConvertedSite

STEPS = 30
BUDGET_S = 70  # a model, when quick: the small ones together then take less than 20 minutes


def build(rated: Rated, device: torch.device) -> nn.Module:
    """timm's model, with the rates of its blocks."""
    model = create(rated.backbone, device, rated.rate)
    if rated.uniform:
        sites = set_drop_path_rate(model, rated.rate, "uniform").sites
        for site in sites:
            if rated.but_first and site.block == sites[0].block:
                model.get_submodule(site.path).drop_prob = 0.0
    return model


def without_branches(model: nn.Module, images: Tensor) -> ConversionReport:
    """Leaves out, in place, every branch that "skip" can skip and that is dropped at all."""
    # The generated classes import the function by this name. Classes of the same source are one, and no other
    # contestant's source skips from a rate of 1 on.
    with mock.patch("droppath_ext.functional.stochastic_depth", lambda x, *args, **kwargs: x):
        report = convert(model, "skip", example=images, min_drop_prob=1.0)
    for site in dropped_sites(report):
        model.get_submodule(site.path).drop_prob = 1.0
    return report


def dropped_sites(report: ConversionReport) -> list[ConvertedSite]:
    """The sites that "skip" can skip and that are dropped at all."""
    return [site for site in report.sites if site.level == "skip" and site.drop_prob > 0]


def weights_without_gradient(model: nn.Module, images: Tensor) -> list[nn.Parameter]:
    """The weights that nothing reads any more."""
    model(images).sum().backward()
    unused = [weight for weight in model.parameters() if weight.grad is None]
    model.zero_grad()
    return unused


def block_seconds(model: nn.Module, paths: Collection[str], images: Tensor) -> dict[str, float]:
    """How long each of these blocks takes, forward and backward, for what the model calls it with."""
    seconds = {}

    def clock(path: str, block: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0].detach().requires_grad_()

        def both_passes() -> None:
            y = block.forward(x, *args[1:], **kwargs)
            torch.autograd.grad(y.sum(), [x, *block.parameters()], allow_unused=True)

        timer = Timer("both_passes()", globals={"both_passes": both_passes}, num_threads=torch.get_num_threads())
        seconds[path] = timer.timeit(3).median

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(clock, path), with_kwargs=True) for path in paths
    ]
    with autocast(images.device):
        model(images)
    for hook in hooks:
        hook.remove()
    return seconds


def dropped_share(model: nn.Module, report: ConversionReport, images: Tensor) -> float:
    """Which share of the time of the branches that can be skipped is spent on samples that are dropped."""
    sites = dropped_sites(report)
    seconds = block_seconds(model, {site.block for site in sites}, images)
    total = sum(seconds[site.block] for site in sites)
    return sum(site.drop_prob * seconds[site.block] for site in sites) / total if sites else 0.0


def case(
    label: str,
    rated: Rated,
    device: torch.device,
    *,
    contestants: Sequence[str],
    batch: int,
    steps: int,
    budget_s: float,
) -> dict:
    """One row: copies of one model in turns."""
    model = build(rated, device)
    data = photographs(rated.backbone.side, batch, device)
    images, _ = next(data)
    trainers, reports = {}, {}
    for name in with_references(contestants, (WITHOUT_BRANCHES, NO_DROP_PATH, AS_IS)):
        base, other, unused = name.removesuffix(COMPILED_SUFFIX), copy.deepcopy(model), []
        if base == NO_DROP_PATH:
            set_drop_path_rate(other, 0.0)
        elif base == WITHOUT_BRANCHES:
            reports[name] = without_branches(other, images)
            unused = weights_without_gradient(other, images)
        elif base != AS_IS:
            sampling = "fixed" if base == SKIP_FIXED else "bernoulli"
            reports[name] = convert(other, base.split()[0], example=images, sampling=sampling)
        trainers[name] = Trainer(as_named(other, name), unused)
    dropped = dropped_share(model, reports[WITHOUT_BRANCHES], images)
    return {
        **describe(label, rated.backbone, batch, device),
        "drop_path_rate": rated.rate,
        "rates": [site.drop_prob for site in reports[WITHOUT_BRANCHES].sites],
        "dropped_share": dropped,
        "sites": {
            name: {level: report.count(level) for level in reversed(CONVERT_LEVELS)} for name, report in reports.items()
        },
        **compare(trainers, data, steps, budget_s, rest=WITHOUT_BRANCHES, dropped=dropped),
    }


def run(
    device: torch.device,
    quick: bool,
    progress: Progress,
    *,
    models: Sequence[str],
    contestants: Sequence[str],
    batch: int | None,
    steps: int | None,
) -> list[dict]:
    """One row for each model."""
    rows = []
    task = progress.add_task("convert", total=len(models))
    for name in models:
        progress.update(task, description=f"convert: {name}", refresh=True)
        rated = CONVERT_MODELS[name]
        rows.append(
            case(
                name,
                rated,
                device,
                contestants=contestants,
                batch=batch or rated.backbone.batch_on(device.type),
                steps=steps or STEPS,
                budget_s=BUDGET_S if quick and steps is None else math.inf,
            )
        )
        progress.advance(task)
    return rows
