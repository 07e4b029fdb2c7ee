"""Each notebook runs from top to bottom, says little and warns of nothing; files are cleared.

COMET_QUICK is set: a notebook that would take long may read it, and take less.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from notebooks.clear import cleared

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

SECONDS = 120
"""A cell may take, on a busy machine: one that hangs is stopped."""

LINES, BYTES = 60, 300_000
"""Most lines of text, and bytes of a picture, that a cell may put out."""

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@every
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    for name, value in {
        "PYTHONPATH": str(ROOT),  # the code beside the notebooks, wherever another is installed
        "IPYTHONDIR": str(tmp_path),  # nobody's settings or history
        "OMP_NUM_THREADS": "1",
        "COMET_QUICK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=folder).execute()
    for cell in code_cells(notebook):
        text = []
        for output in cell.outputs:
            assert output.get("name") != "stderr", f"{output.text}\nin:\n{cell.source}"
            data = output.get("data", {})
            text.append(output.get("text") or data.get("text/plain", ""))
            picture = data.get("image/png", "")
            assert len(picture) <= BYTES, f"a picture of {len(picture)} bytes in:\n{cell.source}"
        lines = "".join(text).count("\n") + 1
        assert lines <= LINES, f"{lines} lines of output, {LINES} allowed, in:\n{cell.source}"


@every
def test_a_notebook_is_cleared(path):
    assert path.read_text() == cleared(path), f"python notebooks/clear.py notebooks/{path.name}"


@every
def test_a_notebook_has_its_parts(path):
    """A title and the setup that all share first, two hidden solutions or more, and a law last."""
    notebook, first = (nbformat.read(p, as_version=4) for p in (path, NOTEBOOKS[0]))
    assert re.match(rf"# {int(path.stem[:2])}\. ", notebook.cells[0].source)
    assert code_cells(notebook)[0].source == code_cells(first)[0].source
    text = "".join(cell.source for cell in notebook.cells)
    assert text.count("<details><summary>Solution</summary>") >= 2
    assert "check_law(" in code_cells(notebook)[-1].source
    assert f"]({path.name})" in (ROOT / "notebooks/README.md").read_text()
