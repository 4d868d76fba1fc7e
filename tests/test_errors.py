"""Promise: a wrong argument is refused with a sentence that names it, its value and the rule."""

import re
import sys
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy
import pytest
import torch
from conftest import (
    NO_CUDA_REASON,
    SAMPLINGS,
    assert_same_bits,
    case_id,
    generator_state,
    needs_native,
    pairwise,
    seeded,
)
from op_cases import ADD, ADD_GAMMA, BATCH_MODE_OPS, DROP_PATH, OPS, SKIP_BERNOULLI, SKIP_FIXED, SKIP_OPS

from droppath_ext import (
    DropPath,
    DropPathAdd,
    StochasticDepth,
    draw_keep,
    drop_path,
    drop_path_add,
    patch_timm,
    reference,
    stochastic_depth,
)
from droppath_ext._native import BINARY

NATIVE = torch.ops.droppath_ext
OF_ALL_MODES = (*OPS, *BATCH_MODE_OPS)
BAD_PROBS = [(1.5, r"1\.5"), (-0.1, r"-0\.1"), (2, "2"), (-1e-9, "-1e-09")]
BAD_PROBS += [(float("nan"), "nan"), (float("inf"), "inf")]
# Of which float() itself raises: beyond all floats, and a NaN that signals.
BAD_NUMBERS = [(10**400, "10{400}"), (Decimal("sNaN"), r"Decimal\('sNaN'\)")]
EVERY_CASE = [(0.5, True), (0.0, True), (0.5, False)]
BAD_DTYPES = [torch.int64, torch.uint8, torch.bool, torch.complex64]


def rule(*words):
    """All the words, in this order, anywhere in the message; the prose between them is free."""
    return "(?s)" + ".*".join(words)


def _never(*_):
    raise AssertionError("the branch must not be called")


def _call(op, drop_prob=0.5, training=True, device="cpu", changes=None, branch=_never, **options):
    """The public function with right inputs, but for the changes; the branch must not be called unless one is given."""
    ones = {"x": torch.ones(2, 3), "residual": torch.ones(2, 3), "gamma": torch.ones(3)}
    named = {name: tensor.to(device) for name, tensor in ones.items()} | (changes or {})
    options = op.options | options
    if op in SKIP_OPS:
        return stochastic_depth(named["x"], branch, drop_prob, training, gamma=named["gamma"], **options)
    if op.inputs == ("x",):
        return drop_path(named["x"], drop_prob, training, **options)
    gamma = named["gamma"] if op.has_gamma else None
    return drop_path_add(named["x"], named["residual"], drop_prob, training, gamma=gamma, **options)


MODULES = {DROP_PATH: DropPath, ADD: DropPathAdd, SKIP_BERNOULLI: partial(StochasticDepth, _never)}
MODULES[SKIP_FIXED] = partial(MODULES[SKIP_BERNOULLI], sampling="fixed")


@pytest.mark.parametrize("op", OF_ALL_MODES)
@pytest.mark.parametrize(("drop_prob", "value"), BAD_PROBS + BAD_NUMBERS)
def test_drop_prob_out_of_range(device, op, drop_prob, value):
    message = rf"^drop_prob must be in \[0, 1\], but got {value}$"
    for training in (True, False):
        with pytest.raises(ValueError, match=message):
            _call(op, drop_prob, training, device)


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize(("drop_prob", "value"), BAD_PROBS + BAD_NUMBERS)
def test_module_drop_prob_out_of_range(op, drop_prob, value):
    """A bad rate is refused at construction; a bad one assigned later, at the next call."""
    message = rf"^drop_prob must be in \[0, 1\], but got {value}$"
    with pytest.raises(ValueError, match=message):
        MODULES[op](drop_prob)
    module = MODULES[op](0.1)
    module.drop_prob = drop_prob
    arguments = [torch.ones(2, 3)] * (2 if op is ADD else 1)
    for training in (True, False):
        with pytest.raises(ValueError, match=message):
            module.train(training)(*arguments)


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("drop_prob", ["0.5", None, [0.5], 1j])
def test_drop_prob_not_a_number(op, drop_prob):
    message = re.escape(f"drop_prob must be a number in [0, 1], but got {drop_prob!r}")
    for training in (True, False):
        with pytest.raises(TypeError, match=message):
            _call(op, drop_prob, training)
    with pytest.raises(TypeError, match=message):
        MODULES[op](drop_prob)


