"""Promise: one contract on two paths; one predicate says which path a tensor takes."""

import subprocess
import sys
import warnings

import pytest
import torch
from conftest import (
    ADD_GAMMA_DTYPES,
    ALL_ADD_DTYPES,
    DTYPES,
    FUSED_ADD_DTYPES,
    HAS_CUDA,
    SAMPLINGS,
    add_dtype,
    add_inputs,
    added_samples,
    assert_near,
    assert_positive_zero,
    assert_rounded_once,
    assert_same_bits,
    dtypes_id,
    exact_add,
    fixed_count,
    formula,
    kept_samples,
    random_tensor,
    same_layout,
    seeded,
    skip_formula,
    uses_fused_path,
    zero_dropped,
)
from test_layouts import LAYOUTS
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


def _composite(x, drop_prob=0.5, scale_by_keep=True, mode="row", generator=None):
    return reference.drop_path(x, drop_prob, scale_by_keep, mode, generator)


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


def test_the_fused_path_is_one_op(device):
    """What the profiler sees of an eager call: the native op, and none of the composite's."""
    x = random_tensor((4, 3), device=device).requires_grad_()
    with torch.profiler.profile() as profile:
        drop_path(x, 0.5, training=True).sum().backward()
    names = [event.name for event in profile.events()]
    assert any("droppath_ext::scale_kept" in name for name in names)
    assert not {"aten::where", "aten::mul", "aten::bernoulli_"} & set(names)


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


def test_compiled_graphs_hold_the_composite():
    """Inductor fuses ATen ops into their neighbours; an opaque op it could not."""
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    x = random_tensor((64, 3))
    out = torch.compile(lambda t: drop_path(t, 0.5, True), backend=backend, fullgraph=True)(x)
    assert_same_bits(out, reference.apply_keep_mask(x, kept_samples(out), 2.0))
    assert targets
    assert not any("droppath_ext" in target for target in targets)


