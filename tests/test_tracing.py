"""Promise: torch.fx records one leaf; torch.jit gets ATen ops in evaluation, and draws anew or refuses in training."""

import operator
import subprocess
import sys

import pytest
import torch
from conftest import kept_samples, random_tensor
from torch import fx, nn

from droppath_ext import DropPath, DropPathAdd, StochasticDepth, drop_path, drop_path_add, stochastic_depth

# torch.jit says that it is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Model(nn.Module):
    """All three modules, one after the other."""

    def __init__(self, drop_prob=0.5):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop_path = DropPath(drop_prob)
        self.add = DropPathAdd(drop_prob, dim=4, init_values=0.5)
        self.add_alone = DropPathAdd(drop_prob, mode="batch")
        self.block = StochasticDepth(nn.Linear(4, 4), drop_prob, dim=4, init_values=0.5)

    def forward(self, x):
        y = self.add(self.drop_path(self.linear(x)), x)
        return self.block(self.add_alone(self.linear(y), y))


def _calls(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


# --- torch.fx ---


def test_a_model_in_training_is_leaves(device):
    model = Model().to(device).train()
    graph = fx.symbolic_trace(model)
    graph.graph.lint()
    assert _calls(graph) == [drop_path, drop_path_add, drop_path_add, stochastic_depth]
    x = random_tensor((64, 4), device=device)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = model(x)
        torch.manual_seed(seed)
        assert torch.equal(graph(x), expected), "the leaves draw, anew in every call"
    graph(x).sum().backward()
    assert set(dict(graph.named_parameters())) == set(dict(model.named_parameters()))
    assert all(parameter.grad is not None for parameter in graph.parameters())


def test_a_model_in_evaluation(device):
    model = Model().to(device).eval()
    graph = fx.symbolic_trace(model)
    assert _calls(graph) == [drop_path_add, drop_path_add, stochastic_depth], "drop_path is no call, as with timm"
    x = random_tensor((8, 4), device=device)
    assert torch.equal(graph(x), model(x))


def test_arguments_of_the_nodes():
    gamma = nn.Parameter(torch.ones(3))

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = gamma
            self.branch = nn.Linear(3, 3)

        def forward(self, x, y):
            a = drop_path(x, 0.1, True, False, mode="batch")
            b = drop_path_add(a, y, 0.2, False, gamma=self.gamma)
            return stochastic_depth(b, self.branch, 0.3, True, batched=(y,), sampling="fixed")

    nodes = {node.name: node for node in fx.symbolic_trace(Calls()).graph.nodes}
    x, y = nodes["x"], nodes["y"]
    a, b, c = (nodes[name] for name in ("drop_path", "drop_path_add", "stochastic_depth"))
    assert (a.args, a.kwargs) == ((x, 0.1, True, False), {"mode": "batch", "dim": 0, "keep": None, "generator": None})
    assert (b.args, b.kwargs["gamma"].target) == ((a, y, 0.2, False, True), "gamma")
    assert (c.args[1].op, c.args[1].target, c.args[2:]) == ("get_attr", "branch", (0.3, True, True))
    assert (c.kwargs["batched"], c.kwargs["sampling"]) == ((y,), "fixed")


@pytest.mark.parametrize("drop_prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", ["x", "residual", "gamma"])
def test_one_proxy_among_tensors_is_enough(which, drop_prob, training):
    tensors = {"x": torch.ones(4, 3), "residual": torch.ones(4, 3), "gamma": torch.ones(3)}

    class Call(nn.Module):
        def forward(self, proxy):
            return drop_path_add(**(tensors | {which: proxy}), drop_prob=drop_prob, training=training)

    graph = fx.symbolic_trace(Call())
    assert _calls(graph) == [drop_path_add]
    torch.manual_seed(3)
    expected = drop_path_add(**tensors, drop_prob=drop_prob, training=training)
    torch.manual_seed(3)
    assert torch.equal(graph(tensors[which]), expected)


@pytest.mark.parametrize(("drop_prob", "training"), [(0.0, True), (0.5, False)])
def test_nothing_to_drop_is_no_node(drop_prob, training):
    graph = fx.symbolic_trace(lambda x: drop_path(x, drop_prob, training) + 1)
    assert _calls(graph) == [operator.add]


def test_arguments_are_checked_while_tracing():
    with pytest.raises(ValueError, match=r"drop_prob must be in \[0, 1\], but got 1.5"):
        fx.symbolic_trace(lambda x: drop_path(x, 1.5, True))
    with pytest.raises(ValueError, match="mode must be"):
        fx.symbolic_trace(lambda x: drop_path_add(x, x, 0.5, True, mode="column"))
    with pytest.raises(TypeError, match="branch must be callable"):
        fx.symbolic_trace(lambda x: stochastic_depth(x, 3, 0.5, True))


def test_a_branch_that_is_no_submodule():
    """A graph cannot hold a function; the sentence says what it can."""

    def traced(branch):
        return fx.symbolic_trace(lambda x: stochastic_depth(x, branch, 0.5, True))

    for branch in (torch.sin, lambda rows: rows * 2, nn.Linear(3, 3)):
        with pytest.raises(TypeError, match=r"cannot record this call of stochastic_depth: .*Make branch one of these"):
            traced(branch)


def test_feature_extraction(device):
    """torchvision names the nodes by the module that calls."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction", exc_type=ImportError)
    model = Model().to(device)
    train, evaluation = extraction.get_graph_node_names(model)
    assert "drop_path.drop_path" in train
    assert "drop_path.drop_path" not in evaluation
    assert {"add.drop_path_add", "block.stochastic_depth"} <= set(train) & set(evaluation)
    extractor = extraction.create_feature_extractor(model, ["add.drop_path_add"])
    x = random_tensor((64, 4), device=device)
    torch.manual_seed(0)
    (out,) = extractor.train()(x).values()
    torch.manual_seed(0)
    assert torch.equal(out, model.add(model.drop_path(model.linear(x)), x))
    (out,) = extractor.eval()(x).values()
    assert torch.equal(out, model.eval().add(model.linear(x), x))


# --- torch.jit.trace ---


@pytest.mark.parametrize("call", [lambda x: drop_path(x, 0.5, True), lambda x: drop_path_add(x, x, 0.5, True)])
def test_jit_trace_of_training_draws_anew(device, call):
    x = torch.ones(64, 3, device=device)
    traced = torch.jit.trace(call, x, check_trace=False)
    masks = [kept_samples(traced(x) - call(x).min()) for _ in range(4)]
    assert len({tuple(mask.tolist()) for mask in masks}) > 1
    more = torch.ones(300, 3, device=device, requires_grad=True)
    out = traced(more)
    assert out.shape == more.shape
    (grad,) = torch.autograd.grad(out.sum(), more)
    assert torch.equal(grad, out.detach())


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed"])
def test_jit_trace_of_skipping_in_training_refuses(device, sampling):
    """Which samples are kept would be constants of the trace."""
    x = torch.ones(8, 3, device=device)
    with pytest.raises(RuntimeError, match="torch.jit.trace cannot record stochastic_depth in training"):
        torch.jit.trace(lambda t: stochastic_depth(t, torch.sin, 0.5, True, sampling=sampling), x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # pytest undoes the filter that the test below is of
def test_jit_trace_of_evaluation_is_aten(device):
    """So that it runs where this package is missing; for any number of samples."""
    model = Model().to(device).eval()
    x = random_tensor((4, 4), device=device)
    traced = torch.jit.trace(model, x)
    assert "droppath_ext::" not in str(traced.inlined_graph)
    for batch in (4, 9):
        x = random_tensor((batch, 4), device=device)
        torch.testing.assert_close(traced(x), model(x))


def test_jit_trace_of_evaluation_does_not_warn():
    """The checks compare shapes, of which torch.jit warns: in a fresh process, for pytest has filters of its own."""
    code = """
import torch
from droppath_ext import DropPathAdd, StochasticDepth
x = torch.ones(3, 4)
torch.jit.trace(DropPathAdd(0.5, dim=4, init_values=0.1).eval(), (x, x))
torch.jit.trace(StochasticDepth(torch.nn.Bilinear(4, 4, 4), 0.5, dim=4, init_values=0.1).eval(), (x, x))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert "TracerWarning" not in result.stderr


# --- torch.jit.script ---


class Scriptable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop_path = DropPath(0.5)
        self.add = DropPathAdd(0.5, dim=4, init_values=0.5)
        self.add_alone = DropPathAdd(0.5, mode="batch")

    def forward(self, x):
        y = self.add(self.drop_path(self.linear(x)), x)
        return self.add_alone(self.linear(y), y)


def test_script_in_evaluation(device):
    model = Scriptable().to(device).eval()
    x = random_tensor((8, 4), device=device)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_script_runs_without_the_package(tmp_path):
    torch.jit.script(Scriptable().eval()).save(tmp_path / "model.pt")
    code = "import sys, torch; torch.jit.load(sys.argv[1])(torch.ones(2, 4)); assert 'droppath_ext' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True, timeout=300)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_script_in_training_draws(device, mode):
    scripted = torch.jit.script(DropPath(0.5, mode=mode).train())
    x = random_tensor((64, 3), device=device).requires_grad_()
    seen = set()
    for _ in range(8):
        out = scripted(x)
        keep = kept_samples(out)
        seen.add(tuple(keep.tolist()))
        assert torch.equal(out, torch.where(keep[:, None], x * 2, 0.0))
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad, 2.0 * keep[:, None].expand(-1, 3))
    assert len(seen) > 1
    assert torch.equal(scripted.eval()(x), x)


