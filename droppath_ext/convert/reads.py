"""What a forward reads and does while it is traced, and its graph does not show.

What it reads, attributes of modules and of other objects, globals, becomes a condition under which the graph holds.
What it does, as to switch autograd off for a part of itself, cannot be kept: then there is no plan.
"""

import contextlib
import dis
import random
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .drops import drop_path_kind
from .runtime import identity, is_plain


@dataclass(frozen=True)
class Condition:
    """An expression that must hold: ``before``, a module of the block, ``after``."""

    path: str | None  # of the module in the block; None if there is none in the expression
    before: str
    after: str = ""


Place = tuple[str | None, str]  # how to come to an object: from which module of the block, and by which expression

_BOOKKEEPING = set(dir(nn.Module())) - {"training"}
_NOT_THE_FORWARD = ("torch.fx", "torch.overrides", "droppath_ext")
_STATE = re.compile(r"_?(is|get|set)_autocast|are_deterministic|_?(is|set)_grad_enabled|is_inference|get_default_dtype")
_VALUES = {
    "__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy", "equal", "allclose",
    "is_nonzero",
}  # fmt: skip
_SHAPES = {"__get__", "__len__", "size", "numel", "dim", "nelement"}  # __get__: of any property
_MANY = 32  # entries of a global
_HEAP_TYPE = 1 << 9  # of type.__flags__: the class was made by a class statement
_LIBRARIES = {"torch", *sys.stdlib_module_names}  # whose globals do not change from call to call


