"""Promise: a converted model survives whatever PyTorch, timm and their users do with a model.

Converted code is told from the original by a spy on the original classes. Masks do not depend on the level: from one
seed, "keep", "fuse" and "skip" have equal results up to rounding.
"""

import contextlib
import copy
import functools
import pickle
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_bits, generator_state, random_tensor
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from droppath_ext import convert, restore

timm = pytest.importorskip("timm", reason="timm does not import", exc_type=ImportError)
from timm.layers import set_reentrant_ckpt  # noqa: E402
from timm.models._features import FeatureGetterNet, FeatureInfo, FeatureListNet  # noqa: E402
from timm.models._features_fx import FeatureGraphNet  # noqa: E402
from timm.models.convnext import ConvNeXt  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 0.1}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
CONVNEXT = {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16), "ls_init_value": 0.1}
MODELS = {
    "vit": functools.partial(VisionTransformer, num_classes=5, drop_path_rate=0.3, **VIT),
    "swin": functools.partial(SwinTransformer, num_classes=5, drop_path_rate=0.3, **SWIN),
    "convnext": functools.partial(ConvNeXt, num_classes=5, drop_path_rate=0.3, **CONVNEXT),
}
SIZES = {"vit": 16, "swin": 32, "convnext": 32}
SITES = {"vit": 4, "swin": 6, "convnext": 4}
BLOCKS = {"vit": "blocks.1", "swin": "layers.0.blocks.1", "convnext": "stages.1.blocks.0"}
NORMS = {"vit": "norm1", "swin": "norm1", "convnext": "norm"}
CHILDREN = {"vit": ("norm1", "attn", "mlp"), "swin": ("norm1", "attn", "mlp"), "convnext": ("conv_dw", "norm", "mlp")}
DROPS = {"vit": "drop_path1", "swin": "drop_path1", "convnext": "drop_path"}
SWALLOWED = [("vit", "drop_path1"), ("vit", "ls1"), ("vit", "ls2"), ("swin", "drop_path2"), ("convnext", "drop_path")]

each_kind = pytest.mark.parametrize("kind", MODELS)
each_level = pytest.mark.parametrize("level", ["fuse", "skip"])
every_level = pytest.mark.parametrize("level", ["keep", "fuse", "skip"])
each_swallowed = pytest.mark.parametrize(("kind", "name"), SWALLOWED)


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are tiny: threads would only wait for each other, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- models, steps, and what ran ---


def _plain(kind):
    """A model whose branches are about as large as what they are added to, and its images."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            elif "gamma" in name:
                p.uniform_(0.5, 1.5)
    return model, random_tensor((8, 3, SIZES[kind], SIZES[kind]))


def _convert(model, level, images, sites=None):
    """Converted throughout: no site is below the level."""
    report = convert(model, level, example=images, min_drop_prob=0.0)
    assert report.sites
    assert {site.level for site in report.sites} == {level}
    assert sites in (None, len(report.sites))
    return report


def _model(kind, level):
    """A converted model, its images, and an equal one whose drop paths alone are converted."""
    model, images = _plain(kind)
    twin = copy.deepcopy(model)
    _convert(model, level, images, SITES[kind])
    convert(twin, "keep")
    return model, images, twin


def _block(model, kind):
    return model.get_submodule(BLOCKS[kind])


def _converted(model):
    """The paths of all converted modules."""
    return [path for path, module in model.named_modules() if hasattr(type(module), "_droppath_ext_source")]


def _types(model):
    return {path: type(module) for path, module in model.named_modules()}


def _members(model):
    """What every module of a model has beside its tensors and children."""
    return {
        path: (type(module), set(module.__dict__), module.training, *map(dict, _hooks(module)))
        for path, module in model.named_modules()
    }


def _hooks(module):
    return (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._backward_hooks,
    )


@contextlib.contextmanager
def _originals_that_run(model):
    """The paths of the converted modules whose original forward ran."""
    paths = {model.get_submodule(path): path for path in _converted(model)}
    assert paths
    ran = []

    def spied(forward):
        @functools.wraps(forward)
        def spy(self, *args, **kwargs):
            if self in paths:
                ran.append(paths[self])
            return forward(self, *args, **kwargs)

        return spy

    with contextlib.ExitStack() as stack:
        for cls in {type(module)._droppath_ext_original for module in paths}:
            stack.enter_context(mock.patch.object(cls, "forward", spied(cls.forward)))
        yield ran


def _step(model, images, seed=1):
    """Output and all gradients of one training step from a seed. Modes are the caller's."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(images)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _converted_step(model, images, seed=1):
    """The same, of converted code alone."""
    with _originals_that_run(model) as ran:
        result = _step(model, images, seed)
    assert ran == []
    return result


def _assert_equal_steps(actual, expected):
    """Equal up to rounding; a sample dropped or kept by mistake is far off."""
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    assert list(actual[1]) == list(expected[1])
    for name, grad in expected[1].items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(actual[1][name], grad, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=lambda m: name + m)  # noqa: B023


def _evaluate(model, images):
    training = model.training
    with torch.no_grad():
        out = model.eval()(images)
    model.train(training)
    return out


# --- what every other test builds on ---


