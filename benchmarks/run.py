#!/usr/bin/env python
"""The benchmark of droppath_ext.

    python benchmarks/run.py                                   everything, sized for the device
    python benchmarks/run.py ops --op drop_path_add --p 0.1,0.4 --json FILE
    python benchmarks/run.py convert --json FILE               whole models, 20 minutes on 2 cores
    python benchmarks/run.py plot FILE --plot DIR              pictures from a result file
    python benchmarks/run.py table FILE --p 0.1                Markdown tables from a result file

What is measured, and how: benchmarks/README.md.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from workloads import (
    ACTIVATIONS,
    CONTESTANTS,
    CONVERT_CONTESTANTS,
    CONVERT_MODELS_OF,
    DROP_PROBS,
    DTYPES,
    EAGER_CONVERT_CONTESTANTS,
    EAGER_SKIP_CONTESTANTS,
    MODELS,
    OPS,
    QUICK_CONVERT_MODEL,
    QUICK_DROP_PROBS,
    QUICK_DTYPES,
    QUICK_SKIP_BACKBONE,
    QUICK_SKIP_DROP_PROBS,
    SKIP_BACKBONES,
    SKIP_CONTESTANTS,
    SKIP_DROP_PROBS,
)

PARTS = ("ops", "overhead", "model", "skip", "convert")
ACTIVATION_NAMES = tuple(dict.fromkeys(activation.name for activation in ACTIVATIONS))
# Options that choose rows of a part by the key of the same name.
FILTERS = {"ops": ("op", "activation", "dtype", "p"), "skip": ("model", "p"), "convert": ("model",)}


def list_of(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes some of these names, separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(choices):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is not one of {', '.join(choices)}")
        return names

    return parse


def p_list(text: str) -> list[float]:
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"every drop_prob must be a number of at least 0 and below 1, not {text}")
    return values


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least 1, not {text}")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", *PARTS, "plot", "table"), default="all")
    parser.add_argument("file", nargs="?", type=Path, help="result file, for plot and table")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    rows = parser.add_argument_group(
        "rows of ops, skip and convert, measured or read from FILE; default: what --quick or --full takes"
    )
    for option, choices_of in (
        ("--op", {"ops": OPS}),
        ("--activation", {"ops": ACTIVATION_NAMES}),
        ("--dtype", {"ops": DTYPES}),
        ("--model", MODELS),
        ("--contestant", {f"{part}, when measured": names for part, names in CONTESTANTS.items()}),
    ):
        one_of = "; ".join(f"{part}: of {', '.join(choices)}" for part, choices in choices_of.items())
        choices = [name for names in choices_of.values() for name in names]
        rows.add_argument(option, type=list_of(choices), action="extend", metavar="NAMES", help=one_of)
    rows.add_argument(
        "--p", type=p_list, action="extend", metavar="NUMBERS", help="drop_prob; 0, for skip only: no drop path"
    )
    rows.add_argument("--batch", type=positive, metavar="N", help="samples of every activation or model, when measured")
    rows.add_argument("--steps", type=positive, metavar="N", help="skip and convert, when measured: steps of each")
    rows.add_argument(
        "--seconds", type=positive, metavar="N", help="ops, when measured: for each measurement, however many rounds"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="under 3 minutes on 2 cores; the default on the CPU")
    size.add_argument("--full", action="store_true", help="full size on the CPU as well")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads, but for overhead; default: torch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the results into this folder")
    arguments = parser.parse_args()

    reads_file = arguments.what in ("plot", "table")
    if reads_file and arguments.file is None:
        parser.error(f"{arguments.what} needs the result file that it reads.")
    if arguments.file is not None and not reads_file:
        parser.error(f"{arguments.what} takes no file to read; --json FILE names the one to write.")
    if arguments.what == "ops" and 0 in (arguments.p or []):
        parser.error("ops has no row for --p 0: nothing is dropped there.")
    for option, choices_of in (("model", MODELS), ("contestant", CONTESTANTS)):
        named = getattr(arguments, option) or []
        if unknown := set(named) - set(choices_of.get(arguments.what, named)):
            parser.error(f"{arguments.what} has no {option} {', '.join(sorted(unknown))}.")
    if arguments.what == "plot" and arguments.plot is None:
        parser.error("plot needs --plot DIR, the folder to draw into.")
    return arguments


def read(arguments: argparse.Namespace) -> dict:
    """The results of a file, those of ops, skip and convert filtered as the command line says."""
    try:
        results = json.loads(arguments.file.read_text())
        results["environment"]
        for part, keys in FILTERS.items():
            results[part] = [
                row
                for row in results.get(part, [])
                if all(row[key] in (getattr(arguments, key) or [row[key]]) for key in keys)
            ]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{arguments.file} is not a result file of this benchmark ({type(error).__name__}: {error}).")
    return results


def chosen(named: Iterable[str] | None, choices: Iterable[str], default: Iterable[str]) -> list[str]:
    """Those of a part's choices that the command line names, or the default where it names none of them."""
    return list(dict.fromkeys([name for name in named or () if name in choices] or default))


