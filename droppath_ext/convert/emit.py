"""From a rewritten graph to source text that needs nothing but the original class."""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

from torch import fx, nn

from .drops import DropPathKind, drop_path_kind
from .trace import CannotPlan, Trace, submodule

_HEADER = """\
from math import inf, nan
import torch
from torch import Tensor as _dp_Tensor
from sys import modules as _dp_modules
from droppath_ext.convert.runtime import (
    identity as _dp_identity, missed as _dp_missed, same as _dp_same, watched as _dp_watched,
)
"""
_FUNCTIONS = """\
from droppath_ext.functional import drop_path_add as _dp_add, stochastic_depth as _dp_skip
from droppath_ext.shards import can_skip as _dp_can_skip
"""


class Branch:
    """A branch as a function of its own, ``branch(residual, *outside)``, and how the generated code calls it."""

    def __init__(self, number: int, kind: DropPathKind, has_gamma: bool, sampling: str) -> None:
        self.name = f"_dp_skip_{number}"
        self.kind = kind
        self.has_gamma = has_gamma
        self.sampling = sampling
        self.batched: tuple[int, ...] = ()  # which of the values from outside have samples, which are taken, too
        self.shared: tuple[int, ...] = ()  # which of them are tensors for all samples
        self.min_rate = 0.0
        self.call = _named_function(self.name)

    def copy_nodes(self, inside: list[fx.Node], outside: list[fx.Node], residual: fx.Node, y: fx.Node) -> None:
        self.graph = fx.Graph()
        copies = {residual: self.graph.placeholder("taken")}
        for i, node in enumerate(outside):
            copies[node] = self.graph.placeholder(f"outside_{i}")
        for node in inside:
            copies[node] = self.graph.node_copy(node, copies.__getitem__)
        self.graph.output(copies[y])
        self.outside = [f"outside_{i}" for i in range(len(outside))]

    def function(self, root: nn.Module) -> Callable[..., Any]:
        imports, body = _body(self.graph)
        source = f"{_HEADER}{imports}def branch(self, {', '.join(['taken', *self.outside])}):\n{body}"
        namespace: dict[str, Any] = {"__name__": __name__}
        exec(compile(source, "<droppath_ext: a branch>", "exec"), namespace)
        branch = namespace["branch"]
        return lambda *values: branch(root, *values)

    def source(self) -> tuple[str, str]:
        imports, body = _body(self.graph)
        batched = [self.outside[i] for i in self.batched]
        rest = [f"{name}={name}" for name in self.outside if name not in batched]
        settings = ", ".join(
            f"{name}=drop.{value}" if is_attribute else f"{name}={value!r}"
            for name, value, is_attribute in self.kind.settings()
        ).replace(f"=drop.{self.kind.rate},", f"=drop.{self.kind.rate} or 0.0,")
        gamma = ", gamma=gamma" if self.has_gamma else ""
        sampling = "" if self.sampling == "bernoulli" else f", sampling={self.sampling!r}"
        others = "".join(f", {name}" for name in self.outside)
        conditions = ["drop.training", f"(drop.{self.kind.rate} or 0.0) >= {self.min_rate}", "_dp_can_skip(taken)"]
        if self.kind.mode == "mode":
            conditions.append('drop.mode == "row"')
        # A mask, say, may have an entry for each sample in one call, and one for all in the next.
        conditions += [f"{name}.shape[0] == taken.shape[0]" for name in batched]
        conditions += [f"{self.outside[i]}.shape[0] != taken.shape[0]" for i in self.shared]
        skipped = settings.replace(", mode=drop.mode", "")
        return imports, (
            f"def {self.name}(self, drop, taken{others}{', gamma' if self.has_gamma else ''}):\n"
            f"    def branch({', '.join(['taken', *batched, *rest])}):\n"
            f"{textwrap.indent(body, '    ')}\n"
            f"    if {' and '.join(conditions)}:\n"
            f"        batched = ({''.join(f'{name}, ' for name in batched)})\n"
            f"        return _dp_skip(taken, branch, {skipped}{gamma}, batched=batched{sampling})\n"
            f"    return _dp_add(branch(taken{''.join(', ' + b for b in batched)}), taken, {settings}{gamma})\n\n\n"
        )


def _named_function(name: str) -> Callable[..., Any]:
    """Something for a node to call: its name is all that matters."""
    function = FunctionType((lambda *args: None).__code__, {}, name)
    function.__module__ = "droppath_ext"
    function.__qualname__ = name
    return function


