"""A training step of whole models: timm as it is against timm under `patch_timm()`."""

import copy
import math

import torch
from peers import OURS
from rich.progress import Progress
from timing import ratio, summary
from torch import Tensor
from training import Trainer, photographs, train_in_turns

from droppath_ext import patch_timm

DROP_PATH_RATE = 0.3
BUDGET_S = 15  # a model, when quick: a busy machine then makes fewer steps

# name in timm, side of the image, further arguments of timm.create_model
FULL = (("vit_small_patch16_224", 224, {}), ("convnext_tiny", 224, {}))
QUICK = (("vit_tiny_patch16_224", 96, {"img_size": 96}), ("convnext_atto", 96, {}))


class PatchedTrainer(Trainer):
    """timm looks its function up at every call, so the patch reaches a model that exists already."""

    def __call__(self, images: Tensor, labels: Tensor) -> float:
        with patch_timm():
            return super().__call__(images, labels)


def compare(name: str, side: int, arguments: dict, device: torch.device, quick: bool) -> dict:
    """Trains two copies of a model in turns, both on the same batches, and times every step."""
    import timm

    batch = 16 if quick else 128 if device.type == "cuda" else 32
    steps = 20 if quick else 50 if device.type == "cuda" else 15
    model = timm.create_model(name, num_classes=2, drop_path_rate=DROP_PATH_RATE, **arguments).to(device).train()
    trainers = {"timm": Trainer(model), OURS: PatchedTrainer(copy.deepcopy(model))}
    data = photographs(side, batch, device)
    times_us, losses = train_in_turns(trainers, data, steps, BUDGET_S if quick else math.inf)
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
