"""Promise: the semantics table, row by row."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import (
    ADD_DTYPES,
    ADD_GAMMA_DTYPES,
    ALL_ADD_DTYPES,
    DTYPES,
    FUSED_ADD_DTYPES,
    HALF_DTYPES,
    TOLERANCES,
    add_dtype,
    add_inputs,
    added_samples,
    assert_positive_zero,
    assert_rounded_once,
    assert_same_bits,
    checked_add,
    dtypes_id,
    exact_add,
    expected_drop_path,
    formula,
    generator_state,
    kept_samples,
    predict_keep,
    random_tensor,
)

from droppath_ext import DropPath, DropPathAdd, drop_path, drop_path_add, reference

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
    exact = formula(x, keep, 0.3, scale_by_keep)
    assert_rounded_once(out, exact, exact.abs())
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


def _assert_repeatable(run):
    """The tensors that run() returns are the same bits each time, also under deterministic algorithms."""
    first, second = run(), run()
    torch.use_deterministic_algorithms(True)
    try:
        third = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for other in (second, third):
        for actual, expected in zip(other, first, strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_seed_same_bits(device, dtype):
    x = random_tensor((257, 129), dtype, device)

    def run():
        leaf = x.clone().requires_grad_()
        torch.manual_seed(7)
        out = drop_path(leaf, 0.4, training=True)
        return out, torch.autograd.grad(out, leaf, x)[0]

    _assert_repeatable(run)


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


# --- drop_path_add: the specification by hand, and its result dtype ---


def test_reference_add_by_hand():
    x, residual = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    gamma, keep = torch.tensor([0.5, 3.0]), torch.tensor([True, False])
    assert reference.add_kept(x, residual, None, keep, 2.0).tolist() == [[12.0, 16.0], [30.0, 40.0]]
    assert reference.add_kept(x, residual, gamma, keep, 2.0).tolist() == [[11.0, 8.0], [30.0, 40.0]]
    assert reference.add_kept(x, residual, gamma, keep[1:], 2.0).tolist() == [[10.0, 20.0], [30.0, 40.0]]
    assert reference.add_kept(x, residual, gamma, None, 1.0).tolist() == [[10.5, 14.0], [31.5, 52.0]]


@pytest.mark.parametrize("dtypes", ALL_ADD_DTYPES, ids=dtypes_id)
def test_add_result_dtype(device, dtypes):
    """The dtype of residual + gamma * x, whatever the mixture, with a mask and without."""
    x, residual, gamma = add_inputs((40, 3, 5), dtypes, device)
    everything = torch.ones(1, dtype=torch.bool, device=device)
    out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    keep = added_samples(out, residual)
    assert 0 < keep.sum() < 40
    assert out.dtype == add_dtype(x, residual, gamma)
    assert_rounded_once(out, *exact_add(x, residual, gamma, keep, 2.0))
    for drop_prob, training in ((0.5, False), (0.0, True)):
        out = drop_path_add(x, residual, drop_prob, training, gamma=gamma)
        assert out.dtype == add_dtype(x, residual, gamma)
        assert_rounded_once(out, *exact_add(x, residual, gamma, everything, 1.0))


# --- drop_path_add: kept and dropped samples ---


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
def test_add_formula(device, dtypes, scale_by_keep, mode, drop_prob):
    for _ in range(3 if mode == "batch" else 1):  # "batch" draws once a call: a few calls see both outcomes
        checked_add(*add_inputs((64, 3, 5), dtypes, device), drop_prob, scale_by_keep, mode)


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
def test_add_without_scale_is_a_plain_addition(device, dtypes):
    """scale_by_keep=False leaves nothing but residual + gamma * x in kept samples."""
    x, residual, gamma = add_inputs((64, 3, 5), dtypes, device)
    keep = predict_keep(x, 0.5)
    out = drop_path_add(x, residual, 0.5, True, False, gamma=gamma)
    assert_same_bits(out[keep], drop_path_add(x, residual, gamma=gamma)[keep])
    assert_same_bits(out[~keep], residual[~keep].to(out.dtype))


@pytest.mark.parametrize("dtypes", ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
def test_add_without_gamma_is_the_reference_bit_for_bit(device, dtypes, drop_prob):
    """x times 1 or 2 is exact, so the sum is the only rounding there is."""
    x, residual, _ = add_inputs((512, 33), dtypes, device)
    keep = predict_keep(x, drop_prob) if drop_prob else None
    out = drop_path_add(x, residual, drop_prob, training=True)
    assert_same_bits(out, reference.add_kept(x, residual, None, keep, 2.0 if drop_prob else 1.0))


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0, True), (0.5, False), (1.0, False), (0.0, False)])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_add_where_nothing_is_dropped(device, dtypes, drop_prob, training, mode):
    """residual + gamma * x, with every gradient, and not a random number consumed."""
    inputs = [t for t in add_inputs((9, 3, 5), dtypes, device) if t is not None]
    x, residual, *gamma = [t.requires_grad_() for t in inputs]
    gamma = gamma[0] if gamma else None
    everything = torch.ones(1, dtype=torch.bool, device=device)
    before = generator_state(device)
    out = drop_path_add(x, residual, drop_prob, training, gamma=gamma, mode=mode)
    assert torch.equal(generator_state(device), before), "such a call must not consume random numbers"
    assert_rounded_once(out, *exact_add(x, residual, gamma, everything, 1.0))
    grad = random_tensor(out.shape, out.dtype, device, seed=3)
    grad_x, grad_residual, *grad_gamma = torch.autograd.grad(out, inputs, grad)
    exact = grad.double() if gamma is None else (grad.double() * gamma.double()).detach()
    assert_rounded_once(grad_x, exact, exact.abs())
    assert_same_bits(grad_residual, grad.to(residual.dtype))
    if gamma is not None:
        terms = (grad.double() * x.double()).detach()
        assert_rounded_once(grad_gamma[0], terms.sum((0, 1)), terms.abs().sum((0, 1)))


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [1.0, 1])
def test_add_drop_prob_one(device, dtypes, scale_by_keep, mode, drop_prob):
    """The residual and no gradient, whatever x, gamma and the incoming gradient hold."""
    _, residual, gamma = add_inputs((50, 15), dtypes, device)
    x = torch.tensor(HOSTILE, dtype=dtypes[0], device=device).repeat(50, 3).requires_grad_()
    inputs = [x, residual.requires_grad_()]
    if gamma is not None:
        gamma = torch.tensor(HOSTILE, dtype=dtypes[2], device=device).repeat(3).requires_grad_()
        inputs.append(gamma)
    out = drop_path_add(x, residual, drop_prob, True, scale_by_keep, gamma=gamma, mode=mode)
    assert_same_bits(out, residual.to(out.dtype))
    grad = torch.full_like(out, -float("inf"))
    grad_x, grad_residual, *grad_gamma = torch.autograd.grad(out, inputs, grad)
    assert_same_bits(grad_residual, grad.to(residual.dtype))
    for zero in (grad_x, *grad_gamma):
        assert_positive_zero(zero)


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("features", [1, 8, 37, 2500])
def test_add_never_reads_dropped_samples(device, dtypes, value, features):
    """NaN and Inf in a dropped sample of x leak into no output and no gradient, that of gamma included."""
    x, residual, gamma = add_inputs((16, features), dtypes, device)
    keep = predict_keep(x, 0.5)
    assert 0 < keep.sum() < 16
    x[~keep] = value
    out = checked_add(x, residual, gamma)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, -1.0])
@pytest.mark.parametrize("features", [1, 8, 37])
def test_add_gradient_of_dropped_samples_is_positive_zero(device, dtypes, value, features):
    """Whatever gradient comes in there: x gets +0, gamma nothing, and the residual all of it."""
    inputs = [t.requires_grad_() for t in add_inputs((16, features), dtypes, device) if t is not None]
    keep = predict_keep(inputs[0], 0.5)
    assert 0 < keep.sum() < 16
    out = drop_path_add(*inputs[:2], 0.5, training=True, gamma=inputs[2] if len(inputs) == 3 else None)
    grad = random_tensor(out.shape, out.dtype, device, seed=3)
    clean = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    grad[~keep] = value
    grad_x, grad_residual, *grad_gamma = torch.autograd.grad(out, inputs, grad)
    assert_positive_zero(grad_x[~keep])
    assert_same_bits(grad_x, clean[0])
    assert_same_bits(grad_residual, grad.to(inputs[1].dtype))
    for actual in grad_gamma:
        assert_same_bits(actual, clean[2])


@pytest.mark.parametrize("dtypes", ADD_GAMMA_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_add_ignores_gamma_in_dropped_samples(device, dtypes, value):
    """A diverged gamma spoils kept samples only."""
    x, residual, gamma = add_inputs((16, 5), dtypes, device)
    x.requires_grad_()
    keep = predict_keep(x, 0.5)
    assert 0 < keep.sum() < 16
    out = drop_path_add(x, residual, 0.5, training=True, gamma=torch.full_like(gamma, value))
    (grad_x,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert_same_bits(out[~keep], residual[~keep].to(out.dtype))
    assert_positive_zero(grad_x[~keep])
    assert not out[keep].isfinite().any()
    assert not grad_x[keep].isfinite().any()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_add_copies_every_bit_pattern_of_a_dropped_residual(device, dtype, with_gamma):
    """Negative zeros, subnormal numbers and the payload of NaNs: dropped samples are copied, not computed."""
    residual = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device).repeat(4, 1)
    x = torch.full_like(residual, float("nan"))
    gamma = torch.full_like(residual[0], -1.0) if with_gamma else None
    assert_same_bits(drop_path_add(x, residual, 1.0, training=True, gamma=gamma), residual)


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("value", [-0.0, 0.0, float("inf"), -float("inf"), "tiny", "subnormal", "max"])
def test_add_copies_dropped_residuals(device, dtypes, value):
    info = torch.finfo(dtypes[1])
    value = {"tiny": info.tiny, "subnormal": info.tiny * info.eps, "max": info.max}.get(value, value)
    x, residual, gamma = add_inputs((64, 5), dtypes, device)
    residual.fill_(value)
    keep = predict_keep(x, 0.5)
    assert 0 < keep.sum() < 64
    out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    assert_same_bits(out[~keep], residual[~keep].to(out.dtype))


def test_add_drop_prob_next_to_the_ends(device):
    """The smallest and the largest drop_prob in (0, 1): nearly certain outcomes, never NaN."""
    x, residual, gamma = add_inputs((1000, 3), (torch.float32,) * 3, device)
    nothing_dropped = drop_path_add(x, residual, gamma=gamma)
    assert_same_bits(drop_path_add(x, residual, 5e-324, training=True, gamma=gamma), nothing_dropped)
    assert_same_bits(drop_path_add(x, residual, 1 - 2**-53, training=True, gamma=gamma), residual)


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), Fraction(1, 2)])
def test_add_drop_prob_of_other_number_types(device, number):
    x, residual, _ = add_inputs((50, 3), (torch.float32, torch.float32, None), device)
    keep = predict_keep(x, 0.5)
    assert_same_bits(drop_path_add(x, residual, number, training=True), reference.add_kept(x, residual, None, keep, 2))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_add_draws_per_mode(device, mode):
    x, residual, gamma = add_inputs((200, 3), (torch.float32,) * 3, device)
    outcomes = []
    for _ in range(30):
        out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma, mode=mode)
        outcomes.append(added_samples(out, residual).float().mean().item())
    if mode == "batch":
        assert set(outcomes) == {0.0, 1.0}
    else:
        assert all(0.2 < share < 0.8 for share in outcomes)


# --- drop_path_add: aliases, autocast, determinism ---


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False), (0.5, True), (1.0, True)])
def test_add_returns_a_new_tensor(device, dtypes, drop_prob, training):
    """Also where every sample is the residual's: writing to the result changes no argument."""
    inputs = add_inputs((8, 5), dtypes, device)
    before = [t.clone() for t in inputs if t is not None]
    out = drop_path_add(*inputs[:2], drop_prob, training, gamma=inputs[2])
    out.fill_(7)
    for tensor, expected in zip(inputs, before, strict=False):  # gamma may be None
        assert_same_bits(tensor, expected)


