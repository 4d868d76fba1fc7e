"""Promise: torch.compile and torch.export take the functions whole, and stay random."""

import copy
import math
from itertools import product

import pytest
import torch
from conftest import (
    SAMPLINGS,
    TOLERANCES,
    add_dtype,
    add_inputs,
    added_samples,
    assert_positive_zero,
    assert_same_bits,
    case_id,
    exact_add,
    fixed_count,
    kept_samples,
    random_tensor,
    skip_formula,
    skip_scale,
    zero_dropped,
)
from op_cases import ADD, ADD_GAMMA, DROP_PATH, SKIP_BERNOULLI, SKIP_FIXED, SKIP_OPS
from torch._dynamo.testing import CompileCounterWithBackend

from droppath_ext import DropPath, DropPathAdd, StochasticDepth, drop_path, drop_path_add, stochastic_depth

# Inductor is what users get; the partitioner alone (no C++ compiler) is where duplicate random ops were merged.
BACKENDS = ["inductor", "aot_eager_decomp_partition"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _assert_formula(actual, source, keep, scale):
    expected = torch.where(keep.view(-1, *[1] * (source.dim() - 1)), source * scale, 0.0)
    torch.testing.assert_close(actual, expected, **TOLERANCES[source.dtype])
    assert_positive_zero(actual[~keep])


FLOATS = (torch.float32,) * 3
DTYPES_OF_OPS = [
    (DROP_PATH, (torch.float32, None, None)),
    (DROP_PATH, (torch.bfloat16, None, None)),
    (ADD, (torch.float32, torch.float32, None)),
    (ADD, (torch.bfloat16, torch.float32, None)),
    (ADD_GAMMA, FLOATS),
    (ADD_GAMMA, (torch.bfloat16, torch.bfloat16, torch.bfloat16)),
    (ADD_GAMMA, (torch.float16, torch.float16, torch.float32)),
]


def _assert_add(out, grads, inputs, grad, keep, scale):
    """Output and gradients by the formula, as near as Inductor's own rounding comes."""
    x, residual, gamma = (None if t is None else t.detach() for t in inputs)
    tolerance = TOLERANCES[out.dtype]
    assert out.dtype == add_dtype(x, residual, gamma)
    torch.testing.assert_close(out.double(), exact_add(x, residual, gamma, keep, scale)[0], **tolerance)
    assert_same_bits(out[~keep].detach(), residual[~keep].to(out.dtype))
    grad_x = zero_dropped(grad.double() * scale * (1 if gamma is None else gamma.double()), keep)
    torch.testing.assert_close(grads[0].double(), grad_x, **TOLERANCES[x.dtype])
    assert_same_bits(grads[1], grad.to(residual.dtype))
    if gamma is not None:
        terms = zero_dropped(grad.double() * x.double() * scale, keep)
        error = (grads[2].double() - terms.sum_to_size(gamma.shape)).abs()
        assert (error <= terms.abs().sum_to_size(gamma.shape) * TOLERANCES[gamma.dtype]["rtol"]).all()


def _assert_by_formula(op, out, grads, inputs, grad, keep, scale):
    x, *others = inputs
    if others:
        _assert_add(out, grads, [*inputs, None][:3], grad, keep, scale)
    else:
        _assert_formula(out.detach(), x.detach(), keep, scale)
        _assert_formula(grads[0], grad, keep, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "dtypes"), DTYPES_OF_OPS, ids=case_id)
def test_fullgraph_forward_and_backward(device, backend, op, dtypes):
    inputs = [t.requires_grad_() for t in op.make((64, 9), dtypes, device)]
    compiled = torch.compile(lambda *inputs: op(inputs), fullgraph=True, backend=backend)
    masks = set()
    for _ in range(3):
        out = compiled(*inputs)
        keep = op.keep(out, inputs)
        masks.add(tuple(keep.tolist()))
        grad = random_tensor(out.shape, out.dtype, device, seed=3)
        _assert_by_formula(op, out, torch.autograd.grad(out, inputs, grad), inputs, grad, keep, 2.0)
    assert len(masks) == 3
    assert all(10 < sum(mask) < 54 for mask in masks)


