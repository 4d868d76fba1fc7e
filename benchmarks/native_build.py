"""Builds parts of csrc/ again as the last build did: for another architecture, with a line changed, or for the host.

A kernel library holds the kernels of csrc/cuda or csrc/cpu. Loaded with torch.ops.load_library after droppath_ext, it
takes the place of those in the extension, which stays as it is.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREES = ROOT / "build/trees"
LIBRARIES = ROOT / "build/kernel_libraries"
HOST_SOURCES = ROOT / "tests/cuda_on_host"
SUFFIXES = {".h", ".inc", ".cpp", ".cuh", ".cu"}
# The shim switches stacks, and the kernels read memory as other types than it was written as, as CUDA allows. A GPU
# contracts a * b + c to one rounding; so must the host, if it is to give the same bits.
HOST_FLAGS = ["-O2", "-mfma", "-ffp-contract=fast", "-fno-strict-aliasing", "-w"]


@dataclass(frozen=True)
class LastBuild:
    """The compilers and flags of the extension as ninja's file names them; those of nvcc are empty without CUDA."""

    cxx: str
    cxx_flags: tuple[str, ...]
    nvcc: str
    nvcc_flags: tuple[str, ...]


@cache
def last_build() -> LastBuild:
    """Raises RuntimeError if ninja has built nothing here."""
    files = sorted(ROOT.glob(f"build/temp*{sys.implementation.cache_tag}/build.ninja"))
    if not files:
        raise RuntimeError("there is no build by ninja here to take compilers and flags from: run `make build`")
    names = dict(re.findall(r"^(\w+) = (.*)$", files[-1].read_text(), re.MULTILINE))

    def flags(*keys: str) -> tuple[str, ...]:
        return tuple(flag for key in keys for flag in shlex.split(names.get(key, "")) if flag != "-c")

    return LastBuild(
        names["cxx"],
        flags("cflags", "post_cflags"),
        names.get("nvcc", ""),
        flags("cuda_cflags", "cuda_post_cflags") if "cuda_cflags" in names else (),
    )


def without_cuda() -> str | None:
    """Why CUDA's headers, which a host library needs, too, are not at hand; None if they are."""
    return None if last_build().nvcc_flags else "the extension was built without CUDA, so its headers are not at hand"


@dataclass(frozen=True)
class Change:
    """Text that is other in a copy of a file. `old` must stand in the file exactly once."""

    file: str
    old: str
    new: str

    def apply(self, tree: Path) -> None:
        path = tree / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} must hold {self.old!r} once, but holds it {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new))


def changed_tree(name: str, changes: Iterable[Change], folder: str = "csrc") -> Path:
    """A tree with a copy of this folder in which the changes are made."""
    tree = TREES / name
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / folder, tree / folder)
    for change in changes:
        change.apply(tree)
    return tree


def jobs() -> int:
    """Compilers at a time."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _run(command: Sequence[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}\nfailed with {result.returncode}:\n{result.stderr}")


def _library(name: str, compilers: Mapping[Path, Sequence[str]], depends: Iterable[Path]) -> Path:
    """Compiles sources, each in its way, and links them against the extension; once for the same text and flags."""
    import torch

    from droppath_ext import _C

    digest = hashlib.sha256(repr((list(compilers.values()), torch.__version__, _C.__file__)).encode())
    texts = (path for top in depends for path in top.rglob("*") if path.suffix in SUFFIXES)
    for path in sorted({*compilers, *texts}):
        digest.update(str(path.name).encode() + path.read_bytes())
    library = LIBRARIES / f"{name}-{digest.hexdigest()[:12]}.so"
    if library.exists():
        return library
    LIBRARIES.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=LIBRARIES) as folder,
        ThreadPoolExecutor(jobs()) as pool,
    ):
        objects = {source: Path(folder, f"{source.stem}.o") for source in compilers}
        commands = [[*compiler, "-c", source, "-o", objects[source]] for source, compiler in compilers.items()]
        list(pool.map(_run, commands))
        # The rest of the symbols, torch's and those of csrc/ beside the kernels, are the extension's; -Bsymbolic: no
        # others.
        unfinished = Path(folder, "unfinished.so")
        sanitizers = {flag for compiler in compilers.values() for flag in compiler if flag.startswith("-fsanitize=")}
        linker = [last_build().cxx, "-shared", "-Wl,-Bsymbolic", *sorted(sanitizers)]
        _run([*linker, *objects.values(), "-o", unfinished, _C.__file__])
        unfinished.rename(library)  # whole, or not there
    return library


def host_library(tree: Path = ROOT, name: str = "host", flags: Sequence[str] = ()) -> Path:
    """The CUDA kernels for the host, in the place of the CPU's; see tests/cuda_on_host/README.md.

    The flags are for the kernels, not for what runs them.
    """
    build = last_build()
    includes = [f"-I{HOST_SOURCES / 'include'}", f"-I{tree}", f"-I{HOST_SOURCES}"]
    compiler = [build.cxx, *includes, *build.cxx_flags, *HOST_FLAGS]
    compilers = {HOST_SOURCES / "kernels.cpp": [*compiler, *flags], HOST_SOURCES / "cuda_on_host.cpp": compiler}
    return _library(name, compilers, [tree / "csrc", HOST_SOURCES])


def cuda_library(tree: Path, name: str) -> Path:
    """The CUDA kernels of another tree, for the architectures of the last build."""
    build = last_build()
    compiler = [build.nvcc, *build.nvcc_flags]
    return _library(name, dict.fromkeys(sorted(tree.glob("csrc/cuda/*.cu")), compiler), [tree / "csrc"])


def cpu_library(tree: Path, name: str, flags: Sequence[str] = ()) -> Path:
    """The CPU kernels of another tree."""
    build = last_build()
    compiler = [build.cxx, *build.cxx_flags, *flags]
    return _library(name, dict.fromkeys(sorted(tree.glob("csrc/cpu/*.cpp")), compiler), [tree / "csrc"])


def compile_cubins(archs: Iterable[int]) -> list[Path]:
    """csrc/cuda for each architecture, such as 90."""
    build = last_build()
    folder = ROOT / "build/sass"
    folder.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag in build.nvcc_flags if not flag.startswith("-gencode")]

    def compile_cubin(source: Path, arch: int) -> Path:
        cubin = folder / f"{source.stem}.sm_{arch}.cubin"
        _run([build.nvcc, *flags, "-cubin", f"-arch=sm_{arch}", source, "-o", cubin])
        return cubin

    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    with ThreadPoolExecutor(jobs()) as pool:
        cubins = [pool.submit(compile_cubin, source, arch) for arch in archs for source in sources]
        return [cubin.result() for cubin in cubins]
