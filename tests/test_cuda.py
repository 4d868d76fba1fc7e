"""Promise: what only a GPU can show: graphs, streams, sizes beyond 32 bits, memory safety."""

import pytest
import torch
from block_equality import Call, compare
from conftest import (
    DTYPES,
    FUSED_ADD_DTYPES,
    NO_CUDA_REASON,
    SAMPLINGS,
    Recorded,
    WeightBranch,
    add_inputs,
    added_samples,
    assert_rounded_once,
    assert_same_bits,
    checked,
    checked_add,
    checked_skip,
    dtypes_id,
    exact_add,
    fixed_count,
    kept_samples,
    like,
    predict_fixed,
    predict_keep,
    predict_skip,
    random_tensor,
    zero_dropped,
)

from droppath_ext import DropPath, DropPathAdd, StochasticDepth, convert, drop_path, drop_path_add, stochastic_depth

if NO_CUDA_REASON:
    pytest.skip(f"every test on a GPU is left out: {NO_CUDA_REASON}", allow_module_level=True)

DEVICE = torch.device("cuda")
GIB = 2**30

# (samples, features): vector and scalar rows, several samples in a block and several blocks in a sample.
MEMCHECK_SHAPES = [(1, 1), (3, 8), (5, 64), (33, 7), (300, 4), (4, 1000), (3, 4096), (2, 40_003), (2, 65_536)]
MEMCHECK_SHAPES += [(70_001, 1)]


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MEMCHECK_SHAPES)
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_memory_safety(dtype, shape, mode):
    """Forward and backward, aligned and one element off; small enough for compute-sanitizer, which finds the rest."""
    checked(random_tensor(shape, dtype, DEVICE), mode=mode)
    samples, features = shape
    base = random_tensor((samples * features + 1,), dtype, DEVICE)
    checked(base[1:].view(shape), mode=mode)


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_memory_safety_of_strided_inputs(dtype):
    checked(random_tensor((5, 6, 7, 3), dtype, DEVICE).to(memory_format=torch.channels_last))
    checked(random_tensor((9, 5, 16), dtype, DEVICE).transpose(0, 1))
    checked(random_tensor((6, 9, 16), dtype, DEVICE)[:, 1:, ::2])
    checked(random_tensor((1, 33), dtype, DEVICE).expand(7, 33))
    checked(random_tensor((0, 33), dtype, DEVICE))
    checked(random_tensor((33, 0), dtype, DEVICE))


def test_offset_advances_by_whole_counters():
    """Offsets of CUDA generators count in fours; the default one and an explicit one move alike."""
    generator = torch.Generator("cuda").manual_seed(1)
    for samples, mode in ((1, "row"), (100_000, "row"), (5, "batch")):
        before = generator.get_offset()
        drop_path(torch.ones(samples, 2, device=DEVICE), 0.5, training=True, mode=mode, generator=generator)
        step = generator.get_offset() - before
        assert step > 0
        assert step % 4 == 0


def test_mask_beyond_65535_samples_is_the_predicted_mask():
    for samples in (65_535, 65_536, 65_537, 3_000_001):
        x = torch.ones(samples, 3, device=DEVICE)
        keep = predict_keep(x, 0.3)
        assert torch.equal(kept_samples(drop_path(x, 0.3, training=True)), keep)


# --- CUDA graphs ---


