"""Promise: the semantics table, row by row."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import (
    DTYPES,
    TOLERANCES,
    assert_positive_zero,
    assert_same_bits,
    expected_drop_path,
    formula,
    generator_state,
    kept_samples,
    predict_keep,
    random_tensor,
)

from droppath_ext import DropPath, drop_path, reference

HOSTILE = (float("nan"), float("inf"), -float("inf"), -0.0, -1.0)


# --- reference.py: the specification itself, held against numbers written out by hand ---


def test_reference_scale():
    assert reference.keep_scale(0.5, True) == 2.0
    assert reference.keep_scale(0.9, True) == pytest.approx(10.0, rel=1e-12)
    assert reference.keep_scale(0.9, False) == 1.0
    assert 0 <= reference.keep_scale(1.0, True) < float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_reference_formula(dtype, scale_by_keep):
    x = random_tensor((6, 7), dtype)
    keep = torch.tensor([True, False, True, True, False, False])
    out = reference.apply_keep_mask(x, keep, reference.keep_scale(0.3, scale_by_keep))
    # Half types: rounding the float64 product once gives the float32 product rounded once, but for ties.
    torch.testing.assert_close(out.double(), formula(x, keep, 0.3, scale_by_keep), **TOLERANCES[dtype])
    assert_positive_zero(out[~keep])
    whole = reference.apply_keep_mask(x, torch.tensor([False]), 1.0)
    assert_positive_zero(whole)


def test_reference_by_hand():
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    out = reference.apply_keep_mask(x, torch.tensor([True, False]), 2.0)
    assert out.tolist() == [[2.0, -4.0], [0.0, 0.0]]


# --- identity ---


@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0, True), (0.5, False), (1.0, False), (0.0, False)])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_identity_returns_the_same_object(device, drop_prob, training, mode):
    inputs = [random_tensor((3, 4), dtype, device) for dtype in DTYPES]
    # Where nothing is dropped any tensor passes through, as in timm.
    inputs += [torch.arange(3, device=device), torch.tensor(1.0, device=device)]
    before = generator_state(device)
    for x in inputs:
        assert drop_path(x, drop_prob, training, mode=mode) is x
        assert DropPath(drop_prob, mode=mode).train(training)(x) is x
    assert torch.equal(generator_state(device), before), "an identity call must not consume random numbers"


# --- kept and dropped samples ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
def test_formula(device, dtype, scale_by_keep, mode, drop_prob):
    x = random_tensor((64, 3, 5), dtype, device)
    for _ in range(4):  # "batch" draws once a call: a few calls see both outcomes
        keep, expected = expected_drop_path(x, drop_prob, scale_by_keep, mode)
        out = drop_path(x, drop_prob, True, scale_by_keep, mode=mode)
        assert_same_bits(out, expected)
        by_table = formula(x, keep.expand(64), drop_prob, scale_by_keep)
        torch.testing.assert_close(out.double(), by_table, **TOLERANCES[dtype])


def test_kept_values_are_rounded_once(device):
    """The scale is not rounded to bfloat16 first: 1.109375 instead of 1.1111 would be a bias of 0.16 %."""
    x = random_tensor((512, 256), torch.bfloat16, device).abs()
    keep = predict_keep(x, 0.1)
    out = drop_path(x, 0.1, training=True)
    ratio = out[keep].double().sum() / x[keep].double().sum()
    assert ratio.item() == pytest.approx(1 / 0.9, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_values_are_rounded_to_nearest(device, dtype):
    """Every finite value of a half type, halfway cases included, against the float32 product rounded once by torch."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device).repeat(4, 1)
    keep = predict_keep(x, 0.3)
    out = drop_path(x, 0.3, training=True)
    expected = (x[keep].float() * torch.tensor(1 / 0.7, dtype=torch.float32, device=device)).to(dtype)
    assert keep.any()
    number = ~x[keep].isnan()
    assert_same_bits(out[keep][number], expected[number])
    assert out[keep][~number].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_formula_of_floor(device, dtype):
    """floor(keep_prob + rand) can round up to 2 in bfloat16 when keep_prob is near 1."""
    x = torch.ones(20_000, 1, dtype=dtype, device=device)
    out = drop_path(x, 0.001, training=True)
    kept = torch.tensor(1 / (1 - 0.001), dtype=torch.float64).to(dtype)
    assert set(out.unique().tolist()) == {0.0, kept.item()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("features", [1, 8, 37, 5000])
def test_dropped_samples_are_positive_zero(device, dtype, value, features):
    """Whatever lies in a dropped sample, NaN and Inf included: it is not read, and neither is its gradient."""
    x = torch.full((16, features), value, dtype=dtype, device=device, requires_grad=True)
    keep = predict_keep(x, 0.5)
    assert 0 < keep.sum() < 16
    out = drop_path(x, 0.5, training=True)
    (grad,) = torch.autograd.grad(out, x, torch.full_like(x, value))
    for result in (out, grad):
        assert_positive_zero(result[~keep])
        torch.testing.assert_close(result[keep], (x * 2)[keep], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [1.0, 1])
def test_drop_prob_one(device, dtype, scale_by_keep, mode, drop_prob):
    x = torch.tensor(HOSTILE, dtype=dtype, device=device).repeat(50, 3).requires_grad_()
    out = drop_path(x, drop_prob, True, scale_by_keep, mode=mode)
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert_positive_zero(out)
    (grad,) = torch.autograd.grad(out, x, torch.full_like(out, -float("inf")))
    assert_positive_zero(grad)


def test_drop_prob_next_to_the_ends(device):
    """The smallest and the largest drop_prob in (0, 1): nearly certain outcomes, never NaN."""
    x = random_tensor((1000, 3), device=device)
    assert_same_bits(drop_path(x, 5e-324, training=True), x)
    assert_positive_zero(drop_path(x, 1 - 2**-53, training=True))


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), Fraction(1, 2)])
def test_drop_prob_of_other_number_types(device, number):
    """Schedules hand over what numpy computed."""
    x = random_tensor((50, 3), device=device)
    _, expected = expected_drop_path(x, 0.5)
    assert_same_bits(drop_path(x, number, training=True), expected)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_draws_per_mode(device, mode):
    x = torch.ones(200, 3, device=device)
    outcomes = [kept_samples(drop_path(x, 0.5, training=True, mode=mode)).float().mean().item() for _ in range(30)]
    if mode == "batch":
        assert set(outcomes) == {0.0, 1.0}
    else:
        assert all(0.2 < share < 0.8 for share in outcomes)


