"""Promise: a wrong argument is refused with a sentence that names it, its value and the rule."""

import re
import sys

import pytest
import torch
from conftest import NO_CUDA_REASON, generator_state

from droppath_ext import DropPath, DropPathAdd, drop_path, drop_path_add, patch_timm, reference

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


# --- drop_path_add: the same sentence on both paths, in training and in eval ---

# Arguments of which one is wrong; what the sentence says, the wrong value last or next to it.
WRONG_SHAPES = {
    "residual of fewer samples": ((4, 3), (2, 3), None, rule("residual", r"\[4, 3\]", r"\[2, 3\]", "expand")),
    "residual that broadcasts": ((4, 5, 3), (1, 5, 3), None, rule("residual", r"\[1, 5, 3\]", "expand")),
    "residual without samples": ((4, 5, 3), (5, 3), None, rule("residual", r"\[5, 3\]", "expand")),
    "residual that x broadcasts to": ((1, 3), (4, 3), None, rule("residual", r"\[1, 3\]", r"\[4, 3\]", "expand")),
    "residual of another number of dims": ((4, 3), (4, 3, 1), None, rule("residual", r"\[4, 3, 1\]", "expand")),
    "no residual": ((4, 3), (0,), None, rule("residual", r"\[0\]", "expand")),
    "gamma of another size": ((4, 3), (4, 3), (4,), rule("gamma", r"\[D\]", r"\[4\]", r"\[4, 3\]")),
    "gamma of one number": ((4, 3), (4, 3), (1,), rule("gamma", r"\[1\]", r"\[4, 3\]")),
    "gamma along the samples": ((4, 3), (4, 3), (4, 1), rule("gamma", r"\[4, 1\]", r"\[4, 3\]")),
    "gamma along two dims": ((4, 5, 3), (4, 5, 3), (5, 3), rule("gamma", "one dim", r"\[5, 3\]")),
    "gamma of x's shape": ((4, 5, 3), (4, 5, 3), (4, 5, 3), rule("gamma", r"\[4, 5, 3\]")),
    "gamma of more dims": ((4, 3), (4, 3), (1, 1, 3), rule("gamma", r"\[1, 1, 3\]", r"\[4, 3\]")),
    "gamma of NCHW without its dims": ((4, 5, 3, 2), (4, 5, 3, 2), (5,), rule("gamma", r"\[C, 1, 1\]", r"\[5\]")),
    "gamma of channels, one dim too few": ((4, 5, 3, 2), (4, 5, 3, 2), (5, 1), rule("gamma", r"\[5, 1\]")),
    "gamma of a sample of one dimension": ((4,), (4,), (1,), rule("gamma", r"\[1\]", r"\[4\]")),
    "gamma of samples": ((4,), (4,), (4,), rule("gamma", r"\[4\]")),
    "gamma of nothing": ((4, 3), (4, 3), (0,), rule("gamma", r"\[0\]")),
    "gamma along two dims, one of them empty": ((4, 5, 0), (4, 5, 0), (5, 0), rule("gamma", r"\[5, 0\]")),
    "gamma of no dimension": ((4, 3), (4, 3), (), rule("gamma", r"0-dim|\[\]")),
    "x of no dimension": ((), (), None, rule(r"\bx\b", "0-dim")),
    "residual of no dimension": ((4, 3), (), None, rule("residual", "0-dim")),
}


