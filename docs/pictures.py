"""Draws the pictures of the README and of the site: `make pictures`, or with names, only those."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch, Rectangle

from fast import CoMeTModel, watch
from fast.bench import report as bench_report
from fast.drawing import COLOURS, save_figure, style
from fast.tasks import memories_report, passkey, passkey_diagnosis, passkey_report

HERE = Path(__file__).parent
IMAGES = HERE / "images"

INK = COLOURS["ink"]
KINDS = {
    "G": COLOURS["global memory"],
    "T": COLOURS["temporary memory"],
    "H": COLOURS["text"],
    "C": COLOURS["compression"],
    "R": COLOURS["readout"],
}
"""The colour of a slot, by its letter."""


def draw_slot(axes: Axes, x: float, y: float, kind: str, side: float = 0.78) -> None:
    """A square of a kind's colour, its lower left corner at a point."""
    axes.add_patch(Rectangle((x, y), side, side, fc=KINDS[kind], ec=INK, linewidth=0.6))


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
    axes.text((left + right) / 2, y, text, ha="center", va="center")


def draw_arrow(axes: Axes, *points: tuple[float, float], colour: str) -> None:
    """A line through points, an arrow head at the last."""
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, solid_capstyle="butt")
    axes.annotate(
        "",
        points[-1],
        points[-2],
        arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "lw": 1.4},
    )


def draw_grid(plt: Any) -> Any:
    """Layers up, chunks to the right: text goes up, memory goes sideways."""
    figure, axes = plt.subplots(figsize=(8, 4.9), layout="constrained")
    layers, chunks, wide, high = 3, 4, 2.1, 1.2
    for t in range(chunks):
        x = 3.7 * t
        middle = x + wide / 2
        for token in range(4):
            draw_slot(axes, x + 0.12 + 0.48 * token, -1.45, "H", 0.4)
        axes.text(middle, -1.7, f"chunk {t}", ha="center", va="top")
        for i in range(layers):
            y = 2.1 * i
            draw_arrow(axes, (middle, y - 0.9 - 0.15 * (i == 0)), (middle, y), colour=INK)
            axes.add_patch(Rectangle((x, y), wide, high, fc="white", ec=INK, lw=1.2))
            axes.text(middle, y + high / 2, f"layer {i}", ha="center", va="center")
            for kind, at in (("temporary memory", 0.82), ("global memory", 0.38)):
                start = x + wide, y + at
                draw_arrow(axes, start, (start[0] + 1.6, start[1]), colour=COLOURS[kind])
        top = 2.1 * (layers - 1) + high
        draw_arrow(axes, (middle, top), (middle, top + 0.9), colour=INK)
        axes.text(middle, top + 1.0, "predictions", ha="center", va="bottom")
    for i in range(layers):
        axes.text(3.7 * chunks + 0.15, 2.1 * i + 0.6, "...", va="center")
    words = "the first\nchunk has\nno memory"
    axes.text(-0.35, 2.1 + 0.6, words, ha="right", va="center", style="italic")
    first, last = -2.9, 3.7 * chunks - 1.6
    draw_arrow(axes, (first, -1.2), (first, top + 0.9), colour=INK)
    axes.text(first - 0.2, 2.5, "text goes up", ha="right", va="center", rotation=90)
    draw_arrow(axes, (0, -3.0), (last, -3.0), colour=INK)
    axes.text(last / 2, -3.15, "memory goes sideways, layer by layer", ha="center", va="top")
    for at, (kind, words) in enumerate(
        (
            ("temporary memory", "temporary memory: a queue of recent detail"),
            ("global memory", "global memory: slots that a gate keeps or renews"),
        )
    ):
        y = top + 3.3 - 0.8 * at
        draw_arrow(axes, (0, y), (1.3, y), colour=COLOURS[kind])
        axes.text(1.6, y, words, va="center")
    axes.set(xlim=(first - 0.9, 3.7 * chunks + 0.7), ylim=(-3.9, top + 3.7))
    axes.axis("off")
    return figure


