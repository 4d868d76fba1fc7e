"""Promise: any shape and any strides give the right answer, with the strides of torch.empty_like(x)."""

import math

import pytest
import torch
from conftest import DEVICES, DTYPES, assert_same_bits, checked, expected_drop_path, random_tensor, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from droppath_ext import drop_path, reference


def _randn(device, dtype, *shape):
    return random_tensor(shape, dtype, device)


LAYOUTS = {
    "tokens": lambda d, t: _randn(d, t, 8, 17, 48),
    "feature_map": lambda d, t: _randn(d, t, 6, 16, 7, 7),
    "channels_last": lambda d, t: _randn(d, t, 6, 16, 7, 7).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda d, t: _randn(d, t, 5, 4, 3, 5, 7).to(memory_format=torch.channels_last_3d),
    "sequence_first": lambda d, t: _randn(d, t, 17, 8, 24).transpose(0, 1),
    "sequence_first_odd": lambda d, t: _randn(d, t, 5, 9, 7).transpose(0, 1),
    "samples_innermost": lambda d, t: _randn(d, t, 33, 9).t(),
    "samples_in_the_middle": lambda d, t: _randn(d, t, 3, 5, 7, 4).permute(2, 3, 0, 1),
    "without_cls_token": lambda d, t: _randn(d, t, 8, 17, 32)[:, 1:],
    "every_other_sample": lambda d, t: _randn(d, t, 16, 31)[::2],
    "every_other_feature": lambda d, t: _randn(d, t, 8, 5, 32)[..., ::2],
    "some_channels_of_channels_last": lambda d, t: _randn(d, t, 4, 16, 5, 5).to(memory_format=torch.channels_last)[
        :, 3:10
    ],
    "cropped": lambda d, t: _randn(d, t, 4, 3, 9, 9)[:, :, 2:7, 1:8],
    "expanded_samples": lambda d, t: _randn(d, t, 1, 40).expand(9, 40),
    "expanded_features": lambda d, t: _randn(d, t, 9, 1).expand(9, 40),
    "expanded_middle": lambda d, t: _randn(d, t, 9, 1, 5).expand(9, 4, 5),
    "one_number": lambda d, t: _randn(d, t, 1).expand(12, 3, 5),
    # A view whose numbers are the negatives of those in memory.
    "negative_view": lambda d, t: torch._neg_view(_randn(d, t, 9, 21)),
    "unfolded": lambda d, t: _randn(d, t, 40).unfold(0, 8, 3),
    "one_sample": lambda d, t: _randn(d, t, 1, 129),
    "one_sample_transposed": lambda d, t: _randn(d, t, 1, 6, 11).transpose(1, 2),
    "one_sample_channels_last": lambda d, t: _randn(d, t, 1, 6, 5, 4).to(memory_format=torch.channels_last),
    "one_dimensional": lambda d, t: _randn(d, t, 1003),
    "one_dimensional_strided": lambda d, t: _randn(d, t, 1003)[::3],
    "nine_dimensions": lambda d, t: _randn(d, t, 3, 1, 2, 2, 1, 3, 2, 1, 2).transpose(1, 5).transpose(2, 7),
    "size_one_with_odd_strides": lambda d, t: _randn(d, t, 70).as_strided((5, 1, 6, 1), (7, 999, 1, 0)),
    "batch_of_one_with_odd_stride": lambda d, t: _randn(d, t, 70).as_strided((1, 6), (3, 1)),
    "many_samples": lambda d, t: _randn(d, t, 70_001, 3),
    "many_samples_of_one": lambda d, t: _randn(d, t, 140_003, 1),
    "many_samples_transposed": lambda d, t: _randn(d, t, 2, 70_001).t(),
    "big_samples": lambda d, t: _randn(d, t, 3, 150_001),
    "no_samples": lambda d, t: _randn(d, t, 0, 5, 3),
    "no_features": lambda d, t: _randn(d, t, 5, 0, 3),
    "nothing_1d": lambda d, t: _randn(d, t, 0),
    "no_samples_transposed": lambda d, t: _randn(d, t, 4, 0, 3).transpose(0, 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(device, dtype, layout):
    checked(LAYOUTS[layout](device, dtype))


@pytest.mark.parametrize("layout", ["sequence_first", "channels_last", "expanded_samples", "cropped", "no_samples"])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_layout_in_batch_mode(device, layout, scale_by_keep):
    for _ in range(4):
        checked(LAYOUTS[layout](device, torch.float32), 0.5, scale_by_keep, "batch")


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d])
def test_channels_last_stays_channels_last(device, memory_format):
    shape = (4, 6, 5, 3) if memory_format == torch.channels_last else (4, 6, 2, 5, 3)
    out = checked(random_tensor(shape, device=device).to(memory_format=memory_format))
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 255, 257, 1023, 4097])
def test_odd_sizes_have_no_tail_bugs(device, dtype, features):
    checked(random_tensor((19, features), dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("features", [16, 33])
def test_misaligned_views(device, dtype, offset, features):
    """A storage offset takes the data off its 16-byte boundary, for the input and for the incoming gradient."""
    base = random_tensor((9 * features + offset,), dtype, device)
    x = base[offset:].view(9, features)
    assert x.storage_offset() == offset
    checked(x)
    keep, _ = expected_drop_path(x, 0.5)
    leaf = random_tensor((9, features), dtype, device).requires_grad_()
    (grad,) = torch.autograd.grad(drop_path(leaf, 0.5, training=True), leaf, x)
    assert_same_bits(grad, reference.apply_keep_mask(x, keep, 2.0))


def test_writes_nothing_outside_the_output(device):
    """The output of a sliced input is a tensor of its own; the rest of the input's storage stays as it was."""
    base = random_tensor((8, 64), device=device)
    before = base.clone()
    checked(base[:, 5:37])
    assert_same_bits(base, before)


@st.composite
def strided_tensors(draw):
    """A view of arbitrary permutation, steps, storage offset and expansion, none of it known to the kernels."""
    ndim = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(DTYPES))
    limit = 40 if ndim <= 2 else 6
    sizes = [draw(st.integers(0, limit)) for _ in range(ndim)]
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(ndim)]
    starts = [draw(st.integers(0, 2)) if draw(st.booleans()) else 0 for _ in range(ndim)]
    order = draw(st.permutations(range(ndim)))
    expanded = [draw(st.integers(0, 9)) == 0 for _ in range(ndim)]
    offset = draw(st.integers(0, 5))
    stored = [1 if e else n * step + start for n, step, start, e in zip(sizes, steps, starts, expanded, strict=True)]
    base = random_tensor((math.prod(stored) + offset,), dtype, seed=draw(st.integers(0, 99)))
    # Memory order first, then the permutation: dim 0 can end up anywhere.
    x = base[offset:].view([stored[d] for d in order]).permute([order.index(d) for d in range(ndim)])
    for dim, (size, step, start, expand) in enumerate(zip(sizes, steps, starts, expanded, strict=True)):
        x = x.expand([size if d == dim else -1 for d in range(ndim)]) if expand else x
        x = x if expand else x[(slice(None),) * dim + (slice(start, start + size * step, step),)]
    assert list(x.shape) == sizes
    return x


