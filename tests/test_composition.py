"""Promise: the functions and modules work with what training code puts around them: loaders, hooks, wrappers, modes."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from conftest import SAMPLINGS, needs_native, random_tensor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from droppath_ext import DropPath, DropPathAdd, StochasticDepth, drop_path, drop_path_add, patch_timm, stochastic_depth


class Block(nn.Module):
    """All three modules."""

    def __init__(self, sampling="bernoulli", drop_prob=0.5):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.drop_path = DropPath(drop_prob)
        self.add = DropPathAdd(drop_prob, dim=6, init_values=0.5)
        self.skip = StochasticDepth(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), drop_prob, sampling=sampling)

    def forward(self, x):
        x = x + self.drop_path(self.linear(x))
        x = self.add(self.linear(x), x)
        return self.skip(x)


def _block(device, sampling="bernoulli"):
    torch.manual_seed(0)
    return Block(sampling).to(device)


def _step(model, x, seed=1):
    torch.manual_seed(seed)
    out = model(x)
    return out, torch.autograd.grad(out.square().sum(), [parameter for parameter in model.parameters()])


# --- loaders ---


class Dropped(Dataset):
    """Augmentation by the functions, in a worker process."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = torch.ones(32, 2)
        return torch.stack(
            [
                drop_path(x, 0.5, True),
                drop_path_add(x, x, 0.5, True) - 1,
                stochastic_depth(x, torch.clone, 0.5, True) - 1,
                stochastic_depth(x, torch.clone, 0.5, True, sampling="fixed") - 1,
            ]
        )


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader(context):
    """Each worker draws its own masks, those of its seed."""

    def masks():
        loader = DataLoader(
            Dropped(), num_workers=2, multiprocessing_context=context, generator=torch.Generator().manual_seed(1)
        )
        return [batch[0].ne(0).any(-1) for batch in loader]

    first = masks()
    assert len({tuple(mask.flatten().tolist()) for mask in first}) == 4
    assert all(0 < int(kept.sum()) < 32 for mask in first for kept in mask)
    if context == "fork":
        assert all(torch.equal(a, b) for a, b in zip(first, masks(), strict=True))


# --- hooks and wrappers of autograd ---


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_saved_tensors_may_be_packed(device, sampling):
    model, x = _block(device, sampling), random_tensor((16, 6), device=device)
    expected_out, expected = _step(model, x)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.cpu().numpy()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda array: torch.from_numpy(array).to(device)):
        out, gradients = _step(model, x)
    assert packed
    assert torch.equal(out, expected_out)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    with torch.autograd.graph.save_on_cpu():
        assert all(torch.equal(a, b) for a, b in zip(_step(model, x)[1], expected, strict=True))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_copies_draw_for_themselves(device, sampling):
    model, x = _block(device, sampling), random_tensor((16, 6), device=device)
    expected = _step(model, x)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_step(twin, x)[0], expected)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_scaled_gradients_of_half_precision(device, sampling):
    model = _block(device, sampling)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(3):
        with torch.autocast(device.type, torch.float16):
            loss = model(random_tensor((16, 6), device=device)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any((parameter != old).any() for parameter, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_detecting_anomalies(device, sampling):
    model = _block(device, sampling)
    with torch.autograd.detect_anomaly(check_nan=True):
        model(random_tensor((16, 6), device=device)).sum().backward()


class _Listing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@needs_native
def test_modes_see_the_ops(device):
    model, x = _block(device), random_tensor((16, 6), device=device)
    with _Listing() as listing:
        model(x).sum().backward()
    assert {
        "droppath_ext::drop_path",
        "droppath_ext::drop_path_add",
        "droppath_ext::add_kept_backward",
    } <= listing.names


# --- torch.compile of whole models ---

MODELS = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3}),
    ("swin_tiny_patch4_window7_224", {"img_size": 112, "depths": (1, 1, 2, 1)}),
    ("convnext_atto", {"depths": (1, 1, 2, 1)}),
]