@pytest.mark.parametrize("op", [DROP_PATH, ADD, ADD_GAMMA])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_fullgraph_module(device, op, mode, scale_by_keep):
    """In training it draws anew each time; in eval it is the identity or adds, whatever was compiled before."""
    if op is DROP_PATH:
        module = DropPath(0.3, scale_by_keep, mode)
    else:
        module = DropPathAdd(0.3, scale_by_keep, mode, *((4, 0.5) if op.has_gamma else (None, None))).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
    arguments = [t.requires_grad_() for t in op.make((200, 4), FLOATS, device)[:2]]  # gamma is the module's
    inputs = [*arguments, *module.parameters()]
    scale = 1 / 0.7 if scale_by_keep else 1.0
    grad = random_tensor((200, 4), device=device, seed=3)
    shares = set()
    for _ in range(12):
        out = compiled(*arguments)
        keep = op.keep(out, arguments)
        shares.add(keep.float().mean().item())
        _assert_by_formula(op, out, torch.autograd.grad(out, inputs, grad), inputs, grad, keep, scale)
    assert shares == {0.0, 1.0} if mode == "batch" else all(0.5 < share < 0.9 for share in shares)
    module.eval()
    torch.testing.assert_close(compiled(*arguments), op(inputs, training=False))
    assert op is not DROP_PATH or torch.equal(compiled(*arguments), arguments[0])


# "bernoulli" breaks the graph where it draws, and Inductor would compile each part.
BACKENDS_OF_OPS = [*product((DROP_PATH, ADD, SKIP_FIXED), BACKENDS), (SKIP_BERNOULLI, BACKENDS[1])]


@pytest.mark.parametrize(("op", "backend"), BACKENDS_OF_OPS)
def test_two_calls_on_one_tensor_draw_twice(device, op, backend):
    """Common-subexpression elimination merges opaque random ops in compiled training (torch 2.11 and 2.13)."""
    inputs = [t.requires_grad_() for t in op.make((512, 2), FLOATS, device)]
    compiled = torch.compile(
        lambda *inputs: (op(inputs), op(inputs)), fullgraph=op is not SKIP_BERNOULLI, backend=backend
    )
    outs = compiled(*inputs)
    first, second = keeps = [op.keep(out, inputs) for out in outs]
    assert 180 < (first != second).sum() < 332, "two calls on the same tensor must draw two masks"
    plain = sum(op.formula(inputs, keep, 2.0) for keep in keeps)
    grads = (torch.autograd.grad(result.sum(), inputs) for result in (sum(outs), plain))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_a_residual_block_compiles_whole(device):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 6)
            self.drop_path = DropPath(0.5)

        def forward(self, x):
            x = x + self.drop_path(self.linear(x))
            return x + self.drop_path(self.linear(x))

    block = Block().to(device)
    x = random_tensor((128, 6), device=device)
    out = torch.compile(block, fullgraph=True)(x)
    once = x + 2 * block.linear(x)
    rows = torch.stack([x, once, x + 2 * block.linear(x), once + 2 * block.linear(once)])
    distance = (rows - out).detach().abs().amax(-1)
    assert (distance.amin(0) < 1e-4).all(), "each sample takes none, one or both of the branches"
    assert {0, 1, 3} <= set(distance.argmin(0).tolist())
    out.sum().backward()
    assert block.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("op", [DROP_PATH, ADD, SKIP_BERNOULLI, SKIP_FIXED])
