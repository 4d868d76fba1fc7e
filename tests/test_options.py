"""Promise: a mask of the caller's, another sample dimension, a rate on the device, one draw for the batch, one number
as gamma, and what the modules make of them: each is the formula, in all three functions where it applies."""

import copy
from itertools import product

import pytest
import torch
from conftest import (
    DTYPES,
    FUSED_ADD_DTYPES,
    SAMPLINGS,
    add_inputs,
    added_samples,
    assert_same_bits,
    dtypes_id,
    generator_state,
    kept_samples,
    needs_native,
    predict_keep,
    random_tensor,
    seeded,
)
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from droppath_ext import (
    DropPath,
    DropPathAdd,
    StochasticDepth,
    draw_keep,
    drop_path,
    drop_path_add,
    reference,
    stochastic_depth,
)
from droppath_ext._native import _C

SHAPE = (12, 5, 8)


def _mask(device, samples=12):
    return torch.arange(samples, device=device) % 3 != 1


class Mixed(nn.Module):
    """A branch that mixes the tokens of a sample, [B, N, D] or, sample_dim 1, [N, B, D]."""

    def __init__(self, sample_dim=0, features=8):
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.sample_dim = sample_dim
        self.shapes = []

    def forward(self, x, *more):
        self.shapes.append(list(x.shape))
        first = x.transpose(0, self.sample_dim)
        y = scaled_dot_product_attention(first, self.linear(first), first)
        return y.transpose(0, self.sample_dim)


# --- keep= ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("keep_of", ["each", "all", "none"])
def test_drop_path_of_a_given_mask(device, dtype, scale_by_keep, keep_of):
    x = random_tensor(SHAPE, dtype, device).requires_grad_()
    keep = {"each": _mask(device), "all": _mask(device)[:1], "none": ~_mask(device)[:1]}[keep_of]
    before = generator_state(device)
    out = drop_path(x, 0.3, True, scale_by_keep, keep=keep)
    scale = reference.keep_scale(0.3, scale_by_keep)
    assert_same_bits(out, reference.apply_keep_mask(x.detach(), keep, scale))
    grad = random_tensor(SHAPE, dtype, device, seed=1)
    assert_same_bits(torch.autograd.grad(out, x, grad)[0], reference.apply_keep_mask(grad, keep, scale))
    assert torch.equal(generator_state(device), before), "nothing is drawn"
    assert drop_path(x, 0.3, False, keep=keep) is x


def test_a_given_mask_at_rate_zero_drops_all_the_same(device):
    x, keep = torch.ones(12, 3, device=device), _mask(device)
    assert torch.equal(kept_samples(drop_path(x, 0.0, True, keep=keep)), keep)
    assert torch.equal(added_samples(drop_path_add(x, x, 0.0, True, keep=keep), x), keep)
    assert torch.equal(added_samples(stochastic_depth(x, torch.neg, 0.0, True, keep=keep), x), keep)


