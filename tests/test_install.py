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
from droppath_ext._native import _C

ROOT = Path(__file__).resolve().parent.parent


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
    assert f"{'CUDA found with torch':32} {torch.version.cuda or 'none'}" in text
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


def _run_in(folder, *arguments, site=(), **environment):
    """Python in ``folder``, as from a shell, with the folders of ``site`` behind it on the path."""
    path = os.pathsep.join(map(str, site))
    return _python(*arguments, cwd=folder, env=os.environ | {"PYTHONPATH": path} | environment)


@pytest.fixture
def import_copy(tmp_path):
    def run(binary):
        _copy(tmp_path, binary)
        result = _run_in(tmp_path, "-c", "import droppath_ext")
        assert result.returncode == 1
        return result.stderr.strip().splitlines()[-1]

    return run


REBUILD = "pip install --no-deps --no-cache-dir --force-reinstall"


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
    """README's last two lines, the second in the folder of the first: both are of the same sources."""
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


# --- without an extension, on purpose ---

USE = """
import warnings, torch, droppath_ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.ones(64, 3)
    out = droppath_ext.drop_path(x, 0.5, training=True)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    droppath_ext.drop_path_add(x, x, 0.5, training=True)
    droppath_ext.stochastic_depth(x, torch.neg, 0.5, training=True)
(warning,) = caught
print(warning.filename, warning.message)
"""


def _check_pure(folder, *site):
    info, use = (_run_in(folder, *arguments, site=site) for arguments in (("-m", "droppath_ext.info"), ("-c", USE)))
    assert info.returncode == 0, info.stdout + info.stderr
    assert f"{'native extension':32} none: every call takes the slower composite path" in info.stdout
    assert not info.stderr
    assert use.returncode == 0, use.stderr
    assert use.stdout.startswith("<string> droppath_ext is used without its native extension")
    assert REBUILD in use.stdout


def test_odd_demand():
    result = _run_in("/", "-c", "import droppath_ext", site=[ROOT], DROPPATH_EXT_NATIVE="off")
    assert "ImportError: DROPPATH_EXT_NATIVE must be 0 or 1, but got 'off'" in result.stderr


def test_done_without_for_once(monkeypatch):
    monkeypatch.setenv("DROPPATH_EXT_NATIVE", "0")
    _check_pure(ROOT)


@pytest.fixture(scope="module")
def pure_site(tmp_path_factory):
    """Where the package is installed with DROPPATH_EXT_NATIVE=0, from a copy of the sources."""
    sources, site = (tmp_path_factory.mktemp(name) for name in ("sources", "site"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    _copy(sources)
    pip = ("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target", str(site), str(sources))
    result = _python(*pip, env=os.environ | {"DROPPATH_EXT_NATIVE": "0", "CXX": "no-such-compiler"})
    assert result.returncode == 0, result.stderr
    return site


def test_installed_without(pure_site):
    assert not list(pure_site.glob("droppath_ext/_C*.so"))
    (metadata,) = pure_site.glob("droppath_ext-*.dist-info")
    assert "Tag: py3-none-any" in (metadata / "WHEEL").read_text()
    _check_pure("/", pure_site)


def test_lost_extension_is_no_choice(pure_site, tmp_path):
    """The wheel had one, so whoever installed it did not choose to do without."""
    site = tmp_path / "site"
    shutil.copytree(pure_site, site)
    (wheel,) = site.glob("droppath_ext-*.dist-info/WHEEL")
    wheel.write_text(wheel.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false"))
    result = _run_in("/", "-c", "import droppath_ext", site=[site])
    assert "ImportError: droppath_ext has no native extension for Python 3." in result.stderr


# --- building ---


def _setup(prelude="", **environment):
    """The sentence that a build ends with. All come before anything is compiled."""
    env = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    run = "import runpy, sys; sys.argv = ['setup.py', 'build_ext']\n" + prelude + "\nrunpy.run_path('setup.py')"
    result = _python("-c", run, cwd=ROOT, env=env | environment)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["DROPPATH_EXT_CUDA", "DROPPATH_EXT_NATIVE"])
def test_bad_demand(name):
    assert _setup(**{name: "yes"}) == f"{name} must be 0 or 1, but got 'yes'"


def _fake_torch(folder, version):
    (folder / "torch.py").write_text(f"__version__ = {version!r}")
    return f"sys.path.insert(0, {str(folder)!r})"


def test_old_setuptools():
    message = _setup("import setuptools; setuptools.__version__ = '65.5.0'")
    assert message.startswith("setuptools 65.5.0 cannot read this pyproject.toml: pip install 'setuptools>=77,<82'")


def test_no_torch():
    message = _setup("sys.modules['torch'] = None")
    assert f"which {sys.executable} cannot import" in message
    assert "pip install 'torch>=2.11', then" in message


def test_another_torch_than_that_of_the_environment(tmp_path):
    """As where what isolates the build brings its own."""
    message = _setup(_fake_torch(tmp_path, "9.9.9"))
    assert message.startswith(
        f"the build would be against torch 9.9.9 in {tmp_path}, but the environment has torch {torch.__version__},"
    )


def test_old_torch(tmp_path):
    message = _setup(_fake_torch(tmp_path, "2.9.1+cpu"))
    assert message == "torch 2.9.1+cpu is too old: pip install --upgrade 'torch>=2.11', then build again."
    assert '"torch>=2.11"' in (ROOT / "pyproject.toml").read_text()


def test_isolation_finds_the_torch_of_the_environment():
    """pip isolates with variables that reach Python's start; here with an interpreter that looks nowhere itself."""
    prelude = "import setuptools, site; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    message = _setup(prelude, CXX="no-such-compiler")
    assert message.startswith("no C++ compiler")


def test_no_compiler():
    message = _setup(CXX="no-such-compiler -m64")
    assert message.startswith("no C++ compiler: there is no no-such-compiler on PATH. Install one (apt install g++,")
    assert "DROPPATH_EXT_NATIVE=0" in message


def test_no_headers_of_python(tmp_path):
    include = f"{str(tmp_path)!r} if name == 'include' else get(name)"
    message = _setup(
        f"import sysconfig; sysconfig.get_path = lambda name, scheme=None, get=sysconfig.get_path: {include}"
    )
    assert message.startswith(f"no headers of Python: there is no Python.h in {tmp_path}. Install them")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_demanded_of_a_cpu_only_torch():
    assert f"torch {torch.__version__} is CPU-only" in _setup(DROPPATH_EXT_CUDA="1")


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is CPU-only")
@pytest.mark.parametrize("wanted", ["by the user", "by a GPU"])
def test_no_nvcc(tmp_path, wanted):
    missing = f"{tmp_path}, which CUDA_HOME names, holds no bin/nvcc: correct or unset it"
    if wanted == "by the user":
        assert _setup(DROPPATH_EXT_CUDA="1", CUDA_HOME=str(tmp_path)) == f"DROPPATH_EXT_CUDA=1, but {missing}"
    else:
        message = _setup("import torch; torch.cuda.device_count = lambda: 1", CUDA_HOME=str(tmp_path))
        assert message == f"there is a GPU, but {missing}. DROPPATH_EXT_CUDA=0 builds without the CUDA kernels."


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is CPU-only")
def test_nvcc_of_another_major_version(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.5, V1.5.0'\n")
    nvcc.chmod(0o755)
    message = _setup(CUDA_HOME=str(tmp_path))
    assert f"built with CUDA {torch.version.cuda}, but nvcc is 1.5 in {tmp_path}: pip install" in message


def test_one_version():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{droppath_ext.__version__}"\n' in project
