"""Promise: results can be published: what a benchmark writes, and every result file, names no folder of a machine."""

import json
import sys
from pathlib import Path

import pytest
import torch

import droppath_ext.info

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
import report  # noqa: E402

FILES = sorted(BENCHMARKS.glob("results/*/*.json"))


def words(value):
    """Every word of every text in nested dicts and lists, `--json=FILE` as two."""
    if isinstance(value, str):
        return value.replace("=", " ").split()
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [word for inner in values for word in words(inner)]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("/a/b/x.json", "x.json"),
        ("--json=/a/b/x.json", "--json=x.json"),
        ("/a/with spaces/x.json", "x.json"),
        ("/a", "a"),
        ("build/out/x.json", "build/out/x.json"),
        ("skip,skip fixed", "skip,skip fixed"),
        ("ViT-S/16", "ViT-S/16"),
    ],
)
def test_the_command_is_written_without_folders(given, written, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/c/run.py", "convert", given])
    command = report.environment(torch.device("cpu"), quick=True)["command"]
    assert command == f"python benchmarks/run.py convert {written}"


def test_what_is_imported_is_written_without_folders(monkeypatch):
    shadowed = "/d/_C.so, of an installed copy of the same Python files that this folder shadows"
    monkeypatch.setattr(droppath_ext.info, "versions", lambda: {"imported from": "/a/b", "native extension": shadowed})
    versions = report.environment(torch.device("cpu"), quick=True)["versions"]
    assert versions["imported from"] == "b"
    assert versions["native extension"] == shadowed.removeprefix("/d/")


@pytest.mark.parametrize("file", FILES, ids=[f"{file.parent.name}/{file.name}" for file in FILES])
def test_result_files_name_no_folder(file):
    environment = json.loads(file.read_text())["environment"]
    assert [word for word in words(environment) if word.startswith("/")] == []
