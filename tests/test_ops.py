"""Promise: the native ops are well-behaved citizens of the dispatcher, called directly."""

import re

import pytest
import torch
from conftest import (
    ADD_GAMMA_DTYPES,
    ALL_ADD_DTYPES,
    DTYPES,
    FUSED_ADD_DTYPES,
    add_dtype,
    add_inputs,
    along,
    assert_positive_zero,
    assert_rounded_once,
    assert_same_bits,
    case_id,
    dtypes_id,
    exact_add,
    generator_state,
    pairwise,
    predict_keep,
    random_tensor,
    runs_cuda_kernels,
    same_layout,
    zero_dropped,
)

from droppath_ext import reference
from droppath_ext._native import _C

OPS = torch.ops.droppath_ext
# The last two compare or trace several runs, which a random op can pass only where its outcome is certain.
ONE_RUN_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*ONE_RUN_CHECKS, "test_aot_dispatch_dynamic")
BOTH = (False, True)
OUTPUT_MASKS = [(True, True), (True, False), (False, True), (False, False)]

LAYOUTS = {
    "contiguous": lambda device, dtype: random_tensor((8, 3, 5), dtype, device),
    "vectors": lambda device, dtype: random_tensor((8, 4, 16), dtype, device),
    "channels_last": lambda device, dtype: random_tensor((8, 3, 2, 2), dtype, device).to(
        memory_format=torch.channels_last
    ),
    "sequence_first": lambda device, dtype: random_tensor((3, 8, 5), dtype, device).transpose(0, 1),
    "samples_in_the_middle": lambda device, dtype: random_tensor((3, 2, 8, 5), dtype, device).permute(2, 0, 1, 3),
    "sliced": lambda device, dtype: random_tensor((8, 7, 5), dtype, device)[:, 1::2],
    "expanded": lambda device, dtype: random_tensor((8, 1), dtype, device).expand(8, 6),
    "one_dimensional": lambda device, dtype: random_tensor((8,), dtype, device),
    "no_features": lambda device, dtype: random_tensor((8, 0), dtype, device),
    "no_samples": lambda device, dtype: random_tensor((0, 3), dtype, device),
}
WITH_SAMPLES = [name for name in LAYOUTS if name != "no_samples"]

# Which of eight samples each one of an output is made from.
MASKS = {"mask": [True, False, True, True, False, False, True, False], "one_entry": [True], "no_entries": []}
INDICES = {
    "ascending": [0, 3, 4, 7],
    "one": [5],
    "none": [-1],
    "all": list(range(8)),
    "shuffled": [6, 1, -1, 3],
    "repeated": [2, 2, -1, 0, 2],
    "longer": [-1, 7, 0, 1, -1, 2, 3, 4, 5, -1, 6, -1],
    "nothing": [],
}
SOURCES = [*MASKS, *INDICES]


def sources_of(name, device):
    if name in MASKS:
        return torch.tensor(MASKS[name], dtype=torch.bool, device=device)
    return torch.tensor(INDICES[name], dtype=torch.int64, device=device)


def index_of(sources):
    """The same as an index of eight samples."""
    if sources.dtype is torch.int64:
        return sources
    keep = sources if len(sources) else torch.ones(1, dtype=torch.bool, device=sources.device)
    return torch.where(keep.expand(8), torch.arange(8, device=sources.device), -1)


def selected(x, index):
    """One sample after the other: those that the index names, and zeros."""
    samples = [x[i] if i >= 0 else torch.zeros_like(x[0]) for i in index.tolist()]
    return torch.stack(samples) if samples else x[:0]


def gamma_of(layout, x, dtype):
    """gamma along the last dim, or along channels that are not the last."""
    if dtype is None or x.dim() == 1:
        return None
    dim = 1 if layout == "channels_last" else x.dim() - 1
    return along(dim, random_tensor((x.shape[dim],), dtype, x.device, seed=2), x.dim())


def requiring(requires_grad, *tensors):
    """Copies in the same layout; all of them require a gradient, or none."""
    return [None if t is None else t.detach().requires_grad_(requires_grad) for t in tensors]


def nested_alike(a, b):
    """Whether the dims that have a stride of their own nest alike in both."""
    long = [dim for dim in range(a.dim()) if a.shape[dim] > 1 and b.shape[dim] > 1]
    return sorted(long, key=a.stride) == sorted(long, key=b.stride)


# --- drop_path and drop_path_add: they draw ---


def drawing_case(layout, dtypes, device):
    """The op, and its tensors: drop_path's where there is no dtype of a residual."""
    x = LAYOUTS[layout](device, dtypes[0])
    if len(dtypes) == 1:
        return OPS.drop_path, (x,)
    return OPS.drop_path_add, (x, same_layout(x, dtypes[1]), gamma_of(layout, x, dtypes[2]))


DRAWING_DTYPES = [*((dtype,) for dtype in DTYPES), *FUSED_ADD_DTYPES]


