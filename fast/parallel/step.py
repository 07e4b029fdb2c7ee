"""A worker's way through a text: its cells forward and back, and what it receives and sends.

A **cell** is a layer of a chunk, as in `cells`: here with the opening of its row, since that is what
the memories of the chunk before are for. A worker runs the cells of its blocks layer by layer. The
backward pass goes the same way back, block by block and layer by layer, each cell a graph of its
own: what autograd does for a text in one process is done here by hand between cells, and by autograd
inside of them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from reference.config import CoMeTConfig

from ..cells import Layout, embed, run_layer
from ..layers import Weights, take_slots
from ..model import score_round
from ..rereading import send_back
from ..rows import Row
from ..stream import layout_of, place_row
from .ring import GRADIENTS, MEMORIES, Ring
from .schedule import Chunk, deal

__all__ = ["Span", "Step", "Text", "digest"]

Maybe = Tensor | None

Receive = Callable[[str, Sequence[Tensor]], list[Callable[[], Tensor]]]
"""Called with the kind of messages and tensors to put them into; returns what waits for each."""


@dataclass(frozen=True)
class Span:
    """What a worker did in a stretch of time."""

    kind: str
    """Of a cell: "forward" or "backward"; "head" is a chunk's loss with its gradient, "add" the sums
    over workers at a step's end."""

    worker: int
    """Which worker."""

    chunk: int
    """Which chunk; -1 of sums."""

    layer: int
    """Which layer; -1 of heads and sums."""

    start: float
    """Seconds of `time.perf_counter`, which the processes of a machine share."""

    end: float
    """Likewise."""


def digest(*parts: bytes) -> int:
    """63 bits of a hash of bytes."""
    found = hashlib.blake2b(b"".join(parts), digest_size=8).digest()
    return int.from_bytes(found, "little") >> 1


@dataclass(frozen=True)
class Text:
    """A batch of texts, checked and planned."""

    ids: Tensor
    """[b, n + 1], the last column for padding."""

    targets: Tensor
    """[b, n + 1], likewise."""

    chunks: list[Chunk]
    num_labels: int
    """Of all texts, once workers have agreed."""

    def digest(self) -> int:
        """63 bits that tell it from others."""
        shape = tuple(self.ids.shape), [chunk.row.take.tolist() for chunk in self.chunks]
        texts = (x.cpu().numpy().tobytes() for x in (self.ids, self.targets))
        return digest(repr(shape).encode(), *texts)


class _Call:
    """A function called with gradients to come: a graph of its own, from its inputs to its outputs."""

    def __init__(
        self,
        function: Callable[..., tuple[Maybe, ...]],
        inputs: Sequence[Maybe] = (),
        needed: Sequence[bool] = (),
        recompute: bool = False,
    ) -> None:
        """What to call.

        Args:
            function: from tensors to tensors; None stands for what is not there.
            inputs: its arguments.
            needed: which of them get a gradient.
            recompute: whether nothing but the inputs is kept, and the function called again.
        """
        self._function, self._recompute = function, recompute
        self._inputs = tuple(
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip(inputs, needed, strict=True)
        )
        self._kept: tuple[Maybe, ...] | None = None

    def forward(self) -> tuple[Maybe, ...]:
        """The outputs; a graph where gradients are on."""
        if self._recompute:
            with torch.no_grad():
                return self._function(*self._inputs)
        self._kept = self._function(*self._inputs)
        return self._kept

    def backward(self, gradients: Sequence[Maybe]) -> list[Maybe]:
        """The gradients of the inputs, from those of the outputs; those of weights are added to
        theirs. What was kept is let go.
        """
        outputs = self._kept
        if outputs is None:
            with torch.enable_grad():
                outputs = self._function(*self._inputs)
        send_back(outputs, gradients)
        found = [None if x is None else x.grad for x in self._inputs]
        self._inputs, self._kept = (), None
        return found


@dataclass
class _Reading:
    """A chunk under way."""

    chunk: Chunk
    row: Row
    """On the device."""

    layout: Layout
    """What its layers share."""

    embedded: _Call
    """What `hidden` came from."""

    hidden: Tensor
    """[b, n, d], the newest."""

    cells: list[_Call] = field(default_factory=list)
    """One a layer."""

    gradient: Maybe = None
    """Of `hidden`, on the way back."""


