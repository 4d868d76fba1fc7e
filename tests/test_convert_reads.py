"""What the forward of a block reads and does beside its graph: nothing of it may be lost, or baked in for good."""

import copy
import enum
import functools
import random
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from test_convert import OwnDropPath, assert_same_step, images, step
from torch import nn

from droppath_ext import convert

CHANNELS = 4
FACTOR = 2.0
SETTINGS = {"factor": 2.0}


class Constants:
    factor = 2.0


@dataclass(frozen=True)
class Frozen:
    factor: float = 2.0


class Config:
    """Of values that are read through a property, and of configs in a config."""

    def __init__(self):
        self.factor = 2.0
        self.inner = Frozen()
        self.table = {"factor": 2.0}

    @property
    def halved(self):
        return self.factor / 2


class Doubled:
    def factor(self):
        return 2.0


class Halved:
    def factor(self):
        return 0.5


class DoubledModule(nn.Module, Doubled):
    pass


class HalvedModule(nn.Module, Halved):
    pass


class Number(float):
    pass


class Numbers(list):
    factor = 2.0


class Wrapped:
    """An object that answers for its dict."""

    def __init__(self):
        self.content = {"factor": 2.0}

    def __getattr__(self, name):
        return self.content[name]


def times(factor):
    return lambda: factor


def two():
    return 2.0


def four():
    return 4.0


CONFIG = Config()
Pair = namedtuple("Pair", "factor name")
Act = enum.Enum("Act", "RELU GELU")
ACT = Act.RELU
FUNCTION = two
FUNCTIONS = {"factor": two}


class Block(nn.Module):
    """x + drop(branch): what the branch is, is left to the cases."""

    def __init__(self, prepare=None, p=0.5):
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.inner = nn.Linear(CHANNELS, CHANNELS)
        self.outer = nn.Linear(CHANNELS, CHANNELS)
        self.drop = OwnDropPath(p)
        if prepare is not None:
            prepare(self)

    def branch(self, x):
        return self.outer(self.norm(x))


def block_of(forward, prepare=None):
    """A model of two blocks with this forward."""
    torch.manual_seed(0)
    cls = type("Block", (Block,), {"forward": forward, "__module__": __name__})
    return nn.Sequential(cls(prepare), cls(prepare)).double().train()


def put(path, value):
    """How a block gets an attribute: a copy of its own of the value."""

    def prepare(block):
        *parents, last = path.split(".")
        setattr(functools.reduce(getattr, parents, block), last, copy.deepcopy(value))

    return prepare


def put_class(name, value):
    return lambda block: setattr(type(block), name, value)


def assert_follows(forward, prepare, change, monkeypatch, expected_level=None):
    """Converted, and changed afterwards, the model does what it does where only its drop paths are converted."""
    x = images(6, 3, CHANNELS)
    for level in ("fuse", "skip"):
        model, kept = block_of(forward, prepare), block_of(forward, prepare)
        convert(kept, "keep")
        report = convert(model, level, example=x, min_drop_prob=0.0)
        if expected_level is not None:
            assert {site.level for site in report.sites} == {expected_level or level}, report
        assert_same_step(step(model, x), step(kept, x))
        with monkeypatch.context() as patch:
            for part in (*model, *kept):
                change(part, patch)
            assert_same_step(step(model, x), step(kept, x))


def setting(path, value):
    """A change of an attribute, or an item, that is reached from the block by a path."""

    def change(block, patch):
        *parents, last = path.split(".")
        owner = functools.reduce(getattr, parents, block)
        if isinstance(owner, dict):
            patch.setitem(owner, last, value)
        else:
            patch.setattr(owner, last, value, raising=False)

    return change


def forward_of(read):
    """The forward of a block whose branch is multiplied with what ``read`` finds."""

    def forward(self, x):
        return x + self.drop(self.branch(x) * read(self))

    return forward


