"""Convert a timm Vision Transformer and see that it learns the same.

Trains a small one on scikit-learn's handwritten digits (1,797 real images of 8x8 pixels), several times as timm has
built it and as often at each level of `convert`: keep, fuse and skip. Two checks follow:

1. All give the same test accuracy, as far as the spread between the runs can tell.
2. On one trained network, dropping leaves the same share of the logits. No training lies in between, so this check is
   far sharper: it also sees a missing scale or a wrong keep rate, which a network this small learns to live with.

Run:  python examples/train_digits.py [--epochs 12] [--seeds 3]
The exit status is 1, with one sentence saying why, if a check fails. Takes about two minutes on two CPU cores. The
network is far too small to become faster by skipping: what it costs to skip is as much as its branches do.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer

from droppath_ext import convert, restore

BATCH, LR, DROP_PATH_RATE, PASSES = 64, 3e-3, 0.2, 30
IMPLEMENTATIONS = ("timm", "keep", "fuse", "skip")


def bring(model: VisionTransformer, implementation: str, example: torch.Tensor) -> None:
    """The model as timm has built it, or at a level of ``convert``."""
    if implementation == "timm":
        restore(model)
    else:
        convert(model, implementation, example=example, strict=True, min_drop_prob=0.0)


def train(seed: int, implementation: str, epochs: int, images: torch.Tensor, labels: torch.Tensor) -> VisionTransformer:
    torch.manual_seed(seed)  # the same initial weights and, below, the same batches for all implementations
    order = torch.Generator().manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, drop_path_rate=DROP_PATH_RATE,
        embed_dim=64, depth=6, num_heads=4, mlp_ratio=2,
    )  # fmt: skip
    bring(model, implementation, images[:BATCH])
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs * (len(images) // BATCH))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def accuracy(model: VisionTransformer, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


@torch.no_grad()
def logits_left(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """What dropping leaves of the logits in eval mode (1 = all), in PASSES passes that each draw their own masks."""
    full = model.eval()(images)
    model.train()
    return torch.stack([(model(images) * full).sum() / full.square().sum() for _ in range(PASSES)]).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3, help="runs per implementation, at least 2 (default 3)")
    args = parser.parse_args()
    if args.epochs < 1 or args.seeds < 2:
        parser.error("--epochs must be at least 1 and --seeds at least 2, so that there is a spread to compare with")

    torch.set_num_threads(1)  # tensors this small are quicker on one thread, much quicker where others compute too
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # 0..16 -> -1..1
    labels = torch.tensor(digits)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.5, stratify=digits, random_state=0)

    console, accuracies, models, seconds = Console(), {}, {}, {}
    for name in IMPLEMENTATIONS:
        with console.status(f"training with {name}"):
            begin = time.perf_counter()
            models[name] = [train(seed, name, args.epochs, train_x, train_y) for seed in range(args.seeds)]
            seconds[name] = (time.perf_counter() - begin) / args.seeds / args.epochs
            accuracies[name] = torch.tensor([accuracy(model, test_x, test_y) for model in models[name]])
    left = {}
    for name in IMPLEMENTATIONS:
        with console.status(f"dropping with {name}"):
            for model in models["timm"]:
                bring(model, name, test_x[:BATCH])
            left[name] = torch.stack([logits_left(model, test_x) for model in models["timm"]])  # [seeds, PASSES]

    table = Table("level", "test accuracy", "each run", "logits left", "seconds an epoch")
    for name, acc in accuracies.items():
        each = ", ".join(f"{100 * a:.2f}" for a in acc.tolist())
        mean = f"{100 * acc.mean():.2f} ± {100 * acc.std():.2f} %"
        table.add_row(name, mean, each, f"{left[name].mean():.4f}", f"{seconds[name]:.2f}")
    console.print(table)

    for name in IMPLEMENTATIONS[1:]:
        check(console, name, [accuracies["timm"], accuracies[name]], [left["timm"], left[name]], len(test_y))


def check(console: Console, name: str, accuracies: list[torch.Tensor], left: list[torch.Tensor], images: int) -> None:
    """Hold a level against timm: accuracies of the runs, [seeds], and what was left of the logits, [seeds, PASSES]."""
    # Check 1: Welch's t test at 1 %. The std of so few runs can be tiny by luck, so a run's variance counts as no less
    # than a(1-a)/n: what n test images, each right with probability a, would give. Paired runs share weights, batches
    # and test images, hence this errs towards tolerance; check 2 makes up for it.
    seeds = len(accuracies[0])
    floors = [(acc.mean() * (1 - acc.mean())).item() / images for acc in accuracies]
    variances = [max(acc.var().item(), floor) for acc, floor in zip(accuracies, floors, strict=True)]
    acc_gap = abs(accuracies[0].mean() - accuracies[1].mean()).item()
    acc_bound = student_t.ppf(0.995, df=2 * seeds - 2) * (sum(variances) / seeds) ** 0.5
    # Check 2: a mean of this many independent passes is close to normal, beyond 4 standard errors once in 16,000 times.
    variances = [x.var(dim=1).sum().item() / PASSES for x in left]
    left_gap = abs(left[0].mean() - left[1].mean()).item()
    left_bound = 4 * sum(variances) ** 0.5 / seeds
    console.print(
        f"{name}: accuracy {100 * acc_gap:.2f} points from timm's, the spread explains up to {100 * acc_bound:.2f}; "
        f"logits left {left_gap:.4f} from timm's, the spread explains up to {left_bound:.4f}"
    )
    if not acc_gap <= acc_bound:  # written so that NaN fails
        raise SystemExit(f"{name}: the test accuracies differ by more than the spread between runs explains.")
    if not left_gap <= left_bound:
        raise SystemExit(f"{name}: what dropping leaves of the logits differs by more than the spread explains.")


if __name__ == "__main__":
    main()
