"""Builds droppath_ext._C. Everything else about the package is in pyproject.toml.

Environment variables:
    DROPPATH_EXT_CUDA     1 demands the CUDA kernels, 0 leaves them out. Default: they are built when torch has CUDA
                          and an nvcc is found.
    TORCH_CUDA_ARCH_LIST  architectures, e.g. "8.0;9.0+PTX". Default: those of the GPUs present, else DEFAULT_ARCHS.
    CUDA_HOME             the toolkit to use. Default: nvcc on PATH, else the nvidia-cuda-nvcc package of pip.
    MAX_JOBS              compilers at a time.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError:
    sys.exit(
        "droppath_ext compiles against the torch it will run with: install torch first, "
        "then build with `pip install --no-build-isolation`."
    )

# What torch's own wheels carry: Turing to Blackwell, and PTX for what comes after.
DEFAULT_ARCHS = "7.5;8.0;8.6;9.0;10.0;12.0+PTX"
TORCH_CUDA = torch.version.cuda  # "13.2", or None for a CPU-only torch


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
        *(Path(folder) / f"cu{TORCH_CUDA.split('.')[0]}" for folder in (pip.submodule_search_locations if pip else [])),
        Path("/usr/local/cuda"),
    ]
    return [place for place in places if (place / "bin/nvcc").exists()]


def nvcc_version(toolkit: Path) -> str:
    text = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def find_cuda() -> Path | None:
    """The toolkit to build the CUDA kernels with; None to build without them."""
    wanted = os.environ.get("DROPPATH_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"DROPPATH_EXT_CUDA must be 0 or 1, but got {wanted!r}")
    if wanted == "0":
        return None
    if TORCH_CUDA is None:
        if wanted:
            sys.exit(f"DROPPATH_EXT_CUDA=1, but torch {torch.__version__} is CPU-only: install a CUDA build of torch.")
        return None
    packages = " ".join(
        f'"nvidia-{name}=={TORCH_CUDA}.*"' for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl", "cuda-runtime")
    )
    toolkits = cuda_toolkits()
    if not toolkits:
        if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
            missing = f"{home}, which CUDA_HOME names, holds no bin/nvcc: correct or unset it"
        else:
            missing = f"no nvcc on PATH, in pip's nvidia packages or in /usr/local/cuda: pip install {packages}"
        if wanted:
            sys.exit(f"DROPPATH_EXT_CUDA=1, but {missing}")
        print(f"droppath_ext: building without the CUDA kernels ({missing})")
        return None
    versions = {toolkit: nvcc_version(toolkit) for toolkit in toolkits}
    for toolkit, version in versions.items():
        if version.split(".")[0] == TORCH_CUDA.split(".")[0]:
            return toolkit
    sys.exit(
        f"torch {torch.__version__} was built with CUDA {TORCH_CUDA}, but nvcc is "
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


# torch looks for ninja on PATH, where a virtual environment that is not activated has none of its programs.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
toolkit = find_cuda()
if toolkit:
    # torch.utils.cpp_extension reads both, the first as soon as it is imported.
    os.environ["CUDA_HOME"] = str(toolkit)
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

sources = [str(path) for path in sorted(Path("csrc").glob("*.cpp")) + sorted(Path("csrc/cpu").glob("*.cpp"))]
macros = {"DROPPATH_EXT_TORCH_VERSION": torch.__version__}
# OpenMP's symbols come from the runtime that torch brings: a second one would keep a thread pool of its own.
flags = {"cxx": ["-O3", "-g0"] + (["-fopenmp"] if sys.platform == "linux" else [])}
if toolkit:
    sources += [str(path) for path in sorted(Path("csrc/cuda").glob("*.cu"))]
    macros |= {"DROPPATH_EXT_WITH_CUDA": None, "DROPPATH_EXT_CUDA_ARCHS": os.environ["TORCH_CUDA_ARCH_LIST"]}
    flags["nvcc"] = ["-O3", "--threads=2"]

setup(
    ext_modules=[
        (CUDAExtension if toolkit else CppExtension)(
            "droppath_ext._C",
            sources,
            define_macros=[(name, value and f'"{value}"') for name, value in macros.items()],
            extra_compile_args=flags,
            library_dirs=cudart_dirs(toolkit) if toolkit else [],
            depends=[str(path) for path in Path("csrc").rglob("*.*") if path.suffix not in (".cpp", ".cu")],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
