"""Promise: one contract on two paths; one predicate says which path a tensor takes."""

import copy
import subprocess
import sys
import warnings
from itertools import product

import pytest
import torch
from conftest import (
    ALL_ADD_DTYPES,
    DTYPES,
    FUSED_ADD_DTYPES,
    HAS_CUDA,
    SAMPLINGS,
    add_dtype,
    add_inputs,
    added_samples,
    assert_positive_zero,
    assert_rounded_once,
    assert_same_bits,
    case_id,
    dtypes_id,
    exact_add,
    fixed_count,
    formula,
    needs_native,
    pairwise,
    random_tensor,
    seeded,
    uses_fused_path,
    zero_dropped,
)
from op_cases import ADD, ADD_GAMMA, BATCH_MODE_OPS, DROP_PATH, DROP_PATH_OPS, OPS, SKIP_FIXED, SKIP_OPS
from test_layouts import LAYOUTS, inputs_like
from torch.autograd import forward_ad

from droppath_ext import (
    DropPath,
    DropPathAdd,
    StochasticDepth,
    drop_path,
    drop_path_add,
    reference,
    stochastic_depth,
)


class Tagged(torch.Tensor):
    """A minimal subclass: torch functions on it must run and return it."""


FLOATS = (torch.float32,) * 3
OTHER_ADD_DTYPES = [dtypes for dtypes in ALL_ADD_DTYPES if dtypes not in FUSED_ADD_DTYPES]
# "bernoulli" keeps as many samples as it happens to: what traces shapes alone has no number for them.
OPS_OF_KNOWN_SHAPES = (*DROP_PATH_OPS, SKIP_FIXED)


def _composite(op, inputs, drop_prob=0.5, scale_by_keep=True, generator=None):
    """The op, by the composite whatever the inputs are."""
    mode = op.options.get("mode", "row")
    x, *others = inputs
    if not others:
        return reference.drop_path(x, drop_prob, scale_by_keep, mode, generator)
    residual, *gamma = others
    return reference.drop_path_add(x, residual, drop_prob, scale_by_keep, gamma[0] if gamma else None, mode, generator)


def _composite_dtypes(op, x_dtypes=DTYPES):
    """Every mixture that the composite serves, with these dtypes of x."""
    if op.inputs == ("x",):
        return [(dtype, None, None) for dtype in x_dtypes]
    return [dtypes for dtypes in ALL_ADD_DTYPES if dtypes[0] in x_dtypes and (dtypes[2] is not None) == op.has_gamma]


def _plain(tensor):
    return tensor.detach().as_subclass(torch.Tensor)


