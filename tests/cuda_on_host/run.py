#!/usr/bin/env python
"""Runs tests with the CUDA kernels' source on the host, in the place of the CPU's kernels.

    python tests/cuda_on_host/run.py [BUILD] [PYTEST'S ARGUMENTS]
    python tests/cuda_on_host/run.py all

`all` is what `make test-kernels` runs. BUILD is one of

    plain      as a GPU would compute; the default
    reversed   the last block and the last thread run first
    pattern    shared memory, local variables and new tensors are full of a pattern
    address    AddressSanitizer and UndefinedBehaviorSanitizer; every tensor has guard zones
    thread     ThreadSanitizer: a race is what no barrier and no launch orders
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import native_build  # noqa: E402

# Flags of the compiler, libraries to load before Python, variables of the environment.
BUILDS: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "plain": ([], [], {}),
    "reversed": ([], [], {}),
    "pattern": (
        ["-ftrivial-auto-var-init=pattern"],
        [],
        # glibc fills new memory with the complement: the bytes are 0x7f, a large number or NaN in every dtype.
        {"MALLOC_PERTURB_": "128"},
    ),
    "address": (
        # vptr: the generator that the launchers see is none of CUDA's.
        ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined", "-g1"],
        # libstdc++ beside it: Python itself does not need it, and AddressSanitizer looks for its throw at the start.
        ["libasan.so", "libstdc++.so"],
        # Python and torch keep memory until the process ends. A tensor that is too large is torch's to refuse.
        {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": (
        ["-fsanitize=thread", "-g1"],
        ["libtsan.so"],
        # A short history for each of a thousand fibers.
        {"TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1 history_size=0 die_after_fork=0"},
    ),
}


def preloading(libraries: Sequence[str]) -> dict[str, str]:
    """The variable that loads the compiler's libraries of these names before Python."""
    cxx = native_build.last_build().cxx
    found = [subprocess.check_output([cxx, f"-print-file-name={name}"], text=True).strip() for name in libraries]
    return {"LD_PRELOAD": " ".join(str(Path(path).resolve()) for path in found)} if found else {}


def environment(build: str, tree: Path = ROOT) -> dict[str, str]:
    """What a Python process needs to run the kernels of a tree on the host; builds the library."""
    flags, preloaded, variables = BUILDS[build]
    library = native_build.host_library(tree, flags=flags)
    return {
        **os.environ,
        **variables,
        **preloading(preloaded),
        "OMP_NUM_THREADS": "1",  # kernels use no other thread, and two processes run at a time
        "CUDA_ON_HOST_BUILD": build,
        "CUDA_ON_HOST_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]),
    }


def pytest_command(*arguments: str) -> list[str]:
    """Only Python's output is captured: that of a process which ends by itself would be lost."""
    options = ["-p", "cuda_on_host.plugin", "-p", "no:cacheprovider", "--capture=sys", "-q"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def run_pytest(build: str, *arguments: str, tree: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        pytest_command(*arguments), env=environment(build, tree), cwd=ROOT, capture_output=True, text=True, check=False
    )


CHECKS = tuple(str(path.relative_to(ROOT)) for path in sorted(TESTS.glob("cuda_on_host/check_*.py")))
# Every op, row map, dtype and boundary; the existing tests that hold the results to the formula, and draw.
CHOICE = (*CHECKS, "tests/test_geometry.py", "tests/test_fuse.py", "tests/test_sampling.py")
CHOICE += ("-k", "check_ or geometry or error_is or fixed_is_the_predicted")
# Every file that calls the ops, the longest first; then that choice in the other builds.
FILES = ["sampling", "layouts", "ops", "skip", "semantics", "autograd", "fuse", "geometry", "composite", "drop_in"]
ALL = [
    *(("plain", f"tests/test_{name}.py") for name in (*FILES, "random", "errors")),
    ("plain", *CHECKS),
    *((build, *CHOICE) for build in ("thread", "address", "pattern", "reversed")),
]


def run_all() -> bool:
    """Two at a time on two processors. Whether all passed."""

    def run(arguments: tuple[str, ...]) -> bool:
        begin = time.monotonic()
        result = run_pytest(*arguments)
        summary = result.stdout.strip().splitlines()[-1:] or ["no output"]
        print(f"{time.monotonic() - begin:4.0f} s  {shlex.join(arguments)}\n        {summary[0]}", flush=True)
        if result.returncode:
            print(result.stdout, result.stderr, sep="\n", flush=True)
        return result.returncode == 0

    with ThreadPoolExecutor(native_build.jobs()) as pool:
        list(pool.map(environment, ("address", "thread", "pattern", "plain")))
        return all(list(pool.map(run, ALL)))


def main(arguments: Sequence[str]) -> int:
    if reason := native_build.without_cuda():
        sys.exit(f"cuda_on_host: {reason}")
    if arguments == ["all"]:
        return 0 if run_all() else 1
    build, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in BUILDS else ("plain", arguments)
    return subprocess.run(pytest_command(*rest), env=environment(build), cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
