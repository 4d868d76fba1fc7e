"""Promise: what is wrong with an installation is said in one sentence, with the command that mends it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HAS_CUDA

import droppath_ext
from droppath_ext import _C


def _python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False, **options
    )


def _info(prelude):
    """Run the module in a fresh interpreter, after `prelude`."""
    run = "runpy.run_module('droppath_ext.info', run_name='__main__')"
    return _python("-c", f"import runpy, sys; sys.argv = ['info']\n{prelude}\n{run}")


@pytest.fixture(scope="module")
def report():
    return _python("-m", "droppath_ext.info")


def test_info_passes(report):
    assert report.returncode == 0, report.stdout + report.stderr
    assert "pass" in report.stdout.lower()
    assert "fail" not in report.stdout.lower()
    assert not report.stderr


def test_info_contents(report):
    text = report.stdout
    assert torch.__version__ in text
    assert droppath_ext.__version__ in text
    assert "CUDA" in text
    assert "cpu" in text.lower()
    if HAS_CUDA:
        assert _C.cuda_version in text
        assert _C.cuda_archs in text
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name() in text


def test_info_fails_when_the_self_test_fails():
    """An op that returns wrong numbers must show in the exit status: break the reference that it is held against."""
    broken = "import droppath_ext.reference as r; r.apply_keep_mask = lambda x, keep, scale: x * 0 + 7"
    result = _info(broken)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "fail" in result.stdout.lower()


# --- importing an extension that does not fit ---


@pytest.fixture
def import_copy(tmp_path):
    """Imports a copy of the package whose native extension holds the bytes given, or is missing."""

    def run(binary):
        source = Path(droppath_ext.__file__).parent
        shutil.copytree(source, tmp_path / "droppath_ext", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
        if binary is not None:
            (tmp_path / "droppath_ext" / Path(_C.__file__).name).write_bytes(binary)
        result = _python("-c", "import droppath_ext", cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert result.returncode == 1
        return result.stderr.strip().splitlines()[-1]

    return run


REBUILD = "pip install --no-build-isolation"


def test_no_extension(import_copy):
    message = import_copy(None)
    assert message.startswith("ImportError: droppath_ext has no native extension for Python 3.")
    assert REBUILD in message


def test_extension_that_does_not_load(import_copy):
    """As with an undefined symbol: the versions are still told, read from the file."""
    message = import_copy(b"no ELF at all, droppath_ext built with torch 1.2.3+cu99\0")
    assert "built with torch 1.2.3+cu99" in message
    assert torch.__version__ in message
    assert REBUILD in message


def test_extension_of_another_torch(import_copy):
    """It loads, and yet nothing says that the two understand each other."""
    own = Path(_C.__file__).read_bytes()
    version = _C.torch_version.encode()
    message = import_copy(own.replace(version, b"9" + version[1:]))
    assert f"built with torch 9{_C.torch_version[1:]}" in message
    assert torch.__version__ in message
    assert REBUILD in message


# --- building ---

SETUP = Path(__file__).parents[1] / "setup.py"


def _setup(**environment):
    """Every sentence below comes before anything is compiled."""
    env = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    result = _python(str(SETUP), "build_ext", cwd=SETUP.parent, env=env | environment)
    assert result.returncode == 1
    return result.stderr


def test_bad_demand():
    assert "DROPPATH_EXT_CUDA must be 0 or 1, but got 'yes'" in _setup(DROPPATH_EXT_CUDA="yes")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_demanded_of_a_cpu_only_torch():
    assert f"torch {torch.__version__} is CPU-only" in _setup(DROPPATH_EXT_CUDA="1")


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is CPU-only")
def test_wrong_cuda_home(tmp_path):
    message = _setup(DROPPATH_EXT_CUDA="1", CUDA_HOME=str(tmp_path))
    assert f"DROPPATH_EXT_CUDA=1, but {tmp_path}, which CUDA_HOME names, holds no bin/nvcc" in message


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is CPU-only")
def test_nvcc_of_another_major_version(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.5, V1.5.0'\n")
    nvcc.chmod(0o755)
    message = _setup(CUDA_HOME=str(tmp_path))
    assert f"built with CUDA {torch.version.cuda}, but nvcc is 1.5 in {tmp_path}: pip install" in message
