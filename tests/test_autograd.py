"""Promise: gradients of every order and kind, and nothing kept that is not needed."""

from functools import partial

import pytest
import torch
from conftest import (
    ADD_GAMMA_DTYPES,
    DTYPES,
    SAMPLINGS,
    TokenBranch,
    add_inputs,
    added_samples,
    assert_same_bits,
    case_id,
    dtypes_id,
    like,
    needs_native,
    pairwise,
    predict_keep,
    random_tensor,
    zero_dropped,
)
from op_cases import ADD, ADD_GAMMA, BATCH_MODE_OPS, DROP_PATH, DROP_PATH_OPS, OPS, SKIP_FIXED
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from droppath_ext import drop_path, drop_path_add, stochastic_depth

# Which of an op's inputs require a gradient, or carry a tangent: by their number, each alone and some together.
SUBSETS = {
    1: [("x",)],
    2: [("x",), ("residual",), ("x", "residual")],
    3: [
        *(("x",), ("residual",), ("gamma",)),
        *(("x", "residual"), ("x", "gamma"), ("residual", "gamma"), ("x", "residual", "gamma")),
    ],
    4: [("x",), ("gamma",), ("bias",), ("weight",), ("x", "weight"), ("x", "gamma", "bias", "weight")],
}
# Shapes of x, and of a gamma for it.
GAMMA_SHAPES = {"last": ((5, 3), (3,)), "channels": ((4, 2, 3, 2), (2, 1, 1)), "middle": ((4, 2, 3, 2), (1, 3, 1))}
SHAPES = {
    **dict.fromkeys((1, 2), [((5, 3), None), ((4, 2, 3, 2), None), ((6,), None)]),
    3: list(GAMMA_SHAPES.values()),
    4: [((6, 4), (4,))],
}


def _of_each(ops, arguments):
    """Cases (op, ...): for each op pairwise combinations of the arguments that it has."""
    return [(op, *case) for op in ops for case in pairwise(*arguments(op))]


def _requiring(op, names, tensors):
    """The tensors, of which those so named require a gradient."""
    return [tensor.requires_grad_(name in names) for name, tensor in zip(op.inputs, tensors, strict=True)]


def _all_requiring(op, shape, dtype=torch.float64, device="cpu"):
    return _requiring(op, op.inputs, op.make(shape, dtype, device))


def _assert_near(op, tensors, expected_tensors):
    for actual, expected in zip(tensors, expected_tensors, strict=True):
        op.assert_near(actual.detach(), expected.detach())


def _ids(value):
    return "-".join(value) if isinstance(value, tuple) and all(isinstance(v, str) for v in value) else case_id(value)


@pytest.mark.parametrize(
    ("op", "requiring", "drop_prob", "scale_by_keep", "shapes"),
    _of_each(OPS, lambda op: (SUBSETS[len(op.inputs)], [0.5, 0.0, 1.0], [True, False], SHAPES[len(op.inputs)])),
    ids=_ids,
)
def test_gradcheck(device, op, requiring, drop_prob, scale_by_keep, shapes):
    """First and second derivatives, and batched ones, whichever of the inputs require them.

    Where nothing is dropped the two paths agree on the function, and so the numbers vouch for the tangents too.
    """
    shape, gamma_shape = shapes
    inputs = _requiring(op, requiring, op.make(shape, device=device, gamma_shape=gamma_shape))
    function = op.same_draw_each_time(device, drop_prob, scale_by_keep)
    if drop_prob == 0.5:
        assert 0 < op.keep(function(*inputs), inputs).sum() < shape[0]
    forward = drop_prob == 0.0
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True, check_forward_ad=forward)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=forward)


@pytest.mark.parametrize("op", BATCH_MODE_OPS)
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_gradcheck_in_batch_mode(device, op, scale_by_keep):
    inputs = _all_requiring(op, (4, 3), device=device)
    outcomes = set()
    for seed in range(6):
        outcomes.add(predict_keep(inputs[0], 0.5, "batch", op.generator(device, seed)).item())
        function = op.same_draw_each_time(device, 0.5, scale_by_keep, seed)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    assert outcomes == {True, False}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["channels_last", "sequence_first"])
def test_gradcheck_of_other_layouts(device, op, layout):
    for gamma_shape in ((2,), (3, 1, 1)) if op.has_gamma else (None,):
        x, *others = op.make((3, 3, 2, 2), device=device, gamma_shape=gamma_shape)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        else:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        inputs = _requiring(op, op.inputs, [x, *others])
        assert torch.autograd.gradcheck(op.same_draw_each_time(device), inputs)
        assert torch.autograd.gradgradcheck(op.same_draw_each_time(device), inputs)