def _capture(function, generator=None):
    """Warm up on a side stream, as torch asks for, then capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("own_generator", [False, True])
def test_graph_replay_draws_fresh_masks(own_generator):
    x = random_tensor((1000, 5), device=DEVICE).requires_grad_()
    grad = random_tensor((1000, 5), device=DEVICE, seed=1)
    generator = torch.Generator("cuda").manual_seed(3) if own_generator else None

    def step():
        out = drop_path(x, 0.5, training=True, generator=generator)
        return out.detach(), torch.autograd.grad(out, x, grad)[0]

    graph, (out, grad_x) = _capture(step, generator)
    masks = []
    for _ in range(4):
        graph.replay()
        masks.append(kept_samples(out))
        assert_same_bits(out, torch.where(masks[-1][:, None], x.detach() * 2, 0.0))
        assert_same_bits(grad_x, torch.where(masks[-1][:, None], grad * 2, 0.0))
    for i in range(4):
        for j in range(i):
            assert 380 < (masks[i] != masks[j]).sum() < 620


def test_graph_replay_follows_the_seed_and_the_eager_sequence():
    x = torch.ones(1000, 1, device=DEVICE)
    graph, out = _capture(lambda: drop_path(x, 0.5, training=True))

    def replays():
        torch.manual_seed(9)
        masks = []
        for _ in range(3):
            graph.replay()
            masks.append(kept_samples(out))
        return torch.stack(masks)

    first = replays()
    assert torch.equal(first, replays())
    torch.manual_seed(9)
    eager = torch.stack([kept_samples(drop_path(x, 0.5, training=True)) for _ in range(3)])
    assert torch.equal(first, eager)


def test_two_calls_in_one_graph_differ():
    x = torch.ones(1000, 1, device=DEVICE)
    graph, (first, second) = _capture(lambda: (drop_path(x, 0.5, training=True), drop_path(x, 0.5, training=True)))
    graph.replay()
    assert 380 < (kept_samples(first) != kept_samples(second)).sum() < 620


# --- streams, synchronisation, launches ---


def test_runs_on_the_current_stream():
    """The input is ready late and on a side stream only: a launch on any other stream reads garbage."""
    x = torch.zeros(256, 4096, device=DEVICE, requires_grad=True)
    source = random_tensor((256, 4096), device=DEVICE)
    keep = predict_keep(x, 0.5)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            x.copy_(source)
        out = drop_path(x, 0.5, training=True)
        (grad,) = torch.autograd.grad(out, x, source)
    side.synchronize()
    expected = torch.where(keep[:, None], source * 2, 0.0)
    assert_same_bits(out, expected)
    assert_same_bits(grad, expected)


def test_never_synchronises():
    x = random_tensor((64, 33), device=DEVICE).requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = DropPath(0.5)(x)
        out.backward(out.detach())
        expected = torch.where(out.detach().ne(0), x.detach() * 4, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(x.grad, expected)


def kernels(function):
    """What the function returns, and the names of the kernels that it launched."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = function()
        torch.cuda.synchronize()
    return result, [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("shape", [(64, 197, 384), (4096, 7), (2, 1_000_003)])
def test_one_kernel_each_way(shape):
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    grad = torch.ones(shape, device=DEVICE)

    drop_path(x, 0.5, training=True).backward(grad)  # loads the module
    x.grad = None
    out, forward = kernels(lambda: drop_path(x, 0.5, training=True))
    _, backward = kernels(lambda: torch.autograd.grad(out, x, grad))
    assert len(forward) == 1, forward
    assert len(backward) == 1, backward


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a second GPU is needed")
def test_runs_on_the_device_of_the_input():
    checked(random_tensor((64, 33), device="cuda:1"))
    assert torch.cuda.current_device() == 0


# --- beyond 32 bits ---


def _need(gib):
    torch.cuda.empty_cache()  # what other tests have given back counts as free
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free / GIB:.0f} are there")


@pytest.mark.parametrize(
    "shape",
    [(5, 2**29 + 3), (2, 2**31 + 5), (2**26, 33), (2**31 + 7, 1)],
    ids=["big_samples", "samples_beyond_32_bits", "small_samples", "samples_of_one"],
)
def test_more_than_2_to_the_31_elements(shape):
    _need(40)
    x = torch.randn(1 << 20, device=DEVICE, dtype=torch.bfloat16).clamp_(min=0.125)
    repeats = -(-shape[0] * shape[1] // x.numel())
    x = x.repeat(repeats)[: shape[0] * shape[1]].view(shape).requires_grad_()
    assert x.numel() > 2**31
    out, keep = torch.ops.droppath_ext.drop_path(x, 0.5, True, True, None)
    (grad,) = torch.autograd.grad(out, x, x.detach())
    with torch.no_grad():
        assert keep.shape == shape[:1]
        assert shape[0] < 3 or (keep.any() and not keep.all())
        x.mul_(keep[:, None]).mul_(2)  # in place: three tensors of this size fit, four may not
        assert torch.equal(out, x)
        assert torch.equal(grad, x)


def test_more_than_2_to_the_31_elements_strided():
    """A view whose last element lies beyond 32 bits of its storage."""
    _need(40)
    x = torch.ones(9, 2**28 // 64, 64, 2, device=DEVICE, dtype=torch.bfloat16)[..., :1]
    assert x.stride(0) * x.shape[0] > 2**31
    keep = predict_keep(x, 0.5)
    out = drop_path(x, 0.5, training=True)
    for sample, kept in zip(out, keep.tolist(), strict=True):
        assert sample.eq(2.0 * kept).all()


# --- drop_path_add ---

FLOATS = (torch.float32,) * 3


@pytest.mark.memcheck
@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (33, 7), (3, 4096), (2, 40_003), (70_001, 1)])
def test_add_memory_safety(dtypes, shape):
    """Forward and backward, aligned and one element off, with a mask and without."""
    inputs = add_inputs(shape, dtypes, DEVICE)
    checked_add(*inputs)
    checked_add(*inputs, drop_prob=0.0)
    checked_add(*inputs, mode="batch")
    misaligned = []
    for tensor in inputs:
        if tensor is not None:
            base = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)
            tensor = base[1:].view(tensor.shape).copy_(tensor)
        misaligned.append(tensor)
    checked_add(*misaligned)


