"""Promise: one seed gives one mask on every eager route; and where a route cannot be served, one sentence says so."""

import functools
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DTYPES, SAMPLINGS, kept_samples, random_tensor, seeded
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import checkpoint

from droppath_ext import draw_keep, drop_path, drop_path_add, stochastic_depth

SAMPLES = 40


class Tagged(torch.Tensor):
    """A subclass that honours what runs on it."""


def _call(name, x, drop_prob=0.5, **options):
    if name == "drop_path":
        return drop_path(x, drop_prob, True, **options)
    if name == "drop_path_add":
        return drop_path_add(x, torch.ones_like(x), drop_prob, True, **options)
    return stochastic_depth(x, torch.neg, drop_prob, True, sampling=name.split()[1], **options)


NAMES = ["drop_path", "drop_path_add", *(f"stochastic_depth {sampling}" for sampling in SAMPLINGS)]


def _kept(name, x, out):
    """Which samples the branch was added to, or which are left."""
    base = {"drop_path": torch.zeros_like(x), "drop_path_add": torch.ones_like(x)}.get(name, x)
    return (out != base).flatten(1).any(1)


def _by_jvp(name, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(_call(name, forward_ad.make_dual(x, torch.ones_like(x)))).primal


def _by_functional_jvp(name, x):
    return torch.func.jvp(lambda x: _call(name, x), (x,), (torch.ones_like(x),))[0]


def _by_functional_grad(name, x):
    def loss(x):
        out = _call(name, x)
        return out.sum(), out

    return torch.func.grad(loss, has_aux=True)(x)[1]


ROUTES = {
    "requires_grad": lambda name, x: _call(name, x.requires_grad_()).detach(),
    "forward mode": _by_jvp,
    "torch.func.jvp": _by_functional_jvp,
    "torch.func.grad": _by_functional_grad,
    "torch.func.grad of jvp": lambda name, x: torch.func.vjp(lambda x: _by_functional_jvp(name, x), x)[0],
    "functionalize": lambda name, x: torch.func.functionalize(lambda x: _call(name, x))(x),
    "subclass": lambda name, x: _call(name, x.as_subclass(Tagged)).as_subclass(torch.Tensor),
    "parameter": lambda name, x: _call(name, nn.Parameter(x)).detach(),
    "inference": lambda name, x: torch.inference_mode()(_call)(name, x).clone(),
    "autocast": lambda name, x: torch.autocast(x.device.type, torch.bfloat16)(_call)(name, x),
    "strides": lambda name, x: _call(name, x.t().contiguous().t()),
    "expanded": lambda name, x: _call(name, x[:, :1].expand(-1, 3)),
    "checkpoint": lambda name, x: checkpoint.checkpoint(_call, name, x, use_reentrant=False),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_one_mask(device, name, route):
    x = random_tensor((SAMPLES, 3), device=device)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = _kept(name, x, _call(name, x))
        torch.manual_seed(seed)
        out = ROUTES[route](name, x.clone())
        assert torch.equal(_kept(name, x[:, :1] if route == "expanded" else x, out), expected)
        assert 0 < int(expected.sum()) < SAMPLES


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_seed_gives_one_mask_whatever_the_dtype(device, dtype):
    """Of a nested tensor, and of a mixture of dtypes that no kernel knows, too."""
    x = torch.ones(SAMPLES, 3, dtype=dtype, device=device)
    torch.manual_seed(1)
    expected = draw_keep(torch.ones(SAMPLES, 1, device=device), 0.5)
    torch.manual_seed(1)
    assert torch.equal(kept_samples(drop_path(x, 0.5, True)), expected)
    torch.manual_seed(1)
    residual = torch.zeros(SAMPLES, 3, dtype=torch.float64, device=device)
    assert torch.equal(kept_samples(drop_path_add(x, residual, 0.5, True)), expected)
    torch.manual_seed(1)
    jagged = torch.nested.nested_tensor([row.expand(1 + i % 3, 3) for i, row in enumerate(x)], layout=torch.jagged)
    out = drop_path(jagged, 0.5, True)
    assert [bool(row.ne(0).any()) for row in out.unbind()] == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_in_forward_mode(device, name):
    host = seeded("cpu")
    generator = host if "bernoulli" in name else seeded(device)
    x = random_tensor((6, 3), torch.float64, device).requires_grad_()
    function = lambda x: _call(name, x, generator=generator.manual_seed(0))  # noqa: E731
    torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("options", [{"mode": "batch"}, {"keep": True}, {"keep": True, "dim": 1}])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "functionalize"])
