"""Promise: the semantics table, row by row."""

import copy
import pickle
from dataclasses import replace
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
    case_id,
    dtypes_id,
    exact_add,
    formula,
    generator_state,
    kept_samples,
    needs_native,
    pairwise,
    predict_keep,
    random_tensor,
)
from op_cases import ADD, ADD_GAMMA, BATCH_MODE_OPS, DROP_PATH, DROP_PATH_OPS, OPS

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


# Both modes of an op, and what they draw.
MODES = tuple(zip(DROP_PATH_OPS, BATCH_MODE_OPS, strict=True))


@pytest.mark.parametrize(
    ("op", "dtypes", "scale_by_keep", "drop_prob"),
    [case for modes in MODES for case in pairwise(modes, modes[0].dtypes, [True, False], [0.1, 0.5, 0.9])],
    ids=case_id,
)
def test_formula(device, op, dtypes, scale_by_keep, drop_prob):
    """Forward and backward."""
    for _ in range(4 if op in BATCH_MODE_OPS else 1):  # "batch" draws once a call: a few calls see both outcomes
        inputs = op.make((64, 3, 5), dtypes, device)
        out = op.checked(inputs, drop_prob, scale_by_keep)
        if op.inputs == ("x",):
            by_table = formula(inputs[0], kept_samples(out), drop_prob, scale_by_keep)
            torch.testing.assert_close(out.detach().double(), by_table, **TOLERANCES[dtypes[0]])


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


@pytest.mark.parametrize(
    ("op", "value", "features"),
    pairwise(DROP_PATH_OPS, [float("nan"), float("inf"), -float("inf")], [1, 8, 37, 2500, 5000]),
)
def test_dropped_samples_are_never_read(device, op, value, features):
    """NaN and Inf in a dropped sample of x leak into no output and no gradient, that of gamma included."""
    for dtypes in op.dtypes:
        inputs = op.make((16, features), dtypes, device)
        keep = predict_keep(inputs[0], 0.5)
        assert 0 < keep.sum() < 16
        inputs[0][~keep] = value
        out = op.checked(inputs)
        assert out.isfinite().all()
        assert_same_bits(out[~keep], op.dropped(inputs)[~keep].to(out.dtype))


@needs_native  # ATen turns one NaN into another
@pytest.mark.parametrize(("op", "value", "features"), pairwise(DROP_PATH_OPS, HOSTILE, [1, 8, 37, 5000]))
def test_gradient_of_dropped_samples_is_positive_zero(device, op, value, features):
    """Whatever gradient comes in there: x gets +0, gamma nothing, and the residual all of it."""
    for dtypes in op.dtypes:
        inputs = [t.requires_grad_() for t in op.make((16, features), dtypes, device)]
        keep = predict_keep(inputs[0], 0.5)
        assert 0 < keep.sum() < 16
        out = op(inputs)
        grad = random_tensor(out.shape, out.dtype, device, seed=3)
        clean = dict(zip(op.inputs, torch.autograd.grad(out, inputs, grad, retain_graph=True), strict=True))
        grad[~keep] = value
        grads = dict(zip(op.inputs, torch.autograd.grad(out, inputs, grad), strict=True))
        assert_positive_zero(grads["x"][~keep])
        if "residual" in grads:
            assert_same_bits(grads.pop("residual"), grad.to(dtypes[1]))
        for name, actual in grads.items():
            assert_same_bits(actual, clean[name])


@pytest.mark.parametrize(("dtype", "value", "features"), pairwise(DTYPES, HOSTILE, [1, 8, 37, 5000]), ids=case_id)
def test_kept_samples_may_hold_anything(device, dtype, value, features):
    """NaN, Inf and -0 in x and in the gradient are multiplied like any number, and are +0 where they are dropped."""
    x = torch.full((16, features), value, dtype=dtype, device=device, requires_grad=True)
    keep = predict_keep(x, 0.5)
    assert 0 < keep.sum() < 16
    out = drop_path(x, 0.5, training=True)
    (grad,) = torch.autograd.grad(out, x, torch.full_like(x, value))
    for result in (out, grad):
        assert_positive_zero(result[~keep])
        torch.testing.assert_close(result[keep], (x * 2)[keep], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("op", "scale_by_keep", "drop_prob"), pairwise((*DROP_PATH_OPS, *BATCH_MODE_OPS), [True, False], [1.0, 1])
)
def test_drop_prob_one(device, op, scale_by_keep, drop_prob):
    """What a dropped sample is and no gradient, whatever x, gamma and the incoming gradient hold."""
    for dtypes in op.dtypes:
        named = dict(zip(op.inputs, op.make((50, 15), dtypes, device), strict=True))
        named["x"] = torch.tensor(HOSTILE, dtype=dtypes[0], device=device).repeat(50, 3)
        if op.has_gamma:
            named["gamma"] = torch.tensor(HOSTILE, dtype=dtypes[2], device=device).repeat(3)
        inputs = [named[name].requires_grad_() for name in op.inputs]
        out = op(inputs, drop_prob, True, scale_by_keep)
        assert_same_bits(out, op.dropped(inputs).to(out.dtype))
        grad = torch.full_like(out, -float("inf"))
        for name, actual in zip(op.inputs, torch.autograd.grad(out, inputs, grad), strict=True):
            if name == "residual":
                assert_same_bits(actual, grad.to(dtypes[1]))
            else:
                assert_positive_zero(actual)