@pytest.mark.parametrize(
    ("layout", "dtypes", "requires_grad", "per_sample"),
    pairwise(list(LAYOUTS), DRAWING_DTYPES, BOTH, BOTH),
    ids=case_id,
)
def test_opcheck_of_ops_that_draw(device, layout, dtypes, requires_grad, per_sample):
    op, tensors = drawing_case(layout, dtypes, device)
    for drop_prob, checks in ((0.0, ALL_CHECKS), (1.0, ALL_CHECKS), (0.5, ONE_RUN_CHECKS)):
        args = (*requiring(requires_grad, *tensors), drop_prob, True, per_sample, None)
        torch.library.opcheck(op.default, args, test_utils=checks)


@pytest.mark.parametrize("requires_grad", pairwise(BOTH, BOTH, BOTH))
def test_opcheck_where_some_require_a_gradient(device, requires_grad):
    tensors = add_inputs((4, 3, 5), (torch.float32,) * 3, device)
    x, residual, gamma = (t.requires_grad_(r) for t, r in zip(tensors, requires_grad, strict=True))
    torch.library.opcheck(OPS.drop_path_add.default, (x, residual, gamma, 1.0, True, True), test_utils=ALL_CHECKS)
    sources, rest = torch.tensor([True, False, True, False], device=device), (2.0, torch.float32)
    torch.library.opcheck(OPS.add_kept.default, (x, residual, gamma, sources, 2.0), test_utils=ALL_CHECKS)
    for output_mask in OUTPUT_MASKS:
        args = (residual, x, gamma, sources, *rest, output_mask)
        torch.library.opcheck(OPS.add_kept_backward.default, args, test_utils=ALL_CHECKS)


@pytest.mark.parametrize(
    ("layout", "dtypes", "per_sample", "drop_prob"),
    pairwise(list(LAYOUTS), DRAWING_DTYPES, BOTH, [0.0, 0.3, 1.0]),
    ids=case_id,
)
def test_output_and_mask(device, layout, dtypes, per_sample, drop_prob):
    """Fresh memory in the layout of x; drop_path_add has no mask where nothing can be dropped, and draws none."""
    op, (x, *more) = drawing_case(layout, dtypes, device)
    draws = not more or drop_prob > 0.0
    before = generator_state(device)
    expected_keep = torch.empty(0, dtype=torch.bool, device=device)
    if draws:
        expected_keep = predict_keep(x, drop_prob, "row" if per_sample else "batch")
    out, keep = op(x, *more, drop_prob, True, per_sample)
    assert keep.device == x.device
    assert_same_bits(keep, expected_keep)
    assert torch.equal(generator_state(device), before) != draws
    scale = reference.keep_scale(drop_prob, True)
    if more:
        used = keep if draws else torch.ones(1, dtype=torch.bool, device=device)
        assert out.dtype == add_dtype(x, *more)
        assert_rounded_once(out, *exact_add(x, *more, used, scale))
    else:
        assert_same_bits(out, reference.apply_keep_mask(x, keep, scale))
    assert out.stride() == torch.empty_like(x).stride()
    assert not out.numel() or out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("per_sample", BOTH)
def test_gradient_of_the_op(device, per_sample):
    x = random_tensor((6, 3), device=device).requires_grad_()
    out, keep = OPS.drop_path(x, 0.5, True, per_sample, None)
    assert not keep.requires_grad
    grad = random_tensor((6, 3), device=device, seed=1)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    assert_same_bits(grad_x, reference.apply_keep_mask(grad, keep, 2.0))


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_opcheck_draw_fixed(device, size, dtype):
    """Of x only the number of samples and the device matter."""
    x = torch.zeros(8, 3, dtype=dtype, device=device)
    checks = ALL_CHECKS if size == 8 else ONE_RUN_CHECKS
    torch.library.opcheck(OPS.draw_fixed.default, (x, size), test_utils=checks)


@pytest.mark.parametrize("per_sample", BOTH)
@pytest.mark.parametrize("rate", [torch.float32, torch.float64])
def test_opcheck_draw_keep(device, per_sample, rate):
    """A rate of 1 draws the same in every run."""
    x = torch.zeros(8, 3, device=device)
    for p, checks in ((0.5, ONE_RUN_CHECKS), (1.0, ALL_CHECKS)):
        arguments = (x, torch.tensor(p, dtype=rate, device=device), True, per_sample)
        torch.library.opcheck(OPS.draw_keep.default, arguments, test_utils=checks)


