"""Promise: what only a GPU can show: graphs, streams, sizes beyond 32 bits, memory safety."""

import pytest
import torch
from conftest import (
    DTYPES,
    FUSED_ADD_DTYPES,
    NO_CUDA_REASON,
    add_inputs,
    added_samples,
    assert_rounded_once,
    assert_same_bits,
    checked,
    checked_add,
    dtypes_id,
    exact_add,
    kept_samples,
    predict_keep,
    random_tensor,
    zero_dropped,
)

from droppath_ext import DropPath, DropPathAdd, drop_path, drop_path_add

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