@pytest.mark.skipif(
    HAS_CUDA or not torch.cuda.is_available(), reason="needs a GPU and an extension that was built without CUDA"
)
def test_build_without_cuda_warns_once_and_still_works():
    x = random_tensor((64, 3), device="cuda")
    code = (
        "import torch, droppath_ext as d; x = torch.ones(9, device='cuda'); [d.drop_path(x, 0.5, True) for _ in '123']"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stderr.count("without CUDA") == 1, "one warning per process"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = drop_path(x, 0.5, training=True)
    assert_same_bits(out, reference.apply_keep_mask(x, kept_samples(out), 2.0))


# --- what takes the composite gets the right answer ---


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_subclass(device, mode):
    x = random_tensor((40, 3), device=device).as_subclass(Tagged).requires_grad_()
    for _ in range(3):
        out = drop_path(x, 0.5, training=True, mode=mode)
        assert type(out) is Tagged
        plain, keep = out.detach().as_subclass(torch.Tensor), kept_samples(out.as_subclass(torch.Tensor))
        assert_same_bits(plain, reference.apply_keep_mask(x.detach().as_subclass(torch.Tensor), keep, 2.0))
        (grad,) = torch.autograd.grad(out.sum(), x)
        expected = reference.apply_keep_mask(torch.ones(40, 3, device=device), keep, 2.0)
        assert_same_bits(grad.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_meta_device(layout):
    x = random_tensor((4, 3, 6, 5), torch.bfloat16).to("meta")
    x = {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 1),
    }[layout]
    for mode in ("row", "batch"):
        out = drop_path(x, 0.5, training=True, mode=mode)
        assert (out.device.type, out.shape, out.dtype) == ("meta", x.shape, x.dtype)
        assert out.stride() == torch.empty_like(x).stride()


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(8, 4, 2, 2, dtype=torch.float16).to(memory_format=torch.channels_last).requires_grad_()
        out = drop_path(x, 0.5, training=True)
        out.sum().backward()
        assert (out.shape, out.stride(), out.dtype) == (x.shape, x.stride(), x.dtype)
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_jagged_nested_tensor(device, mode):
    """Sequences of different lengths: dim 0 is still the sample."""
    lengths = [1 + i % 5 for i in range(40)]
    parts = [random_tensor((n, 3), device=device, seed=i) for i, n in enumerate(lengths)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).requires_grad_()
    shares = set()
    for _ in range(6):
        out = drop_path(x, 0.5, training=True, mode=mode)
        assert out.is_nested
        keep = []
        for part, row in zip(parts, out.detach().unbind(), strict=True):
            keep.append(bool(row.ne(0).any()))
            assert_same_bits(row, part * 2 if keep[-1] else torch.zeros_like(part))
        shares.add(sum(keep) / 40)
        (grad,) = torch.autograd.grad(out.values().sum(), x)
        expected = torch.cat([torch.full((n, 3), 2.0 * k) for n, k in zip(lengths, keep, strict=True)])
        assert_same_bits(grad.values(), expected.to(device))
    assert shares == {0.0, 1.0} if mode == "batch" else all(0.2 < share < 0.8 for share in shares)


# --- the composite itself obeys the table ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_composite_formula(device, dtype, mode, scale_by_keep):
    x = random_tensor((40, 3, 4, 2), dtype, device).to(memory_format=torch.channels_last).requires_grad_()
    grad = random_tensor((40, 3, 4, 2), dtype, device, seed=1)
    scale = reference.keep_scale(0.3, scale_by_keep)
    for seed in range(4):
        keep = reference.draw_keep_mask(x, 0.3, mode, seeded(device, seed))
        assert keep.dtype == torch.bool
        assert keep.shape == ((40,) if mode == "row" else (1,))
        out = _composite(x, 0.3, scale_by_keep, mode, seeded(device, seed))
        assert_same_bits(out, reference.apply_keep_mask(x, keep, scale))
        assert out.stride() == torch.empty_like(x).stride()
        (grad_x,) = torch.autograd.grad(out, x, grad)
        assert_same_bits(grad_x, reference.apply_keep_mask(grad, keep, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, -1.0])
def test_composite_drops_to_positive_zero(device, dtype, value):
    x = torch.full((30, 5), value, dtype=dtype, device=device, requires_grad=True)
    keep = reference.draw_keep_mask(x, 0.5, "row", seeded(device, 1))
    assert 0 < keep.sum() < 30
    out = _composite(x, generator=seeded(device, 1))
    (grad,) = torch.autograd.grad(out, x, torch.full_like(x, value))
    for result in (out, grad):
        assert_positive_zero(result[~keep])
        torch.testing.assert_close(result[keep], (x * 2)[keep], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_composite_drop_prob_one(device, dtype, scale_by_keep, mode):
    x = torch.full((9, 5), float("nan"), dtype=dtype, device=device, requires_grad=True)
    out = _composite(x, 1.0, scale_by_keep, mode)
    (grad,) = torch.autograd.grad(out, x, torch.full_like(x, -1.0))
    assert_positive_zero(out)
    assert_positive_zero(grad)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 5), (7,), (0,), (70_001, 1)])