NUMBERS = [
    0.25, Fraction(1, 4), Decimal("0.25"), numpy.float16(0.25), numpy.float32(0.25), numpy.float64(0.25),
    numpy.array(0.25), torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float16),
]  # fmt: skip


@pytest.mark.parametrize("op", OF_ALL_MODES)
@pytest.mark.parametrize("drop_prob", [*NUMBERS, 1, True, 0, False], ids=repr)
def test_drop_prob_of_any_type_of_number(device, op, drop_prob):
    """The results are those of the float, bit for bit."""
    for training in (True, False):
        results = []
        for p in (drop_prob, float(drop_prob)):
            torch.manual_seed(0)
            results.append(_call(op, p, training, device, branch=torch.sin))
        assert_same_bits(*results)


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("drop_prob", [*NUMBERS, 1, True, 0, False], ids=repr)
def test_module_drop_prob_of_any_type_of_number(op, drop_prob):
    """Also one that is assigned later; and it is shown as the float is."""
    arguments = [torch.ones(6, 3)] * (2 if op is ADD else 1)
    branch = () if op in (DROP_PATH, ADD) else (torch.sin,)
    cls = {DROP_PATH: DropPath, ADD: DropPathAdd}.get(op, StochasticDepth)
    expected, built, assigned = (cls(*branch, p) for p in (float(drop_prob), drop_prob, 0.5))
    assigned.drop_prob = drop_prob
    results = []
    for module in (expected, built, assigned):
        torch.manual_seed(0)
        results.append(module(*arguments))
        assert repr(module) == repr(expected)
        assert_same_bits(results[-1], results[0])


@pytest.mark.parametrize("op", OF_ALL_MODES)
@pytest.mark.parametrize("size", [1, 3])
def test_tensor_in_the_place_of_drop_prob(device, op, size):
    """gamma, say, of one element or of many."""
    gamma = torch.full((size,), 0.5, device=device)
    for training in (True, False):
        with pytest.raises(TypeError, match=rf"^drop_prob must be a number .* but got a tensor of shape \[{size}\]$"):
            _call(op, gamma, training, device)


@pytest.mark.parametrize("op", OF_ALL_MODES)
@pytest.mark.parametrize("name", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_layout(op, name):
    x = getattr(torch.ones(2, 3), name)()
    message = rf"^x must be a dense tensor, but got one of layout {re.escape(str(x.layout))}$"
    with pytest.raises(TypeError, match=message):
        _call(op, changes={"x": x, "residual": x})


@pytest.mark.parametrize("op", OF_ALL_MODES)
def test_quantized(op):
    x = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match="^x must be float16, bfloat16, float32 or float64, but got quint8$"):
        _call(op, changes={"x": x, "residual": x})


@pytest.mark.parametrize("op", [DROP_PATH, ADD])
@pytest.mark.parametrize("mode", ["x", "Row", "", None])
@pytest.mark.parametrize(("drop_prob", "training"), [(0.5, True), (0.5, False), (0.0, True)])
def test_mode(device, op, mode, drop_prob, training):
    message = rule("mode", "row", "batch", repr(mode))
    with pytest.raises(ValueError, match=message):
        _call(op, drop_prob, training, device, mode=mode)
    with pytest.raises(ValueError, match=message):
        MODULES[op](drop_prob, mode=mode)


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("sample_dim", [None, 1.0, True, torch.nn.Parameter(torch.tensor(1.0))])
def test_sample_dim(op, sample_dim):
    with pytest.raises(TypeError, match="^sample_dim must be an int, but got "):
        MODULES[op](0.5, sample_dim=sample_dim)


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


@pytest.mark.parametrize(
    ("op", "which", "wrong"),
    [
        *((op, which, wrong) for op in (DROP_PATH, ADD) for which in op.inputs for wrong in (1.0, [1.0, 2.0], None)),
        *((ADD_GAMMA, "gamma", wrong) for wrong in (1.0, [1.0, 2.0, 3.0], False)),
    ],
)
def test_not_a_tensor(op, which, wrong):
    for training in (True, False) if op is not DROP_PATH else (True,):
        with pytest.raises((TypeError, AttributeError)):
            _call(op, 0.5, training, changes={which: wrong})