def forward_if(read):
    """The forward of a block that goes another way where ``read`` finds less than 3."""

    def forward(self, x):
        y = self.branch(x)
        if read(self) < 3:
            y = self.inner(y)
        return x + self.drop(y)

    return forward


def one_part_more(block, patch):
    block.parts.append(nn.ReLU())


def put_buffer(block):
    block.register_buffer("b", torch.ones(2))


def parameter_in_its_place(block, patch):
    del block.factor
    block.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))  # equal, but trained


# What is read, how a block gets it, and how it changes.
READS = {
    "attribute": (lambda s: s.factor, put("factor", 2.0), setting("factor", 4.0)),
    "class attribute": (lambda s: s.fixed, put_class("fixed", 2.0), setting("fixed", 4.0)),
    "config": (lambda s: s.config.factor, put("config", Config()), setting("config.factor", 4.0)),
    "local": (lambda s: (lambda c: c.factor)(s.config), put("config", Config()), setting("config.factor", 4.0)),
    "getattr": (lambda s: getattr(s.config, "factor", 1), put("config", Config()), setting("config.factor", 4.0)),
    "property": (lambda s: s.config.halved, put("config", Config()), setting("config.factor", 8.0)),
    "nested": (lambda s: s.config.inner.factor, put("config", Config()), setting("config.inner", Frozen(4.0))),
    "inner dict": (lambda s: s.config.table["factor"], put("config", Config()), setting("config.table.factor", 4.0)),
    "frozen": (lambda s: s.config.factor, put("config", Frozen()), setting("config", Frozen(4.0))),
    "namespace": (lambda s: s.config.factor, put("config", SimpleNamespace(factor=2.0)), setting("config.factor", 4.0)),
    "named tuple": (lambda s: s.pair.factor, put("pair", Pair(2.0, "a")), setting("pair", Pair(4.0, "a"))),
    "dict": (lambda s: s.options["factor"], put("options", {"factor": 2.0}), setting("options.factor", 4.0)),
    "list": (lambda s: s.options[1], put("options", [1.0, 2.0]), setting("options", [1.0, 4.0])),
    "of a child": (lambda s: s.inner.factor, put("inner.factor", 2.0), setting("inner.factor", 4.0)),
    "mode of a child": (lambda s: 2.0 if s.inner.training else 4.0, None, setting("inner.training", False)),
    "mode of a drop path": (lambda s: 2.0 if s.drop.training else 4.0, None, setting("drop.training", False)),
    "hasattr": (lambda s: 4.0 if hasattr(s, "marked") else 2.0, None, setting("marked", True)),
    "constant": (lambda s: 2.0 if s.act is Act.RELU else 4.0, put("act", Act.RELU), setting("act", Act.GELU)),
    "dtype": (lambda s: 2.0 if s.kind is torch.half else 4.0, put("kind", torch.half), setting("kind", torch.double)),
    "modules": (lambda s: float(len(s.parts)), put("parts", nn.ModuleList([nn.ReLU()])), one_part_more),
    "class of an object": (lambda s: s.policy.factor(), put("policy", Doubled()), setting("policy", Halved())),
    "class of a child": (
        lambda s: s.policy.factor(),
        put("policy", DoubledModule()),
        setting("policy", HalvedModule()),
    ),
    "method": (lambda s: s.two(), put_class("two", lambda self: 2.0), setting("two", four)),
    "closure": (lambda s: s.fn(), lambda s: setattr(s, "fn", times(2.0)), setting("fn", times(4.0))),
    "shape of a buffer": (lambda s: s.b.numel(), put_buffer, setting("b", torch.ones(5))),
    "child that is not called": (
        lambda s: 2.0 if isinstance(s.part, nn.Tanh) else 4.0,
        put("part", nn.Tanh()),
        setting("part", nn.ReLU()),
    ),
    "children": (
        lambda s: float(len(list(s.inner.children()))),
        None,
        lambda s, _: s.inner.add_module("more", nn.Tanh()),
    ),
    "config that goes": (
        lambda s: 4.0 if s.config is None else s.config.factor,
        put("config", Config()),
        setting("config", None),
    ),
    "attribute that goes": (lambda s: getattr(s, "factor", 4.0), put("factor", 2.0), lambda s, _: delattr(s, "factor")),
    "parameter in its place": (lambda s: s.factor, put("factor", 2.0), parameter_in_its_place),
    "child that goes": (lambda s: 4.0 if s.part is None else 2.0, put("part", nn.Tanh()), setting("part", None)),
    "object with __getattr__": (
        lambda s: s.config.factor,
        lambda s: setattr(s, "config", Wrapped()),
        setting("config.content.factor", 4.0),
    ),
    "global constant": (
        lambda s: 2.0 if ACT is Act.RELU else 4.0,
        None,
        lambda s, patch: patch.setitem(globals(), "ACT", Act.GELU),
    ),
    "global function": (lambda s: FUNCTION(), None, lambda s, patch: patch.setitem(globals(), "FUNCTION", four)),
    "global functions": (
        lambda s: FUNCTIONS["factor"](),
        None,
        lambda s, patch: patch.setitem(FUNCTIONS, "factor", four),
    ),
    "global": (lambda s: FACTOR, None, lambda s, patch: patch.setitem(globals(), "FACTOR", 4.0)),
    "global dict": (lambda s: SETTINGS["factor"], None, lambda s, patch: patch.setitem(SETTINGS, "factor", 4.0)),
    "global class": (lambda s: Constants.factor, None, lambda s, patch: patch.setattr(Constants, "factor", 4.0)),
    "global object": (lambda s: CONFIG.factor, None, lambda s, patch: patch.setattr(CONFIG, "factor", 4.0)),
}  # fmt: skip


