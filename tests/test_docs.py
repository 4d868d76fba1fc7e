"""Promise: what the documents point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("tests/*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []


def test_tests_that_are_named_exist():
    source = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    named = set().union(*(re.findall(r"::(test_\w+)", path.read_text()) for path in ROOT.glob("docs/**/*.md")))
    assert named
    assert {name for name in named if f"def {name}(" not in source} == set()
