"""What trained memories are worth: loss by position in held-out prose, and pass keys by length.

Five ways to read the same texts with the same backbone:

- **whole**: the backbone alone, each text in its own context: what there is to reach.
- **chunks**: the backbone alone, each chunk by itself: what memories have to beat.
- **window**: each chunk after as many tokens before it as the memories have slots: the same budget,
  spent on a sliding window.
- **fresh** and **trained**: CoMeT, before and after.

Where the backbone was trained too, a sixth way tells what of it the memories are worth: **without**,
the trained model in chunks by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints import load_checkpoint
from ..drawing import COLOURS, save_figure, style
from ..inputs import check_count
from ..machine import machine, threads
from ..model import CoMeTModel
from ..pretrained.memories import load_memories
from ..pretrained.text import open_text
from .memories import KeyText, hide_key, read_tokens, split_tokens
from .readers import without_memories
from .results import load_results, save_results

__all__ = [
    "Measured",
    "Setting",
    "draw",
    "load",
    "measure",
    "read_stream",
    "read_window",
    "readers",
    "table",
]

Reader = Callable[[Tensor, int], tuple[np.ndarray, np.ndarray]]
"""Called with a text's ids [n] and a number k: of each of its last k tokens, the negative log
likelihood in nats [k], and whether it was the likeliest [k]."""


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    backbone: str
    """A folder or a GGUF file, with its tokenizer."""

    memories: str
    """A file of `CoMeTModel.save_memories`, or the folder of a model that was trained whole."""

    documents: tuple[str, ...]
    """Prose; the last tenth of each is read."""

    chunks: int = 16
    """Chunks of a text of prose."""

    windows: int = 12
    """Texts of prose."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    """Tokens of the texts with a key."""

    keys: int = 10
    """Keys a length, at depths spread evenly over the text."""

    seed: int = 1
    """Of the texts with a key."""


@dataclass(frozen=True)
class Measured:
    """What one reader did."""

    name: str
    """Of the reader."""

    nats: list[list[float]]
    """Of each text of prose, the mean over each chunk's tokens; the text's first token is not
    predicted."""

    key_nats: list[list[float]]
    """Of each length, the mean over the key's tokens, of each key."""

    keys_found: list[int]
    """Of each length, keys whose tokens were all the likeliest."""


READERS = ("whole", "chunks", "window", "fresh", "trained")
"""The readers of memories alone, in the order of the tables."""


