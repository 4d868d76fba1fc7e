"""Promise: data-parallel training neither hangs nor drifts, however many samples are dropped."""

import sys
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from droppath_ext import StochasticDepth

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

STEPS = 200
PROCESSES = 2


class _Block(nn.Module):
    def __init__(self, sampling):
        super().__init__()
        mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.mlp = StochasticDepth(mlp, 0.9, dim=8, init_values=0.1, sampling=sampling)
        self.again = StochasticDepth(nn.Linear(8, 8), 0.9, sampling=sampling)

    def forward(self, x):
        return self.again(self.mlp(x))


def _train(rank, path, results):
    """One process: 200 steps at batch 2, where most calls drop every sample."""
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(path), PROCESSES)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
        torch.manual_seed(0)
        model = nn.Sequential(_Block("bernoulli"), _Block("fixed"))
        start = [parameter.detach().clone() for parameter in model.parameters()]
        parallel = DistributedDataParallel(model, find_unused_parameters=False)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
        torch.manual_seed(100 + rank)  # other data and other draws in each process
        unchanged = []
        model[0].register_forward_hook(lambda _, args, out: unchanged.append(torch.equal(args[0], out)))
        for _ in range(STEPS):
            x = torch.randn(2, 8)
            optimizer.zero_grad()
            (parallel(x) - 2 * x).square().mean().backward()
            optimizer.step()
        moved = all((parameter != old).any() for parameter, old in zip(model.parameters(), start, strict=True))
        results.put((rank, [parameter.detach().numpy() for parameter in model.parameters()], moved, unchanged))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None, None))
        sys.exit(1)


def test_two_processes_stay_together(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_train, args=(rank, tmp_path / "store", results), daemon=True)
        for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    try:
        reports = {rank: report for rank, *report in (results.get(timeout=120) for _ in processes)}
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    for parameters, _, _ in reports.values():
        assert not isinstance(parameters, str), parameters
    (first, moved, unchanged), (second, _, unchanged_there) = (reports[rank] for rank in range(PROCESSES))
    assert moved
    assert STEPS / 4 < sum(unchanged) < STEPS, "steps in which the first block drops every sample"
    assert unchanged != unchanged_there
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    assert all(process.exitcode == 0 for process in processes)
