"""What every test shares: devices, dtypes, bitwise equality, and the prediction of the next keep mask."""

import os
from itertools import combinations, product

import numpy as np
import pytest
import torch

import droppath_ext
from droppath_ext import reference
from droppath_ext._native import _C, BINARY

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Only for what may legitimately differ by rounding (Inductor, timm's formula); everything else is bitwise.
TOLERANCES = {
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}

# What one kernel of drop_path_add serves: the dtypes of x, residual and gamma.
HALF_DTYPES = (torch.float16, torch.bfloat16)
ADD_DTYPES = [
    *((dtype, dtype, None) for dtype in DTYPES),
    *((half, torch.float32, None) for half in HALF_DTYPES),
]
ADD_GAMMA_DTYPES = [
    *((dtype, dtype, dtype) for dtype in DTYPES),
    *((half, torch.float32, half) for half in HALF_DTYPES),
    *((half, torch.float32, torch.float32) for half in HALF_DTYPES),
    *((half, half, torch.float32) for half in HALF_DTYPES),
]
FUSED_ADD_DTYPES = ADD_DTYPES + ADD_GAMMA_DTYPES
ALL_ADD_DTYPES = [(x, residual, gamma) for x in DTYPES for residual in DTYPES for gamma in (None, *DTYPES)]

HAS_CUDA = _C.has_cuda  # of the build, not of the machine
uses_fused_path = _C.uses_fused_path  # the routing predicate, (x) -> bool
# Of tests that say how the kernels do it, or call them by name: `make test-pure` runs the others without.
needs_native = pytest.mark.skipif(BINARY is None, reason="there is no native extension")
if BINARY is None:

    def predicted_mask(*_):
        pytest.skip("without the native extension it is torch that draws")

    fixed_slots = predicted_mask

else:
    predicted_mask = _C.keep_mask  # (seed, offset, batch, drop_prob) -> bool[batch] on the CPU
    # (seed, offset, batch, count) -> the slots of "fixed", int64[batch] on the CPU, -1 where dropped
    fixed_slots = _C.fixed_slots

if not HAS_CUDA:
    NO_CUDA_REASON = "the extension was built without CUDA"
elif not torch.cuda.is_available():
    NO_CUDA_REASON = "no CUDA GPU on this machine"
else:
    NO_CUDA_REASON = None
# CUDA is appended rather than skipped test by test: test_cuda.py alone reports, once, why there is none.
DEVICES = ["cpu"] if NO_CUDA_REASON else ["cpu", "cuda"]


def runs_cuda_kernels(device):
    """On a GPU; or on the CPU, where their source has taken the place of the CPU's (tests/cuda_on_host)."""
    return device.type == "cuda" or "CUDA_ON_HOST_BUILD" in os.environ


def dtypes_id(dtypes):
    """The name of a test's parameter that is a tuple of dtypes."""
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def pairwise(*arguments):
    """Cases in which any two values of two arguments meet: many times fewer than all combinations."""

    def pairs(case):
        return set(combinations(enumerate(case), 2))

    cases = list(product(*(range(len(values)) for values in arguments)))
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(values[i] for values, i in zip(arguments, case, strict=True)) for case in chosen]


def case_id(value):
    """The name of one value of such a case."""
    if isinstance(value, torch.dtype):
        return dtypes_id((value,))
    return dtypes_id(value) if isinstance(value, tuple) and any(isinstance(v, torch.dtype) for v in value) else None


_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def bits(tensor):
    """The bit pattern as integers: tells -0.0 from +0.0 and lets NaN equal the same NaN."""
    return tensor.detach().resolve_neg().contiguous().view(_INT_OF_SIZE[tensor.element_size()])


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def assert_positive_zero(tensor):
    """+0.0 is the one float whose bits are all zero."""
    assert not bits(tensor).any()


def generator_state(device):
    return torch.cuda.get_rng_state(device) if torch.device(device).type == "cuda" else torch.get_rng_state()


def seeded(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


def _default_generator(device):
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def twin_of(generator):
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def draw_seed(generator):
    """One 64-bit number from a CPU generator, as an unsigned integer."""
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator).item() & (2**64 - 1)


def philox(counter, key):
    """Philox4x32-10 of Salmon et al. 2011 (doi:10.1145/2063384.2063405): counter uint32[n, 4], key (lo, hi)."""
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        hi0, hi1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [hi1 ^ c[1] ^ np.uint64(k0), p1 & low, hi0 ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, 1)


def _next_seed_and_offset(x, generator):
    """What the next fused call on x will draw with. Leaves the generator as it found it."""
    generator = _default_generator(x.device) if generator is None else generator
    if x.device.type == "cuda":
        return generator.initial_seed(), generator.get_offset()
    return draw_seed(twin_of(generator)), 0


