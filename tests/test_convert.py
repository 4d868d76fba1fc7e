"""Promise: convert() changes what a training forward costs, and nothing else; its report says what was done and why."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import droppath_ext
from droppath_ext import convert, drop_path_rates, restore, set_drop_path_rate

timm = pytest.importorskip("timm", exc_type=ImportError)
torchvision = pytest.importorskip("torchvision", exc_type=ImportError)


class OwnDropPath(nn.Module):
    """Written by hand, as many projects do."""

    def __init__(self, p):
        super().__init__()
        self.drop_prob = p

    def forward(self, features):
        if not self.training or self.drop_prob == 0.0:
            return features
        keep = 1 - self.drop_prob
        mask = features.new_empty((features.shape[0],) + (1,) * (features.ndim - 1)).bernoulli_(keep)
        return features / keep * mask


class OwnBlock(nn.Module):
    """A user's block: a projected shortcut, LayerScale as a parameter, and an `if` on shapes."""

    def __init__(self, inputs, outputs, p):
        super().__init__()
        self.norm = nn.GroupNorm(1, inputs)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)
        self.gamma = nn.Parameter(torch.full((outputs, 1, 1), 0.5))
        self.drop = OwnDropPath(p)

    def forward(self, x, *, pad=False):
        branch = self.conv(self.norm(x))
        if x.shape[1] != branch.shape[1] or pad:
            x = self.shortcut(x)
        return x + self.drop(self.gamma * branch)


def own_model(p=0.5):
    torch.manual_seed(0)
    return nn.Sequential(OwnBlock(4, 8, p), OwnBlock(8, 8, p)).double().train()


