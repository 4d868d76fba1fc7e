"""How far convert() brings every family of timm, torchvision and transformers: `make test-all-models`.

    python tests/all_models.py [--library NAME] [--family NAME] [--markdown FILE]

Families are found in the libraries themselves. Of each, one model is built on the meta device, without memory for
its weights, converted to "skip" and counted by the calls of drop paths in one training forward: what may be skipped is
judged by structure alone there. The exit status is 1 if a library falls below its bounds, or if a call is left
without a reason.
"""

import argparse
import collections
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

from droppath_ext.convert import ConversionReport, convert
from droppath_ext.convert.drops import NAMES

RATE, SAMPLES = 0.3, 3
LEVELS = ("skip", "fuse", "keep")
# The share of the calls that must be at "fuse" or above, and at "skip".
BOUNDS = {"timm": (0.97, 0.63), "torchvision": (1.0, 0.0), "transformers": (0.93, 0.75)}
SMALL = re.compile(r"test|atto|femto|pico|nano|tiny|mini|small|xx?s|xxt|_s\d*_|_s0|b0|m0|m1|_t\d|t0|l1|18|19|050|_s$")


def timm_models() -> Iterator[tuple[str, str, object]]:
    """Every family that takes a rate; and the blocks in parallel, which no small model has."""
    from timm import create_model
    from timm.models._registry import _module_to_models

    for family in sorted(_module_to_models):
        names = sorted(_module_to_models[family], key=lambda name: (not SMALL.search(name), len(name), name))
        for name in [*names[:4], *(["vit_small_patch16_18x2_224"] if family == "vision_transformer" else [])]:

            def run(name: str = name) -> ConversionReport:
                model = create_model(name, drop_path_rate=RATE).train()
                size = model.default_cfg.get("input_size") or (3, 224, 224)
                return convert(model, "skip", example=torch.empty(SAMPLES, *size))

            yield family, name, run


def torchvision_models() -> Iterator[tuple[str, str, object]]:
    import torchvision

    names = ["swin_t", "swin_v2_t", "convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "maxvit_t"]
    for name, shape in [
        *((name, (224, 224)) for name in names),
        *((n, (16, 224, 224)) for n in ("mvit_v2_s", "swin3d_t")),
    ]:

        def run(name: str = name, shape: tuple[int, ...] = shape) -> ConversionReport:
            model = torchvision.models.get_model(name, weights=None).train()
            return convert(model, "skip", example=torch.empty(SAMPLES, 3, *shape))

        yield name, name, run


def transformers_models() -> Iterator[tuple[str, str, object]]:
    """Every model type whose source has a drop path; of its classes, those that run on images alone."""
    import transformers

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
        ]
        classes.sort(key=lambda cls: (not cls.__name__.endswith("Model"), not cls.__name__.endswith("Backbone")))
        for cls in classes[:8]:

            def run(cls: type = cls) -> ConversionReport:
                config = cls.config_class()
                _set_rates(config)
                model = cls(config).train()
                return convert(model, "skip", example=_images(model, config))

            yield family, cls.__name__, run


def _set_rates(config: object) -> None:
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _set_rates(value)
        elif NAMES.search(key):
            setattr(config, key, type(value)([RATE] * len(value)) if isinstance(value, list | tuple) else RATE)


def _images(model: torch.nn.Module, config: object) -> dict[str, torch.Tensor]:
    vision = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    if model.main_input_name == "pixel_values_videos":
        return {model.main_input_name: torch.empty(SAMPLES, config.frames_per_clip, channels, height, width)}
    return {model.main_input_name: torch.empty(SAMPLES, channels, height, width)}


LIBRARIES = {"timm": timm_models, "torchvision": torchvision_models, "transformers": transformers_models}


def measure(library: str, family: str | None) -> tuple[list[tuple[str, str, ConversionReport]], list[str]]:
    """A row for each family whose drop paths are called; and which families could not be run, with the reason."""
    rows, failures = {}, {}
    for name, model, run in LIBRARIES[library]():
        if family not in (None, name) or (name in rows and "18x2" not in model):
            continue
        try:
            with torch.device("meta"):
                report = run()
        except Exception as error:
            failures.setdefault(name, f"{model}: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}")
            continue
        if report.sites:
            rows[name if name not in rows else f"{name}, in parallel"] = (model, report)
            counts = ", ".join(f"{report.count(level)} {level}" for level in LEVELS if report.count(level))
            print(f"{library:12} {name:24} {model:36} {counts}", flush=True)
    found = [(name, model, report) for name, (model, report) in rows.items()]
    return found, [f"{name}: {why}" for name, why in failures.items() if name not in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, help="only this one; default: all")
    parser.add_argument("--family", help="only this one of its families; no bounds then")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines, failed = [f"# What convert() reaches, {date.today()}", ""], False
    for library in [options.library] if options.library else LIBRARIES:
        rows, failures = measure(library, options.family)
        sites = [site for _, _, report in rows for site in report.sites]
        counts = collections.Counter(site.level for site in sites)
        fused, skipped = (counts["skip"] + counts["fuse"]) / max(len(sites), 1), counts["skip"] / max(len(sites), 1)
        summary = (
            f"{library} {importlib.import_module(library).__version__}: "
            f"{len(rows)} families and variants, {len(sites)} calls, "
            f"{100 * fused:.1f} % fused or skipped, {100 * skipped:.1f} % skipped"
        )
        print(summary)
        lines += [
            f"## {summary}",
            "",
            "| family | model | skip | fuse | keep | why not more |",
            "| :-- | :-- | --: | --: | --: | :-- |",
        ]
        for name, model, report in rows:
            why = "; ".join(sorted({f"{site.why} ({site.block_class})" for site in report.sites if site.why}))
            lines.append(f"| {name} | {model} | {' | '.join(str(report.count(level)) for level in LEVELS)} | {why} |")
        lines += ["", *(f"- not run: {failure}" for failure in failures), ""]
        unexplained = [site.path for site in sites if site.level != "skip" and not site.why]
        low = options.family is None and (fused < BOUNDS[library][0] or skipped < BOUNDS[library][1])
        if unexplained or low:
            failed = True
            print(f"{library}: FAILED, {'below its bounds' if low else f'no reason for {unexplained[0]}'}")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text("\n".join(lines).rstrip() + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