def test_skipping_by_a_mask_inside_of_transforms(device, options, transform):
    """As outside of them, where the mask is no tensor of theirs."""
    x = random_tensor((6, 6), device=device)
    if "keep" in options:
        options = options | {"keep": torch.arange(6, device=device) % 2 == 0}

    def call(x):
        return stochastic_depth(x, torch.sin, 0.5, True, **options)

    torch.manual_seed(1)
    expected = call(x)
    torch.manual_seed(1)
    if transform == "grad":
        out = torch.func.grad(lambda x: call(x).sum())(x)
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(out, torch.autograd.grad(call(leaf).sum(), leaf)[0])
    elif transform == "jvp":
        assert torch.equal(torch.func.jvp(call, (x,), (x,))[0], expected)
    elif transform == "functionalize":
        assert torch.equal(torch.func.functionalize(call)(x), expected)
    else:
        out = torch.func.vmap(call, randomness="same")(x[None])[0]
        assert torch.equal(out, expected)


def test_a_mask_that_the_host_cannot_read():
    x, keep = torch.ones(4, 3), torch.ones(2, 4, dtype=torch.bool)
    sentence = "keep must have its values on the host"
    with pytest.raises(RuntimeError, match=sentence):
        torch.func.vmap(lambda keep: stochastic_depth(x, torch.neg, 0.5, True, keep=keep))(keep)
    with pytest.raises((RuntimeError, NotImplementedError), match=sentence):
        stochastic_depth(x, torch.neg, 0.5, True, keep=keep[0].to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=sentence):
        stochastic_depth(torch.ones(4, 3), torch.neg, 0.5, True, keep=torch.ones(4, dtype=torch.bool))


