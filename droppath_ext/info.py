"""``python -m droppath_ext.info``: versions, how the extension was built, the GPUs present, and a self-test."""

import platform
import sys

import torch

from . import reference
from ._native import _C
from .version import __version__


def versions() -> dict[str, str]:
    """What runs here and what the extension was built with, by name."""
    return {
        "droppath_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "built with torch": _C.torch_version,
        "torch's CUDA": torch.version.cuda or "none",
        "built with CUDA": _C.cuda_version or "none",
        "GPU architectures in the binary": _C.cuda_archs or "none",
    }


def gpus() -> list[str]:
    """The GPUs present, each with its compute capability."""
    return [
        "{} (sm_{}{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]


def devices() -> list[str]:
    """The devices that the kernels serve here."""
    return ["cpu"] + (["cuda"] if _C.has_cuda and torch.cuda.is_available() else [])


def self_test(device: str) -> None:
    """Run forward and backward on ``device``; raise AssertionError where they differ from ``reference``."""
    drop_prob = 0.5
    scale = reference.keep_scale(drop_prob, scale_by_keep=True)
    for dtype in reference.DTYPES:
        for shape in ((64, 197, 24), (64, 7)):  # one for each of the kernels: long rows of vectors, odd short ones
            x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
            grad = torch.randn_like(x)
            out, keep = torch.ops.droppath_ext.drop_path(x, drop_prob, True, True)
            (grad_x,) = torch.autograd.grad(out, x, grad)
            assert 0 < keep.sum() < len(keep), "the keep mask drops all samples or none"
            assert torch.equal(out, reference.apply_keep_mask(x, keep, scale)), f"forward differs for {dtype}"
            assert torch.equal(grad_x, reference.apply_keep_mask(grad, keep, scale)), f"backward differs for {dtype}"


def main() -> int:
    """Print it all; 0 if every self-test passes."""
    rows = versions() | {"GPU": ", ".join(gpus()) or "none"}
    failed = False
    for device in devices():
        try:
            self_test(device)
            rows[f"self-test on {device}"] = "pass"
        except (AssertionError, RuntimeError) as error:
            rows[f"self-test on {device}"] = f"fail: {error}"
            failed = True
    for name, value in rows.items():
        print(f"{name:32} {value}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
