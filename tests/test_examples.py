"""Promise: the examples run from top to bottom, and draw their pictures."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import install
from nbclient import NotebookClient

import droppath_ext

pytest.importorskip("timm", reason="timm does not import", exc_type=ImportError)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


@pytest.fixture(autouse=True)
def _imports_the_package_under_test(monkeypatch):
    folder = str(Path(droppath_ext.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", folder, prepend=os.pathsep)


def _outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("dropout_vs_drop_path.py", []), ("train_digits.py", ["--epochs", "1", "--seeds", "2", "--picture"])],
)
def test_script_draws_its_picture(script, arguments, tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, EXAMPLES / script, *arguments, picture]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In a kernel of this interpreter, whatever kernels and settings the machine has."""
    install(prefix=str(tmp_path), kernel_name="this-interpreter")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    for variable in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import sys; print(sys.executable)"))
    client = NotebookClient(
        notebook, timeout=120, kernel_name="this-interpreter", resources={"metadata": {"path": EXAMPLES}}
    )
    client.execute()
    assert notebook.cells.pop().outputs[0].text.strip() == sys.executable
    assert {output.output_type for output in _outputs(notebook)} == {"stream", "display_data"}


def test_notebook_is_committed_as_it_ran():
    """With all outputs, and nothing in them that only one machine has."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for output in _outputs(notebook)} == {"stream", "display_data"}
    texts = [output.text for output in _outputs(notebook) if output.output_type == "stream"]
    assert not [text for text in texts if "/" in text or "\\" in text or "Warning" in text]
