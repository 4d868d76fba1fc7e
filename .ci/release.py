"""Wheels, and the proof that the package installs: `make wheels`, `make release-check`.

    python .ci/release.py wheels [--torch 2.11 --torch 2.14 ...] [--python python3.12 ...]
    python .ci/release.py check [--markdown FILE]

`wheels` builds one for each Python and torch into dist/wheels, with the CUDA kernels if that torch has CUDA, and an
index page for `pip install -f`. Each is built twice and must come out the same bit for bit, may hold nothing but the
package, at most 10 MB, and passes the self-test in a fresh environment. `check` goes the ways that users go, each in a
fresh environment, and prints what became of them.

Everything is made in build/release. The variables at the top of setup.py reach the builds.
"""

import argparse
import hashlib
import html
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build/release"
WHEELS = ROOT / "dist/wheels"
LARGEST_WHEEL = 10_000_000
OLDEST = "2.11"
CPU_ONLY = "2.13"  # whose wheel on the index is CPU-only


class Failure(Exception):
    """What is wrong, in a sentence."""


def run(*command: str | Path, cwd: Path = WORK, fails: bool = False, **environment: str) -> str:
    """The output of a command, which is to fail or not; no PYTHONPATH reaches it."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if (result.returncode != 0) != fails:
        sys.stderr.write(result.stdout)
        raise Failure(f"`{' '.join(map(str, command))}` ended with {result.returncode}")
    return result.stdout


def self_test(python: Path) -> str:
    """What the installed package says of itself."""
    report = run(python, "-m", "droppath_ext.info")
    if not re.search(r"^self-test on cpu +pass$", report, re.MULTILINE):
        raise Failure(f"the self-test did not pass:\n{report}")
    return report


class Environment:
    """A fresh virtual environment with one torch and what its Python brings, nothing else.

    ``version`` is a minor one, "2.13" say; without it pip takes the newest.
    """

    def __init__(self, name: str, version: str = "", python: str = sys.executable) -> None:
        self.folder = WORK / name
        shutil.rmtree(self.folder, ignore_errors=True)
        run(python, "-m", "venv", self.folder)
        self.python = self.folder / "bin/python"
        torch = f"torch=={version}.*" if version else "torch"
        self.pip("install", torch, "numpy")  # without NumPy torch prints a warning
        self.path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.torch = self.ask("print(torch.__version__)")
        self.minor = ".".join(self.torch.split(".")[:2])
        self.files = self.all_files()

    def ask(self, code: str) -> str:
        return run(self.python, "-c", f"import torch; {code}").strip()

    def pip(self, *arguments: str | Path, **options: str) -> str:
        return run(self.python, "-m", "pip", *arguments, **options)

    def all_files(self) -> set[Path]:
        return {path for path in self.folder.rglob("*") if "__pycache__" not in path.parts}

    def uninstall(self) -> None:
        self.pip("uninstall", "--yes", "droppath_ext")
        if left := self.all_files() - self.files:
            raise Failure(f"uninstalling left {', '.join(map(str, sorted(left)))}")


def make_sdist() -> Path:
    """Isolated: what it takes needs no torch."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", WORK, ROOT)
    return next(WORK.glob("droppath_ext-*.tar.gz"))


def sources(sdist: Path) -> Path:
    """The sdist, unpacked: a checkout without anything built. Always in one place: binaries depend on its name."""
    folder = WORK / "sources"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.unpack_archive(sdist, WORK, filter="data")
    return (WORK / sdist.name.removesuffix(".tar.gz")).rename(folder)


# --- wheels ---


def build_wheel(environment: Environment, sdist: Path, name: str) -> Path:
    folder = sources(sdist)
    cuda = environment.ask("print((torch.version.cuda or '').replace('.', ''))")
    map_paths = f"-ffile-prefix-map={folder}/= -ffile-prefix-map={environment.folder}/="
    environment.pip(
        "wheel", "--no-deps", "--wheel-dir", WORK / name, folder,
        DROPPATH_EXT_LOCAL=f"torch{environment.minor}.{f'cu{cuda}' if cuda else 'cpu'}",
        SOURCE_DATE_EPOCH="1700000000",
        CFLAGS=map_paths,
        LDFLAGS="-Wl,--strip-all",
        NVCC_APPEND_FLAGS=" -Xcompiler ".join(["-frandom-seed=1", *map_paths.split()]),
    )  # fmt: skip
    return next((WORK / name).glob("*.whl"))


