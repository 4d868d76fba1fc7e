"""Promise: a wrong argument is refused with a sentence that names it, its value and the rule."""

import sys

import pytest
import torch
from conftest import NO_CUDA_REASON, generator_state

from droppath_ext import DropPath, drop_path, patch_timm, reference

OPS = torch.ops.droppath_ext
BAD_PROBS = [(1.5, r"1\.5"), (-0.1, r"-0\.1"), (2, "2"), (-1e-9, "-1e-09")]
BAD_PROBS += [(float("nan"), "nan"), (float("inf"), "inf")]
BAD_DTYPES = [torch.int64, torch.uint8, torch.bool, torch.complex64]


def rule(*words):
    """All the words, in this order, anywhere in the message; the prose between them is free."""
    return "(?s)" + ".*".join(words)


@pytest.mark.parametrize(("drop_prob", "value"), BAD_PROBS)
@pytest.mark.parametrize("training", [True, False])
def test_drop_prob_out_of_range(device, drop_prob, value, training):
    x = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match=rule("drop_prob", r"\[0, 1\]", value)):
        drop_path(x, drop_prob, training)
    with pytest.raises(ValueError, match=rule("drop_prob", r"\[0, 1\]", value)):
        drop_path(x, drop_prob, training, mode="batch")


@pytest.mark.parametrize(("drop_prob", "value"), BAD_PROBS)
def test_module_drop_prob_out_of_range(drop_prob, value):
    """A bad rate is refused at construction; a bad one assigned later, at the next call."""
    with pytest.raises(ValueError, match=rule("drop_prob", r"\[0, 1\]", value)):
        DropPath(drop_prob)
    module = DropPath(0.1)
    module.drop_prob = drop_prob
    for training in (True, False):
        with pytest.raises(ValueError, match=rule("drop_prob", r"\[0, 1\]", value)):
            module.train(training)(torch.ones(2, 3))


@pytest.mark.parametrize("drop_prob", ["0.5", None, [0.5], 1j])
@pytest.mark.parametrize("training", [True, False])
def test_drop_prob_not_a_number(drop_prob, training):
    with pytest.raises(TypeError, match="drop_prob"):
        drop_path(torch.ones(2, 3), drop_prob, training)
    with pytest.raises(TypeError, match="drop_prob"):
        DropPath(drop_prob)


@pytest.mark.parametrize("mode", ["x", "Row", "", None])
@pytest.mark.parametrize(("drop_prob", "training"), [(0.5, True), (0.5, False), (0.0, True)])
def test_mode(device, mode, drop_prob, training):
    message = rule("mode", "row", "batch", repr(mode))
    with pytest.raises(ValueError, match=message):
        drop_path(torch.ones(2, 3, device=device), drop_prob, training, mode=mode)
    with pytest.raises(ValueError, match=message):
        DropPath(drop_prob, mode=mode)


@pytest.mark.parametrize("dtype", BAD_DTYPES)
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_dtype(device, dtype, mode):
    x = torch.ones(2, 3, device=device).to(dtype)
    message = rule(r"\bx\b", str(dtype).removeprefix("torch."))
    with pytest.raises(TypeError, match=message) as error:
        drop_path(x, 0.5, training=True, mode=mode)
    for allowed in ("float16", "bfloat16", "float32", "float64"):
        assert allowed in str(error.value)


def test_zero_dimensions(device):
    for mode in ("row", "batch"):
        with pytest.raises(ValueError, match=rule(r"\bx\b", "dim")):
            drop_path(torch.tensor(1.0, device=device), 0.5, training=True, mode=mode)


@pytest.mark.parametrize("x", [1.0, [1.0, 2.0], None])
def test_not_a_tensor(x):
    with pytest.raises((TypeError, AttributeError)):
        drop_path(x, 0.5, training=True)


def test_composite_path_refuses_the_same():
    """Inputs that take the composite path get the same errors."""
    with pytest.raises(TypeError, match=rule(r"\bx\b", "int64")):
        drop_path(torch.ones(2, 3, dtype=torch.int64, device="meta"), 0.5, training=True)
    with pytest.raises(ValueError, match=rule(r"\bx\b", "dim")):
        drop_path(torch.tensor(1.0, device="meta"), 0.5, training=True)


def test_generator_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"(?i)generator"):
        drop_path(torch.ones(2, 3), 0.5, training=True, generator=42)


