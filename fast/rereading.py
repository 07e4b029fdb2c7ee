"""Rounds that are read again in the backward pass: of each, the memories before it are kept, no more.

To autograd a round is one operation. The graph of its cells exists while it is read again, and no
longer. Of queues, which share most entries with those before them, each round's new entries are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import get_device_states, set_device_states

from reference.parameters import named_parameters

from .layers import Weights
from .state import CoMeTState

if TYPE_CHECKING:
    from .recorder import Recorder
    from .stream import Reading

__all__ = ["Rereader", "send_back"]

Tensors = tuple[Tensor, ...]


class Rereader:
    """Reads the rounds of one call."""

    def __init__(self, on_host: bool = False) -> None:
        """What is kept, and where.

        Args:
            on_host: whether the memories are kept in the host's memory.
        """
        self._on_host = on_host
        self._queue: Tensors = ()  # per layer, of the state after the last round
        self._pieces: list[Tensors] = []  # what it was joined from: per piece, per layer

    def __call__(
        self,
        read: Callable[..., Reading],
        text: Tensor,
        state: CoMeTState,
        params: Weights,
        recorder: Recorder | None = None,
    ) -> Reading:
        """What `read(text, state, recorder=recorder)` returns; gradients come from reading again.

        Args:
            read: reads one round, and the same one each time.
            text: as `stream.run_row` takes it.
            state: where the streams stand.
            params: the weights that are read with.
            recorder: what watches the first time.
        """
        if not torch.is_grad_enabled():
            return read(text, state, recorder=recorder)
        if not self._pieces or state.temporary_memory is not self._queue:  # or a gradient was cut
            self._queue = state.temporary_memory
            if (state.queue_length == state.queue_length[0]).all():
                self._queue = tuple(t[:, : int(state.queue_length[0])] for t in self._queue)
            self._pieces = [self._queue]
        kept = [state.global_state, state.keys, state.values, *self._pieces]
        one = _Round(
            read,
            state.map_tensors(lambda _: text[:0]),  # of which the counts are needed, no tensors
            [len(part) for part in kept],
            _entries(self._queue),
            recorder,
        )
        of_module = isinstance(params, nn.Module)
        weights = params.parameters() if of_module else named_parameters(params).values()
        trained = [p for p in weights if p.requires_grad]
        with save_on_cpu() if self._on_host else nullcontext():
            tensors = _Again.apply(one, len(trained), text, *_flat(kept), *trained)
        return self._finish(one.take(), tensors)

    def _finish(self, reading: Reading, tensors: Tensors) -> Reading:
        """A reading with the tensors that have gradients in place of its own."""
        lengths = [len(part) for part in _made(reading)]
        (hidden,), nats, states, keys, values, new = _split(tensors, lengths)
        shared = _is_shared(reading)
        pieces = [*self._pieces, new] if shared else [new]
        size = _entries(reading.state.temporary_memory)
        while len(pieces) > 1 and sum(map(_entries, pieces[1:])) >= size:
            pieces = pieces[1:]
        self._queue = _join(pieces, size)
        self._pieces = pieces if shared else []  # there may be padding at a queue's end
        after = dataclasses.replace(
            reading.state,
            global_state=states,
            keys=keys,
            values=values,
            temporary_memory=self._queue,
        )
        return dataclasses.replace(
            reading, hidden=hidden, state=after, nats=nats[0] if nats else None
        )


@dataclass
class _Round:
    """A round as a function of tensors: of the text, and of what is kept of the state."""

    read: Callable[..., Reading]
    counts: CoMeTState
    lengths: list[int]
    entries: int
    recorder: Recorder | None
    first: Reading | None = None

    def __call__(self, text: Tensor, *tensors: Tensor) -> Tensors:
        states, keys, values, *pieces = _split(tensors, self.lengths)
        state = dataclasses.replace(
            self.counts,
            global_state=states,
            keys=keys,
            values=values,
            temporary_memory=_join(pieces, self.entries),
        )
        reading = self.read(text, state, recorder=self.recorder)
        if not torch.is_grad_enabled():
            self.first = reading
        return _flat(_made(reading))

    def take(self) -> Reading:
        """What was read the first time, which is let go, as is who watched."""
        reading, self.first, self.recorder = self.first, None, None
        assert reading is not None  # it was read
        return reading


def _is_shared(reading: Reading) -> bool:
    """Whether all sequences of a round were alike."""
    return len(reading.row.take) == 1


def _made(reading: Reading) -> list[Tensors]:
    """What a round made: top outputs, nats, S, keys, values, and what it put into the queues, or where
    sequences differ, whole queues.
    """
    state, new = reading.state, reading.state.temporary_memory
    if new and _is_shared(reading):
        size = min(reading.row.compression.shape[1], _entries(new))
        new = tuple(t[:, t.shape[1] - size :].clone() for t in new)  # a view would keep it all
    nats = () if reading.nats is None else (reading.nats,)
    return [(reading.hidden,), nats, state.global_state, state.keys, state.values, new]


def _entries(queue: Tensors) -> int:
    return queue[0].shape[1] if queue else 0


def _join(pieces: Sequence[Tensors], size: int) -> Tensors:
    """Per layer, the newest `size` entries of pieces of a queue, oldest first."""
    joined = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
    return tuple(t[:, t.shape[1] - size :] for t in joined)


def _flat(parts: Sequence[Tensors]) -> Tensors:
    return tuple(x for part in parts for x in part)


def _split(tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensors]:
    """A sequence cut into parts of these lengths."""
    items = iter(tensors)
    return [tuple(islice(items, length)) for length in lengths]


def send_back(outputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Run a backward pass from outputs that have a gradient. None stands for what is not there."""
    pairs = [
        (x, gradient)
        for x, gradient in zip(outputs, gradients, strict=True)
        if x is not None and gradient is not None and x.requires_grad
    ]
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])


class _Again(torch.autograd.Function):
    """A function of tensors that is called without a graph, and again for its gradients. Those of
    weights, which are no arguments of it, are added to what the weights have: at no time are there
    two copies. Autograd is given the weights too, so that it knows of them.

    `checkpoint(..., use_reentrant=True)` of PyTorch's does the same, but sends zeros back through
    outputs that nothing was made of, where an overflow becomes NaN.
    """

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensors], trained: int, *tensors: Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        tensors = tensors[: len(tensors) - trained]
        ctx.save_for_backward(*tensors)
        ctx.trained = trained
        kind = tensors[0].device.type
        how = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.autocast = torch.autocast(kind, *how)
        ctx.call, ctx.random = call, (torch.get_rng_state(), *get_device_states(*tensors[:1]))
        return call(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "recompute is 'chunks' or 'host', which add gradients to weights' own: call "
                "loss.backward() without inputs. For torch.autograd.grad, recompute 'cells'."
            )
        tensors = ctx.saved_tensors
        inputs = [
            t.detach().requires_grad_(need)
            for t, need in zip(tensors, ctx.needs_input_grad[2:], strict=False)
        ]
        kind, (on_host, devices, states) = tensors[0].device.type, ctx.random
        with torch.random.fork_rng(devices, device_type=kind), torch.enable_grad(), ctx.autocast:
            torch.set_rng_state(on_host)
            set_device_states(devices, states, device_type=kind)
            outputs = ctx.call(*inputs)
        send_back(outputs, gradients)
        return None, None, *(x.grad for x in inputs), *[None] * ctx.trained