def test_composite_path_refuses_the_same():
    """Inputs that take the composite path get the same errors."""
    with pytest.raises(TypeError, match=rule(r"\bx\b", "int64")):
        drop_path(torch.ones(2, 3, dtype=torch.int64, device="meta"), 0.5, training=True)
    with pytest.raises(ValueError, match=rule(r"\bx\b", "dim")):
        drop_path(torch.tensor(1.0, device="meta"), 0.5, training=True)


def test_tensor_of_a_transform_that_has_ended():
    """ATen's sentence, not an assertion of its internals."""
    leaked = []
    torch.func.vmap(lambda x: leaked.append(x) or x)(torch.ones(1, 2, 3))
    keep = torch.tensor([True, False])
    for call in (
        lambda x: drop_path(x, 0.5, True),
        lambda x: drop_path(x, 0.5, True, keep=keep),
        lambda x: drop_path_add(x, x, 0.5, True),
        lambda x: drop_path_add(torch.ones(2, 3), torch.ones(2, 3), 0.5, True, gamma=x[0]),
        lambda x: stochastic_depth(x, torch.sin, 0.5, True),
    ):
        with pytest.raises(RuntimeError, match="escaped"):
            call(*leaked)


@pytest.mark.parametrize("op", OPS)
def test_generator_of_the_wrong_type(op):
    for drop_prob, training in EVERY_CASE if op in SKIP_OPS else [(0.5, True)]:
        with pytest.raises(TypeError, match=r"(?i)generator"):
            _call(op, drop_prob, training, generator=42)


@pytest.mark.skipif(NO_CUDA_REASON is not None, reason=f"a generator of another device needs one: {NO_CUDA_REASON}")
def test_generator_of_another_device():
    for x, other in (("cpu", "cuda"), ("cuda", "cpu")):
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)generator"):
            drop_path(torch.ones(2, 3, device=x), 0.5, training=True, generator=torch.Generator(other))


def without_memory(tensor, nbytes=0):
    """Its storage is resized under it, as FSDP does."""
    tensor.untyped_storage().resize_(nbytes)
    return tensor


REFUSED = {
    "integers": {"changes": {"x": torch.ones(2, 3, dtype=torch.int64)}},
    "no_dimension": {"changes": {"x": torch.tensor(1.0)}},
    "drop_prob": {"drop_prob": 1.5},
    "residual_of_another_shape": {"changes": {"residual": torch.ones(2, 1)}},
    "residual_of_integers": {"changes": {"residual": torch.ones(2, 3, dtype=torch.int64)}},
    "gamma_of_another_shape": {"changes": {"gamma": torch.ones(2, 1)}},
    "without_memory": {"changes": {"x": without_memory(torch.ones(2, 3))}},
    "residual_without_memory": {"changes": {"residual": without_memory(torch.ones(2, 3))}},
    "gamma_without_memory": {"changes": {"gamma": without_memory(torch.ones(3))}},
}


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        (op, wrong)
        for op in OPS
        for wrong in REFUSED
        if wrong.partition("_")[0] not in {"residual", "gamma"} - {*op.inputs}
        # Which a gather sees, after the draw; and ATen as late.
        and not ((op in SKIP_OPS or BINARY is None) and wrong.endswith("without_memory"))
    ],
)
def test_a_refused_call_draws_nothing(device, op, wrong):
    """Neither from the generator that it would draw from by default nor from one that it is given."""
    arguments = dict(REFUSED[wrong])
    if "changes" in arguments:
        arguments["changes"] = {name: tensor.to(device) for name, tensor in arguments["changes"].items()}
    generator = op.generator(device)
    for given in ({}, {"generator": generator}):
        before = generator_state("cpu"), generator_state(device), generator.get_state()
        with pytest.raises((TypeError, ValueError)):
            _call(op, device=device, **arguments, **given)
        after = generator_state("cpu"), generator_state(device), generator.get_state()
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


# --- the native ops, called without the Python layer's checks in front ---


@needs_native
@pytest.mark.parametrize(("drop_prob", "value"), BAD_PROBS)
def test_native_drop_prob(device, drop_prob, value):
    x, gamma = torch.ones(2, 3, device=device), torch.ones(3, device=device)
    for op, arguments in ((NATIVE.drop_path, (x,)), *((NATIVE.drop_path_add, (x, x, g)) for g in (None, gamma))):
        with pytest.raises((ValueError, RuntimeError), match=rule("drop_prob", r"\[0, 1\]", value)):
            op(*arguments, drop_prob, True, True)


