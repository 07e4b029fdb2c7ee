"""How long a shared step takes, from the costs of its parts: the schedule of `pipeline`, on paper.

A worker begins a cell when it has done the one before it, and when that layer's memories are there.
Nothing else is known of a machine than what its cells and messages cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Costs", "Simulated", "bubble", "simulate"]


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    forward: tuple[float, ...]
    """Of a cell forward, in each of the first chunks, whose queue is not full yet; the last number
    is that of all chunks that follow."""

    backward: tuple[float, ...]
    """Likewise, of a cell back."""

    head: float = 0.0
    """Of a chunk's loss with its gradient."""

    transfer: float = 0.0
    """From the moment that a message is sent until the other worker has it."""

    rest: float = 0.0
    """Of a step's start and end: what workers compare, and the sums of gradients."""


@dataclass(frozen=True)
class Simulated:
    """What comes of it."""

    seconds: float
    """Of a step."""

    bubble: float
    """Share of the workers' time in which they wait."""


def simulate(
    costs: Costs, layers: int, chunks: int, workers: int, block: int = 1, *, naive: bool = False
) -> Simulated:
    """Time of a step.

    Args:
        costs: of its parts.
        layers: of the model.
        chunks: of the text.
        workers: that share it.
        block: chunks that a worker reads before the next one's turn.
        naive: whether a worker waits for all layers of the chunk before, as context parallelism by
            chunks does.

    Returns:
        Its seconds, and the bubble.
    """
    starts = np.arange(0, chunks, block)
    forward, backward = (_of_chunks(cell, chunks) for cell in (costs.forward, costs.backward))
    heads = np.full(chunks, costs.head)
    transfer = costs.transfer if workers > 1 else 0.0
    free = np.zeros(workers)
    for cells, after, order in (
        (forward, heads, range(len(starts))),
        (backward, 0 * heads, reversed(range(len(starts)))),
    ):
        arrived = np.zeros(layers)  # in the order in which the layers are run
        of_block = np.add.reduceat(cells, starts), np.add.reduceat(after, starts)
        for number in order:
            worker, cell, head = number % workers, of_block[0][number], of_block[1][number]
            if naive:
                arrived = np.full(layers, arrived.max())
            # A layer ends at max(arrival, end of the one before) + duration. Less the durations up
            # to it, that is a running maximum.
            spent = cell * np.arange(layers)
            begun = np.maximum.accumulate(np.maximum(arrived, free[worker]) - spent) + spent
            ended = begun + cell
            free[worker] = ended[-1] + head
            arrived = ended + transfer
    busy = float(layers * (forward + backward).sum() + heads.sum())
    seconds = float(free.max()) + costs.rest
    return Simulated(seconds, 1 - busy / (workers * seconds))


def _of_chunks(cell: tuple[float, ...], chunks: int) -> np.ndarray:
    """[chunks] seconds of a cell in each of them."""
    return np.asarray(cell)[np.minimum(np.arange(chunks), len(cell) - 1)]


def bubble(layers: int, workers: int, rounds: int = 1) -> float:
    """Share of the workers' time in which they wait, were cells all that took time: (P - 1) /
    (L + P - 1) where each has one block.

    Args:
        layers: L.
        workers: P.
        rounds: blocks of a worker.
    """
    # From one block of a worker to its next: its own cells, or the way once around the ring.
    cells = (rounds - 1) * max(layers, workers) + layers + workers - 1
    return 1 - rounds * layers / cells