def images(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(model, x, seed=3):
    """The output and all gradients of one training step, drawn from this seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(x)
    torch.manual_seed(seed + 1)
    (out * torch.randn_like(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(actual, expected):
    """Up to rounding, by the largest gradient."""
    assert (actual[0] - expected[0]).abs().max() <= 1e-10 * expected[0].abs().max()
    assert actual[1].keys() == expected[1].keys()
    largest = max(float(grad.abs().max()) for grad in expected[1].values())
    for name, grad in expected[1].items():
        assert (actual[1][name] - grad).abs().max() <= 1e-10 * largest, name


def types(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("level", ["fuse", "skip"])
def test_own_block(level):
    """No code of ours in it: its own drop path, a shortcut, a parameter, control flow on shapes."""
    model, x = own_model(), images(6, 4, 8, 8)
    convert(model, "keep")
    expected = step(model, x)
    report = convert(model, level, example=x, min_drop_prob=0.0)
    assert [site.level for site in report.sites] == [level, level]
    assert_same_step(step(model, x), expected)
    assert sum(site.missed for site in report.sites) == 0


@pytest.mark.parametrize("level", ["keep", "fuse", "skip"])
def test_formula_of_own_block(level):
    """Each sample is the residual, or the residual and twice the branch."""
    model, x = own_model()[:1], images(64, 4, 4, 4)
    block = model[0]
    convert(model, level, example=x, min_drop_prob=0.0)
    with torch.no_grad():
        out = model(x)
        residual, branch = block.shortcut(x), block.gamma * block.conv(block.norm(x))
    dropped = torch.tensor([torch.allclose(a, b) for a, b in zip(out, residual, strict=True)])
    assert 0 < dropped.sum() < 64
    torch.testing.assert_close(out, residual + 2 * branch * ~dropped.view(-1, 1, 1, 1))


TIMM = [
    "test_vit", "test_vit2", "test_vit3", "test_vit_relpos", "test_convnext", "test_convnext2", "test_maxvit",
    "test_coatnet", "test_resnet", "test_mambaout", "test_byobnet", "test_vit4",
]  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name):
    """float64, the same masks: outputs and gradients of keep, fuse and skip agree, and the evaluation bit for bit."""
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=0.5).double().train()
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            module.p = 0.0
    for parameter in model.parameters():  # LayerScale and biases that are built as nothing
        if parameter.ndim == 1 and bool((parameter.abs() < 1e-3).all()):
            nn.init.normal_(parameter)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images(3, *model.default_cfg["input_size"])
    before = types(model)
    evaluation = model.eval()(x)
    steps = {}
    for level in ("keep", "fuse", "skip"):
        report = convert(model.train(), level, example=x, min_drop_prob=0.0)
        assert {site.level for site in report.sites} <= {"keep", "fuse", "skip"} and report.sites
        assert all(site.level == level or site.why for site in report.sites)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), (
            "planning left a trace"
        )
        steps[level] = step(model, x)
        assert sum(site.missed for site in report.sites) == 0
        model.load_state_dict(state)
        assert torch.equal(model.eval()(x), evaluation)
    assert_same_step(steps["fuse"], steps["keep"])
    assert_same_step(steps["skip"], steps["keep"])
    restore(model)
    assert types(model) == before


# --- what can be reached, on the meta device: by structure alone ---

REACHED = [
    ("vit_tiny_patch16_224", {"skip": 22}),
    ("vit_small_patch16_18x2_224", {"skip": 68}),  # stack(...).sum(0)
    ("swin_tiny_patch4_window7_224", {"skip": 22}),
    ("tiny_vit_5m_224", {"skip": 20, "fuse": 1}),  # control flow on shapes
    ("cait_xxs24_224", {"skip": 48}),
    ("efficientnet_b0", {"fuse": 9}),
    ("xcit_nano_12_p16_224", {"skip": 24, "fuse": 12}),
    ("mobilevit_xxs", {"skip": 18, "fuse": 2, "keep": 4}),
]


@pytest.mark.parametrize(("name", "levels"), REACHED)
def test_coverage(name, levels):
    with torch.device("meta"):
        model = timm.create_model(name, drop_path_rate=0.3).train()
        report = convert(model, "skip", example=torch.empty(3, *model.default_cfg["input_size"]))
    assert {level: report.count(level) for level in ("skip", "fuse", "keep") if report.count(level)} == levels
    assert all(site.why for site in report.sites if site.level != "skip")


def test_torchvision():
    with torch.device("meta"):
        for build, size in ((torchvision.models.swin_t, 224), (torchvision.models.convnext_tiny, 64)):
            model = build(weights=None).train()
            report = convert(model, "skip", example=torch.empty(3, 3, size, size))
            assert {site.level for site in report.sites} == {"skip"}


# --- which branches may be skipped ---


class Branch(nn.Module):
    """A block around any branch."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch
        self.drop_path = droppath_ext.DropPath(0.5)

    def forward(self, x):
        return x + self.drop_path(self.branch(x))


class Centre(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x - x.mean(0, keepdim=True))


class OfTheBatch(Centre):
    def forward(self, x):
        return self.linear(x) / x.shape[0]


class Counting(Centre):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


class InPlace(Centre):
    def forward(self, x):
        return self.linear(x.mul_(1.0))


MoE = type("MoE", (Centre,), {"forward": lambda self, x: self.linear(x)})


@pytest.mark.parametrize(
    ("branch", "why"),
    [
        (lambda: nn.BatchNorm1d(8), "BatchNorm1d in the branch takes its statistics of the whole batch"),
        (Centre, "mixes|depend on each other|left out"),
        (OfTheBatch, "left out"),
        (Counting, "changes the buffer"),
        (InPlace, "writes to its input"),
        (MoE, "MoE in the branch routes samples together"),
        (lambda: nn.MultiheadAttention(8, 2, batch_first=False), ""),
    ],
    ids=["batch norm", "mean", "batch size", "buffer", "in place", "router", "attention over samples"],
)
def test_branches_that_mix_samples_are_fused(branch, why):
    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = branch()

        def forward(self, x):
            if isinstance(self.inner, nn.MultiheadAttention):
                return self.inner(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]
            return self.inner(x)

    model = Branch(Call()).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = convert(model, "skip", example=torch.randn(6, 8), min_drop_prob=0.0)
    assert [site.level for site in report.sites] == ["fuse"]
    assert re.search(why, report.sites[0].why), report.sites[0].why
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "branch",
    [
        lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.5)),
        lambda: nn.BatchNorm1d(8).eval(),
        lambda: nn.GroupNorm(2, 8),
    ],
    ids=["dropout", "frozen batch norm", "group norm"],
)
def test_branches_that_treat_samples_by_themselves_are_skipped(branch):
    model = Branch(branch())  # not .train(): frozen parts stay frozen
    x = torch.randn(6, 8)
    rng = torch.get_rng_state()
    report = convert(model, "skip", example=x, min_drop_prob=0.0)
    assert [site.level for site in report.sites] == ["skip"], str(report)
    assert torch.equal(torch.get_rng_state(), rng)