@pytest.mark.parametrize("dtypes", [*FUSED_ADD_DTYPES, (torch.float64, torch.float32, torch.float32)], ids=dtypes_id)
def test_drop_path_add_of_a_given_mask(device, dtypes):
    """The bits of the call that draws this mask, and its gradients."""
    inputs = [t if t is None else t.requires_grad_() for t in add_inputs(SHAPE, dtypes, device)]
    x, residual, gamma = inputs
    leaves = [t for t in inputs if t is not None]
    keep = draw_keep(x, 0.4, generator=seeded(device, 5))
    drawn = drop_path_add(x, residual, 0.4, True, gamma=gamma, generator=seeded(device, 5))
    given = drop_path_add(x, residual, 0.4, True, gamma=gamma, keep=keep)
    assert_same_bits(given, drawn)
    grad = random_tensor(SHAPE, drawn.dtype, device, seed=3)
    for a, b in zip(torch.autograd.grad(given, leaves, grad), torch.autograd.grad(drawn, leaves, grad), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_stochastic_depth_of_a_given_mask(device, sampling):
    x = random_tensor(SHAPE, device=device).requires_grad_()
    branch, keep = Mixed().to(device), _mask(device)
    out = stochastic_depth(x, branch, 0.25, True, keep=keep, sampling=sampling)
    assert branch.shapes == [[int(keep.sum()), 5, 8]]
    expected = drop_path_add(branch(x), x, 0.25, True, keep=keep)
    torch.testing.assert_close(out, expected)
    leaves = [x, *branch.parameters()]
    grad = random_tensor(SHAPE, device=device, seed=1)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)
    on_host = stochastic_depth(x, branch, 0.25, True, keep=keep.cpu())
    assert torch.equal(on_host, out)
    none = stochastic_depth(x, branch, 0.25, True, keep=torch.zeros(12, dtype=torch.bool, device=device))
    assert torch.equal(none, x)
    assert all(g.eq(0).all() for g in torch.autograd.grad(none.sum(), list(branch.parameters())))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_draw_keep_draws_what_drop_path_draws(device, mode):
    x = torch.ones(40, 3, device=device)
    for drop_prob in (0.0, 0.5, 1.0, torch.tensor(0.5, device=device)):
        keep = draw_keep(x, drop_prob, mode, generator=seeded(device, 7))
        assert (keep.dtype, keep.shape, keep.device) == (torch.bool, (40 if mode == "row" else 1,), x.device)
        out = drop_path(x, drop_prob, True, mode=mode, generator=seeded(device, 7))
        assert torch.equal(kept_samples(out), keep.expand(40))
        assert torch.equal(draw_keep(x.T, drop_prob, mode, dim=1, generator=seeded(device, 7)), keep)


def test_towers_share_a_mask(device):
    """What the argument is for: an image's and a text's branch fall together."""
    image, text = torch.ones(64, 9, device=device), torch.ones(64, 4, device=device)
    keep = draw_keep(image, 0.5)
    dropped = [drop_path(x, 0.5, True, keep=keep) for x in (image, text)]
    assert torch.equal(kept_samples(dropped[0]), kept_samples(dropped[1]))
    assert 0 < int(keep.sum()) < 64


KEEP_ERRORS = {
    "float": (lambda device: torch.ones(12, device=device), TypeError, "keep must be bool, but got float32"),
    "list": (lambda device: [True] * 12, TypeError, "keep must be a Tensor, but got list"),
    "shape": (
        lambda device: torch.ones(5, dtype=torch.bool, device=device),
        ValueError,
        "keep must have an entry for each of the 12 samples, or one, but got",
    ),
    "dims": (
        lambda device: torch.ones(12, 1, dtype=torch.bool, device=device),
        ValueError,
        "keep must have an entry for each of the 12 samples, or one, but got",
    ),
}


def _calls(x, **options):
    yield lambda: drop_path(x, 0.5, True, **options)
    yield lambda: drop_path_add(x, x, 0.5, True, **options)
    yield lambda: stochastic_depth(x, torch.neg, 0.5, True, **options)


@pytest.mark.parametrize("kind", KEEP_ERRORS)
def test_a_bad_mask(device, kind):
    make, error, message = KEEP_ERRORS[kind]
    for call in _calls(torch.ones(12, 3, device=device), keep=make(device)):
        with pytest.raises(error, match=message):
            call()


def test_keep_and_generator_exclude_each_other(device):
    x = torch.ones(12, 3, device=device)
    for call in _calls(x, keep=_mask(device), generator=seeded("cpu")):
        with pytest.raises(ValueError, match="keep and generator exclude each other"):
            call()


def test_a_mask_elsewhere_or_of_another_kind(device):
    x = torch.ones(12, 3, device=device)
    meta = torch.ones(12, dtype=torch.bool, device="meta")
    for call in (lambda **o: drop_path(x, 0.5, True, **o), lambda **o: drop_path_add(x, x, 0.5, True, **o)):
        with pytest.raises(ValueError, match=f"keep must be on {x.device}, where x is, but got meta"):
            call(keep=meta)
        with pytest.raises(TypeError, match="keep must be a dense tensor, but got one of layout torch.sparse_coo"):
            call(keep=torch.ones(12, dtype=torch.bool, device=device).to_sparse())
        with pytest.raises(TypeError, match="generator must be a torch.Generator, but got int"):
            call(generator=3)


@pytest.mark.parametrize("keep", [torch.ones(3, dtype=torch.bool), torch.ones(12), torch.ones(12, 1, dtype=torch.bool)])
def test_scripted_functions_check_the_mask(keep):
    scripted = torch.jit.script(drop_path)
    with pytest.raises(Exception, match="keep must"):
        scripted(torch.ones(12, 3), 0.5, True, keep=keep)


