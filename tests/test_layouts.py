"""Promise: any shape and any strides give the right answer, with the strides of torch.empty_like(x)."""

import math
from itertools import product

import pytest
import torch
from conftest import (
    ADD_GAMMA_DTYPES,
    DEVICES,
    DTYPES,
    FUSED_ADD_DTYPES,
    SAMPLINGS,
    TOLERANCES,
    Recorded,
    add_inputs,
    added_samples,
    along,
    assert_rounded_once,
    assert_same_bits,
    case_id,
    checked,
    checked_add,
    checked_skip,
    dtypes_id,
    expected_drop_path,
    needs_native,
    pairwise,
    predict_keep,
    random_tensor,
    same_layout,
    seeded,
    zero_dropped,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import BATCH_MODE_OPS, DROP_PATH_OPS, OPS, SKIP_OPS, Wave

from droppath_ext import drop_path, drop_path_add, reference, stochastic_depth


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


# checked_skip reads off the output which samples are kept, which takes numbers, and compares a branch of all samples.
LAYOUTS_OF_SKIP = [layout for layout in LAYOUTS if not layout.startswith(("no_", "nothing_", "many_"))]


def inputs_like(op, x, dtypes):
    """x and what else the op takes: a residual that lies in memory as x does, and gamma along the last dim.

    Where samples have no dim there is none for gamma.
    """
    named = {"x": x, "residual": same_layout(x, dtypes[1])}
    named["gamma"] = None if x.dim() == 1 else random_tensor(x.shape[-1:], dtypes[2], x.device, seed=2)
    return [named[name] for name in op.inputs if name in named]


def mixtures(op, dtype):
    """The dtypes that the op's kernels serve with an x of this one."""
    return [dtypes for dtypes in op.dtypes if dtypes[0] is dtype]


@pytest.mark.parametrize(
    ("op", "layout", "dtype"),
    pairwise(DROP_PATH_OPS, list(LAYOUTS), DTYPES) + pairwise(SKIP_OPS, LAYOUTS_OF_SKIP, DTYPES),
    ids=case_id,
)
def test_layout(device, op, layout, dtype):
    for dtypes in mixtures(op, dtype):
        x = LAYOUTS[layout](device, dtype)
        out = op.checked(inputs_like(op, x, dtypes), 0.4 if op in SKIP_OPS else 0.5)
        assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("op", SKIP_OPS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in LAYOUTS_OF_SKIP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skip_layout_of_no_numbers_or_many_samples(device, op, layout, dtype):
    x = LAYOUTS[layout](device, dtype)
    before = x.clone()
    gamma = None if x.dim() == 1 else random_tensor(x.shape[-1:], dtype, device, seed=2)
    out = stochastic_depth(x, torch.sin, 0.4, training=True, gamma=gamma, **op.options)
    assert out.shape == x.shape
    if len(x):
        keep = added_samples(out, x)
        branch = x.sin().double() if gamma is None else x.sin().double() * gamma.double()
        expected = x.double() + zero_dropped(branch / 0.6, keep)
        torch.testing.assert_close(out.double(), expected, **TOLERANCES[dtype])
    assert_same_bits(x, before)


@pytest.mark.parametrize(
    ("op", "layout", "scale_by_keep"),
    pairwise(
        BATCH_MODE_OPS, ["sequence_first", "channels_last", "expanded_samples", "cropped", "no_samples"], [True, False]
    ),
)
def test_layout_in_batch_mode(device, op, layout, scale_by_keep):
    x = LAYOUTS[layout](device, torch.float32)
    for _ in range(4):
        op.checked(inputs_like(op, x, (torch.float32,) * 3), 0.5, scale_by_keep)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d])
def test_channels_last_stays_channels_last(device, op, memory_format):
    """That of x decides, whatever the residual's."""
    shape = (4, 6, 5, 3) if memory_format == torch.channels_last else (4, 6, 2, 5, 3)
    for dtypes in op.dtypes:
        x, *others = op.make(shape, dtypes, device, (6,) + (1,) * (len(shape) - 2))
        out = op.checked([x.to(memory_format=memory_format), *others])
        assert out.is_contiguous(memory_format=memory_format)
        if "residual" in op.inputs:
            others[0] = others[0].to(memory_format=memory_format)
        assert op.checked([x, *others]).is_contiguous()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 255, 257, 1023, 4097])
