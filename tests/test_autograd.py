"""Promise: gradients of every order and kind, and nothing kept that is not needed."""

import pytest
import torch
from conftest import (
    ADD_GAMMA_DTYPES,
    DTYPES,
    FUSED_ADD_DTYPES,
    SAMPLINGS,
    TokenBranch,
    add_inputs,
    added_samples,
    assert_rounded_once,
    assert_same_bits,
    dtypes_id,
    exact_add,
    expected_drop_path,
    like,
    predict_keep,
    random_tensor,
    seeded,
    skip_formula,
    zero_dropped,
)
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from droppath_ext import drop_path, drop_path_add, reference, stochastic_depth


def _same_draw_each_time(device, **kwargs):
    """Numerical differentiation calls the function again and again and needs the same mask each time."""
    return lambda x: drop_path(x, 0.5, training=True, generator=seeded(device, 3), **kwargs)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 2), (6,)])
def test_gradcheck(device, mode, scale_by_keep, shape):
    x = random_tensor(shape, torch.float64, device).requires_grad_()
    function = _same_draw_each_time(device, mode=mode, scale_by_keep=scale_by_keep)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("layout", ["channels_last", "sequence_first"])
def test_gradcheck_of_other_layouts(device, layout):
    base = random_tensor((2, 3, 2, 2), torch.float64, device)
    x = base.to(memory_format=torch.channels_last) if layout == "channels_last" else base.transpose(0, 1)
    assert torch.autograd.gradcheck(_same_draw_each_time(device), x.requires_grad_())
    assert torch.autograd.gradgradcheck(_same_draw_each_time(device), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_backward_is_the_formula(device, dtype, mode, scale_by_keep):
    x = random_tensor((33, 5, 7), dtype, device).requires_grad_()
    grad = random_tensor((33, 5, 7), dtype, device, seed=1)
    for _ in range(4):
        keep = predict_keep(x, 0.3, mode)
        out = drop_path(x, 0.3, True, scale_by_keep, mode=mode)
        (grad_x,) = torch.autograd.grad(out, x, grad)
        assert_same_bits(grad_x, reference.apply_keep_mask(grad, keep, reference.keep_scale(0.3, scale_by_keep)))


GRADS = {
    "expanded": lambda device: random_tensor((1, 1, 1, 1), device=device).expand(6, 4, 5, 3),
    "expanded_over_features": lambda device: random_tensor((6, 4, 1, 1), device=device).expand(6, 4, 5, 3),
    "transposed": lambda device: random_tensor((4, 6, 5, 3), device=device).transpose(0, 1),
    "channels_last": lambda device: random_tensor((6, 4, 5, 3), device=device).to(memory_format=torch.channels_last),
    "sliced": lambda device: random_tensor((12, 4, 5, 7), device=device)[::2, :, :, 2:5],
}


@pytest.mark.parametrize("layout", GRADS)
def test_backward_takes_any_layout(device, layout):
    x = random_tensor((6, 4, 5, 3), device=device, seed=1).requires_grad_()
    grad = GRADS[layout](device)
    keep = predict_keep(x, 0.5)
    (grad_x,) = torch.autograd.grad(drop_path(x, 0.5, training=True), x, grad)
    assert_same_bits(grad_x, reference.apply_keep_mask(grad, keep, 2.0))


def test_gradient_through_a_network(device):
    """sum() sends an expanded gradient; matmul before and add after make x an inner node of the graph."""
    weight = random_tensor((4, 6), device=device).requires_grad_()
    data = random_tensor((10, 4), device=device, seed=1)
    keep = predict_keep(data, 0.5)
    hidden = data @ weight
    (hidden + drop_path(hidden, 0.5, training=True)).sum().backward()
    factor = (1 + 2 * keep.float())[:, None].expand(10, 6)
    torch.testing.assert_close(weight.grad, data.t() @ factor)


def test_two_backwards_use_the_same_mask(device):
    x = random_tensor((40, 3), device=device).requires_grad_()
    out = drop_path(x, 0.5, training=True)
    grads = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2)]
    drop_path(x, 0.5, training=True)  # moves the generator on, which the saved mask must not notice
    grads.append(torch.autograd.grad(out.sum(), x)[0])
    assert_same_bits(grads[0], grads[1])
    assert_same_bits(grads[0], grads[2])


