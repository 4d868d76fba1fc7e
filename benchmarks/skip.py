"""A training step of models that compute their residual branches for the kept samples alone, over drop_prob."""

import copy
import gc
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from statistics import median

import torch
from peers import OURS
from rich.progress import Progress
from timing import ratio, summary
from timm.layers import DropPath
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from training import Trainer, photographs, train_in_turns
from workloads import BACKBONES, COMPILED_SUFFIX, NO_DROP_PATH, REST, Backbone

from droppath_ext import stochastic_depth

AT_ZERO = f"{OURS} bernoulli"  # all that is left to compare where nothing is dropped: the fused end of the branch
MEMORY_STEPS = 3
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
    for parent in list(model.modules()):
        for child, block in list(parent.named_children()):
            if isinstance(block, Block | ConvNeXtBlock):
                setattr(parent, child, BLOCKS[name.removesuffix(COMPILED_SUFFIX)](block, p))
    result = Trainer(torch.compile(model) if name.endswith(COMPILED_SUFFIX) else model)
    if name.removesuffix(COMPILED_SUFFIX) == REST:
        # AdamW updates every weight however many samples are dropped, so the rest includes the blocks' update.
        left = {id(weight) for weight in model.parameters()}
        removed = [weight for weight in weights if id(weight) not in left]
        for weight in removed:
            weight.grad = torch.randn_like(weight)
        update = torch.optim.AdamW(removed, lr=1e-4).step
        result.optimizer.register_step_post_hook(lambda *_: update())
    return result


def _rounds(times_us: dict[str, list[float]], p: float, compiled: str) -> list[float]:
    """The ideal step in each round, rest + (1 - p) * blocks, from the steps without drop path and without blocks."""
    pairs = zip(times_us[REST + compiled], times_us[NO_DROP_PATH + compiled], strict=True)
    return [rest + (1 - p) * (full - rest) for rest, full in pairs]


def compare(
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
    """Trains copies of one model in turns, all on the same batches."""
    import timm

    if p == 0:
        contestants = [name for name in contestants if name.removesuffix(COMPILED_SUFFIX) == AT_ZERO]
    suffixes = ["", COMPILED_SUFFIX] if any(name.endswith(COMPILED_SUFFIX) for name in contestants) else [""]
    names = [base + suffix for suffix in suffixes for base in (REST, NO_DROP_PATH)] + list(contestants)
    torch.compiler.reset()  # otherwise the recompile limit is met after a few models
    gc.collect()  # the models of the last case
    model = timm.create_model(backbone.timm_name, num_classes=2, **backbone.arguments).to(device).train()
    trainers = {name: trainer(model, name, p) for name in names}
    data = photographs(backbone.side, batch, device)
    times_us, losses = train_in_turns(trainers, data, steps, budget_s)
    peaks: dict[str, list[int]] = {name: [] for name in names}
    for images, labels in (next(data) for _ in range(MEMORY_STEPS)):
        for name in names:
            peaks[name].append(trainers[name].peak_bytes(images, labels))
    ideal = {suffix: _rounds(times_us, p, suffix) for suffix in suffixes}
    return {
        "model": label,
        "timm_name": backbone.timm_name,
        "arguments": dict(backbone.arguments),
        "batch": batch,
        "image_side": backbone.side,
        "p": p,
        "autocast": "bfloat16" if device.type == "cuda" else None,
        "steps": len(times_us[NO_DROP_PATH]),
        "times_us": {name: summary(values) for name, values in times_us.items()},
        "ideal_us": {f"ideal{suffix}": summary(values) for suffix, values in ideal.items()},
        "ratio": {
            name: {peer: ratio(times_us[name], times_us[peer]) for peer in names if peer not in (name, REST)}
            for name in names
        },
        "of_ideal": {
            name: ratio(times_us[name], ideal[COMPILED_SUFFIX if name.endswith(COMPILED_SUFFIX) else ""])
            for name in names
        },
        "peak_bytes": {name: median(values) for name, values in peaks.items()},
        "losses": losses,
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
            compare(
                name,
                backbone,
                p,
                device,
                contestants=contestants,
                batch=batch or (backbone.cuda_batch if device.type == "cuda" else backbone.cpu_batch),
                steps=steps or (20 if quick else 30 if device.type == "cuda" else 10),
                budget_s=BUDGET_S if quick and steps is None else math.inf,
            )
        )
        progress.advance(task)
    return rows
