"""Promise: the branch of a dropped sample is never computed, and nothing else changes."""

import copy
import pickle

import pytest
import torch
from conftest import (
    DTYPES,
    HALF_DTYPES,
    SAMPLINGS,
    ImageBranch,
    Recorded,
    TokenBranch,
    WeightBranch,
    added_samples,
    assert_near,
    assert_positive_zero,
    assert_rounded_once,
    assert_same_bits,
    checked_skip,
    exact_add,
    fixed_count,
    generator_state,
    like,
    needs_native,
    predict_skip,
    random_tensor,
    saved_storages,
    skip_formula,
    skip_scale,
    zero_dropped,
)

from droppath_ext import StochasticDepth, drop_path_add, stochastic_depth

DOUBLE = torch.float64


def _tokens(device, dtype=DOUBLE, batch=12):
    """x and a branch for it."""
    x = random_tensor((batch, 5, 8), dtype, device)
    return x, like(TokenBranch(8), x)


def _images(device, dtype=DOUBLE, batch=12):
    x = random_tensor((batch, 6, 4, 4), dtype, device)
    return x, like(ImageBranch(6), x)


def _batched(names, x):
    """A bias that has a gradient, a mask and a class for each sample."""
    batch, tokens, _ = x.shape
    mask = random_tensor((batch, tokens), seed=21) > 0
    mask[:, 0] = True
    every = {
        "bias": random_tensor((batch, tokens, tokens), x.dtype, x.device, seed=20),
        "mask": mask.to(x.device),
        "label": (torch.arange(batch) % 4).to(x.device),
    }
    return [every[name] for name in names]