@pytest.mark.parametrize("grad_mode", ["leaf", "no_grad", "inference_mode"])
def test_without_gradient(device, grad_mode):
    context = {"leaf": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[grad_mode]
    x = random_tensor((16, 3), device=device).requires_grad_(grad_mode != "leaf")
    with context():
        _, expected = expected_drop_path(x.detach(), 0.5)
        out = drop_path(x, 0.5, training=True)
        assert not out.requires_grad
        assert out.grad_fn is None
        assert_same_bits(out, expected)


def test_double_backward_values(device):
    """d/dx of |grad of drop_path(x)**2|: the mask enters squared, with the scale to the fourth power."""
    x = random_tensor((12, 3), torch.float64, device).requires_grad_()
    keep = predict_keep(x, 0.5)
    out = drop_path(x, 0.5, training=True)
    (grad,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)  # 2 s^2 x
    (second,) = torch.autograd.grad((grad**2).sum(), x)  # 8 s^4 x
    torch.testing.assert_close(second, torch.where(keep[:, None], 8 * 2.0**4 * x, 0.0).detach())


def test_batched_gradients(device):
    """is_grads_batched sends a vmapped gradient into the backward op."""
    x = random_tensor((6, 3), torch.float64, device).requires_grad_()
    keep = predict_keep(x, 0.5)
    out = drop_path(x, 0.5, training=True)
    grads = random_tensor((4, 6, 3), torch.float64, device, seed=1)
    (batched,) = torch.autograd.grad(out, x, grads, is_grads_batched=True)
    for grad, grad_x in zip(grads, batched, strict=True):
        assert_same_bits(grad_x, reference.apply_keep_mask(grad, keep, 2.0))


# --- forward mode and torch.func ---


def _mask_of(out):
    return out.detach().flatten(1).ne(0).any(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("api", ["forward_ad", "func.jvp"])
def test_forward_mode(device, dtype, mode, api):
    x, tangent = (random_tensor((32, 3), dtype, device, seed) for seed in (0, 1))
    for _ in range(4):
        if api == "forward_ad":
            with forward_ad.dual_level():
                out, out_tangent = forward_ad.unpack_dual(
                    drop_path(forward_ad.make_dual(x, tangent), 0.5, training=True, mode=mode)
                )
                assert out_tangent is not None
        else:
            out, out_tangent = torch.func.jvp(lambda t: drop_path(t, 0.5, training=True, mode=mode), (x,), (tangent,))
        keep = _mask_of(out)
        assert_same_bits(out, reference.apply_keep_mask(x, keep, 2.0))
        assert_same_bits(out_tangent, reference.apply_keep_mask(tangent, keep, 2.0))


def test_func_grad(device):
    x = random_tensor((32, 3), device=device)

    def loss(t):
        out = drop_path(t, 0.5, training=True)
        return (out**2).sum(), out

    grad, out = torch.func.grad(loss, has_aux=True)(x)
    keep = _mask_of(out)
    assert 0 < keep.sum() < 32
    assert_same_bits(out, reference.apply_keep_mask(x, keep, 2.0))
    torch.testing.assert_close(grad, torch.where(keep[:, None], 8 * x, 0.0))


def test_func_vjp_and_hessian_vector_product(device):
    x, v = (random_tensor((16, 3), torch.float64, device, seed) for seed in (0, 1))

    def grad_of_cube(t):
        return torch.func.grad(lambda u: (drop_path(u, 0.5, training=True) ** 3).sum())(t)

    grad, product = torch.func.jvp(grad_of_cube, (x,), (v,))  # forward over reverse
    keep = _mask_of(grad)
    torch.testing.assert_close(grad, torch.where(keep[:, None], 24 * x**2, 0.0))
    torch.testing.assert_close(product, torch.where(keep[:, None], 48 * x * v, 0.0))


def test_vmap_draws_a_mask_for_each_entry(device):
    x = random_tensor((50, 8, 3), device=device)
    out = torch.func.vmap(lambda t: drop_path(t, 0.5, training=True), randomness="different")(x)
    keep = out.ne(0).any(-1)
    assert_same_bits(out, torch.where(keep[..., None], x * 2, 0.0))
    assert 120 < keep.sum() < 280
    assert len({tuple(row) for row in keep.tolist()}) > 20


def test_vmap_with_one_mask_for_all(device):
    x = random_tensor((5, 64, 3), device=device)
    out = torch.func.vmap(lambda t: drop_path(t, 0.5, training=True), randomness="same")(x)
    keep = out.ne(0).any(-1)
    assert 0 < keep[0].sum() < 64
    assert keep.eq(keep[0]).all()
    assert_same_bits(out, torch.where(keep[..., None], x * 2, 0.0))


def test_vmap_of_grad(device):
    """Per-sample gradients: the usual composition of torch.func."""
    weight = random_tensor((3,), device=device)
    data = random_tensor((64, 4, 3), device=device, seed=1)

    def loss(w, d):
        return drop_path(d * w, 0.5, training=True).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(weight, data)
    # Each of the four rows of an entry is kept or not: the gradient is one of the 16 sums of rows, times 2.
    choices = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).to(device)
    sums = 2 * torch.einsum("ck,nkf->ncf", choices, data)
    distance = (sums - grads[:, None]).abs().amax(-1)
    assert (distance.amin(1) < 1e-4).all()
    assert len(distance.argmin(1).unique()) > 8


# --- activation checkpointing ---


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_checkpointing_recomputes_the_same_mask(device, use_reentrant, mode):
    weight = random_tensor((5, 5), device=device, seed=2)
    data = random_tensor((64, 5), device=device)

    def block(x, w):
        hidden = drop_path(torch.tanh(x @ w), 0.5, training=True, mode=mode)
        return x + drop_path(torch.tanh(hidden @ w), 0.5, training=True, mode=mode)

    def run(wrap):
        torch.manual_seed(11)
        x, w = data.clone().requires_grad_(), weight.clone().requires_grad_()
        out = wrap(x, w)
        drop_path(data, 0.5, training=True)  # the recomputation must not see where the generator is by then
        (out**2).sum().backward()
        return out, x.grad, w.grad

    checkpointed = run(lambda x, w: checkpoint(block, x, w, use_reentrant=use_reentrant))
    for actual, expected in zip(checkpointed, run(block), strict=True):
        assert_same_bits(actual, expected)


def test_forward_over_reverse(device):
    """A graph that the kernels built meets a tangent only in its backward pass: it must not get lost there."""
    x = random_tensor((6, 4), torch.float64, device).requires_grad_()
    weight, tangent = (random_tensor((6, 4), torch.float64, device, seed=seed) for seed in (1, 2))
    keep = predict_keep(x, 0.5)
    with forward_ad.dual_level():
        out = drop_path(x, 0.5, training=True)
        (grad_x,) = torch.autograd.grad(out, x, forward_ad.make_dual(weight, tangent))
        primal, grad_tangent = forward_ad.unpack_dual(grad_x)
        assert_same_bits(primal, reference.apply_keep_mask(weight, keep, 2.0))
        assert_same_bits(grad_tangent, reference.apply_keep_mask(tangent, keep, 2.0))


def test_jvp_of_a_gradient(device):
    x = random_tensor((6, 4), torch.float64, device).requires_grad_()
    weight, tangent = (random_tensor((6, 4), torch.float64, device, seed=seed) for seed in (1, 2))
    keep = predict_keep(x, 0.5)
    out = drop_path(x, 0.5, training=True)
    _, grad_tangent = torch.func.jvp(
        lambda grad: torch.autograd.grad(out, x, grad, retain_graph=True)[0], (weight,), (tangent,)
    )
    assert_same_bits(grad_tangent, reference.apply_keep_mask(tangent, keep, 2.0))


def test_the_op_refuses_what_it_cannot_differentiate(device):
    x = random_tensor((6, 4), device=device)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="x carries a tangent"):
        torch.ops.droppath_ext.drop_path(forward_ad.make_dual(x, x), 0.5, True, True)


