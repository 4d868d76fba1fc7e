"""Promise: the native ops are well-behaved citizens of the dispatcher, called directly."""

import pytest
import torch
from conftest import DTYPES, TOLERANCES, assert_same_bits, formula, predict_keep, random_tensor

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
