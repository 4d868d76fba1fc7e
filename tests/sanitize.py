#!/usr/bin/env python
"""Runs tests and the fuzzer under AddressSanitizer and UndefinedBehaviorSanitizer: the CPU kernels and the bindings.

    python tests/sanitize.py [--minutes 3] [PYTEST'S ARGUMENTS]

The package is built anew, without CUDA, into build/sanitized. torch is as it is, but its tensors' memory is
AddressSanitizer's, so what a kernel reads or writes outside of a tensor is seen.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE = ROOT / "build/sanitized"
# Every op, layout, size and refusal.
CHOICE = [f"{TESTS}/test_{name}.py" for name in ("ops", "layouts", "geometry", "errors", "options")]
CHOICE += ["-k", "not opcheck"]  # which takes more time than all the rest

sys.path[:0] = [str(ROOT), str(TESTS), str(ROOT / "benchmarks")]
from cuda_on_host.run import BUILDS, preloading  # noqa: E402


def build() -> dict[str, str]:
    """Builds the package. Returns the environment of a process that uses it."""
    flags, libraries, variables = BUILDS["address"]
    # Instrumented loops are not all contracted alike, though they have to give the same bits.
    compiling = {
        "CFLAGS": " ".join([*flags, "-ffp-contract=off"]),
        "LDFLAGS": " ".join(flags),
        "DROPPATH_EXT_CUDA": "0",
    }
    command = [sys.executable, "setup.py", "--quiet", "build", f"--build-lib={PACKAGE}", f"--build-temp={PACKAGE}/temp"]
    subprocess.run(command, cwd=ROOT, env=os.environ | compiling, check=True)
    return os.environ | variables | preloading(libraries) | {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "2"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", default="3", help="of fuzzing")
    options, arguments = parser.parse_known_args()
    environment = build()
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", f"--rootdir={ROOT}"]
    tests += [str(ROOT / a) if (ROOT / a.split("::")[0]).exists() else a for a in arguments] or CHOICE
    commands = {"tests": tests, "fuzzer": [str(TESTS / "fuzz.py"), f"--minutes={options.minutes}"]}
    begin = time.monotonic()
    # In the folder of that package, whose name is looked up where one stands first. Side by side: each has one thread
    # at work most of the time.
    running = {
        name: subprocess.Popen(
            [sys.executable, *command], cwd=PACKAGE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for name, command in commands.items()
    }
    for name, process in running.items():
        output = process.communicate()[0].decode(errors="replace")
        print(f"== {name}, {time.monotonic() - begin:.0f} s\n{output}", flush=True)
    return 1 if any(process.returncode for process in running.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