@pytest.mark.parametrize("requires_grad", BOTH)
def test_opcheck_of_a_factor(device, requires_grad):
    """test_options has what it does."""
    x, residual, gamma = (t.requires_grad_(requires_grad) for t in add_inputs((8, 3), (torch.float32,) * 3, device))
    keep = torch.arange(8, device=device) % 3 != 1
    factor = torch.tensor(1.5, dtype=torch.float64, device=device)
    torch.library.opcheck(OPS.scale_kept.default, (x, keep, 2.0, factor), test_utils=ALL_CHECKS)
    torch.library.opcheck(OPS.add_kept.default, (x, residual, gamma, keep, 2.0, factor), test_utils=ALL_CHECKS)
    arguments = (residual, x, gamma, keep, 2.0, torch.float32, [True, True], factor)
    torch.library.opcheck(OPS.add_kept_backward.default, arguments, test_utils=ALL_CHECKS)


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [
        (torch.ones(2), ValueError, r"drop_prob must have no dimension, but got shape \[2\]"),
        (torch.tensor(0.5, dtype=torch.float16), TypeError, "drop_prob must be float32 or float64, but got float16"),
        (torch.tensor(0.5, device="meta"), ValueError, "drop_prob must be on cpu, where x is, but got meta"),
    ],
)
def test_draw_keep_of_a_bad_rate(rate, error, message):
    with pytest.raises(error, match=message):
        OPS.draw_keep(torch.ones(4, 3), rate, True, True)


# --- scale_kept, add_kept and add_kept_backward: of given sources ---


@pytest.mark.parametrize(
    ("layout", "dtype", "name", "scale"),
    pairwise(WITH_SAMPLES, DTYPES, SOURCES, [1.0, 2.0, 1 / 0.7]),
)
def test_scale_kept(device, layout, dtype, name, scale):
    """Rounded once; with scale 1 copied bit for bit, NaN included. The samples lie in memory as those of x."""
    x, sources = LAYOUTS[layout](device, dtype).clone(), sources_of(name, device)
    if x.numel():
        x[(0,) * x.dim()] = float("nan") if scale == 1.0 else float("inf")
    out = OPS.scale_kept(x, sources, scale)
    index = index_of(sources)
    expected = selected(x, index)
    if scale == 1.0:
        assert_same_bits(out, expected)
    else:
        assert_same_bits(out, reference.apply_keep_mask(expected, index >= 0, scale))
    assert not out.numel() or out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    if x.numel() and out.numel():
        assert nested_alike(out, x)


def add_case(layout, dtypes, device, name):
    """x of eight samples, a residual of as many as the sources make of them, gamma, and the sources."""
    x, sources = LAYOUTS[layout](device, dtypes[0]), sources_of(name, device)
    residual = LAYOUTS[layout](device, dtypes[1])
    if len(index_of(sources)) != 8:
        residual = selected(random_tensor(residual.shape, dtypes[1], device, seed=7), index_of(sources).clamp(min=0))
    return x, residual, gamma_of(layout, x, dtypes[2]), sources


@pytest.mark.parametrize(("layout", "dtypes", "name"), pairwise(WITH_SAMPLES, FUSED_ADD_DTYPES, SOURCES), ids=case_id)
def test_add_kept(device, layout, dtypes, name):
    """Rounded once, in the layout of the residual; bit for bit the residual where there is no source."""
    x, residual, gamma, sources = add_case(layout, dtypes, device, name)
    out = OPS.add_kept(x, residual, gamma, sources, 1.7)
    index = index_of(sources)
    assert out.dtype == add_dtype(x[:0], residual[:0], gamma)
    assert_rounded_once(out, *exact_add(selected(x, index), residual, gamma, index >= 0, 1.7))
    assert_same_bits(out[index < 0], residual[index < 0].to(out.dtype))
    assert out.stride() == torch.empty_like(residual).stride()


@pytest.mark.parametrize(("dtype", "value", "with_gamma"), pairwise(DTYPES, [float("nan"), -0.0, float("inf")], BOTH))
@pytest.mark.parametrize("name", ["mask", "shuffled"])
def test_nothing_is_read_that_is_not_kept(device, dtype, value, with_gamma, name):
    """Samples that nobody names may hold anything, and so may the residual, the gradient and gamma where none is."""
    x, residual, gamma, sources = add_case("contiguous", (dtype,) * 3, device, name)
    gamma = gamma if with_gamma else None
    index = index_of(sources)
    unnamed = torch.ones(8, dtype=torch.bool, device=device)
    unnamed[index[index >= 0]] = False
    x[unnamed] = value
    residual[index < 0] = value
    out = OPS.add_kept(x, residual, gamma, sources, 2.0)
    assert out[index >= 0].isfinite().all()
    assert_same_bits(out[index < 0], residual[index < 0])
    assert_positive_zero(OPS.scale_kept(x, sources, 2.0)[index < 0])
    # Of the backward x has the samples that the residual had, and the gradient those of x.
    grads = OPS.add_kept_backward(x, residual, gamma, sources, 2.0, dtype, (True, with_gamma))
    assert_positive_zero(grads[0][index < 0])
    assert all(grad.isfinite().all() for grad in grads)
    nothing = torch.full((len(residual),), -1, device=device)
    if with_gamma:
        gamma = torch.full_like(gamma, value)
    assert_same_bits(OPS.add_kept(x, residual, gamma, nothing, 2.0), residual)
    for grad in OPS.add_kept_backward(x, residual, gamma, nothing, 2.0, dtype, (True, with_gamma)):
        assert_positive_zero(grad)


