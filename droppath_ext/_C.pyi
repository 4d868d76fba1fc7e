from torch import Generator, Tensor

torch_version: str
has_cuda: bool
cuda_version: str | None
cuda_archs: str | None

def uses_fused_path(x: object) -> bool: ...
def drop_path(
    x: Tensor, drop_prob: float, scale_by_keep: bool, per_sample: bool, generator: Generator | None = None
) -> Tensor | None: ...
def drop_path_add(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    drop_prob: float,
    scale_by_keep: bool,
    per_sample: bool,
    generator: Generator | None = None,
) -> Tensor | None: ...
def keep_mask(seed: int, offset: int, size: int, drop_prob: float) -> Tensor: ...
