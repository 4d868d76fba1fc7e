"""Promise: what runs on a GPU without a person is ready: it fits into its time, and into today's sources."""

import shlex
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_check  # noqa: E402
import native_build  # noqa: E402
import run as benchmark  # noqa: E402
import tune  # noqa: E402


def test_gpu_check_ends_within_ten_minutes():
    assert sum(seconds for seconds, _ in gpu_check.STAGES) < 600


def test_every_part_of_gpu_check_has_its_files():
    words = [word for _, parts in gpu_check.STAGES for part in parts for word in part.command.split()]
    files = [word for word in words if word.endswith(".py")]
    assert "benchmarks/run.py" in files
    assert "tests/test_cuda.py" in files
    assert [file for file in files if not (BENCHMARKS.parent / file).exists()] == []


BENCHMARK = "python benchmarks/run.py "
COMMANDS = [command for _, parts in gpu_check.STAGES for part in parts for command in (part.command, part.dry)]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith(BENCHMARK)])
def test_every_benchmark_of_gpu_check_is_understood(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    assert benchmark.parse_arguments().quick


@pytest.mark.parametrize("variant", tune.VARIANTS)
def test_every_variant_fits_the_sources(variant, tmp_path, monkeypatch):
    """A constant that was renamed would otherwise show on the GPU."""
    monkeypatch.setattr(native_build, "TREES", tmp_path)
    tree = native_build.changed_tree("variant", [tune.TWO_DTYPES, *tune.VARIANTS[variant]])
    for change in tune.VARIANTS[variant]:
        assert change.new in (tree / change.file).read_text()


def test_a_variant_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "TREES", tmp_path)
    with pytest.raises(ValueError, match=r"tiling.h must hold 'kThreads = 255;' once, but holds it 0 times"):
        native_build.changed_tree("wrong", [native_build.Change(tune.TILING, "kThreads = 255;", "kThreads = 1;")])
