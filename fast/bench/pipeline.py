"""Layer-level pipeline parallelism, measured and simulated.

Two worker processes of one thread each share a step of training. Beside them, one process of one
thread does the step alone, and the same two workers do it by chunks: each begins a chunk when all
layers of the chunk before are done, which is context parallelism at its plainest. What two cores
can give at all is told by two processes that share nothing, each with a step of its own. All take
turns, and medians are compared. What cells and messages cost is taken from a step of the two workers, and
given to the simulator, whose times are held against those measured.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from reference.config import CoMeTConfig

from ..files import atomic_write, check_writable, put_parts
from ..machine import keep_memory, machine
from ..model import CoMeTModel
from ..parallel import Pipeline, Span, simulator
from ..parallel.simulator import Costs, bubble
from .speed import BACKBONES, MEMORIES, Timed, take_turns

__all__ = [
    "Measured",
    "Setting",
    "costs_of",
    "measure",
    "measured_table",
    "predicted_table",
    "run",
    "save",
    "scaling_table",
]


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    backbone: str = "5M"
    """One of `speed.BACKBONES`."""

    memory: str = "256/32/128"
    """One of `speed.MEMORIES`."""

    rounds: int = 5
    """How often each contestant is timed."""

    chunks: tuple[int, ...] = (2, 4, 16, 32)
    """Lengths of the texts."""

    blocks: tuple[int, ...] = (1, 2)
    """Chunks that a worker reads before the other one's turn."""

    picture: int = 6
    """Chunks of the text whose cells are recorded."""

    @property
    def config(self) -> CoMeTConfig:
        """The model."""
        return CoMeTConfig(BACKBONES[self.backbone], MEMORIES[self.memory])


QUICK = Setting("small", "128/8/16", rounds=1, chunks=(2, 4), blocks=(1,))
"""In seconds."""

WORKERS = 2
"""Processes of one thread: as many as the machine that the page is of has cores."""

ALONE, TOGETHER, NAIVE = "one process", "two workers", "two workers, chunk by chunk"
APART = "two processes, a step each"
"""Contestants."""


@dataclass(frozen=True)
class Measured:
    """What was found."""

    setting: Setting
    machine: str
    seconds: list[tuple[int, int, dict[str, list[float]]]]
    """Chunks, block, and seconds of each contestant."""

    costs: Costs
    """Of a step of two workers, at `setting.chunks[-1]` chunks."""

    picture: list[Span]
    """What two workers did in a step at `setting.picture` chunks, from its start."""


