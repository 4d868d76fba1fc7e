"""Promise: of a DTensor each rank skips among its own samples, and together they compute what one device does."""

import functools

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx.experimental.proxy_tensor import make_fx

from droppath_ext import DropPath, convert, draw_keep, stochastic_depth

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

SEEDS = 3
FEATURES = 5


def _skip(mlp, place, seed, samples=9, dim=0, tokens=4, gamma=(FEATURES,), keep_mode=None, **options):
    """The output, the gradients of x, gamma and the parameters, and how many samples the branch was called with."""
    torch.manual_seed(1)
    sizes = {"x": FEATURES, "cotangent": FEATURES, "mask": 1}
    tensors = {
        name: place(name, torch.randn(samples, tokens, size, dtype=torch.float64).movedim(0, dim).contiguous())
        for name, size in sizes.items()
    }
    x, gamma = tensors["x"].requires_grad_(), place("gamma", torch.rand(gamma, dtype=torch.float64)).requires_grad_()
    positive = place("mask", torch.ones(tensors["mask"].shape, dtype=torch.bool))
    torch.manual_seed(seed)
    if keep_mode is not None:
        options["keep"] = place("keep", draw_keep(torch.empty(samples), 0.5, keep_mode))
    rows = []

    def branch(taken, mask, nothing, positive):
        assert nothing is None
        rows.append((taken.to_local() if isinstance(taken, DTensor) else taken).shape[dim])
        return mlp(taken) * mask * positive

    batched = tensors["mask"], None, positive
    out = stochastic_depth(x, branch, 0.5, True, gamma=gamma, batched=batched, dim=dim, **options)
    gradients = torch.autograd.grad((out * tensors["cotangent"]).sum(), [x, gamma, *mlp.parameters()])
    assert isinstance(out, type(x))
    return [out.detach(), *gradients], rows[0]


def _mlp():
    torch.manual_seed(0)
    layers = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 4), nn.GELU(), nn.Linear(4, FEATURES)
    return nn.Sequential(*layers).double()


def _differences(mesh, x, parallelize, keep_of_host=False, mask=None, gamma_on=None, **case):
    """Over some seeds: the largest difference from one device, and how many samples were computed here and there."""
    replicated = [Replicate()] * mesh.ndim
    of_samples = [Shard(0) if placement.is_shard(case.get("dim", 0)) else Replicate() for placement in x]
    of = {"x": x, "cotangent": x, "mask": mask or replicated, "gamma": gamma_on or replicated, "keep": of_samples}

    def place(name, tensor):
        if name == "keep" and (keep_of_host or len(tensor) == 1):
            return tensor
        return distribute_tensor(tensor, mesh, of[name])

    difference, here, there = 0.0, 0, 0
    for seed in range(SEEDS):
        actual, rows = _skip(parallelize(_mlp()), place, seed, **case)
        expected, all_rows = _skip(_mlp(), lambda _, tensor: tensor, seed, **case)
        here, there = here + rows, there + all_rows
        difference = max(difference, *map(_difference, actual, expected))
    return difference, here, there


def _difference(actual, expected):
    actual = actual.full_tensor()
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9)) if expected.numel() else 0.0


BY_SAMPLES = {
    "bernoulli": {},
    "batch": {"mode": "batch"},
    "one gamma": {"gamma": ()},
    "gamma and mask are sharded": {"gamma_on": [Shard(0)], "mask": [Shard(0)]},
    "the mask is sharded otherwise": {"mask": [Shard(1)]},
    "a rank without samples": {"samples": 1},
    "no samples": {"samples": 0},
    "keep": {"keep_mode": "row"},
    "keep of the host": {"keep_mode": "row", "keep_of_host": True},
    "keep of one entry": {"keep_mode": "batch"},
}
SHARED = {"replicated": Replicate(), "by features": Shard(2)}
if torch.__version__ >= "2.13":  # before, torch's own linear refuses what is sharded along dim 1
    SHARED["by tokens"] = Shard(1)
    BY_SAMPLES["tokens first"] = {"dim": 1}
    BY_SAMPLES["tokens first, gamma along them"] = {"dim": 1, "gamma": (4, 1, 1)}


