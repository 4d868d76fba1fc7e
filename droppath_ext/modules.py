"""The functions of ``functional`` as modules: they store arguments and call."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .checks import (
    check_branch,
    check_mode,
    check_sample_dim,
    check_sampling,
    checked_drop_prob,
    checked_host_drop_prob,
)
from .functional import drop_path, drop_path_add, stochastic_depth
from .tracing import scripted_stochastic_depth


def _set_drop_prob(module: "DropPath | DropPathAdd", drop_prob: float | Tensor) -> None:
    """A number as an attribute; a tensor as a buffer, which moves and is saved with the module."""
    drop_prob = checked_drop_prob(drop_prob)
    if isinstance(drop_prob, Tensor):
        module.register_buffer("drop_prob", drop_prob)
    else:
        module.drop_prob = drop_prob


def _repr(drop_prob: float | Tensor, **options: object) -> str:
    """The rate as timm shows it, and what differs from the default ("row", "bernoulli", 0)."""
    if isinstance(drop_prob, Tensor) and not drop_prob.is_cpu:
        shown = f"tensor on {drop_prob.device}"
    else:
        shown = f"{round(float(drop_prob), 3):0.3f}"
    named = [f", {name}={value}" for name, value in options.items() if value not in ("row", "bernoulli", 0)]
    return f"drop_prob={shown}{''.join(named)}"


class DropPath(nn.Module):
    """``drop_path`` as a module, a drop-in for ``timm.layers.DropPath``: drops samples in training only.

    Args:
        drop_prob: Probability in [0, 1] that a sample is dropped; a 0-dim tensor becomes a buffer, to be filled in
            place. Modules that are built with one tensor share it until they are moved.
        scale_by_keep: Scale kept samples by 1 / (1 - drop_prob).
        mode: "row" draws for each sample, "batch" once for the whole batch.
        sample_dim: Which dim of x counts the samples.

    Shape:
        Input and output: [B, ...]; see :func:`droppath_ext.drop_path` for dtypes.

    Raises:
        ValueError: ``drop_prob`` is a number outside [0, 1], or ``mode`` is unknown; in a call, as ``drop_path``.
        TypeError: ``drop_prob`` is neither a number nor a 0-dim tensor; in a call, as ``drop_path``.
    """

    if TYPE_CHECKING:  # torch.jit.script would read it, and knows no such union
        drop_prob: float | Tensor

    sample_dim = 0  # of modules that were pickled without it

    def __init__(
        self, drop_prob: float | Tensor = 0.0, scale_by_keep: bool = True, mode: str = "row", sample_dim: int = 0
    ) -> None:
        check_mode(mode)
        check_sample_dim(sample_dim)
        super().__init__()
        _set_drop_prob(self, drop_prob)
        self.scale_by_keep = scale_by_keep
        self.mode = mode
        self.sample_dim = sample_dim

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep, mode=self.mode, dim=self.sample_dim)

    def extra_repr(self) -> str:
        return _repr(self.drop_prob, mode=self.mode, sample_dim=self.sample_dim)


class LayerScaled(nn.Module):
    """What the modules with a LayerScale weight share: the parameter ``gamma``, or None."""

    gamma: nn.Parameter | None
    channels_first, sample_dim, mode = False, 0, "row"  # of modules that were pickled without them

    def __init__(
        self,
        dim: int | Sequence[int] | None,
        init_values: float | None,
        channels_first: bool,
        sample_dim: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_sample_dim(sample_dim)
        if (dim is None) != (init_values is None):
            raise ValueError(f"dim and init_values go together, but got dim={dim} and init_values={init_values}")
        if channels_first and not isinstance(dim, int):
            raise ValueError(f"channels_first needs the number of channels as dim, but got dim={dim}")
        if channels_first and sample_dim == 1:
            raise ValueError("channels_first means that dim 1 counts channels, but got sample_dim=1")
        super().__init__()
        self.init_values = init_values
        self.channels_first = channels_first
        if dim is None or init_values is None:
            self.register_parameter("gamma", None)
        else:
            self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill gamma with ``init_values``, if there is one."""
        if self.gamma is not None and self.init_values is not None:
            nn.init.constant_(self.gamma, self.init_values)

    def _gamma_of(self, x: Tensor) -> Tensor | None:
        """gamma along dim 1 of x."""
        gamma = self.gamma
        return None if gamma is None else gamma.view([-1] + [1] * (x.ndim - 2))

    def extra_repr(self) -> str:
        if self.gamma is None:
            return ""
        channels_first = ", channels_first=True" if self.channels_first else ""
        return f", dim={list(self.gamma.shape)}, init_values={self.init_values}{channels_first}"


