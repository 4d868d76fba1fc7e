"""``python -m droppath_ext.info``: versions, how the extension was built, the GPUs present, and a self-test."""

import platform
import sys

import torch
from torch import Tensor

from . import reference
from ._native import _C
from .functional import drop_path, drop_path_add
from .version import __version__


def versions() -> dict[str, str]:
    """What runs here and what the extension was built with, by name."""
    return {
        "droppath_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch built with": _C.torch_version,
        "CUDA found with torch": torch.version.cuda or "none",
        "CUDA built with": _C.cuda_version or "none, CUDA tensors take the composite path",
        "GPU architectures in the binary": _C.cuda_archs or "none",
    }


def gpus() -> list[str]:
    """The GPUs present, each with its compute capability."""
    return [
        "{} (sm_{}{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]


def devices() -> list[str]:
    """The devices to test here."""
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def self_test(device: str) -> None:
    """Run forward and backward on ``device``; raise RuntimeError where they differ from ``reference``."""
    drop_prob = 0.5
    scale = reference.keep_scale(drop_prob, scale_by_keep=True)
    for dtype in reference.DTYPES:
        for shape in ((64, 197, 24), (64, 7)):  # one for each of the kernels: long rows of vectors, odd short ones
            x = torch.rand(shape, device=device).add_(0.5).to(dtype).requires_grad_()
            grad = torch.randn_like(x)
            out = drop_path(x, drop_prob, training=True)
            (grad_x,) = torch.autograd.grad(out, x, grad)
            keep = out.flatten(1).ne(0).any(1)
            if not 0 < keep.sum() < len(keep):
                raise RuntimeError(f"of {len(keep)} samples, {keep.sum()} are kept")
            if not torch.equal(out, reference.apply_keep_mask(x, keep, scale)):
                raise RuntimeError(f"the forward pass differs from the formula for {dtype} {shape}")
            if not torch.equal(grad_x, reference.apply_keep_mask(grad, keep, scale)):
                raise RuntimeError(f"the backward pass differs from the formula for {dtype} {shape}")
            _self_test_add(x, grad, drop_prob)


def _self_test_add(x: Tensor, grad: Tensor, drop_prob: float) -> None:
    """Run drop_path_add both ways on these inputs; its sums may differ from the formula in the last bits."""
    residual = torch.randn_like(x).requires_grad_()
    gamma = torch.rand(x.shape[-1], device=x.device).add_(0.5).to(x.dtype).requires_grad_()
    inputs = (x, residual, gamma)
    out = drop_path_add(x, residual, drop_prob, training=True, gamma=gamma)
    keep = (out != residual).flatten(1).any(1)
    formula = reference.add_kept(x, residual, gamma, keep, reference.keep_scale(drop_prob, scale_by_keep=True))
    results = (out, *torch.autograd.grad(out, inputs, grad))
    expected = (formula, *torch.autograd.grad(formula, inputs, grad))
    names = ("the result", "grad_x", "grad_residual", "grad_gamma")
    for name, actual, wanted in zip(names, results, expected, strict=True):
        tolerance = 32 * torch.finfo(x.dtype).eps * wanted.abs().max()
        if not torch.allclose(actual, wanted, rtol=0.0, atol=tolerance.item()):
            raise RuntimeError(f"{name} of drop_path_add differs from the formula for {x.dtype} {list(x.shape)}")


def main() -> int:
    """Print it all; 0 if every self-test passes."""
    rows = versions() | {"GPU": ", ".join(gpus()) or "none"}
    failed = False
    for device in devices():
        try:
            self_test(device)
            rows[f"self-test on {device}"] = "pass"
        except RuntimeError as error:
            rows[f"self-test on {device}"] = f"fail: {error}"
            failed = True
    for name, value in rows.items():
        print(f"{name:32} {value}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