@pytest.mark.parametrize("x_is_residual", [False, True])
@pytest.mark.parametrize("with_gamma", [False, True])
def test_add_of_a_tensor_to_itself(device, x_is_residual, with_gamma):
    """x and residual may be one tensor, as in x + drop_path(x): each use sends its own gradient."""
    x, residual, gamma = add_inputs((40, 3), (torch.float64, torch.float64, torch.float64), device)
    x.requires_grad_()
    residual = x if x_is_residual else x * 3
    gamma = gamma if with_gamma else None
    keep = predict_keep(x, 0.5)
    out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    assert_rounded_once(out, *exact_add(x, residual, gamma, keep, 2.0))
    (grad,) = torch.autograd.grad(out.sum(), x)
    factor = torch.full_like(x, 2.0) * (1.0 if gamma is None else gamma)
    torch.testing.assert_close(grad, (1 if x_is_residual else 3) + torch.where(keep[:, None], factor, 0.0).detach())


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_add_in_place_use_of_output_and_inputs_is_legal(device, mode):
    """Nothing but what a gradient needs is kept, so what it does not need may be overwritten."""
    x, residual = (random_tensor((8, 5), device=device, seed=seed).requires_grad_() for seed in (0, 1))
    hidden, shortcut = x * 1, residual * 1
    keep = predict_keep(x, 0.5, mode)
    out = drop_path_add(hidden, shortcut, 0.5, training=True, mode=mode)
    out += 1
    out.mul_(2)
    hidden.zero_()
    shortcut.zero_()
    out.sum().backward()
    twos = torch.full_like(x, 2.0)
    assert_same_bits(x.grad, reference.apply_keep_mask(twos, keep, 2.0))
    assert_same_bits(residual.grad, twos)