@pytest.mark.parametrize("device_type", DEVICES)
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    x=strided_tensors(),
    drop_prob=st.sampled_from([0.01, 0.1, 0.5, 0.9, 1.0]),
    scale_by_keep=st.booleans(),
    mode=st.sampled_from(["row", "batch"]),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_layout(device_type, x, drop_prob, scale_by_keep, mode, seed):
    torch.manual_seed(seed)
    if device_type == "cuda":  # Tensor.to keeps strides of dense tensors only: rebuild the view over a moved storage
        storage = torch.empty(0, dtype=x.dtype, device="cuda").set_(x.untyped_storage().cuda())
        x = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    checked(x, drop_prob, scale_by_keep, mode)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(x=strided_tensors(), grad_layout=st.permutations(range(5)), seed=st.integers(0, 2**31))
def test_gradient_of_any_layout(x, grad_layout, seed):
    """The incoming gradient need not lie in memory as the output does."""
    order = [d for d in grad_layout if d < x.dim()]
    stored = random_tensor([x.shape[d] for d in order], x.dtype, seed=3)
    grad = stored.permute([order.index(d) for d in range(x.dim())])
    keep, _ = expected_drop_path(x, 0.5, generator=seeded("cpu", seed))
    leaf = x.detach().requires_grad_()
    out = drop_path(leaf, 0.5, training=True, generator=seeded("cpu", seed))
    (grad_x,) = torch.autograd.grad(out, leaf, grad)
    assert_same_bits(grad_x, reference.apply_keep_mask(grad, keep, 2.0))
