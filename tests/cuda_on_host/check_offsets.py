"""Promise: the kernels' offsets are right beyond 2**31.

The tensors of this file are larger than the memory that they use: they are written in a few places, and only the blocks
that meet those places run.
"""

import math

import pytest
import torch
from conftest import along, assert_rounded_once, assert_same_bits, predict_keep, random_tensor, seeded
from cuda_on_host.plugin import BUILD, configure
from cuda_on_host.plugin import OPS as HOST
from test_geometry import assert_gradients

from droppath_ext import _C

if BUILD in ("pattern", "address", "thread"):
    pytest.skip(f"the build {BUILD} uses all of the memory that is there", allow_module_level=True)

OPS = torch.ops.droppath_ext
HALF = torch.float16
FAR = 2**31
# In the order of memory, and the view of that; the samples are the last dim but one.
LAYOUTS = {
    "contiguous": ((2049, 2**20), lambda t: t),
    "sequence_first": ((2049, 32, 2**15), lambda t: t.transpose(0, 1)),
}
# The shape of a sample, and the dim of gamma: a line is a token, or a sample.
GAMMA_SHAPES = {"tokens": ((512, 2048), 2), "images": ((64, 256, 256), 1)}


@pytest.fixture(autouse=True)
def _as_before():
    yield
    configure()
    HOST.run_blocks(0, 2**63 - 1)
    HOST.record_stores(False)


def fill(numbers, begin, end, seed):
    part = numbers[max(begin, 0) : end]
    part.copy_(random_tensor(part.shape, HALF, seed=seed))


def numbers_near(total, seed):
    """So many, of which those around FAR and the last ones are written."""
    numbers = torch.empty(total, dtype=HALF)
    for place in (FAR, total):
        fill(numbers, place - 2**14, place + 2**14, seed)
    return numbers


