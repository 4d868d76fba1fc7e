#!/usr/bin/env python
"""Runs tests with the CUDA kernels' source on the host, in the place of the CPU's kernels.

    python tests/cuda_on_host/run.py [BUILD] [PYTEST'S ARGUMENTS]

BUILD is one of

    plain      as a GPU would compute; the default
    reversed   the last block and the last thread run first
    pattern    shared memory, local variables and new tensors are full of a pattern
    address    AddressSanitizer and UndefinedBehaviorSanitizer; every tensor has guard zones
    thread     ThreadSanitizer: a race is what no barrier and no launch orders
"""

import os
import subprocess
import sys
from collections.abc import Sequence
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
        # Python and torch keep memory until the process ends.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": (
        ["-fsanitize=thread", "-g1"],
        ["libtsan.so"],
        {
            "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1 history_size=0 die_after_fork=0",
            "OMP_NUM_THREADS": "1",
        },
    ),
}


def environment(build: str, tree: Path = ROOT) -> dict[str, str]:
    """What a Python process needs to run the kernels of a tree on the host; builds the library."""
    flags, preloaded, variables = BUILDS[build]
    library = native_build.host_library(tree, flags=flags)
    cxx = native_build.last_build().cxx
    found = [subprocess.check_output([cxx, f"-print-file-name={lib}"], text=True).strip() for lib in preloaded]
    return {
        **os.environ,
        **variables,
        "CUDA_ON_HOST_BUILD": build,
        "CUDA_ON_HOST_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]),
        **({"LD_PRELOAD": " ".join(str(Path(path).resolve()) for path in found)} if found else {}),
    }


def pytest_command(*arguments: str) -> list[str]:
    """Only Python's output is captured: that of a process which ends by itself would be lost."""
    options = ["-p", "cuda_on_host.plugin", "-p", "no:cacheprovider", "--capture=sys", "-q"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def main(arguments: Sequence[str]) -> int:
    build, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in BUILDS else ("plain", arguments)
    if reason := native_build.without_cuda():
        sys.exit(f"cuda_on_host: {reason}")
    return subprocess.run(pytest_command(*rest), env=environment(build), cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