def put_numbers(block):
    block.list = Numbers([1.0])
    block.list.factor = 2.0


# Of these nothing is known but that they were read.
UNKNOWN = {
    "float of another kind": (lambda s: s.factor, put("factor", Number(2.0)), setting("factor", Number(4.0))),
    "list with an attribute": (lambda s: s.list.factor, put_numbers, setting("list.factor", 4.0)),
    "dict of the block": (lambda s: vars(s)["factor"], put("factor", 2.0), setting("factor", 4.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_may_change_unseen_keeps_the_block_as_it_is(name, monkeypatch):
    read, prepare, change = UNKNOWN[name]
    assert_follows(forward_of(read), prepare, change, monkeypatch, "keep")


def test_a_child_called_original():
    def forward(self, x):
        return x + self.drop(self.original(self.norm(x)))

    model, x = block_of(forward, put("original", nn.Linear(CHANNELS, CHANNELS))), images(6, 3, CHANNELS)
    model.double()
    expected = model.eval()(x)
    assert convert(model, "fuse", example=x).count("fuse") == 2
    assert torch.equal(model.eval()(x), expected)


def test_a_class_that_registers_its_subclasses_is_left_alone():
    known = {}

    class Registered(Block):
        def __init_subclass__(cls):
            known[cls.__name__] = cls

        def forward(self, x):
            return x + self.drop(self.branch(x)) * self.drop.drop_prob

    convert(Registered().double(), "fuse", example=images(6, 3, CHANNELS))
    assert known == {}


def test_a_profiler_goes_on():
    import cProfile

    profiler = cProfile.Profile()
    profiler.enable()
    report = convert(block_of(forward_of(lambda s: 2.0)), "fuse", example=images(6, 3, CHANNELS))
    two()
    profiler.disable()
    assert report.count("fuse") == 2
    assert any(entry.code is two.__code__ for entry in profiler.getstats())


@pytest.mark.parametrize("make", [forward_of, forward_if])
@pytest.mark.parametrize("name", READS)
def test_what_is_read_may_change(name, make, monkeypatch):
    read, prepare, change = READS[name]
    assert_follows(make(read), prepare, change, monkeypatch, "")


def test_modules_and_functions_may_change(monkeypatch):
    def forward(self, x):
        y = self.outer(self.act(self.first(self.norm(x))))
        return x + self.scale(self.drop(y if self.extra is None else self.extra(y)))

    def prepare(block):
        block.act, block.first, block.scale, block.extra = F.relu, nn.Identity(), nn.Identity(), None

    def scale(block, patch):
        block.scale = nn.Linear(CHANNELS, CHANNELS).double()
        nn.init.constant_(block.scale.weight, 0.5)
        nn.init.constant_(block.scale.bias, 0.5)

    changes = {
        "function": setting("act", F.gelu),
        "partial": setting("act", functools.partial(F.leaky_relu, negative_slope=0.5)),
        "identity": lambda s, m: setattr(s, "first", nn.Tanh()),
        "identity behind the drop path": scale,
        "none": lambda s, m: (s.__dict__.pop("extra"), setattr(s, "extra", nn.Tanh())),
    }
    for change in changes.values():
        assert_follows(forward, prepare, change, monkeypatch, "")


def test_parameter_none_later(monkeypatch):
    def forward(self, x):
        y = self.branch(x)
        return x + self.drop(y if self.gamma is None else y * self.gamma)

    def prepare(block):
        block.gamma = nn.Parameter(torch.full((CHANNELS,), 0.5))

    assert_follows(forward, prepare, lambda s, m: setattr(s, "gamma", None), monkeypatch, "")


def in_no_grad(self, x):
    with torch.no_grad():
        y = self.norm(x)
    return x + self.drop(self.outer(y))


@torch.no_grad()
def without_gradient(self, x):
    return self.norm(x)


def in_decorator(self, x):
    return x + self.drop(self.outer(without_gradient(self, x)))


def in_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.matmul(x.float(), self.outer.weight.float())
    return x + self.drop(y.double())


def in_set_grad_enabled(self, x):
    with torch.set_grad_enabled(not self.training):
        y = self.norm(x)
    return x + self.drop(self.outer(y))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def by_autograd_function(self, x):
    return x + self.drop(self.outer(Reversed.apply(self.norm(x))))


def by_checkpoint(self, x):
    return x + self.drop(torch.utils.checkpoint.checkpoint(self.branch, x, use_reentrant=False))


def by_chance(self, x):
    return x + self.drop(self.branch(x) * random.choice([0.5, 2.0]))


def by_chance_of_its_own(self, x):
    return x + self.drop(self.branch(x) * self.random.choice([0.5, 2.0]))


def by_rate(self, x):
    return x + self.drop(self.branch(x)) * (1 - self.drop.drop_prob)


def by_grad_mode(self, x):
    return x + self.drop(self.branch(x) * (2.0 if torch.is_grad_enabled() else 1.0))


def by_value(self, x):
    return x + self.drop(self.branch(x) * float(self.steps))


def by_condition_on_a_buffer(self, x):
    return x + self.drop(self.branch(x) * (2.0 if self.steps > 1 else 1.0))


def counts_in_a_buffer(self, x):
    self.steps += 1
    return x + self.drop(self.branch(x) * self.steps)


def rebinds_a_buffer(self, x):
    self.steps = self.steps + 1
    return x + self.drop(self.branch(x) * self.steps)


def averages_in_a_buffer(self, x):
    y = self.branch(x)
    self.steps.mul_(0.9).add_(y.detach().mean())
    return x + self.drop(y * self.steps)


def counts_in_an_attribute(self, x):
    self.calls += 1
    return x + self.drop(self.branch(x))


def counts_in_a_config(self, x):
    self.config.factor += 1
    return x + self.drop(self.branch(x) * self.config.factor)


def keeps_its_branch(self, x):
    self.kept.append(self.branch(x))
    return x + self.drop(self.kept[-1])


KEPT = []


def keeps_its_branch_globally(self, x):
    y = self.branch(x)
    KEPT.append(y)
    return x + self.drop(y)


def writes_between(self, x):
    y = self.branch(x)
    dropped = self.drop(y)
    y.mul_(3)
    return x + dropped


def writes_to_its_input(self, x):
    x += self.drop(self.branch(x.clone()))
    return x


def writes_to_an_alias(self, x):
    y = self.branch(x)
    flat = y.view(-1)
    flat += 1
    return x + self.drop(y)


def by_autocast(self, x):
    return x + self.drop(self.branch(x) * (1.0 if torch.is_autocast_cpu_enabled() else 2.0))


def by_numpy(self, x):
    return x + self.drop(self.branch(x) * (3.0 if numpy.random.rand() < 0.02 else 1.0))


def by_switch(self, x):
    y = self.norm(x)
    torch.set_grad_enabled(False)
    z = y.sin()
    torch.set_grad_enabled(True)
    return x + self.drop(self.outer(y + z) * 1e-6)


def is_tensor(self, x):
    return x + self.drop(self.branch(x * 2 if isinstance(x, torch.Tensor) else x))


DOES = [
    in_no_grad, in_decorator, in_autocast, in_set_grad_enabled, by_autograd_function, by_checkpoint, by_chance,
    by_chance_of_its_own, by_rate, by_grad_mode, by_value, by_condition_on_a_buffer, counts_in_a_buffer,
    rebinds_a_buffer, averages_in_a_buffer, counts_in_an_attribute, counts_in_a_config, keeps_its_branch,
    keeps_its_branch_globally, writes_between, writes_to_its_input,
    writes_to_an_alias, by_autocast, by_numpy, by_switch, is_tensor,
]  # fmt: skip


def prepare_all(block):
    block.register_buffer("steps", torch.ones(()))
    block.calls, block.kept, block.random, block.config = 0, [], random.Random(0), Config()


class Copied(nn.Module):
    """Hands a copy of its input on, which the blocks may write to."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        return self.blocks(x.clone())


@pytest.mark.parametrize("level", ["fuse", "skip"])
@pytest.mark.parametrize("forward", DOES, ids=lambda forward: forward.__name__)
def test_what_a_graph_does_not_show(forward, level):
    """Such a block keeps its forward, and says why; and planning has left no trace of its own."""
    models = [Copied(block_of(forward, prepare_all)) for _ in range(2)]
    x = images(6, 3, CHANNELS)
    for model, asked in zip(models, ("keep", level), strict=True):
        before = copy.deepcopy(model.state_dict())
        random.seed(1)
        chance = random.getstate()
        report = convert(model, asked, example=x, min_drop_prob=0.0)
        assert random.getstate() == chance
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    assert {site.level for site in report.sites} == {"keep"}, report
    assert all(site.why for site in report.sites)
    for block in (*models[0].blocks, *models[1].blocks):  # the example itself may have counted
        prepare_all(block.double())
    KEPT.clear()
    for seed in range(3):
        outcomes = []
        for model in models:
            random.seed(seed)
            numpy.random.seed(seed)
            outcomes.append(step(model, x, seed))
        assert_same_step(*outcomes[::-1])
    for kept, converted in zip(models[0].blocks, models[1].blocks, strict=True):
        assert kept.calls == converted.calls
        assert len(kept.kept) == len(converted.kept)
        assert kept.config.factor == converted.config.factor
        assert torch.equal(kept.steps, converted.steps)
    assert len(KEPT) in (0, 12)


def test_other_threads_are_not_recorded():
    """What another thread does while a block is traced is no matter of that block."""
    import threading

    stop, failures = threading.Event(), []

    def train_another():
        other = block_of(in_no_grad)
        while not stop.is_set():
            try:
                other(images(2, 3, CHANNELS)).sum().backward()
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=train_another)
    thread.start()
    try:
        for _ in range(5):
            report = convert(block_of(forward_of(lambda s: 2.0)), "fuse", example=images(6, 3, CHANNELS))
            assert report.count("fuse") == 2, report
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert "__getattribute__" not in nn.Module.__dict__


def test_arguments_with_another_number_of_samples():
    """A mask for each sample in the example, for all later, and the other way round."""

    def forward(self, x, mask):
        return x + self.drop(self.outer(self.norm(x)) * mask)

    each, every = images(6, 1, 1, seed=2), images(1, 1, 1, seed=3)
    x = images(6, 3, CHANNELS)
    for example, later in ((each, every), (every, each)):
        kept, model = block_of(forward)[0], block_of(forward)[0]
        convert(kept, "keep")
        report = convert(model, "skip", example=(x, example), min_drop_prob=0.0)
        assert report.count("skip") == 1
        for mask in (example, later):
            for converted in (kept, model):
                torch.manual_seed(5)
                converted.result = converted(x, mask)
            assert torch.allclose(model.result, kept.result, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("level", ["fuse", "skip"])
def test_odd_signatures(level):
    def positional_only(this, x, scale=2.0, /, *, shift=0.0):
        return x + this.drop(this.branch(x) * scale + shift)

    def any_number(self, *tensors, **options):
        return tensors[0] + self.drop(self.branch(tensors[0]))

    x = images(6, 3, CHANNELS)
    for forward in (positional_only, any_number):
        kept, model = block_of(forward), block_of(forward)
        convert(kept, "keep")
        report = convert(model, level, example=x, min_drop_prob=0.0)
        assert report.count(level) == 2, report
        assert_same_step(step(model, x), step(kept, x))


# --- names that would run as code, as those of a configuration from elsewhere might ---

RUN = 'getattr(__import__("sys"), "exit")("a name has run")'
NAMES = {
    "ends a string": f'a", None) or {RUN} or getattr(self, "b',
    "is escaped": f"\\' and {RUN}] #",
    "is an expression": f"training and {RUN}",
    "is an argument": f"a=1, **dict(b={RUN}), c",
}
PLACES = ("child", "parameter", "attribute", "key", "keyword")


class Projection(nn.Linear):
    def forward(self, x, **factors):
        return super().forward(x) * (sum(factors.values()) if factors else 1.0)


class Named(nn.Module):
    """Reads by names that it was given."""

    def __init__(self, **names):
        super().__init__()
        self.names = names
        self.children_by_name = nn.ModuleDict()
        self.children_by_name.add_module(names["child"], Projection(CHANNELS, CHANNELS))
        self.register_parameter(names["parameter"], nn.Parameter(torch.full((CHANNELS,), 0.5)))
        setattr(self, names["attribute"], 2.0)
        self.settings = {names["key"]: 3.0}
        self.drop = OwnDropPath(0.5)

    def forward(self, x):
        names = self.names
        child = self.children_by_name[names["child"]]
        y = child(x, **{names["keyword"]: 2.0}) * getattr(self, names["parameter"])
        return x + self.drop(y * getattr(self, names["attribute"]) * self.settings[names["key"]])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", ["fuse", "skip"])
def test_names_are_not_run(level, name, place):
    torch.manual_seed(0)
    kept = nn.Sequential(Named(**{**dict(zip(PLACES, PLACES, strict=True)), place: NAMES[name]})).double().train()
    model = copy.deepcopy(kept)
    x = images(6, 3, CHANNELS)
    convert(kept, "keep")
    convert(model, level, example=x, min_drop_prob=0.0)
    assert_same_step(step(model, x), step(kept, x))


def test_names_that_are_no_identifiers_are_fine():
    names = {"child": "it's 3x3", "parameter": "w-1", "attribute": "factor", "key": 'a "key"', "keyword": "factor"}
    model = nn.Sequential(Named(**names)).double().train()
    report = convert(model, "skip", example=images(6, 3, CHANNELS), min_drop_prob=0.0)
    assert report.count("skip") == 1, report
