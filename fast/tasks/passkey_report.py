"""Measuring the pass key: found or not, speed and memory by length; a table and pictures."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference.parameters import named_parameters, shapes

from ..checkpoints import load_checkpoint
from ..cupy_engine.libraries import import_library
from ..drawing import COLOURS, save_figure, style
from ..files import check_writable
from ..machine import keep_memory, machine, peak_memory
from . import passkey
from .results import load_results, save_results

__all__ = [
    "Measured",
    "Part",
    "Setting",
    "check",
    "collect",
    "demo",
    "draw",
    "footer",
    "join_parts",
    "load",
    "lower_bound",
    "measure",
    "save",
    "table",
]

DEPTHS = tuple(i / 10 for i in range(11))
"""Where in a text the key is hidden: from its start to its end."""

LENGTHS = (1024, 4096, 16384, 65536, 262144, 1048576)
"""Bytes of the demo's texts."""


@dataclass(frozen=True)
class Setting:
    """What to measure: everything that the result depends on, but for the machine."""

    variant: str = "published"
    """"published" or "prose"."""

    keys: int = 1
    """Keys a depth, each in a text of its own."""

    tails: bool = False
    """Whether each text is shorter by 0 to a chunk less one byte, at random, so that the question
    meets chunk borders anywhere."""

    seed: int = 1
    """Of keys and texts."""

    processes: int | None = None
    """To share the depths among, of one thread each; None is one a core. They change no key."""

    model: str | None = None
    """A checkpoint's folder; None is the shipped model."""

    engine: str | None = None
    """"cupy" or "numpy": the engine on arrays of that library; None is PyTorch's model."""

    haystack: str | None = None
    """A text file for the prose variant; None is the built-in text's test split."""

    dtype: str | None = None
    """"bfloat16" for instance, to compute in; None is the checkpoint's."""

    @property
    def shares(self) -> int:
        """Processes that get a depth."""
        affinity = getattr(os, "sched_getaffinity", None)  # a container may have fewer cores
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return min(self.processes or cores, len(DEPTHS))


@dataclass(frozen=True)
class Measured:
    """One length, all depths."""

    length: int
    """Bytes of the texts; with tails, of the longest."""

    found: list[int]
    """Keys found at each depth."""

    keys: int
    """Keys tried at each depth."""

    tokens_per_second: float
    """Text read by all processes, from when all have loaded the model to when the last is done."""

    peak_bytes: int
    """Largest resident set of any one process, interpreter and libraries included."""

    @property
    def right(self) -> int:
        """Keys found."""
        return sum(self.found)

    @property
    def trials(self) -> int:
        """Keys tried."""
        return self.keys * len(self.found)


@dataclass(frozen=True)
class Part:
    """What one process found out."""

    found: list[int]
    """Keys found at each of its depths."""

    bytes_read: int
    """Text, in bytes."""

    start: float
    end: float
    """Seconds on the machine's clock."""

    peak_bytes: int
    """Largest resident set of the process."""


def lower_bound(right: int, trials: int, confidence: float = 0.95) -> float:
    """The share of keys found is at least this, with a given confidence.

    The exact one-sided bound of Clopper and Pearson: the share p at which so many successes or
    more have probability 1 - confidence.

    Args:
        right: successes.
        trials: tries, at least one.
        confidence: of the bound.

    Returns:
        A share in [0, 1].
    """
    if right == 0:
        return 0.0

    def chance(k: int, p: float) -> float:
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        return math.exp(ways + k * math.log(p) + (trials - k) * math.log1p(-p))

    low, high = 0.0, right / trials
    for _ in range(60):
        p = (low + high) / 2
        tail = math.fsum(chance(k, p) for k in range(right, trials + 1))
        low, high = (p, high) if tail < 1 - confidence else (low, p)
    return low


_all_loaded: Barrier
"""Where the processes of a length wait until all have loaded the model."""


def _set_up(barrier: Barrier) -> None:
    """In each process, before it measures: a barrier cannot be sent to a running one.

    One thread a process: threads of one process wait for each other at every operation, and on a
    busy machine that costs more than the work.
    """
    global _all_loaded
    _all_loaded = barrier
    torch.set_num_threads(1)
    keep_memory()


