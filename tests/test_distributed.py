"""Promise: training on several ranks neither hangs nor drifts, however many samples each of them drops."""

from functools import partial

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from droppath_ext import StochasticDepth

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

STEPS = 200


class _Block(nn.Module):
    def __init__(self, sampling):
        super().__init__()
        mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.mlp = StochasticDepth(mlp, 0.9, dim=8, init_values=0.1, sampling=sampling)
        self.again = StochasticDepth(nn.Linear(8, 8), 0.9, sampling=sampling)
        self.whole = StochasticDepth(nn.Linear(8, 8), 0.9, mode="batch")

    def forward(self, x):
        return self.whole(self.again(self.mlp(x)))


def _ddp(model, **options):
    return DistributedDataParallel(model, find_unused_parameters=False, **options)


def _fsdp(model):
    for block in model:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    return fully_shard(model)


WRAPPERS = {
    "DDP": _ddp,
    "DDP, static graph": partial(_ddp, static_graph=True, gradient_as_bucket_view=True),
    "FSDP2, bfloat16": _fsdp,
}


def _train(rank):
    """200 steps of each wrapper at batch 2, where most calls drop every sample."""
    return {name: _train_wrapped(rank, wrap) for name, wrap in WRAPPERS.items()}


def _train_wrapped(rank, wrap):
    """The parameters, whether all of them moved, and in which steps the first block dropped every sample."""
    torch.manual_seed(0)
    model = nn.Sequential(_Block("bernoulli"), _Block("fixed"))
    start = [parameter.detach().clone() for parameter in model.parameters()]
    parallel = wrap(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    torch.manual_seed(100 + rank)  # other data and other draws in each process
    unchanged = []
    model[0].register_forward_hook(lambda _, args, out: unchanged.append(torch.equal(args[0], out)))
    for _ in range(STEPS):
        x = torch.randn(2, 8)
        optimizer.zero_grad()
        (parallel(x) - 2 * x).square().mean().backward()
        optimizer.step()
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    moved = all((parameter != old).any() for parameter, old in zip(parameters, start, strict=True))
    return [parameter.detach().numpy() for parameter in parameters], moved, unchanged


def test_two_processes_stay_together(tmp_path):
    reports = ranks.reports(_train, tmp_path)
    for name in WRAPPERS:
        (first, moved, unchanged), (second, _, unchanged_there) = (report[name] for report in reports)
        assert moved, name
        assert STEPS / 4 < sum(unchanged) < STEPS, "steps in which the first block drops every sample"
        assert unchanged != unchanged_there
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True)), name