def predict_keep(x, drop_prob, mode="row", generator=None):
    """The keep mask that the next fused call will draw."""
    batch = x.shape[0] if mode == "row" else 1
    if BINARY is None:
        draws = torch.empty(batch, device=x.device)
        return draws.bernoulli_(1 - drop_prob, generator=twin_of(generator or _default_generator(x.device))) != 0
    return predicted_mask(*_next_seed_and_offset(x, generator), batch, drop_prob).to(x.device)


def expected_drop_path(x, drop_prob, scale_by_keep=True, mode="row", generator=None):
    """The keep mask and the output that the next fused call must produce, bit for bit."""
    keep = predict_keep(x, drop_prob, mode, generator)
    return keep, reference.apply_keep_mask(x, keep, reference.keep_scale(drop_prob, scale_by_keep))


def formula(x, keep, drop_prob, scale_by_keep=True):
    """The semantics table in float64, one sample after the other: what reference.py itself is held against."""
    scale = 1 / (1 - drop_prob) if scale_by_keep and drop_prob < 1 else 1.0
    rows = [row.double() * scale if kept else torch.zeros_like(row).double() for row, kept in zip(x, keep, strict=True)]
    return torch.stack(rows) if rows else x.double()


def kept_samples(out):
    """bool[B] read off an output whose input holds no zeros."""
    return out.detach().reshape(out.shape[0], -1).ne(0).any(1)


def random_tensor(shape, dtype=torch.float32, device="cpu", seed=0):
    """Normal numbers, none of them zero, drawn on the CPU without touching the global generator."""
    values = torch.randn(shape, dtype=torch.float64, generator=seeded("cpu", seed))
    values = torch.where(values.abs() < 1e-3, 1.0, values)
    return values.to(dtype=dtype, device=device)


def checked(x, drop_prob=0.5, scale_by_keep=True, mode="row"):
    """Run drop_path forward and backward on x as it lies in memory; hold output, strides and gradient to the formula.

    Returns the output, for whatever else a test wants to know about it.
    """
    leaf = x.detach().requires_grad_()
    before = x.detach().clone()
    keep, expected = expected_drop_path(leaf.detach(), drop_prob, scale_by_keep, mode)
    out = droppath_ext.drop_path(leaf, drop_prob, True, scale_by_keep, mode=mode)
    assert out.device == x.device
    assert_same_bits(out, expected)
    assert out.stride() == torch.empty_like(x).stride()
    assert_same_bits(x, before)
    grad = torch.empty_like(out).copy_(random_tensor(x.shape, x.dtype, x.device, seed=1))
    (grad_x,) = torch.autograd.grad(out, leaf, grad)
    scale = reference.keep_scale(drop_prob, scale_by_keep)
    assert_same_bits(grad_x, reference.apply_keep_mask(grad, keep, scale))
    return out


# --- drop_path_add ---


def add_inputs(shape, dtypes, device="cpu", gamma_shape=None):
    """x, residual and gamma (None without a dtype) with other numbers in each; gamma along the last dim by default."""
    x_dtype, residual_dtype, gamma_dtype = dtypes
    x = random_tensor(shape, x_dtype, device)
    residual = random_tensor(shape, residual_dtype, device, seed=1)
    if gamma_dtype is None:
        return x, residual, None
    return x, residual, random_tensor(shape[-1:] if gamma_shape is None else gamma_shape, gamma_dtype, device, seed=2)


def add_dtype(x, residual, gamma=None):
    """The dtype in which PyTorch computes residual + gamma * x."""
    return (residual + (x if gamma is None else gamma * x)).dtype


def along(dim, gamma, ndim):
    """gamma [n] as a view that broadcasts along this dim of a tensor of so many dims."""
    return gamma.view(-1, *[1] * (ndim - 1 - dim % ndim))