# --- drop_path_add ---

DOUBLES = (torch.float64,) * 3
SUBSETS = [("x",), ("residual",), ("gamma",), ("x", "residual"), ("x", "gamma"), ("residual", "gamma")]
SUBSETS += [("x", "residual", "gamma")]
SUBSETS_WITHOUT_GAMMA = [subset for subset in SUBSETS if "gamma" not in subset]
GAMMA_SHAPES = {"last": ((5, 3), (3,)), "channels": ((4, 2, 3, 2), (2, 1, 1)), "middle": ((4, 2, 3, 2), (1, 3, 1))}


def _requiring(names, tensors):
    """The tensors, of which those so named require a gradient."""
    named = zip(("x", "residual", "gamma"), tensors, strict=True)
    return [tensor if tensor is None else tensor.requires_grad_(name in names) for name, tensor in named]


def _add_with_the_same_draw_each_time(device, drop_prob=0.5, seed=3, **kwargs):
    def function(x, residual, gamma=None):
        return drop_path_add(
            x, residual, drop_prob, training=True, gamma=gamma, generator=seeded(device, seed), **kwargs
        )

    return function


@pytest.mark.parametrize("requiring", SUBSETS, ids="-".join)
@pytest.mark.parametrize("drop_prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gamma_along", GAMMA_SHAPES)
def test_add_gradcheck(device, requiring, drop_prob, gamma_along):
    shape, gamma_shape = GAMMA_SHAPES[gamma_along]
    inputs = _requiring(requiring, add_inputs(shape, DOUBLES, device, gamma_shape))
    assert 0 < predict_keep(inputs[0], 0.5, generator=seeded(device, 3)).sum() < len(inputs[0])
    function = _add_with_the_same_draw_each_time(device, drop_prob)
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("requiring", SUBSETS_WITHOUT_GAMMA, ids="-".join)
@pytest.mark.parametrize("drop_prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 2), (6,)])
def test_add_gradcheck_without_gamma(device, requiring, drop_prob, shape):
    inputs = _requiring(requiring, add_inputs(shape, (*DOUBLES[:2], None), device))[:2]
    assert 0 < predict_keep(inputs[0], 0.5, generator=seeded(device, 3)).sum() < shape[0]
    function = _add_with_the_same_draw_each_time(device, drop_prob)
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("with_gamma", [True, False])
def test_add_gradcheck_in_batch_mode(device, scale_by_keep, with_gamma):
    x, residual, gamma = _requiring(SUBSETS[-1], add_inputs((4, 3), DOUBLES, device))
    inputs = [x, residual, gamma] if with_gamma else [x, residual]
    outcomes = set()
    for seed in range(6):
        outcomes.add(predict_keep(x, 0.5, "batch", seeded(device, seed)).item())
        function = _add_with_the_same_draw_each_time(device, 0.5, seed, mode="batch", scale_by_keep=scale_by_keep)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    assert outcomes == {True, False}


@pytest.mark.parametrize("layout", ["channels_last", "sequence_first"])
@pytest.mark.parametrize("gamma_shape", [(2,), (3, 1, 1)])
def test_add_gradcheck_of_other_layouts(device, layout, gamma_shape):
    x, residual, gamma = add_inputs((4, 3, 2, 2), DOUBLES, device, gamma_shape)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    else:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    inputs = _requiring(SUBSETS[-1], (x, residual, gamma))
    assert torch.autograd.gradcheck(_add_with_the_same_draw_each_time(device), inputs)
    assert torch.autograd.gradgradcheck(_add_with_the_same_draw_each_time(device), inputs)


def test_add_double_backward_values(device):
    """d/d(x, residual, gamma) of |gradients of the sum of squares|, written out."""
    x, residual, gamma = _requiring(SUBSETS[-1], add_inputs((12, 3), DOUBLES, device))
    keep = predict_keep(x, 0.5)
    out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    grads = torch.autograd.grad((out**2).sum(), (x, residual, gamma), create_graph=True)
    actual = torch.autograd.grad(sum((grad**2).sum() for grad in grads), (x, residual, gamma))

    def squares(x, residual, gamma):
        out = residual + 2 * keep[:, None] * gamma * x
        return (out**2).sum()

    expected_grads = torch.autograd.grad(squares(x, residual, gamma), (x, residual, gamma), create_graph=True)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected)
    expected = torch.autograd.grad(sum((grad**2).sum() for grad in expected_grads), (x, residual, gamma))
    for grad, same in zip(actual, expected, strict=True):
        assert grad.abs().max() > 1
        torch.testing.assert_close(grad, same)


