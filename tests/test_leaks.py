"""Promise: calls keep no memory, whether they succeed, are differentiated or are refused."""

import subprocess
import sys

import pytest

CALLS = 100_000
ALLOWED_KIB = 1024  # it is none; ten bytes a call would be as much

# In a process of its own, so that nothing else allocates. Prints by how much it grew.
SCRIPT = """
import resource, sys, torch
from droppath_ext import draw_keep, drop_path, drop_path_add, stochastic_depth

torch.set_num_threads(1)
x, gamma = torch.ones(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)
keep, rate = torch.tensor([True, False, True, True]), torch.tensor(0.5)

def train(out):
    torch.autograd.grad(out, x, torch.ones_like(out))

def refuse(call):
    try:
        call()
    except (TypeError, ValueError):
        return
    raise AssertionError("the call was not refused")

ROUND = [
    lambda: train(drop_path(x, 0.5, True)),
    lambda: train(drop_path(x, 0.5, True, keep=keep)),
    lambda: drop_path(x, rate, True),
    lambda: train(drop_path_add(x, x, 0.5, True, gamma=gamma)),
    lambda: train(stochastic_depth(x, torch.sin, 0.5, True, gamma=gamma)),
    lambda: train(stochastic_depth(x, torch.sin, 0.5, True, sampling="fixed")),
    lambda: draw_keep(x, 0.5),
    lambda: refuse(lambda: drop_path(x, 1.5, True)),
    lambda: refuse(lambda: drop_path_add(x, gamma, 0.5, True)),
    lambda: refuse(lambda: torch.ops.droppath_ext.scale_kept(x, keep[:2], 1.0)),
]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024

def run(calls):
    for _ in range(calls // len(ROUND)):
        for call in ROUND:
            call()

calls = int(sys.argv[1])
run(calls // 10)
before = resident()
run(calls)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat():
    command = [sys.executable, "-c", SCRIPT, str(CALLS)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < ALLOWED_KIB, f"{CALLS} calls keep {grown} KiB"