def same_layout(x, dtype=None, seed=7):
    """A tensor that lies in memory as x does, holding other numbers."""
    numbers = random_tensor((x.untyped_storage().nbytes() // x.element_size(),), dtype or x.dtype, x.device, seed)
    return numbers.as_strided(x.shape, x.stride(), x.storage_offset())


def saved_storages(function):
    """The storages that the graph of a function's result keeps, bytes by address; never the result itself."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = function()
    assert out.requires_grad
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert out.untyped_storage().data_ptr() not in storages
    return storages


def zero_dropped(values, keep):
    """values with zeros, whatever is there, in the samples that keep (bool [B], or [1]) drops."""
    values = values.clone()
    values[~keep.expand(len(values))] = 0
    return values


def added_samples(out, residual):
    """bool[B] read off an output: the samples that differ from the residual."""
    return (out.detach() != residual.detach().to(out.dtype)).reshape(len(out), -1).any(1)


def exact_add(x, residual, gamma, keep, scale):
    """The formula in float64, and the sum of the magnitudes of its terms."""
    branch = x.detach().double() * scale
    if gamma is not None:
        branch = branch * gamma.detach().double()
    branch = zero_dropped(branch, keep)
    residual = residual.detach().double()
    return residual + branch, residual.abs() + branch.abs()


def assert_rounded_once(actual, exact, magnitude):
    """No error but half a unit in the last place of actual's dtype, and that of the few float32 steps before.

    float64 is computed in float64. Terms of this magnitude may cancel: the steps before are relative to it.
    """
    dtype = torch.finfo(actual.dtype)
    opmath = torch.finfo(torch.float64 if actual.dtype is torch.float64 else torch.float32)
    bound = exact.abs() * (dtype.eps / 2) + magnitude * (4 * opmath.eps) + dtype.tiny * dtype.eps
    excess = (actual.detach().double() - exact).abs() - bound
    assert not excess.isnan().any()
    assert (excess <= 0).all(), f"error {excess.max().item()} above the bound"


def checked_add(x, residual, gamma=None, drop_prob=0.5, scale_by_keep=True, mode="row"):
    """Run drop_path_add forward and backward on the tensors as they lie in memory, and hold everything to the formula.

    Dropped samples of x and of the incoming gradient may hold anything. Returns the output.
    """
    inputs = [x, residual] if gamma is None else [x, residual, gamma]
    leaves = [t.detach().requires_grad_() for t in inputs]
    before = [t.detach().clone() for t in inputs]
    keep = predict_keep(x, drop_prob, mode) if drop_prob > 0 else torch.ones(1, dtype=torch.bool, device=x.device)
    keep = keep.expand(len(x))
    scale = reference.keep_scale(drop_prob, scale_by_keep)
    out = droppath_ext.drop_path_add(
        *leaves[:2], drop_prob, True, scale_by_keep, gamma=None if gamma is None else leaves[2], mode=mode
    )
    assert out.device == x.device
    assert out.dtype == add_dtype(*before)
    assert out.shape == x.shape
    assert out.stride() == torch.empty_like(x).stride()
    assert_rounded_once(out, *exact_add(x, residual, gamma, keep, scale))
    assert_same_bits(out[~keep], residual[~keep].to(out.dtype))
    for tensor, copy in zip(inputs, before, strict=True):
        assert_same_bits(tensor, copy)

    grad = torch.empty_like(out).copy_(random_tensor(x.shape, out.dtype, x.device, seed=3))
    grads = torch.autograd.grad(out, leaves, grad)
    for leaf, leaf_grad in zip(leaves, grads, strict=True):
        assert (leaf_grad.dtype, leaf_grad.shape) == (leaf.dtype, leaf.shape)
    exact = zero_dropped(grad.double() * scale * (1 if gamma is None else gamma.detach().double()), keep)
    assert_rounded_once(grads[0], exact, exact.abs())
    assert_positive_zero(grads[0][~keep])
    if gamma is None:
        opmath = torch.float64 if out.dtype is torch.float64 else torch.float32
        assert_same_bits(grads[0], reference.apply_keep_mask(grad.to(opmath), keep, scale).to(x.dtype))
    else:
        terms = zero_dropped(grad, keep).double() * zero_dropped(x.detach(), keep).double() * scale
        assert_rounded_once(grads[2], terms.sum_to_size(gamma.shape), terms.abs().sum_to_size(gamma.shape))
    assert_same_bits(grads[1], grad.to(residual.dtype))
    return out


# --- stochastic_depth ---

SAMPLINGS = ("bernoulli", "fixed")


class Recorded(torch.nn.Module):
    """A branch that remembers what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, *inputs):
        self.calls.append(inputs)
        return self.compute(*inputs)


class TokenBranch(Recorded):
    """Attention over the tokens of a sample, with what may come along for each: a bias, a mask, a class."""

    def __init__(self, dim):
        super().__init__()
        self.qkv = torch.nn.Linear(dim, 3 * dim)
        self.out = torch.nn.Linear(dim, dim)
        self.classes = torch.nn.Embedding(4, dim)

    def compute(self, x, bias=None, mask=None, label=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        logits = q @ k.mT
        if bias is not None:
            logits = logits + bias
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], -float("inf"))
        out = self.out(logits.softmax(-1) @ v)
        return out if label is None else out + self.classes(label)[:, None]


