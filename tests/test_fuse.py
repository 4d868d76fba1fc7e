"""Promise: drop_path_add rounds once, and computes, copies and keeps nothing that nobody asked for."""

import functools

import numpy as np
import pytest
import torch
from conftest import (
    ADD_DTYPES,
    ADD_GAMMA_DTYPES,
    ALL_ADD_DTYPES,
    FUSED_ADD_DTYPES,
    HALF_DTYPES,
    add_dtype,
    add_inputs,
    added_samples,
    assert_same_bits,
    dtypes_id,
    needs_native,
    predict_keep,
    random_tensor,
    runs_cuda_kernels,
    saved_storages,
    seeded,
)
from torch.utils._python_dispatch import TorchDispatchMode

from droppath_ext import drop_path_add, reference

OTHER_ADD_DTYPES = [dtypes for dtypes in ALL_ADD_DTYPES if dtypes not in FUSED_ADD_DTYPES]
FLOATS = (torch.float32,) * 3


# --- the forward against timm's own sequence of roundings ---


def _timms_formula(x, residual, gamma, keep, drop_prob):
    """The end of timm's block, line by line: each rounds to the dtype of its result."""
    branch = x if gamma is None else x * gamma
    mask = keep.to(branch.dtype).view(-1, *[1] * (x.dim() - 1))
    if drop_prob < 1:
        mask.div_(1 - drop_prob)
    return residual + branch * mask


def _errors(out, x, residual, gamma, keep, drop_prob):
    """Largest and mean absolute error of kept samples against the formula in a wider float."""
    # Only numpy has a wider one than float64, and there float64 results have an error to measure.
    number = np.longdouble if out.dtype is torch.float64 else np.float64
    out, x, residual = (t[keep].double().cpu().numpy().astype(number) for t in (out, x, residual))
    branch = x / (1 - number(drop_prob))
    if gamma is not None:
        branch *= gamma.double().cpu().numpy().astype(number)
    error = np.abs(out - (residual + branch))
    return float(error.max()), float(error.mean())


@functools.cache
def _spread(shape, seed):
    """Magnitudes in [1, 2) of either sign: every step rounds by much the same, so the largest error is no accident."""
    values = torch.empty(shape, dtype=torch.float64).uniform_(1, 2, generator=seeded("cpu", seed))
    return torch.where(torch.rand(shape, generator=seeded("cpu", seed + 100)) < 0.5, values, -values)


def _spread_inputs(shape, dtypes, device):
    x, residual = (_spread(shape, seed).to(device, dtype) for seed, dtype in enumerate(dtypes[:2]))
    return x, residual, None if dtypes[2] is None else _spread(shape[-1:], 2).to(device, dtypes[2])


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("drop_prob", [0.0, 0.1, 0.25, 0.4, 0.5])
def test_error_is_at_most_that_of_timms_formula(device, dtypes, drop_prob):
    x, residual, gamma = _spread_inputs((32, 1, 4096), dtypes, device)
    keep = predict_keep(x, drop_prob) if drop_prob else torch.ones(32, dtype=torch.bool, device=device)
    out = drop_path_add(x, residual, drop_prob, training=True, gamma=gamma)
    timms = _timms_formula(x, residual, gamma, keep, drop_prob)
    assert out.dtype == timms.dtype
    ours, theirs = (_errors(result, x, residual, gamma, keep, drop_prob) for result in (out, timms))
    assert theirs[1] > 0
    # The CUDA kernels round the scale to float32: with gamma, a float32 result may be off by a float32 step of 1 more.
    rounds_scale = runs_cuda_kernels(device) and gamma is not None and out.dtype is torch.float32
    assert ours[0] <= theirs[0] + rounds_scale * torch.finfo(torch.float32).eps
    assert ours[1] <= theirs[1]