class Strict(torch.Tensor):
    """A subclass that refuses what is not torch's own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "").startswith("droppath_ext"):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_see_aten_ops(name):
    out = _call(name, torch.ones(8, 3).as_subclass(Strict))
    assert type(out) is Strict


@pytest.mark.parametrize("options", [{}, {"keep": True}, {"rate": True}, {"dim": 1}])
def test_traces_of_training_hold_aten_ops(options):
    """And take batches of other sizes."""

    def call(x, keep, p):
        p = p if "rate" in options else 0.5
        more = {"keep": keep} if "keep" in options else {"dim": options.get("dim", 0)}
        return drop_path(x, p, True, **more) + drop_path_add(x, x, p, True, **more)

    keep, p = torch.ones(4, dtype=torch.bool), torch.tensor(0.5)
    trace = torch.jit.trace(call, (torch.ones(4, 4), keep, p), check_trace=False)
    assert "droppath_ext::" not in str(trace.graph)
    outs = [trace(torch.ones(64, 64), torch.ones(64, dtype=torch.bool), p) for _ in range(2)]
    assert torch.equal(*outs) == ("keep" in options)


# --- torch.func.vmap, fake tensors, graphs of ATen ops ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_vmap_of_different_subsets(device, sampling):
    x = random_tensor((3, SAMPLES, 2), device=device)
    call = torch.func.vmap(
        lambda x: stochastic_depth(x, torch.neg, 0.5, True, sampling=sampling), randomness="different"
    )
    if sampling == "bernoulli":
        with pytest.raises(RuntimeError, match='use sampling="fixed"'):
            call(x)
    else:
        kept = (call(x) != x).any(2)
        assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors(name):
    with FakeTensorMode():
        x = torch.ones(8, 3)
        if name == "stochastic_depth bernoulli":
            with pytest.raises(
                RuntimeError, match='fake tensors, traces and transforms have no numbers: use sampling="fixed"'
            ):
                _call(name, x)
        else:
            assert _call(name, x).shape == (8, 3)


@pytest.mark.parametrize("trace", ["real", "fake", "symbolic", "linearize"])
@pytest.mark.parametrize("name", NAMES)
def test_graphs_of_aten_ops(name, trace):
    x = random_tensor((8, 3))

    def run():
        if trace != "linearize":
            return make_fx(lambda x: _call(name, x), tracing_mode=trace)(x)(x)
        return torch.func.linearize(lambda x: _call(name, x), x)[0]

    if name == "stochastic_depth bernoulli":
        with pytest.raises(
            RuntimeError, match='fake tensors, traces and transforms have no numbers: use sampling="fixed"'
        ):
            run()
    else:
        assert run().shape == (8, 3)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("function", [drop_path, lambda x, *args: drop_path_add(x, x, *args)])
def test_vmap_of_a_tensor_that_is_shared(device, function, randomness):
    """Whether rates are mapped or something else is; and draw_keep."""
    x, rates = torch.ones(64, 3, device=device), torch.full((4,), 0.5, device=device)
    for rate in (lambda p: 0.5, lambda p: p):
        outs = torch.func.vmap(lambda p, rate=rate: function(x, rate(p), True) + 0 * p, randomness=randomness)(rates)
        keep = torch.func.vmap(lambda p, rate=rate: draw_keep(x, rate(p)) & (p >= 0), randomness=randomness)(rates)
        for masks in ((outs != outs.min()).all(2), keep):
            assert masks.any(1).all()
            assert not masks.all(1).any()
            assert (masks != masks[0]).any() == (randomness == "different")


@pytest.mark.parametrize("trace", ["make_fx", "symbolic make_fx", "vmap"])
@pytest.mark.parametrize("name", NAMES)
def test_rates_that_are_recorded(name, trace):
    """A rate on the CPU has no value there: a graph reads it anew, a map has several."""
    x, rates = torch.ones(64, 3), torch.tensor([0.0, 1.0, 0.5])

    def call(x, rate):
        return _call(name, x, drop_prob=rate)

    def run():
        if trace == "vmap":
            return torch.func.vmap(call, in_dims=(None, 0), randomness="same")(x, rates)
        graph = make_fx(call, tracing_mode="symbolic" if trace.startswith("symbolic") else "real")(x, rates[2])
        return torch.stack([graph(x, rate) for rate in rates])

    if name.startswith("stochastic_depth"):
        with pytest.raises(TypeError, match=r"drop_prob of stochastic_depth must be a number, .* but got a tensor"):
            run()
    else:
        kept = (run() != _call(name, x, drop_prob=1.0)).all(2).sum(1).tolist()
        assert kept[:2] == [64, 0]
        assert 0 < kept[2] < 64


# --- checkpointing ---


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_generator_inside_a_checkpoint(device, name, use_reentrant):
    """It would draw another mask in the backward; keep= and the default generators do not."""
    x = random_tensor((SAMPLES, 3), device=device).requires_grad_()
    generator = seeded("cpu" if "bernoulli" in name else device)

    def run(**options):
        return checkpoint.checkpoint(lambda x: _call(name, x, **options), x, use_reentrant=use_reentrant)

    with pytest.raises(RuntimeError, match=r"generator must be None inside torch\.utils\.checkpoint"):
        run(generator=generator)
    with pytest.raises(RuntimeError, match=r"generator must be None inside torch\.utils\.checkpoint"):
        checkpoint.checkpoint(
            lambda x: drop_path(x, 0.5, True, keep=draw_keep(x, 0.5, generator=seeded(device))),
            x,
            use_reentrant=use_reentrant,
        )
    for options in ({}, {"keep": draw_keep(x, 0.5)}):
        out = run(**options)
        (gradient,) = torch.autograd.grad(out.sum(), x) if not use_reentrant else (_gradient(out, x),)
        kept = _kept(name, x, out)
        scale = 1 - SAMPLES / int(kept.sum()) if "fixed" in name and not options else -1.0
        expected = {"drop_path": (2.0, 0.0), "drop_path_add": (2.0, 0.0)}.get(name, (scale, 1.0))
        torch.testing.assert_close(gradient, torch.where(kept[:, None], *expected).expand_as(x))
    assert _call(name, x, generator=generator).shape == x.shape


def _gradient(out, x):
    x.grad = None
    out.sum().backward()
    return x.grad


# --- batch statistics in a skipped branch ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("as_method", [False, True])
def test_batch_norm_is_never_alone(device, sampling, as_method):
    """One kept sample of two: BatchNorm would refuse to take its statistics."""
    norm = nn.BatchNorm1d(3).to(device)
    branch = norm.forward if as_method else nn.Sequential(nn.Linear(3, 3), norm).to(device)
    x = random_tensor((2, 3), device=device).requires_grad_()
    for _ in range(30):
        out = stochastic_depth(x, branch, 0.5, True, sampling=sampling)
        out.sum().backward()
    assert norm.running_mean.isfinite().all()
    with pytest.raises(ValueError, match="more than 1 value"):  # a batch of one has no second
        for _ in range(30):
            stochastic_depth(x[:1], branch, 0.5, True, sampling=sampling)


@pytest.mark.parametrize("as_method", [False, True])
@pytest.mark.parametrize("options", [{}, {"sampling": "fixed"}, {"mode": "batch"}])
def test_a_stand_in_counts_for_nothing(device, options, as_method):
    """If all are dropped, running statistics stay as they were, the same tensors."""
    norm = nn.BatchNorm1d(3).to(device)
    before = {name: (buffer, buffer.clone()) for name, buffer in norm.named_buffers()}
    x = random_tensor((4, 3), device=device).requires_grad_()
    out = stochastic_depth(x, norm.forward if as_method else norm, 1.0, True, **options)
    assert torch.equal(out, x)
    for name, buffer in norm.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])
    gradients = torch.autograd.grad(out.sum(), list(norm.parameters()))
    assert all(gradient.eq(0).all() for gradient in gradients)


class _Decorated(nn.BatchNorm1d):
    @torch.autocast("cpu", enabled=False)
    def decorated(self, rows):
        return self(rows)


@pytest.mark.parametrize("kind", ["partial", "wrapped", "decorated", "scripted", "lazy", "no statistics"])
def test_other_kinds_of_batch_norm(kind):
    """None raises because one sample or none is kept."""
    norm = {
        "partial": nn.BatchNorm1d,
        "wrapped": nn.BatchNorm1d,
        "decorated": _Decorated,
        "scripted": lambda features: torch.jit.script(nn.BatchNorm2d(features)),
        "lazy": lambda features: nn.LazyBatchNorm1d(),
        "no statistics": lambda features: nn.BatchNorm1d(features, track_running_stats=False).eval(),
    }[kind](3)
    branch = norm
    if kind in ("partial", "wrapped"):
        branch = functools.partial(norm)
    if kind == "wrapped":
        branch = functools.wraps(branch)(lambda rows: norm(rows))
    if kind == "decorated":
        branch = norm.decorated
    x = random_tensor((2, 3, 4, 4) if kind == "scripted" else (2, 3))  # it is no BatchNorm of Python's
    assert torch.equal(stochastic_depth(x, branch, 1.0, True), x)
    if kind in ("partial", "wrapped", "decorated"):
        assert norm.num_batches_tracked == 0
    for _ in range(20):
        stochastic_depth(x, branch, 0.5, True)


def test_the_second_sample_has_its_gradient(device):
    """It changes the statistics of the first."""
    norm = nn.BatchNorm1d(3, affine=False).double().to(device)
    keep = torch.tensor([False, True, False, False], device=device)
    x = random_tensor((4, 3), torch.float64, device).requires_grad_()
    torch.autograd.gradcheck(
        lambda x: stochastic_depth(x, norm, 0.5, True, keep=keep), x, check_forward_ad=True, eps=1e-5, atol=1e-3
    )


def test_threads_put_buffers_aside_together():
    norm = nn.BatchNorm1d(3)
    before = dict(norm.named_buffers())

    together = threading.Barrier(3)

    def branch_of_one(x):
        together.wait(10)  # all of them are inside
        return norm(x)

    norm.branch_of_one = types.MethodType(lambda self, x: branch_of_one(x), norm)

    def work(_):
        for _ in range(20):
            stochastic_depth(torch.randn(4, 3), norm.branch_of_one, 1.0, True)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))  # raises what they raise
    assert all(buffer is before[name] for name, buffer in norm.named_buffers())
    assert norm.running_mean.eq(0).all()


def test_buffers_come_back_after_an_error():
    norm = nn.BatchNorm1d(3)
    mean = norm.running_mean

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            self.norm(x)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        stochastic_depth(torch.ones(4, 3), Fails(), 1.0, True)
    assert norm.running_mean is mean
    assert mean.eq(0).all()
