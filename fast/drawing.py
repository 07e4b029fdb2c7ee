"""How pictures look: one style, and colours that colour-blind readers can tell apart."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import atomic_write

__all__ = ["COLOURS", "save_figure", "style"]

COLOURS = {
    "global memory": "#0072B2",
    "temporary memory": "#E69F00",
    "text": "#DDDDDD",
    "compression": "#F0C766",
    "readout": "#56B4E9",
    "other": "#D55E00",
    "ink": "#333333",
}
"""What a colour stands for, in every picture. They are Okabe and Ito's, and two greys."""

STYLE: dict[Any, Any] = {
    "axes.edgecolor": COLOURS["ink"],
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10.5,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 150,
}


@contextmanager
def style(name: str = "picture") -> Iterator[Any]:
    """Pyplot of matplotlib, with our style as long as the block lasts.

    Args:
        name: of the picture, so that an SVG file is the same every time.
    """
    import matplotlib as mpl  # of the extra `commands`

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        yield plt


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure, as PNG or SVG without a date, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    drawn, kind = io.BytesIO(), path.suffix.removeprefix(".")
    figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
    atomic_write(path, drawn.getvalue())
    return path