@pytest.mark.parametrize(
    ("layout", "dtypes", "name", "output_mask", "scale"),
    pairwise(WITH_SAMPLES, FUSED_ADD_DTYPES, SOURCES, OUTPUT_MASKS, [1.0, 2.0, 1 / 0.7]),
    ids=case_id,
)
def test_add_kept_backward(device, layout, dtypes, name, output_mask, scale):
    """What is asked for, in the dtypes and shapes of the inputs; what is not comes back empty."""
    grad, x, gamma, sources = add_case(layout, (torch.float32, dtypes[0], dtypes[2]), device, name)
    grad = LAYOUTS[layout](device, add_dtype(x[:0], x[:0].to(dtypes[1]), gamma))
    output_mask = (output_mask[0], output_mask[1] and gamma is not None)
    grad_x, grad_gamma = OPS.add_kept_backward(
        grad, x if output_mask[1] else None, gamma, sources, scale, dtypes[0], output_mask
    )
    index = index_of(sources)
    scaled = selected(grad, index).double() * scale
    if output_mask[0]:
        assert (grad_x.dtype, grad_x.shape) == (dtypes[0], x.shape)
        exact = scaled if gamma is None else zero_dropped(scaled * gamma.double(), index >= 0)
        assert_rounded_once(grad_x, exact, exact.abs())
        assert_positive_zero(grad_x[index < 0])
    else:
        assert grad_x.shape == (0,)
    if output_mask[1]:
        terms = scaled * zero_dropped(x.double(), index >= 0)
        assert (grad_gamma.dtype, grad_gamma.shape) == (gamma.dtype, gamma.shape)
        assert_rounded_once(grad_gamma, terms.sum_to_size(gamma.shape), terms.abs().sum_to_size(gamma.shape))
    else:
        assert grad_gamma.shape == (0,)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_backward_of_a_gradient_narrower_than_gamma(device, half):
    """Whoever calls the op may give one: it is read as what it is."""
    grad, x, _ = add_inputs((6, 5), (half, half, None), device)
    gamma = random_tensor((5,), torch.float32, device, seed=2)
    keep = torch.tensor([True, False, True, True, False, True], device=device)
    for output_mask in OUTPUT_MASKS[:3]:
        grads = OPS.add_kept_backward(grad, x, gamma, keep, 2.0, half, output_mask)
        wide = OPS.add_kept_backward(grad.float(), x, gamma, keep, 2.0, half, output_mask)
        for narrow_result, wide_result in zip(grads, wide, strict=True):
            assert_same_bits(narrow_result, wide_result)


@pytest.mark.parametrize(
    ("layout", "dtypes", "name", "requires_grad"),
    pairwise(WITH_SAMPLES, FUSED_ADD_DTYPES, ["mask", "no_entries", "shuffled", "repeated"], BOTH),
    ids=case_id,
)
def test_opcheck_of_given_sources(device, layout, dtypes, name, requires_grad):
    x, residual, gamma, sources = add_case(layout, dtypes, device, name)
    x, residual, gamma = requiring(requires_grad, x, residual, gamma)
    torch.library.opcheck(OPS.scale_kept.default, (x, sources, 2.0), test_utils=ALL_CHECKS)
    torch.library.opcheck(OPS.add_kept.default, (x, residual, gamma, sources, 1.7), test_utils=ALL_CHECKS)
    (grad,) = requiring(requires_grad, x.detach().to(add_dtype(x[:0], residual[:0], gamma)))
    (branch,) = requiring(requires_grad, residual.detach().to(dtypes[0]))
    args = (grad, branch, gamma, sources, 1.7, dtypes[0], (True, gamma is not None))
    torch.library.opcheck(OPS.add_kept_backward.default, args, test_utils=ALL_CHECKS)


@pytest.mark.parametrize("name", SOURCES)
def test_values_do_not_depend_on_whether_a_gradient_is_asked_for(device, name):
    """Signs of zeros included, and where there are no samples to take."""
    x, residual, _, sources = add_case("contiguous", (torch.float32, torch.float32, None), device, name)
    residual[:, 0] = -0.0
    x[:, 0] = 0.0

    def values(requires_grad):
        (t, r) = requiring(requires_grad, x, residual)
        return OPS.scale_kept(t, sources, 2.0), OPS.add_kept(t, r, None, sources, 2.0)

    for with_graph, plain in zip(values(True), values(False), strict=True):
        assert_same_bits(with_graph.detach(), plain)
    nothing = torch.full((3,), -1, device=device)
    for requires_grad in BOTH:
        none = torch.empty(0, 4, device=device, requires_grad=requires_grad)
        assert_positive_zero(OPS.scale_kept(none, nothing, 2.0))


@pytest.mark.parametrize("name", ["mask", "shuffled"])
def test_gamma_gradient_alone_copies_what_it_must(device, name):
    """A gradient that is expanded, as that of a sum, is made dense once."""
    grad = torch.ones(1, 1, 1, device=device).expand(8, 16, 64)
    _, x, gamma, sources = add_case("vectors", (torch.float32,) * 3, device, name)
    x = random_tensor((len(index_of(sources)), 16, 64), device=device)
    gamma = random_tensor((64,), device=device)
    with torch.profiler.profile() as profile:
        OPS.add_kept_backward(grad, x, gamma, sources, 2.0, torch.float32, (False, True))
    assert [event.name for event in profile.events()].count("aten::copy_") <= 1