def _ops_of(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    return result, {event.name for event in profile.events()}


def _call_with_plain_branch(op, inputs, drop_prob=0.5, training=True):
    """The op; for stochastic_depth around a branch that calls none of the ops that the composite does."""
    if op not in SKIP_OPS:
        return op(inputs, drop_prob, training)
    x, gamma = inputs
    return stochastic_depth(x, torch.neg, drop_prob, training, gamma=gamma, **op.options)


# --- routing ---


def test_plain_tensors_take_the_fused_path(device):
    for dtype in DTYPES:
        x = random_tensor((4, 3), dtype, device)
        assert uses_fused_path(x)
        assert uses_fused_path(x.t())
        assert uses_fused_path(x.requires_grad_())
        assert uses_fused_path(x * 2)
        with torch.no_grad():
            assert uses_fused_path(x)


# The native ops that the profiler sees of an eager call, forward and backward.
NATIVE = {
    DROP_PATH: ({"drop_path"}, {"scale_kept"}),
    **dict.fromkeys((ADD, ADD_GAMMA), ({"drop_path_add"}, {"add_kept_backward"})),
    **dict.fromkeys(SKIP_OPS, ({"scale_kept", "add_kept"}, {"add_kept_backward"})),
}
OF_THE_COMPOSITE = {"aten::where", "aten::index_select", "aten::masked_fill", "aten::randperm", "aten::bernoulli_"}
OF_THE_COMPOSITE |= {"aten::mul", "aten::add"}


@needs_native
@pytest.mark.parametrize(
    ("op", "with_gamma"), [*((op, op.has_gamma) for op in DROP_PATH_OPS), *product(SKIP_OPS, [False, True])]
)
def test_the_fused_path_is_taken(device, op, with_gamma):
    """One pass, for stochastic_depth one in front of the branch and one behind it, each way, and no other operation."""
    inputs = [t.requires_grad_() for t in op.make((8, 3), FLOATS, device)]
    if op in SKIP_OPS:
        inputs = [inputs[0], inputs[1] if with_gamma else None]
    out, forward = _ops_of(lambda: _call_with_plain_branch(op, inputs))
    leaves = [t for t in inputs if t is not None]
    grad = torch.ones_like(out)
    _, backward = _ops_of(lambda: torch.autograd.grad(out, leaves, grad))
    expected_forward, expected_backward = NATIVE[op]
    assert {f"droppath_ext::{name}" for name in expected_forward} <= forward
    assert {f"droppath_ext::{name}" for name in expected_backward} <= backward
    assert not OF_THE_COMPOSITE & (forward | backward)


@needs_native
@pytest.mark.parametrize(("op", "with_gamma"), [(ADD, False), (ADD_GAMMA, True), *((op, True) for op in SKIP_OPS)])
@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False)])
def test_the_fused_path_is_taken_in_eval(device, op, with_gamma, drop_prob, training):
    """One native op, behind the branch, and nothing before it."""
    inputs = op.make((8, 3), FLOATS, device)
    inputs = inputs[:2] if op in SKIP_OPS else inputs
    _, names = _ops_of(lambda: _call_with_plain_branch(op, inputs, drop_prob, training))
    native = "droppath_ext::add_kept" if op in SKIP_OPS else "droppath_ext::drop_path_add"
    assert {name for name in names if name.startswith("droppath_ext::")} == {native}
    assert not OF_THE_COMPOSITE & names


