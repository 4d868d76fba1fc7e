"""Does a converted block compute what it did? Given the same masks, and in float64 wherever it runs so."""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from droppath_ext import convert, drop_path, restore
from droppath_ext.convert import ConversionReport, ConvertedSite
from droppath_ext.convert.drops import DropPathKind, drop_path_kind

RATE = 0.5
SEED = 2  # one whose first masks both keep and drop
TOLERANCE = 1e-10  # of the largest output, gradient and buffer
ROUNDED_TOLERANCE = 1e-6  # of a block that computes a part in float32 whatever it is given
SINGLE_TOLERANCE = 1e-4  # of a block that runs in float32 only
LEVELS = ("keep", "fuse", "skip")


@dataclass
class Call:
    """A module and what it was called with."""

    path: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def size(self) -> int:
        tensors = [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)]
        return sum(tensor.numel() for tensor in (*tensors, *self.module.parameters()))


# --- which blocks ---


def distinct_blocks(model: nn.Module, report: ConversionReport, example: Any) -> list[str]:
    """Paths of the blocks with drop paths, the smallest of each form; converts nothing, and takes ``convert`` back."""
    restore(model)
    levels: dict[str, list[str]] = {}
    for site in report.sites:
        levels.setdefault(site.block, []).append(site.level)
    smallest: dict[object, Call] = {}
    for call in recorded_calls(model, example, list(levels)):
        parts = [(path, type(module), _flags(module)) for path, module in call.module.named_modules()]
        kinds = [type(leaf) for leaf in tree_flatten((call.args, call.kwargs))[0]]
        form = (*parts, *kinds, *levels[call.path])
        if form not in smallest or call.size() < smallest[form].size():
            smallest[form] = call
    return [call.path for call in smallest.values()]


def _flags(module: nn.Module) -> tuple[object, ...]:
    flags = [(name, value) for name, value in module.__dict__.items() if isinstance(value, bool) or value is None]
    missing = [name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is None]
    return (*flags, *missing, *module._buffers)


def recorded_calls(model: nn.Module, example: Any, paths: list[str]) -> list[Call]:
    """The first call of each of these modules, in a training forward that ends with the last of them."""
    calls: dict[str, Call] = {}

    def record(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path not in calls:  # copies, for what follows may write to them
            args, kwargs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, kwargs))
            calls[path] = Call(path, module, args, kwargs)
        if len(calls) == len(paths):
            raise _AllRecorded

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(record, path), with_kwargs=True) for path in paths
    ]
    try:
        with torch.no_grad(), contextlib.suppress(_AllRecorded):
            model.train()
            if isinstance(example, dict):
                model(**example)
            else:
                model(*example if isinstance(example, tuple) else (example,))
    finally:
        for hook in hooks:
            hook.remove()
    return [calls[path] for path in paths]


class _AllRecorded(Exception):
    pass


# --- the comparison ---


@dataclass
class Comparison:
    """What keep, fuse and skip compute otherwise than the block itself; and what convert says about "skip"."""

    faults: list[str] = field(default_factory=list)
    sites: list[ConvertedSite] = field(default_factory=list)
    tolerance: float = TOLERANCE


def compare(call: Call) -> Comparison:
    try:
        call, original, evaluation = _prepared(call, torch.float64)
        tolerance = TOLERANCE
    except RuntimeError:  # it holds float32 numbers that are neither parameters nor buffers
        call, original, evaluation = _prepared(call, torch.float32)
        tolerance = SINGLE_TOLERANCE
    on_cpu = all(tensor.device.type == "cpu" for tensor in original.parameters())
    steps: dict[frozenset[str], dict[str, list[Tensor | None]]] = {}
    faults = []
    for level in LEVELS:
        converted = Alone(copy.deepcopy(call.module))
        report = convert(converted, level, example=(call.args, call.kwargs), min_drop_prob=0.0)
        if not _same_bits(_evaluation(converted, call), evaluation):
            faults.append(f"{level}: the evaluation is another")
        # Elsewhere than on the CPU a site that skips draws from another generator than one that does not.
        skipped = frozenset(site.path for site in report.sites if site.level == "skip" and not on_cpu)
        if skipped not in steps:
            masks: list[Tensor] = []
            untouched = copy.deepcopy(original)  # a step changes buffers
            with _given_masks(untouched, masks, skipped), _Rounding() as rounding:
                steps[skipped] = _step(untouched, call)
            if rounding.seen:
                tolerance = ROUNDED_TOLERANCE
            if not any(0 < int(mask.sum()) < len(mask) for mask in masks):
                faults.append("the masks show nothing: each keeps all samples, or drops all")
        expected, actual = steps[skipped], _step(converted, call)
        for what, tensors in expected.items():
            difference = _difference(actual[what], tensors)
            if not difference <= tolerance:
                faults.append(f"{level}: {what} differ by {difference:.1e} of the largest")
        if missed := sum(site.missed for site in report.sites):
            faults.append(f"{level}: {missed} calls did not meet the conditions of their own plan")
    return Comparison(faults, report.sites, tolerance)