def test_add_in_place_use_with_gamma(device):
    """gamma's gradient needs x: overwriting x is legal without that gradient and an error with it."""
    x, residual, gamma = add_inputs((8, 5), (torch.float32,) * 3, device)
    x.requires_grad_()
    keep = predict_keep(x, 0.5)
    hidden = x * 1
    out = drop_path_add(hidden, residual, 0.5, training=True, gamma=gamma)
    out += 1
    hidden.zero_()
    residual.zero_()
    (grad_x,) = torch.autograd.grad(out.sum(), x)
    assert_same_bits(grad_x, reference.apply_keep_mask(gamma.expand(8, 5), keep, 2.0))
    hidden = x * 1
    out = drop_path_add(hidden, residual, 0.5, training=True, gamma=gamma.requires_grad_())
    hidden.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("autocast_dtype", [torch.float16, torch.bfloat16])
def test_add_autocast_casts_nothing(device, dtypes, autocast_dtype):
    with torch.autocast(device.type, dtype=autocast_dtype):
        checked_add(*add_inputs((16, 5), dtypes, device), drop_prob=0.3)


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
def test_add_same_seed_same_bits(device, dtypes):
    x, residual, gamma = add_inputs((257, 129), dtypes, device)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, residual, gamma) if t is not None]
        torch.manual_seed(7)
        out = drop_path_add(*leaves[:2], 0.4, training=True, gamma=leaves[2] if len(leaves) == 3 else None)
        return out, *torch.autograd.grad(out, leaves, out.detach())

    _assert_repeatable(run)