@needs_native
def test_other_tensors_take_the_composite_path():
    x = random_tensor((4, 3))
    assert not uses_fused_path(x.as_subclass(Tagged))
    assert not uses_fused_path(x.to("meta"))
    with forward_ad.dual_level():
        assert not uses_fused_path(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
def test_transforms_take_the_composite_path(transform):
    seen = []

    def probe(t):
        seen.append(uses_fused_path(t))
        return t.sum()

    x = random_tensor((4, 3))
    if transform == "jvp":
        torch.func.jvp(probe, (x,), (x,))
    else:
        getattr(torch.func, transform)(probe)(x)
    assert seen == [False]


@pytest.mark.parametrize("op", OPS_OF_KNOWN_SHAPES)
def test_compiled_graphs_hold_the_composite(op):
    """Inductor fuses ATen ops into their neighbours; an opaque op it could not."""
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    inputs = op.make((64, 3), FLOATS)
    out = torch.compile(lambda *inputs: op(inputs), backend=backend, fullgraph=True)(*inputs)
    op.assert_output(out, inputs, op.keep(out, inputs), 2.0)
    assert targets
    assert not any("droppath_ext" in target for target in targets)


@pytest.mark.skipif(
    HAS_CUDA or not torch.cuda.is_available(), reason="needs a GPU and an extension that was built without CUDA"
)
@pytest.mark.parametrize(
    ("op", "call"), [(DROP_PATH, "d.drop_path(x, 0.5, True)"), (ADD_GAMMA, "d.drop_path_add(x, x, 0.5, True)")]
)
def test_build_without_cuda_warns_once_and_still_works(op, call):
    code = f"import torch, droppath_ext as d; x = torch.ones(9, device='cuda'); [{call} for _ in '123']"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stderr.count("without CUDA") == 1, "one warning per process"
    inputs = op.make((64, 3), FLOATS, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = op(inputs)
    op.assert_output(out, inputs, op.keep(out, inputs), 2.0)


# --- what takes the composite gets the right answer ---


@pytest.mark.parametrize(("op", "which"), [(op, name) for op in (*OPS, *BATCH_MODE_OPS) for name in op.inputs])
def test_one_subclass(device, op, which):
    """A subclass anywhere among the inputs, or what a branch returns, is honoured: its torch functions run."""
    inputs = [t.requires_grad_() for t in op.make((40, 3), FLOATS, device)]
    mixed = [
        t.detach().as_subclass(Tagged).requires_grad_() if name == which else t
        for name, t in zip(op.inputs, inputs, strict=True)
    ]
    for drop_prob in (0.5, 0.5, 0.5, 0.0, 1.0):  # "batch" draws once a call: a few calls see both outcomes
        out, names = _ops_of(lambda drop_prob=drop_prob: op(mixed, drop_prob))
        assert type(out) is Tagged
        # The mask is drawn as for any other tensor, without a look at the subclass.
        assert op in SKIP_OPS or {name for name in names if "droppath_ext" in name} <= {"droppath_ext::drop_path"}
        assert op in SKIP_OPS or drop_prob == 0.0 or "aten::where" in names
        keep = op.keep(_plain(out), inputs)
        assert drop_prob == 0.5 or keep.all() == (drop_prob == 0.0)
        scale = op.scale(40, drop_prob)
        op.assert_output(_plain(out), inputs, keep, scale)
        grads = torch.autograd.grad(out.sum(), mixed)
        expected_grads = torch.autograd.grad(op.formula(inputs, keep, scale).sum(), inputs)
        for name, actual, expected in zip(op.inputs, grads, expected_grads, strict=True):
            (assert_same_bits if name == "residual" else op.assert_near)(_plain(actual), expected)


@pytest.mark.parametrize("op", [*DROP_PATH_OPS, *BATCH_MODE_OPS])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_meta_device(op, layout):
    make = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    }[layout]
    for dtypes, drop_prob in product(op.dtypes, (0.0, 0.5)):
        x, *others = op.make((4, 3, 6, 5), dtypes, gamma_shape=(3, 1, 1))
        inputs = [make(x).to("meta"), *(t.to("meta") for t in others)]
        out = op(inputs, drop_prob)
        assert (out.device.type, out.shape) == ("meta", x.shape)
        assert out.dtype == (add_dtype(*inputs) if others else x.dtype)
        assert out.stride() == inputs[0].stride()


def test_meta_device_of_a_view_with_gaps():
    x = random_tensor((4, 3, 6, 5), torch.bfloat16).to("meta")[:, :, ::2]
    for mode in ("row", "batch"):
        assert drop_path(x, 0.5, training=True, mode=mode).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("op", OPS_OF_KNOWN_SHAPES)
def test_fake_tensors(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = op.make((8, 4, 2, 2), (torch.float16, torch.float32, torch.float32), gamma_shape=(4, 1, 1))
    with FakeTensorMode():
        x, *others = (torch.empty(t.shape, dtype=t.dtype) for t in real)
        inputs = [t.requires_grad_() for t in (x.to(memory_format=torch.channels_last), *others)]
        out = op(inputs)
        out.sum().backward()
        assert (out.shape, out.dtype) == (x.shape, torch.float32 if others else torch.float16)
        assert op in SKIP_OPS or out.stride() == inputs[0].stride()
        for tensor in inputs:
            assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("op", [*DROP_PATH_OPS, *BATCH_MODE_OPS])
def test_jagged_nested_tensors(device, op):
    """Sequences of different lengths: dim 0 is still the sample."""
    lengths = [1 + i % 5 for i in range(40)]
    parts = [random_tensor((n, 3), device=device, seed=i) for i, n in enumerate(lengths)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    named = {"x": x, "residual": x * -0.7, "gamma": random_tensor((3,), device=device, seed=99)}
    leaves = [named[name].detach().requires_grad_() for name in op.inputs]
    weight = named["gamma"] if op.has_gamma else torch.ones(3, device=device)
    shares = set()
    for _ in range(6):
        out = op(leaves)
        assert out.is_nested
        keep = []
        for part, row in zip(parts, out.detach().unbind(), strict=True):
            dropped = part * -0.7 if "residual" in op.inputs else torch.zeros_like(part)
            keep.append(not torch.equal(row, dropped))
            op.assert_near(row, dropped + 2 * weight * part if keep[-1] else dropped)
        shares.add(sum(keep) / 40)
        grads = dict(zip(op.inputs, torch.autograd.grad(out.values().sum(), leaves), strict=True))
        expected = [2.0 * kept * weight.expand(n, 3) for n, kept in zip(lengths, keep, strict=True)]
        op.assert_near(grads["x"].values(), torch.cat(expected))
        if "residual" in grads:
            assert_same_bits(grads["residual"].values(), torch.ones(sum(lengths), 3, device=device))
        if "gamma" in grads:
            rows = [2.0 * kept * part for part, kept in zip(parts, keep, strict=True)]
            torch.testing.assert_close(grads["gamma"], torch.cat(rows).sum(0))
    assert shares == {0.0, 1.0} if op in BATCH_MODE_OPS else all(0.2 < share < 0.8 for share in shares)


# --- the composite itself obeys the table ---


@pytest.mark.parametrize("op", [*DROP_PATH_OPS, *BATCH_MODE_OPS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_composite_formula(device, op, dtype):
    """Forward and backward, for every mixture of dtypes with this one of x."""
    mode = op.options.get("mode", "row")
    for dtypes, scale_by_keep in product(_composite_dtypes(op, [dtype]), [True, False]):
        x, *others = op.make((40, 3, 4, 2), dtypes, device, (3, 1, 1))
        inputs = [t.requires_grad_() for t in (x.to(memory_format=torch.channels_last), *others)]
        named = dict(zip(op.inputs, inputs, strict=True))
        scale = reference.keep_scale(0.3, scale_by_keep)
        for seed in range(4):
            keep = reference.draw_keep_mask(x, 0.3, mode, seeded(device, seed))
            assert keep.dtype == torch.bool
            assert keep.shape == ((40,) if mode == "row" else (1,))
            keep = keep.expand(40)
            out = _composite(op, inputs, 0.3, scale_by_keep, seeded(device, seed))
            assert out.dtype == (add_dtype(*inputs) if others else dtype)
            assert out.stride() == inputs[0].stride()
            op.assert_output(out, inputs, keep, scale)
            assert_same_bits(out[~keep].detach(), op.dropped(inputs)[~keep].detach().to(out.dtype))
            grad = random_tensor(out.shape, out.dtype, device, seed=3)
            grads = dict(zip(op.inputs, torch.autograd.grad(out, inputs, grad), strict=True))
            gamma = named["gamma"].detach().double() if op.has_gamma else 1
            exact = zero_dropped(grad.double() * scale * gamma, keep)
            assert_rounded_once(grads["x"], exact, exact.abs())
            assert_positive_zero(grads["x"][~keep])
            if not others:
                assert_same_bits(grads["x"], reference.apply_keep_mask(grad, keep, scale))
            if "residual" in grads:
                assert_same_bits(grads["residual"], grad.to(dtypes[1]))
            if "gamma" in grads:
                terms = zero_dropped(grad.double() * inputs[0].detach().double() * scale, keep)
                sums, magnitudes = (t.sum((0, 2, 3)).view(3, 1, 1) for t in (terms, terms.abs()))
                assert_rounded_once(grads["gamma"], sums, magnitudes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, -1.0])
def test_composite_drops_to_positive_zero(device, dtype, value):
    x = torch.full((30, 5), value, dtype=dtype, device=device, requires_grad=True)
    keep = reference.draw_keep_mask(x, 0.5, "row", seeded(device, 1))
    assert 0 < keep.sum() < 30
    out = _composite(DROP_PATH, [x], generator=seeded(device, 1))
    (grad,) = torch.autograd.grad(out, x, torch.full_like(x, value))
    for result in (out, grad):
        assert_positive_zero(result[~keep])
        torch.testing.assert_close(result[keep], (x * 2)[keep], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", [*DROP_PATH_OPS, *BATCH_MODE_OPS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_composite_drop_prob_one(device, op, value):
    """What is dropped bit for bit, -0.0 included, whatever x, gamma and the incoming gradient hold."""
    for dtypes, scale_by_keep in product(op.dtypes, [True, False]):
        inputs = op.make((9, 5), dtypes, device)
        for name, tensor in zip(op.inputs, inputs, strict=True):
            if name == "residual":
                tensor[::2] = -0.0
            else:
                tensor.fill_(value)
            tensor.requires_grad_()
        out = _composite(op, inputs, 1.0, scale_by_keep)
        assert_same_bits(out.detach(), op.dropped(inputs).detach().to(out.dtype))
        for name, grad in zip(
            op.inputs, torch.autograd.grad(out, inputs, torch.full_like(out, -float("inf"))), strict=True
        ):
            if name != "residual":
                assert_positive_zero(grad)


@pytest.mark.parametrize("op", DROP_PATH_OPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_composite_never_lets_dropped_samples_through(device, op, value):
    """NaN and Inf there, in x and in the incoming gradient, spoil no other output and no gradient of x or gamma."""
    for dtypes in _composite_dtypes(op):
        inputs = op.make((30, 5), dtypes, device)
        keep = reference.draw_keep_mask(inputs[0], 0.5, "row", seeded(device, 1))
        assert 0 < keep.sum() < 30
        inputs[0][~keep] = value
        inputs = [t.requires_grad_() for t in inputs]
        out = _composite(op, inputs, generator=seeded(device, 1))
        assert out.isfinite().all()
        grad = torch.ones_like(out)
        grad[~keep] = value
        grads = dict(zip(op.inputs, torch.autograd.grad(out, inputs, grad), strict=True))
        assert_positive_zero(grads["x"][~keep])
        grads.pop("residual", None)
        for finite in grads.values():
            assert finite.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 5), (7,), (0,), (70_001, 1)])
def test_composite_shapes(device, shape):
    x = random_tensor(shape, device=device)
    keep = reference.draw_keep_mask(x, 0.5, "row", seeded(device, 1))
    assert keep.shape == shape[:1]
    assert_same_bits(_composite(DROP_PATH, [x], generator=seeded(device, 1)), reference.apply_keep_mask(x, keep, 2.0))


@pytest.mark.parametrize("op", [DROP_PATH, ADD_GAMMA])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_composite_layouts(device, op, layout):
    x = LAYOUTS[layout](device, torch.float32)
    inputs = [t for t in inputs_like(op, x, FLOATS) if t is not None]
    keep = reference.draw_keep_mask(x, 0.5, "row", seeded(device, 1))
    out = _composite(op, inputs, generator=seeded(device, 1))
    op.assert_output(out, inputs, keep, 2.0)
    if op is DROP_PATH:
        assert torch.equal(out.double(), formula(x, keep, 0.5))
    # Where no element can show it, and of a sum over a tensor with gaps, strides are the last operation's own choice.
    like = torch.empty_like(x).stride()
    if x.numel() and (op is DROP_PATH or like == x.stride()):
        strides = zip(x.shape, out.stride(), like, strict=True)
        assert all(actual == expected for size, actual, expected in strides if size > 1)


@pytest.mark.parametrize(
    ("op", "requiring", "drop_prob"),
    [
        (DROP_PATH, "x", 0.5),
        *((ADD_GAMMA, *case) for case in product(["x", "r", "g", "xr", "xg", "rg", "xrg"], [0.0, 0.5])),
    ],
)
def test_composite_gradcheck(device, op, requiring, drop_prob):
    """Whichever of the inputs, named by their first letters, require a gradient."""
    tensors = op.make((5, 3), device=device)
    inputs = [t.requires_grad_(name[0] in requiring) for name, t in zip(op.inputs, tensors, strict=True)]

    def function(*inputs):
        return _composite(op, inputs, drop_prob, generator=seeded(device, 3))

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_composite_does_not_save_activations_in_half(device):
    """Computing in float32 must not leave a float32 copy of x behind for the backward pass."""
    x = random_tensor((6, 500), torch.bfloat16, device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _composite(DROP_PATH, [x])
    assert sum(t.untyped_storage().nbytes() for t in saved) == 6


@pytest.mark.parametrize(
    "module",
    [
        DropPath(1.0),
        DropPathAdd(1.0, dim=2, init_values=0.5),
        *(StochasticDepth(torch.sin, 1.0, dim=2, init_values=0.5, sampling=sampling) for sampling in SAMPLINGS),
    ],
    ids=["DropPath", "DropPathAdd", *(f"StochasticDepth_{sampling}" for sampling in SAMPLINGS)],
)
def test_module_in_a_subclass_model(device, module):
    """A module call takes the same route as the function."""
    x, residual, _ = add_inputs((3, 2), FLOATS, device)
    arguments = [residual] if isinstance(module, DropPathAdd) else []
    out = copy.deepcopy(module).to(device)(x.as_subclass(Tagged), *arguments)
    assert type(out) is Tagged
    dropped = {DropPath: torch.zeros_like(x), DropPathAdd: residual, StochasticDepth: x}
    assert_same_bits(_plain(out), dropped[type(module)])


# --- drop_path_add: routing ---


@needs_native
@pytest.mark.parametrize("dtypes", ALL_ADD_DTYPES, ids=dtypes_id)
def test_add_route_of_each_mixture_of_dtypes(device, dtypes):
    """The usual mixtures have a kernel; no other does, and no other casts its inputs to one that has."""
    x, residual, gamma = add_inputs((4, 3), dtypes, device)
    _, names = _ops_of(lambda: drop_path_add(x, residual, 0.5, training=True, gamma=gamma))
    assert ("droppath_ext::drop_path_add" in names) == (dtypes in FUSED_ADD_DTYPES)
    assert ("aten::where" in names) == (dtypes not in FUSED_ADD_DTYPES)


@pytest.mark.parametrize("which", ["x", "residual", "gamma"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
def test_add_transforms_take_the_composite_path(device, which, transform):
    """Inside a transform even plain tensors do, and one input that it wraps suffices."""
    tensors = dict(zip(("x", "residual", "gamma"), add_inputs((4, 3), FLOATS, device), strict=True))

    def function(wrapped):
        mixed = tensors | {which: wrapped}
        return drop_path_add(mixed["x"], mixed["residual"], gamma=mixed["gamma"]).sum()

    t = tensors[which]
    runs = {
        "vmap": lambda: torch.func.vmap(function)(t[None]),
        "grad": lambda: torch.func.grad(function)(t),
        "jvp": lambda: torch.func.jvp(function, (t,), (t,)),
        "functionalize": lambda: torch.func.functionalize(function)(t),
    }
    _, names = _ops_of(runs[transform])
    assert "droppath_ext::drop_path_add" not in names
    assert "aten::add" in names


# --- the composite of drop_path_add itself obeys the table ---


@pytest.mark.parametrize("dtypes", OTHER_ADD_DTYPES, ids=dtypes_id)
def test_add_gradcheck_like_gradients_of_other_mixtures(device, dtypes):
    """Gradients come in the dtypes of the inputs, through the public function too."""
    inputs = add_inputs((40, 5), dtypes, device)
    x, residual, gamma = inputs
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    keep = added_samples(out, residual)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for leaf, grad in zip(leaves, grads, strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)
    exact = zero_dropped((2.0 * (torch.ones_like(x) if gamma is None else gamma.expand(40, 5))).double().detach(), keep)
    assert_rounded_once(grads[0], exact, exact.abs())


# --- stochastic_depth: what takes the composite gets the right answer ---


@pytest.mark.parametrize(
    ("dtypes", "sampling", "drop_prob"), pairwise(FUSED_ADD_DTYPES, SAMPLINGS, [0.0, 0.5, 1.0]), ids=case_id
)
def test_skip_meta_device(dtypes, sampling, drop_prob):
    """Shapes without data; "bernoulli" draws on the host all the same."""
    y_dtype, x_dtype, _ = dtypes
    y, x, gamma = add_inputs((8, 3, 4, 4), dtypes, gamma_shape=(3, 1, 1))
    expected = add_dtype(y, x, gamma)
    x = x.to("meta").to(memory_format=torch.channels_last).requires_grad_()
    gamma = None if gamma is None else gamma.to("meta")
    sizes = []

    def branch(rows, mask):
        assert mask.dtype == torch.bool
        assert len(mask) == len(rows)
        sizes.append(len(rows))
        return rows.to(y_dtype)

    mask = torch.ones(8, 1, dtype=torch.bool, device="meta")
    out = stochastic_depth(x, branch, drop_prob, training=True, gamma=gamma, batched=(mask,), sampling=sampling)
    assert (out.device.type, out.shape, out.dtype) == ("meta", x.shape, expected)
    out.sum().backward()
    assert (x.grad.shape, x.grad.dtype) == (x.shape, x_dtype)
    if drop_prob in (0.0, 1.0):
        assert sizes == [8 if drop_prob == 0.0 else 1]
    elif sampling == "fixed":
        assert sizes == [4]


# --- the composite of gather, scatter_add and draw_fixed itself ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_composite_gather(device, dtype):
    """Copies, and zeros where the index is -1."""
    x = random_tensor((8, 3), dtype, device)
    index = torch.tensor([6, -1, 1], device=device)
    inverse = torch.tensor([-1, 2, -1, -1, -1, -1, 0, -1], device=device)
    out = reference.gather(x, index, inverse)
    assert_same_bits(out, torch.stack([x[6], torch.zeros_like(x[0]), x[1]]))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d])
def test_composite_gather_keeps_channels_last(device, memory_format):
    """So that the convolutions of a branch need no copy."""
    shape = (4, 6, 5, 3) if memory_format == torch.channels_last else (4, 6, 2, 5, 3)
    x = random_tensor(shape, device=device).to(memory_format=memory_format).requires_grad_()
    index, inverse = torch.tensor([2, 0], device=device), torch.tensor([1, -1, 0, -1], device=device)
    out = reference.gather(x, index, inverse)
    assert out.is_contiguous(memory_format=memory_format)
    assert_same_bits(out, x[index])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_same_bits(grad, (inverse >= 0).float().view(-1, *[1] * (x.ndim - 1)).expand_as(x))


@pytest.mark.parametrize(
    ("dtypes", "sampling", "value"), pairwise(ALL_ADD_DTYPES, SAMPLINGS, [None, float("inf")]), ids=case_id
)
def test_skip_of_every_mixture_of_dtypes(device, dtypes, sampling, value):
    """Forward and backward, whichever path serves it; infinity in a dropped sample of x stays there."""
    y_dtype, x_dtype, gamma_dtype = dtypes
    weight, x, gamma = add_inputs((20, 5), dtypes, device)
    weight = weight[0].clone().requires_grad_()
    on = seeded(device if sampling == "fixed" else "cpu", 1)
    out = stochastic_depth(x, lambda rows: rows + 1, 0.5, True, sampling=sampling, generator=on)
    keep = added_samples(out, x)
    assert keep.sum() == fixed_count(20, 0.5) or sampling == "bernoulli"
    if value is not None:
        x[~keep] = value
    x.requires_grad_()
    leaves = [x, weight] if gamma is None else [x, weight, gamma.requires_grad_()]
    out = stochastic_depth(
        x,
        lambda rows: rows.to(y_dtype) * weight,
        0.5,
        training=True,
        gamma=gamma,
        sampling=sampling,
        generator=seeded(device if sampling == "fixed" else "cpu", 1),
    )
    y = (x.to(y_dtype) * weight).detach()
    assert out.dtype == add_dtype(y, x.detach(), None if gamma is None else gamma.detach())
    rows = keep.nonzero().flatten()
    everyone = torch.ones(len(rows), dtype=torch.bool, device=device)
    assert_rounded_once(out[rows], *exact_add(y[rows], x[rows], gamma, everyone, 2.0))
    assert_same_bits(out[~keep], x.detach()[~keep].to(out.dtype))
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for leaf, grad in zip(leaves, grads, strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)
        assert grad.isfinite().all()
    assert_same_bits(grads[0][~keep], torch.ones_like(x)[~keep])