def _body(graph: fx.Graph, branches: Iterable[Branch] = ()) -> tuple[str, str]:
    """Import statements, and the lines of a function whose arguments are the graph's placeholders."""
    graph.lint()
    _check_names(graph)
    code = graph.python_code("self")
    text = code.src[code.src.index("def forward(") :].partition("\n")[2].rstrip() + "\n"
    text = re.sub(r"\s*# type: ignore.*", "", text)
    paths = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    paths |= {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"} - {""}
    for path in sorted(paths, key=len, reverse=True):
        text = re.sub(rf"(?<== ){re.escape(_attribute(path))}(?=[.(])", _access(path), text)
    calls = {branch.call: branch.name for branch in branches}
    imports = []
    for name, value in sorted(code.globals.items()):
        if not re.search(rf"\b{re.escape(name)}\b", text):
            continue
        if isinstance(value, FunctionType) and value in calls:
            text = re.sub(rf"\b{re.escape(name)}\b", calls[value], text)
        elif name != "torch":
            imports.append(_import(name, value))
    return "".join(imports), text


def _check_names(graph: fx.Graph) -> None:
    """torch.fx writes names as they are: what follows a quote in one, or is no identifier as a keyword, would run."""
    for node in graph.nodes:
        is_name = node.op in ("get_attr", "call_module", "call_method")
        if (is_name and re.search(r'["\\\x00-\x1f]', str(node.target))) or not all(map(str.isidentifier, node.kwargs)):
            raise CannotPlan("it uses a name that cannot be written as source text")


def _import(name: str, value: Any) -> str:
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {name}\n"
    if value is None or isinstance(value, float):  # inf and nan
        return f"{name} = float({str(value)!r})\n" if value is not None else f"{name} = None\n"
    if value is type(None):
        return f"{name} = type(None)\n"
    module, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    found: Any = sys.modules.get(module or "")
    for part in (qualified or "<locals>").split("."):
        found = getattr(found, part, None)
    if found is not value:
        raise CannotPlan(f"its forward calls {qualified or value}, which cannot be imported by its name")
    first, *rest = str(qualified).split(".")
    return f"from {module} import {first} as {name}\n" + (f"{name} = {name}.{'.'.join(rest)}\n" if rest else "")


def kept_source(module: nn.Module, kind: DropPathKind) -> str:
    """The source of a drop path's class that calls ``drop_path``."""
    name = list(inspect.signature(type(module).forward).parameters)[1]
    settings = ", ".join(
        f"{key}={'self.' + value if is_attribute else repr(value)}" for key, value, is_attribute in kind.settings()
    )
    return (
        "from droppath_ext.functional import drop_path as _dp_drop\n\n\n"
        f"def forward(self, {name}):\n"
        f"    if self.training and self.{kind.rate}:\n"
        f"        return _dp_drop({name}, {settings})\n"
        f"    return _dp_original.forward(self, {name})\n"
    )


def block_source(trace: Trace, swallowed: dict[str, fx.Node], branches: list[Branch], *, gives_up: bool) -> str:
    """The source of a block's class: the plan for the calls that it was made for, the original for all others.

    A plan that ``gives_up`` may find out while it runs that the call is none of these.
    """
    own, *parameters = inspect.signature(type(trace.root).forward).parameters.values()
    modules, conditions, rebound = _conditions(trace, swallowed)
    imports, body = _body(trace.graph, branches)
    body = textwrap.indent(body, "        ")
    if gives_up:
        body = re.sub(r";  [\w =]+ = None$", "", body, flags=re.MULTILINE)  # the original still needs its arguments
        tried = textwrap.indent(body, "    ")
        body = f"            try:\n{tried}            except _dp_Unplanned:\n                pass\n"
        imports += "from droppath_ext.convert.runtime import Unplanned as _dp_Unplanned\n"
    functions = []
    for branch in branches:
        more, function = branch.source()
        imports += more
        functions.append(function)
    lines = sorted(set(imports.splitlines(keepends=True)))
    return (
        f"{_HEADER}{_FUNCTIONS if branches else ''}{''.join(lines)}\n\n{''.join(functions)}"
        f"def forward({_declare(own, parameters)}):\n"
        f"    if self.training:\n"
        f"        try:\n"
        f"{modules}"
        f"            _dp_planned = {' and '.join(conditions)}\n"
        f"        except Exception:  # what a condition asks for is gone\n"
        f"            _dp_planned = False\n"
        f"        if _dp_planned:\n"
        f"{rebound}"
        f"{body}"
        f"        _dp_missed(self)\n"
        f"    return _dp_original.forward({', '.join(['self', *map(_argument, parameters)])})\n"
    )


def _conditions(trace: Trace, swallowed: dict[str, fx.Node]) -> tuple[str, list[str], str]:
    """Lines that look up the modules that are no longer called; when the plan holds; lines that name tensors."""
    lines: list[str] = []
    conditions: list[str] = []
    watched: list[str] = []
    rebound: list[str] = []
    names = {"": "self"}
    for name, value in trace.parameters.items():
        _match(trace, name, value, conditions, rebound)
    for path, node in swallowed.items():
        if path == "":
            lines.append(f"            {node.name} = self\n")
            continue
        lines.append(f"            {node.name} = {_access(path)}\n")
        watched.append(node.name)
        conditions.append(f"getattr({node.name}, {_rate_of(trace.root, path)!r}, None) is not None")
    conditions += [f"not {_access(path)}.training" for path in trace.frozen]
    for i, path in enumerate(dict.fromkeys(trace.inlined)):
        name = f"_dp_inlined_{i}"
        lines.append(f"            {name} = {_access(path)}\n")
        watched.append(name)
        conditions.append(f"type({name}).__name__ == {type(submodule(trace.root, path)).__name__!r}")
        names[path] = name
    for condition in trace.conditions:
        module = "" if condition.path is None else names.get(condition.path) or _access(condition.path)
        conditions.append(f"{condition.before}{module}{condition.after}")
    if watched:
        conditions.append(f"not _dp_watched({', '.join(watched)})")
    return "".join(lines), conditions, "".join(rebound)


def _match(trace: Trace, name: str, value: Any, conditions: list[str], rebound: list[str]) -> None:
    """When an argument is what it was planned to be; and lines that name its tensors, where they have no name yet."""
    if isinstance(value, fx.Node):
        conditions.append(f"isinstance({name}, _dp_Tensor)")
        planned = trace.value(value)
        if "shape" in trace.consulted:
            conditions.append(f"{name}.shape[1:] == {tuple(planned.shape[1:])}")
        if "dtype" in trace.consulted:
            conditions.append(f"{name}.dtype is {planned.dtype}")
        if "device" in trace.consulted:
            conditions.append(f"{name}.device.type == {planned.device.type!r}")
        if not name.isidentifier():
            rebound.append(f"            {value.target} = {name}\n")
    elif isinstance(value, tuple | list) and _has_tensors(value):
        conditions.append(f"isinstance({name}, (tuple, list)) and len({name}) == {len(value)}")
        for i, part in enumerate(value):
            _match(trace, f"{name}[{i}]", part, conditions, rebound)
    elif isinstance(value, dict):
        conditions.append(f"{name}.keys() == {set(value)!r}" if value else f"not {name}")
        for key, part in value.items():
            _match(trace, f"{name}[{key!r}]", part, conditions, rebound)
    elif value == ():
        conditions.append(f"not {name}")
    elif value is None or isinstance(value, bool):
        conditions.append(f"{name} is {value}")
    else:
        conditions.append(f"_dp_same({name}, {value!r})")


def _has_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_tensors, value))
    return isinstance(value, fx.Node | dict)