@pytest.mark.parametrize("dtypes", OTHER_ADD_DTYPES, ids=dtypes_id)
def test_error_of_other_mixtures(device, dtypes):
    """The composite's: it takes as many steps as timm in float32 and float64, and no rounder ones."""
    x, residual, gamma = _spread_inputs((32, 1, 4096), dtypes, device)
    out = drop_path_add(x, residual, 0.1, training=True, gamma=gamma)
    keep = added_samples(out, residual)
    assert 16 < keep.sum() < 32
    timms = _timms_formula(x, residual, gamma, keep, 0.1)
    assert out.dtype == timms.dtype
    ours, theirs = (_errors(result, x, residual, gamma, keep, 0.1) for result in (out, timms))
    assert ours[0] <= theirs[0]
    assert ours[1] <= theirs[1]


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_the_scale_is_not_rounded_to_half_precision(device, dtype):
    """bfloat16(1 / 0.9) is 0.16 % low: the expectation of timm's sum is not that of the branch."""
    x = random_tensor((512, 256), dtype, device).abs()
    residual = torch.zeros(512, 256, device=device)
    keep = predict_keep(x, 0.1)
    out = drop_path_add(x, residual, 0.1, training=True)
    ratio = out[keep].double().sum() / x[keep].double().sum()
    assert ratio.item() == pytest.approx(1 / 0.9, rel=1e-6)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_the_product_is_not_rounded_before_the_sum(device, dtype):
    """(1 + eps)^2 - (1 + 2 eps) is eps^2; rounded to half precision the product is 1 + 2 eps, and nothing is left."""
    eps = torch.finfo(dtype).eps
    gamma = torch.full((8,), 1 + eps, dtype=dtype, device=device)
    x = gamma.repeat(4, 1)
    residual = torch.full((4, 8), -(1 + 2 * eps), dtype=dtype, device=device)
    assert not (residual + gamma * x).any()
    assert_same_bits(drop_path_add(x, residual, gamma=gamma), torch.full_like(x, eps**2))


# --- the gradient of gamma ---


def _gamma_gradient(x, residual, gamma, grad, drop_prob):
    gamma = gamma.detach().requires_grad_()
    out = drop_path_add(x, residual, drop_prob, training=True, gamma=gamma)
    return torch.autograd.grad(out, gamma, grad)[0]


GAMMA_DIMS = {"last": (24, 41, 67), "channels": (24, 33, 10, 10), "channels_last": (24, 33, 10, 10)}


def _gamma_case(where, dtypes, device):
    shape = GAMMA_DIMS[where]
    x, residual, gamma = add_inputs(shape, dtypes, device, None if where == "last" else (shape[1], 1, 1))
    if where == "channels_last":
        x, residual = (t.to(memory_format=torch.channels_last) for t in (x, residual))
    grad = torch.empty_like(x, dtype=add_dtype(x, residual, gamma)).copy_(random_tensor(shape, device=device, seed=3))
    return x, residual, gamma, grad