def _measure_part(setting: Setting, length: int, part: int) -> Part:
    """Every `shares`th depth from the `part`th on, in a process of its own."""
    model = passkey.load_model(setting.model, setting.engine, setting.dtype)
    haystack = passkey.read_haystack(setting.haystack) if setting.variant == "prose" else None
    rng = np.random.default_rng([setting.seed, length])
    mine = slice(part, None, setting.shares)
    found = np.zeros(len(DEPTHS[mine]), dtype=np.int64)
    read = 0
    _all_loaded.wait(timeout=300)
    start = time.time()
    for _ in range(setting.keys):
        size = length - int(rng.integers(model.config.memory.chunk_size)) * setting.tails
        seeds = rng.integers(2**62, size=len(DEPTHS)).tolist()
        examples = [
            passkey.Example(size, depth, seed, haystack)
            for depth, seed in zip(DEPTHS[mine], seeds[mine], strict=True)
        ]
        found += passkey.found(model, examples)
        read += size * len(examples)
    return Part(found.tolist(), read, start, time.time(), peak_memory())


def join_parts(parts: Sequence[Part], length: int, keys: int) -> Measured:
    """The parts of one length as one result: part i has the depths i, i + n, i + 2n, ..."""
    found = [parts[i % len(parts)].found[i // len(parts)] for i in range(len(DEPTHS))]
    seconds = max(part.end for part in parts) - min(part.start for part in parts)
    speed = sum(part.bytes_read for part in parts) / seconds
    return Measured(length, found, keys, speed, max(part.peak_bytes for part in parts))


def measure(lengths: Sequence[int], setting: Setting) -> Iterator[Measured]:
    """Hide keys at every depth of texts of every length, and ask for them.

    Args:
        lengths: bytes of the texts.
        setting: what else to measure. A process reads its depths side by side.

    Yields:
        One result a length, one after another, in new processes each.

    Raises:
        BrokenProcessPool: a process was killed, for want of memory perhaps.
    """
    from tqdm import tqdm  # of the extra `commands`

    context = multiprocessing.get_context("spawn")
    # NumPy's products read these when it is imported, in the new processes.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    for length in tqdm(lengths, desc=setting.variant, unit="length"):
        with ProcessPoolExecutor(
            setting.shares, context, _set_up, (context.Barrier(setting.shares),)
        ) as pool:
            jobs = [pool.submit(_measure_part, setting, length, i) for i in range(setting.shares)]
            parts = [job.result() for job in jobs]
        yield join_parts(parts, length, setting.keys)


def check(lengths: Sequence[int], setting: Setting, folder: Path | None, name: str) -> None:
    """Raise unless keys can be hidden in such texts, the model reads bytes, and the results can be
    written, before hours of measuring.

    Args:
        lengths: bytes of the texts.
        setting: what is to be measured.
        folder: of the results and pictures; None writes none.
        name: of the results' file.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a text is too short for the task, or the model's vocabulary is not bytes.
    """
    if setting.engine is not None:
        import_library(setting.engine)
    config, _ = load_checkpoint(Path(setting.model or passkey.SHIPPED), "np")
    if config.backbone.vocab_size != 256:
        raise ValueError(
            f"the model has a vocabulary of {config.backbone.vocab_size}; a byte-level one has 256."
        )
    if setting.haystack is not None:
        passkey.read_haystack(setting.haystack)
    for length in lengths:
        shortest = length - (config.memory.chunk_size - 1) * setting.tails
        passkey.check_length(shortest)
    if folder is not None:
        pictures = (f"passkey_{setting.variant}{part}.png" for part in ("", "_cost"))
        for file in (f"{name}.json", *pictures):
            check_writable(folder / file)


def footer(setting: Setting) -> str:
    """Machine, processes and versions, for the foot of a table."""
    return machine(f"{setting.shares} processes of one thread")


def table(results: Sequence[Measured], variant: str) -> str:
    """A Markdown table: length, keys found, the bound, speed, memory."""
    lines = [
        "| variant | length (bytes) | found | at least (95 %) | tokens/s | peak memory (MB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        bound = 100 * lower_bound(r.right, r.trials)
        lines.append(
            f"| {variant} | {r.length:,} | {r.right}/{r.trials} | {bound:.1f} % | "
            f"{r.tokens_per_second:,.0f} | {r.peak_bytes / 1e6:.1f} |"
        )
    return "\n".join(lines)


def save(results: Sequence[Measured], setting: Setting, path: Path) -> None:
    """Write results, the setting, and the machine, as JSON."""
    save_results(path, footer(setting), setting, results)


def load(path: Path) -> tuple[list[Measured], Setting]:
    """Results and their setting, as `save` wrote them; errors are those of `load_results`."""
    return load_results(path, Measured, Setting)


def collect(lengths: Sequence[int], setting: Setting, path: Path | None) -> list[Measured]:
    """`measure`, with the results so far in a file (see `save`) after each length."""
    results: list[Measured] = []
    for result in measure(lengths, setting):
        results.append(result)
        if path is not None:
            save(results, setting, path)
    return results


def draw(results: Sequence[Measured], variant: str, folder: Path) -> list[Path]:
    """A heat map of length by depth, and time and memory against length.

    Args:
        results: two lengths or more.
        variant: that they are of.
        folder: made where it does not exist.

    Returns:
        The PNG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [r.length for r in results]
    labels = [f"{n // 1024}k" if n < 2**20 else f"{n // 2**20}M" for n in lengths]
    with style() as plt:
        figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
        keys = results[0].keys
        lost = keys - np.array([r.found for r in results]).T
        _heat_map(axes, lost, keys)
        axes.set_xticks(range(len(lengths)), labels)
        axes.set_yticks(range(len(DEPTHS)), [f"{d:.0%}" for d in DEPTHS])
        axes.set(xlabel="length of the text (bytes)", ylabel="depth of the key")
        trials = lost.size * keys
        axes.set_title(f"Pass keys found, {variant} task: {trials - lost.sum()} of {trials}")
        heat = save_figure(figure, folder / f"passkey_{variant}.png")

        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        seconds = [len(DEPTHS) * r.length / r.tokens_per_second for r in results]
        left.loglog(lengths, seconds, "o-", color=COLOURS["global memory"])
        left.set(xlabel="length (bytes)", ylabel="seconds for 11 texts", title="Time is linear")
        peaks = [r.peak_bytes / 1e6 for r in results]
        right.semilogx(lengths, peaks, "o-", color=COLOURS["global memory"])
        right.set(xlabel="length (bytes)", ylabel="peak of a process (MB)", title="Memory is flat")
        right.set_ylim(0, 1.25 * max(peaks))
        for axis in (left, right):
            axis.set_xticks(lengths, labels)
            axis.minorticks_off()
        return [heat, save_figure(figure, folder / f"passkey_{variant}_cost.png")]


def _heat_map(axes: Any, lost: np.ndarray, keys: int) -> None:
    """Keys lost, [depth, length]: a field without a loss is pale, so that a single loss is seen."""
    import matplotlib as mpl  # of the extra `commands`
    from matplotlib.colors import BoundaryNorm, ListedColormap

    worst = min(keys, max(2, int(lost.max())))  # the scale ends where the losses do
    colours = ["#F4F4F4", *mpl.colormaps["YlOrBr"](np.linspace(0.35, 0.95, worst))]
    norm = BoundaryNorm(np.arange(worst + 2) - 0.5, worst + 1)
    image = axes.imshow(lost, cmap=ListedColormap(colours), norm=norm, aspect="auto")
    for (y, x), number in np.ndenumerate(lost):
        colour = ("white" if 2 * number > worst else "black") if number else "#777777"
        words = f"{keys - number}/{keys}"
        axes.text(x, y, words, ha="center", va="center", fontsize=8, color=colour)
    axes.grid(visible=False)
    axes.set_xticks(np.arange(1, lost.shape[1]) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, lost.shape[0]) - 0.5, minor=True)
    axes.grid(which="minor", color="white", alpha=1)
    axes.tick_params(which="minor", length=0)
    step = -(-worst // 5)
    axes.figure.colorbar(image, ax=axes, label="keys lost", ticks=range(0, worst + 1, step))


def demo(folder: Path, lengths: Sequence[int] = LENGTHS, processes: int | None = None) -> None:
    """The main job: keys in texts up to a million bytes, found in flat memory; prints and draws.

    Args:
        folder: where the pictures and the results go.
        lengths: bytes of the texts.
        processes: see `Setting`.
    """
    setting = Setting(processes=processes)
    results = collect(lengths, setting, folder / "demo.json")
    print()
    print("depth " + "".join(f"{r.length:>11,}" for r in results))
    for row, depth in enumerate(DEPTHS):
        marks = ("found" if r.found[row] else "NOT FOUND" for r in results)
        print(f"{depth:>5.0%} " + "".join(f"{mark:>11}" for mark in marks))
    print()
    print(table(results, setting.variant))
    print(f"\n{footer(setting)}")
    for path in draw(results, setting.variant, folder):
        print(f"wrote {path}")
    right, trials = sum(r.right for r in results), sum(r.trials for r in results)
    first, last = results[min(2, len(results) - 1)], results[-1]
    config = passkey.load_model().config
    parameters = sum(math.prod(shape) for shape in named_parameters(shapes(config)).values())
    print(
        f"\nShown: a model of {parameters:,} parameters, trained with gradients through at most 4,096 bytes, "
        f"gave back {right} of {trials} keys hidden at 11 depths of texts of {lengths[0]:,} to "
        f"{last.length:,} bytes, and its peak memory at {last.length:,} bytes is "
        f"{last.peak_bytes / first.peak_bytes - 1:+.1%} of that at {first.length:,}."
    )
