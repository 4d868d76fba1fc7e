#!/usr/bin/env python
"""Measures the constants of the CUDA kernels that are guesses: each in builds of csrc/cuda with another value.

    python benchmarks/tune.py --json FILE --markdown FILE        on a GPU: one table, % of the copy's bandwidth
    python benchmarks/tune.py --variant "128 threads"            some of the variants
    python benchmarks/tune.py --dry-run                          on the host: every step, none of the numbers

Every variant is built beside the extension, loaded over it and held against it: a forward must give the same bits, a
sum the same to rounding. All times are taken in turns with a copy of the same tensor. A row of 100 moves what the byte
model says (README.md) as fast as the copy moves its bytes.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import native_build
import torch
from native_build import Change
from torch import Tensor

OPS = torch.ops.droppath_ext
P = 0.1
MIB = 2**20
TENSOR_BYTES = {"cuda": 74 * MIB, "cpu": 64 * 1024}  # more than any L2; on the host: a few blocks
SECONDS = {"cuda": 0.06, "cpu": 0.0}  # for each case of each variant

ADD_KEPT, GAMMA_GRAD = "csrc/cuda/add_kept.cuh", "csrc/cuda/gamma_grad.cuh"
TILING, VECTOR = "csrc/cuda/tiling.h", "csrc/cuda/vector.cuh"
LAUNCHER = "csrc/cuda/launcher.cuh"
ADD_KEPT_LAUNCHER, GAMMA_GRAD_LAUNCHER = "csrc/cuda/add_kept.cu", "csrc/cuda/gamma_grad.cu"

# Only what is measured is built: float32 and bfloat16.
TWO_DTYPES = Change(
    LAUNCHER,
    'AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "droppath_ext", [&] {'
    " body(Native<scalar_t>()); });",
    'AT_DISPATCH_SWITCH(dtype, "droppath_ext", AT_DISPATCH_CASE(at::kFloat, [&] { body(Native<scalar_t>()); })'
    " AT_DISPATCH_CASE(at::kBFloat16, [&] { body(Native<scalar_t>()); }));",
)


def vectors(alone: int, with_gamma: int, with_more: int) -> list[Change]:
    return [
        Change(ADD_KEPT_LAUNCHER, "kVectorsAlone = 4;", f"kVectorsAlone = {alone};"),
        Change(ADD_KEPT_LAUNCHER, "kVectorsWithGamma = 2;", f"kVectorsWithGamma = {with_gamma};"),
        Change(ADD_KEPT_LAUNCHER, "kVectorsWithMore = 1;", f"kVectorsWithMore = {with_more};"),
    ]


def periods_in_flight(periods: int) -> Change:
    return Change(GAMMA_GRAD, "kPeriodsInFlight = 2;", f"kPeriodsInFlight = {periods};")


def store(call: str) -> Change:
    return Change(VECTOR, "__stwb(reinterpret_cast<Word*>(to) + i, words[i]);", call)


def load(intrinsic: str) -> Change:
    """Loads in words of 16 bytes by an intrinsic, which may carry a cache hint."""
    return Change(
        VECTOR,
        "return *reinterpret_cast<const Vector<T, kWidth>*>(from);",
        "using V = Vector<T, kWidth>; if constexpr (sizeof(V) % 16 == 0) { V vector; uint4 words[sizeof(V) / 16];"
        f" for (int i = 0; i < sizeof(V) / 16; ++i) words[i] = {intrinsic}(reinterpret_cast<const uint4*>(from) + i);"
        " memcpy(&vector, words, sizeof(V)); return vector; }"
        " else { return *reinterpret_cast<const V*>(from); }",
    )


def blocks(file: str, old: str, count: int) -> Change:
    """Registers few enough for so many blocks a multiprocessor."""
    return Change(file, f"(kThreads){old}", f"(kThreads, {count}){old}")


def waves(factor: str) -> Change:
    wave = "blocks_of_a_wave(kernel, tiling.threads())"
    return Change(GAMMA_GRAD_LAUNCHER, wave, f"{wave} {factor}")


VARIANTS: dict[str, list[Change]] = {
    "as it is": [],
    "2 vectors alone": vectors(2, 2, 1),
    "8 vectors alone": vectors(8, 2, 1),
    "1 vector with vectors of gamma": vectors(4, 1, 1),
    "4 vectors with vectors of gamma": vectors(4, 4, 1),
    "2 vectors with a residual or entries of gamma": vectors(4, 2, 2),
    "128 threads": [Change(TILING, "kThreads = 256;", "kThreads = 128;")],
    "512 threads": [Change(TILING, "kThreads = 256;", "kThreads = 512;")],
    "add_kept: 8 blocks a multiprocessor": [blocks(ADD_KEPT, "\n    add_kept_kernel(", 8)],
    "gamma_grad: 1 period in flight": [periods_in_flight(1)],
    "gamma_grad: 3 periods in flight": [periods_in_flight(3)],
    "gamma_grad: 4 periods in flight": [periods_in_flight(4)],
    "gamma_grad: 3 blocks a multiprocessor": [blocks(GAMMA_GRAD, " gamma_grad_kernel(", 3)],
    "gamma_grad: 4 blocks a multiprocessor": [blocks(GAMMA_GRAD, " gamma_grad_kernel(", 4)],
    "gamma_grad: half a wave": [waves("/ 2")],
    "gamma_grad: two waves": [waves("* 2")],
    "gamma_grad: eight waves": [waves("* 8")],
    "sum_parts: 256 threads": [Change(GAMMA_GRAD, "kSumThreads = 512;", "kSumThreads = 256;")],
    "sum_parts: 1024 threads": [Change(GAMMA_GRAD, "kSumThreads = 512;", "kSumThreads = 1024;")],
    "sum_parts: 32 channels": [Change(GAMMA_GRAD, "kSumChannels = 8;", "kSumChannels = 32;")],
    "sum_parts: in order": [Change(GAMMA_GRAD_LAUNCHER, "launch<Start::kEarly>", "launch<Start::kInOrder>")],
    "plain store": [store("reinterpret_cast<Word*>(to)[i] = words[i];")],
    "streaming store": [store("__stcs(reinterpret_cast<Word*>(to) + i, words[i]);")],
    "store past L1": [store("__stcg(reinterpret_cast<Word*>(to) + i, words[i]);")],
    "streaming load": [load("__ldcs")],
    "load past L1": [load("__ldcg")],
    "read-only load": [load("__ldg")],
}


@dataclass(frozen=True)
class Case:
    """One op on one activation: the call, the tensor that the copy moves, and the bytes that the call moves."""

    name: str
    call: Callable[[], object]
    x: Tensor
    moved: float
    is_sum: bool  # its results are equal but for rounding


def cases(device: torch.device) -> list[Case]:
    """Forward, gamma and backward, on tokens [B, N, D] and planes [B, C, H, W], float32 and bfloat16."""
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, sample in (
            ("tokens", (197, 384)),
            ("7x7", (768, 7, 7)),
            ("14x14", (384, 14, 14)),
            ("56x56", (96, 56, 56)),
        ):
            elements = torch.Size(sample).numel() * dtype.itemsize
            batch = max(TENSOR_BYTES[device.type] // elements, 4)
            x, residual, grad = (torch.randn(batch, *sample, device=device).to(dtype) for _ in range(3))
            gamma = torch.randn(sample[-1:] if name == "tokens" else (sample[0], 1, 1), device=device).to(dtype)
            dropped = round(batch * P)
            keep = torch.ones(batch, dtype=torch.bool, device=device)
            keep[torch.randperm(batch, device=device)[:dropped]] = False
            kept = keep.nonzero().flatten()
            slots = torch.where(keep, keep.cumsum(0) - 1, -1)
            y = x[kept]
            size, share = x.numel() * x.element_size(), 1 - dropped / batch
            scale = 1 / (1 - P)
            label = f"{name} {'f32' if dtype is torch.float32 else 'bf16'}"

            def add(op, function, *inputs, moved, is_sum=False, label=label, x=x):
                made.append(Case(f"{op} {label}", partial(function, *inputs), x, moved, is_sum))

            if name == "tokens":
                add("drop", OPS.drop_path, x, P, True, True, moved=(2 - P) * size)
                add("drop back", OPS.scale_kept, grad, keep, scale, moved=(1 + share) * size)
                add("add", OPS.drop_path_add, x, residual, None, P, True, True, moved=(3 - P) * size)
                add("gather", OPS.scale_kept, x, kept, 1.0, moved=2 * share * size)
                add("scatter", OPS.add_kept, y, residual, None, slots, scale, moved=(2 + share) * size)
            if name in ("tokens", "14x14"):
                add("gamma", OPS.drop_path_add, x, residual, gamma, P, True, True, moved=(3 - P) * size)
            backward = (grad, x, gamma, keep, scale, dtype, (True, True))
            add("gamma back", OPS.add_kept_backward, *backward, moved=(1 + 2 * share) * size, is_sum=True)
    return made


def results_of(case: Case) -> list[Tensor]:
    torch.manual_seed(0)
    results = case.call()
    return [results] if isinstance(results, Tensor) else list(results)


def differs(case: Case, expected: Sequence[Tensor]) -> bool:
    """Whether this build gives other results than the extension did."""
    for result, wanted in zip(results_of(case), expected, strict=True):
        if case.is_sum:
            error = (result.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
            if not error < (1e-5 if result.dtype is torch.float32 else 1e-2):
                return True
        elif not torch.equal(result, wanted):
            return True
    return False


def measure(case: Case, device: torch.device) -> dict[str, float]:
    """Medians in microseconds, and the share of the copy's bandwidth in percent."""
    from timing import summary, time_cuda

    target = torch.empty_like(case.x)
    calls = {"op": case.call, "copy": lambda: target.copy_(case.x)}
    if device.type == "cuda":
        samples = time_cuda(calls, SECONDS[device.type])
    else:
        samples = {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name] = [(time.perf_counter() - start) * 1e6]
    op, copy = (summary(samples[name])["median"] for name in ("op", "copy"))
    bytes_copied = 2 * case.x.numel() * case.x.element_size()
    return {
        "op_us": op,
        "copy_us": copy,
        "gb_per_s": case.moved / op / 1e3,
        "percent_of_copy": 100 * (case.moved / op) / (bytes_copied / copy),
    }