def _compare(rank):
    mesh = init_device_mesh("cpu", (ranks.RANKS,))
    plan = {"1": ColwiseParallel(use_local_output=False), "3": RowwiseParallel(use_local_output=False)}

    def replicated(mlp):
        return distribute_module(mlp, mesh)

    def tensor_parallel(mlp):
        distribute_module(mlp[0], mesh)
        return parallelize_module(mlp, mesh, plan)

    found = {
        name: _differences(mesh, [Shard(case.get("dim", 0))], replicated, **case) for name, case in BY_SAMPLES.items()
    }
    for name, placement in SHARED.items():
        found[name] = _differences(mesh, [placement], replicated, keep_mode="row", tokens=3)
    found["tensor parallel"] = _differences(mesh, [Replicate()], tensor_parallel, keep_mode="row")
    for view, stride in {
        "dense": (lambda x: x.transpose(1, 2), (24, 1, 6)),
        "expanded": (lambda x: x[:, :1].expand(8, 4, 6), (24, 6, 1)),
        "every second": (lambda x: x[:, :, ::2], (12, 3, 1)),
    }.values():
        out = stochastic_depth(view(distribute_tensor(torch.ones(8, 4, 6), mesh, [Shard(0)])), torch.neg, 0.5, True)
        assert out.stride() == out.to_local().stride() == stride
    both = init_device_mesh("cpu", (1, ranks.RANKS))
    found["both"] = _differences(both, [Shard(0), Shard(2)], lambda mlp: distribute_module(mlp, both), keep_mode="row")
    return found, _seeded_otherwise(rank, mesh), _converted(mesh), _sentences(mesh)


def _seeded_otherwise(rank, mesh):
    """Masks of all samples in some calls, and the largest difference from one device with these masks."""
    inputs = {}

    def place(name, tensor):
        inputs[name] = tensor
        return distribute_tensor(tensor, mesh, [Shard(0) if name in ("x", "cotangent") else Replicate()])

    masks, difference = [], 0.0
    for seed in range(SEEDS):
        actual, _ = _skip(distribute_module(_mlp(), mesh), place, seed=seed + 100 * rank)
        kept = (actual[0].full_tensor() != inputs["x"]).flatten(1).any(1)
        expected, _ = _skip(
            _mlp(), lambda name, tensor, kept=kept: kept if name == "keep" else tensor, seed=0, keep_mode="row"
        )
        masks.append(kept.tolist())
        difference = max(difference, *map(_difference, actual, expected))
    return masks, difference


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = _mlp()
        self.drop_path = DropPath(0.5)

    def forward(self, x):
        return x + self.drop_path(self.mlp(x))


def _converted(mesh):
    """How far a converted block, by the placement of its input, is from one that drops the same samples; and masks."""
    x = torch.randn(16, 4, FEATURES, dtype=torch.float64)
    x = distribute_tensor(x, mesh, [Replicate()]).to_local()
    block = _Block()
    convert(block, "skip", example=x, min_drop_prob=0.0)
    kept_rows = x + 2 * block.mlp(x).detach()
    distribute_module(block, mesh)
    found = {}
    for placement in (Shard(0), Replicate(), Shard(2)):
        torch.manual_seed(7)
        out = block(distribute_tensor(x, mesh, [placement])).full_tensor().detach()
        kept = (out != x).flatten(1).any(1)
        expected = torch.where(kept.view(-1, 1, 1), kept_rows, x)
        found[str(placement)] = float((out - expected).abs().max()), int(kept.sum())
    return found


# --- what cannot be ---