@pytest.mark.parametrize("dtypes", ADD_GAMMA_DTYPES, ids=dtypes_id)
def test_add_double_backward_ignores_dropped_samples(device, dtypes):
    """NaN and Inf in a dropped sample of x leak into no gradient of any order."""
    x, residual, gamma = add_inputs((16, 3), dtypes, device)
    keep = predict_keep(x, 0.5)
    assert 0 < keep.sum() < 16
    x[~keep] = float("nan")
    x, residual, gamma = _requiring(SUBSETS[-1], (x, residual, gamma))
    out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    grad = torch.ones_like(out).requires_grad_()
    grads = torch.autograd.grad(out, (x, residual, gamma), grad, create_graph=True)
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


def test_add_gradient_through_a_network(device):
    """sum() sends an expanded gradient; matmul before and add after make every input an inner node of the graph."""
    weight = random_tensor((4, 6), device=device).requires_grad_()
    scale = random_tensor((6,), device=device, seed=2).requires_grad_()
    data = random_tensor((10, 4), device=device, seed=1)
    keep = predict_keep(data, 0.5)
    hidden = data @ weight
    drop_path_add(hidden, hidden, 0.5, training=True, gamma=scale * 3).sum().backward()
    factor = 1 + 6 * keep.float()[:, None] * scale.detach()
    torch.testing.assert_close(weight.grad, data.t() @ factor)
    torch.testing.assert_close(scale.grad, 6 * hidden.detach()[keep].sum(0))


def test_add_two_backwards_use_the_same_mask(device):
    x, residual, gamma = _requiring(SUBSETS[-1], add_inputs((40, 3), (torch.float32,) * 3, device))
    out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    grads = [torch.autograd.grad(out.sum(), (x, gamma), retain_graph=True) for _ in range(2)]
    drop_path_add(x, residual, 0.5, training=True)  # moves the generator on, which the saved mask must not notice
    grads.append(torch.autograd.grad(out.sum(), (x, gamma)))
    for other in grads[1:]:
        assert_same_bits(other[0], grads[0][0])
        assert_same_bits(other[1], grads[0][1])