def test_draw_keep_is_traced_and_scripted():
    traced = torch.fx.symbolic_trace(lambda x: drop_path(x, 0.5, True, keep=draw_keep(x, 0.5)))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [draw_keep, drop_path]
    assert traced(torch.ones(64, 2)).ne(0).any()
    assert torch.jit.script(draw_keep)(torch.ones(9, 2), 1.0).tolist() == [False] * 9
    assert draw_keep(torch.ones(9, 2, dtype=torch.int64), 0.0).all()
    with pytest.raises(ValueError, match="x must have at least one dimension"):
        draw_keep(torch.tensor(1.0), 0.5)


# --- dim= ---


@pytest.mark.parametrize("dim", [1, 2, -1, -2])
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_another_sample_dimension(device, dim, is_contiguous):
    """As of the transposed tensors, in the strides of x."""
    shape = (5, 12, 12)
    x, residual = (random_tensor(shape, device=device, seed=seed) for seed in (0, 1))
    if not is_contiguous:
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    torch.manual_seed(3)
    expected = drop_path(x.movedim(dim, 0), 0.5, True).movedim(0, dim)
    torch.manual_seed(3)
    out = drop_path(x, 0.5, True, dim=dim)
    assert_same_bits(out, expected)
    assert out.stride() == x.stride()
    torch.manual_seed(3)
    expected = drop_path_add(x.movedim(dim, 0), residual.movedim(dim, 0), 0.5, True).movedim(0, dim)
    torch.manual_seed(3)
    assert_same_bits(drop_path_add(x, residual, 0.5, True, dim=dim), expected)


@pytest.mark.parametrize("gamma_shape", [(8,), (1, 1, 8), (5, 1, 1), (), (1,)])
def test_gamma_beside_another_sample_dimension(device, gamma_shape):
    x, residual = (random_tensor((5, 12, 8), device=device, seed=seed).requires_grad_() for seed in (0, 1))
    gamma = random_tensor(gamma_shape, device=device, seed=2).requires_grad_()
    keep = _mask(device)
    out = drop_path_add(x, residual, 0.5, True, gamma=gamma, dim=1, keep=keep)
    expected = residual + torch.where(keep[:, None], x * gamma * 2, 0.0)
    torch.testing.assert_close(out, expected)
    leaves, grad = (x, residual, gamma), random_tensor((5, 12, 8), device=device, seed=3)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_gamma_along_the_samples_is_refused_there_too(device):
    x = torch.ones(5, 12, 8, device=device)
    with pytest.raises(ValueError, match="gamma must broadcast along one dim of a sample"):
        drop_path_add(x, x, 0.5, True, gamma=torch.ones(12, 1, device=device), dim=1)


@needs_native
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_of_another_sample_dimension(device, sampling):
    """The branch sees [N, K, D], and so do the tensors beside x."""
    x = random_tensor((5, 12, 8), device=device).requires_grad_()
    branch = Mixed(sample_dim=1).to(device)
    seen = []

    def with_memory(rows, memory, nothing):
        seen.append((list(memory.shape), nothing))
        return branch(rows)

    memory = torch.arange(12, device=device).expand(3, 12)
    torch.manual_seed(2)
    out = stochastic_depth(x, with_memory, 0.5, True, dim=1, batched=(memory, None), sampling=sampling)
    keep = (out != x).any(2).any(0)
    count = int(keep.sum())
    assert branch.shapes == [[5, count, 8]]
    assert seen == [([3, count], None)]
    assert out.stride() == x.stride()
    scale = 12 / count if sampling == "fixed" else 2.0
    expected = x + torch.where(keep[:, None], branch(x) * scale, 0.0)
    torch.testing.assert_close(out, expected)
    leaves, grad = [x, *branch.parameters()], random_tensor((5, 12, 8), device=device, seed=1)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dim", "error"), [(3, ValueError), (-4, ValueError), (0.5, TypeError), (True, TypeError)])