# --- what stochastic_depth calls: no ops, for they trust that one index undoes the other ---


def index_and_inverse(name, device):
    index = sources_of(name, device)
    inverse = torch.full((8,), -1, device=device)
    inverse[index[index >= 0]] = torch.arange(len(index), device=device)[index >= 0]
    return index, inverse


UNIQUE = [name for name in INDICES if name not in ("repeated", "longer")]


@pytest.mark.parametrize(
    ("dtype", "layout", "name"),
    pairwise(DTYPES, [name for name in WITH_SAMPLES if name not in ("sliced", "expanded")], UNIQUE),
)
def test_in_place(device, dtype, layout, name):
    """What add_kept gives, in the residual's own memory; what is dropped stays as it is, NaN included."""
    kept, slots = index_and_inverse(name, device)
    residual = LAYOUTS[layout](device, dtype)
    x = random_tensor((len(kept), *residual.shape[1:]), dtype, device, seed=1)
    residual[slots < 0] = float("nan")
    expected = OPS.add_kept(x, residual, None, slots, 1.0)
    address = residual.data_ptr()
    _C.add_kept_(residual, x, slots)
    assert residual.data_ptr() == address
    assert_same_bits(residual, expected)


@pytest.mark.parametrize("features", [3, 20000])  # of the last, two threads take their shares
def test_mask_of_any_bytes(features):
    """A view of numbers as bool holds other bytes than 0 and 1, and ATen takes them for True."""
    numbers = torch.tensor([0, 2, 255, 1, 0, 128], dtype=torch.uint8)
    keep, clean = numbers.view(torch.bool), numbers != 0
    x = random_tensor((6, features))
    assert_same_bits(OPS.scale_kept(x, keep, 2.0), OPS.scale_kept(x, clean, 2.0))
    for actual, expected in zip(*(_C.index_kept(mask, 6, x.device)[:2] for mask in (keep, clean)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.skipif(runs_cuda_kernels(torch.device("cpu")), reason="a GPU has no such memory")
@pytest.mark.parametrize("dtypes", ADD_GAMMA_DTYPES, ids=dtypes_id)
def test_tensors_aligned_to_nothing(dtypes):
    """As those made from a buffer may be. What is read element by element is what UndefinedBehaviorSanitizer sees."""

    def misaligned(tensor):
        memory = bytearray(tensor.nbytes + 1)
        return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape).copy_(tensor)

    x, residual, gamma = add_inputs((8, 5), dtypes)
    for sources in (torch.tensor([0, -1, 3, 7, 7, 1, -1, 2]), torch.arange(8) % 3 == 0):
        arguments = {"x": x, "residual": residual, "gamma": gamma, "sources": sources, "scale": 2.0}
        moved = {name: misaligned(t) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
        assert_same_bits(OPS.add_kept(**moved), OPS.add_kept(**arguments))
        grad = OPS.add_kept(**arguments)
        backward = {"gamma": gamma, "sources": sources, "scale": 2.0, "dtype": x.dtype, "output_mask": [True, True]}
        pairs = zip(
            OPS.add_kept_backward(grad, x, **backward),
            OPS.add_kept_backward(
                misaligned(grad),
                misaligned(x),
                **backward | {"gamma": misaligned(gamma), "sources": misaligned(sources)},
            ),
            strict=True,
        )
        for expected, actual in pairs:
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("requires_grad", BOTH)
def test_index_whose_memory_holds_other_values(requires_grad):
    """A negation that is pending, and zeros that are nowhere: what is checked is what is selected."""
    x = random_tensor((3, 2)).requires_grad_(requires_grad)
    for index in (torch._neg_view(torch.tensor([-2, 0, 1])), torch._efficientzerotensor(3, dtype=torch.int64)):
        assert_same_bits(OPS.scale_kept(x, index, 2.0).detach(), OPS.scale_kept(x, index + 0, 2.0).detach())
    for index in (torch._neg_view(torch.tensor([-3])), torch._neg_view(torch.tensor([2]))):
        with pytest.raises(IndexError, match="an index must be between -1 and 2, but got (3|-2)"):
            OPS.scale_kept(x, index, 2.0)


@pytest.mark.parametrize("requires_grad", BOTH)
def test_infinite_scale_of_what_is_not_kept(device, requires_grad):
    """Zeros are zeros, not NaN: in the kernels, and in the ATen operations that stand for them under a graph."""
    x = torch.ones(2, 3, device=device, requires_grad=requires_grad)
    keep = torch.tensor([True, False], device=device)
    infinite, nan = (torch.tensor(v, dtype=torch.float64, device=device) for v in (float("inf"), float("nan")))
    for scale, given in ((float("inf"), None), (float("nan"), None), (1.0, infinite), (1.0, nan)):
        outs = [OPS.scale_kept(x, keep, scale, given)]
        outs.append(OPS.add_kept_backward(x, None, None, keep, scale, x.dtype, [True, False], given)[0])
        for out in outs:
            assert not out[0].isfinite().any()
            assert_positive_zero(out[1])
        gamma = torch.ones(3, device=device)
        of_gamma = OPS.add_kept_backward(x, x.detach(), gamma, keep & False, scale, x.dtype, [False, True], given)[1]
        assert of_gamma.eq(0).all()


def test_in_place_shared_by_threads(device):
    kept = torch.arange(0, 40, 3, device=device)
    slots = torch.full((40,), -1, device=device)
    slots[kept] = torch.arange(len(kept), device=device)
    residual, x = random_tensor((40, 5001), device=device), random_tensor((len(kept), 5001), device=device, seed=1)
    expected = residual.clone()
    expected[kept] += x
    _C.add_kept_(residual, x, slots)
    assert_same_bits(residual, expected)


@pytest.mark.parametrize("name", UNIQUE)
@pytest.mark.parametrize("uses_x", BOTH)
def test_gather_has_derivatives(device, name, uses_x):
    """Of both of its outputs: the samples, and x for whatever else is computed from it."""
    x = random_tensor((8, 3), torch.float64, device).requires_grad_()
    index, inverse = index_and_inverse(name, device)

    def function(x):
        samples, alias = _C.gather(x, index, inverse)
        return (samples.sin(), alias.cos()) if uses_x else samples.sin()

    assert_same_bits(_C.gather(x, index, inverse)[0], selected(x, index))
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


class _WithGradient(torch.autograd.Function):
    """The identity, whose gradient goes through a function."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.function(grad), None


# Gradients whose memory is not there, or holds other values than they have.
ODD_GRADIENTS = {
    "without_memory": lambda grad: torch._efficientzerotensor(grad.shape, dtype=grad.dtype, device=grad.device),
    "negative_view": lambda grad: torch._neg_view(-2 * grad),
    "expanded": lambda grad: grad[:1, :1].expand(grad.shape),
}


@pytest.mark.parametrize("name", ODD_GRADIENTS)
@pytest.mark.parametrize("where", ["samples", "alias", "both"])
@pytest.mark.parametrize("shape", [(8, 3), (8, 1)])
def test_gather_adds_odd_gradients(device, name, where, shape):
    """Where both gradients meet, nothing is read or written behind the dispatcher's back."""
    odd = ODD_GRADIENTS[name]
    index, inverse = index_and_inverse("ascending", device)

    def gradient(samples_of, alias_of, x):
        total = (samples_of(x) * 3).sum() + (alias_of(x) * 5).sum()
        return torch.autograd.grad(total, x)[0]

    x = random_tensor(shape, torch.float64, device).requires_grad_()
    samples, alias = _C.gather(x, index, inverse)

    def apply(tensor, is_odd):
        return _WithGradient.apply(tensor, odd) if is_odd else tensor

    actual = gradient(lambda _: apply(samples, where != "alias"), lambda _: apply(alias, where != "samples"), x)
    expected = gradient(lambda x: apply(x[index], where != "alias"), lambda x: apply(x, where != "samples"), x)
    torch.testing.assert_close(actual, expected)


def test_gather_of_batched_gradients(device):
    """vmap batches the gradient of one output, and not that of the other."""
    x = random_tensor((8, 3), torch.float64, device).requires_grad_()
    index, inverse = index_and_inverse("ascending", device)
    samples, alias = _C.gather(x, index, inverse)
    outputs = [samples.sin(), alias.cos().sum()]
    batch = random_tensor((2, len(index), 3), torch.float64, device, seed=1)
    one = torch.ones((), dtype=torch.float64, device=device)

    def gradient(grad):
        return torch.autograd.grad(outputs, x, [grad, one], retain_graph=True)[0]

    torch.testing.assert_close(torch.vmap(gradient)(batch), torch.stack([gradient(grad) for grad in batch]))


@pytest.mark.parametrize(
    ("name", "with_gamma", "requires_grad"), pairwise([*UNIQUE, None], BOTH, pairwise(BOTH, BOTH, BOTH))
)
def test_scatter_add_has_derivatives(device, name, with_gamma, requires_grad):
    kept, slots = index_and_inverse(name, device) if name else (None, None)
    tensors = add_inputs((8, 3), (torch.float64,) * 3, device)
    y, residual, gamma = (t.requires_grad_(r) for t, r in zip(tensors, requires_grad, strict=True))
    y = y.detach()[: len(kept)].requires_grad_(requires_grad[0]) if name else y
    inputs = (y, residual, gamma) if with_gamma else (y, residual)

    def function(y, residual, gamma=None):
        return _C.scatter_add(y, residual, gamma, slots, kept, 1.7)

    if not any(t.requires_grad for t in inputs):
        assert not function(*inputs).requires_grad
        return
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# --- shapes without data: what fake tensors and exporters rely on ---


@pytest.mark.parametrize(("layout", "dtypes", "per_sample"), pairwise(list(LAYOUTS), DRAWING_DTYPES, BOTH), ids=case_id)
def test_meta_tensors_of_ops_that_draw(layout, dtypes, per_sample):
    op, tensors = drawing_case(layout, dtypes, "cpu")
    x = tensors[0]
    meta = [
        None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors
    ]
    for drop_prob in (0.0, 0.5):
        out, keep = op(*meta, drop_prob, True, per_sample)
        real, real_keep = op(*tensors, drop_prob, True, per_sample)
        assert out.device.type == keep.device.type == "meta"
        assert (out.shape, out.dtype, out.stride()) == (x.shape, real.dtype, torch.empty_like(meta[0]).stride())
        assert (keep.shape, keep.dtype) == (real_keep.shape, torch.bool)


@pytest.mark.parametrize(
    ("layout", "dtypes", "name", "output_mask"),
    pairwise(WITH_SAMPLES, FUSED_ADD_DTYPES, SOURCES, OUTPUT_MASKS),
    ids=case_id,
)
def test_meta_tensors_of_given_sources(layout, dtypes, name, output_mask):
    x, residual, gamma, sources = add_case(layout, dtypes, "cpu", name)
    output_mask = (output_mask[0], output_mask[1] and gamma is not None)
    grad = x.to(add_dtype(x[:0], residual[:0], gamma))
    branch = residual.to(dtypes[0]) if output_mask[1] else None

    def to_meta(t):
        return t if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    def results(move):
        return (
            OPS.scale_kept(move(x), move(sources), 2.0),
            OPS.add_kept(move(x), move(residual), move(gamma), move(sources), 2.0),
            *OPS.add_kept_backward(move(grad), move(branch), move(gamma), move(sources), 2.0, dtypes[0], output_mask),
        )

    for real, meta in zip(results(lambda t: t), results(to_meta), strict=True):
        assert (meta.device.type, meta.shape, meta.dtype) == ("meta", real.shape, real.dtype)
        assert not real.numel() or nested_alike(real, meta)


def test_meta_tensors_of_draw_fixed():
    slots, kept = OPS.draw_fixed(torch.empty(8, 3, device="meta"), 3)
    assert (slots.shape, kept.shape, slots.dtype, kept.dtype) == ((8,), (3,), torch.int64, torch.int64)
    assert slots.device.type == kept.device.type == "meta"


# --- what is refused, before memory is read that is not there ---


@pytest.fixture(params=["device", "meta"])
def on(request, device):
    return device if request.param == "device" else torch.device("meta")


@pytest.mark.parametrize("dtypes", [t for t in ALL_ADD_DTYPES if t not in FUSED_ADD_DTYPES], ids=dtypes_id)
def test_other_mixtures(on, dtypes):
    """No kernel is built for them: the public functions compute them otherwise."""
    x, residual, gamma = add_inputs((4, 3), dtypes, on)
    with pytest.raises(TypeError, match="dtype.*drop_path_add does"):
        OPS.drop_path_add(x, residual, gamma, 0.5, True, True)
    with pytest.raises(TypeError, match="dtype.*stochastic_depth does"):
        OPS.add_kept(x, residual, gamma, torch.tensor([0, 1, 2, 3], device=on), 1.0)


def right_calls(on):
    """Calls that are right, by the arguments' names."""
    ones = {"device": on}
    index = torch.tensor([0, 3, 4, 7], device=on)
    x, gamma = torch.ones(8, 3, **ones), torch.ones(3, **ones)
    backward = {"dtype": torch.float32, "output_mask": (True, True)}
    return [
        (OPS.scale_kept, {"x": x, "sources": index, "scale": 2.0}),
        (OPS.add_kept, {"x": x, "residual": torch.ones(4, 3, **ones), "gamma": gamma, "sources": index, "scale": 2.0}),
        (
            OPS.add_kept_backward,
            {"grad": x, "x": torch.ones(4, 3, **ones), "gamma": gamma, "sources": index, "scale": 2.0} | backward,
        ),
    ]


def test_wrong_sources(on):
    """Read past their end they would be silent out-of-bounds accesses."""
    for op, arguments in right_calls(on):
        op(**arguments)
        for sources in (
            torch.ones(4, device=on),
            torch.ones(4, dtype=torch.int32, device=on),
            torch.ones(4, 1, dtype=torch.int64, device=on),
            torch.tensor(1, device=on),
            torch.tensor(True, device=on),
            torch.ones(7, dtype=torch.bool, device=on),
            torch.ones(9, dtype=torch.bool, device=on),
            torch.ones(8, 1, dtype=torch.bool, device=on),
        ):
            with pytest.raises((TypeError, ValueError, RuntimeError), match="sources|keep mask|index"):
                op(**arguments | {"sources": sources})


def test_wrong_operands(on):
    ones = {"device": on}
    wrong = {
        "x": [torch.ones(3, 3, **ones), torch.ones(4, 2, **ones), torch.ones(4, 3, dtype=torch.int64, **ones), None],
        "residual": [torch.ones(3, 3, **ones), torch.ones(4, 2, **ones), torch.tensor(1.0, **ones)],
        "gamma": [torch.ones(4, **ones), torch.ones(8, 3, **ones), torch.ones(3, dtype=torch.int64, **ones)],
        "grad": [torch.ones(8, 3, dtype=torch.int64, **ones), torch.tensor(1.0, **ones)],
    }
    calls = right_calls(on)
    for op, name in ((calls[1], "residual"), (calls[1], "gamma"), (calls[2], "x"), (calls[2], "grad")):
        for value in wrong[name]:
            with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"\b{name}\b"):
                op[0](**op[1] | {name: value})
    for value in (torch.ones(8, 3, dtype=torch.int64, **ones), torch.tensor(1.0, **ones)):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"\bx\b"):
            OPS.scale_kept(value, calls[0][1]["sources"], 2.0)


