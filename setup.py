"""Builds droppath_ext._C. Everything else about the package is in pyproject.toml.

Environment variables:
    DROPPATH_EXT_NATIVE   0 installs the Python files alone, without a compiler: every call takes the composite path.
    DROPPATH_EXT_CUDA     1 demands the CUDA kernels, 0 leaves them out. Default: they are built when torch has CUDA
                          and an nvcc is found; where there is a GPU and no nvcc, the build stops and says so.
    DROPPATH_EXT_LOCAL    a local version for the wheel, e.g. "torch2.14.cu130" (`make wheels`).
    TORCH_CUDA_ARCH_LIST  architectures, e.g. "8.0;9.0+PTX". Default: those of the GPUs present, else DEFAULT_ARCHS.
    CUDA_HOME             the toolkit to use. Default: nvcc on PATH, else the nvidia-cuda-nvcc package of pip.
    CXX                   the C++ compiler. Default: c++.
    MAX_JOBS              compilers at a time.
"""

import importlib.machinery
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import setuptools
from setuptools.command.egg_info import egg_info

# What torch's own wheels carry: Turing to Blackwell, and PTX for what comes after.
DEFAULT_ARCHS = "7.5;8.0;8.6;9.0;10.0;12.0+PTX"
OLDEST_TORCH = "2.11"
PURE_PYTHON = "DROPPATH_EXT_NATIVE=0 installs the slower pure-Python package"


def flag(name: str) -> str:
    """An environment variable that is 0, 1 or not set (an empty string)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name} must be 0 or 1, but got {value!r}")
    return value


def environment_path() -> list[str]:
    """sys.path as it is without the isolation of pip, which consists of these variables."""
    environment = {name: os.environ[name] for name in os.environ.keys() - {"PYTHONPATH", "PYTHONNOUSERSITE"}}
    ask = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    return subprocess.run(ask, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()


def import_torch() -> ModuleType:
    """The torch of the environment that this is built for, also where pip isolates the build from it."""
    path = environment_path()
    if importlib.util.find_spec("torch") is None:
        for folder in path:
            site.addsitedir(folder)
    try:
        import torch
    except (ImportError, OSError) as error:
        sys.exit(
            f"droppath_ext compiles against the torch that it will run with, which {sys.executable} cannot import "
            f"({error}): pip install 'torch>={OLDEST_TORCH}', then pip install droppath_ext. With uv, name torch in "
            "pyproject.toml's [tool.uv.extra-build-dependencies], with match-runtime. Where torch is on PYTHONPATH, or "
            "another program isolates the build, switch that off (pip install --no-build-isolation, python -m build "
            "--no-isolation)."
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < tuple(map(int, OLDEST_TORCH.split("."))):
        sys.exit(
            f"torch {torch.__version__} is too old: pip install --upgrade 'torch>={OLDEST_TORCH}', then build again."
        )
    present = importlib.machinery.PathFinder.find_spec("torch", path)
    if present and present.origin != torch.__file__:
        version = runpy.run_path(str(Path(present.origin).with_name("version.py")))["__version__"]
        if version != torch.__version__:
            sys.exit(
                f"the build would be against torch {torch.__version__} in {Path(torch.__file__).parent}, but the "
                f"environment has torch {version}, with which it would not run: build without isolation, or with that "
                "torch."
            )
    return torch


def check_compiler() -> None:
    compiler = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]
    if sys.platform != "win32" and shutil.which(compiler) is None:
        sys.exit(
            f"no C++ compiler: there is no {compiler} on PATH. Install one (apt install g++, dnf install gcc-c++, "
            f"conda install gxx), or name it in CXX; {PURE_PYTHON}."
        )
    headers = sysconfig.get_path("include", scheme="nt" if sys.platform == "win32" else "posix_prefix")  # as torch
    if not (Path(headers) / "Python.h").exists():
        sys.exit(
            f"no headers of Python: there is no Python.h in {headers}. Install them (apt install python3-dev, "
            f"dnf install python3-devel); {PURE_PYTHON}."
        )


def toolkit_of(nvcc: str) -> Path:
    """The folder above bin/nvcc. nvcc knows it even where PATH holds a link or a wrapper script."""
    plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent


def cuda_toolkits() -> list[Path]:
    """Folders that hold bin/nvcc, the most explicitly named first."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return [Path(home)] if (Path(home) / "bin/nvcc").exists() else []
    nvcc = shutil.which("nvcc")
    pip = importlib.util.find_spec("nvidia")
    places = [
        *([toolkit_of(nvcc)] if nvcc else []),
        *(
            Path(folder) / f"cu{torch.version.cuda.split('.')[0]}"
            for folder in (pip.submodule_search_locations if pip else [])
        ),
        Path("/usr/local/cuda"),
    ]
    return [place for place in places if (place / "bin/nvcc").exists()]