class Alone(nn.Module):
    """A block that is called with a tuple and a dict of its arguments."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.block(*args, **kwargs)


def _prepared(call: Call, dtype: torch.dtype) -> tuple[Call, Alone, list[Any]]:
    """With high rates, without dropout, and with nothing so small that its gradient shows nothing; and evaluated."""
    torch.manual_seed(0)
    module = copy.deepcopy(call.module).to(dtype)
    for child in module.modules():
        if (kind := drop_path_kind(child)) is not None:
            setattr(child, kind.rate, RATE)
        elif "Dropout" in type(child).__name__:
            child.p = 0.0
    for parameter in module.parameters():  # LayerScale and others that are built as nothing
        if bool((parameter.abs() < 1e-3).all()):
            nn.init.normal_(parameter)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tree_map(cast, (call.args, call.kwargs))
    prepared, original = Call(call.path, module, args, kwargs), Alone(copy.deepcopy(module))
    return prepared, original, _evaluation(original, prepared)


def _step(model: Alone, call: Call) -> dict[str, list[Tensor | None]]:
    """One training step: the outputs, the gradients of inputs and parameters, and the buffers afterwards."""
    inputs = []

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.clone()
        if not value.is_floating_point():
            return value
        inputs.append(value.requires_grad_())
        return value.clone()  # no leaf, which the block may write to

    args, kwargs = tree_map(fresh, (call.args, call.kwargs))
    torch.manual_seed(SEED)
    outputs = [leaf for leaf in tree_flatten(model.train()(args, kwargs))[0] if isinstance(leaf, Tensor)]
    torch.manual_seed(SEED)
    total = sum((out * _cotangent(out)).sum() for out in outputs if out.requires_grad)
    wanted = [*inputs, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return {"outputs": outputs, "gradients": list(gradients), "buffers": [b.clone() for b in model.buffers()]}


def _cotangent(out: Tensor) -> Tensor:
    """Normal numbers, the same in whatever strides; those of randn_like follow the memory."""
    return torch.randn(out.shape, dtype=out.dtype, device=out.device)


def _evaluation(model: Alone, call: Call) -> list[Any]:
    with torch.no_grad():
        args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (call.args, call.kwargs))
        return tree_flatten(model.eval()(args, kwargs))[0]


def _same_bits(actual: list[Any], expected: list[Any]) -> bool:
    return len(actual) == len(expected) and all(
        torch.equal(a, e) if isinstance(e, Tensor) else a is e or a == e for a, e in zip(actual, expected, strict=True)
    )


def _difference(actual: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest difference, by the largest value."""
    if [None if a is None else a.shape for a in actual] != [None if e is None else e.shape for e in expected]:
        return float("inf")
    gaps, sizes = [], []
    for a, e in zip(actual, expected, strict=True):
        if a is not None and e is not None and e.numel():
            a, e = a.detach().double(), e.detach().double()
            gaps.append(torch.where(a == e, 0.0, (a - e).abs()).max())  # -inf, in a mask, is equal to itself
            sizes.append(e.abs().where(e.isfinite(), 0.0).max())
    if not gaps:
        return 0.0
    return float(torch.stack(gaps).max() / torch.stack(sizes).max().clamp(min=1e-30))


# --- the original's own code with our masks ---


@contextlib.contextmanager
def _given_masks(model: nn.Module, masks: list[Tensor], drawn_on_host: Collection[str]) -> Iterator[None]:
    """Drop paths run as they are, but what they draw are the masks that ours would draw, which are listed."""

    def forward(path: str, drop: nn.Module, kind: DropPathKind, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not drop.training:
            return own(x)
        ones = torch.ones(len(x), dtype=x.dtype, device="cpu" if path in drawn_on_host else x.device)
        masks.append((drop_path(ones, kind.rate_of(drop), True, mode=kind.mode_of(drop)) != 0).to(x.device))
        with torch.random.fork_rng(), _Draws(masks[-1]) as draws:
            out = own(x)
        assert draws.count == 1
        return out

    drops = {path: module for path, module in model.named_modules() if drop_path_kind(module) is not None}
    for path, drop in drops.items():
        drop.forward = partial(forward, path, drop, drop_path_kind(drop), drop.forward)
    try:
        yield
    finally:
        for drop in drops.values():
            del drop.forward


class _Rounding(TorchFunctionMode):
    """Sees whether anything is rounded from float64 to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype is torch.float32:
            self.seen |= any(isinstance(value, Tensor) and value.dtype is torch.float64 for value in args)
        return out


class _Draws(TorchFunctionMode):
    """Random numbers are those that keep these samples and drop the others."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is Tensor.bernoulli_:
            self.count += 1
            return out.copy_(self._shaped(out))
        if func in (torch.rand, torch.rand_like):  # to be added to keep_prob, and rounded down
            self.count += 1
            return out.copy_(self._shaped(out) * 0.999)
        return out

    def _shaped(self, out: Tensor) -> Tensor:
        return self.kept[: out.numel()].view(out.shape)
