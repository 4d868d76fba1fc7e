"""What ``_C`` is without the native extension: every op leaves its call to the composite path.

The interface is that of ``_C.pyi`` without what only tests call. What the composite path cannot do is drawn here.
"""

import torch
from torch import Generator, Tensor, nn
from torch import device as Device

torch_version = cuda_version = cuda_archs = None
has_cuda = False


def uses_fused_path(x: object) -> bool:
    """Whether x is a plain tensor of the host, whose values Python may read."""
    if not isinstance(x, Tensor) or type(x) not in (Tensor, nn.Parameter):
        return False
    return x.is_cpu and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _leave(*_: object) -> None:
    return None


drop_path = drop_path_add = scale_kept = gather = scatter_add = _leave
draw_keep = draw_keep_at = draw_fixed = draw_fixed_for = _leave


def draw_bernoulli(
    size: int, drop_prob: float, device: Device, generator: Generator | None = None, per_sample: bool = True
) -> tuple[Tensor, Tensor, int]:
    """Draw on the host which of ``size`` samples are kept, all or none without ``per_sample``; as ``index_kept``."""
    draws = torch.empty(size if per_sample else 1, device="cpu")
    return index_kept(draws.bernoulli_(1.0 - drop_prob, generator=generator) != 0, size, device)


def index_kept(keep: Tensor, size: int, device: Device) -> tuple[Tensor, Tensor, int]:
    """Of a mask: the slots int64 [size], the kept samples int64 [count], [-1] if there are none, and their count."""
    keep = keep.cpu().expand(size)
    count = int(keep.sum())  # first: what has no values says so here
    kept = keep.nonzero().flatten()
    slots = torch.where(keep, keep.cumsum(0) - 1, -1)
    return slots.to(device), (kept if count else kept.new_full((1,), -1)).to(device), count
