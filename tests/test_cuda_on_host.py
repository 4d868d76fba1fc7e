"""Promise: the CUDA kernels' source passes the ops' tests, run on the host in the place of the CPU's kernels.

Each run is a pytest of its own, in another process. `make test-kernels` runs more, and under sanitizers.
"""

import platform
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_on_host import run as host
from native_build import Change, changed_tree, jobs, without_cuda

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("the CUDA kernels run on the host on x86-64 Linux only", allow_module_level=True)
if reason := without_cuda():
    pytest.skip(f"the CUDA kernels do not run on the host: {reason}", allow_module_level=True)

# A choice that meets every op, layout and dtype: a build, and pytest's arguments. The longest come first.
RUNS = {
    "geometry": ("plain", "tests/test_geometry.py"),
    "stores_offsets_and_the_host_itself": ("plain", *host.CHECKS),
    "ops": ("plain", "tests/test_ops.py", "-k", "not opcheck and not gradcheck and not meta and not refuse"),
    "formulas": (
        *("plain", "tests/test_fuse.py", "tests/test_semantics.py"),
        *("-k", "error_is or one_copy or test_formula"),
    ),
    "layouts": ("plain", "tests/test_layouts.py", "-k", "misaligned or outside or gathered_rows or any_view"),
    "draws": ("plain", "tests/test_random.py", "tests/test_sampling.py", "-k", "predicted or threads_share"),
}
WITHOUT_BARRIER = Change("csrc/cuda/add_kept.cuh", "  __syncthreads();\n", "")


@pytest.fixture(scope="module")
def results():
    """Of each run; and, by the build, of a run without the barrier. As many at a time as there are processors."""
    tree = changed_tree("without_barrier", [WITHOUT_BARRIER])
    formula = ("tests/test_semantics.py", "-x", "-k", "test_formula")
    with ThreadPoolExecutor(jobs()) as pool:
        is_built = pool.submit(host.environment, "plain")

        def run(arguments):
            is_built.result()  # once, not by each run
            return host.run_pytest(*arguments)

        broken = {build: pool.submit(host.run_pytest, build, *formula, tree=tree) for build in ("thread", "reversed")}
        yield broken | {name: pool.submit(run, arguments) for name, arguments in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_run(results, name):
    result = results[name].result()
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


def test_a_missing_barrier_is_a_race(results):
    result = results["thread"].result()
    assert "ThreadSanitizer: data race" in result.stderr, result.stdout[-5000:] + result.stderr[-5000:]
    assert "add_kept.cuh" in result.stderr
    assert result.returncode == 66


def test_a_missing_barrier_fails_in_reverse(results):
    """Where the first thread runs first, the others find what it has written, barrier or not."""
    result = results["reversed"].result()
    assert "passed" not in result.stdout.splitlines()[-1], result.stdout[-5000:]
    assert result.returncode not in (0, 5)
