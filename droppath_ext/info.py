"""``python -m droppath_ext.info``: versions, how the extension was built, the GPUs present, and a self-test."""

import platform
import sys
import warnings

import torch
from torch import Tensor

from . import reference
from ._native import _C, BINARY, HERE
from .checks import DTYPES, SAMPLINGS
from .functional import drop_path, drop_path_add, stochastic_depth
from .version import __version__


def versions() -> dict[str, str]:
    """What runs here and what the extension was built with, by name."""
    if BINARY is None:
        extension = "none: every call takes the slower composite path"
    elif BINARY.parent == HERE:
        extension = str(BINARY)
    else:
        extension = f"{BINARY}, of an installed copy of the same Python files that this folder shadows"
    return {
        "droppath_ext": __version__,
        "imported from": str(HERE),
        "native extension": extension,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch built with": _C.torch_version or "none",
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
    for dtype in DTYPES:
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
            for sampling in SAMPLINGS:
                _self_test_skip(x, grad, drop_prob, sampling)


def _self_test_add(x: Tensor, grad: Tensor, drop_prob: float) -> None:
    residual = torch.randn_like(x).requires_grad_()
    gamma = _gamma(x)
    out = drop_path_add(x, residual, drop_prob, training=True, gamma=gamma)
    keep = (out != residual).flatten(1).any(1)
    expected = reference.add_kept(x, residual, gamma, keep, reference.keep_scale(drop_prob, scale_by_keep=True))
    _compare("drop_path_add", out, expected, {"x": x, "residual": residual, "gamma": gamma}, grad)


def _self_test_skip(x: Tensor, grad: Tensor, drop_prob: float, sampling: str) -> None:
    gamma = _gamma(x)
    out = stochastic_depth(x, torch.neg, drop_prob, training=True, gamma=gamma, sampling=sampling)
    keep = (out != x).flatten(1).any(1)  # all of "fixed" are half the batch, whose scale is that of "bernoulli"
    expected = reference.add_kept(-x, x, gamma, keep, reference.keep_scale(drop_prob, scale_by_keep=True))
    _compare(f"stochastic_depth ({sampling})", out, expected, {"x": x, "gamma": gamma}, grad)


def _gamma(x: Tensor) -> Tensor:
    return torch.rand(x.shape[-1], device=x.device).add_(0.5).to(x.dtype).requires_grad_()


def _compare(function: str, out: Tensor, expected: Tensor, inputs: dict[str, Tensor], grad: Tensor) -> None:
    """Raise RuntimeError where a result or a gradient differs from the formula by more than rounding."""
    results = (out, *torch.autograd.grad(out, list(inputs.values()), grad))
    wanted = (expected, *torch.autograd.grad(expected, list(inputs.values()), grad))
    names = ("the result", *(f"grad_{name}" for name in inputs))
    for name, actual, formula in zip(names, results, wanted, strict=True):
        tolerance = 32 * torch.finfo(out.dtype).eps * formula.abs().max()
        if not torch.allclose(actual, formula, rtol=0.0, atol=tolerance.item()):
            raise RuntimeError(f"{name} of {function} differs from the formula for {out.dtype} {list(out.shape)}")


def main() -> int:
    """Print it all; 0 if every self-test passes."""
    rows = versions() | {"GPU": ", ".join(gpus()) or "none"}
    failed = False
    for device in devices():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of missing kernels: the rows say what is missing
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