@needs_native
@pytest.mark.parametrize("dtype", BAD_DTYPES)
def test_native_dtype(device, dtype):
    x = torch.ones(2, 3, device=device).to(dtype)
    with pytest.raises((TypeError, RuntimeError), match=r"\bx\b"):
        NATIVE.drop_path(x, 0.5, True, True, None)
    with pytest.raises((TypeError, RuntimeError), match=r"\bx\b"):
        NATIVE.scale_kept(x, torch.ones(2, dtype=torch.bool, device=device), 1.0)


@needs_native
def test_native_zero_dimensions(device):
    x = torch.tensor(1.0, device=device)
    with pytest.raises((ValueError, RuntimeError), match=rule(r"\bx\b", "dim")):
        NATIVE.drop_path(x, 0.5, True, True, None)
    with pytest.raises((ValueError, RuntimeError), match=rule(r"\bx\b", "dim")):
        NATIVE.scale_kept(x, torch.ones(1, dtype=torch.bool, device=device), 1.0)


@needs_native
@pytest.mark.parametrize("length", [2, 4, 100])
@pytest.mark.parametrize("on", ["device", "meta"])
def test_native_keep_of_wrong_length(device, length, on):
    """Read past its end it would be a silent out-of-bounds access, by the backward of drop_path_add as well."""
    target = device if on == "device" else "meta"
    keep = torch.ones(length, dtype=torch.bool, device=target)
    with pytest.raises((ValueError, RuntimeError), match=rule("keep", str(length))):
        NATIVE.scale_kept(torch.ones(3, 5, device=target), keep, 1.0)
    with pytest.raises((ValueError, RuntimeError), match=rule("keep", str(length))):
        _native_backward(target, sources=keep)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int32])
def test_native_keep_of_wrong_dtype(device, dtype):
    with pytest.raises((TypeError, RuntimeError), match=rule("keep", "(?i:bool)")):
        NATIVE.scale_kept(torch.ones(3, 5, device=device), torch.ones(3, dtype=dtype, device=device), 1.0)


@needs_native
def test_native_keep_of_wrong_shape(device):
    with pytest.raises((ValueError, RuntimeError), match="keep"):
        NATIVE.scale_kept(torch.ones(3, 5, device=device), torch.ones(3, 1, dtype=torch.bool, device=device), 1.0)
    with pytest.raises((ValueError, RuntimeError), match="keep"):
        NATIVE.scale_kept(torch.ones(3, 5, device=device), torch.tensor(True, device=device), 1.0)


@needs_native
def test_native_keep_that_is_not_contiguous(device):
    """Either refused or read with its stride; never read as if it were dense."""
    keep = torch.tensor([True, False, False, False, True, False], device=device)[::2]  # True, False, True
    grad = torch.arange(1.0, 7.0, device=device).view(3, 2)
    try:
        out = NATIVE.scale_kept(grad, keep, 2.0)
    except (ValueError, RuntimeError) as error:
        assert "keep" in str(error)
    else:
        assert torch.equal(out, reference.apply_keep_mask(grad, keep, 2.0))


@pytest.mark.skipif(NO_CUDA_REASON is not None, reason=f"a second device is needed: {NO_CUDA_REASON}")
def test_native_keep_on_another_device():
    for grad, other in (("cpu", "cuda"), ("cuda", "cpu")):
        with pytest.raises((ValueError, RuntimeError), match=rule("sources", "(?i:device|cpu|cuda)")):
            NATIVE.scale_kept(torch.ones(3, 5, device=grad), torch.ones(3, dtype=torch.bool, device=other), 1.0)


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
    "gamma along the samples": ((4, 3), (4, 3), (4, 1), rule("gamma", r"\[4, 1\]", r"\[4, 3\]")),
    "gamma along two dims": ((4, 5, 3), (4, 5, 3), (5, 3), rule("gamma", "one dim", r"\[5, 3\]")),
    "gamma of x's shape": ((4, 5, 3), (4, 5, 3), (4, 5, 3), rule("gamma", r"\[4, 5, 3\]")),
    "gamma of more dims": ((4, 3), (4, 3), (1, 1, 3), rule("gamma", r"\[1, 1, 3\]", r"\[4, 3\]")),
    "gamma of NCHW without its dims": ((4, 5, 3, 2), (4, 5, 3, 2), (5,), rule("gamma", r"\[C, 1, 1\]", r"\[5\]")),
    "gamma of channels, one dim too few": ((4, 5, 3, 2), (4, 5, 3, 2), (5, 1), rule("gamma", r"\[5, 1\]")),
    "gamma of samples": ((4,), (4,), (4,), rule("gamma", r"\[4\]")),
    "gamma of nothing": ((4, 3), (4, 3), (0,), rule("gamma", r"\[0\]")),
    "gamma along two dims, one of them empty": ((4, 5, 0), (4, 5, 0), (5, 0), rule("gamma", r"\[5, 0\]")),
    "gamma of one element, but more dims": ((4, 3), (4, 3), (1, 1, 1), rule("gamma", r"\[1, 1, 1\]", r"\[4, 3\]")),
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