class Step:
    """One pass over a text, forward and back."""

    def __init__(
        self,
        ring: Ring,
        text: Text,
        params: Weights,
        config: CoMeTConfig,
        *,
        block: int,
        recompute: bool,
        train: bool,
        receive: Receive,
        spans: list[Span] | None,
    ) -> None:
        """What it is of.

        Args:
            ring: this worker's place.
            text: the same in all workers.
            params: weights, whose gradients are added to where it trains.
            config: of the model.
            block: chunks of a block.
            recompute: whether cells are computed again on the way back.
            train: whether there is a way back.
            receive: begins to receive a block's messages, one a layer.
            spans: gets what was done; None is nobody.
        """
        self.ring, self.text, self.params, self.config = ring, text, params, config
        self.recompute, self.train = train and recompute, train
        self.receive, self.spans = receive, spans
        self.layers = list(params["layers"])
        blocks = deal(text.chunks, block)
        workers, worker = len(self.ring.workers), self.ring.worker
        self.last_block = len(blocks) - 1
        self.numbers = range(worker, len(blocks), workers)
        self.blocks = {number: blocks[number] for number in self.numbers}
        self.dtype, self.device = params["norm"].dtype, text.ids.device
        self._layouts: dict[tuple[int, ...], Layout] = {}

    def _note(self, kind: str, chunk: int, layer: int, start: float) -> None:
        """Tell of what has just been done."""
        if self.spans is not None:
            end = time.perf_counter()
            self.spans.append(Span(kind, self.ring.worker, chunk, layer, start, end))

    def run(self) -> Tensor:
        """Nats of this worker's chunks, float64; gradients are in the weights."""
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        read: dict[int, list[_Reading]] = {}
        posted = self._post(MEMORIES, self.numbers, 0)
        for place, number in enumerate(self.numbers):
            coming = posted
            posted = self._post(MEMORIES, self.numbers, place + 1)
            readings = self._forward(number, coming)
            for reading in readings:
                nats = nats + self._head(reading)
            if self.train:
                read[number] = readings
            self.ring.settle(1)
        if self.train:
            back = self.numbers[::-1]
            posted = self._post(GRADIENTS, back, 0)
            for place, number in enumerate(back):
                coming = posted
                posted = self._post(GRADIENTS, back, place + 1)
                self._backward(number, read.pop(number), coming)
                self.ring.settle(1)
        self.ring.settle(0)
        return nats

    def _shapes(self, kind: str, number: int) -> list[tuple[int, ...] | None]:
        """Of a layer's global state and queue: of those that block `number` takes, or of the
        gradients of those that it leaves. None where there is no such memory.
        """
        memory, d = self.config.memory, self.config.backbone.hidden_size
        block = self.blocks[number]
        queue = block[0].queue_before if kind == MEMORIES else block[-1].queue_after
        b = len(self.text.ids)
        return [
            (b, memory.global_memory_size, d) if memory.has_global else None,
            (b, queue, d) if memory.has_temporary else None,
        ]

    def _zeros(self, shape: tuple[int, ...] | None) -> Maybe:
        """Zeros of a shape."""
        if shape is None:
            return None
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _post(self, kind: str, numbers: Sequence[int], place: int) -> list[Callable[[], Tensor]]:
        """Begin to receive what a block needs, layer after layer; nothing where there is no such
        block, or nothing that it needs.
        """
        if place >= len(numbers):
            return []
        number = numbers[place]
        if number == (0 if kind == MEMORIES else self.last_block):
            return []
        size = sum(prod(shape) for shape in self._shapes(kind, number) if shape is not None)
        if not size:
            return []
        messages = [torch.empty(size, dtype=self.dtype, device=self.device) for _ in self.layers]
        return self.receive(kind, messages)

    def _take(self, kind: str, number: int, message: Tensor) -> list[Maybe]:
        """Global state and queue of a message, or their gradients; None where there is no such."""
        found: list[Maybe] = []
        for shape in self._shapes(kind, number):
            if shape is None:
                found.append(None)
                continue
            found.append(message[: prod(shape)].view(shape))
            message = message[prod(shape) :]
        return found

    def _send(self, kind: str, tensors: Sequence[Maybe]) -> None:
        """Send what there is of them, as one message of the weights' dtype."""
        there = [x.detach().reshape(-1).to(self.dtype) for x in tensors if x is not None]
        if sum(x.numel() for x in there):
            self.ring.send(kind, torch.cat(there))

    def _begin(self, chunk: Chunk) -> _Reading:
        """A chunk's slots, embedded, and what all layers share."""
        row = place_row(chunk.row, self.device)
        text = take_slots(self.text.ids, row.columns)

        def embedding() -> tuple[Tensor]:
            return (embed(text, row.source, self.params, self.config),)

        embedded = _Call(embedding)
        (hidden,) = embedded.forward()
        assert hidden is not None
        layout = self._layout(chunk, row)
        return _Reading(chunk, row, layout, embedded, hidden)

    def _layout(self, chunk: Chunk, row: Row) -> Layout:
        """A chunk's layout. Once the queue is full, all chunks have the same: it is made once, and
        kept once.
        """
        key = chunk.slots, *chunk.row.positions.shape
        if key not in self._layouts:
            self._layouts[key] = layout_of(
                chunk.row, row, chunk.slots, self.params, self.config, starts=True
            )
        return self._layouts[key]

    def _cell(
        self, i: int, reading: _Reading, hidden: Tensor, state: Maybe, queue: Maybe
    ) -> tuple[Maybe, ...]:
        """Layer i of a chunk: its row opened, its slots run, its memories updated."""
        weights, config, layout = self.layers[i], self.config, reading.layout
        unrotated = i in config.backbone.unrotated_layers
        cell = weights if isinstance(weights, nn.Module) else partial(run_layer, weights=weights)
        hidden, _, _, state, queue = cell(
            hidden,
            reading.row,
            layout.rotations[unrotated],
            layout.mask,
            None,
            None,
            state,
            queue,
            config,
            None,
            layout.opening[unrotated] if layout.opening else None,
            layout.past,
        )
        return hidden, state, queue

    def _forward(self, number: int, coming: Sequence[Callable[[], Tensor]]) -> list[_Reading]:
        """A block's cells, layer by layer; each layer's memories go on when it is done."""
        readings = [self._begin(chunk) for chunk in self.blocks[number]]
        for i in range(len(self.layers)):
            if coming:
                memories = self._take(MEMORIES, number, coming[i]())
            else:  # before any text
                memories = [self._zeros(shape) for shape in self._shapes(MEMORIES, number)]
            for reading in readings:
                start = time.perf_counter()
                later = reading.chunk.number > 0
                needed = (i > 0 or reading.hidden.requires_grad, later, later)
                inputs = (reading.hidden, *memories)
                call = _Call(partial(self._cell, i, reading), inputs, needed, self.recompute)
                reading.hidden, *memories = call.forward()  # type: ignore[assignment]
                if self.train:
                    reading.cells.append(call)
                self._note("forward", reading.chunk.number, i, start)
            if number < self.last_block:
                self._send(MEMORIES, memories)
        return readings

    def _head(self, reading: _Reading) -> Tensor:
        """A chunk's nats; where it trains, their gradient is taken at once, so that no logits are
        kept.
        """
        start = time.perf_counter()
        hidden = reading.hidden.detach().requires_grad_(self.train)
        top = take_slots(hidden, reading.row.text)
        nats = score_round(top, reading.row, self.text.targets, self.params, self.config)[0]
        if self.train:
            share = torch.ones_like(nats) / self.text.num_labels
            torch.autograd.backward(nats, share)
            reading.gradient = hidden.grad
        self._note("head", reading.chunk.number, -1, start)
        return nats.detach().double()

    def _backward(
        self, number: int, readings: list[_Reading], coming: Sequence[Callable[[], Tensor]]
    ) -> None:
        """A block's cells back, layer by layer from the top; gradients go back at once."""
        for i in reversed(range(len(self.layers))):
            gradients: list[Maybe] = [None, None]
            if coming:
                gradients = self._take(GRADIENTS, number, coming[len(self.layers) - 1 - i]())
            for reading in reversed(readings):
                start = time.perf_counter()
                call = reading.cells.pop()
                reading.gradient, *gradients = call.backward((reading.gradient, *gradients))
                self._note("backward", reading.chunk.number, i, start)
            if number > 0:
                shapes = self._shapes(MEMORIES, number)
                pairs = zip(shapes, gradients, strict=True)
                self._send(GRADIENTS, [self._zeros(s) if x is None else x for s, x in pairs])
        for reading in readings:
            reading.embedded.backward((reading.gradient,))