# --- the same samples give the same output and gradients as the plain formula ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("drop_prob", [0.1, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("with_gamma", [False, True])
def test_formula_of_tokens(device, sampling, scale_by_keep, drop_prob, with_gamma):
    x, branch = _tokens(device)
    gamma = random_tensor((8,), DOUBLE, device, seed=2) if with_gamma else None
    checked_skip(x, branch, drop_prob, scale_by_keep, gamma=gamma, sampling=sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("drop_prob", [0.4, 0.75])
def test_formula_of_images(device, sampling, with_gamma, drop_prob):
    x, branch = _images(device)
    gamma = random_tensor((6, 1, 1), DOUBLE, device, seed=2) if with_gamma else None
    checked_skip(x, branch, drop_prob, gamma=gamma, sampling=sampling)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_formula_in_each_dtype(device, dtype, sampling, with_gamma):
    x, branch = _tokens(device, dtype)
    gamma = random_tensor((8,), dtype, device, seed=2) if with_gamma else None
    checked_skip(x, branch, gamma=gamma, sampling=sampling)


@pytest.mark.parametrize("names", [("bias",), ("bias", "mask"), ("bias", "mask", "label")], ids="-".join)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drop_prob", [0.4, 1.0])
def test_tensors_that_come_along(device, names, sampling, drop_prob):
    """Floating-point ones with gradients, bool and integer ones as they are."""
    x, branch = _tokens(device)
    checked_skip(x, branch, drop_prob, batched=_batched(names, x), sampling=sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.complex64, torch.float8_e5m2]
)
@pytest.mark.parametrize("drop_prob", [0.0, 0.5, 1.0])
def test_tensors_of_any_dtype_come_along(device, sampling, dtype, drop_prob):
    x = random_tensor((12, 3), device=device)
    other = (torch.arange(24, device=device).view(12, 2) % 5).to(dtype)
    seen = []

    def branch(rows, tensor):
        seen.append(tensor)
        return torch.neg(rows)

    out = stochastic_depth(x, branch, drop_prob, training=True, batched=[other], sampling=sampling)
    keep = added_samples(out, x)
    (tensor,) = seen
    assert (tensor.dtype, tensor.shape[1:]) == (dtype, (2,))
    if keep.any():
        assert torch.equal(tensor.to(torch.complex64), other.to(torch.complex64)[keep])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_tensor_that_comes_along_twice(device, sampling):
    """x itself, say; its gradient comes from everywhere."""

    class Product(Recorded):
        def compute(self, first, second, third):
            return first * second.sin() + third

    x = random_tensor((12, 5), DOUBLE, device).requires_grad_()
    torch.manual_seed(1)
    out = stochastic_depth(x, Product(), 0.5, training=True, batched=(x, x), sampling=sampling)
    keep = added_samples(out, x)
    assert 0 < keep.sum() < 12
    expected = skip_formula(x, x * x.sin() + x, keep, 2.0)
    assert_near(out, expected)
    assert_near(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("gamma_dtype", [None, "same", torch.float32])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_rounded_once(device, dtype, sampling, gamma_dtype, scale_by_keep):
    """The branch's own output apart; for what follows there is no error but half a unit in the last place."""
    gamma_dtype = dtype if gamma_dtype == "same" else gamma_dtype
    x = random_tensor((33, 7), dtype, device)
    branch = like(WeightBranch(7), x)
    gamma = None if gamma_dtype is None else random_tensor((7,), gamma_dtype, device, seed=2)
    out = stochastic_depth(x, branch, 0.3, True, scale_by_keep, gamma=gamma, sampling=sampling)
    keep = added_samples(out, x)
    assert 0 < keep.sum() < 33
    y = branch(x)
    assert out.dtype == (x + (y if gamma is None else gamma * y)).dtype
    assert_rounded_once(out, *exact_add(y, x, gamma, keep, skip_scale(33, 0.3, sampling, scale_by_keep)))
    assert_same_bits(out[~keep], x[~keep].to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_bernoulli_is_drop_path_add_bit_for_bit(dtype, with_gamma):
    """From one seed on a CPU: the same samples, the same bits, the same random numbers consumed."""
    x = random_tensor((40, 7), dtype)
    branch = like(WeightBranch(7), x)
    gamma = random_tensor((7,), dtype, seed=2) if with_gamma else None
    torch.manual_seed(5)
    expected = [drop_path_add(branch(x), x, 0.4, training=True, gamma=gamma) for _ in range(3)]
    state = generator_state("cpu")
    torch.manual_seed(5)
    for other in expected:
        assert_same_bits(stochastic_depth(x, branch, 0.4, training=True, gamma=gamma), other)
    assert torch.equal(generator_state("cpu"), state)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("branch_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma_dtype", [None, torch.float32])
def test_branch_of_another_dtype(device, sampling, branch_dtype, dtype, gamma_dtype):
    """The result has the dtype of the plain sum, the gradients those of their inputs."""

    class Cast(WeightBranch):
        def compute(self, x):
            return super().compute(x).to(branch_dtype)

    x = random_tensor((20, 6), dtype, device).requires_grad_()
    branch = like(Cast(6), x)
    gamma = None if gamma_dtype is None else random_tensor((6,), gamma_dtype, device, seed=2).requires_grad_()
    out = stochastic_depth(x, branch, 0.5, training=True, gamma=gamma, sampling=sampling)
    y = branch(x)
    keep = added_samples(out, x)
    assert 0 < keep.sum() < 20
    assert out.dtype == (x + (y if gamma is None else gamma * y)).dtype
    assert_rounded_once(out, *exact_add(y, x, gamma, keep, 2.0))
    assert_same_bits(out[~keep], x.detach()[~keep].to(out.dtype))
    leaves = [t for t in (x, gamma, branch.weight) if t is not None]
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for leaf, grad in zip(leaves, grads, strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)
        assert grad.abs().sum() > 0
    assert_same_bits(grads[0][~keep], torch.ones_like(x)[~keep])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_autocast(device, sampling, with_gamma):
    """The branch returns bfloat16 beside a float32 x, and the sum is float32."""
    x = random_tensor((12, 5, 8), device=device).requires_grad_()
    branch = like(TokenBranch(8), x)
    gamma = random_tensor((8,), device=device, seed=2).requires_grad_() if with_gamma else None
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = stochastic_depth(x, branch, 0.5, training=True, gamma=gamma, sampling=sampling)
        y = branch(x)
    assert (y.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    keep = added_samples(out, x)
    assert 0 < keep.sum() < 12
    expected = skip_formula(x, y.float(), keep, 2.0, gamma)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert_same_bits(out[~keep], x.detach()[~keep])
    leaves = [t for t in (x, gamma, *branch.parameters()) if t is not None and t is not branch.classes.weight]
    grad = random_tensor(x.shape, device=device, seed=3)
    grads = (torch.autograd.grad(result, leaves, grad) for result in (out, expected))
    for actual, plain in zip(*grads, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - plain).abs().max() <= 2e-2 * plain.abs().max()


# --- the branch ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_branch_sees_the_kept_samples_once(device, sampling):
    x, branch = _tokens(device)
    bias, mask = _batched(("bias", "mask"), x)
    sizes = []
    for _ in range(20):
        branch.calls.clear()
        out = stochastic_depth(x, branch, 0.6, training=True, batched=(bias, mask), sampling=sampling)
        keep = added_samples(out, x)
        ((*inputs,),) = branch.calls
        sizes.append(len(inputs[0]))
        assert sizes[-1] == max(1, keep.sum())
        if keep.any():
            for actual, tensor in zip(inputs, (x, bias, mask), strict=True):
                assert_same_bits(actual, tensor[keep])
    assert set(sizes) == {5} if sampling == "fixed" else len(set(sizes)) > 3


BRANCHES = {
    "lambda": lambda: lambda x: x * 3,
    "module": lambda: torch.nn.Identity(),
    "method": lambda: torch.nn.Hardtanh(-0.5, 0.5).forward,
    "function": lambda: torch.nn.functional.relu,
}


@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_any_callable_is_a_branch(device, kind, sampling):
    branch = BRANCHES[kind]()
    x = random_tensor((10, 4), device=device).abs().requires_grad_()
    out = stochastic_depth(x, branch, 0.5, training=True, sampling=sampling)
    keep = added_samples(out, x)
    assert 0 < keep.sum() < 10
    expected = skip_formula(x, branch(x), keep, 2.0)
    assert_near(out, expected)
    assert_near(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_branch_may_return_its_input(device, sampling):
    x = random_tensor((10, 4), device=device)
    before = x.clone()
    out = stochastic_depth(x, lambda rows: rows, 0.5, training=True, sampling=sampling)
    keep = added_samples(out, x)
    assert 0 < keep.sum() < 10
    assert_near(out, skip_formula(x, x, keep, 2.0))
    out.zero_()
    assert_same_bits(x, before)


@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
@pytest.mark.parametrize("changed", ["input", "x"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_branch_must_not_change_its_input(device, drop_prob, changed, sampling):
    """Its input is a copy or x, by luck: what it writes there would count or not."""
    x = random_tensor((10, 4), device=device)

    def branch(rows):
        (rows if changed == "input" else x).mul_(3)
        return rows + 1

    with pytest.raises(RuntimeError, match="branch must not change its input or x in place"):
        stochastic_depth(x, branch, drop_prob, training=True, sampling=sampling)


@pytest.mark.parametrize("requiring", ["x", "parameters", "gamma", "bias", "nothing"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_requires_a_gradient_gets_one(device, requiring, sampling):
    x, branch = _tokens(device)
    (bias,) = _batched(("bias",), x)
    gamma = random_tensor((8,), DOUBLE, device, seed=2)
    branch.requires_grad_(requiring == "parameters")
    leaves = {"x": [x], "gamma": [gamma], "bias": [bias], "nothing": []}.get(requiring)
    leaves = [*branch.qkv.parameters(), *branch.out.parameters()] if leaves is None else leaves
    for leaf in leaves:
        leaf.requires_grad_()
    out = stochastic_depth(x, branch, 0.5, training=True, gamma=gamma, batched=[bias], sampling=sampling)
    assert out.requires_grad == bool(leaves)
    keep = added_samples(out, x)
    expected = skip_formula(x, branch(x, bias), keep, 2.0, gamma)
    assert_near(out, expected)
    if leaves:
        grad = random_tensor(x.shape, DOUBLE, device, seed=3)
        grads = (torch.autograd.grad(result, leaves, grad) for result in (out, expected))
        for actual, plain in zip(*grads, strict=True):
            assert_near(actual, plain)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient(device, sampling, context):
    x, branch = _tokens(device)
    with context():
        out = stochastic_depth(x.requires_grad_(), branch, 0.5, training=True, sampling=sampling)
        assert not out.requires_grad
        keep = added_samples(out, x)
        assert_near(out, skip_formula(x, branch(x), keep, 2.0))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_in_place_use_of_output_and_input_is_legal(device, sampling):
    weight = random_tensor((8, 5), device=device, seed=2).requires_grad_()
    x = weight * 1
    out = stochastic_depth(x, torch.sin, 0.5, training=True, sampling=sampling)
    keep = added_samples(out, x)
    expected = zero_dropped(2 * weight.detach().cos(), keep) + 1
    out += 1
    x.zero_()
    out.sum().backward()
    torch.testing.assert_close(weight.grad, expected)


# --- nothing can be dropped: the branch sees x itself ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False), (1.0, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_in_eval_every_sample_is_kept(device, sampling, drop_prob, training, dtype, with_gamma):
    x = random_tensor((7, 5), dtype, device).requires_grad_()
    mask = x.detach() > 0
    gamma = random_tensor((5,), dtype, device, seed=2).requires_grad_() if with_gamma else None

    class Masked(WeightBranch):
        def compute(self, x, mask):
            return super().compute(x) * mask

    branch = like(Masked(5), x)
    before = generator_state(device)
    out = stochastic_depth(x, branch, drop_prob, training, gamma=gamma, batched=[mask], sampling=sampling)
    assert torch.equal(generator_state(device), before)
    ((seen, seen_mask),) = branch.calls
    assert seen is x
    assert seen_mask is mask
    everyone = torch.ones(7, dtype=torch.bool, device=device)
    y = branch(x, mask)
    assert_rounded_once(out, *exact_add(y, x, gamma, everyone, 1.0))
    grads = torch.autograd.grad(out.sum(), [x, branch.weight])
    factor = branch.weight.detach() * (1 if gamma is None else gamma.detach())
    exact = 1 + factor.double() * mask
    assert (grads[0].double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_all_kept_by_luck_is_not_gathered(device, sampling):
    """The branch sees x itself; the scale is that of the call."""
    x, branch = _tokens(device, batch=3)
    drop_prob = 0.1  # of 3 samples "fixed" keeps round(2.7)
    for _ in range(20):
        if sampling == "fixed" or predict_skip(x, drop_prob).all():
            break
        torch.manual_seed(torch.initial_seed() + 1)
    leaf = x.detach().requires_grad_()
    out = stochastic_depth(leaf, branch, drop_prob, training=True, sampling=sampling)
    ((seen,),) = branch.calls
    assert seen is leaf
    everyone = torch.ones(3, dtype=torch.bool, device=device)
    assert_near(out, skip_formula(x, branch(x), everyone, 1 / 0.9 if sampling == "bernoulli" else 1.0))


# --- all dropped: the branch runs on one sample, and nothing of it arrives ---


def _all_dropped(sampling, x):
    """A drop_prob that drops every sample of x in the next call, below one where that is possible."""
    if sampling == "fixed":
        return 1.0
    for seed in range(100):
        torch.manual_seed(seed)
        if not predict_skip(x, 0.9).any():
            return 0.9
    raise AssertionError("no seed drops every sample")


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_all_dropped(device, sampling, certain, dtype, with_gamma):
    """Every parameter gets a gradient, and it is zero: what DistributedDataParallel waits for."""
    x = random_tensor((6, 5, 8), dtype, device).requires_grad_()
    branch = like(TokenBranch(8), x)
    bias, mask, label = _batched(("bias", "mask", "label"), x)
    bias.requires_grad_()
    gamma = random_tensor((8,), dtype, device, seed=2).requires_grad_() if with_gamma else None
    drop_prob = 1.0 if certain else _all_dropped(sampling, x)
    out = stochastic_depth(
        x, branch, drop_prob, training=True, gamma=gamma, batched=(bias, mask, label), sampling=sampling
    )
    ((*inputs,),) = branch.calls
    places = (x.detach() == inputs[0]).flatten(1).all(1)
    assert places.sum() == len(inputs[0]) == 1, "one sample of x"
    for actual, tensor in zip(inputs, (x, bias, mask, label), strict=True):
        assert_same_bits(actual, tensor[places])
    assert_same_bits(out, x)
    out.backward(grad := random_tensor(x.shape, dtype, device, seed=3))
    assert_same_bits(x.grad, grad)
    for leaf in (bias, *branch.parameters(), *([] if gamma is None else [gamma])):
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_all_dropped_lets_nothing_through(device, sampling, value, dtype, with_gamma):
    """What the branch made of the one sample has weight 0, and NaN times 0 would be NaN."""
    x = random_tensor((6, 8), dtype, device).requires_grad_()
    weight = torch.full((8,), value, dtype=dtype, device=device, requires_grad=True)
    shift = torch.zeros(8, dtype=dtype, device=device, requires_grad=True)
    gamma = torch.full((8,), value, dtype=dtype, device=device, requires_grad=True) if with_gamma else None
    with torch.no_grad():
        x[::2] = -0.0
    out = stochastic_depth(
        x, lambda rows: weight + rows * 0 + shift, 1.0, training=True, gamma=gamma, sampling=sampling
    )
    assert_same_bits(out, x)
    grad = random_tensor(x.shape, dtype, device, seed=3)
    grads = torch.autograd.grad(out, [x, weight, shift, *([gamma] if with_gamma else [])], grad)
    assert_same_bits(grads[0], grad)
    for other in grads[1:]:
        assert_positive_zero(other)


@needs_native
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_dropped_samples_are_never_read(device, sampling, value, dtype, with_gamma):
    """NaN there, in x and in the incoming gradient, spoils no other sample and no parameter."""
    x = random_tensor((30, 8), dtype, device).requires_grad_()
    branch = like(WeightBranch(8), x)
    gamma = random_tensor((8,), dtype, device, seed=2).requires_grad_() if with_gamma else None
    state = generator_state("cpu"), generator_state(device)
    keep = added_samples(stochastic_depth(x, branch, 0.5, training=True, sampling=sampling), x)
    assert 0 < keep.sum() < 30
    with torch.no_grad():
        x[~keep] = value
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
    out = stochastic_depth(x, branch, 0.5, training=True, gamma=gamma, sampling=sampling)
    assert_same_bits(out[~keep], x[~keep])
    assert out[keep].isfinite().all()
    grad = torch.ones_like(x)
    grad[~keep] = value
    grads = torch.autograd.grad(out, [x, branch.weight, *([gamma] if with_gamma else [])], grad)
    assert_same_bits(grads[0][~keep], grad[~keep])
    assert grads[0][keep].isfinite().all()
    for other in grads[1:]:
        assert other.isfinite().all()
        assert other.abs().sum() > 0


# --- few samples ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_no_samples(device, sampling, with_gamma):
    """The branch runs on x itself, so that every parameter gets a gradient, and nothing is drawn."""
    x, branch = _tokens(device, batch=0)
    x.requires_grad_()
    gamma = random_tensor((8,), DOUBLE, device, seed=2).requires_grad_() if with_gamma else None
    before = generator_state(device)
    out = stochastic_depth(x, branch, 0.5, training=True, gamma=gamma, sampling=sampling)
    assert torch.equal(generator_state(device), before)
    assert out.shape == (0, 5, 8)
    out.sum().backward()
    for leaf in (*branch.qkv.parameters(), *branch.out.parameters(), *([gamma] if with_gamma else [])):
        assert not leaf.grad.any()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 0.9])
def test_few_samples(device, sampling, batch, drop_prob):
    x, branch = _tokens(device, batch=batch)
    gamma = random_tensor((8,), DOUBLE, device, seed=2)
    counts = set()
    for seed in range(12):
        torch.manual_seed(seed)
        out = checked_skip(x, branch, drop_prob, gamma=gamma, sampling=sampling)
        counts.add(added_samples(out, x).sum().item())
    if sampling == "fixed":
        assert counts == {fixed_count(batch, drop_prob)}
    else:
        assert counts <= set(range(batch + 1))
        assert len(counts) > 1 or drop_prob != 0.5


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", [(9,), (9, 0), (9, 1), (9, 2, 1, 3, 1, 2), (1000, 1), (70_001, 1)])
def test_shapes(device, sampling, shape):
    x = random_tensor(shape, DOUBLE, device)

    class Tripled(Recorded):
        def compute(self, x):
            return 3 * x

    if x.numel():
        checked_skip(x, Tripled(), 0.4, sampling=sampling)
    else:
        out = stochastic_depth(x, Tripled(), 0.4, training=True, sampling=sampling)
        assert out.shape == shape


# --- the module ---


class _Plain(torch.nn.Module):
    """A branch that can be copied and pickled."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x, bias=None):
        return self.linear(x) if bias is None else self.linear(x) + bias


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dim", [None, 8, (5, 1)])
def test_module_is_the_function(device, scale_by_keep, sampling, dim):
    x = random_tensor((12, 5, 8), device=device)
    bias = random_tensor((12, 1, 8), device=device, seed=1)
    module = StochasticDepth(_Plain(), 0.3, scale_by_keep, dim, None if dim is None else 0.5, sampling).to(device)
    for clone in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for batched in ((), (bias,)):
            torch.manual_seed(1)
            expected = stochastic_depth(
                x, module.branch, 0.3, True, scale_by_keep, gamma=module.gamma, batched=batched, sampling=sampling
            )
            torch.manual_seed(1)
            assert_same_bits(clone(x, *batched), expected)
    y = module.branch(x)
    torch.testing.assert_close(module.eval()(x), x + (y if dim is None else 0.5 * y))
    module.train().drop_prob = 1.0  # schedules assign to the attribute between steps
    assert_same_bits(module(x), x)


def test_module_repr_and_parameters():
    module = StochasticDepth(torch.nn.Linear(4, 4), 0.1)
    assert repr(module) == (
        "StochasticDepth(\n  drop_prob=0.100\n  (branch): Linear(in_features=4, out_features=4, bias=True)\n)"
    )
    assert list(module.state_dict()) == ["branch.weight", "branch.bias"]
    module = StochasticDepth(torch.nn.ReLU(), 0.25, dim=4, init_values=1e-5, sampling="fixed")
    assert module.extra_repr() == "drop_prob=0.250, sampling=fixed, dim=[4], init_values=1e-05"
    assert list(module.state_dict()) == ["gamma"]
    torch.testing.assert_close(module.gamma.detach(), torch.full((4,), 1e-5))
    function = StochasticDepth(torch.sin, 0.25)
    assert not list(function.parameters())
    assert torch.equal(function.eval()(x := torch.ones(2, 3)), x + x.sin())


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_module_trains(device, sampling):
    """A target that only the branch and gamma reach. With p = 0.5 training ends half-way to it, where a quarter of the
    squared loss is left."""
    torch.manual_seed(3)
    module = StochasticDepth(torch.nn.Linear(4, 4), 0.5, dim=4, init_values=0.5, sampling=sampling).to(device)
    x = random_tensor((64, 4), device=device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(200):
        loss = ((module.eval()(x) - 2 * x) ** 2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        ((module.train()(x) - 2 * x) ** 2).mean().backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


# --- what autograd keeps, and what is computed ---


@needs_native
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_between_blocks_are_added_in_place(device, create_graph, hooked):
    """The gradient that comes from the next block belongs to nobody else, unless somebody keeps it."""
    x = random_tensor((12, 5), DOUBLE, device).requires_grad_()
    middle = stochastic_depth(x, torch.sin, 0.5, training=True)
    seen = []
    if hooked:
        middle.register_hook(seen.append)
    out = stochastic_depth(middle, torch.cos, 0.5, training=True)
    grad = random_tensor((12, 5), DOUBLE, device, seed=3)
    before = grad.clone()
    with torch.profiler.profile() as profile:
        out.backward(grad, create_graph=create_graph)
    assert_same_bits(grad, before)  # the caller's own
    calls = [event.name for event in profile.events()]
    assert calls.count("droppath_ext::add_kept_") == int(not create_graph and not hooked)
    first, last = added_samples(middle, x), added_samples(out, middle)
    inner = (x + torch.where(first[:, None], 2 * x.sin(), 0.0)).detach().requires_grad_()
    (grad_inner,) = torch.autograd.grad(inner + torch.where(last[:, None], 2 * inner.cos(), 0.0), inner, grad)
    for kept in seen:
        assert_near(kept.detach(), grad_inner)
    expected = grad_inner * (1 + torch.where(first[:, None], 2 * x.detach().cos(), 0.0))
    assert_near(x.grad.detach(), expected)


@needs_native
def test_where_nothing_is_dropped_the_gradient_is_handed_on(device):
    """The first block of a linear schedule: a plain addition, whose backward computes nothing."""
    x = random_tensor((8, 5), device=device).requires_grad_()
    received = []

    def branch(rows):
        y = rows * 3
        y.register_hook(received.append)
        return y

    out = stochastic_depth(x, branch, 0.0, training=True)
    grad = random_tensor((8, 5), device=device, seed=3)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    assert received[0].data_ptr() == grad.data_ptr()
    assert_same_bits(grad_x, grad * 3 + grad)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("gamma_requires_grad", [False, True])
def test_saves_nothing_of_the_size_of_x(device, dtype, sampling, with_gamma, gamma_requires_grad):
    """The indices alone; with a gradient of gamma the kept rows of y, too. The branch here saves nothing."""
    batch, features = 8, 1000
    x = random_tensor((batch, features), dtype, device).requires_grad_()
    gamma = None
    if with_gamma:
        gamma = random_tensor((features,), dtype, device, seed=2).requires_grad_(gamma_requires_grad)
    rows = []

    def branch(t):
        rows.append(t * 3)
        return rows[-1]

    torch.manual_seed(1)
    storages = saved_storages(lambda: stochastic_depth(x, branch, 0.5, training=True, gamma=gamma, sampling=sampling))
    kept = len(rows[0])
    assert 0 < kept < batch
    assert x.untyped_storage().data_ptr() not in storages
    y_bytes = storages.pop(rows[0].untyped_storage().data_ptr(), 0)
    assert y_bytes == (rows[0].nbytes if with_gamma and gamma_requires_grad else 0)
    if with_gamma:
        storages.pop(gamma.untyped_storage().data_ptr(), 0)
    assert sum(storages.values()) <= 2 * 8 * batch + 8 * kept


def _large_allocations(function, size):
    """What the function returns, and how often it allocates so many bytes or more."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    # Of the profiler's two lists of events only this one has what an operation frees again before it returns.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, sum(event.nbytes() >= size for event in events)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_no_temporary_of_full_size(device, dtype, sampling, with_gamma):
    """Forward: the output. Backward: the gradient of x, in one pass, and not as the sum of two tensors."""
    x = random_tensor((16, 32, 250), dtype, device).requires_grad_()
    gamma = random_tensor((250,), dtype, device, seed=2).requires_grad_() if with_gamma else None
    leaves = [x, gamma] if with_gamma else [x]
    grad = random_tensor(x.shape, dtype, device, seed=3)
    torch.manual_seed(1)
    out, forward = _large_allocations(
        lambda: stochastic_depth(x, lambda rows: rows * 3, 0.7, training=True, gamma=gamma, sampling=sampling),
        x.nbytes,
    )
    grads, backward = _large_allocations(lambda: torch.autograd.grad(out, leaves, grad), x.nbytes)
    assert 1 <= added_samples(out, x).sum() <= 8
    assert (len(grads), forward, backward) == (len(leaves), 1, 1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_same_seed_same_bits(device, sampling):
    x, branch = _tokens(device, torch.float32)
    gamma = random_tensor((8,), device=device, seed=2)

    def run():
        torch.manual_seed(7)
        leaves = [x.clone().requires_grad_(), gamma.clone().requires_grad_(), branch.qkv.weight]
        out = stochastic_depth(leaves[0], branch, 0.4, training=True, gamma=leaves[1], sampling=sampling)
        return [out, *torch.autograd.grad(out, leaves, x)]

    first = run()
    for _ in range(3):
        for actual, expected in zip(run(), first, strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_the_scale_is_not_rounded_to_half_precision(device, dtype):
    """bfloat16(1 / 0.9) is 0.16 % low."""
    x = torch.zeros(512, 256, device=device)
    y = random_tensor((256,), dtype, device).abs()
    out = stochastic_depth(x, lambda rows: y.expand(rows.shape), 0.1, training=True)
    keep = added_samples(out, x)
    assert out[keep].double().sum().item() / (keep.sum() * y.double().sum()).item() == pytest.approx(1 / 0.9, rel=1e-6)
