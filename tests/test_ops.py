"""Promise: the native ops are well-behaved citizens of the dispatcher, called directly."""

from itertools import product

import pytest
import torch
from conftest import (
    ALL_ADD_DTYPES,
    DTYPES,
    FUSED_ADD_DTYPES,
    TOLERANCES,
    add_dtype,
    add_inputs,
    along,
    assert_positive_zero,
    assert_rounded_once,
    assert_same_bits,
    dtypes_id,
    exact_add,
    formula,
    generator_state,
    predict_keep,
    random_tensor,
    same_layout,
    zero_dropped,
)

from droppath_ext import reference

OPS = torch.ops.droppath_ext
# These two compare or trace several runs, which a random op can pass only where its outcome is certain.
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ONE_RUN_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")

LAYOUTS = {
    "contiguous": lambda device, dtype: random_tensor((4, 3, 5), dtype, device),
    "channels_last": lambda device, dtype: random_tensor((4, 3, 2, 2), dtype, device).to(
        memory_format=torch.channels_last
    ),
    "transposed": lambda device, dtype: random_tensor((3, 4, 5), dtype, device).transpose(0, 1),
    "sliced": lambda device, dtype: random_tensor((4, 7, 5), dtype, device)[:, 1::2],
    "expanded": lambda device, dtype: random_tensor((4, 1), dtype, device).expand(4, 6),
    "one_dimensional": lambda device, dtype: random_tensor((5,), dtype, device),
    "no_samples": lambda device, dtype: random_tensor((0, 3), dtype, device),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_drop_path(device, dtype, layout, requires_grad):
    for drop_prob, checks in ((0.0, ALL_CHECKS), (1.0, ALL_CHECKS), (0.5, ONE_RUN_CHECKS)):
        x = LAYOUTS[layout](device, dtype).requires_grad_(requires_grad)
        torch.library.opcheck(OPS.drop_path.default, (x, drop_prob, True, True, None), test_utils=checks)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("scale_by_keep", [False, True])
def test_opcheck_drop_path_batch_mode(device, requires_grad, scale_by_keep):
    for drop_prob, checks in ((0.0, ALL_CHECKS), (1.0, ALL_CHECKS), (0.5, ONE_RUN_CHECKS)):
        x = random_tensor((4, 3), device=device).requires_grad_(requires_grad)
        torch.library.opcheck(OPS.drop_path.default, (x, drop_prob, scale_by_keep, False, None), test_utils=checks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_opcheck_drop_path_backward(device, dtype, layout, requires_grad, per_sample):
    grad = LAYOUTS[layout](device, dtype).requires_grad_(requires_grad)
    keep = torch.arange(grad.shape[0] if per_sample else 1, device=device) % 2 == 0
    torch.library.opcheck(OPS.drop_path_backward.default, (grad, keep, 2.0), test_utils=ALL_CHECKS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_sample", [True, False])
def test_drop_path_returns_output_and_mask(device, dtype, layout, per_sample):
    x = LAYOUTS[layout](device, dtype)
    expected_keep = predict_keep(x, 0.3, "row" if per_sample else "batch")
    out, keep = OPS.drop_path(x, 0.3, True, per_sample, None)
    assert keep.device == x.device
    assert_same_bits(keep, expected_keep)
    assert_same_bits(out, reference.apply_keep_mask(x, keep, reference.keep_scale(0.3, True)))
    assert out.stride() == torch.empty_like(x).stride()
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or x.numel() == 0


@pytest.mark.parametrize("drop_prob", [0.0, 1.0])
@pytest.mark.parametrize("per_sample", [True, False])
def test_certain_outcomes(device, drop_prob, per_sample):
    """The op itself has no identity shortcut: drop_prob 0 gives a copy, never an alias of its input."""
    x = random_tensor((5, 3), device=device)
    out, keep = OPS.drop_path(x, drop_prob, True, per_sample, None)
    assert_same_bits(out, x if drop_prob == 0 else torch.zeros_like(x))
    assert_same_bits(keep, torch.full((5 if per_sample else 1,), drop_prob == 0, device=device))
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("per_sample", [True, False])
def test_gradient_of_the_op(device, per_sample):
    x = random_tensor((6, 3), device=device).requires_grad_()
    out, keep = OPS.drop_path(x, 0.5, True, per_sample, None)
    assert not keep.requires_grad
    grad = random_tensor((6, 3), device=device, seed=1)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    assert_same_bits(grad_x, reference.apply_keep_mask(grad, keep, 2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0, 1 / 0.7])
def test_backward_op(device, dtype, scale):
    grad = random_tensor((9, 7), dtype, device)
    keep = torch.arange(9, device=device) % 3 != 1
    result = OPS.drop_path_backward(grad, keep, scale)
    assert_same_bits(result, reference.apply_keep_mask(grad, keep, scale))
    by_table = formula(grad, keep, 1 - 1 / scale)
    torch.testing.assert_close(result.double(), by_table, **TOLERANCES[dtype])


@pytest.mark.parametrize("per_sample", [True, False])
def test_backward_op_is_differentiable(device, per_sample):
    keep = torch.tensor([True, False, True] if per_sample else [True], device=device)
    grad = random_tensor((3, 4), torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: OPS.drop_path_backward(g, keep, 2.0), grad)
    assert torch.autograd.gradgradcheck(lambda g: OPS.drop_path_backward(g, keep, 2.0), grad)
    (second,) = torch.autograd.grad(OPS.drop_path_backward(grad, keep, 2.0).sum(), grad)
    assert_same_bits(second, reference.apply_keep_mask(torch.ones_like(grad), keep, 2.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_meta_tensors(layout):
    """Shapes, strides and dtypes without data: what fake tensors and exporters rely on."""
    x = LAYOUTS[layout]("cpu", torch.bfloat16)
    out, keep = OPS.drop_path(x.to("meta"), 0.5, True, True, None)
    real, _ = OPS.drop_path(x, 0.5, True, True, None)
    assert out.device.type == keep.device.type == "meta"
    meta_like = torch.empty_like(x.to("meta"))
    assert (out.shape, out.stride(), out.dtype) == (real.shape, meta_like.stride(), real.dtype)
    assert (keep.shape, keep.dtype) == (x.shape[:1], torch.bool)
    grad_x = OPS.drop_path_backward(out, keep, 2.0)
    assert (grad_x.shape, grad_x.stride(), grad_x.dtype) == (out.shape, out.stride(), out.dtype)


# --- drop_path_add and its backward ---


def _add_inputs_of(layout, dtypes, device):
    """x and residual in this layout, and gamma along the last dim, or along channels that are not the last."""
    x = LAYOUTS[layout](device, dtypes[0])
    residual = same_layout(x, dtypes[1])
    if dtypes[2] is None or x.dim() == 1:
        return x, residual, None
    dim = 1 if layout == "channels_last" else x.dim() - 1
    return x, residual, along(dim, random_tensor((x.shape[dim],), dtypes[2], device, seed=2), x.dim())


# opcheck takes its time: every layout with these, and every mixture in one layout.
FEW_ADD_DTYPES = [(torch.float32,) * 3, (torch.bfloat16, torch.float32, None)]
ADD_CASES = [("contiguous", dtypes) for dtypes in FUSED_ADD_DTYPES if dtypes not in FEW_ADD_DTYPES]
ADD_CASES += list(product(LAYOUTS, FEW_ADD_DTYPES))


def _case_id(case):
    return case if isinstance(case, str) else dtypes_id(case)


@pytest.mark.parametrize(("layout", "dtypes"), ADD_CASES, ids=_case_id)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_drop_path_add(device, layout, dtypes, requires_grad):
    x, residual, gamma = _add_inputs_of(layout, dtypes, device)
    for tensor in (x, residual, gamma):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    for drop_prob, checks in ((1.0, ALL_CHECKS), (0.5, ONE_RUN_CHECKS)):
        args = (x, residual, gamma, drop_prob, True, True, None)
        torch.library.opcheck(OPS.drop_path_add.default, args, test_utils=checks)


@pytest.mark.parametrize("requires_grad", list(product([False, True], repeat=3)))
@pytest.mark.parametrize("per_sample", [False, True])
def test_opcheck_drop_path_add_where_some_require_a_gradient(device, requires_grad, per_sample):
    tensors = add_inputs((4, 3, 5), (torch.float32,) * 3, device)
    x, residual, gamma = (t.requires_grad_(r) for t, r in zip(tensors, requires_grad, strict=True))
    for drop_prob, checks in ((0.0, ALL_CHECKS), (1.0, ALL_CHECKS), (0.5, ONE_RUN_CHECKS)):
        args = (x, residual, gamma, drop_prob, per_sample, per_sample, None)
        torch.library.opcheck(OPS.drop_path_add.default, args, test_utils=checks)


def _keep(size, device):
    """A mask that keeps every other sample."""
    return torch.arange(size, device=device) % 2 == 0


def _backward_args(layout, dtypes, device, keep_size, output_mask):
    x, residual, gamma = _add_inputs_of(layout, dtypes, device)
    grad = same_layout(x, add_dtype(x, residual, gamma), seed=3)
    size = {"row": len(x), "batch": 1, "none": 0}[keep_size]
    output_mask = (output_mask[0], output_mask[1] and gamma is not None)
    return grad, x if output_mask[1] else None, gamma, _keep(size, device), 2.0, dtypes[0], output_mask


OUTPUT_MASKS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("layout", "dtypes"), ADD_CASES, ids=_case_id)
@pytest.mark.parametrize("keep_size", ["row", "none"])
def test_opcheck_drop_path_add_backward(device, layout, dtypes, keep_size):
    args = _backward_args(layout, dtypes, device, keep_size, (True, True))
    torch.library.opcheck(OPS.drop_path_add_backward.default, args, test_utils=ALL_CHECKS)


@pytest.mark.parametrize("output_mask", OUTPUT_MASKS)
@pytest.mark.parametrize("requires_grad", list(product([False, True], repeat=3)))
def test_opcheck_drop_path_add_backward_where_some_require_a_gradient(device, output_mask, requires_grad):
    grad, _, gamma, *rest = _backward_args("contiguous", (torch.float32,) * 3, device, "row", output_mask)
    x = random_tensor(grad.shape, device=device, seed=5)
    grad, x, gamma = (t.requires_grad_(r) for t, r in zip((grad, x, gamma), requires_grad, strict=True))
    torch.library.opcheck(OPS.drop_path_add_backward.default, (grad, x, gamma, *rest), test_utils=ALL_CHECKS)


@pytest.mark.parametrize(("layout", "dtypes"), ADD_CASES, ids=_case_id)
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("drop_prob", [0.0, 0.3, 1.0])
def test_drop_path_add_returns_output_and_mask(device, layout, dtypes, per_sample, drop_prob):
    """The mask is empty where nothing can be dropped, and the generator is left alone."""
    x, residual, gamma = _add_inputs_of(layout, dtypes, device)
    before = generator_state(device)
    if drop_prob == 0.0:
        expected_keep = torch.empty(0, dtype=torch.bool, device=device)
    else:
        expected_keep = predict_keep(x, drop_prob, "row" if per_sample else "batch")
    out, keep = OPS.drop_path_add(x, residual, gamma, drop_prob, True, per_sample)
    assert keep.device == x.device
    assert_same_bits(keep, expected_keep)
    assert torch.equal(generator_state(device), before) == (drop_prob == 0.0)
    used = torch.ones(1, dtype=torch.bool, device=device) if drop_prob == 0.0 else keep
    assert_rounded_once(out, *exact_add(x, residual, gamma, used, reference.keep_scale(drop_prob, True)))
    assert out.dtype == add_dtype(x, residual, gamma)
    assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("output_mask", OUTPUT_MASKS)
@pytest.mark.parametrize("keep_size", ["row", "batch", "none"])
@pytest.mark.parametrize("scale", [1.0, 2.0, 1 / 0.7])
def test_add_backward_op(device, dtypes, output_mask, keep_size, scale):
    """What is asked for, in the dtypes and shapes of the inputs; what is not comes back empty."""
    grad, x, gamma, keep, _, dtype, output_mask = _backward_args("contiguous", dtypes, device, keep_size, output_mask)
    grad_x, grad_gamma = OPS.drop_path_add_backward(grad, x, gamma, keep, scale, dtype, output_mask)
    used = keep if len(keep) else torch.ones(1, dtype=torch.bool, device=device)
    if output_mask[0]:
        assert (grad_x.dtype, grad_x.stride()) == (dtype, torch.empty_like(grad).stride())
        exact = zero_dropped(grad.double() * scale * (1.0 if gamma is None else gamma.double()), used)
        assert_rounded_once(grad_x, exact, exact.abs())
    else:
        assert grad_x.shape == (0,)
    if output_mask[1]:
        assert (grad_gamma.dtype, grad_gamma.shape) == (gamma.dtype, gamma.shape)
        terms = zero_dropped(grad.double() * x.double() * scale, used)
        assert_rounded_once(grad_gamma, terms.sum_to_size(gamma.shape), terms.abs().sum_to_size(gamma.shape))
    else:
        assert grad_gamma.shape == (0,)


# The gradient of x depends on grad and gamma, that of gamma on grad and x: what of these requires a gradient, and both.
DIFFERENTIABLE = [
    (output_mask, requires_grad)
    for output_mask, requires_grad in product(OUTPUT_MASKS, product([False, True], repeat=3))
    if (output_mask[0] and (requires_grad[0] or requires_grad[2]))
    or (output_mask[1] and (requires_grad[0] or requires_grad[1]))
]


@pytest.mark.parametrize(("output_mask", "requires_grad"), DIFFERENTIABLE)
@pytest.mark.parametrize("keep_size", ["row", "none"])
def test_add_backward_op_is_differentiable(device, output_mask, keep_size, requires_grad):
    grad, _, gamma, *rest = _backward_args("contiguous", (torch.float64,) * 3, device, keep_size, output_mask)
    x = random_tensor(grad.shape, torch.float64, device, seed=5)
    inputs = [t.requires_grad_(r) for t, r in zip((grad, x, gamma), requires_grad, strict=True)]

    def function(*inputs):
        outs = OPS.drop_path_add_backward(*inputs, *rest)
        return tuple(out for out in outs if out.requires_grad)

    assert function(*inputs)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("layout", "dtypes"), ADD_CASES, ids=_case_id)
@pytest.mark.parametrize("per_sample", [True, False])
def test_add_meta_tensors(layout, dtypes, per_sample):
    """Shapes, strides and dtypes without data: what fake tensors and exporters rely on."""
    x, residual, gamma = _add_inputs_of(layout, dtypes, "cpu")
    meta = [None if t is None else t.to("meta") for t in (x, residual, gamma)]
    for drop_prob, size in ((0.0, 0), (0.5, len(x) if per_sample else 1)):
        out, keep = OPS.drop_path_add(*meta, drop_prob, True, per_sample)
        assert out.device.type == keep.device.type == "meta"
        assert (out.shape, out.dtype) == (x.shape, add_dtype(x, residual, gamma))
        assert out.stride() == torch.empty_like(meta[0]).stride()
        assert (keep.shape, keep.dtype) == ((size,), torch.bool)
        for output_mask in OUTPUT_MASKS if gamma is not None else [(True, False), (False, False)]:
            args = (meta[0] if output_mask[1] else None, meta[2], keep, 2.0, x.dtype, output_mask)
            grad_x, grad_gamma = OPS.drop_path_add_backward(out, *args)
            assert grad_x.shape == (out.shape if output_mask[0] else (0,))
            assert grad_gamma.shape == (gamma.shape if output_mask[1] else (0,))
            if output_mask[0]:
                assert (grad_x.dtype, grad_x.stride()) == (x.dtype, out.stride())
            if output_mask[1]:
                assert grad_gamma.dtype == gamma.dtype


@pytest.mark.parametrize("dtypes", [t for t in ALL_ADD_DTYPES if t not in FUSED_ADD_DTYPES], ids=dtypes_id)
@pytest.mark.parametrize("on", ["device", "meta"])
def test_add_op_refuses_other_mixtures(device, dtypes, on):
    """No kernel is built for them: drop_path_add itself computes them otherwise."""
    x, residual, gamma = add_inputs((4, 3), dtypes, device if on == "device" else "meta")
    with pytest.raises(TypeError, match="dtype"):
        OPS.drop_path_add(x, residual, gamma, 0.5, True, True)


# --- gather, scatter_add and its backward, draw_fixed ---

# The samples that a row is taken from, of eight; -1 takes zeros. Ascending as they are drawn, and in any other order.
INDICES = {
    "some": [0, 3, 4, 7],
    "one": [5],
    "none": [-1],
    "all": list(range(8)),
    "shuffled": [6, 1, -1, 3],
    "nothing": [],
}


def _index(name, device, size=8):
    """The index and its inverse."""
    index = torch.tensor(INDICES[name], dtype=torch.int64)
    inverse = torch.full((size,), -1)
    taken = index >= 0
    inverse[index[taken]] = torch.arange(len(index))[taken]
    return index.to(device), inverse.to(device)


SKIP_LAYOUTS = {
    "contiguous": lambda device, dtype: random_tensor((8, 3, 5), dtype, device),
    "vectors": lambda device, dtype: random_tensor((8, 4, 16), dtype, device),
    "channels_last": lambda device, dtype: random_tensor((8, 3, 2, 2), dtype, device).to(
        memory_format=torch.channels_last
    ),
    "sequence_first": lambda device, dtype: random_tensor((3, 8, 5), dtype, device).transpose(0, 1),
    "samples_in_the_middle": lambda device, dtype: random_tensor((3, 2, 8, 5), dtype, device).permute(2, 0, 1, 3),
    "sliced": lambda device, dtype: random_tensor((8, 7, 5), dtype, device)[:, 1::2],
    "expanded": lambda device, dtype: random_tensor((8, 1), dtype, device).expand(8, 6),
    "one_dimensional": lambda device, dtype: random_tensor((8,), dtype, device),
    "no_features": lambda device, dtype: random_tensor((8, 0), dtype, device),
}


def _rows_by_hand(x, index):
    """One row after the other: what gather must give."""
    rows = [x[i] if i >= 0 else torch.zeros_like(x[0]) for i in index.tolist()]
    return torch.stack(rows) if rows else x[:0]


def _nested_alike(a, b):
    """Whether the dims that have a stride of their own nest alike in both."""
    long = [dim for dim in range(a.dim()) if a.shape[dim] > 1 and b.shape[dim] > 1]
    return sorted(long, key=a.stride) == sorted(long, key=b.stride)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SKIP_LAYOUTS)
@pytest.mark.parametrize("name", INDICES)
def test_gather(device, dtype, layout, name):
    """Copies, bit for bit, NaN included; the rows lie in memory as x does."""
    x = SKIP_LAYOUTS[layout](device, dtype).clone()
    if x.numel():
        x[(0,) * x.dim()] = float("nan")
    index, inverse = _index(name, device)
    out = OPS.gather(x, index, inverse)
    assert_same_bits(out, _rows_by_hand(x, index))
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or not out.numel()
    if x.numel() and out.numel():
        assert _nested_alike(out, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [name for name in SKIP_LAYOUTS if name not in ("sliced", "expanded")])
@pytest.mark.parametrize("name", INDICES)
def test_scatter_add_in_place(device, dtype, layout, name):
    """What scatter_add gives, in the residual's own memory; what is dropped stays as it is, NaN included."""
    kept, slots = _index(name, device)
    residual = SKIP_LAYOUTS[layout](device, dtype)
    y = random_tensor((len(kept), *residual.shape[1:]), dtype, device, seed=1)
    dropped = slots < 0
    residual[dropped] = float("nan")
    expected = OPS.scatter_add(y, residual, None, slots, kept, 1.0)
    place = residual.data_ptr()
    OPS.scatter_add_(residual, y, slots, kept)
    assert residual.data_ptr() == place
    assert_same_bits(residual, expected)


def test_scatter_add_in_place_shared_by_threads(device):
    kept = torch.arange(0, 40, 3, device=device)
    slots = torch.full((40,), -1, device=device)
    slots[kept] = torch.arange(len(kept), device=device)
    residual, y = random_tensor((40, 5001), device=device), random_tensor((len(kept), 5001), device=device, seed=1)
    expected = residual.clone()
    expected[kept] += y
    OPS.scatter_add_(residual, y, slots, kept)
    assert_same_bits(residual, expected)


@pytest.mark.parametrize("on", ["device", "meta"])
def test_scatter_add_in_place_refuses_what_it_cannot_write(device, on):
    on = device if on == "device" else torch.device("meta")
    index = torch.arange(4, device=on)
    y = torch.ones(4, 3, device=on)
    with pytest.raises(ValueError, match="residual must be dense to be changed in place"):
        OPS.scatter_add_(torch.ones(4, 6, device=on)[:, ::2], y, index, index)
    with pytest.raises(TypeError, match="residual must be of the dtype of y"):
        OPS.scatter_add_(torch.ones(4, 3, device=on), y.bfloat16(), index, index)


@pytest.mark.parametrize("layout", SKIP_LAYOUTS)
@pytest.mark.parametrize("name", INDICES)
def test_gather_backward_is_a_gather(device, layout, name):
    x = SKIP_LAYOUTS[layout](device, torch.float32).requires_grad_()
    index, inverse = _index(name, device)
    out = OPS.gather(x, index, inverse)
    grad = random_tensor(out.shape, device=device, seed=3)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    expected = torch.zeros_like(x).detach()
    for row, sample in enumerate(index.tolist()):
        if sample >= 0:
            expected[sample] = grad[row]
    assert_same_bits(grad_x, expected)


@pytest.mark.parametrize("name", ["some", "none", "shuffled", "nothing"])
def test_gather_gradcheck(device, name):
    x = random_tensor((8, 3), torch.float64, device).requires_grad_()
    index, inverse = _index(name, device)
    assert torch.autograd.gradcheck(lambda t: OPS.gather(t, index, inverse), x)
    assert torch.autograd.gradgradcheck(lambda t: OPS.gather(t, index, inverse), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sequence_first", "sliced"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_gather(device, dtype, layout, requires_grad):
    for name in ("some", "shuffled") if dtype is torch.float32 else ("some",):
        x = SKIP_LAYOUTS[layout](device, dtype).requires_grad_(requires_grad)
        torch.library.opcheck(OPS.gather.default, (x, *_index(name, device)), test_utils=ALL_CHECKS)


def _scatter_case(layout, dtypes, device, name):
    """y with a row for each entry of the index, residual, gamma, slots, kept; "every" has a row for each sample."""
    residual = SKIP_LAYOUTS[layout](device, dtypes[1])
    if name == "every":
        slots = kept = torch.empty(0, dtype=torch.int64, device=device)
    else:
        kept, slots = _index(name, device)
    like = SKIP_LAYOUTS[layout](device, dtypes[0])
    y = same_layout(like)[: 8 if name == "every" else len(kept)]
    gamma = None
    if dtypes[2] is not None and residual.dim() > 1:
        dim = 1 if layout == "channels_last" else residual.dim() - 1
        gamma = along(dim, random_tensor((residual.shape[dim],), dtypes[2], device, seed=2), residual.dim())
    return y, residual, gamma, slots, kept


def _branch_by_hand(y, residual, slots):
    """Which samples have a row, and the rows where they have one."""
    if not len(slots):
        return torch.ones(len(residual), dtype=torch.bool, device=y.device), y
    return slots >= 0, _rows_by_hand(y, slots) if len(y) else torch.zeros_like(residual, dtype=y.dtype)


SCATTER_INDICES = [name for name in INDICES if name != "nothing"] + ["every"]
SCATTER_CASES = [("contiguous", dtypes) for dtypes in FUSED_ADD_DTYPES if dtypes not in FEW_ADD_DTYPES]
SCATTER_CASES += list(product(SKIP_LAYOUTS, FEW_ADD_DTYPES))


@pytest.mark.parametrize(("layout", "dtypes"), SCATTER_CASES, ids=_case_id)
@pytest.mark.parametrize("name", SCATTER_INDICES)
def test_scatter_add(device, layout, dtypes, name):
    """Rounded once, in the layout of the residual; bit for bit the residual where there is no row."""
    y, residual, gamma, slots, kept = _scatter_case(layout, dtypes, device, name)
    out = OPS.scatter_add(y, residual, gamma, slots, kept, 1.7)
    keep, branch = _branch_by_hand(y, residual, slots)
    assert out.dtype == add_dtype(branch, residual, gamma)
    assert_rounded_once(out, *exact_add(branch, residual, gamma, keep, 1.7))
    assert_same_bits(out[~keep], residual[~keep].to(out.dtype))
    assert out.stride() == torch.empty_like(residual).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), -0.0, float("inf")])
