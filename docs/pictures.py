"""Draws pictures of the README and of docs/gpu.md: `python docs/pictures.py`."""

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


GROUP, NEW, MEMORY = 2, 24, 40
"""Query heads of a key head, new slots, and slots of the row before them."""

TILE_ROWS, WARP_ROWS, LANES = 16, 4, 32
"""Of the attention kernel: rows of a block, rows of a warp, and keys of a tile."""


def draw_blocks(path: Path) -> None:
    """What the blocks, warps and lanes of the attention kernel take of the scores."""
    figure, axes = plt.subplots(figsize=(9.6, 5.0), layout="constrained")
    rows, keys, block = GROUP * NEW, MEMORY + NEW, 1
    for row in range(rows):  # what a row sees: every key up to its own slot
        seen = MEMORY + row % NEW + 1
        axes.add_patch(Rectangle((0, row), seen, 1, fc=COLOURS["H"], lw=0))
    top = block * TILE_ROWS
    for number in range(TILE_ROWS // WARP_ROWS):
        y, colour = top + number * WARP_ROWS, COLOURS["R" if number % 2 else "G"]
        axes.add_patch(Rectangle((0, y), keys, WARP_ROWS, fc=colour, alpha=0.45, lw=0))
        axes.text(keys + 1, y + 2, f"warp {number}", va="center", fontsize=9)
    for y in range(0, rows + 1, TILE_ROWS):
        axes.plot([0, keys], [y, y], color="#333333", lw=1.6)
    for x in range(0, keys + 1, LANES):
        axes.plot([x, x], [0, rows], color="#333333", lw=0.8, ls=(0, (4, 3)))
    for number in range(rows // TILE_ROWS):
        y = (number + 0.5) * TILE_ROWS
        axes.text(-1, y, f"block {number}\n16 rows", ha="right", va="center", fontsize=9)
    for number in range(keys // LANES):
        x, name = (number + 0.5) * LANES, f"tile {number}: 32 keys, a lane each"
        axes.text(x, -1, name, ha="center", va="bottom", fontsize=9)
    for head in range(GROUP):
        y, name = (head + 0.5) * NEW, f"query head {head}\n{NEW} new slots"
        axes.text(keys + 15, y, name, ha="center", va="center", fontsize=9)
        edges = [head * NEW + 0.4, (head + 1) * NEW - 0.4]
        axes.plot([keys + 9.5] * 2, edges, color="#333333", lw=0.8)
    draw_arrow(axes, (2, top + 8), (keys - 3, top + 8), colour=COLOURS["T"])
    words = "a block goes over the tiles, with a running maximum and sum for each row"
    axes.text(2, top + 5.6, words, fontsize=9)
    x = MEMORY / 2
    axes.text(
        x, rows + 1.2, "memory, and what the chunk has read", ha="center", va="top", fontsize=9
    )
    axes.text(MEMORY + NEW / 2, rows + 1.2, "new slots", ha="center", va="top", fontsize=9)
    axes.plot([MEMORY] * 2, [rows, rows + 1.5], color="#333333", lw=0.8)
    axes.set(xlim=(-9, keys + 21), ylim=(rows + 4, -4))
    axes.axis("off")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    images = Path(__file__).parent / "images"
    for name, draw in (("rows", draw_rows), ("blocks", draw_blocks)):
        mpl.rcParams["svg.hashsalt"] = name  # the same file every time
        draw(images / f"{name}.svg")
