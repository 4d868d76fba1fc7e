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


def _copy(folder, binary=None):
    """A copy of the package in ``folder`` whose native extension holds the bytes given, or is missing."""
    package = Path(folder) / "droppath_ext"
    source = Path(droppath_ext.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("_C.*.so", "_C.*.pyd", "__pycache__"))
    if binary is not None:
        (package / Path(_C.__file__).name).write_bytes(binary)
    return package


def _run_in(folder, *arguments, site=()):
    """Python in ``folder``, as from a shell, with the folders of ``site`` behind it on the path."""
    return _python(*arguments, cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, site))})


@pytest.fixture
def import_copy(tmp_path):
    def run(binary):
        _copy(tmp_path, binary)
        result = _run_in(tmp_path, "-c", "import droppath_ext")
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


# --- the folder that one stands in shadows what is installed ---


@pytest.fixture
def checkout(tmp_path):
    """A folder with the sources alone, and a site folder with the package as it is installed from them."""
    _copy(tmp_path / "checkout")
    _copy(tmp_path / "site", Path(_C.__file__).read_bytes())
    return tmp_path / "checkout"


def test_checkout_uses_the_installed_extension(checkout):
    """README's first two lines, the second in the folder of the first: both are of the same sources."""
    result = _run_in(checkout, "-m", "droppath_ext.info", site=[checkout.parent / "site"])
    assert result.returncode == 0, result.stdout + result.stderr
    package, binary = (checkout.parent / place / "droppath_ext" for place in ("checkout", "site"))
    assert f"{'imported from':32} {package}" in result.stdout
    assert (
        f"{binary / Path(_C.__file__).name}, of an installed copy of the same Python files that this folder shadows"
        in result.stdout
    )


def test_any_other_folder_uses_what_is_installed(checkout, tmp_path):
    site = tmp_path / "site"
    result = _run_in("/", "-m", "droppath_ext.info", site=[site])
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{'imported from':32} {site / 'droppath_ext'}" in result.stdout
    assert "shadows" not in result.stdout


@pytest.mark.parametrize("change", ["edited", "one more", "one less"])
def test_checkout_of_other_sources(checkout, change):
    """What was installed need not fit: the sentence names both folders and what helps."""
    folder, site = checkout / "droppath_ext", checkout.parent / "site"
    if change == "edited":
        with (folder / "version.py").open("a") as file:
            file.write("# edited\n")
    elif change == "one more":
        (folder / "new.py").touch()
    else:
        (site / "droppath_ext" / "new.py").touch()
    result = _run_in(checkout, "-c", "import droppath_ext", site=[site])
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ImportError: {folder} shadows the droppath_ext installed in {site / 'droppath_ext'}")
    assert REBUILD in message


def test_checkout_beside_an_extension_of_another_torch(checkout):
    """The installed one is checked as one beside the sources is."""
    binary = next((checkout.parent / "site/droppath_ext").glob("_C.*.so"))
    version = _C.torch_version.encode()
    binary.write_bytes(binary.read_bytes().replace(version, b"9" + version[1:]))
    result = _run_in(checkout, "-c", "import droppath_ext", site=[checkout.parent / "site"])
    assert f"built with torch 9{_C.torch_version[1:]}, but this is torch" in result.stderr


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