@pytest.mark.parametrize("with_gamma", [False, True])
def test_scatter_add_reads_no_row_that_is_not_added(device, dtype, value, with_gamma):
    """The row of kept == -1 may hold anything, gamma and the residual of dropped samples as well."""
    y, residual, gamma, slots, kept = _scatter_case("contiguous", (dtype,) * 3, device, "shuffled")
    y[kept < 0] = value
    residual[slots < 0] = value
    out = OPS.scatter_add(y, residual, gamma if with_gamma else None, slots, kept, 2.0)
    assert out[slots >= 0].isfinite().all()
    assert_same_bits(out[slots < 0], residual[slots < 0])
    none = torch.full((8,), -1, device=device)
    gamma = torch.full_like(gamma, value) if with_gamma else None
    assert_same_bits(OPS.scatter_add(y[:1], residual, gamma, none, none[:1], 2.0), residual)


@pytest.mark.parametrize(("layout", "dtypes"), SCATTER_CASES, ids=_case_id)
@pytest.mark.parametrize("name", SCATTER_INDICES)
@pytest.mark.parametrize("output_mask", OUTPUT_MASKS)
def test_scatter_add_backward(device, layout, dtypes, name, output_mask):
    y, residual, gamma, slots, kept = _scatter_case(layout, dtypes, device, name)
    output_mask = (output_mask[0], output_mask[1] and gamma is not None)
    grad = same_layout(residual, add_dtype(y[:1], residual, gamma), seed=3)
    grad_y, grad_gamma = OPS.scatter_add_backward(
        grad, y if output_mask[1] else None, gamma, slots, kept, 1.7, dtypes[0], output_mask
    )
    index = torch.arange(8, device=device) if name == "every" else kept
    rows = _rows_by_hand(grad, index).double() * 1.7
    if output_mask[0]:
        assert (grad_y.dtype, grad_y.shape) == (dtypes[0], y.shape)
        exact = rows if gamma is None else zero_dropped(rows * gamma.double(), index >= 0)
        assert_rounded_once(grad_y, exact, exact.abs())
        assert_positive_zero(grad_y[index < 0])
    else:
        assert grad_y.shape == (0,)
    if output_mask[1]:
        terms = rows * zero_dropped(y.double(), index >= 0)
        assert (grad_gamma.dtype, grad_gamma.shape) == (gamma.dtype, gamma.shape)
        assert_rounded_once(grad_gamma, terms.sum_to_size(gamma.shape), terms.abs().sum_to_size(gamma.shape))
    else:
        assert grad_gamma.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scatter_add_backward_of_a_row_that_is_not_added(device, dtype, value):
    """+0, and nothing of it in gamma's gradient, whatever y, gamma and the gradients of dropped samples hold."""
    y, residual, gamma, slots, kept = _scatter_case("contiguous", (dtype,) * 3, device, "shuffled")
    grad = random_tensor(residual.shape, dtype, device, seed=3)
    y[kept < 0] = value
    grad[slots < 0] = value
    grad_y, grad_gamma = OPS.scatter_add_backward(grad, y, gamma, slots, kept, 2.0, dtype, (True, True))
    assert_positive_zero(grad_y[kept < 0])
    assert grad_y.isfinite().all()
    assert grad_gamma.isfinite().all()
    none = torch.full((8,), -1, device=device)
    gamma = torch.full_like(gamma, value)
    for result in OPS.scatter_add_backward(grad, y[:1], gamma, none, none[:1], 2.0, dtype, (True, True)):
        assert_positive_zero(result)