def nvcc_version(toolkit: Path) -> str:
    text = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def find_cuda() -> Path | None:
    """The toolkit to build the CUDA kernels with; None to build without them."""
    wanted = flag("DROPPATH_EXT_CUDA")
    if wanted == "0":
        return None
    if torch.version.cuda is None:
        if wanted:
            sys.exit(f"DROPPATH_EXT_CUDA=1, but torch {torch.__version__} is CPU-only: install a CUDA build of torch.")
        return None
    packages = " ".join(
        f'"nvidia-{name}=={torch.version.cuda}.*"'
        for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl", "cuda-runtime")
    )
    toolkits = cuda_toolkits()
    if not toolkits:
        if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
            missing = f"{home}, which CUDA_HOME names, holds no bin/nvcc: correct or unset it"
        else:
            missing = f"no nvcc on PATH, in pip's nvidia packages or in /usr/local/cuda: pip install {packages}"
        if wanted:
            sys.exit(f"DROPPATH_EXT_CUDA=1, but {missing}")
        if torch.cuda.device_count():
            sys.exit(f"there is a GPU, but {missing}. DROPPATH_EXT_CUDA=0 builds without the CUDA kernels.")
        print(f"droppath_ext: building without the CUDA kernels ({missing})")
        return None
    versions = {toolkit: nvcc_version(toolkit) for toolkit in toolkits}
    for toolkit, version in versions.items():
        if version.split(".")[0] == torch.version.cuda.split(".")[0]:
            return toolkit
    sys.exit(
        f"torch {torch.__version__} was built with CUDA {torch.version.cuda}, but nvcc is "
        + ", ".join(f"{version} in {toolkit}" for toolkit, version in versions.items())
        + f": pip install {packages}, or set DROPPATH_EXT_CUDA=0 to build without the CUDA kernels."
    )


def cuda_archs() -> str:
    if archs := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return archs
    devices = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(devices)) or DEFAULT_ARCHS


def cudart_dirs(toolkit: Path) -> list[str]:
    """Folders to link libcudart from, besides those the linker knows. pip's runtime lacks the unversioned name."""
    versioned = sorted((toolkit / "lib").glob("libcudart.so.*"))
    if (toolkit / "lib/libcudart.so").exists() or not versioned:
        return [str(toolkit / "lib")]
    link = Path("build/cudart/libcudart.so").absolute()
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(versioned[-1])
    return [str(link.parent)]


def native_extension() -> tuple[setuptools.Extension, type]:
    """droppath_ext._C, and the command that builds it."""
    # torch looks for ninja on PATH, where a virtual environment that is not activated has none of its programs.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    toolkit = find_cuda()
    if toolkit:
        # torch.utils.cpp_extension reads both, the first as soon as it is imported.
        os.environ["CUDA_HOME"] = str(toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = [str(path) for path in sorted(Path("csrc").glob("*.cpp")) + sorted(Path("csrc/cpu").glob("*.cpp"))]
    macros = {"DROPPATH_EXT_TORCH_VERSION": torch.__version__}
    # OpenMP's symbols come from the runtime that torch brings: a second one would keep a thread pool of its own.
    flags = {"cxx": ["-O3", "-g0"] + (["-fopenmp"] if sys.platform == "linux" else [])}
    if toolkit:
        sources += [str(path) for path in sorted(Path("csrc/cuda").glob("*.cu"))]
        macros |= {"DROPPATH_EXT_WITH_CUDA": None, "DROPPATH_EXT_CUDA_ARCHS": os.environ["TORCH_CUDA_ARCH_LIST"]}
        flags["nvcc"] = ["-O3", "--threads=2"]
    extension = (CUDAExtension if toolkit else CppExtension)(
        "droppath_ext._C",
        sources,
        define_macros=[(name, value and f'"{value}"') for name, value in macros.items()],
        extra_compile_args=flags,
        library_dirs=cudart_dirs(toolkit) if toolkit else [],
        depends=[str(path) for path in Path("csrc").rglob("*.*") if path.suffix not in (".cpp", ".cu")],
    )
    return extension, BuildExtension


class EggInfo(egg_info):
    """With the local version, wherever setuptools asks for the version. An sdist's setup.cfg would win over options."""

    def finalize_options(self) -> None:
        if local := os.environ.get("DROPPATH_EXT_LOCAL"):
            self.tag_build = f"+{local}"
        super().finalize_options()


if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"setuptools {setuptools.__version__} cannot read this pyproject.toml: pip install 'setuptools>=77,<82', or "
        "leave out --no-build-isolation."
    )
extensions, commands = [], {"egg_info": EggInfo}
# An sdist, and what an installer asks for beforehand, need neither torch nor a compiler.
BUILDS = {"bdist", "bdist_egg", "bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
if BUILDS & set(sys.argv[1:]) and flag("DROPPATH_EXT_NATIVE") != "0":
    torch = import_torch()
    check_compiler()
    extension, commands["build_ext"] = native_extension()
    extensions.append(extension)
setuptools.setup(ext_modules=extensions, cmdclass=commands)