@each_kind
@each_level
def test_masks_do_not_depend_on_the_level(kind, level):
    model, images, twin = _model(kind, level)
    expected = _step(twin, images)
    _assert_equal_steps(_converted_step(model, images), expected)
    other = _step(twin, images, seed=2)
    assert (other[0] - expected[0]).abs().max() > 1e-2, "another seed drops other samples"


@each_kind
@every_level
def test_evaluation_and_restore(kind, level):
    model, images = _plain(kind)
    types, members, text, before = _types(model), _members(model), repr(model), _evaluate(model, images)
    step = _step(model, images)
    _convert(model, level, images, SITES[kind])
    assert _types(model) != types
    assert repr(model) == text
    assert all(isinstance(model.get_submodule(path), cls) for path, cls in types.items())
    assert_same_bits(_evaluate(model, images), before)
    _step(model, images)
    restore(model)
    assert _types(model) == types
    assert _members(model) == members
    assert_same_bits(_evaluate(model, images), before)
    again = _step(model, images)
    assert_same_bits(again[0], step[0])
    assert all(torch.equal(grad, step[1][name]) for name, grad in again[1].items())


@each_kind
def test_convert_twice(kind):
    model, images, twin = _model(kind, "skip")
    types = _types(_plain(kind)[0])
    expected = _step(twin, images)
    for level in ("fuse", "skip", "keep", "skip"):
        _convert(model, level, images, SITES[kind])
        assert {type(model.get_submodule(path))._droppath_ext_original for path in _converted(model)} <= {
            *types.values()
        }
        _assert_equal_steps(_step(model, images), expected)
    _converted_step(model, images)
    restore(model)
    assert _types(model) == types


# --- copies and files ---


@each_kind
@every_level
def test_deepcopy(kind, level):
    model, images, twin = _model(kind, level)
    types = _types(model)
    clone = copy.deepcopy(model)
    assert _types(clone) == types
    step = _converted_step if level != "keep" else _step
    _assert_equal_steps(step(clone, images), _step(twin, images))
    assert all(p.grad is not None for p in clone.parameters())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for p in clone.parameters():
            p.mul_(0.5)
    _assert_equal_steps(step(model, images), _step(twin, images))
    restore(clone)
    assert _converted(clone) == []
    assert _types(model) == types


@each_kind
@each_level
def test_model_ema(kind, level):
    model, images, _ = _model(kind, level)
    ema = ModelEmaV3(model, decay=0.5)
    assert _converted(ema.module) == _converted(model)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    _converted_step(model, images)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    ema.update(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ema.module.get_parameter(name), (old[name] + p) / 2)
    plain, _ = _plain(kind)
    plain.load_state_dict(ema.module.state_dict())
    assert_same_bits(ema(images), _evaluate(plain, images))


FRESH = """
import pickle, sys, torch
torch.set_num_threads(1)
folder = sys.argv[1]
with open(folder + "/models.pickle", "rb") as file:
    assert "droppath_ext" not in sys.modules
    models = {name + "-pickle": model for name, model in pickle.load(file).items()}
models |= {name + "-torch": m for name, m in torch.load(folder + "/models.pt", weights_only=False).items()}
images = torch.load(folder + "/images.pt")
results = {}
for name, model in models.items():
    converted = [path for path, m in model.named_modules() if hasattr(type(m), "_droppath_ext_source")]
    x = images[name.split("-")[0]]
    torch.manual_seed(1)
    trained = model(x)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        evaluated = again.eval()(x)
    import droppath_ext
    droppath_ext.restore(model)
    left = [path for path, m in model.named_modules() if hasattr(type(m), "_droppath_ext_source")]
    results[name] = converted, trained.detach(), evaluated, left
torch.save(results, folder + "/results.pt")
"""


