"""One model of every family with drop paths, found in timm, torchvision, transformers, MONAI and mmpretrain themselves.

Models are built for torch's default device, on "meta" mostly without memory for their weights.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from droppath_ext.convert.drops import NAMES

RATE, SAMPLES = 0.3, 4

Example = Tensor | tuple[Any, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """A model that may stand for its family: the first of them that can be built and run does."""

    family: str
    name: str
    build: Callable[[int | None], tuple[nn.Module, Example]]  # for images of this size, None for its own; and inputs


# --- timm ---

SMALL = re.compile(r"test|atto|femto|pico|nano|tiny|mini|small|xx?s|xxt|_s\d*_|_s0|b0|m0|m1|_t\d|t0|l1|18|19|050|_s$")


def timm_candidates() -> Iterator[Candidate]:
    """Every family that takes a rate; and the blocks in parallel, which no small model has."""
    for family, names in timm_families().items():
        names.sort(key=lambda name: (not SMALL.search(name), len(name), name))
        for name in names[:4]:
            yield Candidate(family, name, partial(_build_timm, name))
    name = "vit_small_patch16_18x2_224"
    yield Candidate("vision_transformer, in parallel", name, partial(_build_timm, name))


def timm_families() -> dict[str, list[str]]:
    """The models of each family."""
    models = importlib.import_module("timm.models._registry")._module_to_models
    return {family: sorted(models[family]) for family in sorted(models)}


def _build_timm(name: str, side: int | None) -> tuple[nn.Module, Example]:
    create_model = importlib.import_module("timm").create_model
    try:
        model = create_model(name, drop_path_rate=RATE, **({"img_size": side} if side else {}))
    except TypeError:  # it takes images of any size
        model = create_model(name, drop_path_rate=RATE)
    channels, height, width = model.default_cfg.get("input_size") or (3, 224, 224)
    return model, torch.randn(SAMPLES, channels, side or height, side or width)


# --- torchvision ---

TORCHVISION = [
    *("swin_t", "swin_v2_t", "convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "maxvit_t"),
    *("mvit_v2_s", "swin3d_t"),
]


def torchvision_candidates() -> Iterator[Candidate]:
    for name in TORCHVISION:
        yield Candidate(name, name, partial(_build_torchvision, name))


def _build_torchvision(name: str, side: int | None) -> tuple[nn.Module, Example]:
    size = (side or 224, side or 224)
    model = importlib.import_module("torchvision.models").get_model(name, weights=None)
    frames = (16,) if name in ("mvit_v2_s", "swin3d_t") else ()
    return model, torch.randn(SAMPLES, 3, *frames, *size)


# --- transformers ---


def _images(config: Any, size: tuple[int, int], **more: Tensor) -> dict[str, Tensor]:
    channels = getattr(_vision(config), "num_channels", 3)
    return {"pixel_values": torch.randn(SAMPLES, channels, *size), **more}


def _images_and_text(config: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    return _images(config, size, input_ids=torch.ones(SAMPLES, 8, dtype=torch.long))


def _images_and_prompt(config: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    half = (size[0] // 2, size[1])
    return {name: torch.randn(SAMPLES, 3, *half) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def _video(frames: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(SAMPLES, frames, 3, *size)


# The inputs of model types that do not run on images alone.
INPUTS: dict[str, Callable[[Any, tuple[int, int]], dict[str, Tensor]]] = {
    "clap": lambda config, _: {"input_features": torch.randn(SAMPLES, 1, 1024, config.num_mel_bins)},
    "florence2": lambda _, size: {"hidden_states": torch.randn(SAMPLES, 3, *size)},
    "grounding_dino": _images_and_text,
    "mm_grounding_dino": _images_and_text,
    "seggpt": _images_and_prompt,
    "timesformer": lambda config, size: {"pixel_values": _video(config.num_frames, size)},
    "videomt": lambda _, size: {"pixel_values_videos": _video(2, size)},
    "vjepa2": lambda _, size: {"pixel_values_videos": _video(2, size)},
    "x_clip": lambda config, size: {"pixel_values": _video(config.num_frames, size).flatten(0, 1)},
}
# Where it is not the first class named *Model, or else *Backbone, that these are for.
CLASSES = {"clap": "ClapAudioModel", "florence2": "Florence2VisionBackbone", "x_clip": "XCLIPVisionModel"}


def transformers_candidates() -> Iterator[Candidate]:
    """Every model type whose source has a drop path."""
    transformers: Any = importlib.import_module("transformers")
    root = Path(transformers.__file__).parent / "models"
    for file in sorted(root.glob("*/modeling_*.py")):
        if not re.search(r"^class \w*(DropPath|StochasticDepth|DropConnect)\w*\(", file.read_text(), re.MULTILINE):
            continue
        family = file.parent.name
        module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
        classes = [
            cls
            for name, cls in vars(module).items()
            if inspect.isclass(cls)
            and issubclass(cls, transformers.PreTrainedModel)
            and cls.__module__ == module.__name__
            and not name.endswith("PreTrainedModel")
            and name == CLASSES.get(family, name)
        ]
        classes.sort(key=lambda cls: (not cls.__name__.endswith("Model"), not cls.__name__.endswith("Backbone")))
        for cls in classes[:8]:
            yield Candidate(family, cls.__name__, partial(_build_transformers, family, cls))


def _build_transformers(family: str, cls: Any, side: int | None) -> tuple[nn.Module, Example]:
    config = cls.config_class()
    _adapt(config, side)
    model = cls(config)
    if "attn_mask_probs" in dict(model.named_buffers()):  # numbers that the forward of eomt and videomt asks for
        del model.attn_mask_probs
        model.attn_mask_probs = [1.0] * config.num_blocks
    vision = _vision(config)
    size = getattr(vision, "image_size", None) or getattr(vision, "crop_size", None) or side or 224
    return model, INPUTS.get(family, _images)(config, tuple(size) if isinstance(size, list | tuple) else (size, size))


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config


def _adapt(config: Any, side: int | None) -> None:
    """Rates and the size of images, past the checks of a config: timesformer declares its rate to be an int."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _adapt(value, side)
        elif NAMES.search(key):
            config.__dict__[key] = type(value)([RATE] * len(value)) if isinstance(value, list | tuple) else RATE
        elif side and value and key in ("image_size", "crop_size"):
            is_pair = isinstance(value, list | tuple)
            config.__dict__[key] = type(value)(side * part // value[-1] for part in value) if is_pair else side


# --- MONAI ---


def monai_candidates() -> Iterator[Candidate]:
    yield Candidate("SwinUNETR", "SwinUNETR", partial(_build_monai, "SwinUNETR", {}))
    yield Candidate("SwinUNETR, version 2", "SwinUNETR", partial(_build_monai, "SwinUNETR", {"use_v2": True}))
    hyena = {"hyena_stages": (True, False, True, False)}
    yield Candidate("HyenaNDUNETR", "HyenaNDUNETR", partial(_build_monai, "HyenaNDUNETR", hyena))


def _build_monai(name: str, options: dict[str, Any], side: int | None) -> tuple[nn.Module, Example]:
    network = getattr(importlib.import_module("monai.networks.nets"), name)
    with torch.device("cpu"):  # it reads its rates from a tensor
        model = network(in_channels=1, out_channels=2, dropout_path_rate=RATE, **options)
    return model, torch.randn(SAMPLES, 1, *[side or 96] * 3)


# --- mmpretrain ---

# Backbones that cannot be built of a rate alone: their further arguments.
MMPRETRAIN: dict[str, dict[str, Any]] = {
    "LeViT": {"arch": "128s"},
    "RepLKNet": {"arch": "31B"},
    "ResNet": {"depth": 18},
    "PCPVT": {"arch": "small"},
    "SVT": {"arch": "small"},
}


def mmpretrain_candidates() -> Iterator[Candidate]:
    backbones = importlib.import_module("mmpretrain.models.backbones")
    for name, cls in sorted(vars(backbones).items()):
        if inspect.isclass(cls) and "drop_path_rate" in inspect.signature(cls.__init__).parameters:
            yield Candidate(name, name, partial(_build_mmpretrain, cls))


def _build_mmpretrain(cls: Any, side: int | None) -> tuple[nn.Module, Example]:
    size = inspect.signature(cls.__init__).parameters.get("img_size")
    options = {"img_size": side} if side and size else {}
    with torch.device("cpu"):  # they read their rates from a tensor
        model = cls(drop_path_rate=RATE, **MMPRETRAIN.get(cls.__name__, {}), **options)
    default = 224 if size is None else size.default
    height, width = default if isinstance(default, tuple | list) else (default, default)
    return model, torch.randn(SAMPLES, 3, side or height, side or width)


LIBRARIES: dict[str, Callable[[], Iterator[Candidate]]] = {
    "timm": timm_candidates,
    "torchvision": torchvision_candidates,
    "transformers": transformers_candidates,
    "monai": monai_candidates,
    "mmpretrain": mmpretrain_candidates,
}