@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("name", SCATTER_INDICES)
@pytest.mark.parametrize("requires_grad", list(product([False, True], repeat=3)))
def test_scatter_add_gradcheck(device, with_gamma, name, requires_grad):
    dtypes = (torch.float64,) * 3
    y, residual, gamma, slots, kept = _scatter_case("contiguous", dtypes, device, name)
    tensors = [t.clone().requires_grad_(r) for t, r in zip((y, residual, gamma), requires_grad, strict=True)]
    inputs = tensors if with_gamma else [*tensors[:2], None]
    if not any(t is not None and t.requires_grad for t in inputs):
        assert not OPS.scatter_add(*inputs, slots, kept, 1.7).requires_grad
        return
    assert torch.autograd.gradcheck(lambda *t: OPS.scatter_add(*t, slots, kept, 1.7), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: OPS.scatter_add(*t, slots, kept, 1.7), inputs)


@pytest.mark.parametrize("name", ["some", "shuffled", "every"])
@pytest.mark.parametrize("output_mask", OUTPUT_MASKS[:3])
def test_scatter_add_backward_gradcheck(device, name, output_mask):
    y, residual, gamma, slots, kept = _scatter_case("contiguous", (torch.float64,) * 3, device, name)
    inputs = [t.clone().requires_grad_() for t in (residual, y, gamma)]

    def function(*tensors):
        outs = OPS.scatter_add_backward(*tensors, slots, kept, 1.7, torch.float64, output_mask)
        return tuple(out for out in outs if out.requires_grad)

    assert len(function(*inputs)) == sum(output_mask)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("layout", "dtypes"), SCATTER_CASES, ids=_case_id)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_scatter_add(device, layout, dtypes, requires_grad):
    for name in ("some", "every") if layout == "contiguous" else ("some",):
        args = _scatter_case(layout, dtypes, device, name)
        args = [*(t if t is None else t.clone().requires_grad_(requires_grad) for t in args[:3]), *args[3:], 1.7]
        torch.library.opcheck(OPS.scatter_add.default, tuple(args), test_utils=ALL_CHECKS)