@pytest.mark.parametrize("dtypes", [dtypes for dtypes in FUSED_ADD_DTYPES if dtypes[2] is not None], ids=dtypes_id)
@pytest.mark.parametrize("drop_prob", [0.0, 0.3, 0.5])
def test_add_infinite_gamma_stays_infinite(device, dtypes, drop_prob):
    """However gamma * scale is made precise, inf must not come out as NaN."""
    x, residual = (torch.ones(64, 5, dtype=dtype, device=device, requires_grad=True) for dtype in dtypes[:2])
    gamma = torch.full((5,), float("inf"), dtype=dtypes[2], device=device, requires_grad=True)
    out = drop_path_add(x, residual, drop_prob, training=True, gamma=gamma)
    keep = out.isinf().all(1)
    assert keep.all() if drop_prob == 0 else 0 < keep.sum() < 64
    assert_same_bits(out[~keep], residual[~keep].to(out.dtype))
    grad_x, grad_gamma = torch.autograd.grad(out, (x, gamma), torch.ones_like(out))
    assert grad_x[keep].isinf().all()
    assert_positive_zero(grad_x[~keep])
    assert grad_gamma.isfinite().all()


# --- drop_path_add: the module ---


def test_add_module_repr():
    assert repr(DropPathAdd(0.1)) == "DropPathAdd(drop_prob=0.100)"
    assert repr(DropPathAdd(0.1, mode="batch")) == "DropPathAdd(drop_prob=0.100, mode=batch)"
    assert repr(DropPathAdd(0.25, dim=8, init_values=1e-5)) == (
        "DropPathAdd(drop_prob=0.250, dim=[8], init_values=1e-05)"
    )
    assert repr(DropPathAdd(dim=(8, 1, 1), init_values=0.5)) == (
        "DropPathAdd(drop_prob=0.000, dim=[8, 1, 1], init_values=0.5)"
    )


