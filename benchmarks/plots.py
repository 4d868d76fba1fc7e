"""From the results, a JSON dict, to PNG pictures. Every number in a picture stands in the file."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from overhead import DOUBLE
from peers import COMPILED, OURS
from report import activation_label, peer_names, subtitle
from workloads import COMPILED_SUFFIX, NO_DROP_PATH, REST

COLOURS = {
    OURS: "#c2410c",
    COMPILED[OURS]: "#f59e0b",
    "timm": "#1d4ed8",
    COMPILED["timm"]: "#7dabf5",
    "torchvision": "#15803d",
    "floor formula": "#7e22ce",
    DOUBLE: "#6b7280",
}
SKIP_COLOURS = {
    NO_DROP_PATH: "black",
    "timm": COLOURS["timm"],
    "DINOv2": "#15803d",
    "x[idx]": "#7e22ce",
    f"{OURS} bernoulli": COLOURS[OURS],
    f"{OURS} fixed": COLOURS[COMPILED[OURS]],
    "ideal": "#6b7280",
}
ROOF = "#6b7280"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}


def _by(key: str, rows: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    return ((value, list(group)) for value, group in groupby(rows, key=lambda row: row[key]))


def _throughput_panel(ax: Axes, rows: list[dict], top: float) -> None:
    rows = sorted(rows, key=lambda row: row["tensor_bytes"])
    mib = [row["tensor_bytes"] / 2**20 for row in rows]
    roof = [row["copy_gb_per_s"] for row in rows]
    ax.plot(mib, roof, color=ROOF, linewidth=1.5, linestyle="--", label="copy, the roofline")
    ax.fill_between(mib, roof, top, color=ROOF, alpha=0.08, linewidth=0)
    for name in ("floor formula", "torchvision", "timm", OURS):
        if name in rows[0]["times_us"]:
            gb_per_s = [row["bytes_moved"] / row["times_us"][name]["median"] / 1e3 for row in rows]
            width = 2.2 if name == OURS else 1.2
            ax.plot(mib, gb_per_s, color=COLOURS[name], linewidth=width, marker="o", markersize=4, label=name)
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")


def throughput(results: dict, op: str, rows: list[dict]) -> Figure:
    """GB/s over the size of the tensor, one row of panels for each dtype, one column for each pass."""
    groups = list(_by("dtype", rows))
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    shape = (len(groups), len(passes))
    size = (5 * shape[1], 3 * shape[0] + 1.2)
    fig, axes = plt.subplots(*shape, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    top = 2 * max(row["copy_gb_per_s"] for row in rows)
    for line, (dtype, group) in zip(axes, groups, strict=True):
        for ax, pass_name in zip(line, passes, strict=True):
            _throughput_panel(ax, [row for row in group if row["pass"] == pass_name], top)
            ax.set_title(f"{dtype}, {pass_name}")
        line[0].set_ylabel("GB/s")
    for ax in axes[-1]:
        ax.set_xlabel("size of x, MiB")
    title = f"{op}, p = {rows[0]['p']}: bytes of the byte model over the time each takes (higher is better)"
    fig.suptitle(f"{title}\n{subtitle(results['environment'])}", fontsize=11)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return fig


def ratios(results: dict, op: str, dtype: str, rows: list[dict]) -> Figure:
    """Our time over each peer's as bars, one panel for each pass."""
    peers = peer_names(rows)
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    labels = list(dict.fromkeys(map(activation_label, rows)))
    height = 0.8 / len(peers)
    fig, axes = plt.subplots(1, len(passes), sharey=True, sharex=True, squeeze=False, layout="constrained")
    fig.set_size_inches(11, 0.75 * len(labels) + 1.6)
    for ax, pass_name in zip(axes[0], passes, strict=True):
        for row in (row for row in rows if row["pass"] == pass_name):
            centre = labels.index(activation_label(row))
            for i, (peer, value) in enumerate(row["ratio"].items()):
                y = centre + (i - (len(row["ratio"]) - 1) / 2) * height
                ax.barh(y, value, height=height * 0.9, color=COLOURS[peer])
                ax.text(value + 0.02, y, f"{value:.2f}", va="center", fontsize=7, bbox=LABEL_BOX)
        ax.set_axisbelow(True)
        ax.axvline(1, color="black", linewidth=1, zorder=0.9)
        ax.set(title=pass_name, xlabel="our time ÷ the peer's (below 1: ours is faster)")
        ax.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()
    title = f"{op}, {dtype}, p = {rows[0]['p']}: time of {OURS} relative to each peer"
    fig.suptitle(f"{title}\n{subtitle(results['environment'])}", fontsize=11)
    handles = [Patch(color=COLOURS[peer], label=peer) for peer in peers]
    fig.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return fig


