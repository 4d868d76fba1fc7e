#!/usr/bin/env python
"""Are the masks what independent draws would be? tests/test_statistics.py asserts it, this script shows it.

python benchmarks/randomness_report.py        writes docs/figures/*.png and the tables of docs/statistics.md anew
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from randomness import (
    EXTREME,
    LAGS,
    LAYERS,
    RANKS,
    RATES,
    SEED,
    SEQUENCES,
    SOURCES,
    STREAMS,
    TESTS,
    TRAININGS,
    Values,
    correlation_p_values,
    correlations,
    count_kept,
    p_values,
    training_on_gpus,
    uniformity,
)
from scipy import special, stats

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE = re.compile(r"(?<=<!-- results -->\n).*(?=<!-- end of results -->)", re.DOTALL)

SHADES = ("#7dabf5", "#1d4ed8", "#172554")  # of the rates
INK, CHANCE = "#c2410c", "#6b7280"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}


def draw_p_values(values: dict[tuple[str, str, float], Values]) -> Figure:
    """Share of the p-values below each level less the level itself: a line for each source, a panel for each test."""
    fig, axes = plt.subplots(1, len(TESTS), figsize=(13, 3.1), sharex=True, sharey=True, layout="constrained")
    count = SEQUENCES + 1
    bound = stats.kstwo.ppf(0.99, count)
    for ax, test in zip(axes, TESTS, strict=True):
        ax.axhspan(-bound, bound, color=CHANCE, alpha=0.12, linewidth=0, label="99 % of random lines stay inside")
        for source in SOURCES:
            for drop_prob, colour in zip(RATES, SHADES, strict=True):
                level = np.sort(values[source, test, drop_prob])
                share = np.arange(1, count + 1) / count
                label = f"p = {drop_prob}" if source == next(iter(SOURCES)) else None
                ax.plot(level, share - level, color=colour, linewidth=0.8, alpha=0.8, label=label)
        ax.set(title=test, xlabel="p-value", xlim=(0, 1), ylim=(-0.2, 0.2), xticks=(0, 0.5, 1))
        ax.xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("share below − p-value")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    fig.suptitle(f"p-values of {len(SOURCES)} sources of masks: were they uniform, every line would be flat at 0")
    return fig


def draw_correlations() -> Figure:
    """All layers of all ranks with each other; beside them what ranks that share a seed would show."""
    masks = training_on_gpus(0.5)
    shared = np.broadcast_to(masks[:1], masks.shape)
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.1), layout="constrained")
    titles = (f"seed + rank: {RANKS} ranks of {LAYERS} layers", "for comparison: one seed for all ranks")
    for ax, title, streams in zip((left, middle), titles, (masks, shared), strict=True):
        scores = correlations(STREAMS["layers × ranks"](streams), 0.5)
        np.fill_diagonal(scores, np.nan)  # a stream with itself
        image = ax.imshow(scores, cmap="RdBu_r", vmin=-5, vmax=5)
        ticks = [LAYERS * (rank + 0.5) - 0.5 for rank in range(RANKS)]
        ax.set(title=title, xticks=ticks, yticks=ticks)
        ax.set_xticks(ticks, [f"rank {rank}" for rank in range(RANKS)])
        ax.set_yticks(ticks, [f"rank {rank}" for rank in range(RANKS)], rotation=90, va="center")
        ax.tick_params(length=0)
        ax.grid(visible=False)
    fig.colorbar(image, ax=[left, middle], shrink=0.8, label="correlation, standard deviations of chance")
    scores = correlations(STREAMS["layers × ranks"](masks), 0.5)[np.triu_indices(RANKS * LAYERS, 1)]
    right.hist(
        scores,
        bins=np.arange(-4, 4.1, 0.25),
        density=True,
        color=SHADES[0],
        label=f"the {len(scores)} pairs on the left",
    )
    x = np.linspace(-4, 4, 200)
    right.plot(x, stats.norm.pdf(x), color=INK, label="chance")
    right.set(title="their distribution", xlabel="standard deviations of chance", yticks=[], ylim=(0, 0.5))
    right.legend(frameon=False, loc="upper left", fontsize=9)
    return fig


def draw_frequency(draws: int) -> Figure:
    """How far the kept are from what was to be expected, from a rate of 2⁻²⁴ to one of 1 - 2⁻²⁴."""
    powers = [EXTREME, 2.0**-20, 2.0**-16, 2.0**-12, 2.0**-8]
    rates = [*powers, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, *(1 - power for power in reversed(powers))]
    kept = {rate: count_kept(rate, draws, SEED + i) for i, rate in enumerate(rates)}
    scores = [(kept[p] - draws * (1 - p)) / np.sqrt(draws * p * (1 - p)) for p in rates]
    fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
    for bound, shade in ((stats.norm.ppf(0.995), 0.12), (stats.norm.ppf(0.975), 0.12)):
        ax.axhspan(-bound, bound, color=CHANCE, alpha=shade, linewidth=0)
    ax.axhline(0, color=CHANCE, linewidth=1)
    ax.plot(special.logit(rates), scores, color=SHADES[1], marker="o", linestyle="none")
    for rate, score, side in ((rates[0], scores[0], "left"), (rates[-1], scores[-1], "right")):
        rare, what = (draws - kept[rate], "dropped") if rate < 0.5 else (kept[rate], "kept")
        text = f"{rare} {what},\n{draws * EXTREME:.0f} expected"
        offset = (8 if side == "left" else -8, 12 if score > 0 else -30)
        ax.annotate(text, (special.logit(rate), score), offset, textcoords="offset points", ha=side, fontsize=9)
    names = {2.0**-k: f"2$^{{-{k}}}$" for k in (24, 16, 8)} | {0.1: "0.1", 0.5: "0.5", 0.9: "0.9"}
    names |= {1 - 2.0**-k: f"1−2$^{{-{k}}}$" for k in (8, 16, 24)}
    ax.set_xticks(special.logit(list(names)), names.values())
    ax.set(xlabel="drop_prob p", ylabel="standard deviations", ylim=(-4, 4))
    ax.set_title(f"kept samples of 2$^{{{draws.bit_length() - 1}}}$ less those expected; shaded: 95 and 99 % of chance")
    return fig


def table(values: dict[tuple[str, str, float], Values]) -> str:
    """Markdown: of each source and test the p-values of uniformity at the three rates."""
    lines = [f"| masks | {' | '.join(TESTS)} |", f"| :-- |{' :-: |' * len(TESTS)}"]
    for source in SOURCES:
        cells = [", ".join(f"{uniformity(values[source, test, p])[0]:.2g}" for p in RATES) for test in TESTS]
        lines.append(f"| {source} | {' | '.join(cells)} |")
    lines += ["", f"| correlation, lag | {' | '.join(map(str, LAGS))} |", f"| :-- |{' :-: |' * len(LAGS)}"]
    for device, training in TRAININGS.items():
        masks = {p: training(p) for p in RATES}
        for name, streams in STREAMS.items():
            cells = []
            for lag in LAGS:
                of_rates = (correlation_p_values(streams(masks[p]), 1 - p, lag) for p in RATES)
                cells.append(", ".join(f"{uniformity(of_rate)[0]:.2g}" for of_rate in of_rates))
            lines.append(f"| {name}, {device} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    values = {}
    for source, draw in SOURCES.items():
        for drop_prob in RATES:
            masks = draw(drop_prob)
            for test in TESTS:
                values[source, test, drop_prob] = p_values(test, masks, 1 - drop_prob)
    folder = DOCS / "figures"
    folder.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        figures = {
            "p-values": draw_p_values(values),
            "correlation": draw_correlations(),
            "frequency": draw_frequency(2**28),
        }
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=120)
            print(folder / f"{name}.png")
    page = DOCS / "statistics.md"
    text = page.read_text()
    page.write_text(TABLE.sub(lambda _: table(values), text))
    print(page)


if __name__ == "__main__":
    main()