def _sentences(mesh):
    x = distribute_tensor(torch.ones(8, 2), mesh, [Shard(0)])
    plain = torch.ones(8, 2)
    shared = x.redistribute(placements=[Replicate()])
    partial = DTensor.from_local(plain, mesh, [Partial()])
    elsewhere = distribute_tensor(plain, init_device_mesh("cpu", (1, ranks.RANKS)), [Replicate()] * 2)
    uneven = DTensor.from_local(
        torch.ones(3 + 2 * mesh.get_local_rank(), 2), mesh, [Shard(0)], shape=torch.Size([8, 2]), stride=(2, 1)
    )
    keep = torch.arange(8) % 2 == 0  # as many on each rank, or what some branches do here would never end
    norm = distribute_module(nn.BatchNorm1d(2), mesh)
    split = parallelize_module(nn.Linear(2, 2), mesh, ColwiseParallel(input_layouts=Shard(0), use_local_output=False))
    compiled = torch.compile(lambda x, gamma: stochastic_depth(x, torch.neg, 0.5, True, gamma=gamma), backend="eager")

    def changes_x(rows):
        x.mul_(2)
        return -rows

    shared_samples = "x must be sharded along its samples, Shard(0), or ranks that hold parts of one sample would draw"
    communicates = "branch must not communicate between ranks that hold different samples, but it has"
    in_place = "branch must not change its input or x in place"
    on_mesh = "must be on the mesh of x"
    calls = [
        (shared_samples, shared, torch.neg, {}),
        (shared_samples, shared, torch.neg, {"sampling": "fixed"}),
        ("x must be placed by Shard and Replicate alone, but got (Partial(sum),)", partial, torch.neg, {"keep": keep}),
        ("x must be sharded as torch.chunk does it, 4 samples on this rank, but it has", uneven, torch.neg, {}),
        (f"{communicates} a BatchNorm", x, norm, {}),
        (f"{communicates} a BatchNorm", x, functools.partial(norm), {}),
        (f"{communicates} a parameter weight placed by (Shard(dim=0),)", x, split, {}),
        (in_place, x, lambda rows: rows.mul_(2), {"keep": keep}),
        (in_place, x, lambda rows: rows.mul_(2), {"keep": torch.ones(8, dtype=torch.bool)}),
        (in_place, x, changes_x, {"keep": keep}),
        ("gamma must be a DTensor, for x is one", x, torch.neg, {"gamma": torch.ones(2)}),
        (f"gamma {on_mesh}", x, torch.neg, {"gamma": elsewhere[0]}),
        (f"keep {on_mesh}", x, torch.neg, {"keep": elsewhere[:, 0] > 0}),
        ("keep must be a plain tensor, for x is one", plain, torch.neg, {"keep": elsewhere[:, 0] > 0}),
        ("batched[0] must be a DTensor, for x is one", x, torch.add, {"batched": (plain,)}),
        ("batched[0] must be a plain tensor, for x is one", plain, torch.add, {"batched": (x,)}),
        (f"batched[0] {on_mesh}", x, torch.add, {"batched": (elsewhere,)}),
        (
            "the output of branch must be a DTensor, for its input is one",
            x,
            lambda rows: rows.full_tensor(),
            {"keep": keep},
        ),
        (
            "the output of branch must be sharded along its samples, Shard(0), as its input is, but got (Replicate(),)",
            x,
            lambda rows: rows.redistribute(placements=[Replicate()]),
            {"keep": keep},
        ),
        ("the output of branch must have the shape of its input", x, lambda rows: rows[:, :1], {"keep": keep}),
        ("the output of branch must be a Tensor, but got a tuple of 2", x, lambda rows: (rows, rows), {"keep": keep}),
    ]
    found = []
    for sentence, given, branch, options in calls:
        torch.manual_seed(0)
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            stochastic_depth(given, branch, 0.5, True, **options)
        found.append((sentence, str(error.value)))
    with pytest.raises(TypeError) as error:
        compiled(x, torch.ones(2))
    found.append(("gamma must be a DTensor, for x is one", str(error.value)))
    with pytest.raises(RuntimeError) as error:
        make_fx(lambda x: stochastic_depth(x, torch.neg, 0.5, True))(x)
    found.append(("x must not be a DTensor where make_fx records stochastic_depth in training", str(error.value)))
    return found


def test_each_rank_skips_among_its_own_samples(tmp_path):
    (first, masks, converted, sentences), (second, masks_there, converted_there, sentences_there) = ranks.reports(
        _compare, tmp_path
    )
    for name, (difference, computed, together) in first.items():
        difference_there, computed_there, _ = second[name]
        assert max(difference, difference_there) < 1e-12, name
        if name not in BY_SAMPLES:
            assert computed == computed_there == together, name
        elif name != "no samples":  # a rank that drops all of its samples computes one more
            assert together <= computed + computed_there <= together + SEEDS, name
    assert max(first["bernoulli"][1], second["bernoulli"][1]) < 0.75 * first["bernoulli"][2]

    assert masks == masks_there
    masks, difference = masks
    assert difference < 1e-12
    assert any(mask[:4] != mask[5:] for mask in masks)

    assert converted == converted_there
    for placement, (difference, kept) in converted.items():
        assert difference < 1e-12, placement
        assert 0 < kept < 16, placement

    for sentence, message in (*sentences, *sentences_there):
        assert sentence in message
