"""The functions of ``functional`` as modules: they store arguments and call."""

from torch import Tensor, nn

from .functional import check_drop_prob, check_mode, drop_path


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
        check_drop_prob(drop_prob)
        check_mode(mode)
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep, mode=self.mode)

    def extra_repr(self) -> str:
        mode = "" if self.mode == "row" else f", mode={self.mode}"
        return f"drop_prob={round(self.drop_prob, 3):0.3f}{mode}"
