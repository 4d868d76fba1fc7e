"""Promise: no size, alignment or layout at which a kernel changes its way through the memory gives another result."""

import pytest
import torch
from conftest import (
    ADD_DTYPES,
    ADD_GAMMA_DTYPES,
    DEVICES,
    DTYPES,
    Recorded,
    along,
    checked,
    checked_add,
    checked_skip,
    random_tensor,
)
from hypothesis import given, settings
from hypothesis import strategies as st

# A different choice in each run would make CI a lottery; deadlines would make it a benchmark.
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)
# A parameter in the place of the fixture, which hypothesis would suspect of a state.
ON_EACH_DEVICE = pytest.mark.parametrize("device", [torch.device(device) for device in DEVICES], ids=str)

# The numbers at which something changes: vectors of 1 to 8 elements, warps of 32 lanes, blocks of 256 threads with 1 to
# 4 vectors each. One less and one more of each are next to them.
EDGES = (1, 2, 4, 8, 16, 32, 64, 256, 512, 1024, 2048, 4096)
around_edges = st.builds(lambda edge, by: max(edge + by, 1), st.sampled_from(EDGES), st.integers(-1, 1))
# Of H * W: real planes, those shorter than a vector, and those longer than what a block works on.
planes = st.sampled_from((1, 2, 3, 5, 7, 9, 16, 49, 50, 64, 196, 257, 784, 1000, 3136, 4097, 5000))
few = st.integers(1, 6)


def limited(*sizes, limit=40_000):
    """The sizes, the first of them shortened until they are no more elements than that."""
    rest = torch.Size(sizes[1:]).numel()
    return (max(min(sizes[0], limit // max(rest, 1)), 1), *sizes[1:])


@st.composite
def layouts(draw):
    """A shape with one or more dims beside the samples, and the order in which they lie in memory."""
    kind = draw(st.sampled_from(["rows", "tokens", "images"]))
    if kind == "rows":
        shape = limited(draw(st.integers(1, 300)), draw(around_edges))
    elif kind == "tokens":
        shape = limited(draw(few), draw(st.integers(1, 60)), draw(around_edges))
    else:
        shape = limited(draw(few), draw(st.sampled_from((1, 2, 3, 7, 8, 9, 16, 24, 31, 33, 64))), draw(planes), 1)
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else tuple(range(len(shape)))
    return shape, tuple(order)


def laid_out(layout, dtype, device, misaligned=0, seed=0):
    """Random numbers of this shape, its dims in this order in memory, so many elements behind an aligned address."""
    shape, order = layout
    count = torch.Size(shape).numel()
    values = random_tensor((count + misaligned,), dtype, device, seed)[misaligned:]
    inverse = [order.index(dim) for dim in range(len(shape))]
    return values.view([shape[dim] for dim in order]).permute(inverse)


misalignments = st.one_of(st.just(0), st.integers(0, 7))


@ON_EACH_DEVICE
@EXAMPLES
@given(
    layout=layouts(), dtype=st.sampled_from(DTYPES), misaligned=misalignments, mode=st.sampled_from(["row", "batch"])
)
def test_drop_path(device, layout, dtype, misaligned, mode):
    checked(laid_out(layout, dtype, device, misaligned), mode=mode)


@ON_EACH_DEVICE
@EXAMPLES
@given(
    layout=layouts(),
    dtypes=st.sampled_from(ADD_DTYPES),
    misaligned=st.tuples(misalignments, misalignments),
    drop_prob=st.sampled_from([0.0, 0.5]),
)
def test_drop_path_add(device, layout, dtypes, misaligned, drop_prob):
    x, residual = (laid_out(layout, dtypes[i], device, misaligned[i], seed=i) for i in range(2))
    checked_add(x, residual, None, drop_prob)


@ON_EACH_DEVICE
@EXAMPLES
@given(
    layout=layouts(),
    dtypes=st.sampled_from(ADD_GAMMA_DTYPES),
    misaligned=st.tuples(misalignments, misalignments, misalignments),
    drop_prob=st.sampled_from([0.0, 0.5]),
    data=st.data(),
)
def test_drop_path_add_with_gamma(device, layout, dtypes, misaligned, drop_prob, data):
    x, residual = (laid_out(layout, dtypes[i], device, misaligned[i], seed=i) for i in range(2))
    dim = data.draw(st.integers(1, x.dim() - 1), label="dim of gamma")
    gamma = laid_out(((x.shape[dim],), (0,)), dtypes[2], device, misaligned[2], seed=2)
    checked_add(x, residual, along(dim, gamma, x.dim()), drop_prob)


class Doubled(Recorded):
    """Never zero, so that a kept sample is seen in the output."""

    def compute(self, x):
        return 2 * x


@ON_EACH_DEVICE
@EXAMPLES
@given(
    layout=layouts(),
    dtype=st.sampled_from(DTYPES),
    misaligned=misalignments,
    sampling=st.sampled_from(["bernoulli", "fixed"]),
    with_gamma=st.booleans(),
)
def test_stochastic_depth(device, layout, dtype, misaligned, sampling, with_gamma):
    x = laid_out(layout, dtype, device, misaligned)
    gamma = random_tensor(x.shape[-1:], dtype, device, seed=2).abs() + 0.5 if with_gamma else None
    checked_skip(x, Doubled(), 0.4, gamma=gamma, sampling=sampling)


@pytest.mark.parametrize("samples", [65_535, 65_536, 65_537, 131_073])
def test_more_samples_than_a_grid_has_in_y(device, samples):
    for features in (1, 3):
        checked(random_tensor((samples, features), device=device))
        x, residual, gamma = (
            random_tensor(shape, device=device) for shape in ((samples, features),) * 2 + ((features,),)
        )
        checked_add(x, residual, gamma)


@pytest.mark.parametrize("channels", [3, 8, 24])
@pytest.mark.parametrize("side", [1, 2, 3, 7, 14, 28, 56])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planes_of_real_models(device, dtype, channels, side):
    """Many samples, so that a block walks over several lines; sums of many parts."""
    samples = max(20_000 // (channels * side * side), 2)
    x, residual = (random_tensor((samples, channels, side, side), dtype, device, seed=seed) for seed in range(2))
    checked_add(x, residual, random_tensor((channels, 1, 1), dtype, device, seed=2))