PARTS = ("GGG", "TTTT", "HHHHCHHHHCHHHHC", "RRR")
"""One row: global and temporary memory, text with compression tokens, readout tokens."""

NAMES = {
    "G": "global\nmemory",
    "T": "temporary\nmemory",
    "H": "text, and a compression token\nafter every s tokens",
    "R": "readout\ntokens",
}


def draw_row(axes: Axes, y: float) -> dict[str, list[float]]:
    """One row of slots from x = 0; returns the middles of each kind's slots."""
    x = 0.0
    middles: dict[str, list[float]] = {}
    for part in PARTS:
        for kind in part:
            draw_slot(axes, x, y, kind)
            middles.setdefault(kind, []).append(x + 0.39)
            x += 0.9
        x += 0.6
    return middles


def draw_memory(
    axes: Axes, middle: float, box: float, y: float, rows: tuple[float, float], colour: str
) -> None:
    """Arrows from a memory's slots in the first row into a box, and out of it to the second row."""
    now, then = rows
    enters, leaves = middle + 0.3, middle - 0.3
    draw_arrow(axes, (enters, now), (enters, y + 0.25), (box, y + 0.25), colour=colour)
    draw_arrow(axes, (box, y - 0.25), (leaves, y - 0.25), (leaves, then + 0.8), colour=colour)