def measure(arguments: argparse.Namespace) -> dict:
    """Runs the parts asked for, shows their tables and returns the results."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda needs a GPU and a torch built for CUDA, and torch.cuda.is_available() is False.")
    import model
    import ops
    import overhead
    import report
    from peers import LEFT_OUT

    quick = arguments.quick or (device.type == "cpu" and not arguments.full)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    # What the command line names is measured, quick or not.
    dtypes = dict.fromkeys(arguments.dtype or (QUICK_DTYPES if quick else DTYPES))
    ps = dict.fromkeys(p for p in arguments.p or (QUICK_DROP_PROBS if quick else DROP_PROBS) if p > 0)
    skip_ps = dict.fromkeys(arguments.p or (QUICK_SKIP_DROP_PROBS if quick else SKIP_DROP_PROBS))
    parts = list(PARTS if arguments.what == "all" else (arguments.what,))
    for sentence in LEFT_OUT.values():
        print(sentence)
    for part in ("model", "skip", "convert"):
        if LEFT_OUT and part in parts:
            parts.remove(part)
            print(f"The part {part} is left out, because it needs both timm and torchvision.")

    console = Console(width=None if sys.stdout.isatty() else 180)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: dict = {"environment": report.environment(device, quick)}
    # Redrawn between the cases only: a thread that redraws would take a core from the two that are timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        if "ops" in parts:
            results["ops"] = ops.run(
                device,
                quick,
                progress,
                ops=list(dict.fromkeys(arguments.op or OPS)),
                activations=arguments.activation or ACTIVATION_NAMES,
                batch=arguments.batch,
                dtypes=[getattr(torch, name) for name in dtypes],
                ps=list(ps),
                seconds=arguments.seconds,
            )
        if "overhead" in parts:
            results["overhead"] = overhead.run(device, quick, progress)
        if "model" in parts:
            results["model"] = model.run(device, quick, progress)
        if "skip" in parts:
            import skip

            default_models = [QUICK_SKIP_BACKBONE[device.type]] if quick else SKIP_BACKBONES
            default_contestants = EAGER_SKIP_CONTESTANTS if quick else SKIP_CONTESTANTS
            results["skip"] = skip.run(
                device,
                quick,
                progress,
                models=chosen(arguments.model, MODELS["skip"], default_models),
                ps=list(skip_ps),
                contestants=chosen(arguments.contestant, SKIP_CONTESTANTS, default_contestants),
                batch=arguments.batch,
                steps=arguments.steps,
            )
        if "convert" in parts:
            import convert

            one_of_all = quick and arguments.what == "all"
            default_models = [QUICK_CONVERT_MODEL[device.type]] if one_of_all else CONVERT_MODELS_OF[device.type]
            default_contestants = EAGER_CONVERT_CONTESTANTS if quick else CONVERT_CONTESTANTS
            results["convert"] = convert.run(
                device,
                quick,
                progress,
                models=chosen(arguments.model, MODELS["convert"], default_models),
                contestants=chosen(arguments.contestant, CONVERT_CONTESTANTS, default_contestants),
                batch=arguments.batch,
                steps=arguments.steps,
            )
    console.print(report.subtitle(results["environment"]))
    for table in report.tables(results):
        table.show(console)
    return results


def main() -> None:
    arguments = parse_arguments()
    try:
        import droppath_ext  # noqa: F401
    except ImportError as error:
        sys.exit(f"droppath_ext cannot be imported; `make bench` builds it, too. The reason: {error}")
    results = read(arguments) if arguments.what in ("plot", "table") else measure(arguments)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plot:
        import plots

        for path in plots.draw(results, arguments.plot):
            print(path)
    if arguments.what == "table":
        import report

        print(report.subtitle(results["environment"]) + "\n")
        print("\n".join(table.markdown() for table in report.tables(results)))


if __name__ == "__main__":
    main()
