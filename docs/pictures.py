"""Draws docs/images/rows.svg, the picture of the README: `python docs/pictures.py`."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

PARTS = ("GGG", "TTTT", "HHHHCHHHHCHHHHC", "RRR")
"""One row: global and temporary memory, text with compression tokens, readout tokens."""

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {"G": "#0072B2", "T": "#E69F00", "H": "#DDDDDD", "C": "#F0C766", "R": "#56B4E9"}
NAMES = {
    "G": "global\nmemory",
    "T": "temporary\nmemory",
    "H": "text, and a compression token\nafter every s tokens",
    "R": "readout\ntokens",
}
HEIGHT = 1.0


def draw_row(axes: Axes, y: float) -> dict[str, list[float]]:
    """One row of slots from x = 0; returns the middles of each kind's slots."""
    x = 0.0
    middles: dict[str, list[float]] = {}
    for part in PARTS:
        for kind in part:
            axes.add_patch(
                Rectangle((x, y), 0.78, HEIGHT, fc=COLOURS[kind], ec="#333333", linewidth=0.6)
            )
            middles.setdefault(kind, []).append(x + 0.39)
            x += 0.9
        x += 0.6
    return middles


def draw_box(axes: Axes, left: float, right: float, y: float, text: str, colour: str) -> None:
    """A rounded box around y with its text in the middle."""
    axes.add_patch(
        FancyBboxPatch(
            (left, y - 0.5),
            right - left,
            1.0,
            boxstyle="round,pad=0.1",
            fc="white",
            ec=colour,
            lw=1.6,
        )
    )
    axes.text((left + right) / 2, y, text, ha="center", va="center", fontsize=9)


def draw_arrow(axes: Axes, *points: tuple[float, float], colour: str) -> None:
    """A line through points, an arrow head at the last."""
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, solid_capstyle="butt")
    axes.annotate(
        "",
        points[-1],
        points[-2],
        arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "lw": 1.4},
    )


def draw_rows(path: Path) -> None:
    """Two rows of one layer, and how the first one's memories reach the second one."""
    figure, axes = plt.subplots(figsize=(9.6, 3.6), layout="constrained")
    now, then = 5.6, 0.0
    slots = draw_row(axes, now)
    draw_row(axes, then)
    middle = {kind: (at[0] + at[-1]) / 2 for kind, at in slots.items()}
    for kind, name in NAMES.items():
        axes.text(middle[kind], now + 1.2, name, ha="center", va="bottom", fontsize=9)
    for y, name in ((now, "chunk t"), (then, "chunk t + 1")):
        axes.text(-0.6, y + 0.5, name, ha="right", va="center", fontsize=10)

    queue, gate = 4.0, 2.3
    left, right = slots["H"][0] - 0.4, slots["C"][-1] + 0.4
    draw_box(axes, left, right, queue, "FIFO queue: the newest B entries stay", COLOURS["T"])
    for x in slots["C"]:
        draw_arrow(axes, (x, now), (x, queue + 0.6), colour=COLOURS["T"])
    x = middle["T"]
    draw_arrow(axes, (left - 0.1, queue), (x, queue), (x, then + HEIGHT), colour=COLOURS["T"])

    last = slots["R"][-1] + 0.4
    text = "gated update:  S  ←  g · S + (1 - g) · candidate"
    draw_box(axes, left, last, gate, text, COLOURS["G"])
    for x in slots["R"]:
        draw_arrow(axes, (x, now), (x, gate + 0.6), colour=COLOURS["G"])
    x = middle["G"]
    draw_arrow(axes, (left - 0.1, gate), (x, gate), (x, then + HEIGHT), colour=COLOURS["G"])

    axes.set(xlim=(-4.0, last + 0.3), ylim=(then - 0.2, now + 2.6))
    axes.axis("off")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "rows"  # the same file every time
    draw_rows(Path(__file__).parent / "images" / "rows.svg")