class Reads:
    """Records what the forward of ``root`` does in this thread, while ``recording`` and not ``paused``."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.conditions: dict[Condition, None] = {}  # in order
        self.refusal = ""  # why there can be no plan
        self.children: dict[str | None, str] = {}  # the types of those that were asked for, by path
        self._places: dict[int, Place] = {id(module): (path, "") for path, module in root.named_modules()}
        self._watched: list[tuple[Any, type, dict[str, Any]]] = []  # with the class and the members they had
        self._codes: set[CodeType] = set()
        self._thread = threading.get_ident()
        self._is_paused = True
        self._profiles = False
        self._tensors: dict[int, Place] = {
            id(tensor): (path, f".{store}[{name!r}]")
            for path, module in root.named_modules()
            for store in ("_parameters", "_buffers")
            for name, tensor in getattr(module, store).items()
        }

    def refuse(self, why: str) -> None:
        self.refusal = self.refusal or why

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        own = vars(nn.Module).get("__getattribute__")
        profiler = sys.getprofile()
        self._profiles = profiler is None or callable(profiler)  # one in C, as cProfile is, could not be put back
        chance = _chance()
        nn.Module.__getattribute__ = self._recorded(own or object.__getattribute__)  # type: ignore[method-assign]
        try:
            with _NoValues(self):
                self._is_paused = False
                if self._profiles:
                    sys.setprofile(self._profile)
                try:
                    yield
                finally:
                    if self._profiles:
                        sys.setprofile(profiler)
                    self._is_paused = True
        finally:
            del nn.Module.__getattribute__
            if own is not None:
                nn.Module.__getattribute__ = own  # type: ignore[method-assign]
            if _chance() != chance:
                self.refuse("its forward depends on chance")
            for value, cls, members in self._watched:
                object.__setattr__(value, "__class__", cls)
                now = vars(value)
                if now.keys() != members.keys() or any(now[name] is not members[name] for name in now):
                    self.refuse(f"its forward writes to a {cls.__name__}")
                    now.clear()
                    now.update(members)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        was_paused, self._is_paused = self._is_paused, True
        profiler = sys.getprofile()
        if self._profiles:
            sys.setprofile(None)
        try:
            yield
        finally:
            if self._profiles:
                sys.setprofile(profiler)
            self._is_paused = was_paused

    @property
    def is_idle(self) -> bool:
        return self._is_paused or threading.get_ident() != self._thread

    # --- attributes ---

    def _recorded(self, getattribute: Any) -> Any:
        def record(owner: Any, name: str) -> Any:
            try:
                value = getattribute(owner, name)
            except AttributeError:
                if not self.is_idle:
                    with self.paused():
                        self._no_member(owner, name)
                raise
            if not self.is_idle:
                with self.paused():
                    self._attribute(owner, name, value)
            return value

        return record

    def _attribute(self, owner: Any, name: str, value: Any) -> None:
        is_module = isinstance(owner, nn.Module)
        if name == "__dict__" and not _module_of(sys._getframe(2)).startswith("torch."):
            self.refuse(f"its forward reads the __dict__ of a {type(owner).__name__}")
        if name.startswith("__") or (is_module and name in _BOOKKEEPING and name != "_modules"):
            return
        place = self._place(owner)
        if place is not None and is_module and name == "_modules":
            self._require(place, "tuple(", f"._modules) == {tuple(value)!r}")
            return
        if place is None or (place == ("", "") and name == "training"):  # a plan is for training
            return
        kind = drop_path_kind(owner) if is_module else None
        if kind is not None and name == kind.rate:
            self.refuse("its forward reads the rate of its drop path")
            return
        path, text = place
        if is_module and path:
            self._require(place, "type(", f").__name__ == {type(owner).__name__!r}")
        is_stored = name in object.__getattribute__(owner, "__dict__")
        if not is_stored and callable(value):
            self._require(place, f"{name!r} not in vars(", ")")
        self._value((path, self._member(text, name)), value, is_stored=is_stored)

    def _no_member(self, owner: Any, name: str) -> None:
        """Of the object itself: a parameter, buffer or child of a module, or nothing."""
        if name.startswith("__") or name in _BOOKKEEPING or (place := self._place(owner)) is None:
            return
        members = object.__getattribute__(owner, "__dict__")
        for store in ("_parameters", "_buffers", "_modules"):
            if name in members.get(store, ()):
                found = members[store][name]
                self._require(place, "", f".{store}.get({name!r}) is {'' if found is None else 'not '}None")
                if store == "_modules" and found is not None:
                    self._child(place, name, found)
                return
        try:
            value = getattr(owner, name)  # by a __getattr__ of its own
        except AttributeError:
            self._require(place, "not hasattr(", f", {name!r})")
        else:
            self._value((place[0], self._member(place[1], name)), value, is_stored=True)

    def _member(self, text: str, name: str) -> str:
        if not name.isidentifier():  # setattr takes any string: as a part of an expression it would run
            self.refuse("its forward reads an attribute whose name is no identifier")
        return f"{text}.{name}"

    def _child(self, place: Place, name: str, child: nn.Module) -> None:
        """A child that is registered under two names is called by the first; its type may decide what is done."""
        path = place[0] if not place[1] else None
        own = self._places.get(id(child))
        if own is None or path is None:
            return
        expression = f"._modules.get({name!r})"
        if own[0] != (f"{path}.{name}" if path else name):
            self._require(place, "", f"{expression} is self.get_submodule({own[0]!r})")
        self.children[own[0]] = type(child).__name__

    def _place(self, owner: Any) -> Place | None:
        if id(owner) not in self._places:
            self.refuse(f"its forward reads a {type(owner).__name__} that is not part of it")
        return self._places.get(id(owner))

    def _require(self, place: Place, before: str, after: str) -> None:
        path, text = place
        condition = Condition(None, before + text + after) if path is None else Condition(path, before, text + after)
        self.conditions[condition] = None

    def _value(self, place: Place, value: Any, *, is_stored: bool) -> None:
        """Require that what stands in a place is the same, or watch what is read of it."""
        path, text = place
        base = next((kind for kind in (dict, list, tuple, set, frozenset) if isinstance(value, kind)), None)
        if value is None or isinstance(value, bool):
            self._require(place, "", f" is {value}")
        elif is_plain(value):
            self._require(place, "_dp_same(", f", {value!r})")
        elif base is not None and getattr(value, "__dict__", None):
            self.refuse(f"its forward reads a {type(value).__name__}, which may change")
        elif base is not None and is_plain(base(value)):
            self._require(place, "", f" == {base(value)!r}")
        elif isinstance(value, nn.Module):
            own = self._place(value)
            if own is not None:  # no child of the owner, or it would not have been found like this
                self._require(place, "", f" is self.get_submodule({own[0]!r})")
        elif isinstance(value, Tensor | ModuleType | property):
            pass  # a tensor is part of the graph, but for its shape
        elif (known := identity(value)) is not None:
            if is_stored:
                self._require(place, "_dp_identity(", f") == {known!r}")
            if is_stored and isinstance(value, MethodType):
                self._value((path, f"{text}.__self__"), value.__self__, is_stored=True)
        elif base is not None:
            self._require(place, "len(", f") == {len(value)}")
            if base in (dict, list, tuple):
                for key, part in value.items() if base is dict else enumerate(value):
                    self._value((path, f"{text}[{key!r}]"), part, is_stored=True)
        else:
            self._watch(place, value)

    def _watch(self, place: Place, value: Any) -> None:
        """Record what is read of an object, by a subclass of its class."""
        if id(value) in self._places:
            return
        cls = type(value)
        made_in_python = all(base is object or base.__flags__ & _HEAP_TYPE for base in cls.__mro__)
        try:
            members = dict(vars(value))
            if made_in_python:
                namespace = {"__slots__": (), "__getattribute__": self._recorded(cls.__getattribute__)}
                object.__setattr__(value, "__class__", type(cls.__name__, (cls,), namespace))
                self._require(place, "_dp_identity(type(", f")) == {identity(cls)!r}")
                self._places[id(value)] = place
                self._watched.append((value, cls, members))
                return
            if isinstance(value, SimpleNamespace) and is_plain(members):
                self._require(place, "vars(", f") == {members!r}")
                return
        except TypeError:
            pass
        self.refuse(f"its forward reads a {cls.__name__}, which may change")

    def shape_of(self, tensor: Tensor) -> None:
        """A shape that the forward has asked a parameter or buffer for is a number in the graph."""
        place = self._tensors.get(id(tensor))
        if place is not None:
            self._require(place, "", f".shape == {tuple(tensor.shape)}")

    # --- calls ---

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if self.is_idle:
            return
        if event == "call":
            with self.paused():
                self._enter(frame)
        elif event == "c_call":
            owner, name = getattr(arg, "__self__", None), getattr(arg, "__name__", "")
            if _STATE.match(name) and ("set" in name or not _module_of(frame).startswith("torch.")):
                self.refuse(f"its forward calls torch.{name}")
            elif isinstance(owner, random.Random):
                self.refuse("its forward depends on chance")
            elif isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
                self.refuse("its forward calls an autograd.Function, whose backward a graph does not show")

    def _enter(self, frame: FrameType) -> None:
        module, name = _module_of(frame), frame.f_code.co_name
        if module.startswith(_NOT_THE_FORWARD):
            return
        if name == "__enter__":
            caller = frame.f_back
            while caller is not None and _module_of(caller) == "contextlib":
                caller = caller.f_back
            if caller is None or not _module_of(caller).startswith(_NOT_THE_FORWARD):
                self.refuse("its forward enters a context, as with torch.no_grad() does")
        elif module == "torch.utils.checkpoint":
            self.refuse("its forward checkpoints a part of itself")
        elif module.partition(".")[0] not in _LIBRARIES:
            self._globals(frame)

    def _globals(self, frame: FrameType) -> None:
        """Require that plain globals are the same, and watch objects among them."""
        code = frame.f_code
        if code in self._codes:
            return
        self._codes.add(code)
        module = sys.modules.get(_module_of(frame))
        if module is not None and vars(module) is not frame.f_globals:
            module = None
        is_forward = code is getattr(type(self.root).forward, "__code__", None)
        closure: Any = type(self.root).forward.__closure__ if is_forward else None
        instructions = list(dis.get_instructions(code))
        for i, instruction in enumerate(instructions):
            name = instruction.argval
            if instruction.opname == "STORE_GLOBAL" or (
                instruction.opname == "STORE_DEREF" and name in code.co_freevars and closure is not None
            ):
                self.refuse(f"its forward writes to {name}, which is not its own")
            if instruction.opname == "LOAD_GLOBAL" and module is not None and hasattr(module, name):
                place, value = (None, f"_dp_modules[{module.__name__!r}].{name}"), getattr(module, name)
            elif instruction.opname == "LOAD_DEREF" and closure and name in code.co_freevars:
                index = code.co_freevars.index(name)
                place = None, f"_dp_original.forward.__closure__[{index}].cell_contents"
                value = closure[index].cell_contents
            else:
                if instruction.opname == "LOAD_GLOBAL" and is_plain(frame.f_globals.get(name, _is_instance)):
                    self.refuse(f"its forward reads {name} of a module that cannot be found by its name")
                elif instruction.opname == "LOAD_DEREF" and name in code.co_freevars:
                    value = frame.f_locals.get(name)
                    if isinstance(value, dict | list) or (value is not None and _is_instance(value)):
                        self.refuse(f"its forward reads {name} of a closure, which may change")
                continue
            owner: Any = None
            for following in instructions[i + 1 :]:
                if not isinstance(value, ModuleType | type) or following.opname != "LOAD_ATTR":
                    break
                if not hasattr(value, following.argval):
                    break
                owner, value = value, getattr(value, following.argval)
                place = None, f"{place[1]}.{following.argval}"
            if isinstance(owner, ModuleType) and not is_plain(value):
                continue  # what a library defines
            is_definition = callable(value) and getattr(value, "__name__", "") == place[1].rpartition(".")[2]
            is_registry = isinstance(value, dict | list) and len(value) > _MANY
            is_state = is_plain(value) or identity(value) is not None or isinstance(value, dict | list)
            if not is_definition and not is_registry and (is_state or _is_instance(value)):
                self._value(place, value, is_stored=True)


def _chance() -> tuple[Any, ...]:
    """The states of the random number generators of Python and, where it is imported, of NumPy."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *rest = numpy.random.get_state()
    return random.getstate(), kind, keys.tobytes(), rest


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_instance(value: Any) -> bool:
    """Whether the value is an object of a class that was made in Python, and none of torch's."""
    cls = type(value)
    return (
        identity(value) is None
        and not isinstance(value, nn.Module | Tensor | ModuleType | dict | list | tuple | set | frozenset)
        and bool(cls.__flags__ & _HEAP_TYPE)
        and cls.__module__.partition(".")[0] not in _LIBRARIES
        and hasattr(value, "__dict__")
    )


class _NoValues(TorchFunctionMode):
    """Refuses what turns tensors into numbers, or writes to them, where the graph does not show it."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if not self.reads.is_idle and args and isinstance(args[0], Tensor):
            if name in _VALUES:
                self.reads.refuse("its forward depends on the values of a tensor")
            if name in _SHAPES:
                self.reads.shape_of(args[0])
            writes = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
            if writes and all(isinstance(argument, Tensor | int | float) for argument in args):
                self.reads.refuse("its forward writes to a tensor of its own")
                return args[0]
        return func(*args, **(kwargs or {}))