class TwoNorms(nn.Module):
    """The gradient of a bias before BatchNorm is nothing but rounding errors, others in every run."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.3))
        self.drop1, self.drop2 = OwnDropPath(0.5), OwnDropPath(0.5)

    def forward(self, x):
        x = x + self.drop1(self.gamma * self.norm1(self.first(x)))
        return x + self.drop2(self.gamma * self.norm2(self.second(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_errors_do_not_count_as_a_difference(dtype):
    report = convert(TwoNorms().to(dtype), "fuse", example=torch.randn(4, 8, 8, 8, dtype=dtype))
    assert report.count("fuse") == 2, report


def test_batch_norm_that_is_unfrozen_later_is_not_skipped():
    model = Branch(nn.BatchNorm1d(8))
    model.branch.eval()
    report = convert(model, "skip", example=torch.randn(6, 8), min_drop_prob=0.0)
    model.train()
    model(torch.randn(6, 8))
    assert [(site.level, site.missed) for site in report.sites] == [("skip", 1)]


class KeepProbabilityDropPath(OwnDropPath):
    def forward(self, x):
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(self.drop_prob) / self.drop_prob


class FeatureDropPath(OwnDropPath):
    def forward(self, x):
        return x * x.new_empty(1, *x.shape[1:]).bernoulli_(0.5) * 2 if self.training else x


class ToldDropPath(OwnDropPath):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


@pytest.mark.parametrize("drop", [KeepProbabilityDropPath, FeatureDropPath, ToldDropPath])
def test_what_only_looks_like_a_drop_path_is_left_alone(drop):
    model = Branch(nn.Linear(8, 8)).train()
    model.drop_path = drop(0.5)
    assert convert(model, "fuse", example=torch.randn(6, 8)).sites == []
    assert type(model.drop_path) is drop


def test_batch_mode_is_fused():
    model = Branch(nn.Linear(8, 8)).train()
    model.drop_path = torchvision.ops.StochasticDepth(0.5, "batch")
    report = convert(model, "skip", example=torch.randn(6, 8), min_drop_prob=0.0)
    assert [(site.level, site.why) for site in report.sites] == [("fuse", "it drops the whole batch at once")]
    x = torch.randn(16, 8)
    kept = {bool((model(x) != x).any(1).all()) for _ in range(40)}
    parts = [(model(x) != x).any(1).float().mean().item() for _ in range(40)]
    assert kept == {True, False} and set(parts) == {0.0, 1.0}


def test_small_branches_are_not_skipped():
    """Skipping costs host time: without min_drop_prob the time of the branch decides."""
    report = convert(Branch(nn.Linear(8, 8)).train(), "skip", example=torch.randn(4, 8))
    assert report.sites[0].level in ("fuse", "skip")
    if report.sites[0].level == "fuse":
        assert "µs" in report.sites[0].why


@pytest.mark.parametrize(
    "drop_path", [droppath_ext.DropPath(0.5, sample_dim=-3), droppath_ext.DropPath(torch.tensor(0.5))]
)
def test_what_cannot_be_converted_is_left_and_named(drop_path):
    model = nn.Sequential(Branch(nn.Linear(3, 3))).train()
    model[0].drop_path = drop_path
    report = convert(model, "fuse", example=torch.randn(5, 4, 2, 3))
    assert report.sites == []
    assert "1 DropPath are left as they are (0.drop_path)" in str(report)
    assert "no drop path is active" not in str(report)


@pytest.mark.parametrize("drop_prob", [0.25, 0.5])
def test_fixed_numbers_of_samples(drop_prob):
    """Every call computes as many samples; set_drop_path_rate plans anew without forgetting it."""
    counts = []
    model = nn.Sequential(Branch(nn.Linear(8, 8)), Branch(nn.Linear(8, 8))).train()
    for block in model:
        block.branch.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    set_drop_path_rate(model, drop_prob, "uniform")
    convert(model, "skip", example=torch.randn(8, 8), min_drop_prob=0.0, sampling="fixed")
    counts.clear()
    for _ in range(5):
        model(torch.randn(8, 8)).sum().backward()
    assert counts == [round(8 * (1 - drop_prob))] * 10
    set_drop_path_rate(model, 0.75, "uniform")
    model(torch.randn(8, 8))
    counts.clear()
    model(torch.randn(8, 8))
    assert counts == [2, 2]


# --- the call ---


def test_filter_and_report():
    model, x = own_model(), images(4, 4, 8, 8)
    report = convert(model, "fuse", example=x, filter=lambda path, module: path.startswith("1."))
    assert [(site.path, site.level) for site in report.sites] == [("0.drop", "none"), ("1.drop", "fuse")]
    assert report.sites[1].block == "1" and report.sites[1].block_class == "OwnBlock"
    assert report.sites[1].drop_prob == 0.5
    text = str(report)
    assert "1 fuse" in text and "OwnBlock" in text and "left out by filter" in text


def test_strict_changes_nothing():
    model = Branch(nn.BatchNorm1d(8)).train()
    before = types(model)
    with pytest.raises(ValueError, match="drop_path does not reach 'skip' but 'fuse': BatchNorm1d"):
        convert(model, "skip", example=torch.randn(6, 8), strict=True)
    assert types(model) == before
    convert(model, "fuse", example=torch.randn(6, 8), strict=True)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((3,), {}, TypeError, "model must be an nn.Module, but got int"),
        ((nn.Linear(1, 1), "drop"), {}, ValueError, 'residual must be "keep", "fuse" or "skip", but got \'drop\''),
        ((nn.Linear(1, 1),), {"filter": 3}, TypeError, "filter must be callable, .* but got int"),
        ((nn.Linear(1, 1),), {"strict": True}, ValueError, "strict needs an example"),
        ((nn.Linear(1, 1),), {"example": 3}, TypeError, "example must be a tensor, a tuple .* but got int"),
        ((nn.Linear(1, 1),), {"sampling": "some"}, ValueError, 'sampling must be "bernoulli" or "fixed", but got'),
        ((nn.Linear(1, 1),), {"min_drop_prob": 2.0}, ValueError, r"min_drop_prob must be in \[0, 1\], but got 2.0"),
    ],
)
def test_bad_input(arguments, options, error, sentence):
    with pytest.raises(error, match=sentence):
        convert(*arguments, **options)


def test_restore_of_no_module():
    with pytest.raises(TypeError, match="^model must be an nn.Module, but got int$"):
        restore(3)


def test_nothing_to_convert():
    report = convert(nn.Linear(2, 2), "fuse", example=torch.randn(3, 2))
    assert report.sites == [] and "no calls of drop paths" in str(report)
    model = timm.create_model("test_vit", drop_path_rate=0.0)
    assert "set_drop_path_rate(model, rate)" in str(convert(model, "keep"))


def test_other_arguments_run_the_original():
    model, x = own_model(), images(4, 4, 8, 8)
    report = convert(model, "fuse", example=x)
    model[0](x, pad=True).sum().backward()
    assert [site.missed for site in report.sites] == [1, 0]
    assert "1 training calls had other arguments" in str(report)


# --- rates ---


def test_drop_path_rates():
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, [1, 3]) == drop_path_rates(0.3, 4)
    assert drop_path_rates(0.3, 3, "uniform") == [0.3, 0.3, 0.3]
    assert drop_path_rates(0.2, [1, 2, 1], "stagewise") == pytest.approx([0.0, 0.1, 0.1, 0.2])
    assert drop_path_rates(0.3, 0) == [] and drop_path_rates(0.3, 1) == [0.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((1.5, 3), r"rate must be a number in \[0, 1\], but got 1.5"),
        ((0.1, -1), "depth must be a number of blocks"),
        ((0.1, torch.tensor([2])), "depth must be a number of blocks"),
        ((0.1, iter([2])), "depth must be a number of blocks"),
        ((0.1, 3, "cosine"), "schedule must be"),
        ((0.1, 3, "stagewise"), "takes the blocks of each stage"),
    ],
)
def test_bad_rates(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        drop_path_rates(*arguments)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_maxvit"])
def test_set_drop_path_rate_builds_what_timm_builds(name):
    """From a model without drop paths to the rates of one that is built with them."""
    rates = lambda model: [getattr(m, "drop_prob", 0.0) for path, m in model.named_modules() if "drop_path" in path]  # noqa: E731
    expected = timm.create_model(name, drop_path_rate=0.3)
    model = timm.create_model(name, drop_path_rate=0.0)
    report = set_drop_path_rate(model, 0.3)
    assert rates(model) == pytest.approx(rates(expected))
    assert [site.drop_prob for site in report.sites] == pytest.approx(rates(expected))
    set_drop_path_rate(expected, 0.1, "uniform")
    assert set(rates(expected)) == {0.1}


def test_set_drop_path_rate_plans_anew():
    model = timm.create_model("test_vit", drop_path_rate=0.3).train()
    x = torch.randn(4, *model.default_cfg["input_size"])
    convert(model, "fuse", example=x)
    report = set_drop_path_rate(model, 0.5, "uniform")  # block 1 had nn.Identity
    assert not report.is_planned
    model(x)
    assert report.is_planned and report.count("fuse") == len(report.sites)
    assert {site.drop_prob for site in report.sites} == {0.5}
    model(x)
    set_drop_path_rate(model, 0.0)
    assert torch.equal(model(x), model(x))


def test_set_drop_path_rate_of_nothing():
    with pytest.raises(ValueError, match="model has no drop path"):
        set_drop_path_rate(nn.Linear(2, 2), 0.1)


# --- the command ---


def test_command():
    run = lambda *arguments: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "droppath_ext.convert", *arguments], capture_output=True, text=True, check=False
    )
    result = run("test_vit", "--drop-path-rate", "0.3", "--residual", "fuse")
    assert result.returncode == 0 and "convert to fuse: 10 fuse" in result.stdout, result.stderr
    result = run("no_such_model")
    assert result.returncode == 2 and "timm cannot build or run no_such_model" in result.stderr


def _on_meta(library, name, **settings):
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name, **settings), torch.empty(4, 3, 64, 64)
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(**settings)
        return getattr(transformers, f"{name}Model")(config), {"pixel_values": torch.empty(4, 3, 64, 64)}


@pytest.mark.parametrize(
    ("library", "name", "settings", "says"),
    [
        ("timm", "resnest14d", {"drop_path_rate": 0.2}, "upstream drops the block's input here, not a branch"),
        ("transformers", "Cvt", {"drop_path_rate": [0.1, 0.1, 0.2]}, "upstream drops more than a branch here"),
        ("transformers", "PoolFormer", {"drop_path_rate": 0.2}, "upstream has two drop paths in series"),
        (
            "transformers",
            "Swin2SR",
            {"drop_path_rate": 0.2},
            "upstream ignores drop_path_rate=0.2 of the model's config",
        ),
    ],
)
def test_report_names_what_upstream_does_otherwise(library, name, settings, says):
    model, example = _on_meta(library, name, **settings)
    with torch.device("meta"):
        assert says in str(convert(model, "fuse", example=example))
