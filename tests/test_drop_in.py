"""Promise: a drop-in for timm's function and module, and for torchvision's two modes."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import FUSED_ADD_DTYPES, TOLERANCES, add_inputs, assert_same_bits, dtypes_id, predict_keep, random_tensor

import droppath_ext
from droppath_ext import DropPath, DropPathAdd, drop_path, drop_path_add, patch_timm

try:
    import timm.layers.drop as timm_drop
    from timm.models.convnext import ConvNeXt
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer
except ImportError as error:
    timm_drop = None
    WITHOUT_TIMM = f"timm does not import: {error}"
else:
    WITHOUT_TIMM = ""

needs_timm = pytest.mark.skipif(timm_drop is None, reason=WITHOUT_TIMM)


def _efficientnet(**kwargs):
    import timm

    return timm.create_model("efficientnet_lite0", num_classes=5, **kwargs)


# Small enough for a CPU, each with another tensor layout in its residual branches: tokens, NHWC views, windows, NCHW.
MODELS = {
    "vit": lambda **kw: VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=5, **kw
    ),
    "vit_layer_scale": lambda **kw: VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5, init_values=0.1, **kw
    ),
    "convnext": lambda **kw: ConvNeXt(depths=(1, 2, 2, 1), dims=(8, 16, 24, 32), num_classes=5, **kw),
    "swin": lambda **kw: SwinTransformer(
        img_size=32, patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5, **kw
    ),
    "efficientnet": _efficientnet,
}


def _model_and_images(name, device, drop_path_rate=0.5):
    torch.manual_seed(0)
    model = MODELS[name](drop_path_rate=drop_path_rate).to(device)
    size = 32 if name in ("vit", "vit_layer_scale", "swin") else 64
    return model, random_tensor((8, 3, size, size), device=device)


def _step(model, images):
    """Output and all gradients of one training step."""
    model.zero_grad(set_to_none=True)
    out = model.train()(images)
    (out**2).mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _replay(monkeypatch, masks):
    """Let the original formulas run as they are, their bernoulli_ handing out these masks one after the other."""
    masks = iter(masks)
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p: self.copy_(next(masks).view_as(self)))
    return masks


@needs_timm
@pytest.mark.parametrize("name", MODELS)
def test_eval_output_is_the_same(name, device):
    model, images = _model_and_images(name, device)
    model.eval()
    with torch.no_grad():
        expected = model(images)
        with patch_timm():
            assert_same_bits(model(images), expected)


@needs_timm
@pytest.mark.parametrize("name", MODELS)
def test_training_is_timms_formula_given_our_mask(name, device, monkeypatch):
    model, images = _model_and_images(name, device)
    twin = copy.deepcopy(model)  # running statistics of one run must not leak into the other
    masks = []
    with patch_timm(), monkeypatch.context() as m:
        ours = timm_drop.drop_path

        def recording(x, drop_prob=0.0, training=False, scale_by_keep=True):
            masks.append(predict_keep(x, drop_prob))
            return ours(x, drop_prob, training, scale_by_keep)

        m.setattr(timm_drop, "drop_path", recording)
        actual = _step(model, images)
    assert len(masks) >= 3
    drawn = torch.stack(masks)
    assert drawn.any()
    assert not drawn.all()
    with monkeypatch.context() as m:
        left = _replay(m, masks)
        expected = _step(twin, images)
        assert next(left, None) is None, "timm must have drawn as often as we did"
    assert len(actual) == len(expected)
    for ours, timms in zip(actual, expected, strict=True):
        scale = timms.abs().max().clamp(min=1e-6)  # gradients span many orders of magnitude
        torch.testing.assert_close(ours / scale, timms / scale, rtol=1e-4, atol=1e-5)


@needs_timm
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_function_is_timms_given_our_mask(device, monkeypatch, dtype, drop_prob, scale_by_keep):
    x = random_tensor((64, 3, 5), dtype, device)
    keep = predict_keep(x, drop_prob)
    actual = drop_path(x, drop_prob, True, scale_by_keep)
    _replay(monkeypatch, [keep])
    expected = timm_drop.drop_path(x, drop_prob, True, scale_by_keep)
    torch.testing.assert_close(actual, expected, **TOLERANCES[dtype])


@needs_timm
def test_signatures_and_repr_are_timms():
    for ours, timms in ((drop_path, timm_drop.drop_path), (DropPath.__init__, timm_drop.DropPath.__init__)):
        theirs = list(inspect.signature(timms).parameters.values())
        mine = list(inspect.signature(ours).parameters.values())[: len(theirs)]
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in theirs]
    for rate in (0.0, 0.1, 1 / 3, 1.0):
        assert repr(DropPath(rate)) == repr(timm_drop.DropPath(rate))
        assert vars(DropPath(rate)).keys() >= vars(timm_drop.DropPath(rate)).keys()


@needs_timm
@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_state_dict_is_unaffected(name, device):
    model, images = _model_and_images(name, device)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with patch_timm():
        model.train()(images)
        fresh, _ = _model_and_images(name, device)
        fresh.load_state_dict(before, strict=True)
        patched = model.state_dict()
    assert list(patched) == list(before)
    assert all(torch.equal(patched[key], value) for key, value in before.items())


@needs_timm
def test_module_replaces_timms_module(device):
    """Swapping the modules by hand and patching the function are the same computation."""
    model, images = _model_and_images("vit", device)
    keys = list(model.state_dict())
    torch.manual_seed(5)
    with patch_timm():
        expected = _step(model, images)
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is timm_drop.DropPath:
                setattr(parent, name, DropPath(child.drop_prob, child.scale_by_keep))
                replaced += 1
    assert replaced >= 3
    assert list(model.state_dict()) == keys
    torch.manual_seed(5)
    for actual, same in zip(_step(model, images), expected, strict=True):
        torch.testing.assert_close(actual, same)


# --- patch_timm: what it patches and how it goes away ---


@needs_timm
def test_patch_covers_existing_and_new_models(monkeypatch):
    existing = timm_drop.DropPath(1.0)
    x = torch.full((2, 3), float("nan"))
    assert existing(x).isnan().all(), "timm's own 0 * NaN: the difference by which the patch is told from the original"
    with patch_timm():
        assert torch.equal(existing(x), torch.zeros(2, 3))
        assert torch.equal(timm_drop.DropPath(1.0)(x), torch.zeros(2, 3))
    assert existing(x).isnan().all()


@needs_timm
def test_permanent_patch_and_undo():
    original = timm_drop.drop_path
    handle = patch_timm()
    try:
        assert timm_drop.drop_path is not original
    finally:
        handle.undo()
    assert timm_drop.drop_path is original
    handle.undo()  # once more does no harm
    assert timm_drop.drop_path is original


@needs_timm
def test_a_module_of_timm_that_is_imported_under_the_patch_gets_its_own_back():
    """timm.models.layers copies the functions of timm.layers, when it is first imported."""
    lines = [
        "import warnings; warnings.simplefilter('ignore')",
        "import timm.layers.drop, droppath_ext",
        "own = timm.layers.drop.drop_path",
        "patch = droppath_ext.patch_timm()",
        "from timm.models import layers",
        "assert layers.drop_path is not own",
        "patch.undo()",
        "assert layers.drop_path is own and timm.layers.drop.drop_path is own",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@needs_timm
@pytest.mark.parametrize("order", ["first_in_last_out", "first_in_first_out"])
def test_nested_patches(order):
    original = timm_drop.drop_path
    handles = [patch_timm(), patch_timm()]
    patched = timm_drop.drop_path
    if order == "first_in_last_out":
        handles.reverse()
    handles[0].undo()
    assert timm_drop.drop_path is patched, "one patch is still in force"
    handles[0].undo()
    assert timm_drop.drop_path is patched, "a second undo of one handle must not undo the other"
    handles[1].undo()
    assert timm_drop.drop_path is original


@needs_timm
def test_context_inside_a_permanent_patch():
    original = timm_drop.drop_path
    handle = patch_timm()
    with patch_timm():
        assert timm_drop.drop_path is not original
    assert timm_drop.drop_path is not original
    handle.undo()
    assert timm_drop.drop_path is original


@needs_timm
def test_patch_is_undone_by_an_exception():
    original = timm_drop.drop_path
    with pytest.raises(KeyError), patch_timm():
        raise KeyError
    assert timm_drop.drop_path is original


@needs_timm
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_script_under_the_patch_is_timms_own(training):
    """And compiles after it: what torch.jit.script has made of a timm module it keeps."""
    module = timm_drop.DropPath(1.0).train(training)
    x = torch.full((2, 3), float("nan"))
    with patch_timm():
        scripted = torch.jit.script(module)
    assert scripted(x).isnan().all(), "timm's 0 * NaN"
    assert torch.jit.script(module)(x).isnan().all()
    with patch_timm():
        assert torch.jit.script(timm_drop.drop_path)(x, 1.0, True).isnan().all()
        assert timm_drop.drop_path(x, 1.0, True).eq(0).all()


@needs_timm
def test_fx_under_the_patch():
    """One leaf for each site, drawing anew; none in evaluation, as without the patch."""
    model, images = _model_and_images("vit", torch.device("cpu"))
    with patch_timm():
        graph = torch.fx.symbolic_trace(model.train())
        sites = [node for node in graph.graph.nodes if node.target is drop_path]
        assert len(sites) == sum(isinstance(module, timm_drop.DropPath) for module in model.modules()) >= 3
        torch.manual_seed(1)
        expected = model(images)
        torch.manual_seed(1)
        assert_same_bits(graph(images), expected)
        evaluated = torch.fx.symbolic_trace(model.eval())
    original = torch.fx.symbolic_trace(model)
    assert evaluated.code == original.code


@needs_timm
def test_patched_function_is_drop_path():
    with patch_timm():
        patched = timm_drop.drop_path
        assert patched.__code__ is drop_path.__code__, "no call on top of it"
        assert inspect.signature(patched) == inspect.signature(drop_path)


# --- torchvision ---


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [0.2, 0.5, 1.0])
def test_modes_are_torchvisions_given_our_mask(device, monkeypatch, mode, drop_prob):
    ops = pytest.importorskip("torchvision.ops", reason="torchvision does not import", exc_type=ImportError)
    x = random_tensor((32, 3, 4, 4), device=device)
    for _ in range(5):
        keep = predict_keep(x, drop_prob, mode)
        actual = droppath_ext.drop_path(x, drop_prob, training=True, mode=mode)
        with monkeypatch.context() as m:
            _replay(m, [keep])
            expected = ops.stochastic_depth(x, drop_prob, mode, training=True)
        torch.testing.assert_close(actual, expected, **TOLERANCES[torch.float32])


# --- drop_path_add: the end of timm's residual block ---


def _largest_tolerance(*dtypes):
    """That of the coarsest dtype: timm rounds to it on the way, whatever the result's."""
    return max((TOLERANCES[dtype] for dtype in dtypes if dtype is not None), key=lambda tolerance: tolerance["rtol"])