@pytest.mark.memcheck
@pytest.mark.parametrize("dtypes", [FLOATS, (torch.bfloat16, torch.float32, torch.bfloat16)], ids=dtypes_id)
@pytest.mark.parametrize("shape", [(5, 6, 7, 3), (3, 64, 8, 8), (2, 5, 1, 1), (4, 1, 9, 9), (0, 3, 2, 2), (3, 2, 0, 5)])
def test_add_memory_safety_of_channels(dtypes, shape):
    x, residual, gamma = add_inputs(shape, dtypes, DEVICE, (shape[1], 1, 1))
    checked_add(x, residual, gamma)
    checked_add(x.to(memory_format=torch.channels_last), residual, gamma)
    checked_add(x, residual.to(memory_format=torch.channels_last), gamma)
    checked_add(x.transpose(0, 1).contiguous().transpose(0, 1), residual, gamma)


def test_add_mask_beyond_65535_samples_is_the_predicted_mask():
    for samples in (65_535, 65_536, 65_537, 3_000_001):
        x, residual, gamma = add_inputs((samples, 3), FLOATS, DEVICE)
        keep = predict_keep(x, 0.3)
        out = drop_path_add(x, residual, 0.3, training=True, gamma=gamma)
        assert torch.equal(added_samples(out, residual), keep)


@pytest.mark.parametrize("own_generator", [False, True])
def test_add_graph_replay_draws_fresh_masks(own_generator):
    x, residual, gamma = leaves = [t.requires_grad_() for t in add_inputs((1000, 5), FLOATS, DEVICE)]
    grad = random_tensor((1000, 5), device=DEVICE, seed=3)
    generator = torch.Generator("cuda").manual_seed(3) if own_generator else None

    def step():
        out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma, generator=generator)
        return out.detach(), torch.autograd.grad(out, leaves, grad)

    graph, (out, (grad_x, _, grad_gamma)) = _capture(step, generator)
    masks = []
    for _ in range(4):
        graph.replay()
        keep = added_samples(out, residual)
        masks.append(keep)
        assert_rounded_once(out, *exact_add(x, residual, gamma, keep, 2.0))
        exact = zero_dropped(2 * grad.double() * gamma.detach().double(), keep)
        assert_rounded_once(grad_x, exact, exact.abs())
        terms = zero_dropped(2 * grad.double() * x.detach().double(), keep)
        assert_rounded_once(grad_gamma, terms.sum(0), terms.abs().sum(0))
    for i in range(4):
        for j in range(i):
            assert 380 < (masks[i] != masks[j]).sum() < 620


def test_add_never_synchronises():
    module = DropPathAdd(0.5, dim=33, init_values=0.5).to(DEVICE)
    x, residual, _ = add_inputs((64, 33), FLOATS, DEVICE)
    x.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = module(x, residual)
        out.backward(residual)
        module.eval()(x, residual)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    keep = added_samples(out, residual)
    assert 0 < keep.sum() < 64
    assert_same_bits(x.grad, zero_dropped(residual, keep))  # times 2 times 0.5


