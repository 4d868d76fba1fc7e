"""From the results, a JSON dict, to tables: one content, shown by rich or written as Markdown."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby, product
from pathlib import Path
from statistics import fmean

import rich.table
import torch
from peers import OURS
from rich.console import Console
from rich.markup import escape
from workloads import AS_IS, COMPILED_SUFFIX, EAGER_CONVERT_CONTESTANTS, NO_DROP_PATH, SKIP_PEERS

import droppath_ext.info


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def show(self, console: Console) -> None:
        table = rich.table.Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(escape(name), justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)

    def markdown(self) -> str:
        rule = [":--"] + ["--:"] * (len(self.header) - 1)
        lines = [self.header, rule, *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def environment(device: torch.device, quick: bool) -> dict:
    """Everything that a reader needs to judge or to repeat the numbers, without the folders of this machine."""
    versions = {name: _without_folders(value) for name, value in droppath_ext.info.versions().items()}
    for package in ("timm", "torchvision"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "quick": quick,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *map(_without_folders, sys.argv[1:])]),
        "commit": commit(),
        "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
        "versions": versions,
    }


def _without_folders(word: str) -> str:
    """`/a/b/x.json` is `x.json`, alone and as in `--json=/a/b/x.json`; a relative path stays."""
    return re.sub(r"(?<![^\s=])/([^/]+/)*", "", word)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def subtitle(env: dict) -> str:
    """Where and when the numbers were taken, in one line, for tables and plots alike."""
    # Files of before have no level.
    level = f", {env['cpu_capability']}" if env["device_type"] == "cpu" and "cpu_capability" in env else ""
    threads = f", threads: {env['threads']}" if env["device_type"] == "cpu" else ""
    warm = ", warm allocator" if env["malloc"] else ""
    return f"{env['device']}{level}{threads}{warm}, torch {env['versions']['torch']}, {env['date'][:10]}"


def activation_label(row: dict) -> str:
    """Model and shape of an ops row, with the memory format where it is not the usual one."""
    label = f"{row['activation']} {'×'.join(map(str, row['shape']))}"
    return label + " channels_last" if row["channels_last"] else label


def peer_names(rows: list[dict]) -> list[str]:
    """Every peer that any of the rows was compared with, in a fixed order."""
    return list(dict.fromkeys(name for row in rows for name in row["ratio"]))


def _spread(time_us: dict[str, float], unit_us: float) -> str:
    digits = 1 if time_us["median"] < 100 * unit_us else 0
    median, p20, p80 = (f"{time_us[key] / unit_us:.{digits}f}" for key in ("median", "p20", "p80"))
    return f"{median} ({p20}–{p80})"


def _ops(rows: list[dict]) -> Iterator[Table]:
    for (op, dtype, p), group in groupby(rows, key=lambda row: (row["op"], row["dtype"], row["p"])):
        peers = peer_names(members := list(group))
        header = ["activation", "pass", "tensor MiB", "µs (p20–p80)", "moved MiB", "GB/s", "% of copy"]
        table = Table(f"{op}, {dtype}, p = {p}", header + [f"÷ {name}" for name in peers])
        for row in members:
            table.rows.append(
                [
                    activation_label(row),
                    row["pass"].replace("forward", "fwd").replace("backward", "bwd"),
                    f"{row['tensor_bytes'] / 2**20:.3g}",
                    _spread(row["times_us"][OURS], 1),
                    f"{row['bytes_moved'] / 2**20:.3g}",
                    f"{row['gb_per_s']:.4g}",
                    f"{row['percent_of_copy']:.0f}",
                    *(f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "–" for name in peers),
                ]
            )
        yield table


def _overhead(rows: list[dict]) -> Iterator[Table]:
    for (op, baseline), group in groupby(rows, key=lambda row: (row["op"], row["baseline"])):
        members = list(group)
        header = ["call"]
        for row in members:
            header += [f"{row['pass']}, µs", "min", f"÷ {baseline}"]
        shape = "×".join(map(str, members[0]["shape"]))
        title = f"{op}: host time of a call on a tiny tensor ({shape}, {members[0]['dtype']}, one thread)"
        table = Table(title, header)
        for name in members[0]["times_us"]:
            cells = [name]
            for row in members:
                time = row["times_us"][name]
                cells += [f"{time['median']:.2f}", f"{time['min']:.2f}", f"{row['ratio'][name]:.2f}"]
            table.rows.append(cells)
        yield table


def _course(losses: list[float]) -> str:
    """Means of three steps, since the loss of one small batch says little."""
    middle = len(losses) // 2
    return " → ".join(f"{fmean(part):.3f}" for part in (losses[:3], losses[middle - 1 : middle + 2], losses[-3:]))


def _model(rows: list[dict]) -> Iterator[Table]:
    header = ["model", "batch", "timm, ms (p20–p80)", f"{OURS}, ms (p20–p80)", "÷ timm"]
    header += ["loss of timm: first, middle, last 3 steps", f"loss of {OURS}"]
    table = Table(f"A training step with drop_path_rate {rows[0]['drop_path_rate']}", header)
    for row in rows:
        table.rows.append(
            [
                f"{row['model']}, {row['image_side']} px",
                str(row["batch"]),
                *(_spread(row["times_us"][key], 1e3) for key in ("timm", OURS)),
                f"{row['ratio']['timm']:.3f}",
                *(_course(row["losses"][key]) for key in ("timm", OURS)),
            ]
        )
    yield table


MIB = 2**20


def _skip(rows: list[dict]) -> Iterator[Table]:
    for row in rows:
        peers = [peer for peer in (NO_DROP_PATH, *SKIP_PEERS) if peer in row["times_us"]]
        title = f"A training step of {row['model']}, {row['image_side']} px, batch {row['batch']}, p = {row['p']}"
        header = ["contestant", "ms (p20–p80)", "÷ ideal", *(f"÷ {peer}" for peer in peers)]
        header += ["peak MiB", "peak ÷ timm", "loss: first, middle, last 3 steps"]
        table = Table(title, header)
        for name, peak in row["peak_bytes"].items():
            timm_peak = row["peak_bytes"].get("timm")
            table.rows.append(
                [
                    name,
                    _spread(row["times_us"][name], 1e3),
                    f"{row['of_ideal'][name]:.3f}",
                    *(f"{row['ratio'][name][peer]:.3f}" if peer in row["ratio"][name] else "–" for peer in peers),
                    f"{peak / MIB:.0f}",
                    f"{peak / timm_peak:.2f}" if timm_peak else "–",
                    _course(row["losses"][name]),
                ]
            )
        for name, time_us in row["ideal_us"].items():
            table.rows.append([name, _spread(time_us, 1e3), *["–"] * (len(header) - 2)])
        yield table


def _convert(rows: list[dict]) -> Iterator[Table]:
    """Time, memory and losses: a line for each model, and another for the compiled ones."""
    names = (NO_DROP_PATH, *EAGER_CONVERT_CONTESTANTS)
    time = Table(
        f"A training step: time ÷ that of the model {AS_IS}",
        ["model", "p", f"{AS_IS}, ms (p20–p80)", *names, "ideal", "skip ÷ ideal", "sites skipped, fused, kept"],
    )
    memory = Table(f"Its peak memory ÷ that of the model {AS_IS}", ["model", f"{AS_IS}, MiB", *names])
    loss = Table("Its loss: first, middle, last 3 steps", ["model", AS_IS, *names])
    for row, suffix in product(rows, ("", COMPILED_SUFFIX)):
        base, skip, *others = (name + suffix for name in (AS_IS, "skip", *names))
        if base not in row["times_us"]:
            continue
        label = f"{row['model']}, {row['image_side']} px, batch {row['batch']}{suffix and ', compiled'}"
        ratios = {name: of_peers[base] for name, of_peers in row["ratio"].items() if base in of_peers}
        peaks = {name: peak / row["peak_bytes"][base] for name, peak in row["peak_bytes"].items()}
        sites = {name: ", ".join(map(str, count.values())) for name, count in row["sites"].items()}
        time.rows.append(
            [
                label,
                "–".join(dict.fromkeys(f"{rate:.2g}" for rate in (min(row["rates"]), max(row["rates"])))),
                _spread(row["times_us"][base], 1e3),
                *(f"{ratios[name]:.3f}" if name in ratios else "–" for name in others),
                f"{1 / row['of_ideal'][base]:.3f}",
                f"{row['of_ideal'][skip]:.3f}" if skip in row["of_ideal"] else "–",
                sites.get(skip, "–"),
            ]
        )
        memory.rows.append(
            [
                label,
                f"{row['peak_bytes'][base] / MIB:.0f}",
                *(f"{peaks[name]:.2f}" if name in peaks else "–" for name in others),
            ]
        )
        loss.rows.append(
            [label, *(_course(row["losses"][name]) if name in row["losses"] else "–" for name in (base, *others))]
        )
    yield from (time, memory, loss)


def tables(results: dict) -> list[Table]:
    """The tables of every part that the results hold. `÷ peer`: our time over the peer's, so below 1 is faster."""
    parts = (("ops", _ops), ("overhead", _overhead), ("model", _model), ("skip", _skip), ("convert", _convert))
    return [table for key, build in parts if results.get(key) for table in build(results[key])]