@needs_timm
@pytest.mark.parametrize("dtypes", FUSED_ADD_DTYPES, ids=dtypes_id)
@pytest.mark.parametrize("drop_prob", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_add_is_timms_three_lines_given_our_mask(device, monkeypatch, dtypes, drop_prob, scale_by_keep):
    """Forward and backward: LayerScale, drop path, addition."""
    inputs = add_inputs((64, 3, 5), dtypes, device)
    ours, theirs = ([t if t is None else t.clone().requires_grad_() for t in inputs] for _ in range(2))
    keep = predict_keep(ours[0], drop_prob)
    actual = drop_path_add(*ours[:2], drop_prob, True, scale_by_keep, gamma=ours[2])
    x, residual, gamma = theirs
    _replay(monkeypatch, [keep])
    expected = residual + timm_drop.drop_path(x if gamma is None else x * gamma, drop_prob, True, scale_by_keep)
    torch.testing.assert_close(actual, expected, **_largest_tolerance(*dtypes))
    grad = random_tensor(actual.shape, actual.dtype, device, seed=3)
    grads = [
        torch.autograd.grad(out, [t for t in leaves if t is not None], grad)
        for out, leaves in ((actual, ours), (expected, theirs))
    ]
    for mine, timms in zip(*grads, strict=True):
        scale = timms.abs().max().clamp(min=1e-6)  # gamma's gradient is a sum
        torch.testing.assert_close(mine / scale, timms / scale, **_largest_tolerance(*dtypes))


@needs_timm
@pytest.mark.parametrize("shape", ["tokens", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
def test_add_module_is_timms_modules(device, monkeypatch, shape, training):
    """LayerScale and DropPath, one module each, and the addition: the same state, the same function."""
    from timm.layers import LayerScale

    size = (16, 7, 12) if shape == "tokens" else (16, 5, 4, 12)  # LayerScale's channels are last
    scale, drop = LayerScale(12, init_values=0.3).to(device), timm_drop.DropPath(0.5)
    ours = DropPathAdd(0.5, dim=12, init_values=0.3).to(device)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in scale.state_dict().items()
    }
    with torch.no_grad():
        scale.gamma.copy_(random_tensor((12,), device=device, seed=2))
    ours.load_state_dict(scale.state_dict(), strict=True)
    for module in (scale, drop, ours):
        module.train(training)
    x, residual = (random_tensor(size, device=device, seed=seed) for seed in (0, 1))
    keep = predict_keep(x, 0.5)
    actual = ours(x, residual)
    if training:
        assert 0 < keep.sum() < 16
        _replay(monkeypatch, [keep])
    expected = residual + drop(scale(x))
    torch.testing.assert_close(actual, expected, **TOLERANCES[torch.float32])
    grad = random_tensor(size, device=device, seed=3)
    actual.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(ours.gamma.grad, scale.gamma.grad, rtol=1e-5, atol=1e-4)
    scale.load_state_dict(ours.state_dict(), strict=True)


@needs_timm
@pytest.mark.parametrize("name", ["vit", "vit_layer_scale"])
def test_add_in_a_vision_transformer(name, device, monkeypatch):
    """A block rewritten to end in DropPathAdd computes what timm's does, in eval and, given our masks, in training."""
    model, images = _model_and_images(name, device)
    twin = copy.deepcopy(model)
    masks = []

    def end_of(block, scale, drop):
        add = DropPathAdd(getattr(drop, "drop_prob", 0.0))
        add.gamma = getattr(scale, "gamma", None)

        def end(branch, x):
            if add.drop_prob and block.training:
                masks.append(predict_keep(branch, add.drop_prob))
            return add.train(block.training)(branch, x)

        return end

    def rewritten(block):
        end1, end2 = end_of(block, block.ls1, block.drop_path1), end_of(block, block.ls2, block.drop_path2)

        def forward(x, *args, **kwargs):
            x = end1(block.attn(block.norm1(x)), x)
            return end2(block.mlp(block.norm2(x)), x)

        return forward

    for block in model.blocks:
        block.forward = rewritten(block)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), twin.eval()(images), rtol=1e-5, atol=1e-5)
    actual = _step(model, images)
    assert len(masks) >= 4
    drawn = torch.stack(masks)
    assert drawn.any()
    assert not drawn.all()
    left = _replay(monkeypatch, masks)
    expected = _step(twin, images)
    assert next(left, None) is None, "timm must have drawn as often as we did"
    for ours, timms in zip(actual, expected, strict=True):
        scale = timms.abs().max().clamp(min=1e-6)  # gradients span many orders of magnitude
        torch.testing.assert_close(ours / scale, timms / scale, rtol=1e-4, atol=1e-5)


