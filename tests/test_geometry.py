"""Promise: the sizes, layouts and addresses at which a kernel changes its ways change no result."""

import math

import torch
from conftest import (
    DTYPES,
    FUSED_ADD_DTYPES,
    add_dtype,
    along,
    assert_positive_zero,
    assert_rounded_once,
    assert_same_bits,
    checked,
    checked_add,
    exact_add,
    random_tensor,
    seeded,
    zero_dropped,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from droppath_ext._native import _C

OPS = torch.ops.droppath_ext

# Elements of a vector; lanes of a warp; threads of a block; elements that a block takes, of one, two or four vectors
# for each thread.
WIDTHS = (1, 2, 4, 8)
EDGES = (*WIDTHS, 16, 32, *sorted({256 * vectors * width for vectors in (1, 2, 4) for width in WIDTHS}))
PLANES = ((7, 7), (14, 14), (56, 56))
MOST = 20_000  # elements, for the sake of time

MODES = st.sampled_from(["row", "row", "batch"])
SEEDS = st.integers(0, 99)

# Where a tensor of the shape (b, c, *s) may lie: its shape in the order of memory, and the view of that.
LAYOUTS = {
    "contiguous": (lambda b, c, *s: (b, c, *s), lambda t: t),
    # Sequence-first tokens, or channels that lie outside of the samples.
    "swapped": (lambda b, c, *s: (c, b, *s), lambda t: t.transpose(0, 1)),
    "channels_last": (lambda b, c, *s: (b, *s, c), lambda t: t.movedim(-1, 1)),
    "every_other_sample": (lambda b, c, *s: (2 * b, c, *s), lambda t: t[1::2]),
    "without_class_token": (lambda b, c, *s: (b, c + 1, *s), lambda t: t[:, 1:]),
}


def explored(test):
    """Runs a test for the draws that it makes: the same ones each time."""
    return settings(
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )(given(data=st.data())(test))


def near(edges):
    """A size at one of these, or a bit off: by one element, or by a vector."""
    steps = st.sampled_from([0, *WIDTHS, *(-width for width in WIDTHS)])
    return st.builds(lambda edge, step: max(edge + step, 1), st.sampled_from(edges), steps)


@st.composite
def shapes(draw):
    """Rows, short and long; tokens; images; and more samples than a grid's other dimensions have blocks, 65,535."""
    kind = draw(st.sampled_from(["rows"] * 2 + ["tokens"] * 2 + ["images"] * 3 + ["samples"]))
    if kind == "samples":
        return (draw(near([65_536])), draw(st.integers(1, 3)))
    if kind == "rows":
        samples, features = draw(st.integers(1, 5) | near([256, 512, 1024])), draw(near(EDGES))
        return (min(samples, max(MOST // features, 1)), features)
    samples = draw(st.integers(1, 5))
    if kind == "tokens":
        tokens, features = draw(st.integers(1, 40)), draw(near([*WIDTHS, 16, 32, 64, 256, 1024, 2048]))
        return (samples, min(tokens, max(MOST // (samples * features), 1)), features)
    plane = draw(st.sampled_from(PLANES) | st.tuples(st.just(1), st.integers(1, 5000) | near([256, 1024, 2048])))
    channels = draw(near([*WIDTHS, 16, 32]))
    return (samples, min(channels, max(MOST // (samples * math.prod(plane)), 1)), *plane)


def draw_tensors(data, device, *operands):
    """A tensor for each shape and dtype. Mostly they lie alike; half the time all are aligned."""
    layouts, offsets = st.sampled_from(sorted(LAYOUTS)), st.integers(0, 7)
    if data.draw(st.integers(0, 3)):
        layouts = st.just(data.draw(layouts))
    if data.draw(st.booleans()):
        offsets = st.just(0)
    tensors = []
    for seed, (shape, dtype) in enumerate(operands):
        stored, view = LAYOUTS[data.draw(layouts)]
        sizes, offset = stored(*shape), data.draw(offsets)
        tensors.append(view(random_tensor((offset + math.prod(sizes),), dtype, device, seed)[offset:].view(sizes)))
    return tensors


def draw_gamma(data, device, shape, dtype):
    """Along any dim of a sample; None without a dtype."""
    if dtype is None:
        return None
    dim, offset = data.draw(st.integers(1, len(shape) - 1)), data.draw(st.sampled_from([0, 0, 1, 2, 4]))
    return along(dim, random_tensor((shape[dim] + offset,), dtype, device, seed=9)[offset:], len(shape))


def draw_index(data, device, size):
    """Some samples in any order, maybe -1 in the place of one; and the place of each sample among them, or -1."""
    index = torch.randperm(size, generator=seeded("cpu", data.draw(SEEDS)))[: data.draw(st.integers(1, size))]
    if data.draw(st.booleans()):
        index[-1] = -1
    inverse = torch.full((size,), -1)
    inverse[index[index >= 0]] = (index >= 0).nonzero().flatten()
    return index.to(device), inverse.to(device)


def taken(x, index):
    """x[index], bit for bit, and zeros where that is -1."""
    rows = x[index.clamp(min=0)]
    rows[index < 0] = 0
    return rows


@explored
def test_drop_path(device, data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    (x,) = draw_tensors(data, device, (shape, dtype))
    torch.manual_seed(data.draw(SEEDS))
    checked(x, data.draw(st.sampled_from([0.3, 0.5, 1.0])), mode=data.draw(MODES))


@explored
def test_drop_path_add(device, data):
    shape, dtypes = data.draw(shapes()), data.draw(st.sampled_from(FUSED_ADD_DTYPES))
    x, residual = draw_tensors(data, device, (shape, dtypes[0]), (shape, dtypes[1]))
    gamma = draw_gamma(data, device, shape, dtypes[2])
    torch.manual_seed(data.draw(SEEDS))
    checked_add(x, residual, gamma, data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])), mode=data.draw(MODES))


def assert_gradients(grads, grad, x, gamma, keep, scale):
    """Those of x and gamma, where grad and x have a row for each entry of keep."""
    grad_x, grad_gamma = grads
    terms = zero_dropped(grad, keep).double() * scale
    exact = terms if gamma is None else zero_dropped(terms * gamma.double(), keep)
    assert_rounded_once(grad_x, exact, exact.abs())
    assert_positive_zero(grad_x[~keep])
    if gamma is not None:
        terms = terms * zero_dropped(x, keep).double()
        assert_rounded_once(grad_gamma, terms.sum_to_size(gamma.shape), terms.abs().sum_to_size(gamma.shape))


@explored
def test_gradients(device, data):
    """Those that come in lie where they like; the test before has them where the output lies."""
    shape, dtypes = data.draw(shapes()), data.draw(st.sampled_from(FUSED_ADD_DTYPES))
    gamma = draw_gamma(data, device, shape, dtypes[2])
    x, grad = draw_tensors(data, device, (shape, dtypes[0]), (shape, add_dtype(*_ones(dtypes))))
    keep = torch.rand(shape[0], generator=seeded("cpu", data.draw(SEEDS))).to(device) < 0.6
    grads = OPS.add_kept_backward(grad, x, gamma, keep, 1.7, x.dtype, (True, gamma is not None))
    assert_gradients(grads, grad, x, gamma, keep, 1.7)


def _ones(dtypes):
    return [None if dtype is None else torch.ones(1, dtype=dtype) for dtype in dtypes]


@explored
def test_gather(device, data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    (x,) = draw_tensors(data, device, (shape, dtype))
    index, inverse = draw_index(data, device, shape[0])
    assert_same_bits(OPS.scale_kept(x, index, 1.0), taken(x, index))


@explored
def test_scatter_add(device, data):
    """Forward, backward, and in place where that can be."""
    shape, dtypes = data.draw(shapes()), data.draw(st.sampled_from(FUSED_ADD_DTYPES))
    kept, slots = draw_index(data, device, shape[0])
    y_shape = (len(kept), *shape[1:])
    y, residual = draw_tensors(data, device, (y_shape, dtypes[0]), (shape, dtypes[1]))
    gamma = draw_gamma(data, device, shape, dtypes[2])
    out = OPS.add_kept(y, residual, gamma, slots, 1.7)
    assert_rounded_once(out, *exact_add(taken(y, slots), residual, gamma, slots >= 0, 1.7))
    assert_same_bits(out[slots < 0], residual[slots < 0].to(out.dtype))

    y, grad = draw_tensors(data, device, (y_shape, dtypes[0]), (shape, out.dtype))
    grads = OPS.add_kept_backward(grad, y, gamma, kept, 1.7, y.dtype, (True, gamma is not None))
    assert_gradients(grads, taken(grad, kept), y, gamma, kept >= 0, 1.7)

    if y.dtype == residual.dtype and residual.stride() == torch.empty_like(residual).stride():
        expected = OPS.add_kept(y, residual, None, slots, 1.0)
        _C.add_kept_(residual, y, slots)
        assert_same_bits(residual, expected)
