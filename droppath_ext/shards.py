"""``stochastic_depth`` of DTensors: every rank skips among its own samples."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from . import reference
from .checks import check_kind, check_output, check_unchanged, is_dtensor, versions
from .sampling import module_of, takes_batch_statistics

if TYPE_CHECKING:  # it takes a while, and nobody has a DTensor before it is imported
    from torch.distributed.tensor import DTensor, Placement


def can_skip(x: Tensor) -> bool:
    """Whether ``stochastic_depth`` can drop samples of x without ``keep``."""
    if x.is_nested:
        return False
    return not is_dtensor(x) or all(
        placement.is_shard(0) or x.device_mesh.size(i) == 1 for i, placement in enumerate(x.placements)
    )


@torch.compiler.disable(reason="how many samples a rank computes is drawn on the host")  # type: ignore[untyped-decorator]
def on_shards(
    function: Callable[..., Tensor],
    x: "DTensor",
    branch: Callable[..., Any],
    drop_prob: float,
    scale_by_keep: bool,
    *,
    gamma: "DTensor | None",
    batched: Sequence["DTensor | None"],
    sampling: str,
    mode: str,
    dim: int,
    keep: Tensor | None,
    generator: Generator | None,
) -> Tensor:
    """``stochastic_depth``, which is the function, of a DTensor in training; the other arguments are checked.

    No rank waits for another. The branch gets the K rows of its rank as a DTensor that is placed as x is. Other ranks
    have another K, but the branch is told that theirs is the same: what treats samples by themselves cannot tell.
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise RuntimeError(
            "x must not be a DTensor where make_fx records stochastic_depth in training, for it would keep the same "
            "samples for good"
        )
    shards = _Shards(x, dim, has_keep=keep is not None)
    shards.check_branch(branch)
    local_gamma = None if gamma is None else shards.local_gamma(gamma)
    held = [[] if tensor is None else shards.placements_of(tensor, f"batched[{i}]") for i, tensor in enumerate(batched)]
    if keep is None and sampling == "bernoulli":
        # Ranks that are seeded alike drop what a single device would, others draw for themselves.
        keep = reference.draw_keep_mask(torch.empty(x.shape[dim], device="cpu"), drop_prob, mode, generator)
        generator = None

    @functools.wraps(branch, updated=())
    def local_branch(local: Tensor, *local_batched: Tensor | None) -> Any:
        rows = shards.rows(local, x, shards.placements)
        parts = zip(local_batched, batched, held, strict=True)
        others = [None if p is None or t is None else shards.rows(p, t, placements) for p, t, placements in parts]
        before = versions(x, rows)
        y = branch(rows, *others)
        check_unchanged(before, x, rows)
        return shards.local_output(y, rows, local)

    out = function(
        x.to_local(),
        local_branch,
        drop_prob,
        True,
        scale_by_keep,
        gamma=local_gamma,
        batched=[
            None if tensor is None else tensor.redistribute(placements=placements).to_local()
            for tensor, placements in zip(batched, held, strict=True)
        ],
        sampling=sampling,
        mode=mode,
        dim=dim,
        keep=None if keep is None else shards.local_keep(keep),
        generator=generator,
    )
    return _distributed(out, x, x.placements, list(x.shape))