@pytest.mark.parametrize(("layout", "dtypes"), SCATTER_CASES, ids=_case_id)
def test_opcheck_scatter_add_backward(device, layout, dtypes):
    y, residual, gamma, slots, kept = _scatter_case(layout, dtypes, device, "some")
    grad = same_layout(residual, add_dtype(y[:1], residual, gamma), seed=3)
    args = (grad, y, gamma, slots, kept, 1.7, dtypes[0], (True, gamma is not None))
    torch.library.opcheck(OPS.scatter_add_backward.default, args, test_utils=ALL_CHECKS)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
def test_opcheck_draw_fixed(device, size, dtype):
    """Of x only the number of samples and the device matter."""
    x = torch.zeros(8, 3, dtype=dtype, device=device)
    checks = ALL_CHECKS if size == 8 else ONE_RUN_CHECKS
    torch.library.opcheck(OPS.draw_fixed.default, (x, size), test_utils=checks)


@pytest.mark.parametrize("layout", SKIP_LAYOUTS)
@pytest.mark.parametrize("name", INDICES)
def test_skip_meta_tensors(layout, name):
    """Shapes, strides and dtypes without data: what fake tensors and exporters rely on."""
    x = SKIP_LAYOUTS[layout]("cpu", torch.bfloat16)
    index, inverse = _index(name, "cpu")
    meta_index, meta_inverse = index.to("meta"), inverse.to("meta")
    real = OPS.gather(x, index, inverse)
    x_meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    rows = OPS.gather(x_meta, meta_index, meta_inverse)
    assert (rows.device.type, rows.shape, rows.dtype) == ("meta", real.shape, real.dtype)
    assert not real.numel() or rows.stride() == real.stride()
    if name == "nothing":
        return
    out = OPS.scatter_add(rows, x_meta, None, meta_inverse, meta_index, 2.0)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert out.stride() == torch.empty_like(x_meta).stride()
    grad_y, grad_gamma = OPS.scatter_add_backward(
        out, None, None, meta_inverse, meta_index, 2.0, torch.bfloat16, (True, False)
    )
    assert (grad_y.shape, grad_gamma.shape) == (rows.shape, (0,))
    slots, kept = OPS.draw_fixed(x_meta, 3)
    assert (slots.shape, kept.shape, slots.dtype, kept.dtype) == ((8,), (3,), torch.int64, torch.int64)
    assert slots.device.type == kept.device.type == "meta"


