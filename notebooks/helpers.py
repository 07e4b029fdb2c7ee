"""What several notebooks use: the colours, rows of slots, and running a law of the suite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from fast.rows import KINDS

__all__ = ["COLOURS", "KINDS", "check_law", "draw_grid", "draw_slots", "name_kinds"]

COLOURS = {
    "global": "#0072B2",
    "temporary": "#E69F00",
    "text": "#DDDDDD",
    "compression": "#F0C766",
    "readout": "#56B4E9",
}
"""Okabe and Ito's colours, as in docs/images: colour-blind readers can tell them apart."""

INK = "#333333"
ROOT = Path(__file__).resolve().parent.parent


def draw_slots(
    axes: Axes,
    kinds: Sequence[str],
    y: float = 0.0,
    *,
    labels: Sequence[str] | None = None,
    positions: bool = False,
    name: str = "",
    strong: Collection[int] | None = None,
) -> None:
    """Draw slots as boxes side by side, a unit wide and 0.8 high, the first at x = 0.

    Args:
        axes: where to draw; its limits are left to the caller.
        kinds: what each slot holds, names of `COLOURS`; "" draws an empty slot.
        y: bottom of the boxes.
        labels: what is written into them.
        positions: whether to number the slots from 0, under the boxes.
        name: written to the left of them.
        strong: slots to draw in full colour, the others pale; None is all.
    """
    for x, kind in enumerate(kinds):
        pale = 1.0 if strong is None or x in strong else 0.3
        colour = COLOURS.get(kind, "white")
        axes.add_patch(Rectangle((x + 0.05, y), 0.9, 0.8, fc=colour, ec=INK, lw=0.6, alpha=pale))
        if labels is not None:
            ink = "white" if kind == "global" and pale == 1.0 else "black"
            axes.text(x + 0.5, y + 0.4, labels[x], ha="center", va="center", fontsize=9, color=ink)
        if positions:
            axes.text(x + 0.5, y - 0.1, str(x), ha="center", va="top", fontsize=8, color=INK)
    axes.text(-0.4, y + 0.4, name, ha="right", va="center", fontsize=9)


def draw_grid(axes: Axes, kinds: np.ndarray) -> None:
    """Draw a table of slots as coloured cells, row 0 at the top.

    Args:
        axes: where to draw.
        kinds: [rows, columns] numbers in `KINDS`; -1 is left empty.
    """
    colours = ListedColormap(["white", *COLOURS.values()])
    axes.pcolormesh(kinds, cmap=colours, vmin=-1, vmax=len(KINDS) - 1, ec="white", lw=0.6)
    axes.set(aspect="equal")
    axes.invert_yaxis()


def name_kinds(axes: Axes, kinds: Sequence[str] = KINDS, y: float = 1.0) -> None:
    """Add a legend of kinds of slots above the axes, which are 1 high."""
    boxes = [Patch(fc=COLOURS[kind], ec=INK, lw=0.6, label=kind) for kind in kinds]
    axes.legend(
        handles=boxes,
        loc="lower center",
        bbox_to_anchor=(0.5, y),
        ncols=len(kinds),
        frameon=False,
        fontsize=9,
    )


def check_law(law: str) -> None:
    """Run one property of the suite on a few random cases, and raise an error if it fails.

    It is the shell's `HYPOTHESIS_PROFILE=quick pytest LAW`, called in the repository's folder.

    Args:
        law: as pytest names it, for example "parity/test_rows.py::test_sequences_alike_share_one_row".
    """
    command = [sys.executable, "-m", "pytest", "-q", law]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"HYPOTHESIS_PROFILE": "quick"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise AssertionError(f"{law} fails:\n{result.stdout}{result.stderr}")
    cases = next(line.split()[1] for line in result.stdout.splitlines() if line.startswith("test_"))
    print(f"{law}\nholds in {cases} random cases.")
