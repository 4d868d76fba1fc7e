#!/usr/bin/env python
"""Everything that a GPU makes possible, in one command that ends within ten minutes: build, tests, benchmarks.

    python benchmarks/gpu_check.py             every stage, even if one failed; the most telling come first
    python benchmarks/gpu_check.py --dry-run   without a GPU: every part starts, small, with the kernels on the host

Parts of one stage run side by side, for they are not timed. The log of each part and the results go to the folder that
$OUT names, else to build/gpu-check. The exit status is 1 if a part failed.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("OUT") or ROOT / "build/gpu-check").resolve()


@dataclass(frozen=True)
class Part:
    """A command, split as a shell would; `python` is this interpreter, OUT the folder for results."""

    name: str
    command: str
    dry: str  # what takes its place where there is no GPU
    environment: tuple[tuple[str, str], ...] = ()
    dry_on_host_kernels: bool = True  # too slow for whole models


PYTEST = "python -m pytest -q -p no:cacheprovider"


def tests(files: str, dry_choice: str, choice: str = "cuda") -> Part:
    paths = " ".join(f"tests/test_{name}.py" for name in files.split())
    return Part(f"tests of {files}", f"{PYTEST} {paths} -k {choice!r}", f"{PYTEST} {paths} -k {dry_choice}")


def memcheck(choice: str, dry_choice: str) -> Part:
    """Without the caching allocator, so that reads and writes beyond a tensor leave its allocation."""
    return Part(
        f"memcheck of {choice}",
        f"compute-sanitizer --tool memcheck --error-exitcode 1 {PYTEST} tests/test_cuda.py -m memcheck -k {choice!r}",
        f"{PYTEST} tests/test_errors.py -k {dry_choice}",
        (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


def benchmark(name: str, options: str, dry_options: str, *, dry_on_host_kernels: bool = True) -> Part:
    command = f"python benchmarks/run.py {name} --quick --json OUT/{name}.json"
    return Part(
        name,
        f"{command} --device cuda {options}",
        f"{command} --device cpu {dry_options}",
        dry_on_host_kernels=dry_on_host_kernels,
    )


# Each stage with the seconds after which it is ended.
STAGES: tuple[tuple[int, tuple[Part, ...]], ...] = (
    (120, (Part("build", "make build PYTHON=python", "make build PYTHON=python", (("DROPPATH_EXT_CUDA", "1"),)),)),
    (
        100,
        (
            Part("info", "python -m droppath_ext.info", "python -m droppath_ext.info"),
            # What only a GPU shows; odd geometry and layouts; each op against its formula.
            Part(
                "tests of cuda", f"{PYTEST} tests/test_cuda.py", f"{PYTEST} tests/test_install.py -k test_info_passes"
            ),
            # opcheck takes minutes, and looks at what is no matter of the device.
            tests("ops", "gradient_of_the_op", "cuda and not opcheck and not derivatives"),
            tests("geometry", "scatter_add"),
            tests("layouts", "one_dimensional"),
            tests("fuse semantics errors", "native_drop_prob"),
            tests("skip random", "few_samples"),
            tests("options routes", "sample_dimension"),
        ),
    ),
    # Tensors of 64 MiB and more, in the layouts that meet each kernel.
    (
        100,
        (
            benchmark(
                "ops",
                "--p 0.1,0.4 --activation ViT-S/16,ConvNeXt-T",
                "--p 0.4 --op drop_path --activation tiny --dtype float32",
            ),
        ),
    ),
    (60, (benchmark("skip", "--p 0.4", "--p 0.4 --batch 2 --steps 1"),)),
    (
        75,
        (
            benchmark(
                "convert",
                "--model deit3_base,swin_tiny,convnext_small --steps 10",
                "--model vit_tiny_2_uniform --batch 4 --steps 1",
            ),
        ),
    ),
    (25, (benchmark("overhead", "", ""),)),
    (35, (benchmark("model", "", "", dry_on_host_kernels=False),)),
    (
        80,
        (
            memcheck("test_memory_safety", "native_dtype"),
            memcheck("add", "native_drop_prob"),
            memcheck("skip or fixed", "native_keep_of_wrong_shape"),
        ),
    ),
)


def start(part: Part, dry_run: bool, environment: dict[str, str]) -> subprocess.Popen:
    python = [sys.executable]
    if dry_run and part.dry_on_host_kernels:  # they take the place of the CPU's
        python += ["-m", "cuda_on_host.plugin"]
    command: list[str] = []
    for word in shlex.split(part.dry if dry_run else part.command):
        if word == "python":
            command += python
        else:
            command.append(word.replace("=python", f"={sys.executable}").replace("OUT/", f"{OUT}/"))
    with log_of(part).open("w") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment | dict(part.environment),
            start_new_session=True,  # so that what it started ends with it
        )


def log_of(part: Part) -> Path:
    return OUT / f"{part.name.replace(' ', '-')}.log"


def run(seconds: int, parts: tuple[Part, ...], dry_run: bool, environment: dict[str, str]) -> list[str]:
    """Runs a stage, shows how each part ended, and returns what failed."""
    began = time.perf_counter()
    failed = []
    running = []
    for part in parts:
        try:
            running.append((part, start(part, dry_run, environment)))
        except OSError as error:
            failed.append(part.name)
            print(f"== {part.name}: FAILED, {error}", flush=True)
    for part, process in running:
        try:
            status = process.wait(max(seconds - (time.perf_counter() - began), 0))
            outcome = "passed" if status == 0 else f"FAILED, exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"FAILED, not done after {seconds} s"
        if outcome != "passed":
            failed.append(part.name)
        lines = log_of(part).read_text(errors="replace").splitlines()
        print("\n".join(lines[-40 if len(parts) == 1 else -6 :]))
        print(f"== {part.name}: {outcome}, {time.perf_counter() - began:.0f} s", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, small, on the host's kernels")
    names = [part.name for _, parts in STAGES for part in parts]
    parser.add_argument("--part", action="append", choices=names, help="only this one; default: all")
    arguments = parser.parse_args()

    import torch

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if arguments.dry_run:
        sys.path.insert(0, str(ROOT / "tests/cuda_on_host"))
        import run as on_host

        environment = {**on_host.environment("plain"), "PYTHONUNBUFFERED": "1"}
    elif not torch.cuda.is_available():
        print(f"gpu-check: {sys.executable} finds no GPU through torch, so there is nothing to check.")
        sys.exit(2)
    OUT.mkdir(parents=True, exist_ok=True)
    failed = []
    for seconds, parts in STAGES:  # the host is slow
        chosen = tuple(part for part in parts if part.name in (arguments.part or names))
        failed += run(600 if arguments.dry_run else seconds, chosen, arguments.dry_run, environment)
    if failed:
        print(f"gpu-check: failed: {', '.join(failed)}; the logs are in {OUT}")
        sys.exit(1)
    print(f"gpu-check: everything passed; the logs and the results are in {OUT}")


if __name__ == "__main__":
    main()
