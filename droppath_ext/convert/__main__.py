"""What convert() would do with a model of a library: built without memory for its weights, and run on no data.

python -m droppath_ext.convert vit_small_patch16_224 --drop-path-rate 0.2 --residual skip
"""

import argparse
import sys
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .conversion import convert
from .drops import NAMES
from .plan import LEVELS

SAMPLES = 3


def build_timm(name: str, rate: float) -> tuple[nn.Module, Any]:
    model = import_module("timm").create_model(name, drop_path_rate=rate)
    return model, torch.empty(SAMPLES, *model.default_cfg["input_size"])


def build_torchvision(name: str, rate: float) -> tuple[nn.Module, Any]:
    models = import_module("torchvision.models")
    try:
        model = models.get_model(name, weights=None, stochastic_depth_prob=rate)
    except TypeError:  # its builder sets a rate itself
        model = models.get_model(name, weights=None)
    frames = (16,) if "video" in models.get_model_builder(name).__module__ else ()
    return model, torch.empty(SAMPLES, 3, *frames, 224, 224)


def build_transformers(name: str, rate: float) -> tuple[nn.Module, Any]:
    """``name`` is a model type, as "dinov2", or what AutoConfig.from_pretrained takes."""
    library = import_module("transformers")
    known = library.CONFIG_MAPPING
    config = known[name]() if name in known else library.AutoConfig.from_pretrained(name)
    for key, value in list(vars(config).items()):
        if NAMES.search(key):
            rates = [rate] * len(value) if isinstance(value, list | tuple) else rate
            setattr(config, key, rates)
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    images = torch.empty(SAMPLES, getattr(config, "num_channels", 3), height, width)
    return library.AutoModel.from_config(config), {"pixel_values": images}


LIBRARIES = {"timm": build_timm, "torchvision": build_torchvision, "transformers": build_transformers}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m droppath_ext.convert", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "model", metavar="MODEL", help="its name in the library; for transformers its type, or a checkpoint"
    )
    parser.add_argument("--drop-path-rate", type=float, default=0.2, metavar="R", help="default: 0.2")
    parser.add_argument("--residual", choices=LEVELS, default="skip", help="default: skip")
    parser.add_argument("--library", choices=LIBRARIES, default="timm", help="default: timm")
    options = parser.parse_args(arguments)
    if not 0.0 <= options.drop_path_rate <= 1.0:
        parser.error(f"argument --drop-path-rate: must be in [0, 1], but got {options.drop_path_rate}")
    try:
        with torch.device("meta"):
            model, example = LIBRARIES[options.library](options.model, options.drop_path_rate)
            report = convert(model, options.residual, example=example)
    except ImportError as error:
        parser.exit(2, f"{options.library} cannot be imported: {error}\n")
    except Exception as error:
        parser.exit(2, f"{options.library} cannot build or run {options.model}: {str(error).splitlines()[0]}\n")
    print(report)
    if options.residual == "skip":
        print("By structure alone: whether branches treat samples by themselves is tested on a real model.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
