"""Promise: what the documents point to is there, their code runs, and docstrings say all that is asked of them."""

import inspect
import re
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import yaml
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import droppath_ext
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


# --- code blocks ---

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if _blocks(page, "python")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_python_runs(page):
    """Block after block; what a reader's own code would define stands in comments of the page."""
    examples = list(Sybil(parsers=[PythonCodeBlockParser()]).parse(page).examples())
    assert len(examples) >= len(_blocks(page, "python"))
    for example in examples:
        example.evaluate()


def test_other_blocks_are_run_by_the_release_check():
    """Commands are tried in fresh environments: `make release-check` takes them from these pages."""
    release = ROOT / ".ci/release.py"
    readme, install = (_blocks(ROOT / name, "sh") for name in ("README.md", "docs/install.md"))
    assert len(readme) == 1
    lines = [line.split("#")[0].strip() for line in readme[0].splitlines()]
    assert [block.splitlines() for block in install[:1]] == [lines]
    assert "quick_start()" in release.read_text()
    assert len(install) == 2 and "--find-links dist/wheels/index.html" in install[1]
    assert _blocks(ROOT / "README.md", "toml") == _blocks(ROOT / "docs/install.md", "toml") != []
    opening = [(page.name, re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)[::2]) for page in PAGES]
    languages = {(name, language) for name, found in opening for language in found}
    assert {pair for pair in languages if pair[1] != "python"} == set(
        product(["README.md", "install.md"], ["sh", "toml"])
    )


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


# --- docstrings ---

PUBLIC = [name for name in droppath_ext.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def package():
    """As the reference in docs/api.md reads it."""
    options = {"returns_multiple_items": False}
    griffe = pytest.importorskip("griffe")
    return griffe.load("droppath_ext", search_paths=[ROOT], docstring_parser="google", docstring_options=options)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_say_all(package, name):
    """Arguments, shapes, what is returned and what is raised, in sections that tools can read."""
    function = getattr(droppath_ext, name)
    docstring = package[f"{function.__module__.removeprefix('droppath_ext.')}.{name}"].docstring
    sections = {section.kind.value: section.value for section in docstring.parsed}
    assert len(sections["text"].splitlines()[0]) <= 120
    parameters = [p for p in inspect.signature(function).parameters if p != "self"]
    if parameters:
        documented = {parameter.name: parameter.description for parameter in sections["parameters"]}
        assert list(documented) == parameters
        assert all(text.rstrip().endswith(".") for text in documented.values())
    assert sections["raises"]
    if inspect.isclass(function):
        assert re.search(r"Shape:\n.*\[B, \.\.\.\]", function.__doc__, re.DOTALL)
    elif inspect.signature(function).return_annotation not in (None, "None"):
        (returned,) = sections["returns"]
        assert returned.description.endswith(".")
        if "Tensor" in str(inspect.signature(function).return_annotation):
            assert re.search(r"\[|shape", returned.description)
    annotations = inspect.signature(function).parameters
    types = {name: str(annotations[name].annotation) for name in parameters if name != "drop_prob"}
    tensors = [name for name, kind in types.items() if "Tensor" in kind and "Callable" not in kind]
    assert all(re.search(r"\[|shape", documented[p]) for p in tensors)


def test_reference_has_every_name():
    assert set(
        re.findall(r"^::: droppath_ext\.(?:\w+\.)?(\w+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    ) == set(PUBLIC)