def overhead(results: dict) -> Figure:
    """Host microseconds a call, one row of panels for each op, one column for each pass."""
    groups = list(_by("op", results["overhead"]))
    passes = list(dict.fromkeys(row["pass"] for row in results["overhead"]))
    shape = (len(groups), len(passes))
    size = (11, 2.6 * shape[0] + 0.6)
    fig, axes = plt.subplots(*shape, figsize=size, sharey="row", squeeze=False, layout="constrained")
    for line, (op, rows) in zip(axes, groups, strict=True):
        for ax, row in zip(line, rows, strict=True):
            names = list(row["times_us"])
            medians = [row["times_us"][name]["median"] for name in names]
            ax.set_axisbelow(True)
            ax.barh(names, medians, color=[COLOURS.get(name, COLOURS[OURS]) for name in names])
            for y, value in enumerate(medians):
                ax.text(value, y, f" {value:.1f}", va="center", fontsize=8)
            ax.set(title=row["pass"], xlabel="µs a call", xlim=(0, max(medians) * 1.15))
            ax.grid(axis="y", visible=False)
        line[0].invert_yaxis()
        line[0].set_ylabel(op, fontweight="bold")
    fig.suptitle(f"Host time of a call on a tiny tensor, one thread\n{subtitle(results['environment'])}", fontsize=11)
    return fig


def _skip_panel(ax: Axes, rows: list[dict], suffix: str) -> None:
    for name in [f"ideal{suffix}", *_skip_names(rows, suffix)]:
        points = [(row["p"], (row["times_us"] | row["ideal_us"]).get(name)) for row in rows]
        points = [(p, time_us["median"] / 1e3) for p, time_us in points if time_us]
        base = name.removesuffix(COMPILED_SUFFIX)
        line = {"linewidth": 2.2} if base.startswith(OURS) else {"linewidth": 1.2}
        line |= {"linestyle": "--", "marker": "_"} if base == "ideal" else {"marker": "o", "markersize": 4}
        ax.plot(*zip(*points, strict=True), color=SKIP_COLOURS[base], label=base, **line)


def _skip_names(rows: list[dict], suffix: str) -> list[str]:
    """The eager or the compiled contestants of these rows, less the models without blocks."""
    names = dict.fromkeys(name for row in rows for name in row["times_us"])
    return [
        name
        for name in names
        if name.endswith(COMPILED_SUFFIX) == bool(suffix) and name.removesuffix(COMPILED_SUFFIX) != REST
    ]


def skip(results: dict) -> Figure:
    """Time of a training step over p, one column of panels for each model, one row for eager and one for compiled."""
    groups = list(_by("model", results["skip"]))
    suffixes = [suffix for suffix in ("", COMPILED_SUFFIX) if _skip_names(results["skip"], suffix)]
    shape = (len(suffixes), len(groups))
    size = (max(7.0, 4.5 * shape[1]), 3.4 * shape[0] + 1.4)
    fig, axes = plt.subplots(*shape, figsize=size, sharex=True, sharey="col", squeeze=False, layout="constrained")
    for line, suffix in zip(axes, suffixes, strict=True):
        for ax, (model, rows) in zip(line, groups, strict=True):
            _skip_panel(ax, rows, suffix)
            ax.set_title(f"{model}, {rows[0]['image_side']} px, batch {rows[0]['batch']}{suffix and ', compiled'}")
        line[0].set_ylabel("ms a step")
    for ax in axes.flat:
        ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel("drop_prob p")
    title = "A training step over drop_prob (lower is better)"
    fig.suptitle(f"{title}\n{subtitle(results['environment'])}", fontsize=11)
    labelled = {
        label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    fig.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4, frameon=False)
    return fig


def draw(results: dict, folder: Path) -> list[Path]:
    """Writes one PNG for each picture that the results have numbers for."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.rc_context(STYLE):
        figures: dict[str, Figure] = {}
        for op, rows in _by("op", results.get("ops", [])):
            # Only the rows of the first p: that p is the one that compiled peers have, too.
            first = [row for row in rows if row["p"] == rows[0]["p"]]
            figures[f"ops-throughput-{op}"] = throughput(results, op, first)
            for dtype, group in _by("dtype", first):
                figures[f"ops-ratio-{op}-{dtype}"] = ratios(results, op, dtype, group)
        if results.get("overhead"):
            figures["overhead"] = overhead(results)
        if results.get("skip"):
            figures["skip"] = skip(results)
        for name, figure in figures.items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
            plt.close(figure)
    return paths