def test_odd_sizes_have_no_tail_bugs(device, op, features):
    for dtypes in op.dtypes:
        inputs = op.make((19, features), dtypes, device)
        if op in SKIP_OPS and features == 1:  # one sum is gamma's gradient, which is near nothing where it cancels
            inputs[1] = None
        op.checked(inputs)


# Of x, residual and gamma, in elements.
OFFSETS = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 3), (2, 2, 2), (3, 3, 3), (4, 4, 4), (5, 6, 7), (6, 6, 6), (7, 5, 0)]
OFFSETS += [(8, 8, 8)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("offsets", OFFSETS, ids=lambda offsets: "-".join(map(str, offsets)))
def test_misaligned_views(device, op, offsets):
    """A storage offset takes each tensor off its 16-byte boundary, and then the incoming gradient."""

    def misaligned(tensor, offset):
        base = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
        view = base[offset:].view(tensor.shape).copy_(tensor)
        assert view.storage_offset() == offset
        return view

    named = dict(zip(("x", "residual", "gamma"), offsets, strict=True)) | {"bias": offsets[0], "weight": offsets[2]}
    for features, dtypes in product((16, 33), op.dtypes):
        tensors = op.make((9, features), dtypes, device)
        inputs = [misaligned(tensor, named[name]) for name, tensor in zip(op.inputs, tensors, strict=True)]
        op.checked(inputs)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        out = op(leaves)
        grad = random_tensor(out.shape, out.dtype, device, seed=3)
        expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        for offset in (1, max(offsets)):
            grads = torch.autograd.grad(out, leaves, misaligned(grad, offset), retain_graph=True)
            for actual, same in zip(grads, expected, strict=True):
                assert_same_bits(actual, same)


@pytest.mark.parametrize("op", OPS)
def test_writes_nothing_outside_the_output(device, op):
    """The output of sliced inputs is a tensor of its own; the rest of their storages stays as it was."""
    bases = op.make((8, 64), torch.float32, device)
    before = [base.clone() for base in bases]
    op.checked([base[..., 5:37] for base in bases])
    for base, same in zip(bases, before, strict=True):
        assert_same_bits(base, same)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_shared_by_threads(device, op, threads):
    """Beyond 32,768 elements; the cuts between threads fall within rows, and the last part is an odd one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtypes in op.dtypes:
            op.checked(op.make((11, 13, 333), dtypes, device))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", DROP_PATH_OPS)
@pytest.mark.parametrize(
    "shape", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (0, 0), (1, 7, 5), (1, 1), (2, 1, 1), (1003,), (0,)], ids=str
)
def test_sizes_zero_and_one(device, op, shape):
    """The gradient of a gamma that meets no element is zero; samples of one number leave no dim for gamma."""
    for dtypes, drop_prob in product(op.dtypes, (0.5, 0.0)):
        inputs = op.make(shape, dtypes, device)
        op.checked(inputs[:2] if len(shape) == 1 else inputs, drop_prob)


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


# --- drop_path_add: where residual and gamma lie otherwise than x ---


# All but those of one dimension, which leave gamma none.
GAMMA_LAYOUTS = [
    layout for layout in LAYOUTS if layout not in ("one_dimensional", "one_dimensional_strided", "nothing_1d")
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", GAMMA_LAYOUTS)
def test_add_layout_with_gamma_along_any_dim(device, dtype, layout):
    x = LAYOUTS[layout](device, dtype)
    assert x.dim() > 1
    for dim in range(1, x.dim()):
        gamma = random_tensor((x.shape[dim],), dtype, device, seed=2)
        checked_add(x, same_layout(x), along(dim, gamma, x.dim()), drop_prob=0.5)
        checked_add(x, same_layout(x), along(dim, gamma, x.dim()), drop_prob=0.0)


# One shape as it may lie in memory: dense in any order, sliced, expanded, mirrored.
MIXED = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sequence_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "samples_innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "transposed_pixels": lambda t: t.mT.contiguous().mT,
    "every_other_sample": lambda t: t.repeat_interleave(2, 0)[::2],
    "cropped": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "expanded": lambda t: t[:1, :, :1].expand_as(t),
    "one_number": lambda t: t[:1, :1, :1, :1].expand_as(t),
}


@pytest.mark.parametrize(
    ("x_layout", "residual_layout", "gamma_dim"), pairwise(list(MIXED), list(MIXED), [None, 1, 2, 3])
)
def test_add_mixed_layouts(device, x_layout, residual_layout, gamma_dim):
    dtypes = (torch.float32, torch.float32, None if gamma_dim is None else torch.float32)
    x, residual, gamma = add_inputs(
        (6, 8, 5, 7), dtypes, device, () if gamma_dim is None else ((6, 8, 5, 7)[gamma_dim],)
    )
    gamma = None if gamma is None else along(gamma_dim, gamma, 4)
    checked_add(MIXED[x_layout](x), MIXED[residual_layout](residual), gamma)


@pytest.mark.parametrize(
    ("x_layout", "grad_layout", "dtypes", "gamma_dim"),
    pairwise(
        *(list(MIXED), list(MIXED)),
        [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.bfloat16)],
        [1, 3],
    ),
    ids=case_id,
)
def test_add_gradient_of_any_layout(device, x_layout, grad_layout, dtypes, gamma_dim):
    """The incoming gradient need not lie in memory as the output does."""
    x, residual, gamma = add_inputs((6, 8, 5, 7), dtypes, device, (8, 1, 1) if gamma_dim == 1 else (7,))
    leaves = [t.requires_grad_() for t in (MIXED[x_layout](x), residual, gamma)]
    keep = predict_keep(x, 0.5)
    out = drop_path_add(*leaves[:2], 0.5, training=True, gamma=leaves[2])
    grad = MIXED[grad_layout](random_tensor(x.shape, out.dtype, device, seed=3))
    grad_x, grad_residual, grad_gamma = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    same_grad_x, *_ = torch.autograd.grad(out, leaves, torch.empty_like(out).copy_(grad))
    assert_same_bits(grad_x, same_grad_x)
    assert_same_bits(grad_residual, grad)
    terms = zero_dropped(grad.double() * leaves[0].detach().double() * 2, keep)
    assert_rounded_once(grad_gamma, terms.sum_to_size(gamma.shape), terms.abs().sum_to_size(gamma.shape))


GAMMA_VIEWS = {
    "D": ((6, 5, 8), lambda d, t: random_tensor((8,), t, d, seed=2)),
    "1,D": ((6, 5, 8), lambda d, t: random_tensor((1, 8), t, d, seed=2)),
    "1,1,D": ((6, 5, 8), lambda d, t: random_tensor((1, 1, 8), t, d, seed=2)),
    "C,1,1": ((6, 8, 5, 7), lambda d, t: random_tensor((8, 1, 1), t, d, seed=2)),
    "1,C,1,1": ((6, 8, 5, 7), lambda d, t: random_tensor((1, 8, 1, 1), t, d, seed=2)),
    "H,1": ((6, 8, 5, 7), lambda d, t: random_tensor((5, 1), t, d, seed=2)),
    "of_a_column": ((6, 8), lambda d, t: random_tensor((8, 3), t, d, seed=2)[:, 1]),
    "every_other_channel": ((6, 8, 5, 7), lambda d, t: random_tensor((16, 1, 1), t, d, seed=2)[::2]),
    "expanded": ((6, 5, 8), lambda d, t: random_tensor((1,), t, d, seed=2).expand(8)),
    "negative_view": ((6, 5, 8), lambda d, t: torch._neg_view(random_tensor((8,), t, d, seed=2))),
    "misaligned": ((6, 5, 8), lambda d, t: random_tensor((9,), t, d, seed=2)[1:]),
    "odd_strides_of_size_one": (
        (6, 8, 5, 7),
        lambda d, t: random_tensor((99,), t, d, seed=2).as_strided((8, 1, 1), (2, 5, 99)),
    ),
    "one_feature": ((6, 5, 1), lambda d, t: random_tensor((1,), t, d, seed=2)),
    "one_channel": ((6, 1, 5, 7), lambda d, t: random_tensor((1, 1, 1), t, d, seed=2)),
    "square": ((6, 4, 4, 4), lambda d, t: random_tensor((4, 1), t, d, seed=2)),
    "samples_as_features": ((8, 8), lambda d, t: random_tensor((8,), t, d, seed=2)),
}


@pytest.mark.parametrize("view", GAMMA_VIEWS)
def test_add_takes_any_view_of_gamma(device, view):
    """Whatever broadcasts along one dim of a sample, strided as it likes; its gradient has its shape."""
    shape, make = GAMMA_VIEWS[view]
    for dtypes in ADD_GAMMA_DTYPES:
        x, residual, _ = add_inputs(shape, (*dtypes[:2], None), device)
        checked_add(x, residual, make(device, dtypes[2]))


@pytest.mark.parametrize(
    ("dtypes", "shape", "layout"),
    pairwise(
        ADD_GAMMA_DTYPES,
        [(5, 3, 1), (5, 3, 2), (5, 4, 7), (5, 7, 33), (5, 2, 300), (5, 33, 64), (5, 300, 3)],
        ["channels_first", "channels_last"],
    ),
    ids=case_id,
)
def test_add_odd_planes_have_no_tail_bugs(device, dtypes, shape, layout):
    """gamma in runs, as long as a channel's plane, or in turn."""
    x, residual, gamma = add_inputs(shape, dtypes, device, (shape[1], 1))
    if layout == "channels_last":
        x, residual = (t.mT.contiguous().mT for t in (x, residual))
    checked_add(x, residual, gamma)


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("layout", ["contiguous", "sequence_first"])
def test_add_beyond_the_caches(device, dtypes, layout):
    """A result of more than 8 MiB may be stored in another way than its parts are: the same numbers, bit for bit."""
    itemsize = max(dtype.itemsize for dtype in dtypes if dtype)
    shape = (7, 3, 2**23 // itemsize // 21 + 1003)
    tensors = []
    for seed, dtype in enumerate(dtypes[:2]):
        tensors.append(torch.empty(shape, dtype=dtype, device=device).normal_(generator=seeded(device, seed)))
    if layout == "sequence_first":
        tensors = [tensor.view(3, 7, -1).transpose(0, 1) for tensor in tensors]
    x, residual = tensors
    gamma = None if dtypes[2] is None else random_tensor(shape[-1:], dtypes[2], device)

    def run(part):
        leaves = [t[..., part].detach().requires_grad_() for t in (x, residual, gamma) if t is not None]
        generator = seeded(device, 3)
        weight = leaves[2] if len(leaves) == 3 else None
        out = drop_path_add(*leaves[:2], 0.5, training=True, gamma=weight, generator=generator)
        return out.detach(), torch.autograd.grad(out, leaves, out.detach())

    out, (grad_x, _, *grad_gamma) = run(slice(None))
    assert out.nbytes > 2**23
    cuts = [0, 1003, shape[-1] // 2, shape[-1]]
    parts = [run(slice(begin, end)) for begin, end in zip(cuts[:-1], cuts[1:], strict=True)]
    assert max(part.nbytes for part, _ in parts) < 2**23
    assert_same_bits(out, torch.cat([part for part, _ in parts], -1))
    assert_same_bits(grad_x, torch.cat([grads[0] for _, grads in parts], -1))
    if grad_gamma:  # whose sums may run in another order
        expected = torch.cat([grads[2] for _, grads in parts])
        torch.testing.assert_close(grad_gamma[0], expected, **TOLERANCES[dtypes[2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("sample_bytes", [64, 136, 512, 520])
def test_small_samples_beyond_the_caches(device, dtype, sample_bytes):
    """Streamed as whole lines: some samples end with a line of memory, some share it with the next one."""
    length = sample_bytes // dtype.itemsize
    x = random_tensor((2**23 // sample_bytes + 1003, length), dtype, device)
    checked(x)
    checked_add(x, x.flip(0), random_tensor((length,), dtype, device))


@st.composite
def add_arguments(draw):
    """x and residual, each of any layout, and gamma along any dim, or none."""
    x = draw(strided_tensors())
    dtypes = draw(st.sampled_from([dtypes for dtypes in FUSED_ADD_DTYPES if dtypes[0] is x.dtype]))
    order = [dim for dim in draw(st.permutations(range(5))) if dim < x.dim()]
    residual = random_tensor([x.shape[dim] for dim in order], dtypes[1], seed=draw(st.integers(100, 199)))
    residual = residual.permute([order.index(dim) for dim in range(x.dim())])
    step = draw(st.sampled_from([1, 1, 2]))
    if step > 1:
        residual = residual.repeat_interleave(step, -1)[..., ::step]
    if x.dim() == 1 or dtypes[2] is None:
        return x, residual, None
    dim = draw(st.integers(1, x.dim() - 1))
    gamma = random_tensor((x.shape[dim] * step,), dtypes[2], seed=draw(st.integers(200, 299)))[::step]
    return x, residual, along(dim, gamma, x.dim())


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    arguments=add_arguments(),
    drop_prob=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    scale_by_keep=st.booleans(),
    mode=st.sampled_from(["row", "batch"]),
    seed=st.integers(0, 2**63 - 1),
)
def test_add_any_layout(arguments, drop_prob, scale_by_keep, mode, seed):
    torch.manual_seed(seed)
    checked_add(*arguments, drop_prob, scale_by_keep, mode)


# --- stochastic_depth: where the branch's output lies otherwise than x ---


# What a branch may do to the memory of its output.
BRANCH_LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda t: t.contiguous(),
    "samples_innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every_other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "flipped": lambda t: t.flip(2).flip(2),
    "one_element_off": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "negative_view": lambda t: torch._neg_view(-t),
}


@pytest.mark.parametrize(
    ("branch_layout", "x_layout", "sampling", "with_gamma"),
    pairwise(
        list(BRANCH_LAYOUTS), ["contiguous", "channels_last", "sequence_first", "sliced"], SAMPLINGS, [False, True]
    ),
)
def test_skip_layout_of_the_branch(device, branch_layout, x_layout, sampling, with_gamma):
    """Output and gradients do not depend on how the branch's output lies in memory; the output lies as x does."""

    class Branch(Recorded):
        def compute(self, x):
            return BRANCH_LAYOUTS[branch_layout](x.sin())

    x = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "sequence_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda t: torch.cat([t, t], 1)[:, :3],
    }[x_layout](random_tensor((10, 3, 5, 4), torch.float64, device))
    gamma = random_tensor((3, 1, 1), torch.float64, device, seed=2) if with_gamma else None
    out = checked_skip(x, Branch(), 0.4, gamma=gamma, sampling=sampling)
    assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d])
def test_skip_branch_sees_channels_last(device, sampling, memory_format):
    """So that its convolutions need no copy."""
    shape = (8, 6, 5, 3) if memory_format == torch.channels_last else (8, 6, 2, 5, 3)
    branch = Wave()
    x = random_tensor(shape, device=device).to(memory_format=memory_format)
    out = checked_skip(x, branch, sampling=sampling)
    assert out.is_contiguous(memory_format=memory_format)
    ((rows,), _) = branch.calls
    assert rows.is_contiguous(memory_format=memory_format)


@needs_native
def test_gathered_rows_with_gaps_and_channels_outside_of_the_samples(device):
    """No vector may reach from one row into the next: what lies between them belongs to nobody."""

    def padded(samples, seed):
        return random_tensor((2, samples, 4), device=device, seed=seed)[:, :, :3].transpose(0, 1)

    y, grad, gamma = padded(4, 0), padded(8, 1), random_tensor((2, 1), device=device, seed=2)
    kept = torch.tensor([0, 2, 3, 5], device=device)
    arguments = (grad, y, gamma, kept, 2.0, torch.float32, (True, True))
    grad_y, grad_gamma = torch.ops.droppath_ext.add_kept_backward(*arguments)
    exact = grad[kept].double() * gamma.double() * 2.0
    assert_rounded_once(grad_y, exact, exact.abs())
    terms = grad[kept].double() * y.double() * 2.0
    assert_rounded_once(grad_gamma, terms.sum((0, 2)).view(2, 1), terms.abs().sum((0, 2)).view(2, 1))
