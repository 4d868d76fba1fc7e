"""What convert() does to every family of timm, torchvision, transformers, MONAI and mmpretrain: `make test-all-models`.

    python tests/all_models.py [--library NAME] [--family NAME] [--count-only] [--markdown FILE]

Families are found in the libraries themselves (model_zoo.py). Of each, one model is

- built on the meta device, converted to "skip" and counted by the calls of drop paths in one training forward: what may
  be skipped is judged by structure alone there;
- run on small images on the CPU, and one block of each form is compared with itself as converted to "keep", "fuse" and
  "skip", in float64 and given the same masks (block_equality.py).

The exit status is 1 if a library falls below its bounds, if a call is left without a reason, or if a block computes
something else.
"""

import argparse
import collections
import gc
import importlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import torch
from block_equality import TOLERANCE, Call, Comparison, compare, distinct_blocks, recorded_calls
from model_zoo import LIBRARIES, Candidate, Example
from torch import nn

from droppath_ext.convert import ConversionReport, convert

LEVELS = ("skip", "fuse", "keep")
# The share of the calls that must be at "fuse" or above, and at "skip".
BOUNDS = {"timm": (0.97, 0.63), "torchvision": (1.0, 0.0), "transformers": (0.93, 0.75)}
SIDES = (64, 84, 128, None)  # of images for the comparison: the first that a model runs on; None is its own


@dataclass
class Row:
    """A family whose drop paths are called."""

    family: str
    model: str
    report: ConversionReport
    compared: int = 0  # blocks
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the comparison shows beside


def measure(candidate: Candidate) -> Row:
    """The coverage."""
    _, _, report = _converted(candidate, None)
    return Row(candidate.family, candidate.name, report)


def _converted(candidate: Candidate, side: int | None) -> tuple[nn.Module, Example, ConversionReport]:
    """On the meta device; on the CPU if the forward asks for values, as that of grounding_dino does."""
    try:
        return _converted_on("meta", candidate, side)
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
        return _converted_on("cpu", candidate, side)


def _converted_on(device: str, candidate: Candidate, side: int | None) -> tuple[nn.Module, Example, ConversionReport]:
    with torch.device(device):
        model, example = candidate.build(side)
        model.train()
        model.to(device)  # some tensors are made without regard to the default device
        return model, example, convert(model, "skip", example=example, min_drop_prob=0.0)


def compare_blocks(candidate: Candidate, row: Row) -> None:
    """The comparison, on the CPU."""
    try:
        calls = list(_blocks(candidate))
    except Exception as error:
        row.faults.append(f"its blocks were not compared: {_first_line(error)}")
        return
    for call, levels in calls:
        where = f"{call.path} ({type(call.module).__name__})"
        try:
            found = compare(call)
        except Exception as error:
            found = Comparison([_first_line(error)])
        row.compared += 1
        row.faults += [f"{where}: {fault}" for fault in found.faults]
        lower = {
            f"{where}: {site.level}, not {level}: {site.why}"
            for site, level in zip(found.sites, levels, strict=False)
            if LEVELS.index(site.level) > LEVELS.index(level)
        }
        row.notes += sorted(lower)
        if found.tolerance != TOLERANCE:
            row.notes.append(f"{where}: computes in float32, and is compared to {found.tolerance:.0e}")


def _blocks(candidate: Candidate) -> Iterator[tuple[Call, list[str]]]:
    """One call of a block of each form, and the levels of its drop paths by structure."""
    for side in SIDES:
        try:
            model, example, report = _converted(candidate, side)
            paths = distinct_blocks(model, report, example)
            model, example = candidate.build(side)
            calls = recorded_calls(model, example, paths)
        except Exception:
            if side is None:
                raise
        else:
            for call in calls:
                yield call, [site.level for site in report.sites if site.block == call.path]
            return


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"


def measure_library(library: str, family: str | None, count_only: bool) -> tuple[list[Row], list[str]]:
    """A row for each family whose drop paths are called; and which could not be run, with the reason."""
    rows: dict[str, Row] = {}
    failures: dict[str, str] = {}
    for candidate in LIBRARIES[library]():
        name = candidate.family
        if family not in (None, name) or name in rows:
            continue
        try:
            row = measure(candidate)
        except Exception as error:
            failures.setdefault(name, f"{candidate.name}: {_first_line(error)}")
            continue
        if not row.report.sites:
            continue
        rows[name] = row
        if not count_only:
            compare_blocks(candidate, row)
            gc.collect()  # modules refer to themselves
        counts = ", ".join(f"{row.report.count(level)} {level}" for level in LEVELS if row.report.count(level))
        print(f"{library:12} {name:30} {row.model:36} {counts}; {row.compared} blocks compared", flush=True)
        for line in (*row.faults, *row.notes):
            print(f"    {line}", flush=True)
    return list(rows.values()), [f"{name}: {why}" for name, why in failures.items() if name not in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, help="only this one; default: all that are installed")
    parser.add_argument("--family", help="only this one of its families; no bounds then")
    parser.add_argument("--count-only", action="store_true", help="compare no blocks: seconds a model")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # convolutions of many groups in float64 are many small calls, at which threads wait
    lines, failed = [f"# What convert() reaches, {date.today()}", ""], False
    for library in [options.library] if options.library else LIBRARIES:
        if find_spec(library) is None:
            print(f"{library} is left out, for it is not installed")
            continue
        rows, failures = measure_library(library, options.family, options.count_only)
        sites = [site for row in rows for site in row.report.sites]
        counts = collections.Counter(site.level for site in sites)
        fused, skipped = (counts["skip"] + counts["fuse"]) / max(len(sites), 1), counts["skip"] / max(len(sites), 1)
        faults = [f"{row.family}: {fault}" for row in rows for fault in row.faults]
        summary = (
            f"{library} {importlib.import_module(library).__version__}: "
            f"{len(rows)} families and variants, {len(sites)} calls, "
            f"{100 * fused:.1f} % fused or skipped, {100 * skipped:.1f} % skipped"
        )
        if not options.count_only:
            summary += f"; {sum(row.compared for row in rows)} blocks compared, {len(faults)} differences"
        print(summary)
        lines += [f"## {summary}", "", *_table(rows), ""]
        lines += [*(f"- not run: {failure}" for failure in failures), *(f"- differs: {fault}" for fault in faults)]
        lines += [f"- note: {row.family}: {note}" for row in rows for note in row.notes] + [""]
        unexplained = [site.path for site in sites if site.level != "skip" and not site.why]
        bounds = BOUNDS.get(library, (0.0, 0.0))
        low = options.family is None and (fused < bounds[0] or skipped < bounds[1])
        if unexplained or low or faults:
            failed = True
            why = "below its bounds" if low else f"no reason for {unexplained[0]}" if unexplained else faults[0]
            print(f"{library}: FAILED, {why}")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text("\n".join(lines).rstrip() + "\n")
    return int(failed)


def _table(rows: list[Row]) -> Iterator[str]:
    yield "| family | model | skip | fuse | keep | blocks compared | why not more |"
    yield "| :-- | :-- | --: | --: | --: | --: | :-- |"
    for row in rows:
        why = "; ".join(sorted({f"{site.why} ({site.block_class})" for site in row.report.sites if site.why}))
        counts = " | ".join(str(row.report.count(level)) for level in LEVELS)
        yield f"| {row.family} | {row.model} | {counts} | {row.compared} | {why} |"


if __name__ == "__main__":
    sys.exit(main())