def _score(logits: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    nats = F.cross_entropy(logits.float(), targets, reduction="none")
    return nats.double().numpy(), (logits.argmax(dim=-1) == targets).numpy()


def _join(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    nats, right = zip(*parts, strict=True)
    return np.concatenate(nats), np.concatenate(right)


def read_stream(model: CoMeTModel, size: int, ids: Tensor, last: int) -> Any:
    """A `Reader` of a model's stream.

    Args:
        model: what reads.
        size: tokens of a call.
        ids, last: see `Reader`; last < n.
    """
    first, end = len(ids) - 1 - last, len(ids) - 1
    state = model(ids[None, :first], logits="none").state if first else None
    parts = []
    for at in range(first, end, size):
        piece = ids[at : min(at + size, end)]
        out = model(piece[None], state=state)
        state = out.state
        parts.append(_score(out.logits[0], ids[at + 1 : at + 1 + len(piece)]))
    return _join(parts)


def read_window(model: CoMeTModel, size: int, before: int, ids: Tensor, last: int) -> Any:
    """A `Reader` of chunks that each see some tokens before them, and nothing else.

    Args:
        model: what reads a row at once.
        size: tokens of a chunk.
        before: tokens before it.
        ids, last: see `Reader`; last < n.
    """
    first, end = len(ids) - 1 - last, len(ids) - 1
    parts = []
    for at in range(first // size * size, end, size):
        begin, start, stop = max(at - before, 0), max(at, first), min(at + size, end)
        logits = model(ids[None, begin:stop]).logits[0, start - begin :]
        parts.append(_score(logits, ids[start + 1 : stop + 1]))
    return _join(parts)


def readers(backbone: Path, memories: Path) -> dict[str, Reader]:
    """The five, by name.

    Args:
        backbone: a folder or a GGUF file.
        memories: a file of `CoMeTModel.save_memories`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not fit.
    """
    trained = (
        CoMeTModel.from_pretrained(memories)
        if memories.is_dir()
        else CoMeTModel.from_backbone(backbone, memories)
    )
    memory = trained.config.memory
    size, budget = memory.chunk_size, memory.temporary_memory_size + memory.global_memory_size
    fresh = CoMeTModel.from_backbone(backbone, memory)
    whole, chunks = without_memories(fresh), without_memories(fresh, size)
    found: dict[str, Reader] = {
        "whole": lambda ids, last: read_stream(whole, size, ids, last),
        "chunks": lambda ids, last: read_stream(chunks, size, ids, last),
        "window": lambda ids, last: read_window(whole, size, budget, ids, last),
        "fresh": lambda ids, last: read_stream(fresh, size, ids, last),
        "trained": lambda ids, last: read_stream(trained, size, ids, last),
    }
    if memories.is_dir():
        without = without_memories(trained, size)
        found["without"] = lambda ids, last: read_stream(without, size, ids, last)
    return found


def measure(setting: Setting) -> list[Measured]:
    """Read all texts in all ways.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not fit, or a document is too short.
    """
    from tqdm import tqdm  # of the extra `commands`

    memories = Path(setting.memories)
    reads = load_checkpoint if memories.is_dir() else load_memories
    config, _ = reads(memories)
    size = config.memory.chunk_size
    text: Any = open_text(Path(setting.backbone), config.backbone.vocab_size)
    held_out = [split_tokens(read_tokens(Path(path), text))[1] for path in setting.documents]
    prose = np.concatenate(held_out)
    length = setting.chunks * size + 1
    check_count("windows", setting.windows, 1)
    if setting.windows * length > len(prose):
        raise ValueError(
            f"the last tenths of the documents have {len(prose)} tokens, {setting.windows} texts of "
            f"{length} need {setting.windows * length}; give longer documents or fewer texts."
        )
    places = np.linspace(0, len(prose) - length, setting.windows).astype(int)
    asked = _questions(setting, prose, text)
    results = []
    all_readers = readers(Path(setting.backbone), memories)
    total = len(all_readers) * (setting.windows * length + setting.keys * sum(setting.lengths))
    with torch.no_grad(), tqdm(total=total, unit="token", unit_scale=True) as bar:
        for name, read in all_readers.items():
            nats = []
            for at in places:
                found, _ = read(torch.from_numpy(prose[at : at + length]), length - 1)
                nats.append(found.reshape(setting.chunks, size).mean(axis=1).tolist())
                bar.update(length)
            key_nats, keys_found = [], []
            for length_asked in asked:
                scores = []
                for key in length_asked:
                    ids = np.concatenate([key.text, key.question, key.answer])
                    scores.append(read(torch.from_numpy(ids), len(key.answer)))
                    bar.update(len(key.text))
                key_nats.append([float(found.mean()) for found, _ in scores])
                keys_found.append(sum(bool(right.all()) for _, right in scores))
            results.append(Measured(name, nats, key_nats, keys_found))
    return results


def _questions(setting: Setting, prose: np.ndarray, text: Any) -> list[list[KeyText]]:
    """Texts with a key, of each length."""
    rng, keys = np.random.default_rng(setting.seed), setting.keys
    depths = (np.arange(keys) + 0.5) / keys
    return [
        [hide_key(prose, length, depth, text, rng, "test") for depth in depths]
        for length in setting.lengths
    ]


def table(results: Sequence[Measured], setting: Setting) -> str:
    """Two Markdown tables: nats a token of prose; keys found and nats a token of the key."""
    lines = [
        "| how the text is read | first chunk | the others | more than window |",
        "| --- | ---: | ---: | ---: |",
    ]
    window = next(np.array(r.nats) for r in results if r.name == "window")
    for r in results:
        nats = np.array(r.nats)
        more = (nats - window)[:, 1:].mean(axis=1)
        error = more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else np.nan
        told = "" if r.name == "window" else f"{more.mean():+.3f} ± {error:.3f}"
        lines.append(f"| {r.name} | {nats[:, 0].mean():.3f} | {nats[:, 1:].mean():.3f} | {told} |")
    heads = " | ".join(f"{n:,}" for n in setting.lengths)
    lines += ["", f"| keys found, of {setting.keys}; nats a token of the key | {heads} |"]
    lines.append("| --- |" + " ---: |" * len(setting.lengths))
    for r in results:
        cells = [
            f"{found}; {np.mean(nats):.2f}"
            for found, nats in zip(r.keys_found, r.key_nats, strict=True)
        ]
        lines.append(f"| {r.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def save(results: Sequence[Measured], setting: Setting, path: Path) -> None:
    """Write results, the setting, and the machine, as JSON."""
    save_results(path, machine(threads()), setting, results)


def load(path: Path) -> tuple[list[Measured], Setting]:
    """Results and their setting, as `save` wrote them; errors are those of `load_results`."""
    return load_results(path, Measured, Setting)


LOOKS = {
    "whole": ("#222222", ":"),
    "chunks": ("#999999", "-"),
    "window": (COLOURS["other"], "-"),
    "fresh": (COLOURS["temporary memory"], "--"),
    "trained": (COLOURS["global memory"], "-"),
    "without": (COLOURS["readout"], "-."),
}
"""Colour and line of each reader."""


def draw(results: Sequence[Measured], setting: Setting, path: Path) -> Path:
    """Loss by position, and the key's loss by length, as a PNG."""
    with style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
        for r in results:
            colour, line = LOOKS[r.name]
            nats = np.array(r.nats).mean(axis=0)
            left.plot(np.arange(1, len(nats) + 1), nats, line, color=colour, label=r.name)
            key = [np.mean(row) for row in r.key_nats]
            right.semilogx(setting.lengths, key, line, marker="o", ms=3, color=colour)
        left.set(xlabel="chunk", ylabel="nats a token", title="Held-out prose")
        right.set(xlabel="tokens of the text", ylabel="nats a token", title="The pass key")
        right.set_xticks(setting.lengths, [f"{n:,}" for n in setting.lengths])
        right.minorticks_off()
        right.axhline(np.log(10), color="#CCCCCC", lw=0.8, zorder=0)
        left.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower center", ncols=len(results), fontsize=8)
        return save_figure(figure, path)
