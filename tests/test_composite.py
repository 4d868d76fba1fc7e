"""Promise: one contract on two paths; one predicate says which path a tensor takes."""

import subprocess
import sys
import warnings

import pytest
import torch
from conftest import (
    DTYPES,
    HAS_CUDA,
    assert_positive_zero,
    assert_same_bits,
    formula,
    kept_samples,
    random_tensor,
    seeded,
    uses_fused_path,
)
from test_layouts import LAYOUTS
from torch.autograd import forward_ad

from droppath_ext import DropPath, drop_path, reference


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
    assert any("droppath_ext::drop_path_backward" in name for name in names)
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
