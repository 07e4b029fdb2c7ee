"""Why keys are lost in long prose: what writes to the global memory, and whether late keys still get in.

Two measurements. **Writes**: texts of prose with distractors and no key are read, chunk by chunk, and a
chunk that changes the global memory is a write, for there is nothing to be written. Each is told with
the text of its chunk, and with what stood there: a distractor that the chunk's border cuts, one that is
whole, or neither. **Late keys**: a key is given to a state that has read so many bytes without one, and
asked for a little later. Where it is not taken up, what was read before has spoiled the state.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import read_json
from ..drawing import COLOURS, save_figure, style
from ..files import atomic_write
from ..inputs import check_count
from ..model import CoMeTModel
from ..state import CoMeTState
from . import passkey

__all__ = [
    "KINDS",
    "Diagnosis",
    "Setting",
    "Write",
    "diagnose",
    "draw",
    "find_writes",
    "kind_of",
    "load",
    "save",
    "table",
    "take_up",
]

KINDS = ("cut distractor", "whole distractor", "neither")
"""What stands in a chunk that writes."""

MOVED = 1e-3
"""Change of a number of the global state, at most, of a chunk that writes nothing."""

SENTENCE = re.compile(rb"The [a-z ]+ is (\d+)\. Remember it\. \1 is the [a-z ]+\.")
"""A distractor."""

SHOWN = 10
"""Writes whose text is told."""


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    bytes_read: int = 2**20
    """Of each text without a key."""

    texts: int = 4
    """Without a key, read side by side."""

    lengths: tuple[int, ...] = (1024, 16384, 65536, 262144)
    """Bytes read before a late key."""

    keys: int = 44
    """Late keys of a length, each of a state of its own."""

    model: str | None = None
    """A checkpoint's folder; None is the shipped model."""

    haystack: str | None = None
    """A text file; None is the built-in text's test split."""

    seed: int = 1
    """Of texts and keys."""


