"""The functions of ``functional`` as modules: they store arguments and call."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .checks import check_branch, check_mode, check_sampling, checked_drop_prob
from .functional import drop_path, drop_path_add, stochastic_depth
from .tracing import scripted_stochastic_depth


class DropPath(nn.Module):
    """``drop_path`` as a module, a drop-in for ``timm.layers.DropPath``: drops samples in training only.

    Args:
        drop_prob: Probability in [0, 1] that a sample is dropped.
        scale_by_keep: Scale kept samples by 1 / (1 - drop_prob).
        mode: "row" draws for each sample, "batch" once for the whole batch.

    Shape:
        Input and output: [B, ...]; see :func:`droppath_ext.drop_path` for dtypes and errors.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True, mode: str = "row") -> None:
        check_mode(mode)
        super().__init__()
        self.drop_prob = checked_drop_prob(drop_prob)
        self.scale_by_keep = scale_by_keep
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep, mode=self.mode)

    def extra_repr(self) -> str:
        mode = "" if self.mode == "row" else f", mode={self.mode}"
        return f"drop_prob={round(float(self.drop_prob), 3):0.3f}{mode}"


class LayerScaled(nn.Module):
    """What the modules with a LayerScale weight share: the parameter ``gamma``, or None."""

    gamma: nn.Parameter | None

    def __init__(self, dim: int | Sequence[int] | None, init_values: float | None) -> None:
        if (dim is None) != (init_values is None):
            raise ValueError(f"dim and init_values go together, but got dim={dim} and init_values={init_values}")
        super().__init__()
        self.init_values = init_values
        if dim is None or init_values is None:
            self.register_parameter("gamma", None)
        else:
            self.gamma = nn.Parameter(torch.empty(dim))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill gamma with ``init_values``, if there is one."""
        if self.gamma is not None and self.init_values is not None:
            nn.init.constant_(self.gamma, self.init_values)

    def extra_repr(self) -> str:
        return "" if self.gamma is None else f", dim={list(self.gamma.shape)}, init_values={self.init_values}"


class DropPathAdd(LayerScaled):
    """``drop_path_add`` as a module: the end of a residual block, with or without LayerScale.

    Args:
        drop_prob: Probability in [0, 1] that a sample of the branch is dropped, in training.
        scale_by_keep: Scale kept samples by 1 / (1 - drop_prob).
        mode: "row" draws for each sample, "batch" once for the whole batch.
        dim: Shape of the parameter ``gamma``: D for the last dim of x, (C, 1, 1) for the channels of [B, C, H, W].
            Needs ``init_values``. Default: no gamma.
        init_values: What gamma is filled with at first; 1e-5 in many models. Needs ``dim``.

    Shape:
        x, residual and output: [B, ...]; see :func:`droppath_ext.drop_path_add` for dtypes and errors.
    """

    def __init__(
        self,
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        mode: str = "row",
        dim: int | Sequence[int] | None = None,
        init_values: float | None = None,
    ) -> None:
        check_mode(mode)
        super().__init__(dim, init_values)
        self.drop_prob = checked_drop_prob(drop_prob)
        self.scale_by_keep = scale_by_keep
        self.mode = mode

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return drop_path_add(
            x, residual, self.drop_prob, self.training, self.scale_by_keep, gamma=self.gamma, mode=self.mode
        )

    def extra_repr(self) -> str:
        mode = "" if self.mode == "row" else f", mode={self.mode}"
        return f"drop_prob={round(float(self.drop_prob), 3):0.3f}{mode}{super().extra_repr()}"


class StochasticDepth(LayerScaled):
    """``stochastic_depth`` as a module.

    Args:
        branch: Computes f(x); a module is registered as ``branch``.
        drop_prob: Probability in [0, 1] that a sample is dropped, in training.
        scale_by_keep: Scale the branch of kept samples.
        dim: Shape of the parameter ``gamma``: D for the last dim of x, (C, 1, 1) for the channels of [B, C, H, W].
            Needs ``init_values``. Default: no gamma.
        init_values: What gamma is filled with at first; 1e-5 in many models. Needs ``dim``.
        sampling: "bernoulli" draws for each sample, "fixed" keeps the same number of samples in every call.

    Shape:
        x and output: [B, ...]; ``forward(x, *batched)`` hands the kept samples of further tensors to the branch. See
        :func:`droppath_ext.stochastic_depth` for dtypes and errors.
    """

    def __init__(
        self,
        branch: Callable[..., Tensor],
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        dim: int | Sequence[int] | None = None,
        init_values: float | None = None,
        sampling: str = "bernoulli",
    ) -> None:
        check_branch(branch)
        check_sampling(sampling)
        super().__init__(dim, init_values)
        self.branch = branch
        self.drop_prob = checked_drop_prob(drop_prob)
        self.scale_by_keep = scale_by_keep
        self.sampling = sampling

    def __prepare_scriptable__(self) -> Callable[..., Tensor]:
        return scripted_stochastic_depth()  # torch.jit.script would complain about *batched

    def forward(self, x: Tensor, *batched: Tensor) -> Tensor:
        return stochastic_depth(
            x,
            self.branch,
            self.drop_prob,
            self.training,
            self.scale_by_keep,
            gamma=self.gamma,
            batched=batched,
            sampling=self.sampling,
        )

    def extra_repr(self) -> str:
        sampling = "" if self.sampling == "bernoulli" else f", sampling={self.sampling}"
        return f"drop_prob={round(float(self.drop_prob), 3):0.3f}{sampling}{super().extra_repr()}"
