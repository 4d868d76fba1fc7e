"""Classes made from source text: the class of a converted module is a subclass of the one that it had.

The text holds all that a class needs but the original class, so that a pickle or a copy is rebuilt from these two.
Classes are shared by all modules with the same original class and text.
"""

import functools
import linecache
import zlib
from types import MethodType
from typing import Any

from torch import nn

from .runtime import MISSED

SOURCE = "_droppath_ext_source"
ORIGINAL = "_droppath_ext_original"


_classes: dict[tuple[Any, str], Any] = {}


def converted_class(original: Any, source: str) -> Any:
    """The subclass of ``original`` whose forward is defined by ``source``, in which ``_dp_original`` means it."""
    if (original, source) not in _classes:
        _classes[original, source] = make_class(original, source)
    return _classes[original, source]


def make_class(original: Any, source: str) -> Any:
    filename = f"<droppath_ext: {original.__qualname__} {zlib.crc32(source.encode()):08x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # for tracebacks
    namespace: dict[str, Any] = {"_dp_original": original, "__name__": original.__module__}
    exec(compile(source, filename, "exec"), namespace)
    members = {
        "forward": namespace["forward"],
        "__reduce_ex__": _reduce_ex,
        "__prepare_scriptable__": _refuse_to_script,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        SOURCE: source,
        ORIGINAL: original,
    }
    return type(original.__name__, (original,), members)


@functools.cache
def own_forward(cls: Any) -> Any:
    """The forward of a class without what the class wraps around that of every subclass, ours among them.

    So transformers checkpoints its layers.
    """
    if not hasattr(cls.forward, "__wrapped__"):
        return cls.forward

    def forward(self: Any) -> None: ...

    subclass: Any = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    wrapped, own = subclass.forward, cls.forward
    while wrapped is not forward and getattr(own, "__code__", None) is wrapped.__code__:
        own = own.__wrapped__
    return own


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    cls: Any = _converted(type(self))
    rebuild, arguments, *state = super(cls, self).__reduce_ex__(protocol)
    if type(self) is not cls:  # a class that somebody else has made of ours, say of FSDP
        return (rebuild, arguments, *state)
    return (_new, (getattr(cls, ORIGINAL), getattr(cls, SOURCE)), *state)


def _new(original: type[nn.Module], source: str) -> Any:
    cls = converted_class(original, source)
    return cls.__new__(cls)


def _refuse_to_script(self: nn.Module) -> None:
    raise TypeError(
        f"torch.jit.script cannot compile {type(self).__name__} as convert() has left it: call "
        "droppath_ext.restore(model) first"
    )


def _converted(cls: type) -> type:
    """The class of ours among those that ``cls`` derives from."""
    return next(base for base in cls.__mro__ if SOURCE in base.__dict__)


def is_mounted(module: nn.Module) -> bool:
    """Whether the module has a class of ours."""
    return hasattr(type(module), SOURCE)


def mount(module: nn.Module, source: str) -> None:
    """Give the module the forward that ``source`` defines."""
    module.__class__ = converted_class(type(module), source)


def unmount(module: nn.Module) -> None:
    """Give the module its own class back."""
    converted = type(module)
    module.__class__ = _without(converted)
    module.__dict__.pop(MISSED, None)
    for name, value in list(module.__dict__.items()):  # the forward as somebody has kept it to call it, say accelerate
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is converted.forward:
            if name == "forward":
                del module.__dict__[name]
            else:
                module.__dict__[name] = MethodType(type(module).forward, module)


def _without(cls: Any) -> Any:
    if SOURCE in cls.__dict__:
        return _without(getattr(cls, ORIGINAL))
    if not hasattr(cls, SOURCE):
        return cls
    # A class that somebody has made of ours, say of FSDP: the same, made of the original.
    bases = tuple(_without(base) for base in cls.__bases__)
    members = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, members)
