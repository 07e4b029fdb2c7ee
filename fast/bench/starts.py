"""How the memories' weights may start: what each start costs a pretrained model before any training.

Windows of three chunks are taken from one end of a text to the other. Each is read by itself, from
every start. The loss of its first chunk, which no memory reaches, is told apart from that of the
other two. All starts share the backbone's weights: they are made by writing over the memories' own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference.config import CoMeTConfig, MemoryConfig
from reference.parameters import map_parameters, named_parameters, shapes

from ..inputs import check_count
from ..model import CoMeTModel
from ..pretrained.backbones import plug_in, read_backbone
from ..pretrained.published import SPECIAL
from ..pretrained.text import open_text
from ..tasks.memories import read_tokens

__all__ = ["MEMORY", "STARTS", "Start", "measure_starts", "place_windows", "table"]

MEMORY = MemoryConfig(
    chunk_size=512, global_memory_size=64, temporary_memory_size=256, compression_stride=8
)
"""The memories, where a start does not say otherwise."""

CHUNKS = 3
"""Chunks of a window."""

Change = Callable[[str, Tensor, Tensor, torch.Generator], Tensor]
"""What a start makes of a weight: of its name, the weight as `from_backbone` starts it, the embedding
table, and a source of random numbers."""


def _ours(_name: str, x: Tensor, _table: Tensor, _rng: torch.Generator) -> Tensor:
    return x


def _published(name: str, x: Tensor, _table: Tensor, rng: torch.Generator) -> Tensor:
    if name in SPECIAL or name.endswith("adapter_up"):
        return torch.normal(0.0, 0.02, x.shape, generator=rng).to(x)
    return x


def _mean(name: str, x: Tensor, table: Tensor, _rng: torch.Generator) -> Tensor:
    return table.mean(dim=0).expand(x.shape).clone() if name in SPECIAL else x


def _zeros(name: str, x: Tensor, _table: Tensor, _rng: torch.Generator) -> Tensor:
    return torch.zeros_like(x) if name in SPECIAL else x


@dataclass(frozen=True)
class Start:
    """One way to start."""

    name: str
    """In words."""

    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `MEMORY` that have another value."""

    change: Change = _ours
    """What it makes of the weights that `from_backbone` starts."""


NO_TOKENS: dict[str, Any] = {"compression_stride": 0}
"""No compression tokens."""

STARTS = (
    Start("the backbone in chunks, no memory", NO_TOKENS | {"global_memory_size": 0}),
    Start("the published start", {}, _published),
    Start("the mean of the vocabulary for all new tokens", {}, _mean),
    Start("zeros for all new tokens", {}, _zeros),
    Start("`from_backbone`"),
    Start("`from_backbone`, a sink", {"sink_slot": True}),
    Start("`from_backbone`, m = 8", {"global_memory_size": 8}),
    Start("`from_backbone`, m = 8, a sink", {"global_memory_size": 8, "sink_slot": True}),
    Start("`from_backbone`, s = 0, m = 1", NO_TOKENS | {"global_memory_size": 1}),
    Start("`from_backbone`, s = 0, m = 8", NO_TOKENS | {"global_memory_size": 8}),
    Start(
        "`from_backbone`, s = 0, m = 8, a sink",
        NO_TOKENS | {"global_memory_size": 8, "sink_slot": True},
    ),
)
"""What is compared. The first is what the others are held against."""


def place_windows(tokens: int, length: int, windows: int) -> list[int]:
    """Where windows of a length start, evenly from a text's start to its end.

    Raises:
        ValueError: they do not fit beside each other.
    """
    check_count("windows", windows, 1)
    if windows * length > tokens:
        raise ValueError(
            f"the text has {tokens} tokens, {windows} windows of {length} need "
            f"{windows * length}; give a longer text, or fewer windows."
        )
    return np.linspace(0, tokens - length, windows).astype(int).tolist()


def measure_starts(
    backbone: Path, document: Path, windows: int, memory: MemoryConfig = MEMORY
) -> Iterator[tuple[Start, np.ndarray]]:
    """Read the windows of a text from every start.

    Args:
        backbone: a folder or a GGUF file, see `CoMeTModel.from_backbone`; with its tokenizer.
        document: what to read, UTF-8.
        windows: how many.
        memory: the memories, where a start does not say otherwise.

    Yields:
        A start, and [windows, 2]: nats a label in the first chunk, and in the others.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: a package of the extra `pretrained` is not installed.
        ValueError: a file does not fit, or the text is too short.
    """
    read = read_backbone(backbone)
    text = open_text(backbone, read.config.vocab_size)
    ids, length = read_tokens(document, text).tolist(), CHUNKS * memory.chunk_size
    places = place_windows(len(ids), length, windows)
    config, tree = plug_in(read, dataclasses.replace(memory, sink_slot=True), torch.float32, seed=0)
    given = named_parameters(tree)  # what the starts share, and choose from
    for start in STARTS:
        model = _model(start, given, dataclasses.replace(memory, **start.memory), config)
        yield start, np.array([_read(model, ids[at : at + length]) for at in places])


def _model(
    start: Start, given: dict[str, Tensor], memory: MemoryConfig, config: CoMeTConfig
) -> CoMeTModel:
    """The model of a start, on the weights that it does not change."""
    rng = torch.Generator().manual_seed(0)

    def leaf(name: str, shape: tuple[int, ...]) -> Tensor:
        x = given[name][: shape[0]]  # fewer readout tokens are the first of them
        return start.change(name, x, given["embed_tokens"], rng)

    config = CoMeTConfig(config.backbone, memory)
    return CoMeTModel(config, map_parameters(leaf, shapes(config)))


def _read(model: CoMeTModel, ids: list[int]) -> list[float]:
    """Nats a label in a text's first chunk, and in the others."""
    text = torch.tensor([ids])
    with torch.no_grad():
        chunks = list(model.windows(text, text, backprop_chunks=1))
    nats, labels = ([float(getattr(c, name)) for c in chunks] for name in ("nats", "num_labels"))
    return [nats[0] / labels[0], sum(nats[1:]) / sum(labels[1:])]


def table(results: list[tuple[Start, np.ndarray]]) -> str:
    """What `measure_starts` found, as a Markdown table.

    The last column is the difference to the first start, window by window: its mean and standard
    error.
    """
    lines = [
        "| start of the new weights | chunk 1 | chunks 2 and 3 | more than the first row |",
        "| --- | ---: | ---: | ---: |",
    ]
    for start, nats in results:
        more = (nats - results[0][1])[:, 1]
        error = more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else np.nan
        first, rest = nats.mean(axis=0)
        told = "" if start is results[0][0] else f"{more.mean():.2f} ± {error:.2f}"
        lines.append(f"| {start.name} | {first:.2f} | {rest:.2f} | {told} |")
    return "\n".join(lines)
