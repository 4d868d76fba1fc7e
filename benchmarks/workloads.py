"""What the parts run over. `ops`: the ops with their byte model, dtypes, drop_probs, activations of real models.
`skip`: models, drop_probs, contestants. `convert`: models with their rates, levels."""

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
EAGER_SKIP_CONTESTANTS = ("timm", "DINOv2", "x[idx]", "droppath_ext bernoulli", "droppath_ext fixed")
SKIP_CONTESTANTS = (
    *EAGER_SKIP_CONTESTANTS,
    "timm compiled",
    "droppath_ext bernoulli compiled",
    "droppath_ext fixed compiled",
)


@dataclass(frozen=True)
class Rated:
    """A model with drop paths. timm's `drop_path_rate` rises from 0 in the first block, but for CaiT, where it is the
    rate of every block; `uniform` makes it that of every block, `but_first` of all but the first, which never drops."""

    backbone: Backbone
    rate: float
    uniform: bool = False
    but_first: bool = False


_VIT_SMALL_4 = Backbone("vit_small_patch16_224", 160, 48, 128, {"img_size": 160, "depth": 4})
_SWIN_TINY_2222 = Backbone("swin_tiny_patch4_window7_224", 112, 32, 128, {"img_size": 112, "depths": (2, 2, 2, 2)})
_CONVNEXT_PICO = Backbone("convnext_pico", 96, 64, 128)
# Of a size that two cores train; their steps take 0.1 to 1.2 seconds.
SMALL_CONVERT_MODELS = {
    "vit_tiny_6_uniform": Rated(BACKBONES["vit_tiny_6"], 0.4, uniform=True),
    "vit_tiny_6_linear": Rated(BACKBONES["vit_tiny_6"], 0.4),
    "vit_small_4_uniform": Rated(_VIT_SMALL_4, 0.4, uniform=True, but_first=True),
    "vit_small_4_linear": Rated(_VIT_SMALL_4, 0.4),
    "swin_tiny_2222_uniform": Rated(_SWIN_TINY_2222, 0.4, uniform=True, but_first=True),
    "swin_tiny_2222_linear": Rated(_SWIN_TINY_2222, 0.4),
    "convnext_pico_uniform": Rated(_CONVNEXT_PICO, 0.4, uniform=True, but_first=True),
    "convnext_pico_linear": Rated(_CONVNEXT_PICO, 0.4),
    "cait_xxs_6": Rated(Backbone("cait_xxs24_224", 112, 16, 128, {"img_size": 112, "depth": 6}), 0.1),
    "pvt_v2_b0": Rated(Backbone("pvt_v2_b0", 128, 16, 128), 0.1),
    "efficientnetv2_b0": Rated(Backbone("tf_efficientnetv2_b0", 128, 16, 128), 0.2),
}
# With the rates of their papers; DeiT III and DINOv2 give every block the same.
PAPER_CONVERT_MODELS = {
    "deit3_small": Rated(Backbone("deit3_small_patch16_224", 224, 8, 128), 0.05, uniform=True),
    "deit3_base": Rated(Backbone("deit3_base_patch16_224", 224, 4, 128), 0.2, uniform=True),
    "deit3_large": Rated(Backbone("deit3_large_patch16_224", 224, 4, 64), 0.45, uniform=True),
    "swin_tiny": Rated(Backbone("swin_tiny_patch4_window7_224", 224, 8, 128), 0.2),
    "swin_small": Rated(Backbone("swin_small_patch4_window7_224", 224, 4, 128), 0.3),
    "swin_base": Rated(Backbone("swin_base_patch4_window7_224", 224, 4, 128), 0.5),
    "convnext_tiny": Rated(BACKBONES["convnext_tiny"], 0.1),
    "convnext_small": Rated(Backbone("convnext_small", 224, 4, 128), 0.4),
    "convnext_base": Rated(Backbone("convnext_base", 224, 4, 128), 0.5),
    "beit_base": Rated(Backbone("beit_base_patch16_224", 224, 4, 128), 0.1),
    "dinov2_large": Rated(Backbone("vit_large_patch14_dinov2", 224, 4, 64, {"img_size": 224}), 0.4, uniform=True),
    "cait_s24": Rated(Backbone("cait_s24_224", 224, 4, 64), 0.1),
    "pvt_v2_b2": Rated(Backbone("pvt_v2_b2", 224, 8, 128), 0.1),
    "efficientnetv2_s": Rated(Backbone("efficientnetv2_s", 224, 8, 128), 0.2),
}
CONVERT_MODELS = {
    "vit_tiny_2_uniform": Rated(BACKBONES["vit_tiny_2"], 0.4, uniform=True),
    **SMALL_CONVERT_MODELS,
    **PAPER_CONVERT_MODELS,
}
CONVERT_MODELS_OF = {"cpu": tuple(SMALL_CONVERT_MODELS), "cuda": tuple(PAPER_CONVERT_MODELS)}
QUICK_CONVERT_MODEL = {"cpu": "vit_tiny_2_uniform", "cuda": "deit3_base"}  # where every part is run

AS_IS = "as it is"  # takes part in every round, and so do NO_DROP_PATH and the models without branches
WITHOUT_BRANCHES = "without branches"
CONVERT_LEVELS = ("keep", "fuse", "skip")
SKIP_FIXED = "skip fixed"  # the same number of samples in every step
EAGER_CONVERT_CONTESTANTS = (*CONVERT_LEVELS, SKIP_FIXED)
CONVERT_CONTESTANTS = (*EAGER_CONVERT_CONTESTANTS, *(name + COMPILED_SUFFIX for name in EAGER_CONVERT_CONTESTANTS))

# What --model and --contestant choose from, in the parts that have them.
MODELS = {"skip": BACKBONES, "convert": CONVERT_MODELS}
CONTESTANTS = {"skip": SKIP_CONTESTANTS, "convert": CONVERT_CONTESTANTS}