@pytest.mark.parametrize("training", [True, False])
def test_a_bad_dim(device, dim, error, training):
    x = torch.ones(5, 12, 8, device=device)
    for call in (
        lambda: drop_path(x, 0.5, training, dim=dim),
        lambda: drop_path_add(x, x, 0.5, training, dim=dim),
        lambda: stochastic_depth(x, torch.neg, 0.5, training, dim=dim),
    ):
        with pytest.raises(error, match="dim must be"):
            call()


@pytest.mark.parametrize("dim", [1, -2])
def test_a_number_as_gamma_widens_nothing_there(device, dim):
    x = torch.ones(4, 5, dtype=torch.bfloat16, device=device)
    gamma = torch.tensor(0.5, device=device)
    for training in (True, False):
        assert drop_path_add(x, x, 0.5, training, gamma=gamma, dim=dim).dtype is torch.bfloat16
        assert stochastic_depth(x, torch.neg, 0.5, training, gamma=gamma, dim=dim).dtype is torch.bfloat16
    assert torch.jit.script(drop_path_add)(x, x, 0.5, True, gamma=gamma, dim=1).dtype is torch.bfloat16


def test_a_bad_gamma_is_told_in_the_shapes_of_the_call():
    x = torch.ones(2, 3, 5)
    with pytest.raises(ValueError, match=r"but got shape \[7\] for x of shape \[2, 3, 5\]"):
        drop_path_add(x, x, 0.5, True, gamma=torch.ones(7), dim=1)
    with pytest.raises(TypeError, match="gamma must be a Tensor, but got float"):
        drop_path_add(x, x, 0.5, True, gamma=3.0, dim=1)


# --- a tensor as drop_prob ---

RATES = [0.0, 0.4, 1.0, -0.5, 1.5, float("nan"), float("inf")]