class DropPathAdd(LayerScaled):
    """``drop_path_add`` as a module: the end of a residual block, with or without LayerScale.

    Args:
        drop_prob: Probability in [0, 1] that a sample of the branch is dropped, in training; a 0-dim tensor becomes a
            buffer.
        scale_by_keep: Scale kept samples by 1 / (1 - drop_prob).
        mode: "row" draws for each sample, "batch" once for the whole batch.
        dim: Shape of the parameter ``gamma``: D for the last dim of x, (C, 1, 1) for the channels of [B, C, H, W], ()
            for one number. Needs ``init_values``. Default: no gamma.
        init_values: What gamma is filled with at first; 1e-5 in many models. Needs ``dim``.
        channels_first: gamma is [C], as in timm's LayerScale2d, and belongs to dim 1 of x.
        sample_dim: Which dim of x and residual counts the samples.
        device: Where gamma is. Default: torch's.
        dtype: That of gamma. Default: torch's.

    Shape:
        x, residual and output: [B, ...]; see :func:`droppath_ext.drop_path_add` for dtypes.

    Raises:
        ValueError: ``drop_prob`` is a number outside [0, 1], ``mode`` is unknown, ``dim`` and ``init_values`` do not
            come together, or ``channels_first`` does not fit them; in a call, as ``drop_path_add``.
        TypeError: ``drop_prob`` is neither a number nor a 0-dim tensor; in a call, as ``drop_path_add``.
    """

    if TYPE_CHECKING:  # torch.jit.script would read it, and knows no such union
        drop_prob: float | Tensor

    def __init__(
        self,
        drop_prob: float | Tensor = 0.0,
        scale_by_keep: bool = True,
        mode: str = "row",
        dim: int | Sequence[int] | None = None,
        init_values: float | None = None,
        channels_first: bool = False,
        sample_dim: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_mode(mode)
        super().__init__(dim, init_values, channels_first, sample_dim, device, dtype)
        _set_drop_prob(self, drop_prob)
        self.scale_by_keep = scale_by_keep
        self.mode = mode
        self.sample_dim = sample_dim

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return drop_path_add(
            x,
            residual,
            self.drop_prob,
            self.training,
            self.scale_by_keep,
            gamma=self._gamma_of(x) if self.channels_first else self.gamma,
            mode=self.mode,
            dim=self.sample_dim,
        )

    def extra_repr(self) -> str:
        return f"{_repr(self.drop_prob, mode=self.mode, sample_dim=self.sample_dim)}{super().extra_repr()}"


class StochasticDepth(LayerScaled):
    """``stochastic_depth`` as a module.

    Args:
        branch: Computes f(x); a module is registered as ``branch``.
        drop_prob: Probability in [0, 1] that a sample is dropped, in training.
        scale_by_keep: Scale the branch of kept samples.
        dim: Shape of the parameter ``gamma``: D for the last dim of x, (C, 1, 1) for the channels of [B, C, H, W], ()
            for one number. Needs ``init_values``. Default: no gamma.
        init_values: What gamma is filled with at first; 1e-5 in many models. Needs ``dim``.
        sampling: "bernoulli" draws for each sample, "fixed" keeps the same number of samples in every call.
        mode: "row" draws for each sample, "batch" once for the whole batch.
        channels_first: gamma is [C], as in timm's LayerScale2d, and belongs to dim 1 of x.
        sample_dim: Which dim of x, and of further tensors, counts the samples.
        device: Where gamma is. Default: torch's.
        dtype: That of gamma. Default: torch's.

    Shape:
        x and output: [B, ...]; ``forward(x, *batched)`` hands the kept samples of further tensors to the branch. See
        :func:`droppath_ext.stochastic_depth` for dtypes.

    Raises:
        ValueError: ``drop_prob`` is a number outside [0, 1], ``sampling`` or ``mode`` is unknown, ``dim`` and
            ``init_values`` do not come together, or ``channels_first`` does not fit them; in a call, as
            ``stochastic_depth``.
        TypeError: ``branch`` is not callable, or ``drop_prob`` is neither a number nor a 0-dim tensor; in a call, as
            ``stochastic_depth``.
    """

    def __init__(
        self,
        branch: Callable[..., Tensor],
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        dim: int | Sequence[int] | None = None,
        init_values: float | None = None,
        sampling: str = "bernoulli",
        mode: str = "row",
        channels_first: bool = False,
        sample_dim: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_branch(branch)
        check_sampling(sampling)
        check_mode(mode)
        super().__init__(dim, init_values, channels_first, sample_dim, device, dtype)
        self.branch = branch
        self.drop_prob = checked_host_drop_prob(drop_prob, "StochasticDepth")
        self.scale_by_keep = scale_by_keep
        self.sampling = sampling
        self.mode = mode
        self.sample_dim = sample_dim

    def __prepare_scriptable__(self) -> Callable[..., Tensor]:
        return scripted_stochastic_depth()  # torch.jit.script would complain about *batched

    def forward(self, x: Tensor, *batched: Tensor | None) -> Tensor:
        return stochastic_depth(
            x,
            self.branch,
            self.drop_prob,
            self.training,
            self.scale_by_keep,
            gamma=self._gamma_of(x) if self.channels_first else self.gamma,
            batched=batched,
            sampling=self.sampling,
            mode=self.mode,
            dim=self.sample_dim,
        )

    def extra_repr(self) -> str:
        options = _repr(self.drop_prob, sampling=self.sampling, mode=self.mode, sample_dim=self.sample_dim)
        return f"{options}{super().extra_repr()}"