class ImageBranch(Recorded):
    """Two convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.first = torch.nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.second = torch.nn.Conv2d(2 * channels, channels, 1)

    def compute(self, x):
        return self.second(torch.nn.functional.gelu(self.first(x)))


class WeightBranch(Recorded):
    """One product for each element: the same bits, whichever samples are beside it."""

    def __init__(self, dim):
        super().__init__()
        self.weight = torch.nn.Parameter(random_tensor((dim,), seed=4))

    def compute(self, x):
        return x * self.weight


def like(module, x):
    """The module with parameters of the dtype and device of x."""
    return module.to(device=x.device, dtype=x.dtype)


def predict_skip(x, drop_prob, generator=None):
    """The keep mask that the next call of stochastic_depth will draw with sampling="bernoulli": on the host."""
    return predict_keep(torch.empty(len(x)), drop_prob, generator=generator).to(x.device)


def predict_fixed(x, count, generator=None):
    """The slots that the next native draw of so many samples of x will give."""
    if BINARY is None:
        return reference.draw_fixed_in_aten(x, count, twin_of(generator or _default_generator(x.device)))[0]
    return fixed_slots(*_next_seed_and_offset(x, generator), len(x), count).to(x.device)


def fixed_count(size, drop_prob):
    """How many of so many samples sampling="fixed" keeps."""
    return max(1, round(size * (1 - drop_prob))) if drop_prob < 1 else 0


def skip_scale(size, drop_prob, sampling="bernoulli", scale_by_keep=True):
    if not scale_by_keep or drop_prob == 1:
        return 1.0
    return 1 / (1 - drop_prob) if sampling == "bernoulli" else size / fixed_count(size, drop_prob)


def skip_formula(x, y, keep, scale, gamma=None):
    """x + scale * gamma * y where the sample is kept, x where it is dropped; y is the branch of all samples."""
    added = x + (y * scale if gamma is None else y * gamma * scale)
    return torch.where(keep.view(-1, *[1] * (x.dim() - 1)), added, x.to(added.dtype))


def assert_near(actual, expected):
    """Equal but for the rounding of sums, relative to the largest number."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    error = (actual.detach().double() - expected.detach().double()).abs()
    assert not error.isnan().any()
    assert not error.numel() or error.max() <= TOLERANCES[actual.dtype]["rtol"] * expected.detach().double().abs().max()


def leaf_of(tensor):
    """A leaf that lies in memory as the tensor does; it requires a gradient if it can have one."""
    return None if tensor is None else tensor.detach().requires_grad_(tensor.is_floating_point())


def checked_skip(x, branch, drop_prob=0.5, scale_by_keep=True, *, gamma=None, batched=(), sampling="bernoulli"):
    """Run stochastic_depth forward and backward, and hold everything to the plain formula with the same samples.

    ``branch`` is Recorded and treats each sample alone. Returns the output.
    """
    x, gamma, batched = leaf_of(x), leaf_of(gamma), [leaf_of(tensor) for tensor in batched]
    leaves = [t for t in (x, gamma, *batched, *branch.parameters()) if t is not None and t.requires_grad]
    keep = predict_skip(x, drop_prob) if sampling == "bernoulli" else None
    branch.calls.clear()
    out = droppath_ext.stochastic_depth(
        x, branch, drop_prob, True, scale_by_keep, gamma=gamma, batched=batched, sampling=sampling
    )
    ((*inputs,),) = branch.calls
    if keep is None:
        keep = added_samples(out, x)
        assert keep.sum() == fixed_count(len(x), drop_prob)
    if keep.any():
        for actual, tensor in zip(inputs, (x, *batched), strict=True):
            assert_same_bits(actual, tensor[keep])
    else:
        assert all(len(tensor) == min(1, len(x)) for tensor in inputs)
    assert out.device == x.device

    y = branch(x, *batched)
    expected = skip_formula(x, y, keep, skip_scale(len(x), drop_prob, sampling, scale_by_keep), gamma)
    assert out.dtype == expected.dtype
    assert_near(out, expected)
    assert_same_bits(out[~keep], x[~keep].to(out.dtype))
    grad = random_tensor(x.shape, out.dtype, x.device, seed=3)
    actual_grads = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, leaves, grad, allow_unused=True)
    for leaf, actual, expected_grad in zip(leaves, actual_grads, expected_grads, strict=True):
        assert (actual is None) == (expected_grad is None)
        if actual is not None:
            assert (actual.dtype, actual.shape) == (leaf.dtype, leaf.shape)
            assert_near(actual, expected_grad)
    assert_same_bits(actual_grads[0][~keep], grad[~keep].to(x.dtype))
    return out