def check_contents(wheel: Path) -> None:
    # W102: the extension is not among the sources.
    package = ("--package", ROOT / "droppath_ext", "--package-omit", "*.so", "--ignore", "W102")
    run(sys.executable, "-m", "check_wheel_contents", *package, wheel)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    allowed = re.compile(r"droppath_ext/(convert/)?(\w+\.py|_C\.pyi|py\.typed|_C\.[\w-]+\.so)")
    if strange := [name for name in names if not allowed.fullmatch(name)]:
        raise Failure(f"{wheel.name} holds {', '.join(strange)}")
    if sum(name.endswith(".so") for name in names) != 1:
        raise Failure(f"{wheel.name} must hold one extension, but holds {names}")
    if (size := wheel.stat().st_size) > LARGEST_WHEEL:
        raise Failure(f"{wheel.name} has {size:,} bytes, at most {LARGEST_WHEEL:,} are allowed")


def write_index() -> None:
    links = []
    for wheel in sorted(WHEELS.glob("*.whl")):
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        # A "+" in an address would be read as a space.
        links.append(f'<a href="{wheel.name.replace("+", "%2B")}#sha256={digest}">{html.escape(wheel.name)}</a><br>')
    page = ["<!DOCTYPE html>", "<title>droppath_ext</title>", *links]
    (WHEELS / "index.html").write_text("\n".join(page) + "\n")


def wheels(pythons: list[str], versions: list[str]) -> None:
    WHEELS.mkdir(parents=True, exist_ok=True)
    sdist = make_sdist()
    for python in pythons:
        for version in versions:
            environment = Environment("builder", version, python)
            first, second = (build_wheel(environment, sdist, name) for name in ("first", "second"))
            if first.read_bytes() != second.read_bytes():
                raise Failure(f"{first.name} comes out differently when built again")
            check_contents(first)
            shutil.copy(first, WHEELS)
            write_index()
            shutil.rmtree(environment.folder)
            tester = Environment("tester", version, python)
            run("bash", "-ec", install_from_index(first), cwd=ROOT, PATH=tester.path)
            self_test(tester.python)
            tester.uninstall()
            print(f"{first.name}: {first.stat().st_size:,} bytes, the same twice, self-test passes", flush=True)
            for name in ("first", "second", "tester"):
                shutil.rmtree(WORK / name)


def install_from_index(wheel: Path) -> str:
    """The command of docs/install.md for this wheel."""
    command = re.search(r"^pip install .*--find-links.*$", (ROOT / "docs/install.md").read_text(), re.MULTILINE)[0]
    return re.sub(r"==[^\"]+", f"=={wheel.name.split('-')[1]}", command)


# --- check ---

rows: list[tuple[str, str, str, str]] = []  # way, torch, result, minutes


@contextmanager
def way(name: str, environment: Environment | None = None) -> Iterator[None]:
    """A row of the table. The other ways are gone whatever comes of this one, from the environment as it was."""
    begin, result = time.monotonic(), "passes"
    try:
        yield
    except Exception as error:
        result = f"fails: {type(error).__name__}: {error}".splitlines()[0]
        if environment:
            environment.pip("uninstall", "--yes", "droppath_ext")
    rows.append((name, environment.torch if environment else "–", result, f"{(time.monotonic() - begin) / 60:.1f}"))
    print(" · ".join(rows[-1]), flush=True)


def quick_start() -> str:
    """The commands of README's section Install."""
    section = (ROOT / "README.md").read_text().split("\n## Install\n")[1]
    return re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1]


def check_sentence(text: str, *parts: str) -> None:
    if missing := [part for part in parts if part not in text]:
        raise Failure(f"{missing[0]!r} is not said, but {text[-2000:]!r}")


def check_uv(sdist: Path) -> None:
    """README's lines for uv, in a project that depends on torch."""
    project = WORK / "uv"
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir()
    lines = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (project / "pyproject.toml").write_text(
        '[project]\nname = "training"\nversion = "0"\nrequires-python = ">=3.10"\n'
        f'dependencies = ["torch=={CPU_ONLY}.*", "numpy", "droppath_ext"]\n\n'
        f'[tool.uv.sources]\ndroppath_ext = {{ path = "{sdist}" }}\n\n{lines}'
    )
    uv = Path(sys.executable).with_name("uv")
    options = {
        "UV_CACHE_DIR": str(WORK / "uv-cache"),
        "UV_NATIVE_TLS": "1",
        "VIRTUAL_ENV": "",
        "DROPPATH_EXT_CUDA": "0",
    }
    run(uv, "sync", "--python", sys.executable, cwd=project, **options)
    self_test(project / ".venv/bin/python")
    shutil.rmtree(WORK / "uv-cache")