def _clamped(rate):
    return min(max(rate, 0.0), 1.0) if rate == rate else 0.0


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_rate_of_a_tensor(device, rate, dtype):
    """Clamped, NaN drops nothing, no gradient; the mask and, but for the last bit, the numbers of a rate in Python."""
    p = torch.tensor(rate, dtype=dtype, device=device)
    number = _clamped(float(p))
    x, residual, gamma = (t.requires_grad_() for t in add_inputs(SHAPE, (torch.float32,) * 3, device))
    for tensors, call in (
        ((x,), lambda p: drop_path(x, p, True)),
        ((x, residual), lambda p: drop_path_add(x, residual, p, True)),
        ((x, residual, gamma), lambda p: drop_path_add(x, residual, p, True, gamma=gamma)),
    ):
        torch.manual_seed(1)
        out = call(p)
        torch.manual_seed(1)
        expected = call(number)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        assert out is not x
        grad = random_tensor(SHAPE, device=device, seed=1)
        for a, b in zip(
            torch.autograd.grad(out, tensors, grad),
            torch.autograd.grad(expected, tensors, grad) if expected is not x else (grad,),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


@needs_native
@pytest.mark.parametrize("rate", RATES)
def test_rate_that_only_the_device_knows(device, rate):
    """The composite path, as compilers meet it, and the op that the kernels' path starts with."""
    p = torch.tensor(rate, device=device)
    number = _clamped(rate)
    x = random_tensor((4000, 2), device=device)
    out = reference.drop_path(x, p, True, "row", None)
    keep = kept_samples(out)
    assert abs(float(keep.float().mean()) - (1 - number)) < 0.05
    scale = 1 / (1 - number) if number < 1 else 1.0
    torch.testing.assert_close(out, torch.where(keep[:, None], x * scale, 0.0))
    keep, factor = torch.ops.droppath_ext.draw_keep(x, p, True, True)
    assert abs(float(keep.float().mean()) - (1 - number)) < 0.05
    assert abs(float(factor) - scale) < 1e-6
    assert torch.ops.droppath_ext.draw_keep(x, p, False, False)[1].eq(1.0)
    half = torch.tensor(0.5, device=device)
    torch.manual_seed(4)
    keep, _ = torch.ops.droppath_ext.draw_keep(x, half, True, True)
    torch.manual_seed(4)
    assert torch.equal(keep, predict_keep(x, 0.5))


def test_a_rate_is_as_exact_as_what_it_scales():
    """On every route: float64 in float64."""
    x, p = torch.ones(64, 3, dtype=torch.float64), torch.tensor(0.1)
    torch.manual_seed(3)
    expected = drop_path(x, p, True)
    torch.manual_seed(3)
    out = torch.func.jvp(lambda x: drop_path(x, p, True), (x,), (x,))[0]
    torch.testing.assert_close(out, expected, rtol=1e-15, atol=0)
    half, wide = torch.ones(64, 3, dtype=torch.bfloat16), torch.zeros(64, 3, dtype=torch.float64)
    out = reference.drop_path_add(half, wide, p, True, None, "row", None)
    assert set(out.unique().tolist()) <= {0.0, 1 / (1 - float(p))}


@needs_native
def test_a_factor_is_not_rounded_in_a_differentiable_backward():
    grad = torch.randn(4096, 1).bfloat16()
    x = torch.zeros_like(grad).requires_grad_()
    keep = torch.ones(4096, dtype=torch.bool)
    out = _C.scale_kept(x, keep, 1.0, torch.tensor(1 / 0.9, dtype=torch.float64))
    (expected,) = torch.autograd.grad(out, x, grad, retain_graph=True)
    (actual,) = torch.autograd.grad(out, x, grad.clone().requires_grad_(), create_graph=True)
    assert torch.equal(actual, expected)


def test_a_rate_with_a_gradient_warns_nobody(recwarn):
    drop_path(torch.ones(3, 3), torch.tensor(0.5, requires_grad=True), True)
    assert len(recwarn) == 0


@needs_native
def test_factors_of_the_ops(device):
    """A factor multiplies the scale, in all passes; the derivatives of the ops know it."""
    ops = torch.ops.droppath_ext
    x, residual, gamma = (t.double().requires_grad_() for t in add_inputs(SHAPE, (torch.float64,) * 3, device))
    factor = torch.tensor(1.5, dtype=torch.float64, device=device)
    keep = _mask(device)
    with torch.no_grad():
        assert_same_bits(ops.scale_kept(x, keep, 2.0, factor), ops.scale_kept(x, keep, 3.0))
        assert_same_bits(
            ops.add_kept(x, residual, gamma, keep, 2.0, factor), ops.add_kept(x, residual, gamma, keep, 3.0)
        )
        args = (residual, x, gamma, keep)
        for a, b in zip(
            ops.add_kept_backward(*args, 2.0, torch.float64, [True, True], factor),
            ops.add_kept_backward(*args, 3.0, torch.float64, [True, True]),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(ops.scale_kept(x, keep, 2.0, factor), ops.scale_kept(x, keep, 3.0))
    torch.testing.assert_close(
        ops.add_kept(x, residual, gamma, keep, 2.0, factor), ops.add_kept(x, residual, gamma, keep, 3.0)
    )
    for bad, error in ((factor.float(), TypeError), (factor[None], ValueError)):
        with pytest.raises(error, match="factor must"):
            ops.scale_kept(x.detach(), keep, 2.0, bad)


def test_a_schedule_of_a_buffer_needs_no_new_graph(device):
    x = torch.ones(4000, 2, device=device)
    p = torch.tensor(0.0, device=device)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for of_dropped, function in (
        (0, lambda x, p: drop_path(x, p, True)),
        (1, lambda x, p: drop_path_add(x, x, p, True)),
    ):
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        graphs.clear()
        for rate in (0.0, 0.2, 0.5, 0.9, 1.0):
            p.fill_(rate)
            dropped = compiled(x, p).eq(of_dropped)
            assert abs(float(dropped.float().mean()) - rate) < (0.05 if 0 < rate < 1 else 1e-6)
        assert len(graphs) == 1


def test_modules_of_a_tensor(device):
    for module in (DropPath(torch.tensor(0.25)), DropPathAdd(torch.tensor(0.25), dim=3, init_values=0.1)):
        module = module.to(device)
        assert module.state_dict()["drop_prob"] == 0.25
        assert "drop_prob=0.250" in repr(module.cpu())
        module.to(device).drop_prob.fill_(1.0)
        x = torch.ones(9, 3, device=device)
        out = module(x) if isinstance(module, DropPath) else module(x, x)
        assert out.eq(0 if isinstance(module, DropPath) else 1).all()
        twin = copy.deepcopy(module)
        assert twin.drop_prob is not module.drop_prob
        if isinstance(module, DropPath):
            assert module.eval()(x) is x


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_needs_a_number(sampling):
    x = torch.ones(8, 3)
    assert stochastic_depth(x, torch.neg, torch.tensor(1.0), True, sampling=sampling).eq(1).all()
    assert StochasticDepth(nn.Linear(3, 3), torch.tensor(0.5), sampling=sampling).drop_prob == 0.5
    sentence = "drop_prob of stochastic_depth must be a number, for the host needs it, but got a tensor"
    with pytest.raises(TypeError, match=f"{sentence} on meta"):
        stochastic_depth(x, torch.neg, torch.tensor(0.5, device="meta"), True, sampling=sampling)
    compiled = torch.compile(
        lambda x, p: stochastic_depth(x, torch.neg, p, True, sampling=sampling), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match=sentence):
        compiled(x, torch.tensor(0.5))


def test_a_rate_of_another_device():
    with pytest.raises(ValueError, match="drop_prob must be on cpu, where x is, but got meta"):
        drop_path(torch.ones(3, 3), torch.tensor(0.5, device="meta"), True)


# --- mode="batch" of stochastic_depth ---


@pytest.mark.parametrize("drop_prob", [0.5, 0.0, 1.0])
def test_skip_of_a_whole_batch(device, drop_prob):
    """All or none; a stand-in keeps every gradient there, zero where the batch fell."""
    x = random_tensor(SHAPE, device=device).requires_grad_()
    branch = Mixed().to(device)
    fell = 0
    for _ in range(40):
        branch.shapes.clear()
        out = stochastic_depth(x, branch, drop_prob, True, mode="batch")
        gradients = torch.autograd.grad(out.sum(), [x, *branch.parameters()])
        if torch.equal(out, x):
            fell += 1
            assert branch.shapes == [[1, 5, 8]]
            assert gradients[0].eq(1).all()
            assert all(gradient.eq(0).all() for gradient in gradients[1:])
        else:
            assert branch.shapes == [[12, 5, 8]]
            scale = 1 / (1 - drop_prob)
            torch.testing.assert_close(out, x + scale * branch(x))
            assert all(gradient.ne(0).any() for gradient in gradients)
    assert fell in range(8, 33) if drop_prob == 0.5 else fell == 40 * drop_prob


def test_skip_of_a_whole_batch_has_no_subsets():
    with pytest.raises(ValueError, match='mode must be "row" with sampling="fixed"'):
        stochastic_depth(torch.ones(3, 3), torch.neg, 0.5, True, mode="batch", sampling="fixed")


def test_skip_of_a_whole_batch_compiled(device):
    x = random_tensor((8, 3), device=device)
    compiled = torch.compile(lambda x: stochastic_depth(x, torch.sin, 0.5, True, mode="batch"), backend="eager")
    seen = {torch.equal(compiled(x), x) for _ in range(20)}
    assert seen == {True, False}


# --- gamma of one element ---


@pytest.mark.parametrize("dtypes", [dtypes for dtypes in FUSED_ADD_DTYPES if dtypes[2]], ids=dtypes_id)
@pytest.mark.parametrize(
    ("shape", "gamma_shape"),
    [((6,), ()), ((6,), (1,))]
    + list(product([(6, 5, 8), (6, 40), (3, 7, 9, 11), (1, 64), (0, 4), (4, 0)], [(), (1,), (1, 1)])),
)
def test_one_number_as_gamma(device, dtypes, gamma_shape, shape):
    """ReZero and SkipInit, by one kernel where one dtype decides the result."""
    dtype_x, dtype_residual, dtype_gamma = dtypes
    x, residual = random_tensor(shape, dtype_x, device), random_tensor(shape, dtype_residual, device, seed=1)
    gamma = random_tensor(gamma_shape, dtype_gamma, device, seed=2)
    leaves = [x.requires_grad_(), residual.requires_grad_(), gamma.requires_grad_()]
    keep = _mask(device, shape[0])
    out = drop_path_add(x, residual, 0.5, True, gamma=gamma, keep=keep)
    assert out.dtype == torch.result_type(residual, x * gamma)
    rows = keep.view([-1] + [1] * (len(shape) - 1))
    exact = residual.double() + torch.where(rows, x.double() * gamma.double() * 2, 0.0)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if out.dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if out.dtype == torch.float32 else tolerance
    torch.testing.assert_close(out.double(), exact, **tolerance)
    grad = random_tensor(shape, out.dtype, device, seed=3)
    actual = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(exact, leaves, grad.double())
    for a, b, leaf in zip(actual, expected, leaves, strict=True):
        assert (a.dtype, a.shape) == (leaf.dtype, leaf.shape)
        half = leaf.dtype in (torch.float16, torch.bfloat16)
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-2 if half else 1e-4, atol=2e-2 if half else 1e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_with_one_number(device, sampling):
    x = random_tensor(SHAPE, device=device)
    module = StochasticDepth(Mixed(), 0.5, dim=(), init_values=0.0, sampling=sampling).to(device)
    assert module.gamma.shape == ()
    out = module(x)
    assert torch.equal(out, x)
    (gradient,) = torch.autograd.grad(out.sum(), module.gamma)
    assert gradient != 0


# --- modules ---


@pytest.mark.parametrize("cls", [DropPathAdd, StochasticDepth])
def test_channels_first(device, cls):
    """The parameter is [C], as that of timm's LayerScale2d, and belongs to dim 1."""
    first = (nn.Conv2d(6, 6, 1),) if cls is StochasticDepth else ()
    module = cls(*first, 0.5, dim=6, init_values=2.0, channels_first=True, device=device, dtype=torch.float32)
    assert module.gamma.shape == (6,)
    with torch.no_grad():
        module.gamma.copy_(torch.arange(6.0))
    module = module.to(device).eval()
    x = random_tensor((4, 6, 3, 3), device=device)
    y = module.branch(x) if cls is StochasticDepth else x
    out = module(x) if cls is StochasticDepth else module(x, x)
    torch.testing.assert_close(out, x + y * torch.arange(6.0, device=device).view(6, 1, 1))
    with pytest.raises(ValueError, match="channels_first needs the number of channels as dim"):
        cls(*first, 0.5, dim=(6, 1, 1), init_values=1.0, channels_first=True)


@pytest.mark.parametrize("cls", [DropPathAdd, StochasticDepth])
def test_device_and_dtype_of_gamma(cls):
    first = (nn.Identity(),) if cls is StochasticDepth else ()
    module = cls(*first, dim=3, init_values=0.1, device="meta", dtype=torch.bfloat16)
    assert (module.gamma.device.type, module.gamma.dtype) == ("meta", torch.bfloat16)


def test_sample_dim_of_the_modules(device):
    x = random_tensor((5, 12, 8), device=device)
    for module in (
        DropPath(0.5, sample_dim=1),
        DropPathAdd(0.5, sample_dim=1),
        StochasticDepth(Mixed(sample_dim=1), 0.5, sample_dim=1, mode="batch"),
        StochasticDepth(Mixed(sample_dim=1), 0.5, sample_dim=1),
    ):
        module = module.to(device)
        out = module(x, x) if isinstance(module, DropPathAdd) else module(x)
        changed = (out != (0 if isinstance(module, DropPath) else x)).any(2)
        assert torch.equal(changed.any(0), changed.all(0)), "a sample falls as a whole"
        assert "sample_dim=1" in repr(module)


def test_modules_that_were_pickled_before():
    """Whole modules, by torch.save(model): they lack the attributes that came later."""
    x = torch.ones(4, 6)
    for module, inputs in (
        (DropPath(0.5), (x,)),
        (DropPathAdd(0.5, dim=6, init_values=0.1), (x, x)),
        (StochasticDepth(nn.Linear(6, 6), 0.5), (x,)),
    ):
        for name in ("sample_dim", "channels_first") + (("mode",) if isinstance(module, StochasticDepth) else ()):
            module.__dict__.pop(name, None)
        assert module(*inputs).shape == x.shape
        assert "sample_dim" not in repr(module)


def test_channels_are_no_samples():
    with pytest.raises(ValueError, match="channels_first means that dim 1 counts channels, but got sample_dim=1"):
        DropPathAdd(0.5, dim=6, init_values=0.1, channels_first=True, sample_dim=1)


def test_batched_may_hold_none(device):
    x = random_tensor(SHAPE, device=device)
    seen = []
    stochastic_depth(x, lambda rows, mask: seen.append(mask) or rows, 0.5, True, batched=(None,))
    assert seen == [None]