@pytest.mark.parametrize("requires_grad", BOTH)
def test_operands_without_all_of_their_memory(requires_grad):
    """Nobody keeps a storage from being resized under the tensors that lie in it: they would be read past its end."""
    calls = [*right_calls("cpu"), (OPS.draw_keep, {"drop_prob": torch.tensor(0.5)})]
    calls[-1][1].update(x=torch.ones(8, 3), scale_by_keep=True, per_sample=True)
    for op, arguments in calls:
        if "scale" in arguments:
            arguments["factor"] = torch.tensor(1.0, dtype=torch.float64)
        for name in ("x", "grad"):  # then the op runs as operations of ATen
            if name in arguments and requires_grad:
                arguments[name] = arguments[name].clone().requires_grad_()
        for name, value in arguments.items():
            if not isinstance(value, torch.Tensor) or (op, name) == (OPS.draw_keep, "x"):
                continue
            needed = value.untyped_storage().nbytes()
            for nbytes in (0, needed - 1):
                short = value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())
                short.untyped_storage().resize_(nbytes)
                message = f"{name} must have its {needed} bytes of memory, but its storage was resized to {nbytes}"
                with pytest.raises(ValueError, match=message):
                    op(**arguments | {name: short})


@pytest.mark.parametrize(
    ("keep", "size", "error", "sentence"),
    [
        (torch.ones(3).bool(), 4, ValueError, "keep must have an entry for each of the 4 samples, or one, but got [3]"),
        (torch.ones(0).bool(), 4, ValueError, "keep must have an entry for each of the 4 samples, or one, but got [0]"),
        (torch.ones(1).bool(), -1, ValueError, "size must be a number of samples, but got -1"),
        (torch.ones(1).bool(), 2**63 - 1, ValueError, "size must be a number of samples, but got 9223372036854775807"),
        (torch.ones(4), 4, TypeError, "keep must be bool, but got float32"),
    ],
)
def test_index_kept_of_a_wrong_mask(keep, size, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        _C.index_kept(keep, size, torch.device("cpu"))


@pytest.mark.parametrize("per_sample", BOTH)
@pytest.mark.parametrize("size", [-1, 2**63 - 1])
def test_draw_bernoulli_of_a_wrong_size(size, per_sample):
    with pytest.raises(ValueError, match=f"size must be a number of samples, but got {size}"):
        _C.draw_bernoulli(size, 0.5, torch.device("cpu"), None, per_sample)


@pytest.mark.parametrize("inverse", [[0], [0, 1, 2, -1, -1, -1, -1, -1, -1], [9] * 8, [-2] * 8])
def test_gather_by_an_inverse_that_is_none(inverse):
    """The backward adds in place, where no op looks at the index."""
    x = torch.ones(8, 3, requires_grad=True)
    samples, alias = _C.gather(x, torch.tensor([0, 3, 5]), torch.tensor(inverse))
    with pytest.raises((ValueError, IndexError), match="index|samples"):
        torch.autograd.grad((samples * 2).sum() + (alias * 2).sum(), x)


@pytest.mark.parametrize("requires_grad", BOTH)
def test_indices_that_point_nowhere_are_refused_on_the_host(requires_grad):
    """The CPU can look; a GPU could not without waiting for itself."""
    for wrong in (8, 100, -2, 2**40):
        with pytest.raises(IndexError, match=f"an index must be between -1 and 7, but got {wrong}"):
            OPS.scale_kept(torch.ones(8, 3, requires_grad=requires_grad), torch.tensor([0, wrong, 4, 7]), 2.0)


def test_draw_fixed_of_a_wrong_count(on):
    x = torch.ones(4, 3, device=on)
    for count in (0, -1, 5):
        with pytest.raises((ValueError, RuntimeError), match=f"count must be between 1 and the 4 samples.*{count}"):
            OPS.draw_fixed(x, count)
    with pytest.raises((ValueError, RuntimeError), match="0-dim"):
        OPS.draw_fixed(x[0, 0], 1)