# --- what autograd keeps alive ---


def _bytes_saved(function, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = function(x)
    return out, saved


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("path", ["fused", "composite"])
def test_saves_the_keep_mask_only(device, mode, path):
    x = random_tensor((6, 1000), device=device).requires_grad_()
    if path == "fused":
        out, saved = _bytes_saved(lambda t: drop_path(t, 0.5, training=True, mode=mode), x)
    else:
        out, saved = _bytes_saved(lambda t: reference.drop_path(t, 0.5, True, mode, None), x)
    expected = 6 if mode == "row" else 1
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(storages.values()) == expected, [(t.dtype, tuple(t.shape)) for t in saved]
    assert out.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_in_place_use_of_output_and_input_is_legal(device, mode):
    shortcut = random_tensor((8, 5), device=device, seed=1).requires_grad_()
    weight = random_tensor((8, 5), device=device, seed=2).requires_grad_()
    x = weight * 1
    keep = predict_keep(x, 0.5, mode)
    out = drop_path(x, 0.5, training=True, mode=mode)
    out += shortcut
    x.zero_()
    out.sum().backward()
    expected = reference.apply_keep_mask(torch.ones_like(weight), keep, 2.0)
    assert_same_bits(weight.grad, expected)
    assert_same_bits(shortcut.grad, torch.ones_like(shortcut))


def test_output_is_a_new_tensor_even_if_every_sample_is_kept(device):
    x = random_tensor((4, 3), device=device)
    before = x.clone()
    out = drop_path(x, 5e-324, training=True)
    out.add_(1)
    assert_same_bits(x, before)


# --- autocast and determinism ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast_dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_nothing(device, dtype, autocast_dtype):
    x = random_tensor((16, 5), dtype, device).requires_grad_()
    with torch.autocast(device.type, dtype=autocast_dtype):
        keep, expected = expected_drop_path(x.detach(), 0.3)
        out = drop_path(x, 0.3, training=True)
    assert_same_bits(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_same_bits(grad, reference.apply_keep_mask(torch.ones_like(x), keep, reference.keep_scale(0.3, True)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_seed_same_bits(device, dtype):
    x = random_tensor((257, 129), dtype, device)

    def run():
        leaf = x.clone().requires_grad_()
        torch.manual_seed(7)
        out = drop_path(leaf, 0.4, training=True)
        return out, torch.autograd.grad(out, leaf, x)[0]

    first, second = run(), run()
    torch.use_deterministic_algorithms(True)
    try:
        third = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for other in (second, third):
        assert_same_bits(first[0], other[0])
        assert_same_bits(first[1], other[1])


# --- the module ---


def test_module_repr_and_attributes():
    module = DropPath(0.1)
    assert repr(module) == "DropPath(drop_prob=0.100)"
    assert repr(torch.nn.Sequential(DropPath())) == "Sequential(\n  (0): DropPath(drop_prob=0.000)\n)"
    assert (module.drop_prob, module.scale_by_keep, module.mode) == (0.1, True, "row")
    assert not module.state_dict()
    assert not list(module.parameters())


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_module_is_the_function(device, scale_by_keep, mode):
    x = random_tensor((32, 4), device=device)
    module = DropPath(0.3, scale_by_keep, mode)
    for clone in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.manual_seed(1)
        expected = drop_path(x, 0.3, True, scale_by_keep, mode=mode)
        torch.manual_seed(1)
        assert_same_bits(clone(x), expected)
        assert clone.eval()(x) is x
    module.train().drop_prob = 1.0  # schedules assign to the attribute between steps
    assert_positive_zero(module(x))