@pytest.mark.parametrize("op", DROP_PATH_OPS)
def test_drop_prob_next_to_the_ends(device, op):
    """The smallest and the largest drop_prob in (0, 1): nearly certain outcomes, never NaN."""
    inputs = op.make((1000, 3), torch.float32, device)
    assert_same_bits(op(inputs, 5e-324), op(inputs, 0.0))
    assert_same_bits(op(inputs, 1 - 2**-53), op.dropped(inputs))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), Fraction(1, 2)], ids=lambda n: type(n).__name__)
def test_drop_prob_of_other_number_types(device, op, number):
    """Schedules hand over what numpy computed."""
    inputs = op.make((50, 3), torch.float32, device)
    torch.manual_seed(1)
    expected = op(inputs, 0.5)
    torch.manual_seed(1)
    out = op(inputs, number)
    assert_same_bits(out, expected)
    op.assert_output(out, inputs, op.keep(out, inputs), 2.0)


@pytest.mark.parametrize("op", (*DROP_PATH_OPS, *BATCH_MODE_OPS))
def test_draws_per_mode(device, op):
    inputs = op.make((200, 3), torch.float32, device)
    outcomes = [op.keep(op(inputs), inputs).float().mean().item() for _ in range(30)]
    if op in BATCH_MODE_OPS:
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


@pytest.mark.parametrize("op", [op for modes in MODES[:2] for op in modes])
def test_in_place_use_of_output_and_inputs_is_legal(device, op):
    """Nothing but what a gradient needs is kept, so what it does not need may be overwritten."""
    leaves = [t.requires_grad_() for t in op.make((8, 5), torch.float32, device)]
    shortcut = random_tensor((8, 5), device=device, seed=2).requires_grad_()
    inner = [t * 1 for t in leaves]
    keep = predict_keep(leaves[0], 0.5, op.options.get("mode", "row"))
    out = op(inner)
    out += shortcut
    out.mul_(2)
    for tensor in inner:
        tensor.zero_()
    out.sum().backward()
    twos = torch.full_like(shortcut, 2.0)
    assert_same_bits(leaves[0].grad, reference.apply_keep_mask(twos, keep, 2.0))
    for tensor in (shortcut, *leaves[1:]):
        assert_same_bits(tensor.grad, twos)


@pytest.mark.parametrize(
    ("op", "drop_prob", "training"),
    [
        *((op, drop_prob, True) for op in OPS for drop_prob in (5e-324, 0.5, 1.0)),
        *((op, drop_prob, training) for op in OPS[1:] for drop_prob, training in ((0.0, True), (0.5, False))),
    ],
)
def test_output_is_a_new_tensor(device, op, drop_prob, training):
    """Also where every sample is x's, or the residual's: writing to it changes no argument."""
    for dtypes in op.dtypes:
        inputs = op.make((8, 5), dtypes, device)
        before = [t.clone() for t in inputs]
        op(inputs, drop_prob, training).fill_(7)
        for tensor, expected in zip(inputs, before, strict=True):
            assert_same_bits(tensor, expected)


# --- autocast and determinism ---


@pytest.mark.parametrize("op", DROP_PATH_OPS)
@pytest.mark.parametrize("autocast_dtype", HALF_DTYPES)
def test_autocast_casts_nothing(device, op, autocast_dtype):
    for dtypes in op.dtypes:
        with torch.autocast(device.type, dtype=autocast_dtype):
            op.checked(op.make((16, 5), dtypes, device), 0.3)


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


@pytest.mark.parametrize("op", DROP_PATH_OPS)
def test_same_seed_same_bits(device, op):
    for dtypes in op.dtypes:
        tensors = op.make((257, 129), dtypes, device)

        def run(tensors=tensors):
            leaves = [t.clone().requires_grad_() for t in tensors]
            torch.manual_seed(7)
            out = op(leaves, 0.4)
            return out, *torch.autograd.grad(out, leaves, out.detach())

        _assert_repeatable(run)