def test_composite_shapes(device, shape):
    x = random_tensor(shape, device=device)
    keep = reference.draw_keep_mask(x, 0.5, "row", seeded(device, 1))
    assert keep.shape == shape[:1]
    assert_same_bits(_composite(x, generator=seeded(device, 1)), reference.apply_keep_mask(x, keep, 2.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_composite_layouts(device, layout):
    x = LAYOUTS[layout](device, torch.float32)
    keep = reference.draw_keep_mask(x, 0.5, "row", seeded(device, 1))
    out = _composite(x, generator=seeded(device, 1))
    assert torch.equal(out.double(), formula(x, keep, 0.5))
    if x.numel():  # where no element can show it, strides are torch.where's own choice
        strides = zip(x.shape, out.stride(), torch.empty_like(x).stride(), strict=True)
        assert all(actual == expected for size, actual, expected in strides if size > 1)


def test_composite_gradcheck(device):
    x = random_tensor((5, 3), torch.float64, device).requires_grad_()

    def function(t):
        return _composite(t, generator=seeded(device, 3))

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_composite_does_not_save_activations_in_half(device):
    """Computing in float32 must not leave a float32 copy of x behind for the backward pass."""
    x = random_tensor((6, 500), torch.bfloat16, device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _composite(x)
    assert sum(t.untyped_storage().nbytes() for t in saved) == 6


def test_module_in_a_subclass_model(device):
    """A module call takes the same route as the function."""
    out = DropPath(1.0)(random_tensor((3, 2), device=device).as_subclass(Tagged))
    assert type(out) is Tagged
    assert_positive_zero(out.as_subclass(torch.Tensor))


# --- drop_path_add: routing ---

FLOATS = (torch.float32,) * 3
OTHER_ADD_DTYPES = [dtypes for dtypes in ALL_ADD_DTYPES if dtypes not in FUSED_ADD_DTYPES]


def _ops_of(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    return result, {event.name for event in profile.events()}


@pytest.mark.parametrize("dtypes", ALL_ADD_DTYPES, ids=dtypes_id)
def test_add_route_of_each_mixture_of_dtypes(device, dtypes):
    """The usual mixtures have a kernel; no other does, and no other casts its inputs to one that has."""
    x, residual, gamma = add_inputs((4, 3), dtypes, device)
    _, names = _ops_of(lambda: drop_path_add(x, residual, 0.5, training=True, gamma=gamma))
    assert ("droppath_ext::drop_path_add" in names) == (dtypes in FUSED_ADD_DTYPES)
    assert ("aten::bernoulli_" in names or "aten::bernoulli" in names) == (dtypes not in FUSED_ADD_DTYPES)


@pytest.mark.parametrize("with_gamma", [True, False])
@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False)])
def test_add_takes_the_fused_path_in_eval(device, with_gamma, drop_prob, training):
    x, residual, gamma = add_inputs((4, 3), FLOATS if with_gamma else (*FLOATS[:2], None), device)
    _, names = _ops_of(lambda: drop_path_add(x, residual, drop_prob, training, gamma=gamma))
    assert "droppath_ext::drop_path_add" in names
    assert not {"aten::mul", "aten::add", "aten::where"} & names


@pytest.mark.parametrize("which", ["x", "residual", "gamma"])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_add_with_one_subclass(device, which, mode):
    """A subclass anywhere among the inputs is honoured: its torch functions run, and return it."""
    tensors = dict(zip(("x", "residual", "gamma"), add_inputs((40, 3), FLOATS, device), strict=True))
    for tensor in tensors.values():
        tensor.requires_grad_()
    mixed = tensors | {which: tensors[which].detach().as_subclass(Tagged).requires_grad_()}
    for _ in range(3):
        out, names = _ops_of(
            lambda: drop_path_add(mixed["x"], mixed["residual"], 0.5, True, gamma=mixed["gamma"], mode=mode)
        )
        assert type(out) is Tagged
        assert "droppath_ext::drop_path_add" not in names
        plain = out.detach().as_subclass(torch.Tensor)
        keep = added_samples(plain, tensors["residual"])
        assert_rounded_once(plain, *exact_add(*tensors.values(), keep, 2.0))
        grads = torch.autograd.grad(out.sum(), list(mixed.values()))
        grad_x, grad_residual, grad_gamma = (grad.as_subclass(torch.Tensor) for grad in grads)
        gamma = tensors["gamma"].detach()
        torch.testing.assert_close(grad_x, zero_dropped(2 * gamma.expand(40, 3), keep))
        assert_same_bits(grad_residual, torch.ones(40, 3, device=device))
        torch.testing.assert_close(grad_gamma, zero_dropped(2 * tensors["x"].detach(), keep).sum(0))


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


def test_add_compiled_graphs_hold_the_composite():
    """Inductor fuses ATen ops into their neighbours; an opaque op it could not."""
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    x, residual, gamma = add_inputs((64, 3), FLOATS)
    compiled = torch.compile(
        lambda x, residual, gamma: drop_path_add(x, residual, 0.5, True, gamma=gamma), backend=backend, fullgraph=True
    )
    out = compiled(x, residual, gamma)
    assert_rounded_once(out, *exact_add(x, residual, gamma, added_samples(out, residual), 2.0))
    assert targets
    assert not any("droppath_ext" in target for target in targets)


@pytest.mark.skipif(
    HAS_CUDA or not torch.cuda.is_available(), reason="needs a GPU and an extension that was built without CUDA"
)
def test_add_without_cuda_warns_and_still_works():
    x, residual, gamma = add_inputs((64, 3), FLOATS, "cuda")
    code = (
        "import torch, droppath_ext as d; x = torch.ones(9, device='cuda'); "
        "[d.drop_path_add(x, x, 0.5, True) for _ in '123']"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stderr.count("without CUDA") == 1, "one warning per process"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    assert_rounded_once(out, *exact_add(x, residual, gamma, added_samples(out, residual), 2.0))


# --- drop_path_add: what takes the composite gets the right answer ---


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
def test_add_meta_device(layout, dtypes, drop_prob):
    x, residual, gamma = add_inputs((4, 3, 6, 5), dtypes, gamma_shape=(3, 1, 1))
    make = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    }[layout]
    x, residual = make(x).to("meta"), residual.to("meta")
    gamma = None if gamma is None else gamma.to("meta")
    for mode in ("row", "batch"):
        out = drop_path_add(x, residual, drop_prob, training=True, gamma=gamma, mode=mode)
        assert (out.device.type, out.shape) == ("meta", x.shape)
        assert out.dtype == add_dtype(x, residual, gamma)
        assert out.stride() == x.stride()


def test_add_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(8, 4, 2, 2, dtype=torch.float16).to(memory_format=torch.channels_last).requires_grad_()
        residual = torch.empty(8, 4, 2, 2).requires_grad_()
        gamma = torch.empty(4, 1, 1, requires_grad=True)
        out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
        out.sum().backward()
        assert (out.shape, out.stride(), out.dtype) == (x.shape, x.stride(), torch.float32)
        for tensor in (x, residual, gamma):
            assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("with_gamma", [True, False])
def test_add_jagged_nested_tensors(device, mode, with_gamma):
    """Sequences of different lengths: dim 0 is still the sample."""
    lengths = [1 + i % 5 for i in range(40)]
    parts = [random_tensor((n, 3), device=device, seed=i) for i, n in enumerate(lengths)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).requires_grad_()
    residual = (x.detach() * -0.7).requires_grad_()
    gamma = random_tensor((3,), device=device, seed=99).requires_grad_() if with_gamma else None
    weight = torch.ones(3, device=device) if gamma is None else gamma.detach()
    shares = set()
    for _ in range(6):
        out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma, mode=mode)
        assert out.is_nested
        keep = []
        for part, row in zip(parts, out.detach().unbind(), strict=True):
            keep.append(not torch.equal(row, part * -0.7))
            torch.testing.assert_close(row, part * -0.7 + 2 * keep[-1] * weight * part)
        shares.add(sum(keep) / 40)
        leaves = [x, residual] if gamma is None else [x, residual, gamma]
        grad_x, grad_residual, *grad_gamma = torch.autograd.grad(out.values().sum(), leaves)
        expected = [2.0 * kept * weight.expand(n, 3) for n, kept in zip(lengths, keep, strict=True)]
        torch.testing.assert_close(grad_x.values(), torch.cat(expected))
        assert_same_bits(grad_residual.values(), torch.ones(sum(lengths), 3, device=device))
        for actual in grad_gamma:
            rows = [2.0 * kept * part for part, kept in zip(parts, keep, strict=True)]
            torch.testing.assert_close(actual, torch.cat(rows).sum(0))
    assert shares == {0.0, 1.0} if mode == "batch" else all(0.2 < share < 0.8 for share in shares)