@pytest.mark.parametrize("dtypes", ADD_GAMMA_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("where", GAMMA_DIMS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gamma_gradient_is_reproducible(device, dtypes, where, threads):
    """Bit for bit, 20 times: the order of the additions does not depend on who comes first."""
    x, residual, gamma, grad = _gamma_case(where, dtypes, device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for _ in range(20):
            torch.manual_seed(5)
            results.append(_gamma_gradient(x, residual, gamma, grad, 0.3))
    finally:
        torch.set_num_threads(before)
    assert results[0].abs().min() > 0
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtypes", [t for t in ADD_GAMMA_DTYPES if t[0] is not torch.float16], ids=dtypes_id)
@pytest.mark.parametrize("drop_prob", [0.0, 0.1])
@pytest.mark.parametrize("sign", ["positive", "both"])
def test_gamma_gradient_of_a_vision_transformer(device, dtypes, drop_prob, sign):
    """12,608 terms for each entry: the sum is right to 1e-5 before it is rounded to gamma's dtype."""
    shape = (64, 197, 384)
    x, residual, gamma = (
        torch.empty(size, dtype=dtype, device=device) for size, dtype in zip((shape, shape, 384), dtypes, strict=True)
    )
    grad = torch.empty(shape, dtype=add_dtype(x[:1], residual[:1], gamma), device=device)
    for seed, tensor in enumerate((x, residual, gamma, grad)):
        tensor.normal_(generator=seeded(device, seed))
    if sign == "positive":
        x.abs_()
        grad.abs_()
    keep = predict_keep(x, drop_prob) if drop_prob else torch.ones(64, dtype=torch.bool, device=device)
    actual = _gamma_gradient(x, residual, gamma, grad, drop_prob)
    terms = (grad[keep].double() * x[keep].double()).flatten(0, 1).div_(1 - drop_prob)
    exact = terms.sum(0)
    # What random rounding errors amount to: relative to the sum, or to its standard deviation where it may be zero.
    size = exact if sign == "positive" else terms.square_().sum(0).sqrt_()
    bound = size * (1e-12 if dtypes[0] is torch.float64 else 1e-5) + exact.abs() * torch.finfo(dtypes[2]).eps / 2
    assert ((actual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtypes", [t for t in ADD_GAMMA_DTYPES if t[0] in HALF_DTYPES], ids=dtypes_id)
@pytest.mark.parametrize("layout", ["last", "channels", "channels_last"])
def test_gamma_gradient_accumulates_in_float32(device, dtypes, layout):
    """Sixteen thousand ones: bfloat16 would count to 256 and float16 to 2048."""
    if layout == "last":
        x = torch.ones(1024, 16, 5, dtype=dtypes[0], device=device)
        gamma = torch.ones(5, dtype=dtypes[2], device=device)
    else:
        x = torch.ones(1024, 5, 4, 4, dtype=dtypes[0], device=device)
        x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
        gamma = torch.ones(5, 1, 1, dtype=dtypes[2], device=device)
    residual = torch.ones_like(x, dtype=dtypes[1])
    grad = torch.ones_like(x, dtype=add_dtype(x, residual, gamma))
    actual = _gamma_gradient(x, residual, gamma, grad, 0.0)
    assert_same_bits(actual, torch.full_like(gamma, 2.0**14))


def test_gamma_gradient_accumulates_float64_in_float64(device):
    x = torch.full((4096, 3), 1 + 2.0**-40, dtype=torch.float64, device=device)
    gamma = torch.ones(3, dtype=torch.float64, device=device)
    actual = _gamma_gradient(x, torch.zeros_like(x), gamma, torch.ones_like(x), 0.0)
    assert_same_bits(actual, torch.full_like(gamma, 4096 * (1 + 2.0**-40)))


# --- the gradient of the residual ---


@needs_native
@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("drop_prob", [0.0, 0.5, 1.0])
def test_gradient_of_the_residual_is_the_incoming_one(device, dtypes, drop_prob):
    """The same memory, unless its dtype has to change."""
    inputs = [t.requires_grad_() for t in add_inputs((8, 3, 5), dtypes, device) if t is not None]
    out = drop_path_add(*inputs[:2], drop_prob, training=True, gamma=inputs[2] if len(inputs) == 3 else None)
    grad = random_tensor(out.shape, out.dtype, device, seed=3)
    grad_residual = torch.autograd.grad(out, inputs, grad)[1]
    assert_same_bits(grad_residual, grad.to(dtypes[1]))
    assert (grad_residual.data_ptr() == grad.data_ptr()) == (out.dtype == dtypes[1])


def test_gradient_of_the_residual_keeps_its_layout(device):
    """An expanded gradient, as sum() sends it, is not spread out in memory."""
    x, residual, gamma = (t.requires_grad_() for t in add_inputs((8, 3, 5), FLOATS, device))
    out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    grad = torch.ones((), device=device).expand(8, 3, 5)
    _, grad_residual, _ = torch.autograd.grad(out, (x, residual, gamma), grad)
    assert (grad_residual.data_ptr(), grad_residual.stride()) == (grad.data_ptr(), (0, 0, 0))


# --- what is computed ---


class _Calls(TorchDispatchMode):
    """Records the operations that run."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        return function(*args, **(kwargs or {}))

    def output_masks(self):
        op = torch.ops.droppath_ext.add_kept_backward.default
        return [tuple(args[6]) for function, args in self.calls if function is op]


SUBSETS = [("x",), ("residual",), ("gamma",), ("x", "residual"), ("x", "gamma"), ("residual", "gamma")]
SUBSETS += [("x", "residual", "gamma")]
SUBSETS_WITHOUT_GAMMA = [subset for subset in SUBSETS if "gamma" not in subset]


@needs_native
@pytest.mark.parametrize("asked", SUBSETS, ids="-".join)
@pytest.mark.parametrize("requiring", ["all", "asked"])
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
def test_backward_computes_what_is_asked_for(device, asked, requiring, drop_prob):
    tensors = dict(zip(("x", "residual", "gamma"), add_inputs((6, 3), FLOATS, device), strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(requiring == "all" or name in asked)
    out = drop_path_add(tensors["x"], tensors["residual"], drop_prob, training=True, gamma=tensors["gamma"])
    with _Calls() as calls:
        grads = torch.autograd.grad(out, [tensors[name] for name in asked], torch.ones_like(out))
    assert len(grads) == len(asked)
    assert calls.output_masks() == ([] if asked == ("residual",) else [("x" in asked, "gamma" in asked)])


def _names_of_ops(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    return result, [event.name for event in profile.events()]


@needs_native
@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
def test_one_op_each_way(device, with_gamma, drop_prob):
    """What the profiler sees of an eager call: one native op forward, one backward, and none of the composite's.

    A plain addition, with neither a mask nor gamma, need not compute any gradient.
    """
    dtypes = FLOATS if with_gamma else (*FLOATS[:2], None)
    inputs = [t.requires_grad_() for t in add_inputs((6, 3), dtypes, device) if t is not None]
    grad = torch.ones(6, 3, device=device)
    gamma = inputs[2] if with_gamma else None
    out, forward = _names_of_ops(lambda: drop_path_add(*inputs[:2], drop_prob, training=True, gamma=gamma))
    _, backward = _names_of_ops(lambda: torch.autograd.grad(out, inputs, grad))
    native = [name for name in backward if name.startswith("droppath_ext::") and name.endswith("_backward")]
    assert forward.count("droppath_ext::drop_path_add") == 1
    assert len(native) == 1 if with_gamma or drop_prob else len(native) <= 1
    composite = {"aten::mul", "aten::add", "aten::where", "aten::sum", "aten::bernoulli_", "aten::copy_", "aten::clone"}
    assert not composite & {*forward, *backward}


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sequence_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "samples_innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@needs_native
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_at_most_one_copy(device, x_layout, residual_layout, grad_layout):
    """Tensors that lie in memory alike are read in place; one that does not may be copied once."""
    x, residual, gamma = add_inputs((4, 3, 5, 2), FLOATS, device, (3, 1, 1))
    x, residual = LAYOUTS[x_layout](x).requires_grad_(), LAYOUTS[residual_layout](residual)
    gamma.requires_grad_()
    grad = LAYOUTS[grad_layout](random_tensor((4, 3, 5, 2), device=device, seed=3))
    out, forward = _names_of_ops(lambda: drop_path_add(x, residual, 0.5, training=True, gamma=gamma))
    _, backward = _names_of_ops(lambda: torch.autograd.grad(out, (x, gamma), grad))
    assert "droppath_ext::drop_path_add" in forward
    assert "droppath_ext::add_kept_backward" in backward
    assert out.stride() == x.stride()
    assert forward.count("aten::copy_") <= (x_layout != residual_layout)
    assert backward.count("aten::copy_") <= (x_layout != grad_layout)


# --- what autograd keeps alive ---


def _kept_for_backward(function, *tensors):
    """Which of the tensors (by place) a graph keeps, and how many bytes besides."""
    storages = saved_storages(function)
    places = {i for i, t in enumerate(tensors) if storages.pop(t.untyped_storage().data_ptr(), None) is not None}
    return places, sum(storages.values())


@pytest.mark.parametrize("dtypes", ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
@pytest.mark.parametrize("requiring", SUBSETS_WITHOUT_GAMMA, ids="-".join)
@pytest.mark.parametrize("path", ["fused", "composite"])
def test_without_gamma_only_the_mask_is_saved(device, dtypes, mode, drop_prob, requiring, path):
    x, residual, _ = add_inputs((6, 500), dtypes, device)
    x.requires_grad_("x" in requiring)
    residual.requires_grad_("residual" in requiring)

    def function():
        if path == "fused":
            return drop_path_add(x, residual, drop_prob, training=True, mode=mode)
        return reference.drop_path_add(x, residual, drop_prob, True, None, mode, None)

    places, more = _kept_for_backward(function, x, residual)
    mask = 0 if drop_prob == 0 else 6 if mode == "row" else 1
    assert not places
    assert more == mask if "x" in requiring else more <= mask


@needs_native
@pytest.mark.parametrize("dtypes", ADD_GAMMA_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
@pytest.mark.parametrize("requiring", SUBSETS, ids="-".join)
def test_with_gamma_no_more_is_saved_than_needed(device, dtypes, mode, drop_prob, requiring):
    """x where gamma wants a gradient, gamma where x does (or itself, whose shape is needed), and the mask."""
    tensors = dict(zip(("x", "residual", "gamma"), add_inputs((6, 500), dtypes, device), strict=True))
    for name in requiring:
        tensors[name].requires_grad_()
    x, residual, gamma = tensors.values()
    places, more = _kept_for_backward(
        lambda: drop_path_add(x, residual, drop_prob, training=True, gamma=gamma, mode=mode), x, residual, gamma
    )
    mask = 0 if drop_prob == 0 else 6 if mode == "row" else 1
    assert 1 not in places
    assert (0 in places) == ("gamma" in requiring)
    if "x" in requiring:
        assert 2 in places
    elif "gamma" not in requiring:
        assert 2 not in places
    assert more == mask if {"x", "gamma"} & set(requiring) else more <= mask


@pytest.mark.parametrize("dtypes", ADD_GAMMA_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("requiring", SUBSETS, ids="-".join)
def test_composite_saves_activations_for_gamma_only(device, dtypes, requiring):
    tensors = dict(zip(("x", "residual", "gamma"), add_inputs((6, 500), dtypes, device), strict=True))
    for name in requiring:
        tensors[name].requires_grad_()
    x, residual, gamma = tensors.values()
    places, more = _kept_for_backward(
        lambda: reference.drop_path_add(x, residual, 0.5, True, gamma, "row", None), gamma
    )
    of_gamma = 0 if 0 in places else 500 * 8
    of_x = 3000 * (8 if torch.float64 in dtypes else 4) if "gamma" in requiring else 0
    assert more <= of_x + of_gamma + 2 * 6
