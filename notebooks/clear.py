"""Clears notebooks before a commit: `python notebooks/clear.py`, or with the names of some.

Outputs, execution counts and what an editor notes about itself go, so that a diff shows only what
somebody wrote.
"""

import sys
from pathlib import Path

import nbformat

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
"""What stays: which kernel runs a notebook."""


def cleared(path: Path) -> str:
    """The notebook's text without outputs, counts and metadata."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    names = map(Path, sys.argv[1:])
    for path in list(names) or sorted(Path(__file__).parent.glob("*.ipynb")):
        path.write_text(cleared(path))
