"""convert() and restore()."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..checks import check_sampling
from ..modules import DropPath
from ..reference import is_jit_tracing
from .drops import NAMES, drop_path_kind
from .emit import kept_source
from .model_plan import ModelPlan, plan_model
from .mount import is_mounted, mount, unmount
from .observe import Observer
from .plan import LEVELS, Conversion
from .preserve import preserved
from .report import ConversionReport, ConvertedSite
from .trace import Call

Filter = Callable[[str, nn.Module], bool]


def convert(
    model: nn.Module,
    residual: str = "fuse",
    *,
    example: Any = None,
    filter: Filter | None = None,
    strict: bool = False,
    min_drop_prob: float | None = None,
    sampling: str = "bernoulli",
) -> ConversionReport:
    """Bring the drop paths of a model to this project's functions, in place: in training they cost less, or save time.

    Parameters, ``state_dict``, hooks, module types and the results of evaluation stay as they are. The classes of the
    modules concerned are replaced by subclasses of themselves, whose forward is rewritten for training. A block is
    rewritten only if its result, its gradients and what it writes stay the same. A training call that differs from the
    example in what the rewriting rests on (arguments, settings, shapes that its forward asks for) runs the original.

    Args:
        model: Any module with drop paths: of timm, torchvision, transformers, MONAI, mmcv, or of your own.
        residual: The level that each call of a drop path is brought to, or as near to it as it can be.
            "keep": the drop path itself becomes ``drop_path``.
            "fuse": the end of a residual block, ``residual + drop(gamma * y)``, becomes ``drop_path_add``.
            "skip": the branch becomes that of ``stochastic_depth``, if it treats every sample by itself: what is
            dropped is not computed.
        example: Inputs of one training forward: a tensor, a tuple of arguments or a dict of keyword arguments, of three
            samples at least, best as many as are trained with. The model runs it once, without gradients, and each
            block that differs from the others a few times more, with the hooks of its modules; buffers and random
            number generators are put back. Default: the model is planned in its first training call, and runs as
            planned from the second on; before ``torch.compile``, give an example.
        filter: ``filter(path, module)`` says for each drop path whether it shall be converted. Default: all.
        strict: Raise, before anything is changed, if a call does not reach the level asked for. Needs ``example``.
        min_drop_prob: The rate from which on a branch is skipped, for all. Default: for each branch the one from which
            on skipping saves more time than it costs, by the time that the branch takes in the example; 0.02 at least.
        sampling: How "skip" draws the samples that are kept, see :func:`droppath_ext.stochastic_depth`. "bernoulli": as
            the drop path does, so that every step has its own numbers of samples. "fixed": always the same number, what
            a GPU and its libraries like better, in one graph under ``torch.compile``.

    Returns:
        A report with a row for each call of a drop path: what was done, and why not more. Print it.

    Raises:
        TypeError: ``model`` is no nn.Module, or ``filter`` is not callable.
        ValueError: ``residual`` or ``sampling`` is unknown, ``min_drop_prob`` is outside [0, 1], ``strict`` lacks an
            example, or, with ``strict``, a call does not reach the level.

    ``restore(model)`` takes it back. Another call of ``convert`` starts from the model as it was.
    """
    _check(model, residual, filter, strict, example, min_drop_prob)
    check_sampling(sampling)
    goal = Conversion(residual, min_drop_prob, sampling)
    with _as_before_on_errors(model):
        restore(model)
        model.__dict__[_CONVERSION] = goal
        chosen = {}
        left_out = set()
        for path, module in model.named_modules():
            if drop_path_kind(module) is not None:
                if filter is None or filter(path, module):
                    chosen[module] = path
                else:
                    left_out.add(module)
        report = ConversionReport(residual, notes=_notes(model, chosen))
        if example is not None:
            plan = plan_model(model, _observe(model, example), goal, chosen)
            _fill(report, plan, left_out, model)
            if strict:
                _check_strict(report)
            plan.mount()
        elif residual == "keep":
            report.sites = [
                ConvertedSite(path, path.rpartition(".")[0], _class_of_parent(model, path), _rate(module), "keep")
                for module, path in chosen.items()
            ]
        else:
            report.is_planned = False
            _FirstCall(model, goal, chosen, left_out, report)
        for module in chosen:
            if not is_mounted(module):
                kind = drop_path_kind(module)
                assert kind is not None
                mount(module, kept_source(module, kind))
    return report


def restore(model: nn.Module) -> None:
    """Take ``convert`` back, in place: the modules have their own classes again.

    Args:
        model: A converted model. Any other is left alone.

    Raises:
        TypeError: ``model`` is no nn.Module.
    """
    _check_model(model)
    model.__dict__.pop(_CONVERSION, None)
    for module in model.modules():
        if is_mounted(module):
            unmount(module)
        for hook in list(module._forward_pre_hooks.values()):
            first_call = getattr(hook, "__self__", None)
            if isinstance(first_call, _FirstCall):
                first_call.cancel()


_CONVERSION = "_droppath_ext_conversion"  # the entry of a converted model's __dict__ that says what it was converted to


def conversion_of(model: nn.Module) -> Conversion | None:
    """How the model was converted, if it was."""
    found: Conversion | None = model.__dict__.get(_CONVERSION)
    return found


def convert_again(model: nn.Module, conversion: Conversion, new: set[nn.Module]) -> ConversionReport:
    """Plan a converted model anew, without the drop paths that were left out before, but with new ones."""
    left_out = {
        module
        for module in model.modules()
        if drop_path_kind(module) is not None and not is_mounted(module) and module not in new
    }
    return convert(
        model,
        conversion.residual,
        filter=lambda _, module: module not in left_out,
        min_drop_prob=conversion.min_drop_prob,
        sampling=conversion.sampling,
    )


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, but got {type(model).__name__}")


def _check(
    model: object, residual: object, filter: object, strict: bool, example: object, min_drop_prob: object
) -> None:
    _check_model(model)
    if residual not in LEVELS:
        raise ValueError(f'residual must be "keep", "fuse" or "skip", but got {residual!r}')
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be callable, as filter(path, module), but got {type(filter).__name__}")
    if strict and example is None and residual != "keep":
        raise ValueError("strict needs an example, for without one nothing is known before the first training call")
    if min_drop_prob is not None and not (isinstance(min_drop_prob, int | float) and 0.0 <= min_drop_prob <= 1.0):
        raise ValueError(f"min_drop_prob must be in [0, 1], but got {min_drop_prob!r}")


@contextlib.contextmanager
def _as_before_on_errors(model: nn.Module) -> Iterator[None]:
    def hooks_of(module: nn.Module) -> list[dict[Any, Any]]:
        return [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks]

    conversion = conversion_of(model)
    before = [(module, type(module), [dict(hooks) for hooks in hooks_of(module)]) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, saved in before:
            if type(module) is not cls:
                module.__class__ = cls
            for hooks, old in zip(hooks_of(module), saved, strict=True):
                hooks.clear()
                hooks.update(old)
        model.__dict__.pop(_CONVERSION, None)
        if conversion is not None:
            model.__dict__[_CONVERSION] = conversion
        raise


def _arguments(example: Any) -> Call:
    if isinstance(example, Tensor):
        return Call((example,), {})
    if isinstance(example, Mapping):
        return Call((), dict(example))
    if isinstance(example, tuple | list):
        return Call(tuple(example), {})
    raise TypeError(
        "example must be a tensor, a tuple of arguments or a dict of keyword arguments, "
        f"but got {type(example).__name__}"
    )


def _observe(model: nn.Module, example: Any) -> Observer:
    call = _arguments(example)
    observer = Observer()
    modes = {module: module.training for module in model.modules()}
    with preserved(model), torch.no_grad():
        try:
            if not model.training:
                model.train()
            observer.start(model)
            model(*call.args, **call.kwargs)
        finally:
            observer.stop()
            observer.training = {module: module.training for module in modes}
            for module, mode in modes.items():
                module.training = mode
    return observer


class _FirstCall:
    """Plans a model in its first training call, and mounts the plan at the begin of the second.

    Not before: the backward of the first may run parts of its forward again, for gradient checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        goal: Conversion,
        chosen: dict[nn.Module, str],
        left_out: set[nn.Module],
        report: ConversionReport,
    ) -> None:
        self.goal = goal
        self.chosen = chosen
        self.left_out = left_out
        self.report = report
        self.observer: Observer | None = None
        self.plan: ModelPlan | None = None
        self.handles = [
            model.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self.leave),
        ]

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.observer is not None:  # the last call has raised
            self.observer.stop()
            self.observer = None
        if not model.training or is_compiling() or is_jit_tracing():
            return
        if self.plan is not None:
            self.cancel()
            self.plan.mount()
            return
        self.observer = Observer()
        self.observer.start(model)
        self.observer.enter(model, args, kwargs)

    def leave(self, model: nn.Module, args: object, output: object) -> None:
        if self.observer is None:
            return
        observer, self.observer = self.observer, None
        observer.stop()
        observer.training = {module: module.training for module in model.modules()}
        self.plan = plan_model(model, observer, self.goal, self.chosen)
        _fill(self.report, self.plan, self.left_out, model)
        self.report.is_planned = True

    def cancel(self) -> None:
        for handle in self.handles:
            handle.remove()