@dataclass(frozen=True)
class Write:
    """A chunk without a key that changes the global memory."""

    text: int
    """Which one."""

    start: int
    """Byte at which the chunk starts."""

    kind: str
    """One of `KINDS`."""

    layers: tuple[int, ...]
    """Whose memory it changes."""

    words: str
    """The chunk's text."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    setting: Setting
    writes: list[Write]

    chunks: dict[str, int]
    """How many chunks of each kind were read, those that write nothing among them."""

    taken_up: list[int]
    """Of each length, late keys that were given back."""


def _texts(setting: Setting, length: int, number: int, haystack: bytes, stream: int) -> list[bytes]:
    """Prose with distractors and no key."""
    return [
        b"".join(
            passkey.prose(
                length,
                haystack,
                np.random.default_rng([setting.seed, stream, i]),
                passkey.DISTRACTOR_SPACING,
                "test",
            )
        )
        for i in range(number)
    ]


def kind_of(text: bytes, start: int, end: int) -> str:
    """What stands in the chunk [start, end) of a text: one of `KINDS`.

    A distractor is cut if it begins before the chunk and ends in it: the chunk sees a part of it
    through its memories alone.
    """
    around = max(start - 200, 0)
    spans = [
        (around + m.start(), around + m.end()) for m in SENTENCE.finditer(text[around : end + 200])
    ]
    if any(first < start < last for first, last in spans):
        return "cut distractor"
    if any(start <= first and last <= end for first, last in spans):
        return "whole distractor"
    return "neither"


def _ids(model: CoMeTModel, texts: Sequence[bytes]) -> torch.Tensor:
    return torch.from_numpy(np.stack([passkey.encode(text) for text in texts])).to(model.device)


def find_writes(
    model: CoMeTModel, texts: Sequence[bytes], chunk: int
) -> Iterator[tuple[int, list[Write]]]:
    """The writes of texts of one length, read side by side.

    The first chunk makes the memory, and is none. So is a last one that is not full.

    Args:
        texts: without a key.
        chunk: tokens of a chunk.

    Yields:
        The byte up to which was read, and the writes of the chunk that ends there.
    """
    state: CoMeTState | None = None
    for start in range(0, len(texts[0]) - chunk + 1, chunk):
        end = start + chunk
        out = model(_ids(model, [text[start:end] for text in texts]), state=state, logits="none")
        after = model.close_chunk(out.state)
        found = []
        if state is not None:
            pairs = zip(state.global_state, after.global_state, strict=True)
            moved = torch.stack([(new - old).abs().amax((1, 2)) > MOVED for old, new in pairs])
            for i in moved.any(0).nonzero()[:, 0].tolist():
                layers = tuple(moved[:, i].nonzero()[:, 0].tolist())
                words = texts[i][start:end].decode(errors="replace")
                found.append(Write(i, start, kind_of(texts[i], start, end), layers, words))
        state = after
        yield end, found


def take_up(model: CoMeTModel, before: Sequence[bytes], setting: Setting, haystack: bytes) -> int:
    """Keys that are given back after texts without one: of each text, one.

    Between key and question stand 600 to 1,000 bytes of prose, more than the queue holds.
    """
    rng = np.random.default_rng([setting.seed, len(before[0])])
    keys = [passkey.draw_number(rng, "test") for _ in before]
    between = int(rng.integers(600, 1000))
    rest = _texts(setting, between, len(before), haystack, 3)
    state: CoMeTState | None = None
    block = 4096
    for start in range(0, len(before[0]), block):
        part = [text[start : start + block] for text in before]
        state = model(_ids(model, part), state=state, logits="none").state
    right = 0
    for i, (key, prose) in enumerate(zip(keys, rest, strict=True)):
        said = f"\n{passkey.INFORMATION.format(key=key)}\n".encode()
        asked = said + prose + f"\n{passkey.QUESTION}".encode()
        assert state is not None  # something was read
        out = model.generate(_ids(model, [asked]), state.select([i]), 8, stop_ids=(10,))
        right += passkey.first_number(bytes(out.ids[0])) == key
    return right


@torch.no_grad()
def diagnose(setting: Setting) -> Diagnosis:
    """Make both measurements.

    Raises:
        OSError: a file cannot be read.
        ValueError: a number is out of range, or a file does not fit.
    """
    from tqdm import tqdm  # of the extra `commands`

    for name in ("bytes_read", "texts", "keys"):
        check_count(name, getattr(setting, name), 1)
    model: Any = passkey.load_model(setting.model)
    haystack = passkey.read_haystack(setting.haystack)
    chunk = model.config.memory.chunk_size
    texts = _texts(setting, setting.bytes_read, setting.texts, haystack, 0)
    writes: list[Write] = []
    total = setting.bytes_read * setting.texts + setting.keys * sum(setting.lengths)
    with tqdm(total=total, unit="B", unit_scale=True) as bar:
        for _, found in find_writes(model, texts, chunk):
            writes += found
            bar.update(chunk * setting.texts)
        taken_up = []
        for length in setting.lengths:
            before = _texts(setting, length, setting.keys, haystack, 1)
            taken_up.append(take_up(model, before, setting, haystack))
            bar.update(length * setting.keys)
    chunks = Counter(
        kind_of(text, start, start + chunk)
        for text in texts
        for start in range(chunk, len(text) - chunk + 1, chunk)
    )
    return Diagnosis(setting, writes, {kind: chunks[kind] for kind in KINDS}, taken_up)


def save(found: Diagnosis, path: Path) -> None:
    """Write what was found as JSON."""
    atomic_write(path, json.dumps(asdict(found), indent=1) + "\n")


def load(path: Path) -> Diagnosis:
    """What `save` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or holds something else.
    """
    data = read_json(path)
    try:
        setting = Setting(**data["setting"] | {"lengths": tuple(data["setting"]["lengths"])})
        writes = [Write(**one | {"layers": tuple(one["layers"])}) for one in data["writes"]]
        return Diagnosis(setting, writes, data["chunks"], data["taken_up"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no diagnosis ({error}); measure again.") from error


def table(found: Diagnosis) -> str:
    """Markdown: writes by kind, late keys by length, and the texts of the first writes."""
    setting, megabytes = found.setting, found.setting.bytes_read * found.setting.texts / 1e6
    by_kind = Counter(write.kind for write in found.writes)
    lines = ["| chunks with | read | that write | writes a million bytes |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for kind in KINDS:
        lines.append(
            f"| {kind} | {found.chunks[kind]:,} | {by_kind[kind]} | {by_kind[kind] / megabytes:.1f} |"
        )
    lines += ["", "| bytes before a late key | taken up |", "| ---: | ---: |"]
    for length, right in zip(setting.lengths, found.taken_up, strict=True):
        lines.append(f"| {length:,} | {right}/{setting.keys} |")
    if found.writes:
        lines += ["", "| write at | layers | its chunk |", "| ---: | --- | --- |"]
    for write in found.writes[:SHOWN]:
        words = " ".join(write.words.split()).replace("|", "\\|").replace("`", "'")
        layers = ", ".join(map(str, write.layers))
        lines.append(f"| {write.start:,} | {layers} | `{words}` |")
    return "\n".join(lines)


def draw(found: Diagnosis, path: Path) -> Path:
    """Where the writes are, by kind, and late keys by the bytes before them.

    Args:
        path: of the picture, PNG or SVG.
    """
    colours = dict(zip(KINDS, ("other", "global memory", "temporary memory"), strict=True))
    setting = found.setting
    with style(path.stem) as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
        for kind in KINDS:
            own = [write for write in found.writes if write.kind == kind]
            left.plot(
                [write.start for write in own],
                [write.text for write in own],
                "|",
                markersize=14,
                color=COLOURS[colours[kind]],
                label=f"{kind}: {len(own)}",
            )
        left.set(
            xlim=(0, setting.bytes_read),
            ylim=(-0.7, setting.texts - 0.3),
            yticks=range(setting.texts),
            xlabel="byte",
            ylabel="text",
            title="writes without a key",
        )
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, fontsize=8)
        shares = [n / setting.keys for n in found.taken_up]
        right.semilogx(setting.lengths, shares, "o-", color=COLOURS["global memory"])
        right.set(
            ylim=(0, 1.05), xlabel="bytes before the key", title="late keys that are taken up"
        )
        return save_figure(figure, path)