def test_manual_seed_reproduces_under_compile(device, op):
    if op in SKIP_OPS:
        compiled = torch.compile(lambda *inputs: op(inputs), backend="aot_eager_decomp_partition")
    else:
        compiled = torch.compile(lambda *inputs: op(inputs), fullgraph=True)
    inputs = op.make((500, 2), FLOATS, device)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(op.keep(compiled(*inputs), inputs))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    ("op", "module"), [(DROP_PATH, DropPath(0.5)), (ADD_GAMMA, DropPathAdd(0.5, dim=5, init_values=0.5))]
)
def test_dynamic_batch_does_not_recompile(device, op, module):
    counter = CompileCounterWithBackend("aot_eager")
    module = copy.deepcopy(module).to(device)
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for batch in (64, 100, 37):
        arguments = op.make((batch, 5), FLOATS, device)[:2]
        arguments[0].requires_grad_()
        out = compiled(*arguments)
        keep = op.keep(out, arguments)
        assert 0 < keep.sum() < batch
        expected = op.formula([*arguments, *module.parameters()], keep, 2.0)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert_same_bits(out[~keep].detach(), op.dropped(arguments)[~keep].detach())
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@pytest.mark.parametrize("strict", [True, False])
def test_export(device, strict):
    """An exported training graph keeps drawing, for any batch size; an exported eval graph is the identity."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), DropPath(0.5)).to(device)
    batch = torch.export.Dim("batch", min=2, max=1024)
    args, shapes = (random_tensor((8, 3), device=device),), ({0: batch},)
    trained = torch.export.export(model.train(), args, dynamic_shapes=shapes, strict=strict).module()
    x = random_tensor((300, 3), device=device, seed=1)
    masks = []
    for _ in range(2):
        out = trained(x)
        masks.append(kept_samples(out))
        _assert_formula(out.detach(), model[0](x).detach(), masks[-1], 2.0)
    assert 80 < (masks[0] != masks[1]).sum() < 220
    evaluated = torch.export.export(model.eval(), args, dynamic_shapes=shapes, strict=strict).module()
    torch.testing.assert_close(evaluated(x), model[0](x))


ERRORS = {
    "drop_prob": (lambda x: drop_path(x, 1.5, True), r"drop_prob.*1\.5"),
    "residual": (lambda x: drop_path_add(x, x[:1], 0.5, True), r"residual.*\[1, 2\].*expand"),
    "gamma": (lambda x: drop_path_add(x, x, 0.5, True, gamma=x.new_ones(3)), r"gamma.*\[3\]"),
    "branch": (
        lambda x: stochastic_depth(x, lambda rows: rows[:, :1], 0.5, True, sampling="fixed"),
        r"output of branch.*\[1, 1\]",
    ),
    "gamma_of_stochastic_depth": (
        lambda x: stochastic_depth(x, torch.sin, 0.5, True, gamma=x.new_ones(3), sampling="fixed"),
        r"gamma.*\[3\]",
    ),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_errors_survive_compilation(device, wrong):
    function, message = ERRORS[wrong]
    compiled = torch.compile(function, backend="eager")
    with pytest.raises(Exception, match=message):
        compiled(torch.ones(2, 2, device=device))


# --- drop_path_add ---


@pytest.mark.parametrize("strict", [True, False])
def test_add_export(device, strict):
    """An exported training graph keeps drawing, for any batch size; an exported eval graph adds."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)
            self.add = DropPathAdd(0.5, dim=3, init_values=0.5)

        def forward(self, x):
            return self.add(self.linear(x), x)

    block = Block().to(device)
    batch = torch.export.Dim("batch", min=2, max=1024)
    args, shapes = (random_tensor((8, 3), device=device),), ({0: batch},)
    trained = torch.export.export(block.train(), args, dynamic_shapes=shapes, strict=strict).module()
    x = random_tensor((300, 3), device=device, seed=1)
    masks = []
    for _ in range(2):
        out = trained(x)
        masks.append(added_samples(out, x))
        expected, _ = exact_add(block.linear(x), x, block.add.gamma, masks[-1], 2.0)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert 80 < (masks[0] != masks[1]).sum() < 220
    evaluated = torch.export.export(block.eval(), args, dynamic_shapes=shapes, strict=strict).module()
    torch.testing.assert_close(evaluated(x), x + 0.5 * block.linear(x))