@pytest.mark.parametrize(
    ("case", "when", "dtype"),
    pairwise(list(WRONG_SHAPES), EVERY_CASE, [torch.float32, torch.bfloat16]),
    ids=case_id,
)
def test_add_shapes(device, case, when, dtype):
    *shapes, message = WRONG_SHAPES[case]
    tensors = [None if shape is None else torch.ones(shape, dtype=dtype, device=device) for shape in shapes]
    _add_error(ValueError, message, *tensors, *when)


@needs_native
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


@needs_native
@pytest.mark.parametrize(
    ("dtype", "which", "when"), pairwise(BAD_DTYPES, ["x", "residual", "gamma"], EVERY_CASE), ids=case_id
)
def test_add_dtype(device, dtype, which, when):
    tensors = {"x": torch.ones(2, 3), "residual": torch.ones(2, 3), "gamma": torch.ones(3)}
    tensors[which] = tensors[which].to(dtype)
    tensors = [tensor.to(device) for tensor in tensors.values()]
    name = str(dtype).removeprefix("torch.")
    text = _add_error(TypeError, rule(rf"\b{which}\b", name), *tensors, *when)
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


def test_options_are_keywords():
    """gamma must not be taken for a generator, nor one of them for scale_by_keep."""
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="positional"):
        drop_path_add(x, x, 0.5, True, True, torch.ones(3))
    with pytest.raises(TypeError, match="positional"):
        stochastic_depth(x, _never, 0.5, True, True, torch.ones(3))


@pytest.mark.parametrize(
    "module", [DropPathAdd, partial(StochasticDepth, torch.sin)], ids=["DropPathAdd", "StochasticDepth"]
)
@pytest.mark.parametrize(("dim", "init_values"), [(8, None), ((8, 1, 1), None), (None, 1e-5), (None, 0.0)])
def test_module_dim_and_init_values_go_together(module, dim, init_values):
    message = f"dim and init_values go together, but got dim={dim} and init_values={init_values}"
    with pytest.raises(ValueError, match=re.escape(message)):
        module(0.1, dim=dim, init_values=init_values)


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
        "sources": torch.ones(3, dtype=torch.bool, device=device),
        "scale": 1.0,
        "dtype": torch.float32,
        "output_mask": (True, True),
    }
    return NATIVE.add_kept_backward(*(args | changes).values())


@needs_native
def test_native_add_backward_accepts_the_call_that_the_others_change(device):
    grad_x, grad_gamma = _native_backward(device)
    assert torch.equal(grad_x, torch.ones(3, 5, device=device))
    assert torch.equal(grad_gamma, torch.full((5,), 3.0, device=device))