def _ones(*shape, dtype=torch.float32, on="cpu"):
    return torch.ones(*shape, dtype=dtype, device=on)


def _gather_call(on, **changes):
    """A call that is right, but for the changes."""
    index, inverse = (t.to(on) for t in _index("some", "cpu"))
    return OPS.gather(*({"x": _ones(8, 3, on=on), "index": index, "inverse": inverse} | changes).values())


def _scatter_call(on, **changes):
    kept, slots = (t.to(on) for t in _index("some", "cpu"))
    args = {"y": _ones(4, 3, on=on), "residual": _ones(8, 3, on=on), "gamma": _ones(3, on=on)}
    return OPS.scatter_add(*(args | {"slots": slots, "kept": kept, "scale": 2.0} | changes).values())


def _scatter_backward_call(on, **changes):
    kept, slots = (t.to(on) for t in _index("some", "cpu"))
    args = {"grad": _ones(8, 3, on=on), "y": _ones(4, 3, on=on), "gamma": _ones(3, on=on), "slots": slots, "kept": kept}
    args |= {"scale": 2.0, "dtype": torch.float32, "output_mask": (True, True)}
    return OPS.scatter_add_backward(*(args | changes).values())


@pytest.mark.parametrize("on", ["device", "meta"])
def test_wrong_indices_are_refused(device, on):
    """Read past their end they would be silent out-of-bounds accesses."""
    on = device if on == "device" else torch.device("meta")
    long = {"dtype": torch.int64, "on": on}
    for call, index, inverse in (
        (_gather_call, "index", "inverse"),
        (_scatter_call, "kept", "slots"),
        (_scatter_backward_call, "kept", "slots"),
    ):
        call(on)
        for change in (
            {inverse: _ones(7, **long)},
            {inverse: _ones(9, **long)},
            {inverse: _ones(8, dtype=torch.int32, on=on)},
            {inverse: _ones(8, 1, **long)},
            {index: _ones(4, on=on)},
            {index: _ones(4, 1, **long)},
            {index: _ones(4, dtype=torch.bool, on=on)},
            {index: torch.tensor(1, device=on)},
        ):
            with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"^({index}|{inverse}) must "):
                call(on, **change)