# --- stochastic_depth ---


def _mlp():
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.GELU(), torch.nn.Linear(12, 6))


def _assert_skip(out, leaves, x, branch, gamma, sampling, drop_prob=0.5, scale_by_keep=True, batched=()):
    """Output and gradients by the plain formula with the samples that the output shows. Returns the keep mask."""
    keep = added_samples(out, x)
    expected = skip_formula(x, branch(x, *batched), keep, skip_scale(len(x), drop_prob, sampling, scale_by_keep), gamma)
    tolerance = TOLERANCES[out.dtype]
    torch.testing.assert_close(out, expected, **tolerance)
    assert_same_bits(out[~keep].detach(), x[~keep].detach())
    grad = random_tensor(out.shape, out.dtype, out.device, seed=3)
    actual_grads = torch.autograd.grad(out, leaves, grad)
    for actual, plain in zip(actual_grads, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(actual, plain, **tolerance)
    return keep


@pytest.mark.parametrize(
    ("backend", "with_gamma"),
    [("inductor", True), ("aot_eager_decomp_partition", True), ("aot_eager_decomp_partition", False)],
)
def test_skip_fixed_fullgraph_forward_and_backward(device, backend, with_gamma):
    x = random_tensor((16, 5, 6), device=device).requires_grad_()
    bias = random_tensor((16, 1, 6), device=device, seed=5).requires_grad_()
    mlp = _mlp().to(device)
    gamma = random_tensor((6,), device=device, seed=2).requires_grad_() if with_gamma else None
    leaves = [t for t in (x, bias, gamma, *mlp.parameters()) if t is not None]

    def branch(rows, shift):
        return mlp(rows) * shift

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x, bias, gamma):
        return stochastic_depth(x, branch, 0.6, True, gamma=gamma, batched=(bias,), sampling="fixed")

    masks = set()
    for _ in range(4):
        keep = _assert_skip(compiled(x, bias, gamma), leaves, x, branch, gamma, "fixed", 0.6, batched=(bias,))
        assert keep.sum() == fixed_count(16, 0.6)
        masks.add(tuple(keep.tolist()))
    assert len(masks) > 1


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("dim", [None, 6])
@pytest.mark.parametrize("drop_prob", [0.05, 0.4, 1.0])
def test_skip_fixed_fullgraph_module(device, scale_by_keep, dim, drop_prob):
    """Also where so few or so many samples are dropped that all of them are kept, or none; and in eval."""
    module = StochasticDepth(_mlp(), drop_prob, scale_by_keep, dim, None if dim is None else 0.5, "fixed").to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
    x = random_tensor((8, 6), device=device).requires_grad_()
    leaves = [x, *module.parameters()]
    for _ in range(3):
        out = compiled(x)
        keep = _assert_skip(out, leaves, x, module.branch, module.gamma, "fixed", drop_prob, scale_by_keep)
        assert keep.sum() == {0.05: 8, 0.4: 5, 1.0: 0}[drop_prob]
    module.eval()
    y = module.branch(x)
    torch.testing.assert_close(compiled(x), x + (y if dim is None else 0.5 * y))