@pytest.mark.parametrize("grad_mode", ["leaf", "no_grad", "inference_mode"])
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
def test_add_without_gradient(device, grad_mode, drop_prob):
    context = {"leaf": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[grad_mode]
    requiring = () if grad_mode == "leaf" else SUBSETS[-1]
    x, residual, gamma = _requiring(requiring, add_inputs((16, 3), (torch.float32,) * 3, device))
    keep = predict_keep(x, drop_prob) if drop_prob else torch.ones(1, dtype=torch.bool, device=device)
    with context():
        out = drop_path_add(x, residual, drop_prob, training=True, gamma=gamma)
        assert not out.requires_grad
        assert out.grad_fn is None
    assert_rounded_once(out, *exact_add(x, residual, gamma, keep, 1 / (1 - drop_prob)))


@pytest.mark.parametrize("requiring", SUBSETS, ids="-".join)
def test_add_batched_gradients(device, requiring):
    """is_grads_batched sends a vmapped gradient into the backward op."""
    tensors = _requiring(requiring, add_inputs((6, 3), DOUBLES, device))
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    out = drop_path_add(*tensors[:2], 0.5, training=True, gamma=tensors[2])
    grads = random_tensor((4, 6, 3), torch.float64, device, seed=3)
    batched = torch.autograd.grad(out, leaves, grads, retain_graph=True, is_grads_batched=True)
    for place, grad in enumerate(grads):
        for actual, expected in zip(batched, torch.autograd.grad(out, leaves, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(actual[place], expected)


# --- drop_path_add: forward mode and torch.func ---


def _tangent_of_add(tensors, tangents, keep):
    """The derivative of residual + 2 gamma x where kept, along these tangents (None: zero)."""
    (x, _, gamma), (x_tangent, residual_tangent, gamma_tangent) = tensors, tangents
    branch = torch.zeros_like(x)
    if x_tangent is not None:
        branch = branch + 2 * x_tangent * (1 if gamma is None else gamma)
    if gamma_tangent is not None:
        branch = branch + 2 * x * gamma_tangent
    return zero_dropped(branch, keep) + (0 if residual_tangent is None else residual_tangent)


def _tangents(names, tensors, device):
    return [
        random_tensor(tensor.shape, tensor.dtype, device, seed=10 + place) if name in names else None
        for place, (name, tensor) in enumerate(zip(("x", "residual", "gamma"), tensors, strict=True))
    ]


@pytest.mark.parametrize("dual", SUBSETS, ids="-".join)
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("api", ["forward_ad", "func.jvp"])
def test_add_forward_mode(device, dual, mode, api):
    """A tangent on any of the inputs, on one of them alone too, is carried on."""
    tensors = add_inputs((32, 3), DOUBLES, device)
    tangents = _tangents(dual, tensors, device)
    for _ in range(4):
        if api == "forward_ad":
            with forward_ad.dual_level():
                x, residual, gamma = (
                    tensor if tangent is None else forward_ad.make_dual(tensor, tangent)
                    for tensor, tangent in zip(tensors, tangents, strict=True)
                )
                out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma, mode=mode)
                out, out_tangent = forward_ad.unpack_dual(out)
                assert out_tangent is not None
        else:
            places = [place for place, tangent in enumerate(tangents) if tangent is not None]

            def function(*duals, places=places):
                inputs = list(tensors)
                for place, tensor in zip(places, duals, strict=True):
                    inputs[place] = tensor
                return drop_path_add(*inputs[:2], 0.5, training=True, gamma=inputs[2], mode=mode)

            primals = tuple(tensors[place] for place in places)
            out, out_tangent = torch.func.jvp(function, primals, tuple(tangents[place] for place in places))
        keep = added_samples(out, tensors[1])
        assert_rounded_once(out, *exact_add(*tensors, keep, 2.0))
        torch.testing.assert_close(out_tangent, _tangent_of_add(tensors, tangents, keep))


@pytest.mark.parametrize("requiring", SUBSETS_WITHOUT_GAMMA, ids="-".join)
def test_add_forward_mode_without_gamma(device, requiring):
    x, residual, _ = tensors = add_inputs((32, 3), (*DOUBLES[:2], None), device)
    tangents = [*_tangents(requiring, add_inputs((32, 3), DOUBLES, device), device)[:2], None]
    with forward_ad.dual_level():
        x, residual = (
            tensor if tangent is None else forward_ad.make_dual(tensor, tangent)
            for tensor, tangent in zip((x, residual), tangents[:2], strict=True)
        )
        out, out_tangent = forward_ad.unpack_dual(drop_path_add(x, residual, 0.5, training=True))
    keep = added_samples(out, tensors[1])
    assert 0 < keep.sum() < 32
    torch.testing.assert_close(out_tangent, _tangent_of_add(tensors, tangents, keep))


@pytest.mark.parametrize("requiring", SUBSETS, ids="-".join)
@pytest.mark.parametrize("gamma_along", GAMMA_SHAPES)
def test_add_gradcheck_forward_over_reverse(device, requiring, gamma_along):
    """Where nothing is dropped the two paths agree on the function, and so the numbers vouch for the tangents."""
    shape, gamma_shape = GAMMA_SHAPES[gamma_along]
    inputs = _requiring(requiring, add_inputs(shape, DOUBLES, device, gamma_shape))

    def function(x, residual, gamma):
        return drop_path_add(x, residual, gamma=gamma)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


def test_add_forward_over_reverse(device):
    """A graph that the kernels built meets a tangent only in its backward pass: it must not get lost there."""
    x, residual, gamma = _requiring(SUBSETS[-1], add_inputs((6, 4), DOUBLES, device))
    weight, tangent = (random_tensor((6, 4), torch.float64, device, seed=seed) for seed in (5, 6))
    keep = predict_keep(x, 0.5)
    assert 0 < keep.sum() < 6
    with forward_ad.dual_level():
        out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
        grads = torch.autograd.grad(out, (x, residual, gamma), forward_ad.make_dual(weight, tangent))
        for place in (0, 1):
            values = (weight, tangent)[place]
            grad_x, grad_residual, grad_gamma = (forward_ad.unpack_dual(grad)[place] for grad in grads)
            torch.testing.assert_close(grad_x, zero_dropped(2 * gamma.detach() * values, keep))
            assert_same_bits(grad_residual, values)
            torch.testing.assert_close(grad_gamma, zero_dropped(2 * x.detach() * values, keep).sum(0))


def test_add_jvp_of_a_gradient(device):
    x, residual, gamma = _requiring(SUBSETS[-1], add_inputs((6, 4), DOUBLES, device))
    weight, tangent = (random_tensor((6, 4), torch.float64, device, seed=seed) for seed in (5, 6))
    keep = predict_keep(x, 0.5)
    out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
    _, (grad_x, grad_gamma) = torch.func.jvp(
        lambda grad: torch.autograd.grad(out, (x, gamma), grad, retain_graph=True), (weight,), (tangent,)
    )
    torch.testing.assert_close(grad_x, zero_dropped(2 * gamma.detach() * tangent, keep))
    torch.testing.assert_close(grad_gamma, zero_dropped(2 * x.detach() * tangent, keep).sum(0))


def test_add_func_grad(device):
    x, residual, gamma = add_inputs((32, 3), DOUBLES, device)

    def loss(x, residual, gamma):
        out = drop_path_add(x, residual, 0.5, training=True, gamma=gamma)
        return (out**2).sum(), out

    grads, out = torch.func.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, residual, gamma)
    keep = added_samples(out, residual)
    assert 0 < keep.sum() < 32
    torch.testing.assert_close(out, exact_add(x, residual, gamma, keep, 2.0)[0])
    torch.testing.assert_close(grads[0], zero_dropped(4 * gamma * out, keep))
    torch.testing.assert_close(grads[1], 2 * out)
    torch.testing.assert_close(grads[2], zero_dropped(4 * x * out, keep).sum(0))


def test_add_func_hessian_vector_product(device):
    """Forward over reverse, both by transforms."""
    x, residual, gamma = add_inputs((16, 3), DOUBLES, device)
    v = random_tensor((16, 3), torch.float64, device, seed=5)

    def grad_of_cube(t):
        return torch.func.grad(lambda u: (drop_path_add(u, residual, 0.5, True, gamma=gamma) ** 3).sum())(t)

    grad, product = torch.func.jvp(grad_of_cube, (x,), (v,))
    keep = grad.ne(0).any(1)
    assert 0 < keep.sum() < 16
    out = residual + 2 * gamma * x
    torch.testing.assert_close(grad, zero_dropped(6 * gamma * out**2, keep))
    torch.testing.assert_close(product, zero_dropped(24 * gamma**2 * out * v, keep))


@pytest.mark.parametrize("in_dims", [(0, 0, None), (0, None, None), (0, None, 0), (1, 0, 0)])
def test_add_vmap_draws_a_mask_for_each_entry(device, in_dims):
    """x is mapped over, the others may be. (torch refuses to draw apart for an x that is not.)"""
    full = add_inputs((50, 8, 3), DOUBLES, device, (50, 3))
    inputs = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(full, in_dims, strict=True)]

    def function(x, residual, gamma):
        return drop_path_add(x, residual, 0.5, training=True, gamma=gamma)

    out = torch.func.vmap(function, in_dims=in_dims, randomness="different")(*inputs)
    x, residual, gamma = (t[:1].expand_as(t) if dim is None else t for t, dim in zip(full, in_dims, strict=True))
    keep = (out != residual).any(-1)
    assert 120 < keep.sum() < 280
    assert len({tuple(row) for row in keep.tolist()}) > 20
    torch.testing.assert_close(out, residual + torch.where(keep[..., None], 2 * gamma[:, None] * x, 0.0))