@pytest.mark.parametrize("on", ["device", "meta"])
def test_wrong_operands_of_scatter_add_are_refused(device, on):
    on = device if on == "device" else torch.device("meta")
    for call, name, changes in (
        (_gather_call, "x", [_ones(8, 3, dtype=torch.int64, on=on), torch.tensor(1.0, device=on)]),
        (_scatter_call, "y", [_ones(3, 3, on=on), _ones(4, 2, on=on), _ones(4, 3, 1, on=on)]),
        (_scatter_call, "residual", [_ones(8, 3, dtype=torch.int64, on=on), torch.tensor(1.0, device=on)]),
        (_scatter_call, "gamma", [_ones(4, on=on), _ones(8, 3, on=on), _ones(3, dtype=torch.int64, on=on)]),
        (_scatter_backward_call, "y", [_ones(3, 3, on=on), _ones(4, 2, on=on), None]),
        (_scatter_backward_call, "gamma", [_ones(4, on=on), None]),
        (_scatter_backward_call, "grad", [_ones(8, 3, dtype=torch.int64, on=on), torch.tensor(1.0, device=on)]),
    ):
        for wrong in changes:
            # Of y and its index, either may be said to have the wrong number of rows.
            with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"\b{name}\b|kept must"):
                call(on, **{name: wrong})


