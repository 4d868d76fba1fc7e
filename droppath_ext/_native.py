"""Loads the native extension, or says why it does not load and how to rebuild it."""

import platform
import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # first: it loads the libraries that the extension links to

REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall . (in a checkout of droppath_ext)"


def _built_with() -> str | None:
    """The torch version that the binary beside this file carries; None if there is no such binary."""
    for suffix in EXTENSION_SUFFIXES:
        binary = Path(__file__).with_name("_C" + suffix)
        if binary.exists():
            version = re.search(rb"droppath_ext built with torch ([^\0]+)\0", binary.read_bytes())
            return version[1].decode() if version else "of an unknown version"
    return None


def _release(version: str) -> str:
    return version.split("+")[0]


try:
    import droppath_ext._C as _C
except ImportError as error:
    built_with = _built_with()
    if built_with is None:
        message = f"droppath_ext has no native extension for Python {platform.python_version()}"
    else:
        message = f"droppath_ext was built with torch {built_with}; with torch {torch.__version__} it fails: {error}"
    raise ImportError(f"{message}. To build it: {REBUILD}") from error

# Another torch's extension may load and then misbehave: nothing guards the C++ ABI between releases.
if _release(_C.torch_version) != _release(torch.__version__):
    raise ImportError(
        f"droppath_ext was built with torch {_C.torch_version}, but this is torch {torch.__version__}. "
        f"To build it: {REBUILD}"
    )

__all__ = ["REBUILD", "_C"]