def draw_rows(plt: Any) -> Any:
    """Two rows of one layer, and how the first one's memories reach the second one."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    now, then = 5.6, 0.0
    slots = draw_row(axes, now)
    draw_row(axes, then)
    middle = {kind: (at[0] + at[-1]) / 2 for kind, at in slots.items()}
    for kind, name in NAMES.items():
        axes.text(middle[kind], now + 1.1, name, ha="center", va="bottom")
    for y, name in ((now, "chunk t"), (then, "chunk t + 1")):
        axes.text(-0.6, y + 0.4, name, ha="right", va="center")

    queue, gate = 4.0, 2.2
    left, right = slots["H"][0] - 0.4, slots["C"][-1] + 0.4
    colour = KINDS["T"]
    draw_box(axes, left, right, queue, "queue: the newest B entries stay", colour)
    for x in slots["C"]:
        draw_arrow(axes, (x, now), (x, queue + 0.6), colour=colour)
    draw_memory(axes, middle["T"], left - 0.1, queue, (now, then), colour)

    last = slots["R"][-1] + 0.4
    colour = KINDS["G"]
    draw_box(axes, left, last, gate, "gate:  g · old + (1 - g) · new", colour)
    for x in slots["R"]:
        draw_arrow(axes, (x, now), (x, gate + 0.6), colour=colour)
    draw_memory(axes, middle["G"], left - 0.1, gate, (now, then), colour)

    axes.set(xlim=(-4.4, last + 0.3), ylim=(then - 0.2, now + 3.0))
    axes.axis("off")
    return figure


GROUP, NEW, MEMORY = 2, 24, 40
"""Query heads of a key head, new slots, and slots of the row before them."""

TILE_ROWS, WARP_ROWS, LANES = 16, 4, 32
"""Of the attention kernel: rows of a block, rows of a warp, and keys of a tile."""


def draw_blocks(plt: Any) -> Any:
    """What the blocks, warps and lanes of the attention kernel take of the scores."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    rows, keys, block = GROUP * NEW, MEMORY + NEW, 1
    for row in range(rows):  # what a row sees: every key up to its own slot
        seen = MEMORY + row % NEW + 1
        axes.add_patch(Rectangle((0, row), seen, 1, fc=COLOURS["text"], lw=0))
    top = block * TILE_ROWS
    for number in range(TILE_ROWS // WARP_ROWS):
        y, colour = top + number * WARP_ROWS, KINDS["R" if number % 2 else "G"]
        axes.add_patch(Rectangle((0, y), keys, WARP_ROWS, fc=colour, alpha=0.45, lw=0))
        axes.text(keys + 1, y + 2, f"warp {number}", va="center")
    for y in range(0, rows + 1, TILE_ROWS):
        axes.plot([0, keys], [y, y], color=INK, lw=1.6)
    for x in range(0, keys + 1, LANES):
        axes.plot([x, x], [0, rows], color=INK, lw=0.8, ls=(0, (4, 3)))
    for number in range(rows // TILE_ROWS):
        y = (number + 0.5) * TILE_ROWS
        axes.text(-1, y, f"block {number}\n16 rows", ha="right", va="center")
    for number in range(keys // LANES):
        x, name = (number + 0.5) * LANES, f"tile {number}: 32 keys, a lane each"
        axes.text(x, -1, name, ha="center", va="bottom")
    for head in range(GROUP):
        y, name = (head + 0.5) * NEW, f"query head {head}\n{NEW} new slots"
        axes.text(keys + 17, y, name, ha="center", va="center")
        edges = [head * NEW + 0.4, (head + 1) * NEW - 0.4]
        axes.plot([keys + 10.5] * 2, edges, color=INK, lw=0.8)
    draw_arrow(axes, (2, top + 8), (keys - 3, top + 8), colour=KINDS["T"])
    words = "a block goes over the tiles, with a running maximum and sum for each row"
    axes.text(2, top + 5.6, words, fontsize=9)
    axes.text(MEMORY / 2, rows + 1.2, "memory, and what the chunk has read", ha="center", va="top")
    axes.text(MEMORY + NEW / 2, rows + 1.2, "new slots", ha="center", va="top")
    axes.plot([MEMORY] * 2, [rows, rows + 1.5], color=INK, lw=0.8)
    axes.set(xlim=(-9, keys + 24), ylim=(rows + 4, -4))
    axes.axis("off")
    return figure


CHUNKS, ENTRIES, QUEUE = 12, 4, 10
"""Chunks of the picture of memories, entries that each makes, and entries that a queue holds."""


def held_by_queue() -> np.ndarray:
    """[chunk that is read, chunk of origin]: share of the origin's entries in the queue."""
    age = np.subtract.outer(np.arange(1, CHUNKS + 1), np.arange(CHUNKS))  # 1: the chunk before
    return np.where(age > 0, np.clip(QUEUE / ENTRIES - (age - 1), 0, 1), 0)


def held_by_slot(gates: np.ndarray) -> np.ndarray:
    """[chunk that is read, chunk of origin]: share of the slot's content, with a gate a chunk."""
    share, rows = np.zeros(CHUNKS), []
    for t, gate in enumerate(gates):
        new = np.eye(CHUNKS)[t]
        share = new if t == 0 else gate * share + (1 - gate) * new
        rows.append(share)
    return np.array(rows)


def draw_memories(plt: Any) -> Any:
    """What the two memories hold of earlier chunks, while chunk after chunk is read."""
    half = np.full(CHUNKS, 0.5)
    shut = np.where(np.arange(CHUNKS) == 3, 0.0, 1.0)
    panels = (
        ("queue of 10 entries,\n4 from each chunk", "T", held_by_queue()),
        ("global slot, its gate\nalways half open (g = 0.5)", "G", held_by_slot(half)),
        ("global slot, its gate open\nfor chunk 3, then shut", "G", held_by_slot(shut)),
    )
    figure, all_axes = plt.subplots(
        1, 3, figsize=(8, 3.3), layout="constrained", sharey=True, sharex=True
    )
    for axes, (title, kind, held) in zip(all_axes, panels, strict=True):
        colours = LinearSegmentedColormap.from_list(kind, ["#F4F4F4", KINDS[kind]])
        image = axes.imshow(
            held.T, cmap=colours, vmin=0, vmax=1, origin="lower", extent=(0.5, 12.5, -0.5, 11.5)
        )
        axes.set(title=title, xlabel="while this chunk is read")
        axes.set(xticks=range(1, CHUNKS + 1, 2), yticks=range(0, CHUNKS, 2))
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.9, aspect=30)
        words = "share of its entries held" if kind == "T" else "share of the slot"
        bar.set_label(words)
        bar.set_ticks([0, 0.5, 1], labels=["none", "half", "all"])
    all_axes[0].set_ylabel("held from this chunk")
    return figure


def draw_gate(plt: Any) -> Any:
    """What is left of a slot after many chunks, for gates that are nearly shut."""
    figure, axes = plt.subplots(figsize=(8, 3.3), layout="constrained")
    chunks = np.geomspace(1, 8192, 400)
    for gate, line, at in ((0.9, ":", 6), (0.99, "-.", 62), (0.999, "--", 620)):
        axes.plot(chunks, gate**chunks, line, color=COLOURS["other"])
        axes.text(at * 1.25, gate**at + 0.02, f"g = {gate}", color=COLOURS["other"])
    axes.plot(chunks, np.ones_like(chunks), color=COLOURS["global memory"])
    words = "g = 1, which only a saturation below 1 allows"
    axes.text(1.2, 1.03, words, color=COLOURS["global memory"])
    ticks = [1, 10, 100, 1000, 8192]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set(
        xlabel="chunks since the slot was written (8,192 chunks of 128 bytes: a million bytes)"
    )
    axes.set(ylabel="share that is left", xlim=(1, 8192), ylim=(0, 1.12))
    return figure


def draw_training(plt: Any) -> Any:
    """The loss of docs/training.md, whose code is run."""
    page = (HERE / "training.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)), names)
    often = names["text"].bincount(minlength=256) / len(names["text"])
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    axes.plot(names["losses"], color=COLOURS["global memory"])
    for loss, words in (
        (np.log(256), "every byte is as likely as any other"),
        (-float(often.xlogy(often).sum()), "knowing how often each byte occurs"),
    ):
        axes.axhline(loss, color=COLOURS["other"], linestyle="--", linewidth=1.2)
        axes.text(99, loss + 0.08, words, ha="right", color=COLOURS["other"])
    axes.set(xlabel="step, a window of 128 bytes of 16 texts", ylabel="loss, nats a byte")
    axes.set(xlim=(0, 99), ylim=(0, 6.2))
    return figure


def draw_lengths(path: Path) -> Path:
    """Seconds against length, from the table of docs/performance.md."""
    page = (HERE / "performance.md").read_text(encoding="utf-8")
    table = page.split("<!-- length -->\n")[1].split("\n<!-- end -->")[0]
    results: dict[str, dict[str, Any]] = {}
    for line in table.splitlines()[2:]:
        backbone, memory, tokens, ours, full, _ = (
            cell.strip().replace(",", "") for cell in line.strip("|").split("|")
        )
        if tokens.isdecimal():  # the others are fitted
            case = {"backbone": backbone, "memory": memory, "batch_size": 1}
            found = results.setdefault(backbone, {"section": "length", "case": case, "result": {}})
            speeds = {"ours": ours, "full attention": full}
            seconds = {name: [int(tokens) / int(speed)] for name, speed in speeds.items()}
            found["result"][tokens] = seconds
    bench_report.draw([*results.values()], path)
    return path


def draw_pipeline(plt: Any) -> Any:
    """What two workers did when, in the run that docs/pipeline.md tells how to record."""
    found = json.loads((HERE / "results" / "pipeline.json").read_text(encoding="utf-8"))
    spans = found["picture"]
    figure, axes = plt.subplots(figsize=(8, 2.9), layout="constrained")
    chunks = 1 + max(span["chunk"] for span in spans)
    shades = {
        kind: LinearSegmentedColormap.from_list(kind, ["#F4F4F4", KINDS[letter]])
        for kind, letter in (("forward", "G"), ("backward", "T"))
    }
    for span in spans:
        start, wide = 1000 * span["start"], 1000 * (span["end"] - span["start"])
        other = KINDS["R"] if span["kind"] == "head" else KINDS["H"]
        shade = shades.get(span["kind"])
        colour = other if shade is None else shade(0.35 + 0.65 * span["chunk"] / (chunks - 1))
        y = -span["worker"] - 0.38
        axes.add_patch(Rectangle((start, y), wide, 0.76, fc=colour, ec=INK, lw=0.4))
        if span["kind"] in shades:
            words = f"{span['chunk']}\n{span['layer']}"
            axes.text(start + wide / 2, y + 0.38, words, ha="center", va="center", fontsize=5.5)
    workers = 1 + max(span["worker"] for span in spans)
    axes.set_yticks(range(0, -workers, -1), [f"worker {j}" for j in range(workers)])
    end = 1000 * max(span["end"] for span in spans)
    axes.set(xlim=(0, 1.01 * end), ylim=(0.5 - workers, 1.1), xlabel="milliseconds")
    axes.grid(visible=False)
    patches = [
        Rectangle((0, 0), 1, 1, fc=colour, ec=INK, lw=0.4)
        for colour in (KINDS["G"], KINDS["T"], KINDS["R"], KINDS["H"])
    ]
    names = ["forward", "backward", "loss of a chunk", "sums over workers"]
    axes.legend(patches, names, loc="upper left", ncols=4, fontsize=8, title="in a cell: its chunk, "
                "and below it its layer", title_fontsize=8, alignment="left")  # fmt: skip
    return figure


PICTURES: dict[str, Callable[[Any], Any]] = {
    "grid": draw_grid,
    "rows": draw_rows,
    "memories": draw_memories,
    "gate": draw_gate,
    "training": draw_training,
    "blocks": draw_blocks,
    "pipeline": draw_pipeline,
}
"""SVG files by name: each function gets pyplot and returns a figure."""


def draw_watch(browser: str) -> Iterator[Path]:
    """The page of `python -m fast watch` at the chunk with the key and at the last one, as
    docs/watch.md makes it.
    """
    with tempfile.TemporaryDirectory() as folder:
        text, page = Path(folder, "key.txt"), Path(folder, "key.html")
        text.write_bytes(passkey.Example(length=1000, depth=0.4, seed=3).text())
        page.write_text(watch.watch(CoMeTModel.from_pretrained(passkey.SHIPPED), text))
        for name, chunk, height in (("watch_key", 4, 1430), ("watch_answer", 8, 610)):
            path = IMAGES / f"{name}.png"
            options = ["headless", "hide-scrollbars", f"window-size=900,{height}"]
            options += ["no-sandbox"] if os.geteuid() == 0 else []
            words = [f"--{option}" for option in (*options, f"screenshot={path}")]
            subprocess.run(
                [browser, *words, f"{page.as_uri()}#{chunk}"], check=True, capture_output=True
            )
            yield path


def main(names: list[str]) -> None:
    """Draw pictures, all where none is named."""
    for name, draw in PICTURES.items():
        if name in (names or PICTURES):
            with style(name) as plt:
                print(f"wrote {save_figure(draw(plt), IMAGES / f'{name}.svg')}")
    if "lengths" in (names or ["lengths"]):
        print(f"wrote {draw_lengths(IMAGES / 'lengths.svg')}")
    if "passkey" in (names or ["passkey"]):  # what `python -m fast eval passkey --out` measured
        for variant in sorted(passkey.VARIANTS):
            results, setting = passkey_report.load(HERE / "results" / f"{variant}.json")
            for path in passkey_report.draw(results, setting.variant, IMAGES):
                print(f"wrote {path}")
    if "passkey_diagnosis" in (
        names or ["passkey_diagnosis"]
    ):  # of `eval passkey --diagnose --out`
        found = passkey_diagnosis.load(HERE / "results" / "diagnosis_four_stages.json")
        print(f"wrote {passkey_diagnosis.draw(found, IMAGES / 'passkey_diagnosis.png')}")
    if "memories_whole" in (names or ["memories_whole"]):  # of `python -m fast eval memories --out`
        results, setting = memories_report.load(HERE / "results" / "memories_whole.json")
        print(f"wrote {memories_report.draw(results, setting, IMAGES / 'memories_whole.png')}")
    if "watch" in (names or ["watch"]):
        browser = shutil.which("chromium")
        if browser is None:
            sys.exit("The page of `watch` is shown by Chromium: run apt-get install chromium.")
        for path in draw_watch(browser):
            print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