# --- the module ---


def test_module_repr_and_attributes():
    module = DropPath(0.1)
    assert repr(module) == "DropPath(drop_prob=0.100)"
    assert repr(torch.nn.Sequential(DropPath())) == "Sequential(\n  (0): DropPath(drop_prob=0.000)\n)"
    assert (module.drop_prob, module.scale_by_keep, module.mode) == (0.1, True, "row")
    assert not module.state_dict()
    assert not list(module.parameters())


@pytest.mark.parametrize(("op", "dim"), [(DROP_PATH, None), (ADD, None), (ADD_GAMMA, 4), (ADD_GAMMA, (3, 1))])
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_module_is_the_function(device, op, dim, scale_by_keep, mode):
    op = replace(op, options={"mode": mode})
    inputs = [
        t for name, t in zip(op.inputs, op.make((32, 3, 4), torch.float32, device), strict=True) if name != "gamma"
    ]
    if op.inputs == ("x",):
        module = DropPath(0.3, scale_by_keep, mode)
    else:
        module = DropPathAdd(0.3, scale_by_keep, mode, dim, None if dim is None else 0.7).to(device)
    assert (getattr(module, "gamma", None) is None) == (dim is None)
    for clone in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert dim is None or clone is module or clone.gamma is not module.gamma
        arguments = inputs if dim is None else [*inputs, clone.gamma]
        torch.manual_seed(1)
        expected = op(arguments, 0.3, True, scale_by_keep)
        torch.manual_seed(1)
        assert_same_bits(clone(*inputs), expected)
        out = clone.eval()(*inputs)
        assert_same_bits(out, op(arguments, 0.0))
        assert out is inputs[0] or op.inputs != ("x",)
    module.train().drop_prob = 1.0  # schedules assign to the attribute between steps
    assert_same_bits(module(*inputs), op.dropped(inputs))


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


@pytest.mark.parametrize("op", [op for modes in MODES[1:] for op in modes])
@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0, True), (0.5, False), (1.0, False), (0.0, False)])
def test_add_where_nothing_is_dropped(device, op, drop_prob, training):
    """residual + gamma * x, with every gradient, and not a random number consumed."""
    everything = torch.ones(1, dtype=torch.bool, device=device)
    for dtypes in op.dtypes:
        inputs = [t.requires_grad_() for t in op.make((9, 3, 5), dtypes, device)]
        x, residual, *gamma = inputs
        before = generator_state(device)
        out = op(inputs, drop_prob, training)
        assert torch.equal(generator_state(device), before), "such a call must not consume random numbers"
        op.assert_output(out, inputs, everything, 1.0)
        grad = random_tensor(out.shape, out.dtype, device, seed=3)
        grad_x, grad_residual, *grad_gamma = torch.autograd.grad(out, inputs, grad)
        exact = (grad.double() * gamma[0].double()).detach() if gamma else grad.double()
        assert_rounded_once(grad_x, exact, exact.abs())
        assert_same_bits(grad_residual, grad.to(residual.dtype))
        for actual in grad_gamma:
            terms = (grad.double() * x.double()).detach()
            assert_rounded_once(actual, terms.sum((0, 1)), terms.abs().sum((0, 1)))


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


@needs_native
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_add_copies_every_bit_pattern_of_a_dropped_residual(device, dtype, with_gamma):
    """Negative zeros, subnormal numbers and the payload of NaNs: dropped samples are copied, not computed."""
    residual = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device).repeat(4, 1)
    x = torch.full_like(residual, float("nan"))
    gamma = torch.full_like(residual[0], -1.0) if with_gamma else None
    assert_same_bits(drop_path_add(x, residual, 1.0, training=True, gamma=gamma), residual)


@pytest.mark.parametrize("op", [ADD, ADD_GAMMA])
@pytest.mark.parametrize("value", [-0.0, 0.0, float("inf"), -float("inf"), "tiny", "subnormal", "max"])
def test_add_copies_dropped_residuals(device, op, value):
    for dtypes in op.dtypes:
        info = torch.finfo(dtypes[1])
        number = {"tiny": info.tiny, "subnormal": info.tiny * info.eps, "max": info.max}.get(value, value)
        inputs = op.make((64, 5), dtypes, device)
        x, residual = inputs[:2]
        residual.fill_(number)
        keep = predict_keep(x, 0.5)
        assert 0 < keep.sum() < 64
        out = op(inputs)
        assert_same_bits(out[~keep], residual[~keep].to(out.dtype))


# --- drop_path_add: aliases, autocast, determinism ---


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


@needs_native
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
