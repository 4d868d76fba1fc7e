"""Convert a timm Vision Transformer and see that it learns the same.

Trains a small one on scikit-learn's handwritten digits (1,797 real images of 8x8 pixels), several times as timm has
built it and as often at each level of `convert`: keep, fuse and skip. A picture shows the loss, the test accuracy and
the time of an epoch. Two checks follow:

1. All give the same test accuracy, as far as the spread between the runs can tell.
2. On one trained network, dropping leaves the same share of the logits. No training lies in between, so this check is
   far sharper: it also sees a missing scale or a wrong keep rate, which a network this small learns to live with.

Run:  python examples/train_digits.py [--epochs 12] [--seeds 3] [--picture train_digits.png]
The exit status is 1, with one sentence saying why, if a check fails. Takes about two minutes on two CPU cores. The
network is far too small to become faster by skipping: what it costs to skip is as much as its branches do.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from droppath_ext import convert, restore

matplotlib.use("Agg")  # draw to a file, also where there is no display
import matplotlib.pyplot as plt  # noqa: E402

BATCH, LR, DROP_PATH_RATE, PASSES = 64, 3e-3, 0.2, 30
COLOURS = {"timm": "#1d4ed8", "keep": "#15803d", "fuse": "#fbbf24", "skip": "#c2410c"}
# keep, fuse and skip draw the same masks from one seed: of lines that coincide, all are to be seen.
LINES = {
    "timm": {"linewidth": 2.0, "linestyle": (0, (3, 1.5)), "zorder": 3},
    "keep": {"linewidth": 5.5},
    "fuse": {"linewidth": 3.0},
    "skip": {"linewidth": 1.2},
}
IMPLEMENTATIONS = tuple(LINES)
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
STYLE |= {"grid.alpha": 0.25, "font.size": 11}


class Data(NamedTuple):
    train_x: Tensor
    test_x: Tensor
    train_y: Tensor
    test_y: Tensor


class Epoch(NamedTuple):
    loss: float  # mean over the batches
    accuracy: float  # on the test images, behind the epoch
    seconds: float  # of training


def load() -> Data:
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # 0..16 -> -1..1
    labels = torch.tensor(digits)
    return Data(*train_test_split(images, labels, test_size=0.5, stratify=digits, random_state=0))


def bring(model: VisionTransformer, implementation: str, example: Tensor) -> None:
    """The model as timm has built it, or at a level of ``convert``."""
    if implementation == "timm":
        restore(model)
    else:
        convert(model, implementation, example=example, strict=True, min_drop_prob=0.0)


class Run:
    """One training. From the same seed all implementations have the same initial weights and batches."""

    def __init__(self, seed: int, implementation: str, epochs: int, data: Data) -> None:
        torch.manual_seed(seed)
        self.data = data
        self.batches = len(data.train_x) // BATCH
        self.order = torch.Generator().manual_seed(seed)
        self.model = VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, num_classes=10, drop_path_rate=DROP_PATH_RATE,
            embed_dim=64, depth=6, num_heads=4, mlp_ratio=2,
        )  # fmt: skip
        bring(self.model, implementation, data.train_x[:BATCH])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LR)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LR, total_steps=epochs * self.batches)
        self.random_state = torch.get_rng_state()

    def epoch(self) -> Epoch:
        torch.set_rng_state(self.random_state)  # runs take turns, and none draws what another would have
        images, labels = self.data.train_x, self.data.train_y
        self.model.train()
        losses = []
        begin = time.perf_counter()
        for batch in torch.randperm(len(images), generator=self.order).split(BATCH)[: self.batches]:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(images[batch]), labels[batch])
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - begin
        self.random_state = torch.get_rng_state()
        return Epoch(sum(losses) / self.batches, accuracy(self.model, self.data.test_x, self.data.test_y), seconds)


@torch.no_grad()
def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


@torch.no_grad()
def logits_left(model: VisionTransformer, images: Tensor) -> Tensor:
    """What dropping leaves of the logits in eval mode (1 = all), in PASSES passes that each draw their own masks."""
    full = model.eval()(images)
    model.train()
    return torch.stack([(model(images) * full).sum() / full.square().sum() for _ in range(PASSES)]).double()


def median_seconds(history: Tensor) -> float:
    return history[..., 2].median().item()


def draw(histories: Tensor, path: Path) -> None:
    """Loss, accuracy and seconds, the last dim of histories: [implementations, seeds, epochs, 3]."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
        epochs = range(1, histories.shape[2] + 1)
        for name, history in zip(IMPLEMENTATIONS, histories, strict=True):
            for axes, values in ((left, history[..., 0]), (middle, 100 * history[..., 1])):
                axes.plot(epochs, values.mean(0), color=COLOURS[name], label=name, **LINES[name])
                axes.fill_between(epochs, values.amin(0), values.amax(0), color=COLOURS[name], alpha=0.1, linewidth=0)
        left.set(title="training loss", xlabel="epoch", yscale="log")
        middle.set(title="test accuracy, %", xlabel="epoch")
        for axes in (left, middle):
            axes.xaxis.get_major_locator().set_params(integer=True)
        left.yaxis.set_major_formatter("{x:g}")
        bars = right.bar(IMPLEMENTATIONS, list(map(median_seconds, histories)), color=COLOURS.values(), width=0.6)
        right.bar_label(bars, fmt="{:.2f}", padding=3)
        right.margins(y=0.1)
        right.set(title="seconds an epoch, median")
        right.grid(axis="x", visible=False)
        right.tick_params(axis="x", length=0)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(
            f"A ViT of 6 blocks learns 8×8 digits, drop_path_rate {DROP_PATH_RATE}: "
            f"mean and range of {histories.shape[1]} seeds"
            "\nkeep, fuse and skip draw the same masks, hence their lines coincide",
            fontsize=12,
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3, help="runs per implementation, at least 2 (default 3)")
    default = Path(__file__).with_suffix(".png")
    parser.add_argument("--picture", type=Path, default=default, help="default: beside this script")
    args = parser.parse_args()
    if args.epochs < 1 or args.seeds < 2:
        parser.error("--epochs must be at least 1 and --seeds at least 2, so that there is a spread to compare with")

    torch.set_num_threads(1)  # tensors this small are quicker on one thread, much quicker where others compute too
    data, console = load(), Console()
    histories = torch.empty(len(IMPLEMENTATIONS), args.seeds, args.epochs, len(Epoch._fields))
    left: dict[str, list[Tensor]] = {name: [] for name in IMPLEMENTATIONS}
    columns = (TextColumn("{task.description:8}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    # Redrawn between the epochs only: a thread that redraws would take time from those that are timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("training", total=histories[..., 0].numel())
        for seed in range(args.seeds):
            runs = [Run(seed, name, args.epochs, data) for name in IMPLEMENTATIONS]
            for epoch in range(args.epochs):  # all take turns: what else the machine does, they share
                for history, run in zip(histories, runs, strict=True):
                    history[seed, epoch] = torch.tensor(run.epoch())
                    progress.update(task, advance=1, refresh=True)
            for name in IMPLEMENTATIONS:  # all on the network that timm's has become
                bring(runs[0].model, name, data.test_x[:BATCH])
                left[name].append(logits_left(runs[0].model, data.test_x))

    draw(histories, args.picture)
    accuracies = dict(zip(IMPLEMENTATIONS, histories[:, :, -1, 1].double(), strict=True))
    shares = {name: torch.stack(passes) for name, passes in left.items()}  # [seeds, PASSES]
    table = Table("level", "test accuracy", "each run", "logits left", "seconds an epoch")
    for (name, acc), history in zip(accuracies.items(), histories, strict=True):
        each = ", ".join(f"{100 * a:.2f}" for a in acc.tolist())
        mean = f"{100 * acc.mean():.2f} ± {100 * acc.std():.2f} %"
        table.add_row(name, mean, each, f"{shares[name].mean():.4f}", f"{median_seconds(history):.2f}")
    console.print(table)
    console.print(f"Picture: {args.picture}")

    for name in IMPLEMENTATIONS[1:]:
        check(console, name, [accuracies["timm"], accuracies[name]], [shares["timm"], shares[name]], len(data.test_y))


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
