"""Measuring the pass key: found or not, speed and memory by length; a table and pictures."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..files import atomic_write
from ..model import CoMeTModel
from . import passkey

__all__ = ["Measured", "demo", "draw", "lower_bound", "machine", "measure", "table"]

DEPTHS = tuple(i / 10 for i in range(11))
"""Where in a text the key is hidden: from its start to its end."""

LENGTHS = (1024, 4096, 16384, 65536, 262144, 1048576)
"""Bytes of the demo's texts."""


@dataclass(frozen=True)
class Measured:
    """One length, all depths."""

    variant: str
    """"published" or "prose"."""

    length: int
    """Bytes of the texts; with tails, of the longest."""

    found: list[int]
    """Keys found at each depth."""

    keys: int
    """Keys tried at each depth."""

    tokens_per_second: float
    """Text read, all sequences and processes together, the model loaded."""

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
class Job:
    """What one process measures: every `of`th depth from the `part`th on."""

    variant: str
    length: int
    keys: int
    tails: bool
    seed: int
    part: int
    of: int
    model: str | None
    haystack: str | None


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
    low, high = 0.0, right / trials
    for _ in range(60):
        p = (low + high) / 2
        tail = math.fsum(
            math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(right, trials + 1)
        )
        low, high = (p, high) if tail < 1 - confidence else (low, p)
    return low


def _measure(job: Job) -> Measured:
    """One process's part, in a process of its own so that its peak memory is its own.

    One thread a process: threads of one process wait for each other at every operation, and on a
    busy machine that costs more than the work.
    """
    torch.set_num_threads(1)
    folder = None if job.model is None else Path(job.model)
    model = passkey.load_model() if folder is None else CoMeTModel.from_pretrained(folder)
    haystack = passkey.read_haystack(job.haystack) if job.variant == "prose" else None
    rng = np.random.default_rng([job.seed, job.length])
    mine = slice(job.part, None, job.of)
    found = np.zeros(len(DEPTHS[mine]), dtype=np.int64)
    read, seconds = 0, 0.0
    for _ in range(job.keys):
        # A random tail, so that the question meets chunk borders anywhere.
        length = job.length - int(rng.integers(model.config.memory.chunk_size)) * job.tails
        seeds = rng.integers(2**62, size=len(DEPTHS)).tolist()
        examples = [
            passkey.Example(length, depth, seed, haystack)
            for depth, seed in zip(DEPTHS[mine], seeds[mine], strict=True)
        ]
        start = time.perf_counter()
        found += passkey.found(model, examples)
        seconds += time.perf_counter() - start
        read += length * len(examples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return Measured(job.variant, job.length, found.tolist(), job.keys, read / seconds, peak)


def measure(
    lengths: Sequence[int],
    variant: str = "published",
    keys: int = 1,
    *,
    tails: bool = False,
    seed: int = 1,
    processes: int | None = None,
    model: str | None = None,
    haystack: str | None = None,
) -> list[Measured]:
    """Hide keys at every depth of texts of every length, and ask for them.

    Args:
        lengths: bytes of the texts.
        variant: "published" or "prose".
        keys: keys a depth, each in a text of its own; a process reads its depths side by side.
        tails: shorten each text by 0 to a chunk less one byte, at random.
        seed: of keys and texts.
        processes: to share the depths among, of one thread each; None is one a core.
        model: a checkpoint's folder; None is the shipped model.
        haystack: a text file for the prose variant; None is the built-in text's test split.

    Returns:
        One result a length, measured one after another, in new processes each.
    """
    of = min(processes or os.cpu_count() or 1, len(DEPTHS))
    results = []
    context = multiprocessing.get_context("spawn")
    for length in tqdm(lengths, desc=variant, unit="length"):
        jobs = [
            Job(variant, length, keys, tails, seed, part, of, model, haystack) for part in range(of)
        ]
        with context.Pool(of, maxtasksperchild=1) as pool:
            parts = pool.map(_measure, jobs, chunksize=1)
        found = [parts[depth % of].found[depth // of] for depth in range(len(DEPTHS))]
        speed = sum(part.tokens_per_second for part in parts)
        peak = max(part.peak_bytes for part in parts)
        results.append(Measured(variant, length, found, keys, speed, peak))
    return results


def machine(processes: int | None = None) -> str:
    """Processor, processes and versions, for the foot of a table."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return (
        f"{name}, {processes or os.cpu_count()} processes of one thread, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def table(results: Sequence[Measured]) -> str:
    """A Markdown table: length, keys found, the bound, speed, memory."""
    lines = [
        "| variant | length (bytes) | found | at least (95 %) | tokens/s | peak memory of a process (MB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        bound = 100 * lower_bound(r.right, r.trials)
        lines.append(
            f"| {r.variant} | {r.length:,} | {r.right}/{r.trials} | {bound:.1f} % | "
            f"{r.tokens_per_second:,.0f} | {r.peak_bytes / 1e6:.1f} |"
        )
    return "\n".join(lines)


def save(results: Sequence[Measured], path: Path, processes: int | None = None) -> None:
    """Write results and the machine as JSON."""
    data = {"machine": machine(processes), "results": [asdict(r) for r in results]}
    atomic_write(path, json.dumps(data, indent=1) + "\n")


def draw(results: Sequence[Measured], folder: Path) -> list[Path]:
    """A heat map of length by depth, and time and memory against length.

    Args:
        results: of one variant, two lengths or more.
        folder: made where it does not exist.

    Returns:
        The PNG files.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    lengths = [r.length for r in results]
    labels = [f"{n // 1024}k" if n < 2**20 else f"{n // 2**20}M" for n in lengths]
    variant = results[0].variant

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    share = np.array([r.found for r in results]).T / results[0].keys
    image = axes.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), labels)
    axes.set_yticks(range(len(DEPTHS)), [f"{d:.0%}" for d in DEPTHS])
    axes.set(xlabel="length of the text (bytes)", ylabel="depth of the key")
    axes.set_title(f"Pass key found, {variant} task, {results[0].keys} key(s) a cell")
    for x, column in enumerate(share.T):
        for y, value in enumerate(column):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=axes, label="share found")
    heat = folder / f"passkey_{variant}.png"
    figure.savefig(heat, dpi=150)
    plt.close(figure)

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    seconds = [n / r.tokens_per_second for n, r in zip(lengths, results, strict=True)]
    left.loglog(lengths, seconds, "o-")
    left.set(xlabel="length (bytes)", ylabel="seconds a text", title="Time is linear")
    right.semilogx(lengths, [r.peak_bytes / 1e6 for r in results], "o-")
    right.set(
        xlabel="length (bytes)", ylabel="peak memory of a process (MB)", title="Memory is flat"
    )
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.set_xticks(lengths, labels)
        axis.minorticks_off()
    curves = folder / f"passkey_{variant}_cost.png"
    figure.savefig(curves, dpi=150)
    plt.close(figure)
    return [heat, curves]


