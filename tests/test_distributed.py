"""Promise: training on several ranks neither hangs nor drifts, however many samples each of them drops."""

import sys
import traceback
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from droppath_ext import StochasticDepth, draw_keep, stochastic_depth

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

STEPS = 200
PROCESSES = 2


def _run(rank, path, task, results):
    """One process."""
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(path), PROCESSES)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
        results.put((rank, task(rank)))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))
        sys.exit(1)


def _reports(task, tmp_path):
    """What the task returns in each of the processes."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_run, args=(rank, tmp_path / "store", task, results), daemon=True)
        for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    try:
        reports = dict(results.get(timeout=120) for _ in processes)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    for report in reports.values():
        assert not isinstance(report, str), report
    assert all(process.exitcode == 0 for process in processes)
    return [reports[rank] for rank in range(PROCESSES)]


# --- wrappers for data-parallel training ---


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
    reports = _reports(_train, tmp_path)
    for name in WRAPPERS:
        (first, moved, unchanged), (second, _, unchanged_there) = (report[name] for report in reports)
        assert moved, name
        assert STEPS / 4 < sum(unchanged) < STEPS, "steps in which the first block drops every sample"
        assert unchanged != unchanged_there
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True)), name


# --- DTensors: each rank skips, and together they compute what one device does ---

FEATURES = 6


def _skip(mlp, place, seed, samples=9, dim=0, gamma=(FEATURES,), keep_mode=None, **options):
    """The output, the gradients of x, gamma and the parameters, and how many samples the branch was called with."""
    torch.manual_seed(1)
    sizes = {"x": FEATURES, "cotangent": FEATURES, "mask": 1}
    tensors = {
        name: place(name, torch.randn(samples, 4, size, dtype=torch.float64).movedim(0, dim))
        for name, size in sizes.items()
    }
    x, gamma = tensors["x"].requires_grad_(), place("gamma", torch.rand(gamma, dtype=torch.float64)).requires_grad_()
    torch.manual_seed(seed)
    if keep_mode is not None:
        options["keep"] = place("keep", draw_keep(torch.empty(samples), 0.5, keep_mode))
    rows = []

    def branch(taken, mask):
        rows.append((taken.to_local() if isinstance(taken, DTensor) else taken).shape[dim])
        return mlp(taken) * mask

    out = stochastic_depth(x, branch, 0.5, True, gamma=gamma, batched=(tensors["mask"],), dim=dim, **options)
    gradients = torch.autograd.grad((out * tensors["cotangent"]).sum(), [x, gamma, *mlp.parameters()])
    return [out.detach(), *gradients], rows[0]


def _mlp():
    torch.manual_seed(0)
    layers = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 4), nn.GELU(), nn.Linear(4, FEATURES)
    return nn.Sequential(*layers).double()


def _differences(mesh, placements, parallelize, keep_of_host=False, **case):
    """Over some seeds: the largest difference from one device, and how many samples were computed here and there."""
    of_samples = [Shard(0) if p.is_shard(case.get("dim", 0)) else Replicate() for p in placements]
    of = {"x": placements, "cotangent": placements, "keep": of_samples}

    def place(name, tensor):
        if name == "keep" and (keep_of_host or len(tensor) == 1):
            return tensor
        return distribute_tensor(tensor, mesh, of.get(name, [Replicate()] * mesh.ndim))

    difference, here, there = 0.0, 0, 0
    for seed in range(6):
        actual, rows = _skip(parallelize(_mlp()), place, seed, **case)
        expected, all_rows = _skip(_mlp(), lambda _, tensor: tensor, seed, **case)
        here, there = here + rows, there + all_rows
        difference = max(difference, *map(_difference, actual, expected))
    return difference, here, there


def _difference(actual, expected):
    return float((actual.full_tensor() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


BY_SAMPLES = {
    "bernoulli": {},
    "batch": {"mode": "batch"},
    "tokens first": {"dim": 1},
    "tokens first, gamma along them": {"dim": 1, "gamma": (4, 1, 1)},
    "one gamma": {"gamma": ()},
    "keep": {"keep_mode": "row"},
    "keep of the host": {"keep_mode": "row", "keep_of_host": True},
    "keep of one entry": {"keep_mode": "batch"},
}
OTHERWISE = {"replicated": Replicate(), "by tokens": Shard(1), "by features": Shard(2)}


def _skip_on_shards(rank):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    plan = {"1": ColwiseParallel(use_local_output=False), "3": RowwiseParallel(use_local_output=False)}

    def replicated(mlp):
        return distribute_module(mlp, mesh)

    def tensor_parallel(mlp):
        distribute_module(mlp[0], mesh)
        return parallelize_module(mlp, mesh, plan)

    reports = {
        name: _differences(mesh, [Shard(case.get("dim", 0))], replicated, **case) for name, case in BY_SAMPLES.items()
    }
    for name, placement in OTHERWISE.items():
        reports[name] = _differences(mesh, [placement], replicated, keep_mode="row")
    reports["tensor parallel"] = _differences(mesh, [Replicate()], tensor_parallel, keep_mode="row")
    both = init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=("data", "tensor"))
    reports["both"] = _differences(
        both, [Shard(0), Replicate()], lambda mlp: distribute_module(mlp, both), keep_mode="row"
    )
    return reports, _seeded_otherwise(rank, mesh), _sentences(mesh)


def _seeded_otherwise(rank, mesh):
    """The mask of all samples; and the difference from one device with this mask."""

    def place(name, tensor):
        return distribute_tensor(tensor, mesh, [Shard(0) if name in ("x", "cotangent") else Replicate()])

    inputs = []
    actual, _ = _skip(
        distribute_module(_mlp(), mesh), lambda name, tensor: inputs.append(tensor) or place(name, tensor), seed=rank
    )
    kept = (actual[0].full_tensor() != inputs[0]).flatten(1).any(1)
    expected, _ = _skip(_mlp(), lambda name, tensor: kept if name == "keep" else tensor, seed=0, keep_mode="row")
    return kept.tolist(), max(map(_difference, actual, expected))


def _sentences(mesh):
    """What is said of placements that cannot be."""
    x = distribute_tensor(torch.ones(8, 2), mesh, [Shard(0)])
    shared = x.redistribute(placements=[Replicate()])
    partial = DTensor.from_local(torch.ones(8, 2), mesh, [Partial()])
    keep = torch.arange(8) % 2 == 0  # as many on each rank, or what these branches do would never end
    calls = [
        (shared, torch.neg, {}),
        (shared, torch.neg, {"sampling": "fixed"}),
        (partial, torch.neg, {"keep": keep}),
        (x, torch.add, {"keep": keep, "batched": (torch.ones(8, 2),)}),
        (x, lambda rows: rows.full_tensor(), {"keep": keep}),
        (x, lambda rows: rows.redistribute(placements=[Replicate()]), {"keep": keep}),
        (x, lambda rows: (rows, rows), {"keep": keep}),
    ]
    found = []
    for x, branch, options in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            stochastic_depth(x, branch, 0.5, True, **options)
        found.append(f"{error.typename}: {error.value}")
    return found


SENTENCES = [
    "ValueError: x must be sharded along its samples, Shard(0), or ranks that hold parts of one sample",
    "ValueError: x must be sharded along its samples, Shard(0), or ranks that hold parts of one sample",
    "ValueError: x must be sharded or replicated, but got placements (Partial(sum),)",
    "TypeError: batched[0] must be a DTensor, for x is one, but got a plain tensor",
    "TypeError: the output of branch must be a DTensor, for its input is one, but got a plain tensor",
    "ValueError: the output of branch must be sharded along its samples, Shard(0), as its input is",
    "TypeError: the output of branch must be a Tensor, but got a tuple of 2",
]


def test_each_rank_skips_among_its_own_samples(tmp_path):
    (first, first_masks, sentences), (second, second_masks, _) = _reports(_skip_on_shards, tmp_path)
    for name, (difference, computed, together) in first.items():
        assert difference < 1e-12, name
        if name in BY_SAMPLES:  # a rank that drops all of its samples computes one more
            assert together <= computed + second[name][1] <= together + 6, name
            assert max(computed, second[name][1]) < 0.75 * together, name
        else:
            assert computed == second[name][1] == together, name
    assert first_masks == second_masks
    kept, difference = first_masks
    assert 0 < sum(kept) < 9 and difference < 1e-12
    for sentence, part in zip(sentences, SENTENCES, strict=True):
        assert part in sentence
