"""Loads the native extension, or says why it does not load and how to rebuild it."""

import importlib.metadata
import os
import platform
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # first: it loads the libraries that the extension links to

# pip keeps what it built for a commit, also for another torch.
REBUILD = "pip install --no-deps --no-cache-dir --force-reinstall . (in a checkout of droppath_ext)"
HERE = Path(__file__).resolve().parent


def _binary_in(folder: Path) -> Path | None:
    """The extension in ``folder`` that this Python would load; None if there is none."""
    files = (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((file for file in files if file.exists()), None)


def _installed_binary() -> Path | None:
    """The extension of another copy of this package, which this one shadows; None if there is none."""
    folders = (Path(entry or ".").resolve() / "droppath_ext" for entry in sys.path)
    binaries = (_binary_in(folder) for folder in folders if folder != HERE)
    return next((binary for binary in binaries if binary), None)


def _same_sources(folder: Path) -> bool:
    """Whether the Python files in ``folder`` are those here."""
    if folder == HERE:
        return True
    here, there = (
        {file.relative_to(place): file.read_bytes() for file in place.rglob("*.py")} for place in (HERE, folder)
    )
    return here == there


def _built_with(binary: Path) -> str:
    """The torch version that the binary carries."""
    version = re.search(rb"droppath_ext built with torch ([^\0]+)\0", binary.read_bytes())
    return version[1].decode() if version else "of an unknown version"


def _release(version: str) -> str:
    return version.split("+")[0]


def _is_pure() -> bool:
    """Whether this environment is to do without the extension: it is told so, or the package was installed so."""
    told = os.environ.get("DROPPATH_EXT_NATIVE", "")
    if told not in ("", "0", "1"):
        raise ImportError(f"DROPPATH_EXT_NATIVE must be 0 or 1, but got {told!r}")
    if told or _binary_in(HERE):
        return told == "0"
    installed = next(iter(importlib.metadata.distributions(name="droppath_ext")), None)
    if installed is None or "Root-Is-Purelib: true" not in (installed.read_text("WHEEL") or ""):
        return False
    package = Path(str(installed.locate_file("droppath_ext")))
    return not package.exists() or _same_sources(package.resolve())  # there is none if it is installed as editable


def _find() -> Path:
    """The extension beside this file, or that of an installed copy of the same Python files."""
    binary = _binary_in(HERE) or _installed_binary()
    if binary is None:
        raise ImportError(
            f"droppath_ext has no native extension for Python {platform.python_version()}. To build it: {REBUILD}"
        )
    if not _same_sources(binary.parent):
        raise ImportError(
            f"{HERE} shadows the droppath_ext installed in {binary.parent}, but has other Python files and no native "
            f"extension. Leave the folder above it to use what is installed. To install it anew: {REBUILD}"
        )
    return binary


def _command(binary: Path) -> str:
    """What replaces a binary that does not fit."""
    in_the_way = binary.parent == HERE and (HERE.parent / "setup.py").exists()
    return f"{REBUILD}{f', without {binary}, which would come first' if in_the_way else ''}"


BINARY = None if _is_pure() else _find()
if BINARY is not None:
    if BINARY.parent != HERE:  # in a checkout: Python prefers the folder that one stands in to what is installed
        sys.modules["droppath_ext"].__path__.append(str(BINARY.parent))
    try:
        import droppath_ext._C as _C
    except ImportError as error:
        raise ImportError(
            f"droppath_ext was built with torch {_built_with(BINARY)}; with torch {torch.__version__} it fails: "
            f"{error}. To build it: {_command(BINARY)}"
        ) from error
    # Another torch's extension may load and then misbehave: nothing guards the C++ ABI between releases.
    if _release(_C.torch_version) != _release(torch.__version__):
        raise ImportError(
            f"droppath_ext was built with torch {_C.torch_version}, but this is torch {torch.__version__}. "
            f"To build it: {_command(BINARY)}"
        )
else:
    from . import _pure as _C  # type: ignore[no-redef]

__all__ = ["BINARY", "HERE", "REBUILD", "_C"]