def test_add_vmap_with_one_mask_for_all(device):
    x, residual, gamma = add_inputs((5, 64, 3), DOUBLES, device)
    out = torch.func.vmap(lambda t, r: drop_path_add(t, r, 0.5, training=True, gamma=gamma), randomness="same")(
        x, residual
    )
    keep = (out != residual).any(-1)
    assert 0 < keep[0].sum() < 64
    assert keep.eq(keep[0]).all()
    torch.testing.assert_close(out, residual + torch.where(keep[..., None], 2 * gamma * x, 0.0))


def test_add_vmap_where_nothing_is_dropped(device):
    """No draw, so the default randomness="error" has nothing to object to."""
    x, residual, gamma = add_inputs((5, 6, 3), DOUBLES, device)
    out = torch.func.vmap(lambda t, r: drop_path_add(t, r, 0.5, gamma=gamma))(x, residual)
    torch.testing.assert_close(out, residual + gamma * x)


def test_add_vmap_of_grad(device):
    """Per-sample gradients of gamma: the usual composition of torch.func."""
    x, residual, gamma = add_inputs((64, 4, 3), (torch.float32,) * 3, device)

    def loss(weight, t, r):
        return drop_path_add(t, r, 0.5, training=True, gamma=weight).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")(gamma, x, residual)
    # Each of the four rows of an entry is kept or not: the gradient is one of the 16 sums of rows, times 2.
    choices = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).to(device)
    sums = 2 * torch.einsum("ck,nkf->ncf", choices, x)
    distance = (sums - grads[:, None]).abs().amax(-1)
    assert (distance.amin(1) < 1e-4).all()
    assert len(distance.argmin(1).unique()) > 8


# --- drop_path_add: activation checkpointing, the op itself ---


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("dtypes", [t for t in FUSED_ADD_DTYPES if t[0] in (t[1], torch.bfloat16)], ids=dtypes_id)
def test_add_checkpointing_recomputes_the_same_mask(device, use_reentrant, mode, dtypes):
    data, shortcut, gamma = add_inputs((64, 5), dtypes, device)

    def block(x, residual, weight=None):
        out = drop_path_add(torch.tanh(x), residual, 0.5, training=True, gamma=weight, mode=mode)
        return drop_path_add(torch.tanh(out).to(x.dtype), residual, 0.5, training=True, gamma=weight, mode=mode)

    def run(wrap):
        torch.manual_seed(11)
        leaves = [t.clone().requires_grad_() for t in (data, shortcut, gamma) if t is not None]
        out = wrap(*leaves)
        drop_path(data, 0.5, training=True)  # the recomputation must not see where the generator is by then
        (out.float() ** 2).sum().backward()
        return [out, *(leaf.grad for leaf in leaves)]

    checkpointed = run(lambda *leaves: checkpoint(block, *leaves, use_reentrant=use_reentrant))
    for actual, expected in zip(checkpointed, run(block), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dual", ["x", "residual", "gamma"])
def test_the_add_op_refuses_what_it_cannot_differentiate(device, dual):
    tensors = dict(zip(("x", "residual", "gamma"), add_inputs((6, 4), (torch.float32,) * 3, device), strict=True))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="carries a tangent"):
        tensors[dual] = forward_ad.make_dual(tensors[dual], tensors[dual])
        torch.ops.droppath_ext.drop_path_add(*tensors.values(), 0.5, True, True)


# --- stochastic_depth ---


