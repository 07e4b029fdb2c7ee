"""Runs a notebook from top to bottom; one that would take long may read COMET_QUICK, and take less."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent

SECONDS = 120
"""A cell may take, on a busy machine: one that hangs is stopped."""

LINES, BYTES = 60, 300_000
"""Most lines of text, and bytes of a picture, that a cell may put out."""

PRETRAINED = ROOT / "notebooks" / "09_a_pretrained_model_reads_on.ipynb"
"""Needs a package of 93 MB, so `make test-pretrained` runs it and `make test` does not."""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_notebook(path, tmp_path, monkeypatch):
    """No cell raises, warns, or puts out more than it may."""
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
