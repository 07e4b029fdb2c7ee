"""Speed and memory, side by side: ours, the literal schedule, full attention.

A case is a model's size and a memory setting, in a process of its own that keeps freed memory or
not. Its contestants take turns, each timed once a round, so that a busy moment of the machine meets
all of them; medians are compared. Before they are timed, contestants that compute the same thing
must give the same result.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.config import BackboneConfig, CoMeTConfig, MemoryConfig

from ..attention import attend_after
from ..cells import Layout, run_layers
from ..chunking import Round
from ..layers import Weights, attention, causal_mask
from ..machine import keep_memory, peak_memory, resident_memory
from ..model import CoMeTModel
from ..rows import Row
from ..state import CoMeTState
from ..stream import Layouts, new_state, run_row
from .literal import read_literal

__all__ = [
    "BACKBONES",
    "MEMORIES",
    "Case",
    "Timed",
    "chunk_work",
    "in_its_own_process",
    "literal_work",
    "matmul_peak",
    "measure_attention",
    "measure_compiled",
    "measure_decoding",
    "measure_diagonal",
    "measure_graph",
    "measure_lengths",
    "measure_memory",
    "measure_prefill",
    "measure_training",
    "measure_types",
    "take_turns",
]

BACKBONES = {
    "small": BackboneConfig(256, 64, 192, 3, 4, 4, 16),
    "5M": BackboneConfig(512, 256, 768, 6, 4, 4, 64),
    "135M": BackboneConfig(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True),
}
"""Sizes: the shipped model's, one between, and SmolLM2-135M's."""

MEMORIES = {
    "128/8/16": MemoryConfig(128, 8, 16, 8),
    "256/32/128": MemoryConfig(256, 32, 128, 8),
    "512/64/256": MemoryConfig(512, 64, 256, 8),
    "2048/512/2048": MemoryConfig(2048, 512, 2048, 8),
}
"""Settings: chunk size / global slots m / queue B, stride 8. The last is the published one."""


TYPES = ("float32", "bfloat16", "float16")
"""What a model may compute in, see `measure_types`."""

KEPT = ("all", "cells", "chunks", "windows")
"""What is kept for a backward pass, see `measure_graph`."""


@dataclass(frozen=True)
class Case:
    """What is measured in one process."""

    backbone: str
    """One of `BACKBONES`."""

    memory: str
    """One of `MEMORIES`."""

    kept: bool = True
    """Whether the process keeps the memory that it frees (`fast.keep_memory`)."""

    threads: int = 2
    """Of torch."""

    batch_size: int = 1
    """Texts read side by side."""

    rounds: int = 5
    """How often each contestant is timed."""

    device: str = "cpu"
    """ "cpu" or "cuda"; anything but the section "device" is measured on a CPU."""

    dtype: str = "float32"
    """Of the weights, likewise."""

    @property
    def config(self) -> CoMeTConfig:
        """The model."""
        return CoMeTConfig(BACKBONES[self.backbone], MEMORIES[self.memory])

    @property
    def plain(self) -> CoMeTConfig:
        """The same backbone without memories, whose one chunk never closes: full attention."""
        memory = dataclasses.replace(
            MEMORIES[self.memory], chunk_size=2**40, global_memory_size=0, compression_stride=0
        )
        return CoMeTConfig(BACKBONES[self.backbone], memory)


@dataclass(frozen=True)
class Timed:
    """Seconds of every contestant, one for each of its turns."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Seconds, the middle one."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds[name]) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds[name], n=4, method="inclusive")
        return (high - low) / 2 / self.median(name)


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    settle: Callable[[], object] = lambda: None,
) -> Timed:
    """Time each contestant once a round, after one turn that does not count.

    Args:
        contestants: what to time, by name.
        rounds: turns of each.
        settle: waits until a device is idle, before a turn and at its end.

    Returns:
        All their seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            settle()
            start = time.perf_counter()
            run()
            settle()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return Timed(seconds)


def in_its_own_process(function: Callable[..., object], case: Case, *more: object) -> object:
    """What `function(case, *more)` returns, in a new process that is set up for the case.

    Raises:
        BrokenProcessPool: the process was killed, for want of memory perhaps.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _set_up, (case,)) as pool:
        return pool.submit(function, case, *more).result()