def demo(folder: Path, lengths: Sequence[int] = LENGTHS, processes: int | None = None) -> None:
    """The main job: keys in texts up to a million bytes, found in flat memory; prints and draws.

    Args:
        folder: where the pictures and the results go.
        lengths: bytes of the texts.
        processes: see `measure`.
    """
    results = measure(lengths, processes=processes)
    print()
    print("depth " + "".join(f"{r.length:>11,}" for r in results))
    for row, depth in enumerate(DEPTHS):
        marks = ("found" if r.found[row] else "NOT FOUND" for r in results)
        print(f"{depth:>5.0%} " + "".join(f"{mark:>11}" for mark in marks))
    print()
    print(table(results))
    print(f"\n{machine(processes)}")
    save(results, folder / "demo.json", processes)
    for path in draw(results, folder):
        print(f"wrote {path}")
    right, trials = sum(r.right for r in results), sum(r.trials for r in results)
    first, last = results[min(2, len(results) - 1)], results[-1]
    model = passkey.load_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"\nShown: a model of {parameters:,} parameters, trained on texts of at most 4,096 bytes, "
        f"gave back {right} of {trials} keys hidden at 11 depths of texts of {lengths[0]:,} to "
        f"{last.length:,} bytes, and its peak memory at {last.length:,} bytes is "
        f"{last.peak_bytes / first.peak_bytes - 1:+.1%} of that at {first.length:,}."
    )