class _ByChunks(Pipeline):
    """Workers that wait for all layers of the chunk before."""

    def receive(self, kind: str, messages: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        coming = super().receive(kind, messages)
        arrived: list[Tensor] = []

        def wait(place: int) -> Tensor:
            if not arrived:
                arrived.extend(one() for one in coming)
            return arrived[place]

        return [partial(wait, place) for place in range(len(coming))]


def measure(
    setting: Setting, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> Measured:
    """Measure, in two processes of their own.

    Args:
        setting: what.
        progress: wraps the list of texts, as `tqdm` does.

    Raises:
        RuntimeError: a process ended, for want of memory perhaps.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(WORKERS):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, Path(folder) / "store", setting, theirs), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        seconds = []
        try:
            for chunks, block in progress(_texts(setting)):
                for pipe in pipes:
                    pipe.send((chunks, block))
                timed = [pipe.recv() for pipe in pipes]
                seconds.append((chunks, block, timed[0]))
            for pipe in pipes:
                pipe.send(None)
            found = [pipe.recv() for pipe in pipes]
        except EOFError:
            raise RuntimeError("a worker of the bench has ended; its own error says why.") from None
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    return Measured(
        setting,
        machine("processes of one thread"),
        seconds,
        costs_of(list(zip(*(one["steps"] for one in found), strict=True)), found[0]["transfer"]),
        [span for one in found for span in one["picture"]],
    )


def _texts(setting: Setting) -> list[tuple[int, int]]:
    """Chunks and block of each text that is timed."""
    return [(chunks, block) for chunks in setting.chunks for block in setting.blocks]


def _work(rank: int, store: Path, setting: Setting, pipe: Connection) -> None:
    """What a worker does: its part of every turn, at the same time as the other."""
    torch.set_num_threads(1)
    keep_memory()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    place, limit = f"file://{store}", timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=WORKERS, timeout=limit)
    mesh = DeviceMesh("cpu", torch.arange(WORKERS), mesh_dim_names=("pipeline",))
    model = CoMeTModel(setting.config)
    while (told := pipe.recv()) is not None:
        pipe.send(_take_turns(model, mesh, rank, setting, *told))
    recorded = {
        "steps": [_record(model, mesh, setting, setting.chunks[-1]) for _ in range(setting.rounds)],
        "picture": _record(model, mesh, setting, setting.picture),
        "transfer": _transfer(model, rank, setting),
    }
    pipe.send(recorded)
    dist.barrier()


def _text(setting: Setting, chunks: int) -> Tensor:
    """A text of whole chunks, [1, n]."""
    n = chunks * setting.config.memory.chunk_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(setting.config.backbone.vocab_size, (1, n), generator=generator)


def _take_turns(
    model: CoMeTModel, mesh: DeviceMesh, rank: int, setting: Setting, chunks: int, block: int
) -> dict[str, list[float]]:
    """Seconds of each contestant. Both workers take part in every turn, if only by waiting."""
    ids = _text(setting, chunks)
    losses: dict[str, Tensor] = {}

    def alone(ranks: Sequence[int]) -> None:
        if rank in ranks:
            model.zero_grad()
            loss = model(ids, labels=ids, logits="none").loss
            assert loss is not None
            loss.backward()
            losses[ALONE] = loss.detach()

    def together(name: str, pipeline: Pipeline) -> None:
        model.zero_grad()
        losses[name] = pipeline.step(ids, ids)

    contestants: dict[str, Callable[[], object]] = {ALONE: partial(alone, [0])}
    for name, kind in ((TOGETHER, Pipeline), (NAIVE, _ByChunks)):
        contestants[name] = partial(together, name, kind(model, mesh, block=block))
    contestants[APART] = partial(alone, range(WORKERS))
    timed = take_turns(contestants, setting.rounds, dist.barrier)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, losses[TOGETHER], rtol=1e-3, atol=1e-3, msg=name)
    return timed.seconds


def _record(model: CoMeTModel, mesh: DeviceMesh, setting: Setting, chunks: int) -> list[Span]:
    """What this worker does in a step, times counted from the step's start."""
    pipeline, ids = Pipeline(model, mesh), _text(setting, chunks)
    pipeline.step(ids, ids)
    dist.barrier()
    start = torch.tensor(time.perf_counter(), dtype=torch.float64)
    dist.broadcast(start, 0)
    pipeline.spans = []
    pipeline.step(ids, ids)
    zero = start.item()
    return [dataclasses.replace(s, start=s.start - zero, end=s.end - zero) for s in pipeline.spans]


def _transfer(model: CoMeTModel, rank: int, setting: Setting, times: int = 50) -> float:
    """Seconds of a message of a layer's memories: half of the way there and back, the median."""
    memory = setting.config.memory
    slots = memory.global_memory_size + memory.temporary_memory_size
    message = torch.zeros(slots * setting.config.backbone.hidden_size, dtype=model.dtype)
    found = []
    for _ in range(times):
        start = time.perf_counter()
        for sender in (0, 1):
            if rank == sender:
                dist.send(message, 1 - rank)
            else:
                dist.recv(message, 1 - rank)
        found.append((time.perf_counter() - start) / 2)
    return statistics.median(found)


def costs_of(steps: Sequence[Sequence[Sequence[Span]]], transfer: float) -> Costs:
    """Medians of recorded steps. Chunks of a text's second half count as alike.

    Args:
        steps: of each, what each worker did, from the step's start.
        transfer: seconds of a message.
    """
    spans = [span for step in steps for worker in step for span in worker]
    chunks = 1 + max(span.chunk for span in spans)

    def median(kind: str, wanted: range) -> float:
        return statistics.median(
            s.end - s.start for s in spans if s.kind == kind and s.chunk in wanted
        )

    def cells(kind: str) -> tuple[float, ...]:
        half = chunks // 2
        first = (median(kind, range(t, t + 1)) for t in range(half))
        return *first, median(kind, range(half, chunks))

    def rest(step: Sequence[Sequence[Span]]) -> float:
        begun = min(span.start for worker in step for span in worker)
        # Who comes first to the sums waits for the others: the last one's are all work.
        sums = (s.end - s.start for worker in step for s in worker if s.kind == "add")
        return begun + min(sums)

    return Costs(
        cells("forward"),
        cells("backward"),
        median("head", range(chunks)),
        transfer,
        statistics.median(map(rest, steps)),
    )


def save(found: Measured, path: Path) -> None:
    """Write all of it, as JSON."""
    atomic_write(path, json.dumps(asdict(found)) + "\n")


def _table(head: str, rows: Iterable[str]) -> str:
    cells = head.count("|") - 1
    return "\n".join([head, "|" + " --- |" * cells, *rows])


def measured_table(found: Measured) -> str:
    """Medians, and how many times two workers are as fast as the others; beside it how many times
    the work of one process two do that share nothing.
    """
    rows = []
    for chunks, block, seconds in found.seconds:
        timed = Timed(seconds)
        alone, together, naive, apart = map(timed.median, (ALONE, TOGETHER, NAIVE, APART))
        rows.append(
            f"| {chunks} | {block} | {alone:.2f} s | {together:.2f} s | {naive:.2f} s | "
            f"**{alone / together:.2f}** | {WORKERS * alone / apart:.2f} | {naive / together:.2f} | "
            f"{100 * max(map(timed.spread, seconds)):.0f} % |"
        )
    head = (
        f"| chunks | block | {ALONE} | {TOGETHER} | {NAIVE} | times as fast as one | {APART} | "
        "as by chunks | spread |"
    )
    return _table(head, rows)


def _alone(costs: Costs) -> Costs:
    """Those of one process, which agrees with nobody and has nothing to sum."""
    return dataclasses.replace(costs, rest=0.0)


def predicted_table(found: Measured) -> str:
    """The simulator's times beside those measured."""
    layers, rows = found.setting.config.backbone.num_hidden_layers, []
    for chunks, block, seconds in found.seconds:
        timed = Timed(seconds)
        for name, costs, workers, naive in (
            (ALONE, _alone(found.costs), 1, False),
            (TOGETHER, found.costs, WORKERS, False),
            (NAIVE, found.costs, WORKERS, True),
        ):
            told = simulator.simulate(costs, layers, chunks, workers, block, naive=naive).seconds
            seen = timed.median(name)
            error = 100 * (told / seen - 1)
            rows.append(
                f"| {chunks} | {block} | {name} | {seen:.2f} s | {told:.2f} s | {error:+.0f} % |"
            )
    return _table("| chunks | block | | measured | simulated | error |", rows)


SIZES = tuple(2**i for i in range(1, 11))
"""Workers: 2 to 1,024."""

MOST_BLOCKS = 2**11
"""Into which a text is cut, however long, so that a table takes seconds."""

LENGTHS = {"32k": 2**15, "128k": 2**17, "1M": 2**20, "16M": 2**24}
"""Tokens."""


def scaling_table(found: Measured) -> str:
    """What the simulator says of many workers: for each length, the block that is fastest, the time
    beside one worker's, and the bubble.

    Args:
        found: whose costs are taken.
    """
    costs, config = found.costs, found.setting.config
    layers, rows = config.backbone.num_hidden_layers, []
    for name, tokens in LENGTHS.items():
        chunks = tokens // config.memory.chunk_size
        one = simulator.simulate(_alone(costs), layers, chunks, 1).seconds
        naive = simulator.simulate(costs, layers, chunks, 2, naive=True).seconds  # of any number
        least = max(1, chunks // MOST_BLOCKS)
        for workers in (w for w in SIZES if w <= chunks):
            largest = chunks // workers
            told = {
                block: simulator.simulate(costs, layers, chunks, workers, block)
                for block in (*(least * k for k in (1, 2, 4, 8)), largest)
                if block <= largest
            }
            best = min(told, key=lambda block: told[block].seconds)
            seconds = told[best].seconds
            rows.append(
                f"| {name} | {workers:,} | {best} | {seconds:.1f} s | {one / seconds:.2f} | "
                f"{100 * told[best].bubble:.0f} % | {100 * told[largest].bubble:.0f} % | "
                f"{100 * bubble(layers, workers):.0f} % | {naive / seconds:.2f} |"
            )
    head = (
        "| tokens | workers | best block | a step | times as fast as one | bubble | bubble, one block "
        "a worker | (P-1)/(L+P-1) | times as fast as by chunks |"
    )
    return _table(head, rows)


def run(out: Path, quick: bool, simulate: bool, page: Path | None) -> None:
    """Measure, print tables, and write them down.

    Args:
        out: folder that gets `pipeline.json`.
        quick: whether the least will do.
        simulate: whether the simulator's tables are among them.
        page: a Markdown file to put tables into, between `<!-- NAME -->` and `<!-- end -->`; or
            None.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the page lacks a place.
    """
    from tqdm import tqdm  # of the extra `commands`

    tables: dict[str, Callable[[Measured], str]] = {
        "machine": lambda found: found.machine,
        "measured": measured_table,
    }
    if simulate:
        tables |= {"predicted": predicted_table, "scaling": scaling_table}
    check_writable(out / "pipeline.json")
    if page is not None:  # before anything is measured
        put_parts(page.read_text(encoding="utf-8"), dict.fromkeys(tables, ""), page)
        check_writable(page)
    found = measure(QUICK if quick else Setting(), tqdm)
    save(found, out / "pipeline.json")
    parts = {name: table(found) for name, table in tables.items()}
    print("\n" + "\n\n".join(parts.values()))
    print(f"\nwrote {out / 'pipeline.json'}")
    if page is not None:
        atomic_write(page, put_parts(page.read_text(encoding="utf-8"), parts, page))
