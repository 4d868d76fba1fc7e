"""``stochastic_depth`` of DTensors: every rank skips among its own samples."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from . import reference
from .checks import check_kind, is_dtensor

if TYPE_CHECKING:  # it takes a while, and nobody has a DTensor before it is imported
    from torch.distributed.tensor import DTensor, Placement


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
) -> "DTensor":
    """``stochastic_depth``, which is the function, of a DTensor in training; the other arguments are checked.

    No rank waits for another. The branch gets the rows of its rank as a DTensor that is placed as x is, and as large as
    if every rank held as many: what treats samples by themselves cannot tell the difference.
    """
    from torch.distributed.tensor import DTensor

    mesh = x.device_mesh
    placements = _placements(x, dim, keep)
    of_batched = [
        [] if tensor is None else _batched_placements(tensor, f"batched[{i}]", x, placements, dim)
        for i, tensor in enumerate(batched)
    ]
    if keep is None and sampling == "bernoulli":
        # Ranks that are seeded alike drop what a single device would, others draw for themselves.
        keep = reference.draw_keep_mask(torch.empty(x.shape[dim], device="cpu"), drop_prob, mode, generator)
        generator = None

    def rows_of(local: Tensor | None, held: Sequence[Any]) -> Any:
        return None if local is None else DTensor.from_local(local, mesh, held, run_check=False)

    @functools.wraps(branch, updated=())
    def local_branch(*rows: Tensor | None) -> Any:
        return _local_output(branch(*map(rows_of, rows, (placements, *of_batched))), x, placements, dim)

    out = function(
        x.to_local(),
        local_branch,
        drop_prob,
        True,
        scale_by_keep,
        gamma=None if gamma is None else _local_gamma(gamma, x, placements),
        batched=[
            None if tensor is None else tensor.redistribute(placements=held).to_local()
            for tensor, held in zip(batched, of_batched, strict=True)
        ],
        sampling=sampling,
        mode=mode,
        dim=dim,
        keep=None if keep is None else _local_keep(keep, x, placements, dim),
        generator=generator,
    )
    return DTensor.from_local(out, mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def _placements(x: "DTensor", dim: int, keep: Tensor | None) -> "list[Placement]":
    """Those of x, replicated where there is one rank. Raise unless ranks hold whole values, and only one draws each."""
    from torch.distributed.tensor import Replicate

    placements = [placement if x.device_mesh.size(i) > 1 else Replicate() for i, placement in enumerate(x.placements)]
    for i, placement in enumerate(placements):
        if not (placement.is_shard() or placement.is_replicate()):
            raise ValueError(f"x must be sharded or replicated, but got placements {x.placements}")
        if keep is None and x.device_mesh.size(i) > 1 and not placement.is_shard(dim):
            raise ValueError(
                f"x must be sharded along its samples, Shard({dim}), or ranks that hold parts of one sample would draw "
                f"for it each, but got placements {x.placements}: pass a mask as keep, say that of "
                "droppath_ext.draw_keep(x, drop_prob) on ranks that are seeded alike"
            )
    return placements


def _batched_placements(
    tensor: "DTensor", name: str, x: "DTensor", placements: Sequence["Placement"], dim: int
) -> "list[Placement]":
    """Those with which each rank has the same samples of a tensor of ``batched`` as of x."""
    from torch.distributed.tensor import Replicate

    check_kind(tensor, name, x)
    return [
        own if own.is_shard(dim) else Replicate() if given.is_partial() or given.is_shard(dim) else given
        for own, given in zip(placements, tensor.placements, strict=True)
    ]


def _local_keep(keep: Tensor, x: "DTensor", placements: Sequence["Placement"], dim: int) -> Tensor:
    """The mask of this rank's samples."""
    from torch.distributed.tensor import Replicate, Shard

    by_samples = [placement.is_shard(dim) and keep.shape[0] > 1 for placement in placements]
    if is_dtensor(keep):
        return keep.redistribute(placements=[Shard(0) if split else Replicate() for split in by_samples]).to_local()
    mesh = x.device_mesh
    for i, split in enumerate(by_samples):
        if split:  # as torch.chunk does, which leaves the last ranks without samples
            keep = (*keep.chunk(mesh.size(i)), *[keep[:0]] * mesh.size(i))[mesh.get_local_rank(i)]
    return keep


def _local_gamma(gamma: "DTensor", x: "DTensor", placements: Sequence["Placement"]) -> Tensor:
    """The part of gamma that belongs to this rank's part of x."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    held: list[Placement] = []
    of_gradient: list[Placement] = []
    for placement in placements:
        along = placement.dim - (x.ndim - gamma.ndim) if isinstance(placement, Shard) else -1
        if along >= 0 and gamma.shape[along] > 1:
            held.append(Shard(along))
            of_gradient.append(Shard(along))
        else:  # what a rank computes of the gradient is of its part of x
            held.append(Replicate())
            of_gradient.append(Partial() if placement.is_shard() else Replicate())
    return gamma.redistribute(placements=held).to_local(grad_placements=of_gradient)


def _local_output(y: Any, x: "DTensor", placements: Sequence["Placement"], dim: int) -> Any:
    """This rank's rows of what the branch has returned, placed as x is."""
    if not isinstance(y, Tensor):
        return y  # for which there is a sentence already
    if not is_dtensor(y):
        raise TypeError("the output of branch must be a DTensor, for its input is one, but got a plain tensor")
    for own, found in zip(placements, y.placements, strict=True):
        if own.is_shard(dim) and not found.is_shard(dim):
            raise ValueError(
                f"the output of branch must be sharded along its samples, Shard({dim}), as its input is, but got "
                f"placements {y.placements}: each rank has rows of its own, which cannot meet"
            )
    return y.redistribute(placements=placements).to_local()