# --- the composite of drop_path_add itself obeys the table ---


def _composite_add(x, residual, gamma, drop_prob=0.5, scale_by_keep=True, mode="row", generator=None):
    return reference.drop_path_add(x, residual, drop_prob, scale_by_keep, gamma, mode, generator)


@pytest.mark.parametrize("dtypes", ALL_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_composite_add_formula(device, dtypes, mode):
    """Forward and backward, for every mixture of dtypes."""
    inputs = add_inputs((40, 3, 4, 2), dtypes, device, (3, 1, 1))
    x, residual, gamma = inputs = (inputs[0].to(memory_format=torch.channels_last), *inputs[1:])
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    for scale_by_keep in (True, False):
        scale = reference.keep_scale(0.3, scale_by_keep)
        for seed in range(3):
            keep = reference.draw_keep_mask(x, 0.3, mode, seeded(device, seed)).expand(40)
            out = _composite_add(*inputs, 0.3, scale_by_keep, mode, seeded(device, seed))
            assert out.dtype == add_dtype(*(t for t in (x.detach(), residual.detach(), gamma)))
            assert out.stride() == x.stride()
            assert_rounded_once(out, *exact_add(x, residual, gamma, keep, scale))
            assert_same_bits(out[~keep].detach(), residual[~keep].detach().to(out.dtype))
            grad = random_tensor(out.shape, out.dtype, device, seed=3)
            grad_x, grad_residual, *grad_gamma = torch.autograd.grad(out, leaves, grad)
            exact = zero_dropped(grad.double() * scale * (1 if gamma is None else gamma.detach().double()), keep)
            assert_rounded_once(grad_x, exact, exact.abs())
            assert_positive_zero(grad_x[~keep])
            assert_same_bits(grad_residual, grad.to(residual.dtype))
            for actual in grad_gamma:
                terms = zero_dropped(grad.double() * x.detach().double() * scale, keep)
                assert_rounded_once(
                    actual, terms.sum((0, 2, 3)).view(3, 1, 1), terms.abs().sum((0, 2, 3)).view(3, 1, 1)
                )


@pytest.mark.parametrize("dtypes", ALL_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_composite_add_never_lets_dropped_samples_through(device, dtypes, value):
    """NaN and Inf there, in x and in the incoming gradient, spoil no other output and no gradient of x or gamma."""
    inputs = add_inputs((30, 5), dtypes, device)
    x, residual, gamma = inputs
    keep = reference.draw_keep_mask(x, 0.5, "row", seeded(device, 1))
    assert 0 < keep.sum() < 30
    x[~keep] = value
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    out = _composite_add(*inputs, generator=seeded(device, 1))
    assert out.isfinite().all()
    grad = torch.ones_like(out)
    grad[~keep] = value
    grad_x, _, *grad_gamma = torch.autograd.grad(out, leaves, grad)
    assert_positive_zero(grad_x[~keep])
    for finite in (grad_x, *grad_gamma):
        assert finite.isfinite().all()


@pytest.mark.parametrize("dtypes", ADD_GAMMA_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_composite_add_drop_prob_one(device, dtypes, value):
    """The residual bit for bit, -0.0 included, whatever x, gamma and the incoming gradient hold."""
    x, residual, gamma = (t.requires_grad_() for t in add_inputs((9, 5), dtypes, device))
    with torch.no_grad():
        residual[::2] = -0.0
        for tensor in (x, gamma):
            tensor.fill_(value)
    for scale_by_keep in (True, False):
        out = _composite_add(x, residual, gamma, 1.0, scale_by_keep)
        assert_same_bits(out.detach(), residual.detach().to(out.dtype))
        grad_x, grad_gamma = torch.autograd.grad(out, (x, gamma), torch.full_like(out, -float("inf")))
        assert_positive_zero(grad_x)
        assert_positive_zero(grad_gamma)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_composite_add_layouts(device, layout):
    x = LAYOUTS[layout](device, torch.float32)
    residual = same_layout(x)
    gamma = None if x.dim() == 1 else random_tensor(x.shape[-1:], device=device, seed=2)
    keep = reference.draw_keep_mask(x, 0.5, "row", seeded(device, 1))
    out = _composite_add(x, residual, gamma, generator=seeded(device, 1))
    assert_rounded_once(out, *exact_add(x, residual, gamma, keep, 2.0))
    if x.numel() and torch.empty_like(x).stride() == x.stride():
        strides = zip(x.shape, out.stride(), x.stride(), strict=True)
        assert all(actual == expected for size, actual, expected in strides if size > 1)


@pytest.mark.parametrize("requiring", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
def test_composite_add_gradcheck(device, requiring, drop_prob):
    tensors = add_inputs((5, 3), (torch.float64,) * 3, device)
    inputs = [t.requires_grad_(bool(r)) for t, r in zip(tensors, requiring, strict=True)]

    def function(x, residual, gamma):
        return _composite_add(x, residual, gamma, drop_prob, generator=seeded(device, 3))

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


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


def test_add_module_in_a_subclass_model(device):
    """A module call takes the same route as the function."""
    x, residual, _ = add_inputs((3, 2), FLOATS, device)
    module = DropPathAdd(1.0, dim=2, init_values=0.5).to(device)
    out = module(x.as_subclass(Tagged), residual)
    assert type(out) is Tagged
    assert_same_bits(out.detach().as_subclass(torch.Tensor), residual)


# --- stochastic_depth: routing ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_skip_takes_the_fused_path(device, sampling, with_gamma):
    """One pass in front of the branch and one behind it, each way, and none of the composite's operations."""
    x, _, gamma = add_inputs((8, 3), FLOATS, device)
    x.requires_grad_()
    leaves = [x]
    if with_gamma:
        leaves.append(gamma.requires_grad_())
    out, forward = _ops_of(
        lambda: stochastic_depth(
            x, torch.neg, 0.5, training=True, gamma=gamma if with_gamma else None, sampling=sampling
        )
    )
    grad = torch.ones_like(out)
    _, backward = _ops_of(lambda: torch.autograd.grad(out, leaves, grad))
    assert {"droppath_ext::scale_kept", "droppath_ext::add_kept"} <= forward
    assert "droppath_ext::add_kept_backward" in backward
    composite = {"aten::where", "aten::index_select", "aten::masked_fill", "aten::randperm", "aten::mul", "aten::add"}
    assert not composite & (forward | backward)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False)])
def test_skip_takes_the_fused_path_in_eval(device, sampling, drop_prob, training):
    """One fused tail behind the branch, and nothing before it."""
    x, _, gamma = add_inputs((8, 3), FLOATS, device)
    _, names = _ops_of(lambda: stochastic_depth(x, torch.neg, drop_prob, training, gamma=gamma, sampling=sampling))
    assert {name for name in names if name.startswith("droppath_ext::")} == {"droppath_ext::add_kept"}
    assert not {"aten::mul", "aten::add", "aten::where", "aten::index_select"} & names


def test_skip_compiled_graphs_hold_the_composite():
    """Inductor fuses ATen ops into their neighbours; an opaque op it could not."""
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    x, _, gamma = add_inputs((64, 3), FLOATS)
    compiled = torch.compile(
        lambda x, gamma: stochastic_depth(x, torch.neg, 0.5, True, gamma=gamma, sampling="fixed"),
        backend=backend,
        fullgraph=True,
    )
    out = compiled(x, gamma)
    assert_near(out, skip_formula(x, -x, added_samples(out, x), 2.0, gamma))
    assert targets
    assert not any("droppath_ext" in target for target in targets)


# --- stochastic_depth: what takes the composite gets the right answer ---


@pytest.mark.parametrize("which", ["x", "branch", "gamma"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drop_prob", [0.0, 0.5, 1.0])
def test_skip_with_one_subclass(device, which, sampling, drop_prob):
    """A subclass among the inputs, or one that the branch returns, is honoured."""
    x, _, gamma = add_inputs((40, 3), FLOATS, device)
    weight = random_tensor((3,), device=device, seed=4)

    def run(x, gamma, weight, wrap):
        return stochastic_depth(
            x, lambda rows: wrap(rows * weight), drop_prob, training=True, gamma=gamma, sampling=sampling
        )

    def tagged(name, tensor):
        return (tensor.as_subclass(Tagged) if which == name else tensor).detach().requires_grad_()

    leaves = [tagged("x", x), tagged("gamma", gamma), tagged("weight", weight)]
    out = run(*leaves, lambda y: y.as_subclass(Tagged) if which == "branch" else y)
    assert type(out) is Tagged
    plain = out.detach().as_subclass(torch.Tensor)
    keep = added_samples(plain, x)
    assert drop_prob == 0.5 or keep.all() == (drop_prob == 0.0)
    plain_leaves = [t.clone().requires_grad_() for t in (x, gamma, weight)]
    scale = 2.0 if drop_prob == 0.5 else 1.0
    expected = skip_formula(plain_leaves[0], plain_leaves[0] * plain_leaves[2], keep, scale, plain_leaves[1])
    assert_near(plain, expected)
    grads = torch.autograd.grad(out.sum(), leaves)
    for actual, other in zip(grads, torch.autograd.grad(expected.sum(), plain_leaves), strict=True):
        assert_near(actual.as_subclass(torch.Tensor), other)


@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drop_prob", [0.0, 0.5, 1.0])
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


def test_skip_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(8, 4, 2, 2, dtype=torch.float16).to(memory_format=torch.channels_last).requires_grad_()
        gamma = torch.empty(4, 1, 1, requires_grad=True)
        out = stochastic_depth(x, torch.sin, 0.5, training=True, gamma=gamma, sampling="fixed")
        out.sum().backward()
        assert (out.shape, out.dtype) == (x.shape, torch.float32)
        for tensor in (x, gamma):
            assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, tensor.dtype)


# --- the composite of gather, scatter_add and draw_fixed itself ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_composite_gather(device, dtype):
    """Copies, and zeros where the index is -1."""
    x = random_tensor((8, 3), dtype, device)
    index = torch.tensor([6, -1, 1], device=device)
    inverse = torch.tensor([-1, 2, -1, -1, -1, -1, 0, -1], device=device)
    out = reference.gather(x, index, inverse)
    assert_same_bits(out, torch.stack([x[6], torch.zeros_like(x[0]), x[1]]))


@pytest.mark.parametrize("dtypes", ALL_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("value", [None, float("inf")])
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


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_module_in_a_subclass_model(device, sampling):
    """A module call takes the same route as the function."""
    x = random_tensor((3, 2), device=device)
    module = StochasticDepth(torch.sin, 1.0, dim=2, init_values=0.5, sampling=sampling).to(device)
    out = module(x.as_subclass(Tagged))
    assert type(out) is Tagged
    assert_same_bits(out.detach().as_subclass(torch.Tensor), x)
