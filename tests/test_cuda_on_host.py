"""Promise: the CUDA kernels' source passes the ops' tests, run on the host in the place of the CPU's kernels.

Each run is a pytest of its own, in another process. `make test-kernels` runs more, and under sanitizers. The mutants
`cuda_removed_barrier…` show that a missing barrier is seen.
"""

import platform
import sys

import pytest
from cuda_on_host import run as host
from native_build import without_cuda

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("the CUDA kernels run on the host on x86-64 Linux only", allow_module_level=True)
if reason := without_cuda():
    pytest.skip(f"the CUDA kernels do not run on the host: {reason}", allow_module_level=True)

# A choice that meets every op, layout and dtype: pytest's arguments.
RUNS = {
    "geometry": ["tests/test_geometry.py"],
    "stores_offsets_and_the_host_itself": host.CHECKS,
    "ops": ["tests/test_ops.py", "-k", "not opcheck and not gradcheck and not meta and not refuse"],
    "formulas": ["tests/test_fuse.py", "tests/test_semantics.py", "-k", "error_is or one_copy or test_formula"],
    "layouts": ["tests/test_layouts.py", "-k", "misaligned or outside or gathered_rows or any_view"],
    "draws": ["tests/test_random.py", "tests/test_sampling.py", "-k", "predicted or threads_share"],
}


@pytest.mark.parametrize("name", RUNS)
def test_run(name):
    result = host.run_pytest("plain", *RUNS[name])
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