def folder_of(name: str, device: torch.device) -> str:
    return f"tune-{device.type}-" + "".join(c if c.isalnum() else "-" for c in name)


def build(name: str, device: torch.device) -> Path | str:
    """The library of a variant, or why there is none."""
    folder = folder_of(name, device)
    try:
        tree = native_build.changed_tree(folder, [TWO_DTYPES, *VARIANTS[name]])
        compile_library = native_build.cuda_library if device.type == "cuda" else native_build.host_library
        return compile_library(tree, folder)
    except (RuntimeError, ValueError) as error:
        return str(error)


def table(results: dict) -> list:
    """A row for each variant, a column for each case."""
    from report import Table

    names = list(dict.fromkeys(name for measured in results["variants"].values() for name in measured))
    made = []
    for dtype in ("f32", "bf16"):
        columns = [name for name in names if name.endswith(dtype)]
        title = f"% of the copy's bandwidth, {dtype}, p = {P}, {results['environment']['device']}"
        made.append(Table(title, ["variant", *(name.removesuffix(f" {dtype}") for name in columns)]))
        for variant, measured in results["variants"].items():
            made[-1].rows.append(
                [variant, *(f"{measured[c]['percent_of_copy']:.1f}" if c in measured else "–" for c in columns)]
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="only this one, and what is there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    parser.add_argument("--dry-run", action="store_true", help="the kernels on the host, one variant, tiny tensors")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("tune: torch finds no GPU, so there is nothing to measure; --dry-run shows that every step starts.")

    from report import environment
    from rich.console import Console

    import droppath_ext  # noqa: F401  its ops are what the variants replace

    device = torch.device("cpu" if arguments.dry_run else "cuda")
    names = list(dict.fromkeys(["as it is", *(arguments.variant or VARIANTS)]))
    if arguments.dry_run:
        for name in names:  # each must fit the sources; one build shows the rest, and the host can load no second
            native_build.changed_tree("tune-fits", [TWO_DTYPES, *VARIANTS[name]])
        names = names[:1]
    start = time.perf_counter()
    with ThreadPoolExecutor(native_build.jobs()) as pool:
        libraries = dict(zip(names, pool.map(build, names, itertools.repeat(device)), strict=True))
    print(f"tune: built {len(names)} variants in {time.perf_counter() - start:.0f} s", flush=True)

    chosen = cases(device)
    results: dict = {"environment": environment(device, quick=False), "variants": {}, "failed": {}}
    expected = [results_of(case) for case in chosen]  # the extension's
    for name, library in libraries.items():
        if isinstance(library, str):
            results["failed"][name] = library
            continue
        torch.ops.load_library(str(library))  # its kernels take the place of the extension's
        if arguments.dry_run:  # whose kernels for the CPU round at other places
            expected = [results_of(case) for case in chosen]
        measured = results["variants"].setdefault(name, {})
        for case, wanted in zip(chosen, expected, strict=True):
            try:
                if differs(case, wanted):
                    results["failed"][f"{name}, {case.name}"] = "other results than the kernels as they are"
                else:
                    measured[case.name] = measure(case, device)
            except RuntimeError as error:  # too many resources for a launch, say
                results["failed"][f"{name}, {case.name}"] = str(error)
        print(f"tune: {name}: measured after {time.perf_counter() - start:.0f} s", flush=True)
        for path, text in (
            (arguments.json, json.dumps(results, indent=1) + "\n"),
            (arguments.markdown, "\n".join(made.markdown() for made in table(results))),
        ):
            if path:  # whatever comes later, this is kept
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    console = Console(width=200)
    for made in table(results):
        made.show(console)
    for name, reason in results["failed"].items():
        print(f"tune: {name}: {reason}")
    if results["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
