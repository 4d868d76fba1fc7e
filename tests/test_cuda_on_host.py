"""Promise: the source of the CUDA kernels is right, run on the host in the place of the CPU's kernels.

Each case is a pytest of its own, in another process; `make test-kernels` runs all of them, in every build.
"""

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_on_host import run as host
from native_build import Change, changed_tree, without_cuda

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("the CUDA kernels run on the host on x86-64 Linux only", allow_module_level=True)
if REASON := without_cuda():
    pytest.skip(f"the CUDA kernels do not run on the host: {REASON}", allow_module_level=True)

# A choice that meets every op, layout and dtype. Two at a time, they end within three minutes on two cores.
CHOICE = {
    "checks of the host itself": ["check_shim.py", "check_stores.py", "check_offsets.py", "check_index_functions.py"],
    "geometry": ["test_geometry.py"],
    "formulas": ["test_semantics.py", "test_fuse.py", "-k", "test_add_formula or at_most_one_copy or error_is_at_most"],
    "layouts": ["test_layouts.py", "-k", "misaligned or outside or gathered_rows or any_view"],
    "skip": [
        "test_skip.py",
        "test_ops.py",
        "-k",
        "never_read or few_samples or test_gather or reads_no_row or in_place",
    ],
}


def pytest_on_host(build, *arguments, tree=host.ROOT):
    paths = [
        str(next(path for path in (host.TESTS / "cuda_on_host" / word, host.TESTS / word) if path.exists()))
        if word.endswith(".py")
        else word
        for word in arguments
    ]
    return subprocess.run(
        host.pytest_command(*paths),
        env=host.environment(build, tree),
        cwd=host.ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def runs():
    host.environment("plain")  # built once
    with ThreadPoolExecutor(2) as pool:
        yield {choice: pool.submit(pytest_on_host, "plain", *arguments) for choice, arguments in CHOICE.items()}


@pytest.mark.parametrize("choice", CHOICE)
def test_passes_on_the_host(runs, choice):
    result = runs[choice].result()
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def test_a_removed_barrier_is_caught():
    """In turns, threads behind the barrier would read what is there already: the last thread has to run first."""
    change = Change("csrc/cuda/add_kept.cuh", "  __syncthreads();\n", "")
    tree = changed_tree("removed-barrier", [change])
    result = pytest_on_host("reversed", "-x", "test_semantics.py", "-k", "test_formula", tree=tree)
    assert result.returncode not in (0, 5), result.stdout[-2000:] + result.stderr[-2000:]
