"""DropPath seems like a Dropout? Both zero at random and scale up the rest; the picture shows what each one zeroes.

Dropout decides for every element: each sample loses some of its elements. drop_path decides once per sample: a sample
keeps all of its elements or loses them all, which switches a residual branch off for that sample.

The input is 3 samples of shape 2x2x2 that hold 1, 2, ... 24, so a number tells where it came from. With p = 0.33 what
is kept is multiplied by 1 / (1 - 0.33) = 1.49. Both calls start from the same seed.

Run:  python examples/dropout_vs_drop_path.py [picture.png]
"""

import argparse
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

from droppath_ext import drop_path

matplotlib.use("Agg")  # draw to a file, also where there is no display
import matplotlib.pyplot as plt  # noqa: E402

SEED, P = 2021, 0.33
KEPT, INK = "#8ecae6", "#1d3557"


def draw(axes: plt.Axes, title: str, out: torch.Tensor) -> None:
    """One row per sample, one cell per element: the value where it is kept, hatched where it was zeroed."""
    samples = out.flatten(1)
    rows, columns = samples.shape
    for row in range(rows):
        for column in range(columns):
            value = samples[row, column].item()
            style = {"facecolor": KEPT} if value else {"facecolor": "white", "hatch": "////"}
            axes.add_patch(plt.Rectangle((column, row), 0.92, 0.86, edgecolor=INK if value else "#b0b0b0", **style))
            if value:
                axes.text(column + 0.46, row + 0.43, f"{value:.1f}", ha="center", va="center", color=INK, fontsize=10)
    axes.set(xlim=(-0.1, columns), ylim=(rows, -0.1), aspect="equal", xticks=[])
    axes.set_yticks([row + 0.43 for row in range(rows)], [f"sample {row}" for row in range(rows)], color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, color=INK, fontsize=11)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).with_suffix(".png")
    parser.add_argument("picture", nargs="?", type=Path, default=default, help="default: beside this script")
    picture = parser.parse_args().picture

    x = torch.arange(1.0, 25.0).view(3, 2, 2, 2)
    torch.manual_seed(SEED)
    dropout_out = F.dropout(x, P, training=True)
    torch.manual_seed(SEED)
    drop_path_out = drop_path(x, P, training=True)

    torch.set_printoptions(precision=1, sci_mode=False)
    print(f"Each row is one sample of 2x2x2 elements, flattened. p = {P}, seed {SEED}.")
    for name, out in {"input": x, "dropout": dropout_out, "drop_path": drop_path_out}.items():
        print(f"\n{name}\n{out.flatten(1)}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 2.4), layout="constrained")
    draw(left, f"dropout(x, p={P}): a draw for each element", dropout_out)
    draw(right, f"drop_path(x, drop_prob={P}): a draw for each sample", drop_path_out)
    figure.supxlabel(
        "a row = one sample of 2×2×2 elements    ·    number = x / (1 − p)    ·    hatched = 0", color=INK, fontsize=10
    )
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1, wspace=0.04)  # inches: room on a dark page, too
    figure.savefig(picture, dpi=150, facecolor="white")
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
