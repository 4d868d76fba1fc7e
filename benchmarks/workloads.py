"""What the parts run over. `ops`: the ops with their byte model, dtypes, drop_probs, activations of real models.
`skip`: models, drop_probs, contestants."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Op:
    """The inputs of an op, all of which get a gradient, and the bytes that either pass moves for each byte of x."""

    inputs: tuple[str, ...]
    forward: Callable[[float], float]
    backward: Callable[[float], float]

    def bytes_moved(self, tensor_bytes: int, p: float, pass_name: str) -> float:
        """What this project has to move on average, the byte model behind every GB/s of this benchmark."""
        backward = self.backward(p) if pass_name == "forward+backward" else 0
        return (self.forward(p) + backward) * tensor_bytes


# The keep mask, one byte per sample, and gamma and its gradient, one number per channel, are left out.
OPS = {
    # drop_path(x). Forward: reads the kept samples, 1 - p, and writes all, 1. Backward: the same for the gradient.
    "drop_path": Op(("x",), forward=lambda p: 2 - p, backward=lambda p: 2 - p),
    # residual + drop_path(x). Forward: reads the residual, too, 1. Its gradient is the incoming one, and costs nothing.
    "drop_path_add": Op(("x", "residual"), forward=lambda p: 3 - p, backward=lambda p: 2 - p),
    # residual + drop_path(gamma * x). Backward: gamma's gradient reads the kept samples of x, 1 - p.
    "drop_path_add+gamma": Op(("x", "residual", "gamma"), forward=lambda p: 3 - p, backward=lambda p: 3 - 2 * p),
}
PASSES = ("forward", "forward+backward")

DTYPES = ("float32", "bfloat16", "float16", "float64")
QUICK_DTYPES = DTYPES[:2]
DROP_PROBS = (0.1, 0.3, 0.5)
QUICK_DROP_PROBS = DROP_PROBS[:1]


@dataclass(frozen=True)
class Activation:
    """One tensor of a real model that drop_path meets: shape of a sample, and the batch on either device."""

    name: str
    sample: tuple[int, ...]
    cpu_batch: int
    cuda_batch: int
    channels_last: bool = False
    sequence_first: bool = False  # [N, B, D] in memory

    @property
    def gamma(self) -> tuple[int, ...]:
        """LayerScale's shape: along the last dim of tokens, [N, D] or [D], and the channels of images, [C, H, W]."""
        return self.sample[-1:] if len(self.sample) <= 2 else (self.sample[0], 1, 1)


# CPU, float32: two fit in an L2 of 1 MiB, most in a last-level cache, ConvNeXt-T 56x56 and sequence-first in neither.
# CUDA: 64 MiB and more in float32, but for the tiny one and the last EfficientNet stages.
# points: the features of a point cloud or a graph, each point a sample of its own, so that samples are many and small.
ACTIVATIONS = (
    Activation("tiny", (4, 16), 8, 8),
    Activation("EfficientNet-B0", (192, 7, 7), 4, 256),
    Activation("EfficientNet-B0", (80, 14, 14), 4, 256, channels_last=True),
    Activation("EfficientNet-B0", (24, 56, 56), 16, 256),
    Activation("ViT-S/16", (197, 384), 8, 256),
    Activation("ViT-B/16", (197, 768), 16, 256),
    Activation("ViT-L/16", (197, 1024), 32, 128),
    Activation("ConvNeXt-T", (384, 14, 14), 32, 256, channels_last=True),
    Activation("ConvNeXt-T", (96, 56, 56), 32, 128),
    Activation("points", (8,), 100_000, 2_097_152),
    Activation("points", (16,), 262_144, 1_048_576),
    Activation("points", (64,), 65_536, 262_144),
    Activation("sequence-first", (197, 384), 256, 256, sequence_first=True),
)
COMPILED_WHEN_QUICK = "ViT-S/16"  # compilation takes longer than the measurement


@dataclass(frozen=True)
class Backbone:
    """A model of timm, and the batch it is trained on; `arguments` are further ones of timm.create_model."""

    timm_name: str
    side: int
    cpu_batch: int
    cuda_batch: int
    arguments: Mapping[str, object] = field(default_factory=dict)

    def batch_on(self, device_type: str) -> int:
        return self.cuda_batch if device_type == "cuda" else self.cpu_batch


BACKBONES = {
    "vit_tiny_2": Backbone("vit_tiny_patch16_224", 96, 16, 128, {"depth": 2, "img_size": 96}),
    "vit_tiny_6": Backbone("vit_tiny_patch16_224", 224, 32, 128, {"depth": 6}),
    "vit_small": Backbone("vit_small_patch16_224", 224, 8, 128),
    "vit_base": Backbone("vit_base_patch16_224", 224, 4, 128),
    "convnext_tiny": Backbone("convnext_tiny", 224, 8, 128),
}
SKIP_BACKBONES = ("vit_small", "vit_base", "convnext_tiny")
QUICK_SKIP_BACKBONE = {"cpu": "vit_tiny_2", "cuda": "vit_base"}
SKIP_DROP_PROBS = (0.0, 0.1, 0.2, 0.4, 0.6)
QUICK_SKIP_DROP_PROBS = (0.0, 0.4)

# What the contestants are measured by, and beside; they take part in every round.
NO_DROP_PATH = "no drop path"
REST = "without blocks"
# Peers first, in the order of the tables.
COMPILED_SUFFIX = " compiled"  # behind the name of a contestant: under torch.compile
SKIP_PEERS = ("timm", "DINOv2", "x[idx]", "timm compiled")
EAGER_CONTESTANTS = ("timm", "DINOv2", "x[idx]", "droppath_ext bernoulli", "droppath_ext fixed")
CONTESTANTS = (
    *EAGER_CONTESTANTS,
    "timm compiled",
    "droppath_ext bernoulli compiled",
    "droppath_ext fixed compiled",
)
