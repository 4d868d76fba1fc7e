"""A training step of models that compute their residual branches for the kept samples alone, over drop_prob."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from peers import OURS
from rich.progress import Progress
from timm.layers import DropPath
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from training import Trainer, as_named, compare, create, describe, photographs, with_references
from workloads import BACKBONES, COMPILED_SUFFIX, NO_DROP_PATH, REST, Backbone

from droppath_ext import stochastic_depth

AT_ZERO = f"{OURS} bernoulli"  # all that is left to compare where nothing is dropped: the fused end of the branch
BUDGET_S = 6  # a model and p, when quick: a busy machine then makes fewer steps

Branch = Callable[[Tensor], Tensor]
Combine = Callable[
    [Tensor, Branch, Tensor | None, float], Tensor
]  # (x, branch, gamma, p): x + drop_path(gamma * branch(x))


def dinov2(x: Tensor, branch: Branch, gamma: Tensor | None, p: float) -> Tensor:
    """DINOv2's published algorithm: a subset of fixed size, rounded down, from a permutation drawn on the device."""
    size = x.shape[0]
    count = max(int(size * (1 - p)), 1)
    subset = torch.randperm(size, device=x.device)[:count]
    y = branch(x[subset])
    y = (y if gamma is None else y * gamma).flatten(1).to(x.dtype)
    return torch.index_add(x.flatten(1), 0, subset, y, alpha=size / count).view_as(x)


def indexed(x: Tensor, branch: Branch, gamma: Tensor | None, p: float) -> Tensor:
    """The obvious lines of PyTorch; the mask is drawn on the host."""
    kept = (torch.rand(x.shape[0]) >= p).nonzero().squeeze(1).to(x.device)
    y = branch(x[kept])
    y = y if gamma is None else y * gamma
    return torch.index_add(x, 0, kept, y.to(x.dtype), alpha=1 / (1 - p))


def ours(x: Tensor, branch: Branch, gamma: Tensor | None, p: float, sampling: str) -> Tensor:
    return stochastic_depth(x, branch, p, True, gamma=gamma, sampling=sampling)


class Residual(nn.Module):
    """One residual branch of a timm block, out of the block's own modules, and how it is combined with x."""

    def __init__(
        self, combine: Combine, p: float, layers: Sequence[nn.Module], gamma: nn.Parameter | None, *ones: int
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(*layers)
        self.gamma = gamma
        self.ones = ones  # behind the channels in the shape of a sample: two for an image
        self.combine, self.p = combine, p

    def forward(self, x: Tensor) -> Tensor:
        gamma = None if self.gamma is None else self.gamma.view(-1, *self.ones)
        return self.combine(x, self.branch, gamma, self.p)


class Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


def combined(combine: Combine, block: nn.Module, p: float) -> nn.Module:
    """timm's block with both, or ConvNeXt's only, residual branch left to `combine`."""
    if isinstance(block, ConvNeXtBlock):
        layers = (block.conv_dw, Permute(0, 2, 3, 1), block.norm, block.mlp, Permute(0, 3, 1, 2))
        return Residual(combine, p, layers, block.gamma, 1, 1)
    return nn.Sequential(
        Residual(combine, p, (block.norm1, block.attn), getattr(block.ls1, "gamma", None)),
        Residual(combine, p, (block.norm2, block.mlp), getattr(block.ls2, "gamma", None)),
    )


def with_drop_path(block: nn.Module, p: float) -> nn.Module:
    """timm's own block. A model built with drop_path_rate has no DropPath in its first block, whose rate is 0."""
    for name in ("drop_path", "drop_path1", "drop_path2"):
        if hasattr(block, name):
            setattr(block, name, DropPath(p))
    return block


# What becomes of each block of the model, which timm built without drop path.
BLOCKS: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    REST: lambda block, p: nn.Identity(),
    NO_DROP_PATH: lambda block, p: block,
    "timm": with_drop_path,
    "DINOv2": partial(combined, dinov2),
    "x[idx]": partial(combined, indexed),
    f"{OURS} bernoulli": partial(combined, partial(ours, sampling="bernoulli")),
    f"{OURS} fixed": partial(combined, partial(ours, sampling="fixed")),
}


def trainer(model: nn.Module, name: str, p: float) -> Trainer:
    """Trains a copy of the model as the contestant of this name has it."""
    model = copy.deepcopy(model)
    weights = list(model.parameters())
    base = name.removesuffix(COMPILED_SUFFIX)
    for parent in list(model.modules()):
        for child, block in list(parent.named_children()):
            if isinstance(block, Block | ConvNeXtBlock):
                setattr(parent, child, BLOCKS[base](block, p))
    left = set(model.parameters())
    return Trainer(as_named(model, name), [weight for weight in weights if weight not in left])


def case(
    label: str,
    backbone: Backbone,
    p: float,
    device: torch.device,
    *,
    contestants: Sequence[str],
    batch: int,
    steps: int,
    budget_s: float,
) -> dict:
    """One row: copies of one model in turns."""
    if p == 0:
        contestants = [name for name in contestants if name.removesuffix(COMPILED_SUFFIX) == AT_ZERO]
    model = create(backbone, device)
    trainers = {name: trainer(model, name, p) for name in with_references(contestants, (REST, NO_DROP_PATH))}
    data = photographs(backbone.side, batch, device)
    return {
        **describe(label, backbone, batch, device),
        "p": p,
        **compare(trainers, data, steps, budget_s, rest=REST, dropped=p),
    }


def run(
    device: torch.device,
    quick: bool,
    progress: Progress,
    *,
    models: Sequence[str],
    ps: Sequence[float],
    contestants: Sequence[str],
    batch: int | None,
    steps: int | None,
) -> list[dict]:
    """One row for each model and p."""
    rows = []
    cases = list(product(models, ps))
    task = progress.add_task("skip", total=len(cases))
    for name, p in cases:
        progress.update(task, description=f"skip: {name} p={p}", refresh=True)
        backbone = BACKBONES[name]
        rows.append(
            case(
                name,
                backbone,
                p,
                device,
                contestants=contestants,
                batch=batch or backbone.batch_on(device.type),
                steps=steps or (20 if quick else 30 if device.type == "cuda" else 10),
                budget_s=BUDGET_S if quick and steps is None else math.inf,
            )
        )
        progress.advance(task)
    return rows