def installs(environment: Environment, *arguments: str | Path, **options: str) -> str:
    """What the self-test prints of what pip installs; nothing is left behind."""
    environment.pip("install", *arguments, **options)
    report = self_test(environment.python)
    environment.uninstall()
    return report


def check() -> None:
    sdist = make_sdist()
    wheel = WORK / "no wheel was built"

    oldest = Environment("oldest", OLDEST)
    with way("README's lines, in a checkout", oldest):
        run("bash", "-ec", quick_start(), cwd=sources(sdist), PATH=oldest.path)
        self_test(oldest.python)
        oldest.uninstall()
    with way("`--no-build-isolation` with an old setuptools: the sentence", oldest):
        oldest.pip("install", "setuptools==65.5.0", "wheel")
        said = oldest.pip("install", "--no-build-isolation", "--no-deps", sources(sdist), fails=True)
        check_sentence(said, "setuptools 65.5.0 cannot read this pyproject.toml: pip install 'setuptools>=77,<82'")
    shutil.rmtree(oldest.folder)

    newest = Environment("newest")
    with way("`pip wheel` of the sdist, and the wheel", newest):
        newest.pip("wheel", "--no-deps", "--wheel-dir", WORK / "wheel", sdist)
        wheel = next((WORK / "wheel").glob("*.whl"))
        check_contents(wheel)
        installs(newest, "--no-deps", wheel)
    with way("`pip install --editable .`", newest):
        newest.pip("install", "--no-deps", "--editable", sources(sdist), DROPPATH_EXT_CUDA="0")
        self_test(newest.python)
        newest.uninstall()
    shutil.rmtree(newest.folder)

    cpu_only = Environment("cpu-only", CPU_ONLY)
    with way("`pip install git+…`", cpu_only):
        installs(cpu_only, f"git+file://{ROOT}")
    with way("`DROPPATH_EXT_NATIVE=0 pip install`, without a compiler", cpu_only):
        report = installs(cpu_only, sdist, DROPPATH_EXT_NATIVE="0", CXX="no-such-compiler")
        check_sentence(report, "none: every call takes the slower composite path")
    with way("without a compiler: the sentence", cpu_only):
        said = cpu_only.pip("install", sdist, fails=True, CXX="no-such-compiler")
        check_sentence(said, "no C++ compiler: there is no no-such-compiler on PATH.", "DROPPATH_EXT_NATIVE=0")
    with way(f"a wheel for torch {newest.minor}: the sentence", cpu_only):
        cpu_only.pip("install", "--no-deps", wheel)
        said = run(cpu_only.python, "-c", "import droppath_ext", fails=True)
        check_sentence(
            said, f"ImportError: droppath_ext was built with torch {newest.minor}", cpu_only.torch, "To build it: pip"
        )
        cpu_only.uninstall()
    with way("without torch: the sentence"):
        run(sys.executable, "-m", "venv", WORK / "bare")
        said = run(WORK / "bare/bin/python", "-m", "pip", "install", "--no-deps", sdist, fails=True)
        check_sentence(said, "cannot import", "pip install 'torch>=2.11', then pip install droppath_ext")
    shutil.rmtree(cpu_only.folder)

    with way(f"a project of uv, with torch {CPU_ONLY}"):
        check_uv(sdist)


def table() -> str:
    head = ("| way | torch | result | minutes |", "| :-- | :-- | :-- | --: |")
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_wheels = commands.add_parser("wheels")
    default = f"{OLDEST}, {CPU_ONLY} and the newest"
    of_wheels.add_argument("--torch", action="append", help=f"a minor version; default: {default}")
    of_wheels.add_argument("--python", action="append", help="an interpreter; default: this one")
    of_check = commands.add_parser("check")
    of_check.add_argument("--markdown", type=Path, help="write the table here, between its two marks")
    args = parser.parse_args()

    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    if args.command == "wheels":
        wheels(args.python or [sys.executable], args.torch or [OLDEST, CPU_ONLY, ""])
        return 0
    check()
    if args.markdown:
        marks = re.compile(r"(<!-- release check -->\n).*?(?=<!-- end)", re.DOTALL)
        args.markdown.write_text(marks.sub(lambda match: f"{match[1]}{table()}\n", args.markdown.read_text()))
    print(table())
    return int(any(result != "passes" for _, _, result, _ in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(str(failure))
