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

    forward: float
    """Of a cell, forward."""

    backward: float
    """Of a cell, back."""

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
    sizes = [min(block, chunks - start) for start in range(0, chunks, block)]
    transfer = costs.transfer if workers > 1 else 0.0
    free = np.zeros(workers)
    for cell, head, order in (
        (costs.forward, costs.head, range(len(sizes))),
        (costs.backward, 0.0, reversed(range(len(sizes)))),
    ):
        arrived = np.zeros(layers)  # in the order in which the layers are run
        for number in order:
            worker, size = number % workers, sizes[number]
            if naive:
                arrived = np.full(layers, arrived.max())
            # A cell ends at max(arrival, end of the one before) + duration. Less the durations up to
            # it, that is a running maximum.
            spent = size * cell * np.arange(layers)
            begun = np.maximum.accumulate(np.maximum(arrived, free[worker]) - spent) + spent
            ended = begun + size * cell
            free[worker] = ended[-1] + size * head
            arrived = ended + transfer
    busy = chunks * (layers * (costs.forward + costs.backward) + costs.head)
    seconds = float(free.max()) + costs.rest
    return Simulated(seconds, 1 - busy / (workers * seconds))


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