@pytest.mark.parametrize("shape", [(64, 197, 384), (4096, 7), (2, 1_000_003)])
@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
def test_add_one_kernel_each_way(shape, with_gamma, drop_prob):
    """And a small one that adds up the parts of gamma's gradient."""
    x, residual = (torch.ones(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    gamma = torch.ones(shape[-1:], device=DEVICE, requires_grad=True) if with_gamma else None
    leaves = [t for t in (x, residual, gamma) if t is not None]
    grad = torch.ones(shape, device=DEVICE)

    def forward():
        return drop_path_add(x, residual, drop_prob, training=True, gamma=gamma)

    torch.autograd.grad(forward(), leaves, grad)  # loads the module
    out, first = kernels(forward)
    _, second = kernels(lambda: torch.autograd.grad(out, leaves, grad))
    assert len(first) == 1, first
    assert len(second) <= (2 if with_gamma else 1), second


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a second GPU is needed")
def test_add_runs_on_the_device_of_the_input():
    checked_add(*add_inputs((64, 33), FLOATS, "cuda:1"))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(
    "shape",
    [(5, 2**29 + 3), (2, 2**31 + 5), (2**26, 33)],
    ids=["big_samples", "samples_beyond_32_bits", "small_samples"],
)
def test_add_more_than_2_to_the_31_elements(shape):
    _need(60)
    x = torch.ones(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    residual = torch.full(shape, 4.0, device=DEVICE, dtype=torch.bfloat16)
    gamma = torch.full(shape[-1:], 0.5, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    assert x.numel() > 2**31
    out, keep = torch.ops.droppath_ext.drop_path_add(x, residual, gamma, 0.5, True, True)
    grad_x, grad_gamma = torch.autograd.grad(out, (x, gamma), residual)
    with torch.no_grad():
        assert keep.shape == shape[:1]
        assert shape[0] < 3 or (keep.any() and not keep.all())
        residual.add_(keep[:, None])  # 4 + 0.5 * 1 * 2; in place: another tensor of this size may not fit
        assert torch.equal(out, residual)
        residual.fill_(4.0).mul_(keep[:, None])  # 4 * 0.5 * 2
        assert torch.equal(grad_x, residual)
        expected = torch.full_like(gamma, 8.0 * keep.sum())
        torch.testing.assert_close(grad_gamma, expected, rtol=0.004, atol=0)


# --- stochastic_depth ---


class _Wave(Recorded):
    def compute(self, x):
        return x.sin() + 2 * x


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 64), (33, 7), (3, 4096), (2, 40_003)])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_memory_safety(dtype, shape, sampling):
    """Forward and backward, aligned and one element off, with gamma and without."""
    x = random_tensor(shape, dtype, DEVICE)
    gamma = random_tensor(shape[-1:], dtype, DEVICE, seed=2)
    base = random_tensor((x.numel() + 1,), dtype, DEVICE)
    for values in (x, base[1:].view(shape)):
        checked_skip(values, _Wave(), 0.4, sampling=sampling)
        checked_skip(values, _Wave(), 0.4, gamma=gamma, sampling=sampling)
        checked_skip(values, _Wave(), 1.0, gamma=gamma, sampling=sampling)


@pytest.mark.memcheck
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", [(5, 6, 7, 3), (3, 64, 8, 8), (4, 1, 9, 9)])
def test_skip_memory_safety_of_channels(sampling, shape):
    x = random_tensor(shape, device=DEVICE)
    gamma = random_tensor((shape[1], 1, 1), device=DEVICE, seed=2)
    checked_skip(x, _Wave(), 0.4, gamma=gamma, sampling=sampling)
    checked_skip(x.to(memory_format=torch.channels_last), _Wave(), 0.4, gamma=gamma, sampling=sampling)
    checked_skip(x.transpose(0, 1).contiguous().transpose(0, 1), _Wave(), 0.4, gamma=gamma, sampling=sampling)


@pytest.mark.memcheck
@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (7, 3), (1024, 1), (1025, 1024), (70_001, 35_000)])
def test_fixed_is_the_subset_of_the_host(size, count):
    x = torch.empty(size, device=DEVICE)
    for _ in range(3):
        expected = predict_fixed(x, count)
        slots, kept = torch.ops.droppath_ext.draw_fixed(x, count)
        assert torch.equal(slots, expected)
        assert torch.equal(kept, (expected >= 0).nonzero().flatten())


@pytest.mark.parametrize("samples", [65_535, 65_536, 65_537, 1_000_003])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_beyond_65535_samples(samples, sampling):
    x = random_tensor((samples, 3), device=DEVICE)
    keep = predict_fixed(x, fixed_count(samples, 0.3)) >= 0 if sampling == "fixed" else predict_skip(x, 0.3)
    out = stochastic_depth(x, torch.neg, 0.3, training=True, sampling=sampling)
    assert torch.equal(added_samples(out, x), keep)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drop_prob", [0.5, 1.0])
