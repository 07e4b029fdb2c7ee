"""Each notebook runs from top to bottom, says little and warns of nothing; files are cleared."""

import re

import nbformat
import pytest

from notebooks.clear import cleared

from .notebooks import PRETRAINED, ROOT, code_cells, run_notebook

pytestmark = pytest.mark.host

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


every = each(NOTEBOOKS)


@each([path for path in NOTEBOOKS if path != PRETRAINED])
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    run_notebook(path, tmp_path, monkeypatch)


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