def test_script_of_the_functions(device):
    """As a function of the user's calls them."""

    def block(x: torch.Tensor, gamma: torch.Tensor, training: bool):
        y = drop_path(x, 0.5, training, mode="row")
        return drop_path_add(y, x, 0.5, training, gamma=gamma)

    x, gamma = random_tensor((64, 3), device=device), random_tensor((3,), device=device, seed=1)
    scripted = torch.jit.script(block)
    torch.testing.assert_close(scripted(x, gamma, False), block(x, gamma, False))
    kept = (scripted(x, gamma, True) != x).any(1)
    assert 4 < kept.sum() < 32, "kept twice: one in four"


def test_script_checks_arguments():
    scripted = torch.jit.script(drop_path)
    x = torch.ones(2, 3)
    with pytest.raises(torch.jit.Error, match=r"drop_prob must be in \[0, 1\], but got 1.5"):
        scripted(x, 1.5)
    with pytest.raises(torch.jit.Error, match="drop_prob must be in"):
        scripted(x, float("nan"))
    with pytest.raises(torch.jit.Error, match="mode must be"):
        scripted(x, 0.5, True, mode="column")
    with pytest.raises(torch.jit.Error, match="x must be float16, bfloat16, float32 or float64"):
        scripted(x.long(), 0.5, True)
    added = torch.jit.script(drop_path_add)
    with pytest.raises(torch.jit.Error, match="residual must have the shape of x"):
        added(x, x[:1])
    for gamma in (torch.ones(2), torch.ones(2, 1, 1), torch.ones(5, 4, 3)):
        with pytest.raises(torch.jit.Error, match="gamma must broadcast along one dim of a sample"):
            added(x, x, gamma=gamma)


def test_script_of_skipping_refuses():
    for scripted in (StochasticDepth(nn.Linear(3, 3), 0.5), stochastic_depth, Model()):
        with pytest.raises(TypeError, match="torch.jit.script cannot compile stochastic_depth, whose branch is"):
            torch.jit.script(scripted)


def test_script_names_what_is_wrong_with_gamma():
    """As eager mode does; a gamma of one element fits."""
    scripted = torch.jit.script(drop_path_add)
    x = torch.ones(4, 3)
    with pytest.raises(Exception, match="gamma must broadcast along one dim of a sample"):
        scripted(x, x, 0.5, True, gamma=torch.ones(2))
    assert scripted(x, x, 0.0, True, gamma=torch.tensor(3.0)).eq(4.0).all()