def in_memory(tensor):
    """The elements of a dense tensor in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def run_blocks(function, first, last):
    """What a function gives if its kernels run these blocks alone, in the order of memory; and the runs written."""
    HOST.run_blocks(first, last)
    HOST.record_stores(True)
    out = in_memory(function())
    places = [(place - out.data_ptr()) // out.element_size() for place in HOST.recorded_stores()]
    HOST.record_stores(False)
    return out, list(zip(places[::2], places[1::2], strict=True))


def run_near(function, places):
    """For each place the output of the block that writes it and of the one before, and from where to where that is."""
    _, [(_, of_a_block)] = run_blocks(function, 0, 0)
    for place in places:
        block = place // of_a_block
        out, [(begin, end)] = run_blocks(function, block - 1, block)
        assert begin < place < end
        yield out, begin, end


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_drop_path_add(layout, with_gamma, seed):
    shape, view = LAYOUTS[layout]
    total, length = math.prod(shape), shape[-1]
    x, residual = numbers_near(total, seed=1), numbers_near(total, seed=2)
    gamma = random_tensor((length,), HALF, seed=3) if with_gamma else None
    keep = predict_keep(view(x.view(shape)), 0.5, generator=seeded("cpu", seed))

    def function():
        operands = view(x.view(shape)), view(residual.view(shape)), gamma
        return OPS.drop_path_add(*operands, 0.5, True, True, seeded("cpu", seed))[0]

    for out, begin, end in run_near(function, (FAR, total - 1)):
        places = torch.arange(begin, end)
        branch = x[begin:end].double() * 2 * (gamma[places % length].double() if with_gamma else 1)
        branch[~keep[places // length % shape[-2]]] = 0
        terms = residual[begin:end].double()
        assert_rounded_once(out[begin:end], terms + branch, terms.abs() + branch.abs())


def test_backward_of_small_samples():
    """More rows than 2**31."""
    total = FAR + 2**12
    grad, keep = numbers_near(total, seed=1), torch.empty(total, dtype=torch.bool)
    for place in (FAR, total):
        keep[place - 2**14 : place + 2**14] = grad[place - 2**14 : place + 2**14] > 0.3

    def function():
        return OPS.scale_kept(grad.view(-1, 1), keep, 2.0)

    for grad_x, begin, end in run_near(function, (FAR, total - 1)):
        assert_same_bits(grad_x[begin:end], torch.where(keep[begin:end], grad[begin:end] * 2, 0.0))


@pytest.mark.parametrize("name", GAMMA_SHAPES)
def test_backward_with_gamma(name):
    """A block walks over the lines; with so many multiprocessors each has two, one in each half of 2**32 elements."""
    sample, dim = GAMMA_SHAPES[name]
    shape = (2**32 // math.prod(sample) + 2, *sample)
    total, line, inner = math.prod(shape), math.prod(shape[dim:]), math.prod(shape[dim + 1 :])
    grad, x = torch.empty(total, dtype=HALF), torch.empty(total, dtype=HALF)
    gamma = random_tensor((shape[dim],), HALF, seed=3)
    keep = torch.arange(shape[0]) % 3 != 0
    configure(multiprocessors=2**22)

    def function():
        operands = grad.view(shape), x.view(shape), along(dim, gamma, len(shape)), keep
        return OPS.add_kept_backward(*operands, 2.0, HALF, (True, True))[0]

    _, [(_, of_a_block), _] = run_blocks(function, 0, 0)
    for place in (FAR, total - 1):
        block = place // line % (total // line // 2) * (line // of_a_block) + place % line // of_a_block
        _, runs = run_blocks(function, block, block)
        assert len(runs) == 2
        assert any(begin <= place < end for begin, end in runs)
        for seed, run in enumerate(runs):
            fill(grad, *run, seed)
            fill(x, *run, seed + 2)
        grad_x, _ = run_blocks(function, block, block)
        for begin, end in runs:
            places = torch.arange(begin, end)
            exact = grad[begin:end].double() * 2 * gamma[places // inner % shape[dim]].double()
            exact[~keep[places // (total // shape[0])]] = 0
            assert_rounded_once(grad_x[begin:end], exact, exact.abs())


@pytest.mark.parametrize("name", GAMMA_SHAPES)
def test_gradient_of_gamma(name):
    """All lines, of which few are kept."""
    sample, dim = GAMMA_SHAPES[name]
    shape = (FAR // math.prod(sample) + 2, *sample)
    grad, x = torch.empty(shape, dtype=HALF), torch.empty(shape, dtype=HALF)
    gamma = along(dim, torch.ones(shape[dim], dtype=HALF), len(shape))
    kept = [len(x) - 2, len(x) - 1]
    keep = torch.zeros(len(x), dtype=torch.bool)
    keep[kept] = True
    grad[kept], x[kept] = (random_tensor((2, *sample), HALF, seed=seed) for seed in (1, 2))
    terms = grad[kept].double() * x[kept].double() * 2
    _, grad_gamma = OPS.add_kept_backward(grad, x, gamma, keep, 2.0, HALF, (False, True))
    assert_rounded_once(grad_gamma, terms.sum_to_size(gamma.shape), terms.abs().sum_to_size(gamma.shape))


def index_of(kept, size):
    """int64 tensors: the kept samples, and the place of each sample among them, or -1."""
    slots = torch.full((size,), -1)
    slots[kept] = torch.arange(len(kept))
    return torch.tensor(kept), slots


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather(layout):
    shape, view = LAYOUTS[layout]
    total, samples, length = math.prod(shape), *shape[-2:]
    x = numbers_near(total, seed=1)
    kept, slots = index_of([samples - 1, samples - 2], samples)

    def function():
        return OPS.scale_kept(view(x.view(shape)), kept, 1.0)

    for out, begin, end in run_near(function, (length - 1, total // samples * 2 - 1)):
        places = torch.arange(begin, end)
        rows = places // (2 * length), kept[places // length % 2], places % length
        assert_same_bits(out[begin:end], x.view(-1, samples, length)[rows])


def test_scatter_add_in_place():
    shape, _ = LAYOUTS["contiguous"]
    total, length = math.prod(shape), shape[-1]
    residual, before = numbers_near(total, seed=1), numbers_near(total, seed=1)
    kept, slots = index_of([2048, 0, 2047], 2049)
    y = random_tensor((3, length), HALF, seed=2)

    def function():
        _C.add_kept_(residual.view(shape), y, slots)
        return residual

    for out, begin, end in run_near(function, (FAR, total - 1)):
        places = torch.arange(begin, end)
        added = y[slots[places // length], places % length]
        assert_same_bits(out[begin:end], (before[begin:end].float() + added.float()).half())


def test_scatter_add_backward():
    sample, _ = GAMMA_SHAPES["tokens"]
    grad = torch.empty((FAR // math.prod(sample) + 2, *sample), dtype=HALF)
    kept, slots = index_of([len(grad) - 1, len(grad) - 2], len(grad))
    grad[kept], y = (random_tensor((2, *sample), HALF, seed=seed) for seed in (1, 2))
    gamma = random_tensor(sample[-1:], HALF, seed=3)
    grads = OPS.add_kept_backward(grad, y, gamma, kept, 2.0, HALF, (True, True))
    assert_gradients(grads, grad[kept], y, gamma, kept >= 0, 2.0)