@pytest.mark.parametrize("dtypes", [t for t in ALL_ADD_DTYPES if t not in FUSED_ADD_DTYPES], ids=dtypes_id)
@pytest.mark.parametrize("on", ["device", "meta"])
def test_scatter_add_op_refuses_other_mixtures(device, dtypes, on):
    """No kernel is built for them: stochastic_depth itself computes them otherwise."""
    on = device if on == "device" else torch.device("meta")
    y, residual, gamma = add_inputs((8, 3), dtypes, on)
    with pytest.raises(TypeError, match="dtype"):
        _scatter_call(on, y=y[:4], residual=residual, gamma=gamma)


def test_indices_that_point_nowhere_are_refused_on_the_host():
    """The CPU can look; a GPU could not without waiting for itself."""
    for wrong in (8, 100, -2, 2**40):
        index = torch.tensor([0, wrong, 4, 7])
        with pytest.raises((IndexError, ValueError, RuntimeError), match="index"):
            _gather_call("cpu", index=index)


@pytest.mark.parametrize("on", ["device", "meta"])
def test_draw_fixed_of_a_wrong_count(device, on):
    x = torch.ones(4, 3, device=device if on == "device" else "meta")
    for count in (0, -1, 5):
        with pytest.raises((ValueError, RuntimeError), match=f"count must be between 1 and the 4 samples.*{count}"):
            OPS.draw_fixed(x, count)
    with pytest.raises((ValueError, RuntimeError), match="0-dim"):
        OPS.draw_fixed(x[0, 0], 1)