class _Shards:
    """Where x is, and what belongs to the part of this rank.

    Raises:
        ValueError: ranks do not hold whole values, or several would draw for one sample.
    """

    def __init__(self, x: "DTensor", dim: int, has_keep: bool) -> None:
        from torch.distributed.tensor import Replicate, Shard

        self.x = x
        self.dim = dim
        # Of a single rank "sharded" says nothing, but it forbids to flatten a dimension of size 1.
        sizes = x.device_mesh.shape
        self.placements = [p if size > 1 else Replicate() for p, size in zip(x.placements, sizes, strict=True)]
        self.by_samples = [placement.is_shard(dim) for placement in self.placements]
        if not all(type(placement) in (Shard, Replicate) for placement in self.placements):
            raise ValueError(f"x must be placed by Shard and Replicate alone, but got {x.placements}: redistribute it")
        if not has_keep and not all(split or size == 1 for split, size in zip(self.by_samples, sizes, strict=True)):
            raise ValueError(
                f"x must be sharded along its samples, Shard({dim}), or ranks that hold parts of one sample would draw "
                f"for it each, but got {x.placements}: pass a mask as keep of stochastic_depth, say draw_keep(x, "
                "drop_prob) on ranks that are seeded alike, or use drop_path_add"
            )

    def check_branch(self, branch: Callable[..., Any]) -> None:
        """Raise where the branch is known to make ranks communicate that hold different samples."""
        module = module_of(branch)
        if module is None or not any(self.by_samples):
            return
        found = "a BatchNorm" if takes_batch_statistics(branch) else None
        for name, parameter in module.named_parameters():
            if found is None and is_dtensor(parameter) and parameter.device_mesh == self.x.device_mesh:
                pairs = zip(self.by_samples, parameter.placements, strict=True)
                if any(split and not placement.is_replicate() for split, placement in pairs):
                    found = f"a parameter {name} placed by {parameter.placements}"
        if found is not None:
            raise ValueError(
                f"branch must not communicate between ranks that hold different samples, but it has {found}: use "
                "drop_path_add"
            )

    def rows(self, local: Tensor, whole: "DTensor", placements: Sequence["Placement"]) -> "DTensor":
        """Rows of this rank as a DTensor, as if the others had as many; of a rank without samples a stand-in."""
        if local.shape[self.dim] == 0:
            sizes = list(local.shape)
            sizes[self.dim] = 1
            local = local.new_full(sizes, local.is_floating_point() or local.dtype is torch.bool)
        sizes = list(whole.shape)
        sizes[self.dim] = local.shape[self.dim] * math.prod(
            size for size, split in zip(self.x.device_mesh.shape, self.by_samples, strict=True) if split
        )
        return _distributed(local, self.x, placements, sizes)

    def local_output(self, y: Any, rows: "DTensor", local: Tensor) -> Tensor:
        """This rank's rows of what the branch has returned for ``rows``, of which it has ``local``."""
        check_output(y, rows)
        if not is_dtensor(y):
            raise TypeError("the output of branch must be a DTensor, for its input is one, but got a plain tensor")
        self.check_mesh(y, "the output of branch")
        for split, placement in zip(self.by_samples, y.placements, strict=True):
            if split and not placement.is_shard(self.dim):
                raise ValueError(
                    f"the output of branch must be sharded along its samples, Shard({self.dim}), as its input is, but "
                    f"got {y.placements}: branch must not communicate between ranks that hold different samples"
                )
        return y.redistribute(placements=self.placements).to_local().narrow(self.dim, 0, local.shape[self.dim])

    def placements_of(self, tensor: "DTensor", name: str) -> "list[Placement]":
        """Those with which this rank has the same samples of a tensor of ``batched`` as of x."""
        from torch.distributed.tensor import Replicate

        self.check_mesh(tensor, name)
        return [
            own if split else Replicate() if given.is_partial() or given.is_shard(self.dim) else given
            for own, split, given in zip(self.placements, self.by_samples, tensor.placements, strict=True)
        ]

    def local_keep(self, keep: Tensor) -> Tensor:
        """The mask of this rank's samples."""
        from torch.distributed.tensor import Replicate, Shard

        by_samples = [split and keep.shape[0] > 1 for split in self.by_samples]
        mesh = self.x.device_mesh
        if is_dtensor(keep):
            self.check_mesh(keep, "keep")
            keep = keep.redistribute(placements=[Shard(0) if split else Replicate() for split in by_samples]).to_local()
        else:
            for i, split in enumerate(by_samples):
                if split:  # as torch.chunk does, which leaves the last ranks without samples
                    keep = (*keep.chunk(mesh.size(i)), *[keep[:0]] * mesh.size(i))[mesh.get_local_rank(i)]
        size = self.x.to_local().shape[self.dim]
        if keep.shape[0] not in (1, size):
            raise ValueError(
                f"x must be sharded as torch.chunk does it, {keep.shape[0]} samples on this rank, but it has {size}"
            )
        return keep

    def local_gamma(self, gamma: "DTensor") -> Tensor:
        """The part of gamma that belongs to this rank's part of x."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        self.check_mesh(gamma, "gamma")
        held: list[Placement] = []
        of_gradient: list[Placement] = []
        for placement in self.placements:
            along = placement.dim - (self.x.ndim - gamma.ndim) if isinstance(placement, Shard) else -1
            if along >= 0 and gamma.shape[along] > 1:
                held.append(Shard(along))
                of_gradient.append(Shard(along))
            else:  # what a rank computes of the gradient is of its part of x
                held.append(Replicate())
                of_gradient.append(Partial() if placement.is_shard() else Replicate())
        return gamma.redistribute(placements=held).to_local(grad_placements=of_gradient)

    def check_mesh(self, tensor: "DTensor", name: str) -> None:
        """Raise unless the tensor is where x is."""
        check_kind(tensor, name, self.x)
        if tensor.device_mesh != self.x.device_mesh:
            raise ValueError(f"{name} must be on the mesh of x, {self.x.device_mesh}, but got {tensor.device_mesh}")


def _distributed(local: Tensor, x: "DTensor", placements: Sequence["Placement"], sizes: list[int]) -> "DTensor":
    """A DTensor of these sizes, whose dimensions lie in memory in the order of those of ``local``."""
    from torch.distributed.tensor import DTensor

    order = sorted(range(local.ndim), key=lambda dim: -local.stride()[dim])
    stride = torch.empty_permuted(sizes, order, device="meta").stride()
    return DTensor.from_local(local, x.device_mesh, placements, run_check=False, shape=torch.Size(sizes), stride=stride)