@pytest.mark.skipif(NO_CUDA_REASON is not None, reason=f"a generator of another device needs one: {NO_CUDA_REASON}")
def test_generator_of_another_device():
    for x, other in (("cpu", "cuda"), ("cuda", "cpu")):
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)generator"):
            drop_path(torch.ones(2, 3, device=x), 0.5, training=True, generator=torch.Generator(other))


def test_a_refused_call_draws_nothing(device):
    before = generator_state(device)
    for x, drop_prob in ((torch.ones(2, dtype=torch.int64), 0.5), (torch.tensor(1.0), 0.5), (torch.ones(2), 1.5)):
        with pytest.raises((TypeError, ValueError)):
            drop_path(x.to(device), drop_prob, training=True)
    assert torch.equal(generator_state(device), before)


# --- the native ops, called without the Python layer's checks in front ---


@pytest.mark.parametrize(("drop_prob", "value"), BAD_PROBS)
def test_native_drop_prob(device, drop_prob, value):
    with pytest.raises((ValueError, RuntimeError), match=rule("drop_prob", r"\[0, 1\]", value)):
        OPS.drop_path(torch.ones(2, 3, device=device), drop_prob, True, True, None)


@pytest.mark.parametrize("dtype", BAD_DTYPES)
def test_native_dtype(device, dtype):
    x = torch.ones(2, 3, device=device).to(dtype)
    with pytest.raises((TypeError, RuntimeError), match=r"\bx\b"):
        OPS.drop_path(x, 0.5, True, True, None)
    with pytest.raises((TypeError, RuntimeError), match=r"\bgrad\b"):
        OPS.drop_path_backward(x, torch.ones(2, dtype=torch.bool, device=device), 1.0)


def test_native_zero_dimensions(device):
    x = torch.tensor(1.0, device=device)
    with pytest.raises((ValueError, RuntimeError), match=rule(r"\bx\b", "dim")):
        OPS.drop_path(x, 0.5, True, True, None)
    with pytest.raises((ValueError, RuntimeError), match=rule(r"\bgrad\b", "dim")):
        OPS.drop_path_backward(x, torch.ones(1, dtype=torch.bool, device=device), 1.0)


@pytest.mark.parametrize("length", [0, 2, 4, 100])
@pytest.mark.parametrize("on", ["device", "meta"])
def test_native_keep_of_wrong_length(device, length, on):
    """Read past its end it would be a silent out-of-bounds access."""
    target = device if on == "device" else "meta"
    keep = torch.ones(length, dtype=torch.bool, device=target)
    with pytest.raises((ValueError, RuntimeError), match=rule("keep", str(length))):
        OPS.drop_path_backward(torch.ones(3, 5, device=target), keep, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_native_keep_of_wrong_dtype(device, dtype):
    with pytest.raises((TypeError, RuntimeError), match=rule("keep", "(?i:bool)")):
        OPS.drop_path_backward(torch.ones(3, 5, device=device), torch.ones(3, dtype=dtype, device=device), 1.0)


def test_native_keep_of_wrong_shape(device):
    with pytest.raises((ValueError, RuntimeError), match="keep"):
        OPS.drop_path_backward(torch.ones(3, 5, device=device), torch.ones(3, 1, dtype=torch.bool, device=device), 1.0)
    with pytest.raises((ValueError, RuntimeError), match="keep"):
        OPS.drop_path_backward(torch.ones(3, 5, device=device), torch.tensor(True, device=device), 1.0)


def test_native_keep_that_is_not_contiguous(device):
    """Either refused or read with its stride; never read as if it were dense."""
    keep = torch.tensor([True, False, False, False, True, False], device=device)[::2]  # True, False, True
    grad = torch.arange(1.0, 7.0, device=device).view(3, 2)
    try:
        out = OPS.drop_path_backward(grad, keep, 2.0)
    except (ValueError, RuntimeError) as error:
        assert "keep" in str(error)
    else:
        assert torch.equal(out, reference.apply_keep_mask(grad, keep, 2.0))


@pytest.mark.skipif(NO_CUDA_REASON is not None, reason=f"a second device is needed: {NO_CUDA_REASON}")
def test_native_keep_on_another_device():
    for grad, other in (("cpu", "cuda"), ("cuda", "cpu")):
        with pytest.raises((ValueError, RuntimeError), match=rule("keep", "(?i:device|cpu|cuda)")):
            OPS.drop_path_backward(torch.ones(3, 5, device=grad), torch.ones(3, dtype=torch.bool, device=other), 1.0)


def test_patch_timm_without_timm(monkeypatch):
    """None in sys.modules makes `import timm` fail as if it were not installed."""
    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm.*\s.*timm|pip install timm|timm .*install"):
        patch_timm()
