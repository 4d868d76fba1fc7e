from torch import Generator, Tensor
from torch import device as Device

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
def gather(x: Tensor, index: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor] | None: ...
def scatter_add(
    y: Tensor, residual: Tensor, gamma: Tensor | None, slots: Tensor | None, kept: Tensor | None, scale: float
) -> Tensor | None: ...

# For tests: it checks nothing.
def add_kept_(residual: Tensor, x: Tensor, slots: Tensor) -> None: ...
def draw_bernoulli(
    size: int, drop_prob: float, device: Device, generator: Generator | None = None
) -> tuple[Tensor, Tensor, int]: ...
def draw_fixed(x: Tensor, count: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]: ...
def keep_mask(seed: int, offset: int, size: int, drop_prob: float) -> Tensor: ...
def fixed_slots(seed: int, offset: int, size: int, count: int) -> Tensor: ...
