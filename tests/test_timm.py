"""Promise: what timm's own tests do with torch.fx and torch.jit.script they do under patch_timm, too.

timm's wheel brings no tests: here, in other words, is what they check, of models with a drop_path_rate. `make test`
runs a choice of models, `make test-timm` all that timm has, up to MAX_PARAMETERS.
"""

import os
import warnings

import pytest
import torch

from droppath_ext import patch_timm

timm = pytest.importorskip("timm", reason="timm does not import", exc_type=ImportError)
from timm.layers import DropPath  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names  # noqa: E402

# Of twelve files of timm, each with another way to its residual branches. All of them pass without the patch.
CHOICE = {
    "test_vit": {},
    "test_convnext2": {},
    "test_efficientnet": {},
    "test_byobnet": {},
    "test_mambaout": {},
    "test_resnet": {},
    "test_coatnet": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (1, 2),
        "num_heads": (2, 4),
    },
    "edgenext_xx_small": {"depths": (1, 1, 2, 1)},
    "inception_next_atto": {},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (24, 24, 48, 48), "num_heads": (1, 1, 2, 2)},
}
DROP_PATH_RATE = 0.2
PATTERN = os.environ.get("DROPPATH_EXT_TIMM_MODELS")  # as in timm.list_models; "*" in make test-timm
MAX_PARAMETERS = 30e6
MODELS = timm.list_models(PATTERN) if PATTERN else list(CHOICE)


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are tiny: threads would only wait for each other, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class NotOurs(Exception):
    """timm does not build this model with a drop path."""


def _create(name, **kwargs):
    torch.manual_seed(0)
    try:
        return timm.create_model(name, drop_path_rate=DROP_PATH_RATE, **CHOICE.get(name, {}), **kwargs)
    except TypeError as error:
        raise NotOurs(f"no drop_path_rate: {error}") from None


def _features(name, **kwargs):
    try:
        return _create(name, features_only=True, **kwargs)
    except (AssertionError, AttributeError, IndexError, RuntimeError) as error:
        raise NotOurs(f"no features: {error}") from None


def _images(name):
    size = CHOICE.get(name, {}).get("img_size")
    if size is None:
        config = timm.get_pretrained_cfg(name) or timm.models.get_pretrained_cfg(name)
        size = config.input_size[-1]
        if not config.fixed_input_size:
            size = max(64, config.min_input_size[-1] if config.min_input_size else 0)
    return torch.randn(2, 3, size, size)


def _extractor(model):
    """The whole model as a graph of torch.fx, as timm's tests build it."""
    leaves = {"leaf_modules": timm.models.get_notrace_modules()}
    leaves["autowrap_functions"] = timm.models.get_notrace_functions()
    train, evaluation = get_graph_node_names(model, tracer_kwargs=leaves)
    return create_feature_extractor(
        model, train_return_nodes=[train[-1]], eval_return_nodes=[evaluation[-1]], tracer_kwargs=leaves
    )


def fx_forward(name):
    model = _create(name).eval()
    images = _images(name)
    with torch.no_grad():
        (out,) = _extractor(model).eval()(images).values()
        torch.testing.assert_close(out, model(images), rtol=1e-4, atol=1e-4)


def fx_backward(name):
    model = _create(name, num_classes=7)
    graph = _extractor(model).train()
    (out,) = graph(_images(name)).values()
    assert out.shape[-1] == 7
    out.mean().backward()
    assert all(p.grad is not None for p in graph.parameters())
    assert not out.isnan().any()


def fx_features(name):
    features = _features(name, feature_cls="fx")
    for training in (False, True):
        maps = features.train(training)(_images(name))
        assert len(maps) == len(features.feature_info.channels())
        assert not any(feature.isnan().any() for feature in maps)


def script(name):
    model = _create(name, scriptable=True).eval()
    images = _images(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(images), model(images), rtol=1e-4, atol=1e-4)


def script_training(name):
    out = torch.jit.script(_create(name, scriptable=True).train())(_images(name))
    assert not out.isnan().any()


def script_features(name):
    features = _features(name, scriptable=True).eval()
    images = _images(name)
    with torch.no_grad():
        for actual, expected in zip(torch.jit.script(features)(images), features(images), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def _failure(check, name):
    """What goes wrong; nothing if it passes."""
    # Types that torch.jit.script has compiled are kept: each run shall compile its own.
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(name)
        except NotOurs:
            raise
        except Exception as error:  # whatever it is, the two runs shall agree
            return error
    return None


def _skip_large(name):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in timm.create_model(name).parameters())
    if parameters > MAX_PARAMETERS:
        pytest.skip(f"{parameters / 1e6:.0f} million parameters")


# TorchScript takes its time: the others are for make test-timm.
CHECKS = [fx_forward, fx_backward, fx_features, script] + ([script_training, script_features] if PATTERN else [])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", MODELS)
def test_as_without_the_patch(name, check):
    if PATTERN:
        _skip_large(name)
    else:
        assert any(isinstance(module, DropPath) for module in _create(name).modules())
    try:
        with patch_timm():
            failure = _failure(check, name)
        if failure is None:
            return
        without = _failure(check, name)
    except NotOurs as reason:
        pytest.skip(str(reason))
    if without is None:
        raise failure
    assert PATTERN, f"a model of the choice passes without the patch, but: {without}"
    pytest.skip(f"fails without the patch, too: {str(without)[:200]}")