def _skip_case(device, batch=6):
    """x, gamma, a bias that comes along, and a weight; and the branch of them."""
    x = random_tensor((batch, 4), torch.float64, device)
    gamma, weight = (random_tensor((4,), torch.float64, device, seed=seed) for seed in (2, 3))
    bias = random_tensor((batch, 4), torch.float64, device, seed=4)

    def branch(rows, shift, weight):
        return (rows * weight + shift).sin() * rows

    return (x, gamma, bias, weight), branch


def _skip(branch, sampling, device, drop_prob=0.5):
    """A function of x, gamma, bias and weight that draws the same samples each time."""
    on = "cpu" if sampling == "bernoulli" else device

    def function(x, gamma, bias, weight):
        return stochastic_depth(
            x,
            lambda rows, shift: branch(rows, shift, weight),
            drop_prob,
            training=True,
            gamma=gamma,
            batched=(bias,),
            sampling=sampling,
            generator=seeded(on, 3),
        )

    return function


SKIP_SUBSETS = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drop_prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("requiring", SKIP_SUBSETS)
def test_skip_gradcheck(device, sampling, drop_prob, requiring):
    """First and second derivatives, whichever of the tensors require them."""
    tensors, branch = _skip_case(device)
    inputs = [t.requires_grad_(bool(r)) for t, r in zip(tensors, requiring, strict=True)]
    function = _skip(branch, sampling, device, drop_prob)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_second_derivatives_are_those_of_the_formula(device, sampling):
    """Of a loss in which all of them meet."""
    tensors, branch = _skip_case(device)
    inputs = [t.requires_grad_() for t in tensors]
    x, gamma, bias, weight = inputs
    grad_outs = [random_tensor(t.shape, torch.float64, device, seed=9) for t in inputs]

    def second(out):
        first = torch.autograd.grad((out**3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(first, inputs, grad_outs)

    out = _skip(branch, sampling, device)(*inputs)
    keep = added_samples(out, x)
    assert 0 < keep.sum() < 6
    plain = skip_formula(x, branch(x, bias, weight), keep, 2.0, gamma)
    for actual, expected in zip(second(out), second(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_two_backwards_use_the_same_samples(device, sampling):
    tensors, branch = _skip_case(device, 40)
    inputs = [t.requires_grad_() for t in tensors]
    out = _skip(branch, sampling, device)(*inputs)
    grads = [torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2)]
    stochastic_depth(inputs[0], torch.sin, 0.5, training=True, sampling=sampling)
    grads.append(torch.autograd.grad(out.sum(), inputs))
    for others in grads[1:]:
        for actual, expected in zip(others, grads[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_gradient_of_x_used_elsewhere_too(device, sampling):
    """The gradients of the branch, of the residual and of what else reads x add up, in any order of use."""
    data = random_tensor((10, 4), torch.float64, device).requires_grad_()
    x = data * 2
    before = x.cos()
    out = stochastic_depth(x, torch.sin, 0.5, training=True, sampling=sampling)
    after = (x**3).sum()
    keep = added_samples(out, x)
    assert 0 < keep.sum() < 10
    weight = random_tensor((10, 4), torch.float64, device, seed=3)
    (grad,) = torch.autograd.grad((out * weight).sum() + before.sum() + after, data)
    value = x.detach()
    expected = 2 * (weight + zero_dropped(2 * weight * value.cos(), keep) - value.sin() + 3 * value**2)
    torch.testing.assert_close(grad, expected)


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


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_in_a_stack_of_blocks(device, sampling):
    """Each x is the output of the block before."""
    weights = [random_tensor((4,), torch.float64, device, seed=seed).requires_grad_() for seed in range(4)]
    x = random_tensor((10, 4), torch.float64, device, seed=9).requires_grad_()
    out, plain = x, x
    for weight in weights:
        before = out

        def branch(rows, weight=weight):
            return (rows * weight).tanh()

        out = stochastic_depth(before, branch, 0.4, training=True, sampling=sampling)
        keep = added_samples(out, before)
        plain = skip_formula(plain, branch(plain), keep, 1 / 0.6 if sampling == "bernoulli" else 10 / 6)
    torch.testing.assert_close(out, plain)
    grads = (torch.autograd.grad((result**2).sum(), [x, *weights]) for result in (out, plain))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_expanded_gradient(device, sampling):
    """As sum() sends it."""
    x = random_tensor((10, 3, 4), device=device).requires_grad_()
    gamma = random_tensor((4,), device=device, seed=2).requires_grad_()
    out = stochastic_depth(x, torch.sin, 0.5, training=True, gamma=gamma, sampling=sampling)
    keep = added_samples(out, x)
    out.sum().backward()
    value = x.detach()
    torch.testing.assert_close(x.grad, 1 + zero_dropped(2 * gamma.detach() * value.cos(), keep))
    torch.testing.assert_close(gamma.grad, zero_dropped(2 * value.sin(), keep).sum((0, 1)))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_batched_gradients(device, sampling):
    """is_grads_batched sends a vmapped gradient into the backward ops."""
    tensors, branch = _skip_case(device)
    inputs = [t.requires_grad_() for t in tensors]
    out = _skip(branch, sampling, device)(*inputs)
    grads = random_tensor((3, 6, 4), torch.float64, device, seed=5)
    batched = torch.autograd.grad(out, inputs, grads, retain_graph=True, is_grads_batched=True)
    for place, grad in enumerate(grads):
        for actual, expected in zip(batched, torch.autograd.grad(out, inputs, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(actual[place], expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
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


# --- stochastic_depth: forward mode and torch.func ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dual", SKIP_SUBSETS)
@pytest.mark.parametrize("api", ["forward_ad", "func.jvp"])
def test_skip_forward_mode(device, sampling, dual, api):
    """A tangent on x, gamma, what comes along or a parameter, on one of them alone too, is carried on."""
    tensors, branch = _skip_case(device, 12)
    tangents = [random_tensor(t.shape, torch.float64, device, seed=10 + place) for place, t in enumerate(tensors)]
    places = [place for place in range(4) if dual[place]]

    def function(*duals):
        inputs = list(tensors)
        for place, tensor in zip(places, duals, strict=True):
            inputs[place] = tensor
        x, gamma, bias, weight = inputs
        return stochastic_depth(
            x, lambda r, s: branch(r, s, weight), 0.5, True, gamma=gamma, batched=(bias,), sampling=sampling
        )

    if api == "forward_ad":
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(tensors[place], tangents[place]) for place in places]
            out, out_tangent = forward_ad.unpack_dual(function(*duals))
            assert out_tangent is not None
    else:
        out, out_tangent = torch.func.jvp(
            function, tuple(tensors[place] for place in places), tuple(tangents[place] for place in places)
        )
    keep = added_samples(out, tensors[0])
    assert 0 < keep.sum() < 12

    def formula(x, gamma, bias, weight):
        return skip_formula(x, branch(x, bias, weight), keep, 2.0, gamma)

    used = [t if dual[place] else torch.zeros_like(t) for place, t in enumerate(tangents)]
    expected, expected_tangent = torch.func.jvp(formula, tuple(tensors), tuple(used))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out_tangent, expected_tangent)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_func_grad(device, sampling):
    tensors, branch = _skip_case(device, 12)

    def loss(x, gamma, bias, weight):
        out = stochastic_depth(
            x, lambda r, s: branch(r, s, weight), 0.5, True, gamma=gamma, batched=(bias,), sampling=sampling
        )
        return (out**2).sum(), out

    grads, out = torch.func.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*tensors)
    keep = added_samples(out, tensors[0])
    assert 0 < keep.sum() < 12

    def plain(x, gamma, bias, weight):
        return (skip_formula(x, branch(x, bias, weight), keep, 2.0, gamma) ** 2).sum()

    for actual, expected in zip(grads, torch.func.grad(plain, argnums=(0, 1, 2, 3))(*tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_forward_over_reverse(device, sampling):
    """A graph that the kernels built meets a tangent only in its backward pass: it must not get lost there."""
    tensors, branch = _skip_case(device, 12)
    inputs = [t.requires_grad_() for t in tensors]
    weight, tangent = (random_tensor((12, 4), torch.float64, device, seed=seed) for seed in (5, 6))
    out = _skip(branch, sampling, device)(*inputs)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(out, inputs, forward_ad.make_dual(weight, tangent), retain_graph=True)
        duals = [forward_ad.unpack_dual(grad) for grad in grads]
    for values, place in ((weight, 0), (tangent, 1)):
        for dual, expected in zip(duals, torch.autograd.grad(out, inputs, values, retain_graph=True), strict=True):
            torch.testing.assert_close(dual[place], expected)


def test_skip_vmap_draws_a_subset_for_each_entry(device):
    """The count of "fixed" is the same for every entry, which is all that vmap needs."""
    x = random_tensor((30, 8, 3), torch.float64, device)
    out = torch.func.vmap(
        lambda t: stochastic_depth(t, torch.sin, 0.5, training=True, sampling="fixed"), randomness="different"
    )(x)
    keep = (out != x).any(-1)
    assert keep.sum(1).eq(4).all()
    assert len({tuple(row) for row in keep.tolist()}) > 10
    torch.testing.assert_close(out, x + torch.where(keep[..., None], 2 * x.sin(), 0.0))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_vmap_with_one_subset_for_all(device, sampling):
    x = random_tensor((5, 16, 3), torch.float64, device)
    function = torch.func.vmap(
        lambda t: stochastic_depth(t, torch.sin, 0.5, training=True, sampling=sampling), randomness="same"
    )
    out = function(x)
    keep = (out != x).any(-1)
    assert 0 < keep[0].sum() < 16
    assert keep.eq(keep[0]).all()
    torch.testing.assert_close(out, x + torch.where(keep[..., None], 2 * x.sin(), 0.0))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_vmap_refuses_to_draw_unless_told_how(device, sampling):
    function = torch.func.vmap(lambda t: stochastic_depth(t, torch.sin, 0.5, training=True, sampling=sampling))
    with pytest.raises(RuntimeError, match="randomness"):
        function(random_tensor((5, 16, 3), torch.float64, device))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_skip_vmap_where_nothing_is_dropped(device, sampling):
    """No draw, so the default randomness="error" has nothing to object to."""
    x = random_tensor((5, 6, 3), torch.float64, device)
    out = torch.func.vmap(lambda t: stochastic_depth(t, torch.sin, 0.5, sampling=sampling))(x)
    torch.testing.assert_close(out, x + x.sin())


SOURCES = {
    "mask": [True, False, True, True, False, True],
    "one_entry": [True],
    "no_entries": [],
    "index": [4, 0, -1, 3, 2, -1],
    "repeated_index": [4, 4, -1, 0, 4, 0],
}


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