def _set_up(case: Case) -> None:
    """In the new process, before anything is computed."""
    torch.set_num_threads(case.threads)
    torch.set_float32_matmul_precision("highest")  # on a GPU: no TF32, nor in CuPy
    os.environ["CUPY_TF32"] = "0"
    if case.kept:
        keep_memory()


def chunk_work(config: CoMeTConfig) -> float:
    """Floating-point operations of a chunk in a long text, a product and a sum being two.

    Counted as the equations need them: memory slots as keys and values, a slot's scores with the
    slots that it sees, the top layer at the slots that are read. Norms, rotations and adapters are
    not counted.
    """
    backbone, memory = config.backbone, config.memory
    d, e, f = backbone.hidden_size, backbone.head_dim, backbone.intermediate_size
    h, k, layers = (
        backbone.num_attention_heads,
        backbone.num_key_value_heads,
        backbone.num_hidden_layers,
    )
    slots = memory.global_slots + memory.temporary_memory_size
    kept = -(-memory.chunk_size // memory.compression_stride) + memory.global_memory_size
    rows = memory.chunk_size + kept
    key_value = 2 * 2 * d * k * e
    other = 2 * (2 * d * h * e + 3 * d * f)  # query, output projection, MLP
    pair = 4 * h * e  # a score, and its share of the values
    whole = rows * (key_value + other) + pair * (rows * slots + rows * (rows + 1) / 2)
    top = rows * key_value + kept * other + pair * kept * (slots + rows)
    return (layers - 1) * whole + top + layers * slots * key_value


def literal_work(config: CoMeTConfig) -> float:
    """Floating-point operations of a chunk in the literal schedule, counted as in `chunk_work`: every
    slot of a row goes through all of every layer.
    """
    backbone, memory = config.backbone, config.memory
    d, e, f = backbone.hidden_size, backbone.head_dim, backbone.intermediate_size
    h, k = backbone.num_attention_heads, backbone.num_key_value_heads
    kept = -(-memory.chunk_size // memory.compression_stride) + memory.global_memory_size
    row = memory.global_slots + memory.temporary_memory_size + memory.chunk_size + kept
    slot = 2 * (2 * d * (h + k) * e + 3 * d * f)
    return backbone.num_hidden_layers * (row * slot + 4 * h * e * row * (row + 1) / 2)


def matmul_peak(config: CoMeTConfig, batch_size: int, rounds: int) -> float:
    """Operations per second of the layer's matrix products alone, at a chunk's shapes.

    Each into memory that is there already, one after another, as often as asked; the medians are
    added up.
    """
    backbone, memory = config.backbone, config.memory
    d, f = backbone.hidden_size, backbone.intermediate_size
    heads = backbone.num_attention_heads * backbone.head_dim
    projected = heads + 2 * backbone.num_key_value_heads * backbone.head_dim
    rows = batch_size * (
        memory.chunk_size
        + -(-memory.chunk_size // memory.compression_stride)
        + memory.global_memory_size
    )
    contestants: dict[str, Callable[[], object]] = {}
    total = 0.0
    for inner, outer in ((d, projected), (heads, d), (d, 2 * f), (f, d)):
        left, right = torch.randn(rows, inner), torch.randn(outer, inner)
        out = torch.empty(rows, outer)
        contestants[f"{inner}x{outer}"] = _product(left, right, out)
        total += 2.0 * rows * inner * outer
    timed = take_turns(contestants, 3 * rounds)
    return total / sum(timed.median(name) for name in contestants)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Callable[[], object]:
    return lambda: torch.mm(left, right.T, out=out)


def _steady_state(case: Case) -> CoMeTState:
    """A state after a long text: both memories full, of random numbers, no chunk open."""
    memory, d = case.config.memory, case.config.backbone.hidden_size
    layers, b = case.config.backbone.num_hidden_layers, case.batch_size
    ones = np.ones(b, dtype=np.int64)
    generator = torch.Generator().manual_seed(0)

    def random(slots: int) -> tuple[Tensor, ...]:
        shape = (b, slots, d)
        return tuple(torch.randn(shape, generator=generator) for _ in range(layers))

    return dataclasses.replace(
        new_state(case.config, batch_size=b),
        tokens=100 * memory.chunk_size * ones,
        chunks=100 * ones,
        queue_length=memory.temporary_memory_size * ones,
        global_state=random(memory.global_memory_size),
        temporary_memory=random(memory.temporary_memory_size),
    )


def _read_chunks(
    ids: Tensor,
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    outputs: str,
    layers: Callable[..., Any] = run_layers,
    *,
    laid_out_anew: bool = False,
) -> Tensor:
    """Read whole chunks, each closed: [b, w, d] of the last one, see `run_row`.

    Args:
        laid_out_anew: whether each chunk gets a layout of its own.
    """
    b, size = len(ids), config.memory.chunk_size
    plan = Round(np.zeros(b, np.int64), np.full(b, size), np.ones(b, dtype=bool))
    layouts: Layouts = {}
    for text in ids.split(size, dim=1):
        part = run_row(
            F.pad(text, (0, 1)),
            state,
            params,
            config,
            plan=plan,
            outputs=outputs,
            layouts=None if laid_out_anew else layouts,
            layers=layers,
        )
        state = part.state
    return part.hidden


class _Masked:
    """`run_layers` whose attention gets a mask, however long the rows are."""

    def __init__(self) -> None:
        self.layout: Layout | None = None

    def __call__(self, text: Tensor, row: Row, layout: Layout, *args: Any, **kwargs: Any) -> Any:
        if self.layout is None:
            length = int(row.positions[0, -1]) + 1
            mask = causal_mask(row.positions, length, torch.float32)
            self.layout = dataclasses.replace(layout, mask=mask, past=None)
        return run_layers(text, row, self.layout, *args, **kwargs)


def measure_prefill(case: Case, chunks: int) -> dict[str, float | dict[str, list[float]]]:
    """Reading a long text, both memories full: ours, with savings left out, and literally.

    Args:
        case: what to measure.
        chunks: chunks of a turn.

    Returns:
        "seconds" of each contestant, "tokens" of a turn, "work" of a turn in operations, and the
        products' "peak" in operations per second.

    Raises:
        AssertionError: the contestants do not agree.
    """
    config = case.config
    model, state = CoMeTModel(config), _steady_state(case)
    size = (case.batch_size, chunks * config.memory.chunk_size)
    ids = torch.randint(
        config.backbone.vocab_size, size, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        weights = model.weights
        contestants = {
            "ours": lambda: _read_chunks(ids, state, weights, config, "last"),
            "ours, all of the top layer": lambda: _read_chunks(ids, state, weights, config, "all"),
            "ours, a layout a chunk": lambda: _read_chunks(
                ids, state, weights, config, "last", laid_out_anew=True
            ),
            "ours, with a mask": lambda: _read_chunks(
                ids, state, weights, config, "last", _Masked()
            ),
            "literal": lambda: read_literal(ids, weights, config, state, True),
        }
        last = {name: run()[:, -1] for name, run in contestants.items()}
        for name, hidden in last.items():
            torch.testing.assert_close(hidden, last["ours"], rtol=1e-3, atol=1e-3, msg=name)
        timed = take_turns(contestants, case.rounds)
        peak = matmul_peak(config, case.batch_size, case.rounds)
    return {
        "seconds": timed.seconds,
        "tokens": float(ids.numel()),
        "work": case.batch_size * chunks * chunk_work(config),
        "peak": peak,
    }


def measure_compiled(case: Case, chunks: int, what: str) -> dict[str, Any]:
    """Whole chunks, both memories full: as written, compiled, and literally.

    Args:
        case: what to measure.
        chunks: chunks of a turn.
        what: "reading", or "training": forward and backward, through every chunk.

    Returns:
        "seconds" of each contestant, "tokens" of a turn, and the seconds that the compiled one took
        the "first" time.

    Raises:
        AssertionError: the contestants do not agree.
    """
    config = case.config
    model, state, trains = CoMeTModel(config), _steady_state(case), what == "training"
    size = (case.batch_size, chunks * config.memory.chunk_size)
    ids = torch.randint(config.backbone.vocab_size, size)
    model.compile()
    compiled, weights, outputs = model._layers, model.weights, "all" if trains else "last"
    contestants: dict[str, Callable[[], Tensor]] = {
        "compiled": lambda: _read_chunks(ids, state, weights, config, outputs, compiled),
        "ours": lambda: _read_chunks(ids, state, weights, config, outputs),
        "literal": lambda: read_literal(ids, weights, config, state, True),
    }
    turns = {name: _step(model, run) if trains else run for name, run in contestants.items()}
    with torch.set_grad_enabled(trains):
        # What another process has compiled before does not count.
        with tempfile.TemporaryDirectory() as os.environ["TORCHINDUCTOR_CACHE_DIR"]:
            start = time.perf_counter()
            turns["compiled"]()
            first = time.perf_counter() - start
        last = {name: run()[:, -1].detach() for name, run in contestants.items()}
        for name, hidden in last.items():
            torch.testing.assert_close(hidden, last["ours"], rtol=1e-3, atol=1e-3, msg=name)
        timed = take_turns(turns, case.rounds)
    return {"seconds": timed.seconds, "tokens": float(ids.numel()), "first": first}


def measure_types(case: Case, chunks: int, new: int) -> dict[str, Any]:
    """Reading whole chunks from full memories, and decoding after them, in each dtype.

    Args:
        case: what to measure.
        chunks: chunks of a turn.
        new: tokens to decode in a turn.

    Returns:
        "reading" and "decoding": seconds of each dtype, and the "tokens" of a turn of each.
    """
    state, size = _steady_state(case), chunks * case.config.memory.chunk_size
    ids = torch.randint(case.config.backbone.vocab_size, (case.batch_size, size))
    readers: dict[str, Callable[[], object]] = {}
    writers: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        for name in TYPES:
            dtype = getattr(torch, name)
            model = CoMeTModel(case.config, dtype=dtype)
            own = state.map_tensors(partial(Tensor.to, dtype=dtype))
            readers[name] = partial(model, ids, state=own, logits="last")
            writers[name] = partial(model.generate, ids[:, :1], own, new)
        reading = take_turns(readers, case.rounds)
        decoding = take_turns(writers, case.rounds)
    tokens = {"reading": ids.numel(), "decoding": new * case.batch_size}
    return {"reading": reading.seconds, "decoding": decoding.seconds, "tokens": tokens}


def measure_diagonal(case: Case, chunks: int, what: str) -> dict[str, Any]:
    """Whole chunks from full memories: one after another, and along diagonals.

    Args:
        case: what to measure.
        chunks: chunks of a turn.
        what: "reading", or "training": forward and backward, through every chunk.

    Returns:
        "seconds" of each, and "tokens" of a turn.

    Raises:
        AssertionError: the two do not agree.
    """
    model, state, trains = CoMeTModel(case.config), _steady_state(case), what == "training"
    size = chunks * case.config.memory.chunk_size
    ids = torch.randint(case.config.backbone.vocab_size, (case.batch_size, size))

    def read(diagonal: bool) -> Tensor:
        out = model(ids, state=state, logits="last", diagonal=diagonal)
        assert out.logits is not None  # they are asked for
        return out.logits

    contestants = {"chunks": partial(read, False), "diagonals": partial(read, True)}
    turns = {name: _step(model, run) if trains else run for name, run in contestants.items()}
    with torch.set_grad_enabled(trains):
        last = [run().detach() for run in contestants.values()]
        torch.testing.assert_close(last[1], last[0], rtol=1e-3, atol=1e-3)
        timed = take_turns(turns, case.rounds)
    return {"seconds": timed.seconds, "tokens": float(ids.numel())}


def measure_lengths(case: Case, lengths: Sequence[int]) -> dict[int, dict[str, list[float]]]:
    """Reading whole texts from their start, up to the last token's output: ours, full attention.

    Args:
        case: what to measure.
        lengths: tokens of the texts.

    Returns:
        Per length, seconds of each contestant.
    """
    found = {}
    for length in lengths:
        contestants = {}
        for name, config in (("ours", case.config), ("full attention", case.plain)):
            contestants[name] = _reading(CoMeTModel(config), length, case.batch_size)
        found[length] = take_turns(contestants, case.rounds).seconds
    return found


def _reading(model: CoMeTModel, length: int, batch_size: int) -> Callable[[], object]:
    ids = torch.randint(model.config.backbone.vocab_size, (batch_size, length))

    def run() -> object:
        with torch.no_grad():
            return model(ids, logits="last").logits

    return run


def measure_decoding(
    case: Case, lengths: Sequence[int], tokens: int
) -> dict[int, dict[str, list[float]]]:
    """Generating after texts of several lengths: ours, full attention with its keys kept.

    Args:
        case: what to measure.
        lengths: tokens of the texts.
        tokens: to generate in a turn.

    Returns:
        Per length, seconds a token of each contestant.
    """
    found = {}
    for length in lengths:
        contestants = {}
        for name, config in (("ours", case.config), ("full attention", case.plain)):
            contestants[name] = _generating(CoMeTModel(config), length, tokens, case.batch_size)
        timed = take_turns(contestants, case.rounds)
        found[length] = {
            name: [s / tokens for s in seconds] for name, seconds in timed.seconds.items()
        }
    return found


def _generating(
    model: CoMeTModel, length: int, tokens: int, batch_size: int
) -> Callable[[], object]:
    ids = torch.randint(model.config.backbone.vocab_size, (batch_size, length))
    with torch.no_grad():
        state = model(ids, logits="none").state
    return lambda: model.generate(ids[:, :1], state, tokens)


def measure_training(case: Case, chunks: int) -> dict[str, list[float]]:
    """Forward and backward of the last token's output, through every chunk: ours, literal.

    Returns:
        Seconds of each contestant.
    """
    config = case.config
    model, state = CoMeTModel(config), _steady_state(case)
    size = (case.batch_size, chunks * config.memory.chunk_size)
    ids = torch.randint(config.backbone.vocab_size, size)

    contestants = {
        "ours": _step(model, lambda: _read_chunks(ids, state, model.weights, config, "all")),
        "literal": _step(model, lambda: read_literal(ids, model.weights, config, state, True)),
    }
    return take_turns(contestants, case.rounds).seconds


def _step(model: CoMeTModel, run: Callable[[], Tensor]) -> Callable[[], object]:
    """A training step: forward, and backward of the last token's output."""

    def step() -> None:
        model.zero_grad()
        run().square().mean().backward()

    return step


def measure_attention(case: Case, sizes: Sequence[int]) -> list[dict[str, list[float]]]:
    """One layer's attention of new slots after as many others: with a mask, and in two parts.

    Returns:
        Of each size, seconds of "masked" and "joined".
    """
    backbone, found = case.config.backbone, []
    for size in sizes:
        queries = torch.randn(1, backbone.num_attention_heads, size, backbone.head_dim)
        shape = (1, backbone.num_key_value_heads, 2 * size, backbone.head_dim)
        row = queries, torch.randn(shape), torch.randn(shape)
        positions = torch.arange(size, 2 * size)[None]
        mask = causal_mask(positions, 2 * size, torch.float32)
        contestants = {
            "masked": partial(attention, *row, positions, mask),
            "joined": partial(attend_after, *row, size),
        }
        with torch.no_grad():
            found.append(take_turns(contestants, case.rounds).seconds)
    return found


def measure_graph(case: Case, chunks: int, kept: str) -> dict[str, float]:
    """The gradient of one text's loss.

    Args:
        chunks: of the text.
        kept: for the backward pass: "all"; no more than what `recompute` keeps of "cells" or of
            "chunks"; or "windows", two chunks at a time, with the gradient cut between them.

    Returns:
        "peak", bytes above what the model itself takes, gradients included; "seconds".
    """
    model, config = CoMeTModel(case.config), case.config

    def train(tokens: int) -> None:
        ids = torch.randint(config.backbone.vocab_size, (case.batch_size, tokens))
        window = 2 if kept == "windows" else chunks
        again = kept if kept in ("cells", "chunks") else "none"
        for part in model.windows(ids, ids, backprop_chunks=window, recompute=again):
            part.loss.backward()

    train(2)  # what the library takes at its first call is no part of a step
    gradients = sum(p.nbytes for p in model.parameters())
    before, begun = resident_memory() - gradients, time.perf_counter()
    train(chunks * config.memory.chunk_size)
    return {"peak": peak_memory() - before, "seconds": time.perf_counter() - begun}


def measure_memory(case: Case, length: int, block: int = 4096) -> dict[str, float]:
    """Reading one long text in calls of `block` tokens.

    Returns:
        "peak", the process's largest resident set, and "state", its tensors, in bytes; "seconds".
    """
    model = CoMeTModel(case.config)
    state, start = model.new_state(case.batch_size), time.perf_counter()
    with torch.no_grad():
        for text in _texts(case, length, block):
            state = model(text, state=state, logits="none").state
        state = model.close_chunk(state)
    seconds = time.perf_counter() - start
    return {"peak": float(peak_memory()), "state": float(state.num_bytes), "seconds": seconds}


def _texts(case: Case, length: int, block: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, length, block):
        size = (case.batch_size, min(block, length - start))
        yield torch.randint(case.config.backbone.vocab_size, size, generator=generator)