def test_add_signature_is_drop_paths_with_a_residual():
    """So that timm's positional arguments keep their places."""
    parameters = list(inspect.signature(drop_path_add).parameters.values())
    expected = list(inspect.signature(drop_path).parameters.values())
    names = [parameter.name for parameter in parameters]
    options = ["gamma", "mode", "dim", "keep", "generator"]
    assert names == ["x", "residual", "drop_prob", "training", "scale_by_keep", *options]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    for parameter in expected:
        assert defaults[parameter.name] == parameter.default
    assert {parameter.kind for parameter in parameters[5:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert list(inspect.signature(DropPathAdd).parameters) == [
        "drop_prob",
        "scale_by_keep",
        "mode",
        "dim",
        "init_values",
        "channels_first",
        "sample_dim",
        "device",
        "dtype",
    ]


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("drop_prob", [0.2, 0.5, 1.0])
def test_add_modes_are_torchvisions_given_our_mask(device, monkeypatch, mode, drop_prob):
    """torchvision's ConvNeXt: layer_scale [C, 1, 1] times the branch, stochastic_depth, addition."""
    ops = pytest.importorskip("torchvision.ops", reason="torchvision does not import", exc_type=ImportError)
    x, residual, layer_scale = add_inputs((32, 3, 4, 4), (torch.float32,) * 3, device, (3, 1, 1))
    for _ in range(5):
        keep = predict_keep(x, drop_prob, mode)
        actual = drop_path_add(x, residual, drop_prob, training=True, gamma=layer_scale, mode=mode)
        with monkeypatch.context() as m:
            _replay(m, [keep])
            expected = residual + ops.stochastic_depth(layer_scale * x, drop_prob, mode, training=True)
        torch.testing.assert_close(actual, expected, **TOLERANCES[torch.float32])


@needs_timm
def test_the_patched_function_can_be_pickled():
    """By its name in timm."""
    with patch_timm():
        assert pickle.loads(pickle.dumps(timm_drop.drop_path)) is timm_drop.drop_path