GRADS = {
    "expanded": lambda device: random_tensor((1, 1, 1, 1), device=device).expand(6, 4, 5, 3),
    "expanded_over_features": lambda device: random_tensor((6, 4, 1, 1), device=device).expand(6, 4, 5, 3),
    "transposed": lambda device: random_tensor((4, 6, 5, 3), device=device).transpose(0, 1),
    "channels_last": lambda device: random_tensor((6, 4, 5, 3), device=device).to(memory_format=torch.channels_last),
    "sliced": lambda device: random_tensor((12, 4, 5, 7), device=device)[::2, :, :, 2:5],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", GRADS)
def test_backward_takes_any_layout(device, op, layout):
    """sum(), for one, sends an expanded gradient."""
    inputs = _all_requiring(op, (6, 4, 5, 3), torch.float32, device)
    grad = GRADS[layout](device)
    out = op(inputs)
    keep = op.keep(out, inputs)
    expected = torch.autograd.grad(op.formula(inputs, keep, op.scale(6, 0.5)), inputs, grad)
    _assert_near(op, torch.autograd.grad(out, inputs, grad), expected)


@pytest.mark.parametrize("op", OPS)
def test_gradient_through_a_network(device, op):
    """Blocks in a row, every input an inner node of the graph, and x used before, beside and behind the op too."""
    weight, data = (random_tensor(shape, torch.float64, device) for shape in ((4, 6), (10, 4)))
    leaves = [weight, *op.make((10, 6), device=device)[1:]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    keeps = []

    def network(apply):
        x = data @ leaves[0]
        for block in range(4):
            before = x.cos()
            inner = dict(zip(op.inputs[1:], [leaf * 3 for leaf in leaves[1:]], strict=True)) | {"x": x, "residual": x}
            out = apply(block, [inner[name] for name in op.inputs])
            x = before + out + x.sin()
        return x

    def apply_op(_, inputs):
        out = op(inputs, 0.4)
        keeps.append(op.keep(out, inputs))
        return out

    out = network(apply_op)
    assert 0 < sum(keep.sum() for keep in keeps) < 40
    plain = network(lambda block, inputs: op.formula(inputs, keeps[block], op.scale(10, 0.4)))
    torch.testing.assert_close(out, plain)
    grads = (torch.autograd.grad((result**2).sum(), leaves, allow_unused=True) for result in (out, plain))
    for actual, expected in zip(*grads, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_two_backwards_use_the_same_mask(device, op):
    inputs = _all_requiring(op, (40, 3), torch.float32, device)
    out = op(inputs)
    grads = [torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2)]
    op(inputs)  # moves the generator on, which the saved mask must not notice
    grads.append(torch.autograd.grad(out.sum(), inputs))
    for others in grads[1:]:
        for actual, expected in zip(others, grads[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("grad_mode", ["leaf", "no_grad", "inference_mode"])
@pytest.mark.parametrize(
    ("op", "drop_prob"), [*((op, 0.5) for op in OPS), *((op, 0.0) for op in OPS if op is not DROP_PATH)]
)
def test_without_gradient(device, op, drop_prob, grad_mode):
    """(drop_path without a drop_prob returns x itself.)"""
    context = {"leaf": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[grad_mode]
    inputs = op.make((16, 3), torch.float32, device)
    if grad_mode != "leaf":
        inputs = _requiring(op, op.inputs, inputs)
    with context():
        out = op(inputs, drop_prob)
        assert not out.requires_grad
        assert out.grad_fn is None
    keep = op.keep(out, inputs)
    assert 0 < keep.sum() < 16 if drop_prob else keep.all()
    op.assert_output(out, inputs, keep, op.scale(16, drop_prob))


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_those_of_the_formula(device, op):
    """Of a loss in which all inputs meet."""
    inputs = _all_requiring(op, (12, 3), device=device)
    grad_outs = [random_tensor(t.shape, torch.float64, device, seed=9) for t in inputs]

    def derivatives(out):
        first = torch.autograd.grad((out**3).sum(), inputs, create_graph=True)
        return first, torch.autograd.grad(first, inputs, grad_outs)

    out = op(inputs)
    keep = op.keep(out, inputs)
    assert 0 < keep.sum() < 12
    plain = op.formula(inputs, keep, op.scale(12, 0.5))
    for actual_order, expected_order in zip(derivatives(out), derivatives(plain), strict=True):
        for actual, expected in zip(actual_order, expected_order, strict=True):
            assert actual.abs().max() > 1
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtypes", ADD_GAMMA_DTYPES, ids=dtypes_id)
def test_add_double_backward_ignores_dropped_samples(device, dtypes):
    """NaN and Inf in a dropped sample of x leak into no gradient of any order."""
    x, residual, gamma = add_inputs((16, 3), dtypes, device)
    keep = predict_keep(x, 0.5)
    assert 0 < keep.sum() < 16
    x[~keep] = float("nan")
    inputs = x, residual, gamma = [t.requires_grad_() for t in (x, residual, gamma)]
    out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    grad = torch.ones_like(out).requires_grad_()
    grads = torch.autograd.grad(out, inputs, grad, create_graph=True)
    for dtype, first in zip(dtypes, grads, strict=True):
        assert first.dtype == dtype
        assert first.isfinite().all()
    total = sum(first.double().sum() for first in grads)
    grad_x, grad_gamma, grad_grad = torch.autograd.grad(total, (x, gamma, grad))
    assert (grad_x.dtype, grad_gamma.dtype, grad_grad.dtype) == (dtypes[0], dtypes[2], out.dtype)
    for second in (grad_x, grad_gamma, grad_grad):
        assert second.isfinite().all()
    assert_same_bits(grad_x, zero_dropped(torch.full_like(x, 2.0).detach(), keep))
    assert_same_bits(grad_gamma, torch.full_like(gamma, 2.0 * keep.sum()).detach())


@pytest.mark.parametrize(
    ("op", "requiring"), [(op, names) for op in OPS for names in SUBSETS[len(op.inputs)]], ids=_ids
)
def test_batched_gradients(device, op, requiring):
    """is_grads_batched sends a vmapped gradient into the backward ops."""
    inputs = _requiring(op, requiring, op.make((6, 3), device=device))
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    out = op(inputs)
    plain = op.formula(inputs, op.keep(out, inputs), op.scale(6, 0.5))
    grads = random_tensor((4, 6, 3), torch.float64, device, seed=1)
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True)
    for place, grad in enumerate(grads):
        expected = torch.autograd.grad(plain, leaves, grad, retain_graph=True)
        _assert_near(op, [grad_of_each[place] for grad_of_each in batched], expected)


# --- forward mode and torch.func ---

APIS = ("forward_ad", "func.jvp")


@pytest.mark.parametrize(
    ("op", "dual", "api", "dtype"),
    [
        *_of_each(OPS, lambda op: (SUBSETS[len(op.inputs)], APIS, [torch.float32, torch.float64])),
        *_of_each(BATCH_MODE_OPS, lambda op: ([op.inputs], APIS, [torch.float32, torch.float64])),
    ],
    ids=_ids,
)
def test_forward_mode(device, op, dual, api, dtype):
    """A tangent on any of the inputs, on one of them alone too, is carried on."""
    tensors = op.make((32, 3), dtype, device)
    tangents = [random_tensor(t.shape, dtype, device, seed=10 + place) for place, t in enumerate(tensors)]
    places = [place for place, name in enumerate(op.inputs) if name in dual]
    all_tangents = tuple(t if place in places else torch.zeros_like(t) for place, t in enumerate(tangents))

    def function(*duals):
        inputs = list(tensors)
        for place, tensor in zip(places, duals, strict=True):
            inputs[place] = tensor
        return op(inputs)

    for _ in range(4 if op in BATCH_MODE_OPS else 1):  # "batch" draws once a call: a few calls see both outcomes
        if api == "forward_ad":
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(tensors[place], tangents[place]) for place in places]
                out, out_tangent = forward_ad.unpack_dual(function(*duals))
                assert out_tangent is not None
        else:
            used = (tuple(values[place] for place in places) for values in (tensors, tangents))
            out, out_tangent = torch.func.jvp(function, *used)
        keep = op.keep(out, tensors)
        assert op in BATCH_MODE_OPS or 0 < keep.sum() < 32
        op.assert_output(out, tensors, keep, op.scale(32, 0.5))

        def formula(*inputs, keep=keep):
            return op.formula(inputs, keep, op.scale(32, 0.5))

        _, expected = torch.func.jvp(formula, tuple(tensors), all_tangents)
        op.assert_near(out_tangent, expected)


@pytest.mark.parametrize("op", OPS)
def test_func_grad(device, op):
    inputs = op.make((32, 3), device=device)
    every = tuple(range(len(inputs)))

    def loss(*inputs):
        out = op(inputs)
        return (out**2).sum(), out

    grads, out = torch.func.grad(loss, argnums=every, has_aux=True)(*inputs)
    keep = op.keep(out, inputs)
    assert 0 < keep.sum() < 32
    op.assert_output(out, inputs, keep, op.scale(32, 0.5))

    def plain(*inputs):
        return (op.formula(inputs, keep, op.scale(32, 0.5)) ** 2).sum()

    for actual, expected in zip(grads, torch.func.grad(plain, argnums=every)(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_func_hessian_vector_product(device, op):
    """Forward over reverse, both by transforms."""
    x, *others = inputs = op.make((16, 3), device=device)
    v = random_tensor((16, 3), torch.float64, device, seed=5)

    def grad_of_cube(function):
        def loss(t):
            out = function([t, *others])
            return (out**3).sum(), out

        return torch.func.grad(loss, has_aux=True)

    (grad, out), (product, _) = torch.func.jvp(grad_of_cube(op), (x,), (v,))
    keep = op.keep(out, inputs)
    assert 0 < keep.sum() < 16
    formula = grad_of_cube(lambda inputs: op.formula(inputs, keep, op.scale(16, 0.5)))
    (expected_grad, _), (expected_product, _) = torch.func.jvp(formula, (x,), (v,))
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(product, expected_product)


# x is mapped over, the others may be. (torch refuses to draw apart for an x that is not, and to draw a number of
# samples that may be another for each entry.)
VMAPPED = [
    (DROP_PATH, (0,)),
    (ADD, (0, 0)),
    *((ADD_GAMMA, in_dims) for in_dims in [(0, 0, None), (0, None, None), (0, None, 0), (1, 0, 0)]),
    (SKIP_FIXED, (0, None, 0, None)),
]


@pytest.mark.parametrize(("op", "in_dims"), VMAPPED)
def test_vmap_draws_a_mask_for_each_entry(device, op, in_dims):
    full = op.make((50, 8, 3), device=device, gamma_shape=(50, 3))
    full = [t.expand(50, 3) if name == "weight" else t for name, t in zip(op.inputs, full, strict=True)]
    mapped = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(full, in_dims, strict=True)]
    out = torch.func.vmap(lambda *inputs: op(inputs), in_dims=in_dims, randomness="different")(*mapped)
    full = [t[:1].expand_as(t) if dim is None else t for t, dim in zip(full, in_dims, strict=True)]
    keep = (out != op.dropped(full)).any(-1)
    assert len({tuple(row) for row in keep.tolist()}) > 20
    assert keep.sum(1).eq(4).all() if op is SKIP_FIXED else 120 < keep.sum() < 280
    for place, entry in enumerate(out):
        op.assert_output(entry, [t[place] for t in full], keep[place], 2.0)


@pytest.mark.parametrize("op", OPS)
def test_vmap_with_one_mask_for_all(device, op):
    full = op.make((5, 64, 3), device=device)
    in_dims = tuple(None if name in ("gamma", "weight") else 0 for name in op.inputs)
    out = torch.func.vmap(lambda *inputs: op(inputs), in_dims=in_dims, randomness="same")(*full)
    keep = (out != op.dropped(full)).any(-1)
    assert 0 < keep[0].sum() < 64
    assert keep.eq(keep[0]).all()
    for place, entry in enumerate(out):
        inputs = [t if dim is None else t[place] for t, dim in zip(full, in_dims, strict=True)]
        op.assert_output(entry, inputs, keep[0], op.scale(64, 0.5))


@pytest.mark.parametrize("op", OPS)
def test_vmap_refuses_to_draw_unless_told_how(device, op):
    inputs = op.make((16, 3), device=device)
    function = torch.func.vmap(lambda x: op([x, *inputs[1:]]))
    with pytest.raises(RuntimeError, match="randomness"):
        function(inputs[0].expand(5, 16, 3))


@pytest.mark.parametrize("op", OPS)
def test_vmap_where_nothing_is_dropped(device, op):
    """No draw, so the default randomness="error" has nothing to object to."""
    inputs = op.make((6, 3), device=device)
    x = random_tensor((5, 6, 3), torch.float64, device, seed=5)
    out = torch.func.vmap(lambda x: op([x, *inputs[1:]], 0.0))(x)
    everything = torch.ones(6, dtype=torch.bool, device=device)
    for entry, mapped in zip(out, x, strict=True):
        op.assert_output(entry, [mapped, *inputs[1:]], everything, 1.0)


@pytest.mark.parametrize(
    "function",
    [
        lambda weight, x, residual: drop_path(x * weight, 0.5, training=True),
        lambda weight, x, residual: drop_path_add(x, residual, 0.5, training=True, gamma=weight),
    ],
    ids=["weight_of_drop_path", "gamma_of_drop_path_add"],
)
def test_vmap_of_grad(device, function):
    """Per-sample gradients: the usual composition of torch.func."""
    x, residual, weight = add_inputs((64, 4, 3), (torch.float32,) * 3, device)

    def loss(weight, x, residual):
        return function(weight, x, residual).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")(weight, x, residual)
    # Each of the four rows of an entry is kept or not: the gradient is one of the 16 sums of rows, times 2.
    choices = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).to(device)
    sums = 2 * torch.einsum("ck,nkf->ncf", choices, x)
    distance = (sums - grads[:, None]).abs().amax(-1)
    assert (distance.amin(1) < 1e-4).all()
    assert len(distance.argmin(1).unique()) > 8


@pytest.mark.parametrize("op", OPS)
def test_forward_over_reverse(device, op):
    """A graph that the kernels built meets a tangent only in its backward pass: it must not get lost there."""
    inputs = _all_requiring(op, (12, 4), device=device)
    weight, tangent = (random_tensor((12, 4), torch.float64, device, seed=seed) for seed in (5, 6))
    out = op(inputs)
    keep = op.keep(out, inputs)
    assert 0 < keep.sum() < 12
    with forward_ad.dual_level():
        grads = torch.autograd.grad(out, inputs, forward_ad.make_dual(weight, tangent))
        primals, tangents = zip(*(forward_ad.unpack_dual(grad) for grad in grads), strict=True)
    plain = op.formula(inputs, keep, op.scale(12, 0.5))
    for actual, values in ((primals, weight), (tangents, tangent)):
        _assert_near(op, actual, torch.autograd.grad(plain, inputs, values, retain_graph=True))
    if "residual" in op.inputs:
        assert_same_bits(primals[1], weight)
        assert_same_bits(tangents[1], tangent)


@pytest.mark.parametrize("op", OPS)
def test_jvp_of_a_gradient(device, op):
    inputs = _all_requiring(op, (12, 4), device=device)
    weight, tangent = (random_tensor((12, 4), torch.float64, device, seed=seed) for seed in (5, 6))
    out = op(inputs)
    _, tangents = torch.func.jvp(
        lambda grad: torch.autograd.grad(out, inputs, grad, retain_graph=True), (weight,), (tangent,)
    )
    plain = op.formula(inputs, op.keep(out, inputs), op.scale(12, 0.5))
    _assert_near(op, tangents, torch.autograd.grad(plain, inputs, tangent))


@needs_native
@pytest.mark.parametrize(("op", "dual"), [(op, name) for op in (DROP_PATH, ADD_GAMMA) for name in op.inputs])
def test_native_ops_refuse_what_they_cannot_differentiate(device, op, dual):
    tensors = dict(zip(op.inputs, op.make((6, 4), torch.float32, device), strict=True))
    native = torch.ops.droppath_ext.drop_path if op is DROP_PATH else torch.ops.droppath_ext.drop_path_add
    message = "x carries a tangent" if op is DROP_PATH else "carries a tangent"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        tensors[dual] = forward_ad.make_dual(tensors[dual], tensors[dual])
        native(*tensors.values(), 0.5, True, True)


# --- activation checkpointing ---


@pytest.mark.parametrize(
    ("op", "dtypes"), [(op, dtypes) for op in (*DROP_PATH_OPS, *BATCH_MODE_OPS) for dtypes in op.dtypes], ids=case_id
)
def test_checkpointing_recomputes_the_same_mask(device, op, dtypes):
    data = op.make((64, 5), dtypes, device)

    def block(x, *others):
        out = op([torch.tanh(x), *others])
        return op([torch.tanh(out).to(x.dtype), *others])

    def run(wrap):
        torch.manual_seed(11)
        leaves = [t.clone().requires_grad_() for t in data]
        out = wrap(*leaves)
        drop_path(data[0], 0.5, training=True)  # the recomputation must not see where the generator is by then
        (out.float() ** 2).sum().backward()
        return [out, *(leaf.grad for leaf in leaves)]

    expected_tensors = run(block)
    for use_reentrant in (True, False):
        checkpointed = run(partial(checkpoint, block, use_reentrant=use_reentrant))
        for actual, expected in zip(checkpointed, expected_tensors, strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    ("use_reentrant", "sampling", "dtype", "autocast"), pairwise([True, False], SAMPLINGS, DTYPES, [False, True])
)
def test_skip_checkpointing_recomputes_the_same_samples(device, use_reentrant, sampling, dtype, autocast):
    """Bernoulli draws on the host: the CPU generator's state, too, is restored for the recomputation."""
    data = random_tensor((16, 5, 8), dtype, device)
    scale = random_tensor((8,), dtype, device, seed=2)
    branch = like(TokenBranch(8), data)

    def block(x, gamma):
        for _ in range(2):
            x = stochastic_depth(x, branch, 0.5, training=True, gamma=gamma, sampling=sampling)
        return x

    def run(wrap):
        torch.manual_seed(11)
        branch.zero_grad()
        branch.calls.clear()
        x, gamma = (t.clone().requires_grad_() for t in (data, scale))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            out = wrap(x, gamma)
        torch.rand(7)  # the recomputation must not see where the generator is by then
        (out.float() ** 2).sum().backward()
        seen = [rows.detach() for (rows,) in branch.calls]
        return [out, x.grad, gamma.grad, *(p.grad for p in branch.parameters() if p.grad is not None)], seen

    expected, seen = run(block)
    actual, seen_twice = run(lambda x, gamma: checkpoint(block, x, gamma, use_reentrant=use_reentrant))
    for tensor, plain in zip([*actual, *seen_twice], [*expected, *seen, *seen], strict=True):
        assert_same_bits(tensor, plain)


# --- what is one op's own ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_gradient_of_the_branch_alone(device, sampling):
    """Nothing arrives through the residual where a loss takes only what the branch made, and the other way round."""
    x = random_tensor((10, 4), torch.float64, device).requires_grad_()
    rows = []

    def branch(t):
        rows.append(t.sin())
        return rows[-1].detach() if len(rows) > 1 else rows[-1]

    out = stochastic_depth(x, branch, 0.5, training=True, sampling=sampling)
    keep = added_samples(out, x)
    (grad,) = torch.autograd.grad(rows[0].sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, zero_dropped(x.detach().cos(), keep))
    out = stochastic_depth(x, branch, 0.5, training=True, sampling=sampling)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_same_bits(grad, torch.ones_like(x))


SOURCES = {
    "mask": [True, False, True, True, False, True],
    "one_entry": [True],
    "no_entries": [],
    "index": [4, 0, -1, 3, 2, -1],
    "repeated_index": [4, 4, -1, 0, 4, 0],
}


@needs_native
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_ops_of_given_sources_have_derivatives(device, name, with_gamma):
    """Of every order and both modes, also where an index names a sample twice."""
    ops = torch.ops.droppath_ext
    sources = torch.tensor(SOURCES[name], dtype=torch.int64 if "index" in name else torch.bool, device=device)
    x, residual, gamma = add_inputs((6, 4), (torch.float64,) * 3, device)
    inputs = [t.requires_grad_() for t in ((x, residual, gamma) if with_gamma else (x, residual))]

    def add(x, residual, gamma=None):
        return ops.add_kept(x, residual, gamma, sources, 1.7)

    def backward(x, grad, gamma=None):
        grads = ops.add_kept_backward(grad, x, gamma, sources, 1.7, torch.float64, (True, gamma is not None))
        return grads[: 1 + (gamma is not None)]

    for function, tensors in (
        (lambda x: ops.scale_kept(x, sources, 1.7), inputs[:1]),
        (add, inputs),
        (backward, inputs),
    ):
        assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, tensors)
    indices = (
        torch.arange(6, device=device).where(sources, -1) if sources.dtype is torch.bool and len(sources) else sources
    )
    indices = indices if len(sources) else torch.arange(6, device=device)
    counts = torch.zeros(6, dtype=torch.float64, device=device)
    counts.index_add_(0, indices.clamp(min=0), (indices >= 0).double())
    (grad,) = torch.autograd.grad(ops.scale_kept(x, sources, 1.7).sum(), x)
    torch.testing.assert_close(grad, (1.7 * counts[:, None]).expand(6, 4))