def _rate_of(root: nn.Module, path: str) -> str:
    kind = drop_path_kind(submodule(root, path))
    assert kind is not None
    return kind.rate


def _access(path: str) -> str:
    """An expression for a submodule of self. A child as an attribute takes ten times as long as one of _modules."""
    return "self" + "".join(f"._modules[{name!r}]" for name in path.split("."))


def _attribute(path: str) -> str:
    """The same, as torch.fx writes it."""
    expression = "self"
    for name in path.split("."):
        expression = f"{expression}.{name}" if name.isidentifier() else f'getattr({expression}, "{name}")'
    return expression


def _declare(own: inspect.Parameter, parameters: list[inspect.Parameter]) -> str:
    """The parameters of a forward, the first of which is self, whatever it was called."""
    declared = ["self"]
    kinds = [own.kind, *(parameter.kind for parameter in parameters)]
    positional_only = kinds.count(inspect.Parameter.POSITIONAL_ONLY)
    for i, parameter in enumerate(parameters, 1):
        if i == positional_only:
            declared.append("/")
        if parameter.kind is parameter.KEYWORD_ONLY and not any(name.startswith("*") for name in declared):
            declared.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        declared.append(f"{_stars(parameter)}{parameter.name}{default}")
    return ", ".join([*declared, "/"] if positional_only == len(kinds) else declared)


def _argument(parameter: inspect.Parameter) -> str:
    keyword = f"{parameter.name}=" if parameter.kind is parameter.KEYWORD_ONLY else _stars(parameter)
    return f"{keyword}{parameter.name}"


def _stars(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return "*"
    return "**" if parameter.kind is parameter.VAR_KEYWORD else ""
