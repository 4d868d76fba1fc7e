"""Promise: gradients of every order and kind, and nothing kept that is not needed."""

import pytest
import torch
from conftest import DTYPES, assert_same_bits, expected_drop_path, predict_keep, random_tensor, seeded
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from droppath_ext import drop_path, reference


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
