"""Promise: what the documents point to is there."""

import re
from pathlib import Path

import pytest
import yaml

from droppath_ext.version import __version__

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


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] in (ROOT / "pyproject.toml").read_text()
    (paper,) = citation["references"]
    assert {"type": "other", "value": "arXiv:1603.09382"} in paper["identifiers"]


@pytest.mark.parametrize("form", ["bug_report", "feature_request"])
def test_issue_forms_ask_for_what_an_answer_takes(form):
    template = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
    assert template["name"] and template["description"]
    asked = {part["id"]: part for part in template["body"] if part["type"] != "markdown"}
    assert asked["info"]["validations"]["required"]
    assert "`python -m droppath_ext.info`" in asked["info"]["attributes"]["label"]
    assert "smallest input" in asked["input"]["attributes"]["label"]


def test_issues_are_written_in_a_form():
    assert yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text()) == {"blank_issues_enabled": False}