def test_skip_never_synchronises(sampling, drop_prob):
    """Forward and backward, in training and in eval; the number of kept samples is known to the host all the same."""
    module = StochasticDepth(torch.nn.Linear(33, 33), drop_prob, dim=33, init_values=0.5, sampling=sampling).to(DEVICE)
    x = random_tensor((64, 33), device=DEVICE).requires_grad_()
    mask = torch.ones(64, 5, dtype=torch.bool, device=DEVICE)
    rows = []

    def branch(t, m):
        rows.append((t, m))
        return torch.sin(t)

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = module(x)
        out.backward(x.detach())
        stochastic_depth(x, branch, drop_prob, training=True, batched=(mask,), sampling=sampling)
        module.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ((seen, seen_mask),) = rows
    assert len(seen) == len(seen_mask) >= 1
    keep = added_samples(out, x)
    assert 0 < keep.sum() < 64 if drop_prob == 0.5 else not keep.any()
    assert_same_bits(x.grad[~keep], x.detach()[~keep])


@pytest.mark.parametrize("own_generator", [False, True])
def test_skip_graph_replay_draws_fresh_subsets(own_generator):
    x = random_tensor((1000, 5), device=DEVICE).requires_grad_()
    branch = like(WeightBranch(5), x)
    gamma = random_tensor((5,), device=DEVICE, seed=2).requires_grad_()
    grad = random_tensor((1000, 5), device=DEVICE, seed=3)
    generator = torch.Generator("cuda").manual_seed(3) if own_generator else None

    def step():
        out = stochastic_depth(x, branch, 0.5, training=True, gamma=gamma, sampling="fixed", generator=generator)
        return out.detach(), torch.autograd.grad(out, [x, gamma, branch.weight], grad)

    graph, (out, (grad_x, grad_gamma, grad_weight)) = _capture(step, generator)
    weight, value, scale = (t.detach().double() for t in (branch.weight, x, gamma))
    masks = []
    for _ in range(4):
        graph.replay()
        keep = added_samples(out, x)
        assert keep.sum() == 500
        masks.append(keep)
        assert_rounded_once(out, *exact_add(branch(x), x, gamma, keep, 2.0))
        torch.testing.assert_close(
            grad_x.double(), grad + zero_dropped(2 * grad.double() * weight * scale, keep), rtol=1e-5, atol=1e-5
        )
        terms = zero_dropped(2 * grad.double() * value, keep).sum(0)
        torch.testing.assert_close(grad_gamma.double(), terms * weight, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(grad_weight.double(), terms * scale, rtol=1e-4, atol=1e-3)
    for i in range(4):
        for j in range(i):
            assert 380 < (masks[i] != masks[j]).sum() < 620


def test_skip_graph_replay_follows_the_seed_and_the_eager_sequence():
    x = random_tensor((1000, 1), device=DEVICE)

    def step():
        return stochastic_depth(x, torch.neg, 0.5, training=True, sampling="fixed")

    graph, out = _capture(step)
    torch.manual_seed(9)
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(added_samples(out, x))
    torch.manual_seed(9)
    for mask in replayed:
        assert torch.equal(added_samples(step(), x), mask)


def test_skip_two_calls_in_one_graph_differ():
    x = random_tensor((1000, 1), device=DEVICE)
    graph, outs = _capture(
        lambda: [stochastic_depth(x, torch.neg, 0.5, training=True, sampling="fixed") for _ in range(2)]
    )
    graph.replay()
    first, second = (added_samples(out, x) for out in outs)
    assert 380 < (first != second).sum() < 620


def test_skip_bernoulli_refuses_to_be_captured():
    """A graph would replay one number of kept samples for ever; the sentence says what to do."""
    x = random_tensor((64, 5), device=DEVICE)
    called = []
    with (
        pytest.raises(RuntimeError, match=r'sampling="bernoulli".*CUDA graph.*capture with sampling="fixed"'),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        stochastic_depth(x, lambda rows: called.append(rows) or rows, 0.5, training=True)
    assert not called
    torch.cuda.synchronize()
    assert torch.equal(stochastic_depth(x, torch.neg, 0.5), x - x)


def test_skip_runs_on_the_current_stream():
    """x is ready late and on a side stream only: a launch on any other stream reads garbage."""
    source = random_tensor((256, 4096), device=DEVICE)
    torch.cuda.synchronize()
    for sampling in SAMPLINGS:
        x = torch.zeros(256, 4096, device=DEVICE, requires_grad=True)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            with torch.no_grad():
                x.copy_(source)
            out = stochastic_depth(x, torch.neg, 0.5, training=True, sampling=sampling)
            (grad,) = torch.autograd.grad(out, x, source)
        side.synchronize()
        keep = added_samples(out, source)
        assert 64 < keep.sum() < 192
        expected = torch.where(keep[:, None], -source, source)
        assert_same_bits(out, expected)
        assert_same_bits(grad, expected)


def test_skip_indices_survive_until_they_are_copied():
    """They leave the host without a wait: calls in a row must not overwrite what is still on its way."""
    x = random_tensor((512, 64), device=DEVICE)
    torch.manual_seed(3)
    torch.cuda._sleep(100_000_000)
    outs = [stochastic_depth(x, torch.neg, 0.5, training=True) for _ in range(50)]
    torch.manual_seed(3)
    for out in outs:
        keep = predict_skip(x, 0.5)
        stochastic_depth(torch.ones(512, 1), torch.neg, 0.5, training=True)  # advances as the call did
        assert torch.equal(added_samples(out, x), keep)


@pytest.mark.parametrize("shape", [(64, 197, 384), (4096, 7)])
@pytest.mark.parametrize("with_gamma", [False, True])
def test_skip_three_kernels_forward_and_two_back(shape, with_gamma):
    """Draw, gather and scatter_add; their backwards, and a small kernel that adds up the parts of gamma's gradient."""
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    gamma = torch.ones(shape[-1:], device=DEVICE, requires_grad=True) if with_gamma else None
    leaves = [t for t in (x, gamma) if t is not None]
    grad = torch.ones(shape, device=DEVICE)

    def forward():
        return stochastic_depth(x, lambda rows: rows, 0.5, training=True, gamma=gamma, sampling="fixed")

    torch.autograd.grad(forward(), leaves, grad)  # loads the module
    out, first = kernels(forward)
    _, second = kernels(lambda: torch.autograd.grad(out, leaves, grad))
    assert len(first) <= 3, first
    assert len(second) <= (3 if with_gamma else 2), second


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a second GPU is needed")
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_runs_on_the_device_of_the_input(sampling):
    checked_skip(random_tensor((64, 33), device="cuda:1"), _Wave(), sampling=sampling)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("shape", [(5, 2**29 + 3), (2**26, 33)], ids=["big_samples", "small_samples"])
def test_skip_more_than_2_to_the_31_elements(shape):
    _need(60)
    x = torch.ones(shape, device=DEVICE, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    keep = predict_skip(x[:, :1], 0.5)
    with torch.no_grad():
        out = stochastic_depth(x, lambda rows: rows, 0.5, training=True)
        x.add_(keep[:, None], alpha=2)  # in place: another tensor of this size may not fit
        assert torch.equal(out, x)


# --- convert ---

CONVERTED = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    ("swin_tiny_patch4_window7_224", {"img_size": 112, "depths": (1, 1, 2, 1)}),
    ("convnext_atto", {"depths": (1, 1, 2, 1)}),
    ("cait_xxs24_224", {"img_size": 32, "depth": 2}),
    ("tf_efficientnetv2_b0", {}),
]


def _model(name, arguments):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.5, **arguments)
    return model.to(DEVICE).train(), random_tensor((8, 3, *[arguments.get("img_size", 64)] * 2), device=DEVICE)


@pytest.mark.parametrize(("name", "arguments"), CONVERTED, ids=[name for name, _ in CONVERTED])
def test_converted_models_compute_what_they_did(name, arguments):
    """float64, the same masks: outputs, gradients and buffers of keep, fuse and skip; the evaluation bit for bit."""
    model, images = _model(name, arguments)
    assert compare(Call("", model, (images,))).faults == []


@pytest.mark.parametrize("level", ["keep", "fuse", "skip"])
def test_converted_models_train_in_half_precision(level):
    """Planned in the first step, under autocast; no site missed its plan."""
    model, images = _model(*CONVERTED[0])
    report = convert(model, level, min_drop_prob=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), torch.arange(8, device=DEVICE) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert [(site.level, site.missed) for site in report.sites] == [(level, 0)] * len(report.sites)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_converted_model_replays_in_a_graph():
    model, images = _model(*CONVERTED[0])
    convert(model, "fuse", example=images)
    graph, out = _capture(lambda: model(images).detach())
    outs = []
    for _ in range(4):
        graph.replay()
        outs.append(out.clone())
    assert all(not torch.equal(outs[i], outs[j]) for i in range(4) for j in range(i))
    before = torch.cuda.get_rng_state()
    graph.replay()
    replayed = out.clone()
    torch.cuda.set_rng_state(before)
    torch.testing.assert_close(model(images), replayed)