def _fill(report: ConversionReport, plan: ModelPlan, left_out: set[nn.Module], model: nn.Module) -> None:
    report.sites = plan.sites
    if plan.uncalled:
        paths = ", ".join(plan.uncalled[:3]) + (", ..." if len(plan.uncalled) > 3 else "")
        report.notes.append(f"{len(plan.uncalled)} drop paths are never called: {paths}")
    if left_out:
        report.notes.append(f"{len(left_out)} drop paths were left out by filter")


def _notes(model: nn.Module, chosen: dict[nn.Module, str]) -> list[str]:
    idle = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Identity and NAMES.search(path.rpartition(".")[2])
    ]
    notes = []
    if idle:
        notes.append(
            f"{len(idle)} drop paths are nn.Identity, as is built for a rate of 0 ({idle[0]}): "
            "set_drop_path_rate(model, rate) puts drop paths there"
        )
    ignored = [f"{name}={value}" for name, value in _rates_of_config(model) if value and idle and not chosen]
    if ignored:
        notes.append(f"upstream ignores {ignored[0]} of the model's config: no drop path was built with it")
    own = [
        path
        for path, module in model.named_modules()
        if isinstance(module, DropPath) and drop_path_kind(module) is None
    ]
    if own:
        notes.append(
            f"{len(own)} DropPath are left as they are ({own[0]}): their samples lie along another dim than 0, or "
            "their rate is a tensor"
        )
    if not own and not any(_rate(module) for module in chosen):
        notes.append(
            "no drop path is active: build the model with a rate above 0, or call set_drop_path_rate(model, rate)"
        )
    return notes


def _rates_of_config(model: nn.Module) -> list[tuple[str, Any]]:
    config = getattr(model, "config", None)  # of transformers
    return [(name, value) for name, value in getattr(config, "__dict__", {}).items() if NAMES.search(name)]


def _rate(module: nn.Module) -> float:
    kind = drop_path_kind(module)
    return 0.0 if kind is None else kind.rate_of(module)


def _class_of_parent(model: nn.Module, path: str) -> str:
    return type(model.get_submodule(path.rpartition(".")[0])).__name__


def _check_strict(report: ConversionReport) -> None:
    for site in report.sites:
        if LEVELS.index(site.level) < LEVELS.index(report.residual):
            raise ValueError(
                f"{site.path} does not reach {report.residual!r} but {site.level!r}: {site.why}. Nothing was changed"
            )