def test_skip_fixed_subsets_under_compile_are_uniform(device):
    """Each sample in its turn, over many calls of one graph."""
    compiled = torch.compile(
        lambda x: stochastic_depth(x, torch.ones_like, 0.7, True, sampling="fixed"), fullgraph=True, backend="aot_eager"
    )
    x = torch.zeros(10, 1, device=device)
    kept = sum(added_samples(compiled(x), x).long() for _ in range(1000))
    assert kept.sum() == 3000
    assert (kept - 300).abs().max() < 4.5 * (1000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("with_gamma", [False, True])
def test_skip_bernoulli_breaks_the_graph_once(device, with_gamma):
    """Where the number of kept samples is drawn on the host."""
    gamma = random_tensor((6,), device=device, seed=2) if with_gamma else None
    mlp = _mlp().to(device)

    def block(x):
        return stochastic_depth(x * 2, mlp, 0.5, True, gamma=gamma) * 3

    x = random_tensor((16, 5, 6), device=device)
    for function, calls in ((block, 1), (lambda x: block(block(x)), 2)):
        torch._dynamo.reset()
        reasons = torch._dynamo.explain(function)(x).break_reasons
        assert len(reasons) <= calls
        assert all("drawn on the host" in reason.reason for reason in reasons)


@pytest.mark.parametrize(("backend", "with_gamma"), [("inductor", True), ("aot_eager", True), ("aot_eager", False)])
def test_skip_bernoulli_does_not_recompile_for_each_count(device, backend, with_gamma):
    """The number of kept samples differs from call to call; the graphs behind the break are those of the first few."""
    counter = CompileCounterWithBackend(backend)
    module = StochasticDepth(_mlp(), 0.5, dim=6 if with_gamma else None, init_values=0.5 if with_gamma else None)
    compiled = torch.compile(module.to(device), backend=counter)
    x = random_tensor((32, 5, 6), device=device).requires_grad_()
    leaves = [x, *module.parameters()]
    counts, frames = set(), []
    for _ in range(20):
        keep = _assert_skip(compiled(x), leaves, x, module.branch, module.gamma, "bernoulli")
        counts.add(keep.sum().item())
        frames.append(counter.frame_count)
    assert len(counts) > 5
    assert frames[-1] <= 3
    assert frames[-1] == frames[4], "later calls compile nothing"


def test_skip_bernoulli_under_compile_with_a_schedule(device):
    """A linear schedule has another drop_prob in each block: the graphs are shared all the same."""
    counter = CompileCounterWithBackend("aot_eager")
    blocks = [StochasticDepth(_mlp(), 0.6 * i / 11) for i in range(12)]
    compiled = torch.compile(torch.nn.Sequential(*blocks).to(device), backend=counter)
    x = random_tensor((16, 5, 6), device=device)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(6):
            compiled(x).sum().backward()
    assert counter.frame_count < len(blocks)


def test_skip_bernoulli_under_compile_with_few_samples(device):
    """All kept, one kept and all dropped come in turns: sizes 0 and 1 are what dynamic shapes specialise on."""
    counter = CompileCounterWithBackend("aot_eager")
    module = StochasticDepth(_mlp(), 0.5).to(device)
    compiled = torch.compile(module, backend=counter)
    x = random_tensor((3, 6), device=device).requires_grad_()
    counts = set()
    for _ in range(40):
        keep = _assert_skip(compiled(x), [x, *module.parameters()], x, module.branch, None, "bernoulli")
        counts.add(keep.sum().item())
    assert counts == {0, 1, 2, 3}
    assert counter.frame_count <= 6


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_tensors_that_come_along_under_compile(device, sampling):
    """A mask of bools, and integers."""
    table = random_tensor((4, 6), device=device, seed=4).requires_grad_()

    def branch(rows, mask, label):
        return (rows * mask[..., None]).sin() + table[label][:, None]

    mask = (random_tensor((16, 5), seed=21) > 0).to(device)
    label = (torch.arange(16) % 4).to(device)
    compiled = torch.compile(
        lambda x: stochastic_depth(x, branch, 0.5, True, batched=(mask, label), sampling=sampling),
        fullgraph=sampling == "fixed",
        backend="aot_eager_decomp_partition",
    )
    x = random_tensor((16, 5, 6), device=device).requires_grad_()
    for _ in range(3):
        _assert_skip(compiled(x), [x, table], x, branch, None, sampling, batched=(mask, label))


def test_skip_fixed_dynamic_batch(device):
    """Another batch size may compile another graph; it gives the right number of samples."""
    compiled = torch.compile(StochasticDepth(torch.sin, 0.5, sampling="fixed"), fullgraph=True, backend="aot_eager")
    for batch in (64, 101, 37):
        x = random_tensor((batch, 5), device=device).requires_grad_()
        keep = _assert_skip(compiled(x), [x], x, torch.sin, None, "fixed")
        assert keep.sum() == fixed_count(batch, 0.5)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("strict", [True, False])
def test_skip_export_of_eval(device, sampling, strict):
    module = StochasticDepth(_mlp(), 0.5, dim=6, init_values=0.5, sampling=sampling).to(device).eval()
    batch = torch.export.Dim("batch", min=2, max=1024)
    exported = torch.export.export(
        module, (random_tensor((8, 6), device=device),), dynamic_shapes=({0: batch},), strict=strict
    ).module()
    x = random_tensor((300, 6), device=device, seed=1)
    torch.testing.assert_close(exported(x), x + 0.5 * module.branch(x))


@pytest.mark.parametrize("strict", [True, False])
def test_skip_export_of_fixed_training(device, strict):
    """The exported graph draws anew in each call."""
    module = StochasticDepth(_mlp(), 0.5, sampling="fixed").to(device).train()
    x = random_tensor((16, 6), device=device)
    exported = torch.export.export(module, (x,), strict=strict).module()
    masks = set()
    for _ in range(4):
        out = exported(x)
        keep = added_samples(out, x)
        assert keep.sum() == 8
        torch.testing.assert_close(out, skip_formula(x, module.branch(x), keep, 2.0))
        masks.add(tuple(keep.tolist()))
    assert len(masks) > 1


# --- compiled autograd: the backward of a graph that eager calls built ---


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["drop_path", "drop_path_add", "gamma", "bernoulli", "fixed"])
def test_compiled_autograd(device, backend, name):
    """The gradients of eager mode, also at a second call and where not every input needs one."""
    inputs = [t.requires_grad_() for t in add_inputs((8, 5), (torch.float32,) * 3, device)]

    def function(x, residual, gamma):
        torch.manual_seed(1)
        x, residual = x.sin(), residual.cos()  # so that the gradients have somewhere to go
        if name == "drop_path":
            return drop_path(x, 0.5, True) + residual
        if name in ("drop_path_add", "gamma"):
            return drop_path_add(x, residual, 0.5, True, gamma=gamma if name == "gamma" else None)
        x = stochastic_depth(x, torch.sin, 0.5, True, gamma=gamma, sampling=name)
        return stochastic_depth(x, torch.cos, 0.5, True, sampling=name) + residual

    grad = random_tensor((8, 5), device=device, seed=3)
    for needs in ((True, True, True), (False, True, True), (True, True, True)):
        leaves = [t.detach().requires_grad_(r) for t, r in zip(inputs, needs, strict=True)]
        function(*leaves).backward(grad)
        expected = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
            function(*leaves).backward(grad)
        for leaf, wanted in zip(leaves, expected, strict=True):
            assert (leaf.grad is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(leaf.grad, wanted)


# --- any number of rates, blocks and switches between training and evaluation shares two graphs ---

RATES = [i / 13 for i in range(1, 13)]
GAMMA = torch.full((6,), 0.5)
FUNCTIONS = {
    "drop_path": lambda x, p: drop_path(x, p, True),
    "drop_path, batch": lambda x, p: drop_path(x, p, True, mode="batch"),
    "drop_path_add": lambda x, p: drop_path_add(x, x.sin(), p, True),
    "drop_path_add, gamma": lambda x, p: drop_path_add(x, x.sin(), p, True, gamma=GAMMA.to(x.device)),
    "bernoulli": lambda x, p: stochastic_depth(x, torch.sin, p, True),
    "fixed": lambda x, p: stochastic_depth(x, torch.sin, p, True, sampling="fixed"),
}
MODULES = {
    "DropPath": lambda p: DropPath(p),
    "DropPathAdd": lambda p: DropPathAdd(p, dim=6, init_values=0.5),
    "bernoulli": lambda p: StochasticDepth(torch.sin, p),
    "fixed": lambda p: StochasticDepth(torch.sin, p, sampling="fixed"),
}


class Graphs:
    """Counts the graphs; one too many, and a fallback to eager, is an error."""

    def __init__(self):
        self.counter = CompileCounterWithBackend("aot_eager")
        self.after = []

    def compile(self, function, name, dynamic=None):
        return torch.compile(function, backend=self.counter, fullgraph=name != "bernoulli", dynamic=dynamic)

    def input(self, name, device):
        """For "fixed" few samples, so that there are few counts; for "bernoulli" many: one sample has its own graph."""
        return random_tensor((64 if name == "bernoulli" else 5, 6), device=device).requires_grad_()

    def check(self, name, counts):
        if name == "fixed":  # shapes are static: a graph for each number of samples
            assert self.counter.frame_count <= len(counts) + 1
        elif name == "bernoulli":  # it breaks the graph once: the parts are those of the first two rates
            assert self.after[-1] == self.after[1]
        else:
            assert self.counter.frame_count <= 2


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rates_share_graphs(device, name, dynamic):
    graphs = Graphs()
    function = graphs.compile(FUNCTIONS[name], name, dynamic)
    x = graphs.input(name, device)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for p in RATES:
            function(x, p).sum().backward()
            graphs.after.append(graphs.counter.frame_count)
    graphs.check(name, {fixed_count(5, p) for p in RATES})


@pytest.mark.parametrize("name", ["drop_path", "drop_path_add, gamma", "fixed"])
def test_a_shared_graph_keeps_as_many_as_its_rate_says(device, name):
    function = torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True)
    size = 8000 if name != "fixed" else 5
    x = random_tensor((size, 6), device=device)
    for p in (0.1, 0.7, 0.3, 0.5):
        out = function(x, p)
        base = torch.zeros_like(x) if name == "drop_path" else x if name == "fixed" else x.sin()
        kept = float((out != base).any(1).float().mean())
        expected = fixed_count(5, p) / 5 if name == "fixed" else 1 - p
        assert abs(kept - expected) < 0.03