@pytest.mark.parametrize(("dim", "shape"), [(6, (6,)), ((6,), (6,)), ([6, 1, 1], (6, 1, 1)), (torch.Size([6]), (6,))])
def test_add_module_owns_gamma(dim, shape):
    module = DropPathAdd(0.1, dim=dim, init_values=0.25)
    assert list(module.state_dict()) == ["gamma"]
    assert [name for name, _ in module.named_parameters()] == ["gamma"]
    assert module.gamma.requires_grad
    assert_same_bits(module.gamma, torch.full(shape, 0.25))
    with torch.no_grad():
        module.gamma.fill_(3)
    module.reset_parameters()
    assert_same_bits(module.gamma, torch.full(shape, 0.25))


def test_add_module_without_gamma():
    module = DropPathAdd(0.1)
    assert (module.drop_prob, module.scale_by_keep, module.mode, module.gamma) == (0.1, True, "row", None)
    assert not module.state_dict()
    assert not list(module.parameters())
    module.reset_parameters()
    assert module.gamma is None


def test_add_module_initialised_with_zero():
    """An init_values of 0 asks for a gamma of zeros, not for none."""
    module = DropPathAdd(0.5, dim=3, init_values=0.0)
    assert_same_bits(module.gamma, torch.zeros(3))
    x, residual, _ = add_inputs((9, 3), (torch.float32, torch.float32, None))
    assert_same_bits(module(x, residual), residual)


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("dim", [None, 4, (3, 1)])
def test_add_module_is_the_function(device, scale_by_keep, mode, dim):
    x, residual, _ = add_inputs((32, 3, 4), (torch.float32, torch.float32, None), device)
    module = DropPathAdd(0.3, scale_by_keep, mode, dim, None if dim is None else 0.7).to(device)
    for clone in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (clone.gamma is None) == (dim is None)
        assert dim is None or clone is module or clone.gamma is not module.gamma
        torch.manual_seed(1)
        expected = drop_path_add(x, residual, 0.3, True, scale_by_keep, gamma=module.gamma, mode=mode)
        torch.manual_seed(1)
        assert_same_bits(clone(x, residual), expected)
        expected = drop_path_add(x, residual, gamma=module.gamma)
        assert_same_bits(clone.eval()(x, residual), expected)
    module.train().drop_prob = 1.0  # schedules assign to the attribute between steps
    assert_same_bits(module(x, residual), residual)


def test_add_module_trains_gamma(device):
    module = DropPathAdd(0.5, dim=3, init_values=0.5).to(device)
    x, residual, _ = add_inputs((64, 3), (torch.float32, torch.float32, None), device)
    keep = predict_keep(x, 0.5)
    module(x, residual).sum().backward()
    torch.testing.assert_close(module.gamma.grad, 2 * x[keep].sum(0))


def test_add_module_moves_and_casts(device):
    module = DropPathAdd(0.5, dim=3, init_values=0.5).to(device, torch.bfloat16)
    assert (module.gamma.device.type, module.gamma.dtype) == (device.type, torch.bfloat16)
    x, residual, _ = add_inputs((8, 3), (torch.bfloat16, torch.bfloat16, None), device)
    assert module(x, residual).dtype == torch.bfloat16
