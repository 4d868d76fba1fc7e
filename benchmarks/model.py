"""A training step of whole models on real photographs: timm as it is against timm under `patch_timm()`."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from peers import OURS
from rich.progress import Progress
from timing import ratio, summary
from torch import Tensor, nn

from droppath_ext import patch_timm

DROP_PATH_RATE = 0.3
WARMUP_STEPS = 3  # trained, and in the losses, but not in the times
BUDGET_S = 15  # a model, when quick: a busy machine then makes fewer steps, 5 at least

# name in timm, side of the image, further arguments of timm.create_model
FULL = (("vit_small_patch16_224", 224, {}), ("convnext_tiny", 224, {}))
QUICK = (("vit_tiny_patch16_224", 96, {"img_size": 96}), ("convnext_atto", 96, {}))


def photographs(side: int, batch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of random crops and flips of scikit-learn's two photographs; the label says which of the two."""
    from sklearn.datasets import load_sample_images
    from torchvision.transforms import v2

    photos = [torch.tensor(image, device=device).permute(2, 0, 1) for image in load_sample_images().images]
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=(0.1, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    while True:
        labels = torch.randint(len(photos), (batch,))
        yield torch.stack([augment(photos[i]) for i in labels]), labels.to(device)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One step, in bfloat16 on CUDA; reading the loss at the end also waits for the device."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def compare(name: str, side: int, arguments: dict, device: torch.device, quick: bool) -> dict:
    """Trains two copies of a model in turns, both on the same batches, and times every step."""
    import timm

    batch = 16 if quick else 128 if device.type == "cuda" else 32
    steps = 20 if quick else 50 if device.type == "cuda" else 15
    deadline = time.perf_counter() + (BUDGET_S if quick else math.inf)
    model = timm.create_model(name, num_classes=2, drop_path_rate=DROP_PATH_RATE, **arguments).to(device).train()
    # timm looks its function up at every call, so the patch reaches a model that exists already.
    contexts = {"timm": nullcontext, OURS: patch_timm}
    models = {"timm": model, OURS: copy.deepcopy(model)}
    optimizers = {key: torch.optim.AdamW(m.parameters(), lr=1e-4) for key, m in models.items()}
    times_us: dict[str, list[float]] = {key: [] for key in models}
    losses: dict[str, list[float]] = {key: [] for key in models}
    data = photographs(side, batch, device)
    for step in range(WARMUP_STEPS + steps):
        if step >= WARMUP_STEPS + 5 and time.perf_counter() > deadline:
            break
        images, labels = next(data)
        for key in list(models)[:: 1 if step % 2 else -1]:
            with contexts[key]():
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                losses[key].append(training_step(models[key], optimizers[key], images, labels))
                if step >= WARMUP_STEPS:
                    times_us[key].append((time.perf_counter() - start) * 1e6)
    return {
        "model": name,
        "batch": batch,
        "image_side": side,
        "drop_path_rate": DROP_PATH_RATE,
        "autocast": "bfloat16" if device.type == "cuda" else None,
        "times_us": {key: summary(values) for key, values in times_us.items()},
        "ratio": {"timm": ratio(times_us[OURS], times_us["timm"])},
        "losses": losses,
    }


def run(device: torch.device, quick: bool, progress: Progress) -> list[dict]:
    """One row for each model."""
    rows = []
    models = QUICK if quick else FULL
    task = progress.add_task("model", total=len(models))
    for name, side, arguments in models:
        progress.update(task, description=f"model: {name}", refresh=True)
        rows.append(compare(name, side, arguments, device, quick))
        progress.advance(task)
    return rows