@pytest.fixture(scope="module")
def fresh_results(tmp_path_factory):
    """What a process that has not seen convert() gets of pickled models."""
    folder = tmp_path_factory.mktemp("fresh")
    models, images = {}, {}
    for kind in MODELS:
        for level in ("keep", "fuse", "skip"):
            models[f"{kind}-{level}"], images[kind], _ = _model(kind, level)
    (folder / "models.pickle").write_bytes(pickle.dumps(models))
    torch.save(models, folder / "models.pt")
    torch.save(images, folder / "images.pt")
    process = subprocess.run([sys.executable, "-c", FRESH, folder], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return torch.load(folder / "results.pt")


@each_kind
@every_level
@pytest.mark.parametrize("format", ["pickle", "torch"])
def test_pickle_into_a_fresh_process(kind, level, format, fresh_results):
    model, images, _ = _model(kind, level)
    converted, trained, evaluated, left = fresh_results[f"{kind}-{level}-{format}"]
    assert converted == _converted(model)
    assert_same_bits(trained, _step(model, images)[0])
    assert_same_bits(evaluated, _evaluate(model, images))
    assert left == []


@each_kind
@every_level
def test_state_dict(kind, level):
    model, images, _ = _model(kind, level)
    torch.manual_seed(7)
    plain = MODELS[kind]()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    of_plain, of_model = _evaluate(plain, images), _evaluate(model, images)
    assert not torch.equal(of_plain, of_model)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(plain.state_dict())
    assert_same_bits(_evaluate(model, images), of_plain)
    plain.load_state_dict(saved)
    assert_same_bits(_evaluate(plain, images), of_model)


@each_kind
@each_level
def test_to_another_dtype(kind, level):
    model, images, twin = _model(kind, level)
    images = images.double()
    actual = _converted_step(model.to(torch.float64), images)
    assert actual[0].dtype is torch.float64
    _assert_equal_steps(actual, _step(twin.to(torch.float64), images))


# --- compilers and tracers ---


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _leave_nothing_to_chance(*models):
    """One branch is kept for all samples, the next one dropped for all. (What is compiled draws other masks.)"""
    for model in models:
        for i, drop in enumerate(_drops(model)):
            drop.drop_prob = (1e-12, 1.0)[i % 2]


@pytest.mark.parametrize(("kind", "backend"), [("vit", "aot_eager"), ("swin", "eager"), ("convnext", "eager")])
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_in_one_graph(kind, backend):
    model, images, twin = _model(kind, "fuse")
    _leave_nothing_to_chance(model, twin)
    graphs = []

    def compile_graph(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(model, backend=compile_graph, fullgraph=True)
    out = compiled(images)
    out.square().sum().backward()
    _assert_equal_steps((out.detach(), {n: p.grad for n, p in model.named_parameters()}), _step(twin, images))
    (graph,) = graphs
    traces = "".join(node.meta.get("stack_trace") or "" for node in graph.graph.nodes)
    assert f"<droppath_ext: {type(_block(model, kind)).__name__} " in traces


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_masks():
    """They follow the rate, and the seed."""
    model, images, _ = _model("convnext", "fuse")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(compiled(images).detach())
    assert_same_bits(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2], rtol=1e-2)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_skip():
    """In several graphs: the masks are drawn between them."""
    model, images, twin = _model("vit", "skip")
    compiled = torch.compile(model, backend="eager")
    torch.manual_seed(1)
    out = compiled(images)
    out.square().sum().backward()
    _assert_equal_steps((out.detach(), {n: p.grad for n, p in model.named_parameters()}), _step(twin, images))


@each_kind
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_fixed_numbers_of_samples(kind):
    """In one graph, for shapes do not depend on what is drawn."""
    model, images, _ = _model(kind, "keep")
    report = convert(model, "skip", example=images, min_drop_prob=0.0, sampling="fixed")
    assert report.count("skip") > 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outs = [compiled(images) for _ in range(3)]
    outs[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not torch.equal(outs[0], outs[1]) or not torch.equal(outs[1], outs[2])


@each_kind
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_evaluation(kind):
    model, images, _ = _model(kind, "skip")
    expected = _evaluate(model, images)
    with torch.no_grad():
        out = torch.compile(model.eval(), backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(out, expected)


@each_kind
@each_level
def test_export(kind, level):
    model, images, _ = _model(kind, level)
    program = torch.export.export(model.eval(), (images,))
    torch.testing.assert_close(program.module()(images), _evaluate(model, images))


@each_kind
@each_level
def test_jit(kind, level):
    model, images, _ = _model(kind, level)
    with pytest.raises(TypeError, match=r"^torch\.jit\.script cannot compile \w+ .*restore\(model\)[^.\n]*$"):
        torch.jit.script(model)
    expected = _evaluate(model, images)
    traced = torch.jit.trace(model.eval(), images, check_trace=False)
    torch.testing.assert_close(traced(images), expected)
    restore(model)
    if kind == "vit":
        torch.testing.assert_close(torch.jit.script(model.eval())(images), expected)


@each_kind
@each_level
def test_torchvision_feature_extractor(kind, level):
    model, images, _ = _model(kind, level)
    seen = []
    handle = _block(model, kind).register_forward_hook(lambda _, args, out: seen.append(out))
    expected = _evaluate(model, images)
    handle.remove()
    leaves = {"leaf_modules": timm.models.get_notrace_modules()}
    leaves["autowrap_functions"] = timm.models.get_notrace_functions()
    nodes = {BLOCKS[kind]: "block", "head" if kind == "vit" else "head.fc": "head"}
    extractor = create_feature_extractor(model.eval(), nodes, tracer_kwargs=leaves)
    with torch.no_grad():
        out = extractor.eval()(images)
    torch.testing.assert_close(out["head"], expected)
    torch.testing.assert_close(out["block"], seen[0])


# --- timm's extractors ---


@each_kind
@each_level
def test_forward_intermediates(kind, level):
    model, images, twin = _model(kind, level)
    results = []
    for each in (model, twin):
        torch.manual_seed(1)
        results.append(each.forward_intermediates(images))
    assert len(results[0][1]) > 1
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    with _originals_that_run(model) as ran:
        model.forward_intermediates(images)
    assert ran == []


EXTRACTORS = {
    "getter": lambda: (FeatureGetterNet(_plain("vit")[0], out_indices=(1, 2)), "vit"),
    "list": lambda: (FeatureListNet(_plain("convnext")[0], out_indices=(1, 3), flatten_sequential=True), "convnext"),
    "swin": lambda: (
        timm.create_model("swin_tiny_patch4_window7_224", features_only=True, drop_path_rate=0.3, **SWIN),
        "swin",
    ),
}


@each_level
@pytest.mark.parametrize("name", ["getter", "swin", "list"])
def test_features_only(name, level):
    model, kind = EXTRACTORS[name]()
    _, images = _plain(kind)
    twin = copy.deepcopy(model)
    evaluated = _evaluate_maps(model, images)
    _convert(model, level, images)
    convert(twin, "keep")
    for actual, expected in zip(_evaluate_maps(model, images), evaluated, strict=True):
        assert_same_bits(actual, expected)
    with _originals_that_run(model) as ran:
        actual = _seeded_maps(model, images)
    assert ran == []
    torch.testing.assert_close(actual, _seeded_maps(twin, images), rtol=1e-4, atol=1e-5)


def _evaluate_maps(model, images):
    with torch.no_grad():
        maps = list(model.eval()(images))
    model.train()
    return maps


def _seeded_maps(model, images):
    torch.manual_seed(1)
    return list(model(images))


@each_kind
@each_level
def test_feature_graph(kind, level):
    """A graph of a converted model: of its originals, whose drop paths are converted."""
    model, images, twin = _model(kind, level)
    model.feature_info = FeatureInfo([{"module": BLOCKS[kind], "num_chs": 8, "reduction": 1}] * 2, out_indices=(0,))
    graph = FeatureGraphNet(model, out_indices=(0,))
    seen = []
    _block(twin, kind).register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    _evaluate(twin, images)
    (evaluated,) = _evaluate_maps(graph, images)
    torch.testing.assert_close(evaluated, seen[0])
    torch.manual_seed(1)
    twin(images)
    (trained,) = _seeded_maps(graph, images)
    torch.testing.assert_close(trained, seen[1], rtol=1e-4, atol=1e-5)


# --- data-parallel ---


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@each_kind
@each_level
@pytest.mark.parametrize("order", ["convert first", "wrap first"])
@pytest.mark.usefixtures("_process_group")
def test_ddp(kind, level, order):
    model, images = _plain(kind)
    twin = copy.deepcopy(model)
    convert(twin, "keep")
    types = _types(model)
    if order == "convert first":
        _convert(model, level, images, SITES[kind])
        parallel = nn.parallel.DistributedDataParallel(model)
    else:
        parallel = nn.parallel.DistributedDataParallel(model)
        _convert(parallel, level, images, SITES[kind])
    out, _ = _converted_step(parallel, images)
    _assert_equal_steps((out, {n: p.grad for n, p in model.named_parameters()}), _step(twin, images))
    restore(parallel)
    assert _types(model) == types


def _shard(model, kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    name = type(_block(model, kind)).__name__
    blocks = [path for path, module in model.named_modules() if type(module).__name__ == name]
    for path in blocks:
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)


@each_kind
@each_level
@pytest.mark.parametrize("order", ["convert first", "shard first"])
@pytest.mark.usefixtures("_process_group")
def test_fsdp(kind, level, order):
    from torch.distributed.fsdp import FSDPModule

    model, images = _plain(kind)
    twin = copy.deepcopy(model)
    convert(twin, "keep")
    before = _evaluate(model, images)
    types = _types(model)
    if order == "convert first":
        _convert(model, level, images, SITES[kind])
        _shard(model, kind)
    else:
        _shard(model, kind)
        types = _types(model)
        _convert(model, level, images, SITES[kind])
    out, grads = _converted_step(model, images)
    _assert_equal_steps((out, {n: g.full_tensor() for n, g in grads.items()}), _step(twin, images))
    restore(model)
    assert _converted(model) == []
    assert isinstance(_block(model, kind), FSDPModule)
    if order == "shard first":
        assert _types(model) == types
    else:
        assert all(isinstance(model.get_submodule(path), cls) for path, cls in types.items())
    assert_same_bits(_evaluate(model, images), before)
    _step(model, images)  # FSDP's own methods still work
    assert all(p.grad is not None for p in model.parameters())


# --- checkpointing and functional calls ---


@each_kind
@each_level
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_set_grad_checkpointing(kind, level, use_reentrant):
    model, images, twin = _model(kind, level)
    expected = _step(twin, images)
    _assert_equal_steps(_converted_step(model, images), expected)
    model.set_grad_checkpointing()
    calls = []
    _block(model, kind).register_forward_pre_hook(lambda *_: calls.append(1))
    images = images.requires_grad_()  # what a reentrant checkpoint needs
    set_reentrant_ckpt(use_reentrant)
    try:
        actual = _converted_step(model, images)
    finally:
        set_reentrant_ckpt(False)
    assert len(calls) == 2
    _assert_equal_steps(actual, expected)


@each_kind
@each_level
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_of_a_block(kind, level, use_reentrant):
    model, images, _ = _model(kind, level)
    block = _block(model, kind)
    seen = []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    _step(model, images)
    handle.remove()

    def gradients(call):
        x = seen[0].clone().requires_grad_()
        block.zero_grad()
        torch.manual_seed(3)
        call(x).square().sum().backward()
        return [x.grad, *(p.grad for p in block.parameters())]

    with _originals_that_run(model) as ran:
        checkpointed = gradients(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert ran == []
    for actual, expected in zip(checkpointed, gradients(block), strict=True):
        assert_same_bits(actual, expected)


@each_kind
@each_level
def test_functional_call(kind, level):
    model, images, twin = _model(kind, level)
    weights = {name: (p.detach() * 1.5).requires_grad_() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    with _originals_that_run(model) as ran:
        out = torch.func.functional_call(model, weights, (images,))
    assert ran == []
    grads = torch.autograd.grad(out.square().sum(), list(weights.values()))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    _assert_equal_steps((out.detach(), dict(zip(weights, grads, strict=True))), _step(twin, images))
    assert all(p.grad is None for p in model.parameters())


# --- hooks ---


@each_kind
@each_level
def test_hooks_fire(kind, level):
    model, images, twin = _model(kind, level)
    block = _block(model, kind)
    modules = {name: block.get_submodule(name) for name in ("", *CHILDREN[kind])}
    fired = []
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, name=name: fired.append(("pre", name)))
        module.register_forward_hook(lambda _, args, out, name=name: fired.append(("forward", name)))
        module.register_full_backward_hook(lambda _, into, out, name=name: fired.append(("backward", name)))
        module.register_full_backward_pre_hook(lambda _, out, name=name: fired.append(("backward pre", name)))
    _assert_equal_steps(_converted_step(model, images), _step(twin, images))
    kinds = ("pre", "forward", "backward", "backward pre")
    assert sorted(fired) == sorted((kind, name) for kind in kinds for name in modules)


@each_kind
@each_level
def test_hooks_have_their_effect(kind, level):
    model, images, twin = _model(kind, level)
    plain = _step(twin, images)
    for each in (model, twin):
        block = _block(each, kind)
        block.register_forward_hook(lambda _, args, out: out * 1.25)
        block.get_submodule(NORMS[kind]).register_forward_hook(lambda _, args, out: out * 2)
        block.mlp.register_forward_pre_hook(lambda _, args: (args[0] + 0.5,))
        block.mlp.register_full_backward_hook(lambda _, into, out: (into[0] * 2,))
    expected = _step(twin, images)
    assert not torch.allclose(expected[0], plain[0], rtol=1e-2)
    _assert_equal_steps(_converted_step(model, images), expected)


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@each_swallowed
@each_level
def test_hooks_on_swallowed_modules(kind, name, level):
    _check_swallowed(kind, name, level, "register_forward_hook")


@pytest.mark.parametrize("name", ["drop_path1", "ls1"])
@pytest.mark.parametrize("register", HOOKS[1:])
def test_kinds_of_hooks_on_swallowed_modules(name, register):
    _check_swallowed("vit", name, "skip", register)


def _check_swallowed(kind, name, level, register):
    """Such a block runs its original forward, until the hook is removed."""
    model, images, twin = _model(kind, level)
    fired = []
    handle = getattr(_block(model, kind).get_submodule(name), register)(lambda *_: fired.append(1))
    with _originals_that_run(model) as ran:
        actual = _step(model, images)
    assert fired == [1]
    assert ran == [BLOCKS[kind]]
    _assert_equal_steps(actual, _step(twin, images))
    handle.remove()
    _converted_step(model, images)
    assert fired == [1]


@each_kind
@each_level
def test_global_hooks(kind, level):
    """A hook for all modules sees the swallowed ones."""
    model, images, twin = _model(kind, level)
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: called.append(module))
    try:
        actual = _step(model, images)
    finally:
        handle.remove()
    assert _block(model, kind).get_submodule(DROPS[kind]) in called
    _assert_equal_steps(actual, _step(twin, images))
    _converted_step(model, images)


@each_level
def test_hook_on_gamma(level):
    model, images, twin = _model("vit", level)
    for each in (model, twin):
        _block(each, "vit").ls1.gamma.register_hook(lambda grad: grad * 3)
    _assert_equal_steps(_converted_step(model, images), _step(twin, images))


# --- changed after conversion ---


def _drops(model):
    return [module for module in model.modules() if hasattr(module, "drop_prob")]


@each_kind
@each_level
def test_rates_are_read_at_call_time(kind, level):
    model, images, twin = _model(kind, level)
    for step, rate in enumerate((0.6, 0.05, 0.3)):
        for drop in (*_drops(model), *_drops(twin)):
            drop.drop_prob = rate
        _assert_equal_steps(_converted_step(model, images, seed=step), _step(twin, images, seed=step))
    for drop in _drops(model):
        drop.drop_prob = 0.0
    torch.testing.assert_close(_converted_step(model, images)[0], _evaluate(model, images), rtol=1e-4, atol=1e-5)


@each_kind
@every_level
def test_rate_of_one_leaves_the_residual(kind, level):
    model, images, _ = _model(kind, level)
    block = _block(model, kind)
    for drop in _drops(block):
        drop.drop_prob = 1.0
    seen = []
    block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    _, grads = _step(model, images)
    assert_same_bits(seen[0][1], seen[0][0])
    assert not any(grad.any() for name, grad in grads.items() if name.startswith(BLOCKS[kind] + "."))


@each_kind
@each_level
def test_scale_by_keep_is_read_at_call_time(kind, level):
    model, images, twin = _model(kind, level)
    before = _step(twin, images)[0]
    for drop in (*_drops(model), *_drops(twin)):
        drop.scale_by_keep = False
    expected = _step(twin, images)
    assert not torch.allclose(before, expected[0], rtol=1e-2)
    _assert_equal_steps(_converted_step(model, images), expected)


@each_kind
@each_level
def test_frozen_block(kind, level):
    model, images = _plain(kind)
    twin = copy.deepcopy(model)
    report = _convert(model, level, images)
    convert(twin, "keep")
    for each in (model, twin):
        _block(each, kind).eval()
    with _originals_that_run(model) as ran:
        actual = _step(model, images)
    assert ran == [BLOCKS[kind], *(path for path in ran if path.startswith(BLOCKS[kind] + "."))]
    assert not any(site.missed for site in report.sites)
    _assert_equal_steps(actual, _step(twin, images))


@each_kind
@each_level
def test_frozen_while_it_is_converted(kind, level):
    model, images = _plain(kind)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        _block(each, kind).eval()
    modes = [module.training for module in model.modules()]
    convert(model, level, example=images, min_drop_prob=0.0)
    assert [module.training for module in model.modules()] == modes
    convert(twin, "keep")
    _assert_equal_steps(_step(model, images), _step(twin, images))
    _assert_equal_steps(_step(model.train(), images), _step(twin.train(), images))


@each_kind
@each_level
def test_frozen_drop_path(kind, level):
    """Its branch is always kept."""
    model, images, twin = _model(kind, level)
    free = _step(twin, images)[0]
    for each in (model, twin):
        _block(each, kind).get_submodule(DROPS[kind]).eval()
    frozen = _step(twin, images)
    assert not torch.allclose(free, frozen[0], rtol=1e-2)
    _assert_equal_steps(_converted_step(model, images), frozen)


@each_kind
@each_level
@pytest.mark.parametrize("name", ["mlp", "norm"])
def test_frozen_child(kind, level, name):
    model, images, twin = _model(kind, level)
    for each in (model, twin):
        child = _block(each, kind).get_submodule(NORMS[kind] if name == "norm" else name)
        child.eval().requires_grad_(False)
    _assert_equal_steps(_converted_step(model, images), _step(twin, images))


@each_level
@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_gamma_replaced(kind, level):
    model, images, twin = _model(kind, level)
    before = _step(twin, images)[0]
    for each in (model, twin):
        block = _block(each, kind)
        (block.ls1 if kind == "vit" else block).gamma = nn.Parameter(random_tensor((len(_gamma(block)),), seed=5))
    expected = _step(twin, images)
    assert not torch.allclose(before, expected[0], rtol=1e-2)
    _assert_equal_steps(_converted_step(model, images), expected)


def _gamma(block):
    return block.ls1.gamma if hasattr(block, "ls1") else block.gamma


@each_level
def test_gamma_removed(level):
    """ConvNeXt's blocks ask whether they have one."""
    model, images, twin = _model("convnext", level)
    for each in (model, twin):
        _block(each, "convnext").gamma = None
    _assert_equal_steps(_step(model, images), _step(twin, images))


@each_swallowed
@each_level
def test_swallowed_module_replaced(kind, name, level):
    """By nn.Identity: the block runs its original forward."""
    model, images, twin = _model(kind, level)
    for each in (model, twin):
        _block(each, kind).set_submodule(name, nn.Identity())
    with _originals_that_run(model) as ran:
        actual = _step(model, images)
    assert ran[:1] == [BLOCKS[kind]]
    _assert_equal_steps(actual, _step(twin, images))


@each_kind
@each_level
def test_child_replaced(kind, level):
    model, images, twin = _model(kind, level)
    for each in (model, twin):
        block = _block(each, kind)
        block.mlp = nn.Sequential(block.mlp, nn.Tanh())
    _assert_equal_steps(_converted_step(model, images), _step(twin, images))


class _Double(nn.Module):
    def forward(self, weight):
        return weight * 2


@each_level
@pytest.mark.parametrize("path", ["mlp.fc1.weight", "ls1.gamma"])
def test_parametrization(path, level):
    model, images, twin = _model("vit", level)
    for each in (model, twin):
        owner, _, name = path.rpartition(".")
        parametrize.register_parametrization(_block(each, "vit").get_submodule(owner), name, _Double())
    _assert_equal_steps(_step(model, images), _step(twin, images))


@each_level
def test_parametrized_block(level):
    """Of a converted block, parametrize makes a class of its own; restore takes ours out of it."""
    model, images, twin = _model("convnext", level)
    types = _types(_plain("convnext")[0])
    for each in (model, twin):
        parametrize.register_parametrization(_block(each, "convnext"), "gamma", _Double())
    expected = _step(twin, images)
    _assert_equal_steps(_step(model, images), expected)
    restore(model)
    assert _converted(model) == []
    assert_same_bits(_evaluate(model, images), _evaluate(twin, images))
    parametrize.remove_parametrizations(_block(model, "convnext"), "gamma")
    assert _types(model) == types


@each_kind
@each_level
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_other_batch_sizes(kind, level, batch):
    model, _, twin = _model(kind, level)
    images = random_tensor((batch, 3, SIZES[kind], SIZES[kind]), seed=batch)
    _assert_equal_steps(_converted_step(model, images), _step(twin, images))


@each_kind
@each_level
def test_other_image_sizes(kind, level):
    model, images, twin = _model(kind, level)
    size = 2 * SIZES[kind]
    if kind != "convnext":
        for each in (model, twin):
            each.set_input_size((size, size))
    images = random_tensor((8, 3, size, size), seed=3)
    _assert_equal_steps(_step(model, images), _step(twin, images))


@each_level
def test_other_windows(level):
    """Swin's blocks keep sizes as numbers, which set_input_size changes."""
    model, images, twin = _model("swin", level)
    before = _step(twin, images)[0]
    for each in (model, twin):
        torch.manual_seed(5)
        each.set_input_size((32, 32), window_size=(2, 2))
    expected = _step(twin, images)
    assert not torch.allclose(before, expected[0], rtol=1e-2)
    _assert_equal_steps(_step(model, images), expected)


# --- threads ---


def test_two_threads():
    """Converted and trained at once. Rates that leave nothing to chance: the generator is everybody's."""

    def build(kind):
        model, images = _plain(kind)
        _leave_nothing_to_chance(model)
        return model, images

    def train(model, level, images):
        report = convert(model, level, example=images, min_drop_prob=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
        return report

    jobs = [("vit", "skip"), ("swin", "fuse"), ("vit", "fuse"), ("convnext", "skip")]
    expected = []
    for kind, level in jobs:
        model, images = build(kind)
        train(model, level, images)
        expected.append(_evaluate(model, images))
    models = [build(kind) for kind, _ in jobs]
    reports = {}
    barrier = threading.Barrier(len(jobs))

    def run(i):
        torch.set_num_threads(1)
        barrier.wait(60)
        reports[i] = train(models[i][0], jobs[i][1], models[i][1])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for i, (kind, level) in enumerate(jobs):
        assert [(site.level, site.missed) for site in reports[i].sites] == [(level, 0)] * SITES[kind]
        torch.testing.assert_close(_evaluate(*models[i]), expected[i], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(expected[i], _evaluate(*build(kind)), rtol=1e-2)


# --- errors ---


def _fails_at(count):
    seen = []

    def filter(path, module):
        seen.append(path)
        if len(seen) == count:
            raise RuntimeError("filter fails")
        return True

    return filter


FAILURES = {
    "filter": (RuntimeError, lambda images: {"filter": _fails_at(1)}),
    "filter, late": (RuntimeError, lambda images: {"filter": _fails_at(3), "example": images}),
    "example that does not fit": (Exception, lambda images: {"example": images[:, :2]}),
    "arguments that do not fit": (TypeError, lambda images: {"example": (images, 1, 2, 3, 4, 5)}),
    "no example": (TypeError, lambda images: {"example": "images"}),
    "strict": (ValueError, lambda images: {"example": images[:2], "strict": True}),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("before", [None, "keep", "fuse", "pending"])
def test_as_before_on_errors(failure, before):
    kind = "vit"
    error, arguments = FAILURES[failure]
    model, images = _plain(kind)
    _block(model, kind).register_forward_hook(lambda *_: None)
    _block(model, kind).mlp.eval()
    if before == "pending":
        convert(model, "fuse")
    elif before:
        convert(model, before, example=images)
    members, state, random = _members(model), copy.deepcopy(model.state_dict()), generator_state("cpu")
    with pytest.raises(error):
        convert(model, "skip", min_drop_prob=0.0, **arguments(images))
    assert _members(model) == members
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(generator_state("cpu"), random)
    _step(model, images)
    _step(model, images)
    converted_blocks = BLOCKS[kind] in _converted(model)
    assert converted_blocks == (before in ("fuse", "pending"))


# --- without an example ---


@each_kind
@each_level
def test_planned_in_the_first_training_call(kind, level):
    model, images = _plain(kind)
    members = _members(model)
    twin = copy.deepcopy(model)
    convert(twin, "keep")
    before = _evaluate(model, images)
    report = convert(model, level, min_drop_prob=0.0)
    assert_same_bits(_evaluate(model, images), before)
    assert not report.is_planned
    _assert_equal_steps(_step(model, images), _step(twin, images))
    assert report.is_planned
    assert [site.level for site in report.sites] == [level] * SITES[kind]
    assert_same_bits(_evaluate(model, images), before)
    _assert_equal_steps(_step(model, images, seed=2), _step(twin, images, seed=2))
    _assert_equal_steps(_converted_step(model, images, seed=3), _step(twin, images, seed=3))
    assert not any(map(len, _hooks(model)))
    restore(model)
    assert _members(model) == members


@each_kind
@each_level
@pytest.mark.parametrize("calls", [0, 1])
def test_restored_before_it_is_planned(kind, level, calls):
    model, images = _plain(kind)
    members = _members(model)
    convert(model, level)
    for _ in range(calls):
        _step(model, images)
    restore(model)
    assert _members(model) == members
    _step(model, images)
    _step(model, images)
    assert _members(model) == members


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@each_kind
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("calls", [0, 1])
def test_copied_before_it_is_planned(kind, how, calls):
    model, images = _plain(kind)
    twin = copy.deepcopy(model)
    convert(twin, "keep")
    report = convert(model, "skip", min_drop_prob=0.0)
    for _ in range(calls):
        _step(model, images)
    clone = COPIES[how](model)
    for seed in (1, 2):
        _assert_equal_steps(_step(clone, images, seed), _step(twin, images, seed))
    assert BLOCKS[kind] in _converted(clone)
    assert not any(map(len, _hooks(clone)))
    _converted_step(clone, images)
    assert report.is_planned == (calls > 0), "of the original"
    assert BLOCKS[kind] not in _converted(model)
    for seed in (1, 2):
        _assert_equal_steps(_step(model, images, seed), _step(twin, images, seed))
    _converted_step(model, images)


@each_kind
@each_level
def test_planned_under_grad_checkpointing(kind, level):
    model, images = _plain(kind)
    twin = copy.deepcopy(model)
    convert(twin, "keep")
    convert(model, level, min_drop_prob=0.0)
    model.set_grad_checkpointing()
    for seed in (1, 2, 3):
        _assert_equal_steps(_step(model, images, seed), _step(twin, images, seed))
    _converted_step(model, images)


@each_kind
def test_first_training_call_that_fails(kind):
    model, images = _plain(kind)
    report = convert(model, "fuse")
    with pytest.raises(Exception, match=r"\S"):
        model(images[:, :2])
    assert not report.is_planned
    _step(model, images)
    assert report.is_planned
    _step(model, images)
    _converted_step(model, images)
    assert not any(len(hooks) for module in model.modules() for hooks in _hooks(module))


# --- other libraries ---


@each_kind
@each_level
@pytest.mark.parametrize("where", ["", *("norm", "mlp", "drop")])
def test_accelerate_hooks(kind, level, where):
    """accelerate sets the forward of a module by hand."""
    hooks = pytest.importorskip("accelerate").hooks
    model, images, twin = _model(kind, level)
    name = {"norm": NORMS[kind], "drop": DROPS[kind]}.get(where, where)
    events = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            events.append("pre")
            return args, kwargs

        def post_forward(self, module, output):
            events.append("post")
            return output

    hooks.add_hook_to_module(_block(model, kind).get_submodule(name), Hook())
    with _originals_that_run(model) as ran:
        actual = _step(model, images)
    assert events == ["pre", "post"]
    assert ran == ([BLOCKS[kind]] if where == "drop" else [])
    _assert_equal_steps(actual, _step(twin, images))
    hooks.remove_hook_from_module(_block(model, kind).get_submodule(name))
    _assert_equal_steps(_step(model, images), _step(twin, images))


@each_kind
@each_level
def test_accelerate_hooks_before_conversion(kind, level):
    hooks = pytest.importorskip("accelerate").hooks
    model, images = _plain(kind)
    twin = copy.deepcopy(model)
    convert(twin, "keep")
    hooks.add_hook_to_module(_block(model, kind), hooks.AlignDevicesHook("cpu"))
    report = convert(model, level, example=images, min_drop_prob=0.0)
    assert {site.level for site in report.sites if site.block != BLOCKS[kind]} == {level}
    _assert_equal_steps(_step(model, images), _step(twin, images))
    restore(model)
    hooks.remove_hook_from_module(_block(model, kind))
    assert_same_bits(_evaluate(model, images), _evaluate(twin, images))


@each_level
def test_restore_under_accelerate_hooks(level):
    """What accelerate has kept of a converted module is its forward: restore must take that back, too."""
    hooks = pytest.importorskip("accelerate").hooks
    model, images = _plain("vit")
    twin = copy.deepcopy(model)
    _convert(model, level, images)
    hooks.add_hook_to_module(_block(model, "vit"), hooks.ModelHook())
    restore(model)
    actual, expected = _step(model, images), _step(twin, images)  # timm's own masks
    assert_same_bits(actual[0], expected[0])


def _transformer(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "dinov2":
        config = transformers.Dinov2Config(
            image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2,
            drop_path_rate=0.3, layerscale_value=0.1, num_labels=5,
        )  # fmt: skip
        return transformers.Dinov2ForImageClassification(config), random_tensor((8, 3, 16, 16))
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.3,
        num_labels=5,
    )  # fmt: skip
    return transformers.SwinForImageClassification(config), random_tensor((8, 3, 32, 32))


class _Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(pixel_values=images).logits


each_transformer = pytest.mark.parametrize("name", ["dinov2", "swin"])


@each_transformer
@each_level
def test_transformers_gradient_checkpointing(name, level):
    model, images = _transformer(name)
    model.train()
    twin = copy.deepcopy(model)
    report = convert(model, level, example={"pixel_values": images}, min_drop_prob=0.0)
    assert {site.level for site in report.sites} == {level}
    convert(twin, "keep")
    expected = _step(_Logits(twin), images)
    _assert_equal_steps(_converted_step(_Logits(model), images), expected)
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        actual = _converted_step(_Logits(model), images.clone().requires_grad_())
        _assert_equal_steps(actual, expected)


@each_transformer
@each_level
def test_transformers_save_pretrained(name, level, tmp_path):
    model, images = _transformer(name)
    before = _evaluate(_Logits(model), images)
    convert(model, level, example={"pixel_values": images}, min_drop_prob=0.0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert _converted(loaded) == []
    assert_same_bits(_evaluate(_Logits(loaded), images), before)
    assert_same_bits(_evaluate(_Logits(model), images), before)