@pytest.mark.parametrize(("name", "arguments"), MODELS, ids=[name for name, _ in MODELS])
def test_whole_models_of_timm_compile(device, name, arguments):
    """In one graph for training and one for evaluation, whatever the rates; batches of other sizes add one."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.4, **arguments).to(device)
    images = [random_tensor((b, 3, *[arguments.get("img_size", 64)] * 2), device=device) for b in (4, 4, 6, 8)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with patch_timm():
        for x in images:
            compiled(x).sum().backward()
        assert len(graphs) <= 2
        trained = len(graphs)
        with torch.no_grad():
            model.eval()
            torch.testing.assert_close(compiled(images[0]), model(images[0]))
        model.train()
        compiled(images[0]).sum().backward()
        assert len(graphs) == trained + 1


def test_a_dynamic_batch_of_independent_draws_compiles_once(device):
    """test_compile has the other functions."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: stochastic_depth(x, torch.sin, 0.5, True), backend=backend)
    counts = []
    for size in (16, 24, 40, 33):
        x = random_tensor((size, 6), device=device).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x).sum().backward()
        counts.append(len(graphs))
    assert counts[0] == counts[-1]


def test_a_fixed_number_of_a_dynamic_batch(device):
    """Its number of samples is a constant of the graph: torch says so where a batch is marked as dynamic."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: stochastic_depth(x, torch.sin, 0.5, True, sampling="fixed"), backend="eager")
    x = random_tensor((16, 6), device=device)
    torch._dynamo.mark_dynamic(x, 0)
    with pytest.raises(Exception, match="marked .* as dynamic but your code specialized it to be a constant"):
        compiled(x)
    torch._dynamo.reset()
    for size in (16, 24):
        x = random_tensor((size, 6), device=device)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        assert int((compiled(x) != x).any(1).sum()) == size // 2


def test_compiled_ahead_of_time(tmp_path):
    """A library of AOTInductor draws anew in every call."""
    model, x = _block("cpu", "fixed"), random_tensor((16, 6))
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    outs = [loaded(x) for _ in range(3)]
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])


# --- DTensor ---


@pytest.fixture(scope="module")
def mesh():
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_distributed_tensors(mesh, dim):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placement = [Replicate() if dim is None else Shard(dim)]
    x = distribute_tensor(torch.ones(16, 6), mesh, placement).requires_grad_()
    gamma = distribute_tensor(torch.full((6,), 0.5), mesh, [Replicate()])
    out = drop_path(x, 0.5, True)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient.full_tensor(), out.full_tensor().detach())
    assert 0 < int(out.full_tensor().ne(0).any(1).sum()) < 16
    out = drop_path_add(x, x, 0.5, True, gamma=gamma).full_tensor()
    assert set(out.flatten().tolist()) == {1.0, 2.0}
    with pytest.raises(TypeError, match="gamma must be a DTensor, for x is one"):
        drop_path_add(x, x, 0.5, True, gamma=torch.ones(6))
    for training, p in ((False, 0.5), (True, 0.0)):
        assert torch.equal(stochastic_depth(x, torch.neg, p, training).full_tensor(), torch.zeros(16, 6))


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("sampling", ["bernoulli", "fixed"])
@pytest.mark.parametrize("compiled", [False, True])
def test_distributed_tensors_skip(mesh, dim, sampling, compiled):
    """On one rank as without; on several ranks in test_distributed."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def block(x, gamma):
        return stochastic_depth(x, torch.sin, 0.5, True, gamma=gamma, sampling=sampling)

    plain = torch.randn(16, 6).requires_grad_(), torch.rand(6).requires_grad_()
    torch.manual_seed(0)
    expected = block(*plain)
    x = distribute_tensor(plain[0], mesh, [Replicate() if dim is None else Shard(dim)])
    gamma = distribute_tensor(plain[1], mesh, [Replicate()])
    torch.manual_seed(0)
    out = torch.compile(block, backend="eager")(x, gamma) if compiled else block(x, gamma)
    assert torch.equal(out.full_tensor(), expected)
    gradients = torch.autograd.grad(out.square().sum(), (x, gamma))
    for actual, reference in zip(gradients, torch.autograd.grad(expected.square().sum(), plain), strict=True):
        torch.testing.assert_close(actual.full_tensor(), reference)