def _add_error(kind, message, x, residual, gamma, drop_prob=0.5, training=True):
    """What drop_path_add says, surely of this kind and about this; the composite has to say the same."""
    with pytest.raises(kind, match=message) as error:
        drop_path_add(x, residual, drop_prob, training, gamma=gamma)
    with pytest.raises(kind) as composite:
        reference.drop_path_add(x, residual, drop_prob if training else 0.0, True, gamma, "row", None)
    assert type(error.value) is type(composite.value) is kind
    assert str(error.value) == str(composite.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", WRONG_SHAPES)
@pytest.mark.parametrize(("drop_prob", "training"), [(0.5, True), (0.0, True), (0.5, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_shapes(device, case, drop_prob, training, dtype):
    *shapes, message = WRONG_SHAPES[case]
    tensors = [None if shape is None else torch.ones(shape, dtype=dtype, device=device) for shape in shapes]
    _add_error(ValueError, message, *tensors, drop_prob, training)


@pytest.mark.parametrize("case", WRONG_SHAPES)
@pytest.mark.parametrize("on", ["device", "meta"])
def test_native_add_shapes(device, case, on):
    """The op says the same, called directly, with data and without."""
    *shapes, message = WRONG_SHAPES[case]
    target = device if on == "device" else "meta"
    tensors = [None if shape is None else torch.ones(shape, device=target) for shape in shapes]
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.droppath_ext.drop_path_add(*tensors, 0.5, True, True)


def test_add_suggestion_works(device):
    """The sentence about a residual that broadcasts says what to do; doing so helps."""
    x, table = torch.ones(4, 5, 3, device=device), torch.ones(1, 5, 3, device=device)
    with pytest.raises(ValueError, match=r"residual\.expand_as\(x\)"):
        drop_path_add(x, table, 0.5, training=True)
    assert torch.equal(drop_path_add(x, table.expand_as(x)), torch.full_like(x, 2.0))


@pytest.mark.parametrize("dtype", BAD_DTYPES)
@pytest.mark.parametrize("which", ["x", "residual", "gamma"])
@pytest.mark.parametrize(("drop_prob", "training"), [(0.5, True), (0.0, True), (0.5, False)])
def test_add_dtype(device, dtype, which, drop_prob, training):
    tensors = {"x": torch.ones(2, 3), "residual": torch.ones(2, 3), "gamma": torch.ones(3)}
    tensors[which] = tensors[which].to(dtype)
    tensors = [tensor.to(device) for tensor in tensors.values()]
    name = str(dtype).removeprefix("torch.")
    text = _add_error(TypeError, rule(rf"\b{which}\b", name), *tensors, drop_prob, training)
    for allowed in ("float16", "bfloat16", "float32", "float64"):
        assert allowed in text
    with pytest.raises((TypeError, RuntimeError), match=rf"\b{which}\b"):
        torch.ops.droppath_ext.drop_path_add(*tensors, 0.5, True, True)


@pytest.mark.parametrize("which", ["residual", "gamma"])
@pytest.mark.parametrize(("drop_prob", "training"), [(0.5, True), (0.0, True), (0.5, False)])
@pytest.mark.parametrize("x_on", ["device", "meta"])
def test_add_devices(device, which, drop_prob, training, x_on):
    here, there = (device, "meta") if x_on == "device" else ("meta", device)
    tensors = {"x": torch.ones(2, 3, device=here), "residual": torch.ones(2, 3, device=here)}
    tensors["gamma"] = torch.ones(3, device=here)
    tensors[which] = tensors[which].to(there) if there == "meta" else torch.ones_like(tensors[which], device=there)
    x_device, other = tensors["x"].device, tensors[which].device
    message = rule(rf"\b{which}\b", str(x_device), str(other))
    _add_error(ValueError, message, *tensors.values(), drop_prob, training)


@pytest.mark.skipif(NO_CUDA_REASON is not None, reason=f"a second device is needed: {NO_CUDA_REASON}")
@pytest.mark.parametrize("which", ["x", "residual", "gamma"])
def test_add_two_real_devices(which):
    tensors = {"x": torch.ones(2, 3), "residual": torch.ones(2, 3), "gamma": torch.ones(3)}
    tensors[which] = tensors[which].cuda()
    _add_error(ValueError, rule("must be on", "where x is"), *tensors.values())


@pytest.mark.parametrize(("drop_prob", "value"), BAD_PROBS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_gamma", [False, True])
def test_add_drop_prob_out_of_range(device, drop_prob, value, training, with_gamma):
    x = torch.ones(2, 3, device=device)
    gamma = torch.ones(3, device=device) if with_gamma else None
    for mode in ("row", "batch"):
        with pytest.raises(ValueError, match=rule("drop_prob", r"\[0, 1\]", value)):
            drop_path_add(x, x, drop_prob, training, gamma=gamma, mode=mode)
    with pytest.raises((ValueError, RuntimeError), match=rule("drop_prob", r"\[0, 1\]", value)):
        OPS.drop_path_add(x, x, gamma, drop_prob, True, True)


@pytest.mark.parametrize("drop_prob", ["0.5", None, [0.5], 1j])
@pytest.mark.parametrize("training", [True, False])
def test_add_drop_prob_not_a_number(drop_prob, training):
    with pytest.raises(TypeError, match="drop_prob"):
        drop_path_add(torch.ones(2, 3), torch.ones(2, 3), drop_prob, training)
    with pytest.raises(TypeError, match="drop_prob"):
        DropPathAdd(drop_prob)


@pytest.mark.parametrize("mode", ["x", "Row", "", None])
@pytest.mark.parametrize(("drop_prob", "training"), [(0.5, True), (0.5, False), (0.0, True)])
def test_add_mode(device, mode, drop_prob, training):
    x = torch.ones(2, 3, device=device)
    message = rule("mode", "row", "batch", repr(mode))
    with pytest.raises(ValueError, match=message):
        drop_path_add(x, x, drop_prob, training, mode=mode)
    with pytest.raises(ValueError, match=message):
        DropPathAdd(drop_prob, mode=mode)


@pytest.mark.parametrize("wrong", [1.0, [1.0, 2.0], None])
@pytest.mark.parametrize("which", ["x", "residual"])
def test_add_not_a_tensor(wrong, which):
    tensors = {"x": torch.ones(2, 3), "residual": torch.ones(2, 3)} | {which: wrong}
    for training in (True, False):
        with pytest.raises((TypeError, AttributeError)):
            drop_path_add(**tensors, drop_prob=0.5, training=training)


@pytest.mark.parametrize("gamma", [1.0, [1.0, 2.0, 3.0], False])
def test_add_gamma_not_a_tensor(gamma):
    with pytest.raises((TypeError, AttributeError)):
        drop_path_add(torch.ones(2, 3), torch.ones(2, 3), 0.5, training=True, gamma=gamma)


def test_add_options_are_keywords():
    """gamma must not be taken for a generator, nor one of them for scale_by_keep."""
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="positional"):
        drop_path_add(x, x, 0.5, True, True, torch.ones(3))


def test_add_generator_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"(?i)generator"):
        drop_path_add(torch.ones(2, 3), torch.ones(2, 3), 0.5, training=True, generator=42)


def test_a_refused_add_draws_nothing(device):
    before = generator_state(device)
    x, other = torch.ones(2, 3, device=device), torch.ones(2, 1, device=device)
    for args, gamma in (((x, other, 0.5), None), ((x, x, 1.5), None), ((x, x, 0.5), other), ((x, x.int(), 0.5), None)):
        with pytest.raises((TypeError, ValueError)):
            drop_path_add(*args, training=True, gamma=gamma)
    assert torch.equal(generator_state(device), before)


@pytest.mark.parametrize(("drop_prob", "value"), BAD_PROBS)
def test_add_module_drop_prob_out_of_range(drop_prob, value):
    """A bad rate is refused at construction; a bad one assigned later, at the next call."""
    message = rule("drop_prob", r"\[0, 1\]", value)
    with pytest.raises(ValueError, match=message):
        DropPathAdd(drop_prob)
    module = DropPathAdd(0.1)
    module.drop_prob = drop_prob
    for training in (True, False):
        with pytest.raises(ValueError, match=message):
            module.train(training)(torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize(("dim", "init_values"), [(8, None), ((8, 1, 1), None), (None, 1e-5), (None, 0.0)])
def test_add_module_dim_and_init_values_go_together(dim, init_values):
    with pytest.raises(ValueError, match=rule("dim", "init_values", re.escape(str(dim)), re.escape(str(init_values)))):
        DropPathAdd(0.1, dim=dim, init_values=init_values)


def test_add_module_gamma_of_another_size(device):
    module = DropPathAdd(0.1, dim=4, init_values=1.0).to(device)
    with pytest.raises(ValueError, match=rule("gamma", r"\[4\]", r"\[2, 3\]")):
        module(torch.ones(2, 3, device=device), torch.ones(2, 3, device=device))


# --- the native backward of drop_path_add ---


def _native_backward(device="cpu", **changes):
    """A call that is right, but for the changes."""
    args = {
        "grad": torch.ones(3, 5, device=device),
        "x": torch.ones(3, 5, device=device),
        "gamma": torch.ones(5, device=device),
        "keep": torch.ones(3, dtype=torch.bool, device=device),
        "scale": 1.0,
        "dtype": torch.float32,
        "output_mask": (True, True),
    }
    return OPS.drop_path_add_backward(*(args | changes).values())


def test_native_add_backward_accepts_the_call_that_the_others_change(device):
    grad_x, grad_gamma = _native_backward(device)
    assert torch.equal(grad_x, torch.ones(3, 5, device=device))
    assert torch.equal(grad_gamma, torch.full((5,), 3.0, device=device))


@pytest.mark.parametrize("length", [2, 4, 100])
@pytest.mark.parametrize("on", ["device", "meta"])
def test_native_add_backward_keep_of_wrong_length(device, length, on):
    """Read past its end it would be a silent out-of-bounds access."""
    target = device if on == "device" else "meta"
    keep = torch.ones(length, dtype=torch.bool, device=target)
    with pytest.raises((ValueError, RuntimeError), match=rule("keep", str(length))):
        _native_backward(target, keep=keep)


@pytest.mark.parametrize("on", ["device", "meta"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_native_add_backward_wrong_arguments(device, on, requires_grad):
    """Each is refused before memory is read that is not there, also where the backward is itself differentiated."""
    target = device if on == "device" else "meta"

    def ones(*shape, dtype=torch.float32):
        return torch.ones(*shape, dtype=dtype, device=target)

    changes = [
        ("keep", {"keep": ones(3)}),
        ("keep", {"keep": ones(3, 1, dtype=torch.bool)}),
        (r"\bx\b", {"x": ones(3, 4)}),
        (r"\bx\b", {"x": ones(2, 5)}),
        (r"\bx\b", {"x": ones(3, 5, dtype=torch.float64)}),
        (r"\bx\b", {"x": None}),
        ("gamma", {"gamma": ones(4)}),
        ("gamma", {"gamma": ones(3, 5)}),
        ("gamma", {"gamma": None}),
        ("dtype", {"dtype": torch.float64, "x": ones(3, 5, dtype=torch.float64)}),
        ("grad", {"grad": ones(3, 5, dtype=torch.int64)}),
        ("grad", {"grad": torch.tensor(1.0, device=target)}),
    ]
    for name, change in changes:
        change = {"grad": ones(3, 5).requires_grad_(requires_grad)} | change
        with pytest.raises((ValueError, TypeError, RuntimeError), match=name):
            _native_backward(target, **change)


def test_native_add_backward_devices(device):
    """A tensor elsewhere has no memory to read here."""
    for name, tensor in (("x", torch.ones(3, 5)), ("gamma", torch.ones(5)), ("keep", torch.ones(3, dtype=torch.bool))):
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=name):
            _native_backward(device, **{name: tensor.to("meta")})


def test_native_add_backward_keep_that_is_not_contiguous(device):
    """Either refused or read with its stride; never read as if it were dense."""
    keep = torch.tensor([True, False, False, False, True, False], device=device)[::2]  # True, False, True
    try:
        grad_x, grad_gamma = _native_backward(device, keep=keep)
    except (ValueError, RuntimeError) as error:
        assert "keep" in str(error)
    else:
        assert grad_x.sum(1).tolist() == [5.0, 0.0, 5.0]
        assert grad_gamma.tolist() == [2.0] * 5
