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