@needs_native
@pytest.mark.parametrize("on", ["device", "meta"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_native_add_backward_wrong_arguments(device, on, requires_grad):
    """Each is refused before memory is read that is not there, also where the backward is itself differentiated."""
    target = device if on == "device" else "meta"

    def ones(*shape, dtype=torch.float32):
        return torch.ones(*shape, dtype=dtype, device=target)

    changes = [
        ("keep", {"sources": ones(3)}),
        ("keep", {"sources": ones(3, 1, dtype=torch.bool)}),
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


@needs_native
def test_native_add_backward_devices(device):
    """A tensor elsewhere has no memory to read here."""
    for name, tensor in (
        ("x", torch.ones(3, 5)),
        ("gamma", torch.ones(5)),
        ("sources", torch.ones(3, dtype=torch.bool)),
    ):
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=name):
            _native_backward(device, **{name: tensor.to("meta")})


@needs_native
def test_native_add_backward_keep_that_is_not_contiguous(device):
    """Either refused or read with its stride; never read as if it were dense."""
    keep = torch.tensor([True, False, False, False, True, False], device=device)[::2]  # True, False, True
    try:
        grad_x, grad_gamma = _native_backward(device, sources=keep)
    except (ValueError, RuntimeError) as error:
        assert "keep" in str(error)
    else:
        assert grad_x.sum(1).tolist() == [5.0, 0.0, 5.0]
        assert grad_gamma.tolist() == [2.0] * 5


# --- stochastic_depth: before the branch is called and before anything is drawn ---


def _skip_error(kind, message, x, *args, branch=_never, **kwargs):
    """stochastic_depth says exactly this, and has not drawn anything unless the branch is what is wrong."""
    states = [generator_state("cpu")] + ([generator_state("cuda")] if NO_CUDA_REASON is None else [])
    with pytest.raises(kind) as error:
        stochastic_depth(x, branch, *args, **kwargs)
    assert type(error.value) is kind
    assert str(error.value) == message
    if branch is _never:
        after = [generator_state("cpu")] + ([generator_state("cuda")] if NO_CUDA_REASON is None else [])
        assert all(torch.equal(*pair) for pair in zip(states, after, strict=True))


@pytest.mark.parametrize("sampling", ["x", "Fixed", "", None, "row"])
@pytest.mark.parametrize(("drop_prob", "training"), EVERY_CASE)
def test_skip_sampling(device, sampling, drop_prob, training):
    message = f'sampling must be "bernoulli" or "fixed", but got {sampling!r}'
    _skip_error(ValueError, message, torch.ones(2, 3, device=device), drop_prob, training, sampling=sampling)
    with pytest.raises(ValueError, match=re.escape(message)):
        StochasticDepth(torch.sin, drop_prob, sampling=sampling)


@pytest.mark.parametrize("dtype", BAD_DTYPES)
@pytest.mark.parametrize(("drop_prob", "training"), EVERY_CASE)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_dtype(device, dtype, drop_prob, training, sampling):
    name = str(dtype).removeprefix("torch.")
    message = f"x must be float16, bfloat16, float32 or float64, but got {name}"
    x = torch.ones(2, 3, device=device).to(dtype)
    _skip_error(TypeError, message, x, drop_prob, training, sampling=sampling)


@pytest.mark.parametrize(("drop_prob", "training"), EVERY_CASE)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("on", ["device", "meta"])
def test_skip_zero_dimensions(device, drop_prob, training, sampling, on):
    x = torch.tensor(1.0, device=device if on == "device" else "meta")
    message = "x must have at least one dimension, the samples, but got a 0-dim tensor"
    _skip_error(ValueError, message, x, drop_prob, training, sampling=sampling)


@pytest.mark.parametrize(("x", "name"), [(1.0, "float"), ([1.0, 2.0], "list"), (None, "NoneType")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_not_a_tensor(x, name, training, sampling):
    _skip_error(TypeError, f"x must be a Tensor, but got {name}", x, 0.5, training, sampling=sampling)


GAMMA_RULE = (
    "gamma must broadcast along one dim of a sample, as [D] or [C, 1, 1] do, or have one element, but got shape "
)


@pytest.mark.parametrize(
    ("shape", "gamma_shape"),
    [((4, 3), (4,)), ((4, 3), (1, 1, 1)), ((4, 3), (4, 1)), ((4, 5, 3), (5, 3)), ((4, 5, 3, 2), (5,)), ((4,), (4,))],
)
@pytest.mark.parametrize(("drop_prob", "training"), EVERY_CASE)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_gamma_shape(device, shape, gamma_shape, drop_prob, training, sampling):
    message = f"{GAMMA_RULE}{list(gamma_shape)} for x of shape {list(shape)}"
    x, gamma = torch.ones(shape, device=device), torch.ones(gamma_shape, device=device)
    _skip_error(ValueError, message, x, drop_prob, training, gamma=gamma, sampling=sampling)


@pytest.mark.parametrize(("drop_prob", "training"), EVERY_CASE)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_gamma(device, drop_prob, training, sampling):
    """Of another kind, dtype or device."""
    x = torch.ones(2, 3, device=device)
    message = "gamma must be float16, bfloat16, float32 or float64, but got int64"
    integers = torch.ones(3, dtype=torch.int64, device=device)
    _skip_error(TypeError, message, x, drop_prob, training, gamma=integers, sampling=sampling)
    message = "gamma must be a Tensor, but got float"
    _skip_error(TypeError, message, x, drop_prob, training, gamma=1.0, sampling=sampling)
    message = f"gamma must be on {x.device}, where x is, but got meta"
    elsewhere = torch.ones(3, device="meta")
    _skip_error(ValueError, message, x, drop_prob, training, gamma=elsewhere, sampling=sampling)


@pytest.mark.parametrize(("drop_prob", "training"), EVERY_CASE)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_batched(device, drop_prob, training, sampling):
    """The sentence says which of them it is."""
    x, right = torch.ones(2, 3, device=device), torch.ones(2, device=device)
    rule = "must have the 2 samples of x, but got shape"
    for wrong, kind, message in (
        (torch.ones(3, 3, device=device), ValueError, f"{rule} [3, 3]"),
        (torch.ones(1, 3, device=device), ValueError, f"{rule} [1, 3]"),
        (torch.ones(0, device=device), ValueError, f"{rule} [0]"),
        (torch.tensor(1.0, device=device), ValueError, f"{rule} []"),
        (torch.ones(2, device="meta"), ValueError, f"must be on {x.device}, where x is, but got meta"),
        ([1.0, 2.0], TypeError, "must be a Tensor or None, but got list"),
    ):
        for place, batched in enumerate([(wrong,), (right, wrong), (right, right, wrong)]):
            sentence = f"batched[{place}] {message}"
            _skip_error(kind, sentence, x, drop_prob, training, batched=batched, sampling=sampling)
    _skip_error(
        ValueError, f"batched[1] {rule} [1]", x, drop_prob, training, batched=[right, right[:1]], sampling=sampling
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("training", [True, False])
def test_skip_batched_of_another_type(device, sampling, training):
    """A tensor alone would be taken for a sequence of its rows, and an iterator is used up by the first look at it."""
    x = torch.ones(2, 3, device=device)
    for batched, name in (
        (torch.ones(2, 2, device=device), "Tensor"),
        (iter([x]), "list_iterator"),
        (None, "NoneType"),
    ):
        message = f"batched must be a sequence of tensors, but got {name}"
        _skip_error(TypeError, message, x, 0.5, training, batched=batched, sampling=sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("training", [True, False])
def test_skip_arguments_of_another_type(device, sampling, training):
    x = torch.ones(2, 3, device=device)
    message = "generator must be a torch.Generator, but got int"
    _skip_error(TypeError, message, x, 0.5, training, generator=3, sampling=sampling)
    state = generator_state(device)
    for call in (lambda: stochastic_depth(x, None, 0.5, training, sampling=sampling), lambda: StochasticDepth(None)):
        with pytest.raises(TypeError, match="^branch must be callable, but got NoneType$"):
            call()
    assert torch.equal(generator_state(device), state)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_of_samples_that_cannot_be_gathered(sampling):
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    message = "x must not be a nested tensor: its samples cannot be gathered"
    _skip_error(TypeError, message, nested, 0.5, True, sampling=sampling)


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_dim_of_nested_tensors(dim):
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    for call in (
        lambda dim: drop_path(nested, 0.5, True, dim=dim),
        lambda dim: drop_path_add(nested, nested, 0.5, True, dim=dim),
        lambda dim: stochastic_depth(nested, torch.neg, 0.5, True, dim=dim),
        lambda dim: draw_keep(nested, 0.5, dim=dim),
        lambda dim: DropPath(0.5, sample_dim=dim)(nested),
    ):
        with pytest.raises(
            ValueError, match="^dim must be 0 for a nested tensor, whose samples are its parts, but got"
        ):
            call(dim)
    assert len(draw_keep(nested, 0.5, dim=-3)) == 2
    assert drop_path(nested, 0.5, True, dim=-3).shape == nested.shape


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("drop_prob", "training"), [*EVERY_CASE, (1.0, True)])
def test_skip_shape_of_the_output(device, sampling, drop_prob, training):
    """Both shapes are named: those of the kept samples."""
    x = torch.ones(4, 5, 3, device=device)
    for change in (
        lambda rows: rows[:, :2],
        lambda rows: rows.sum(-1),
        lambda rows: rows[..., None],
        lambda rows: torch.cat([rows, rows]),
        lambda rows: rows.sum(0, keepdim=True).expand(9, -1, -1),
        lambda rows: rows.sum(),
    ):
        shapes = []

        def branch(rows, change=change, shapes=shapes):
            out = change(rows)
            shapes.extend([list(rows.shape), list(out.shape)])
            return out

        with pytest.raises(ValueError) as error:
            stochastic_depth(x, branch, drop_prob, training, sampling=sampling)
        expected, actual = shapes
        message = f"the output of branch must have the shape of its input, {expected}, but got {actual}"
        assert str(error.value) == message


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("drop_prob", "training"), [*EVERY_CASE, (1.0, True)])
def test_skip_kind_of_the_output(device, sampling, drop_prob, training):
    x = torch.ones(4, 3, device=device)
    dtypes = "must be float16, bfloat16, float32 or float64"
    for branch, kind, message in (
        (lambda rows: rows.long(), TypeError, f"{dtypes}, but got int64"),
        (lambda rows: rows > 0, TypeError, f"{dtypes}, but got bool"),
        (
            lambda rows: (rows, rows),
            TypeError,
            "must be a Tensor, but got a tuple of 2: let branch return the one to add, as "
            "lambda rows: attention(rows, rows, rows)[0] does",
        ),
        (lambda rows: None, TypeError, "must be a Tensor, but got NoneType"),
        (lambda rows: rows.to("meta"), ValueError, f"must be on {x.device}, where x is, but got meta"),
    ):
        sentence = f"the output of branch {message}"
        _skip_error(kind, sentence, x, drop_prob, training, branch=branch, sampling=sampling)


def test_skip_error_in_the_branch_comes_through(device):
    class OfTheBranch(Exception):
        pass

    def branch(rows):
        raise OfTheBranch

    for sampling in SAMPLINGS:
        with pytest.raises(OfTheBranch):
            stochastic_depth(torch.ones(4, 3, device=device), branch, 0.5, training=True, sampling=sampling)


@pytest.mark.parametrize("branch", [None, 3, "relu"])
def test_skip_branch_is_no_function(branch):
    with pytest.raises(TypeError, match="callable"):
        stochastic_depth(torch.ones(4, 3), branch, 0.5, training=True)


def _wrong_generator(sampling, wanted, got):
    where = "the host" if sampling == "bernoulli" else "the device of x"
    return f'generator must be a {wanted} generator, for sampling="{sampling}" draws on {where}, but got one of {got}'


@pytest.mark.parametrize(("drop_prob", "training"), EVERY_CASE)
def test_skip_generator_of_the_host(drop_prob, training):
    """ "fixed" draws where x is; "bernoulli" draws on the host wherever that is."""
    x = torch.ones(2, 3, device="meta")
    message = _wrong_generator("fixed", "meta", "cpu")
    _skip_error(ValueError, message, x, drop_prob, training, sampling="fixed", generator=seeded("cpu"))
    out = stochastic_depth(x, torch.sin, drop_prob, training, generator=seeded("cpu"))
    assert (out.shape, out.device.type) == (x.shape, "meta")


@pytest.mark.skipif(NO_CUDA_REASON is not None, reason=f"a generator of another device needs one: {NO_CUDA_REASON}")
@pytest.mark.parametrize(("drop_prob", "training"), EVERY_CASE)
def test_skip_generator_of_another_device(drop_prob, training):
    for x, sampling, wanted, got in (
        ("cuda", "bernoulli", "cpu", "cuda"),
        ("cpu", "bernoulli", "cpu", "cuda"),
        ("cpu", "fixed", "cpu", "cuda"),
        ("cuda", "fixed", "cuda", "cpu"),
    ):
        generator = seeded(got)
        message = _wrong_generator(sampling, wanted, generator.device)
        x = torch.ones(2, 3, device=x)
        _skip_error(ValueError, message, x, drop_prob, training, sampling=sampling, generator=generator)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_refused_skip_leaves_its_generator_alone(device, sampling):
    generator = seeded("cpu" if sampling == "bernoulli" else device)
    before = generator.get_state()
    x = torch.ones(2, 3, device=device)
    for args, kwargs in (
        ((x, _never, 1.5), {}),
        ((x.long(), _never, 0.5), {}),
        ((x[0, 0], _never, 0.5), {}),
        ((x, _never, 0.5), {"gamma": x}),
        ((x, _never, 0.5), {"batched": [x[:1]]}),
    ):
        with pytest.raises((TypeError, ValueError)):
            stochastic_depth(*args, training=True, sampling=sampling, generator=generator, **kwargs)
    assert torch.equal(generator.get_state(), before)