@pytest.mark.parametrize("name", MODULES)
def test_blocks_compiled_one_by_one_share_graphs(device, name):
    graphs = Graphs()
    x = graphs.input(name, device)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for p in RATES:
            module = graphs.compile(MODULES[name](p).to(device), name)
            arguments = (x, x) if name == "DropPathAdd" else (x,)
            module(*arguments).sum().backward()
            graphs.after.append(graphs.counter.frame_count)
    graphs.check(name, {fixed_count(5, p) for p in RATES})


@pytest.mark.parametrize("name", MODULES)
def test_switches_between_training_and_evaluation_share_graphs(device, name):
    graphs = Graphs()
    module = MODULES[name](0.4).to(device)
    compiled = graphs.compile(module, name)
    x = graphs.input(name, device)
    arguments = (x, x) if name == "DropPathAdd" else (x,)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for i in range(20):
            module.train(i % 2 == 0)
            compiled(*arguments).sum().backward()
            graphs.after.append(graphs.counter.frame_count)
    assert graphs.after[-1] == graphs.after[1]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 37, 256])
def test_fixed_count_by_comparisons_is_that_by_rounding(size, monkeypatch):
    """Ties, too: they go to the even number."""
    from droppath_ext import sampling

    rates = (
        [i / 64 for i in range(65)] + [i / 100 for i in range(101)] + [1 - (i - 0.5) / size for i in range(1, size + 1)]
    )
    rates += [math.nextafter(p, end) for p in rates for end in (0.0, 1.0)]
    expected = [sampling.fixed_count(size, p) for p in rates]
    monkeypatch.setattr(sampling, "is_compiling", lambda: True)
    assert [sampling.fixed_count(size, p) for p in rates] == expected
