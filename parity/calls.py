"""Random calls: every argument beside every other, in every form that it may take, and what the
reference says of each sequence alone.

A call is drawn as plain lists, so that its smallest form can be read. `World` makes arguments of
it, for the model or for the engine, and holds what comes back against the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fast import IGNORE, CoMeTConfig, CoMeTModel, CoMeTState
from fast.cupy_engine import CoMeTEngine
from fast.recorder import Recorder
from reference import model as spec
from reference import stream
from reference.parameters import map_parameters
from reference.stream import StreamState

from .assertions import (
    HALF_YARDSTICK,
    TOLERANCE,
    YARDSTICK,
    array,
    assert_logits,
    assert_near,
    assert_same_stream,
    largest_error,
)
from .device import is_host, tensor, tensors
from .strategies import VOCAB, even_weights, nudged, random_weights, seeds, splits, widened

PADDING = (0, VOCAB - 1, 99)
"""What may stand after a sequence's end, in any integer dtype: it is not looked at."""


@dataclass(frozen=True)
class Call:
    """Some text for every sequence of a batch, and how it is read."""

    rows: list[list[int]]
    logits: str = "all"
    labels: list[list[int]] | None = None
    """A sequence's own; its first is not looked at."""
    chunk_sizes: list[int] | None = None
    backprop_chunks: int | None = None
    forms: int = 0
    """A seed: which form each argument takes, and what the padding holds."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return list(map(len, self.rows))

    @property
    def options(self) -> dict[str, Any]:
        """What the reference takes by the same name."""
        return {"chunk_sizes": self.chunk_sizes, "backprop_chunks": self.backprop_chunks}


@dataclass(frozen=True)
class Decoding:
    """A text to continue for every sequence, and how."""

    rows: list[list[int]]
    max_new_tokens: int
    stop_ids: list[int]
    roll: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    """Of the samples."""
    forms: int


@st.composite
def rows_of(draw: st.DrawFn, batch_size: int, longest: int = 9, alike: bool = False):
    """Token ids of every sequence, of lengths of their own."""
    sizes = st.integers(1, longest)
    lengths = [draw(sizes)] * batch_size if alike else [draw(sizes) for _ in range(batch_size)]
    rng = np.random.default_rng(draw(seeds))
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


@st.composite
def calls(draw: st.DrawFn, batch_size: int, labelled: bool | None = None) -> Call:
    """Calls of a batch: chunks by hand, where there are any, cut all sequences alike."""
    by_hand = draw(st.sampled_from([False, False, True]))
    rows = draw(rows_of(batch_size, alike=by_hand))
    labels = None
    if draw(st.booleans()) if labelled is None else labelled:
        rng = np.random.default_rng(draw(seeds))
        # Not the text's own: a label is a label, whatever token it stands at.
        labels = [
            rng.choice([*range(VOCAB), IGNORE, IGNORE, IGNORE], len(r)).tolist() for r in rows
        ]
    return Call(
        rows=rows,
        logits=draw(st.sampled_from(["all", "all", "last", "none"])),
        labels=labels,
        chunk_sizes=draw(splits(len(rows[0]))) if by_hand else None,
        backprop_chunks=draw(st.sampled_from([None, None, 1, 2, 3])),
        forms=draw(seeds),
    )


@st.composite
def decodings(draw: st.DrawFn, batch_size: int) -> Decoding:
    """Greedy, as good as greedy, and sampled."""
    return Decoding(
        rows=draw(rows_of(batch_size, longest=5)),
        max_new_tokens=draw(st.integers(0, 6)),
        stop_ids=draw(st.lists(st.integers(0, VOCAB - 1), max_size=2)),
        roll=draw(st.sampled_from([True, True, False])),
        temperature=draw(st.sampled_from([0.0, 0.0, 1e-300, 0.5, 1.0, 2.0])),
        top_k=draw(st.sampled_from([None, 1, 2, 3, VOCAB, 99])),
        top_p=draw(st.sampled_from([None, 1e-9, 0.3, 0.8, 1.0])),
        seed=draw(seeds),
        forms=draw(seeds),
    )


@dataclass(frozen=True)
class Alone:
    """A sequence in the reference: where it stands; where it would, were the weights rounded; and
    how far apart the two have been."""

    states: tuple[StreamState, ...]
    dtype: str = "float64"
    """Of the fast path."""
    sensitivity: float = 0.0

    @property
    def state(self) -> StreamState:
        """Where it stands."""
        return self.states[0]

    @property
    def limit(self) -> float:
        """What the fast path may be off by. Random weights blow a rounding up from chunk to chunk,
        so the reference's own sensitivity to one is the yardstick beside the tolerance; of half
        types it is all there is."""
        if self.dtype != "float64":
            return HALF_YARDSTICK * (self.sensitivity + 8 * epsilon(self.dtype))
        return max(TOLERANCE, YARDSTICK * self.sensitivity)

    def then(self, states: Sequence[StreamState], logits: Sequence[np.ndarray] = ()) -> Alone:
        """The sequence further on."""
        apart = [largest_error(x, logits[0]) for x in logits[1:]]
        for name in ("global_state", "temporary_memory", "keys", "values"):
            for moved in states[1:]:
                pairs = zip(getattr(moved, name), getattr(states[0], name), strict=True)
                apart += [largest_error(x, y) for x, y in pairs]
        return Alone(tuple(states), self.dtype, max([self.sensitivity, *apart]))


def epsilon(dtype: str) -> float:
    """Machine epsilon of a dtype by its name."""
    return float(torch.finfo(getattr(torch, dtype)).eps)


Streams = tuple[CoMeTState, list[Alone]]
"""A fast state, and each of its sequences alone."""


class World:
    """A model, the engine of the same weights, and the reference beside them."""

    def __init__(self, config: CoMeTConfig, seed: int, dtype: str = "float64") -> None:
        self.dtype, half = dtype, dtype != "float64"
        self.config = widened(config) if half else config
        weights = (even_weights if half else random_weights)(self.config, seed)
        stored = map_parameters(lambda _, p: p.astype(dtype), weights)  # ml_dtypes has bfloat16
        exact = map_parameters(lambda _, p: p.astype(np.float64), stored)
        self.model = CoMeTModel(self.config, tensors(exact, getattr(torch, dtype)))
        self.engine = CoMeTEngine(self.config, stored)
        # A rounding of few numbers may do little by chance: in half types, several are tried.
        moved = [nudged(exact, i, epsilon(dtype)) for i in range(3 if half else 1)]
        self.weights = [exact, *moved]

    def begin(self, batch_size: int) -> Streams:
        """Streams that have read nothing."""
        fresh = Alone((stream.new_state(self.config),) * len(self.weights), self.dtype)
        return self.model.new_state(batch_size), [fresh] * batch_size

    def read_alone(self, alone: Alone, text: list[int], **options: Any) -> tuple[np.ndarray, Alone]:
        """Logits [n, vocab] after every token of a text, in the reference."""
        found = [
            spec.forward(text, state, params, self.config, **options)
            for state, params in zip(alone.states, self.weights, strict=True)
        ]
        return found[0][0], alone.then([s for _, s in found], [x for x, _ in found])

    def close_alone(self, alone: Alone) -> Alone:
        """Its chunk closed."""
        states = zip(alone.states, self.weights, strict=True)
        return alone.then([stream.close_chunk(s, params, self.config) for s, params in states])

    def same(self, streams: Streams, what: str) -> Streams:
        """Every sequence of the fast state is the reference's."""
        state, alone = streams
        assert state.batch_size == len(alone), f"{what}: a batch of {state.batch_size}"
        for i, one in enumerate(alone):
            assert_same_stream(state, i, one.state, self.config, what, one.limit)
        return streams

    def placed(self, x: Any, on_engine: bool, dtype: str = "int64") -> Any:
        """Numbers as the model's tensor, or the engine's array."""
        return np.asarray(x, dtype) if on_engine else tensor(x).to(getattr(torch, dtype))

    def text(
        self, rows: list[list[int]], forms: np.random.Generator, on_engine: bool, cut: bool = False
    ) -> tuple[dict[str, Any], Callable[[list[list[int]]], Any]]:
        """The arguments `ids` and `lengths`, and what makes labels of the same shape.

        Args:
            cut: whether the text is cut by hand, and so has no padding.
        """
        lengths = list(map(len, rows))
        width = max(lengths) + (0 if cut else int(forms.integers(3)))
        fill, dtype = int(forms.choice(PADDING)), str(forms.choice(["int64", "int32", "int16"]))
        is_flat = len(rows) == 1 and forms.random() < 0.5

        def placed(parts: list[list[int]]) -> Any:
            padded = [[*part, *[fill] * (width - len(part))] for part in parts]
            return self.placed(padded[0] if is_flat else padded, on_engine, dtype)

        choices: list[Any] = [
            lengths,
            tuple(lengths),
            np.array(lengths),
            np.array(lengths, np.int32),
            self.placed(lengths, on_engine),
        ]
        if min(lengths) == width:
            choices += [None] * 3
        arguments = {"ids": placed(rows), "lengths": choices[forms.integers(len(choices))]}
        return arguments, placed

    def read(self, call: Call, streams: Streams, on_engine: bool = False) -> tuple[Any, Streams]:
        """A call, held against the reference: its logits, its loss, the state after it.

        Returns:
            What the call returned; the streams after it.
        """
        state, alone = streams
        forms = np.random.default_rng(call.forms)
        arguments, placed = self.text(call.rows, forms, on_engine, call.chunk_sizes is not None)
        if call.chunk_sizes is not None:
            form = (list, tuple, np.array)[forms.integers(3)]
            arguments["chunk_sizes"] = form(call.chunk_sizes)
        if forms.random() < 0.2:
            arguments["recorder"] = Recorder()
        if state.tokens.any() or forms.random() < 0.5 or len(alone) > 1:
            arguments["state"] = state
        if on_engine:
            if "state" in arguments:
                arguments["state"] = state.to(self.engine)
            out = self.engine(**arguments, logits=call.logits)
            after = out.state.to(self.model)
        else:
            if call.backprop_chunks is not None:
                form = (int, np.int64, np.int32)[forms.integers(3)]
                arguments["backprop_chunks"] = form(call.backprop_chunks)
            if call.labels is not None:
                labels = [[int(forms.choice([IGNORE, 3, 99])), *row[1:]] for row in call.labels]
                arguments["labels"] = placed(labels)
            if is_host() and forms.random() < 0.3:  # other devices may have no generator to ask for
                arguments["recompute"] = ("none", "cells", "chunks", "host")[forms.integers(4)]
            out = self.model(**arguments, logits=call.logits)
            after = out.state
        expected, then = [], []
        for one, row in zip(alone, call.rows, strict=True):
            logits, one = self.read_alone(one, row, **call.options)
            expected.append(logits)
            then.append(one)
        self._hold_logits(call, out.logits, expected, then)
        if call.labels is None or on_engine:
            assert getattr(out, "loss", None) is None
        else:
            self._hold_loss(call.labels, out.loss, expected, then)
        return out, self.same((after, then), "after reading")

    def _hold_logits(
        self, call: Call, found: Any, expected: list[np.ndarray], alone: list[Alone]
    ) -> None:
        if call.logits == "none":
            assert found is None
            return
        for i, (row, one) in enumerate(zip(expected, alone, strict=True)):
            what = f"logits of sequence {i}"
            if call.logits == "last":
                assert found.shape[1:] == (1, VOCAB), f"{what}: shape {found.shape}"
                assert_near(found[i, 0], row[-1], f"{what}, last", one.limit)
            else:
                assert_logits(found[i, : len(row)], row, self.config, what, one.limit)
                assert (found[i, len(row) :] == 0).all(), f"{what}: of the padding"

    def _hold_loss(
        self, labels: list[list[int]], found: Any, expected: list[np.ndarray], alone: list[Alone]
    ) -> None:
        assert found is not None, "no loss, where there are labels"
        counts = [sum(label != IGNORE for label in row[1:]) for row in labels]
        if not sum(counts):
            assert found.isnan(), f"loss {found}, with nothing to predict"
            return
        total = sum(
            spec.language_loss(logits, row) * count
            for logits, row, count in zip(expected, labels, counts, strict=True)
            if count
        )
        assert_near(found, total / sum(counts), "loss", max(one.limit for one in alone))

    def decode(self, how: Decoding, streams: Streams, on_engine: bool = False) -> Streams:
        """A decoding, held against what the reference says of the tokens that it chose."""
        state, alone = streams
        forms = np.random.default_rng(how.forms)
        arguments, _ = self.text(how.rows, forms, on_engine)
        steps: list[list[int | None]] = []
        generator: Any = np.random.default_rng(how.seed)
        if not on_engine:
            generator = torch.Generator(self.model.device).manual_seed(how.seed)
        out = (self.engine if on_engine else self.model).generate(
            **arguments,
            state=state.to(self.engine) if on_engine else state,
            max_new_tokens=how.max_new_tokens,
            stop_ids=(list, tuple, set, np.array)[forms.integers(3)](how.stop_ids),
            roll=how.roll,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            generator=generator,
            on_token=steps.append,
        )
        assert len(out.ids) == len(alone)
        then = []
        for i, (row, one, new) in enumerate(zip(how.rows, alone, out.ids, strict=True)):
            told = [step[i] for step in steps]
            assert told == [*new, *[None] * (len(told) - len(new))], f"sequence {i}: told {told}"
            ends = [j for j, token in enumerate(new) if token in how.stop_ids]
            length = 1 + ends[0] if ends else how.max_new_tokens
            assert len(new) == length, f"sequence {i} ends after {new}, stop_ids {how.stop_ids}"
            logits, one = self.read_alone(one, row)
            scores = logits[-1:]
            if new:
                logits, one = self.read_alone(one, new, roll=how.roll)
                scores = np.concatenate([scores, logits[:-1]])
            for token, row_of_scores in zip(new, scores, strict=False):
                assert_chosen(token, row_of_scores, how, one.limit)
            then.append(one)
        assert len(steps) == max(map(len, out.ids)), "a step after the last token"
        after = out.state.to(self.model) if on_engine else out.state
        return self.same((after, then), "after decoding")

    def close(self, streams: Streams, on_engine: bool = False) -> Streams:
        """Every chunk closed."""
        state, alone = streams
        if on_engine:
            state = self.engine.close_chunk(state.to(self.engine)).to(self.model)
        else:
            state = self.model.close_chunk(state)
        return self.same((state, [self.close_alone(one) for one in alone]), "closed")

    def forget(self, streams: Streams, rows: Sequence[bool] | None) -> Streams:
        """The queues of some sequences emptied, whose rows have not begun."""
        state, alone = streams
        forget = [True] * len(alone) if rows is None else rows
        then = [
            one.then([forgotten(s) for s in one.states]) if flag else one
            for one, flag in zip(alone, forget, strict=True)
        ]
        return self.same((state.forget_temporary(rows), then), "forgotten")


def forgotten(state: StreamState) -> StreamState:
    """The reference's state with an empty queue."""
    empty = tuple(t[:0] for t in state.temporary_memory)
    return dataclasses.replace(state, temporary_memory=empty)


def assert_chosen(token: int, scores: np.ndarray, how: Decoding, limit: float) -> None:
    """A token is one that the way of choosing may choose, roundings aside."""
    tolerance = 2 * limit * max(1.0, float(np.abs(scores).max()))
    likelier = scores > scores[token] + tolerance
    is_greedy = how.temperature in (0.0, 1e-300) or how.top_k == 1 or how.top_p == 1e-9
    assert not (is_greedy and likelier.any()), f"{token} is not the likeliest of {scores}"
    if how.top_k is not None and how.temperature:
        assert likelier.sum() < how.top_k, f"{token} is not of the {how.top_k} likeliest: {scores}"
    if how.top_p is not None and not is_greedy:
        order = np.sort(scores)[::-1][: how.top_k]
        kept = np.exp((order - order[0]) / how.temperature).sum()
        before = np.exp((scores[likelier] - order[0]) / how.temperature).sum()
        slack = 1e-6 + 4 * tolerance / how.temperature
        assert before <= (how.top_p + slack) * kept, f"{token} is beyond {how.top_p}: {scores}"


def snapshot(state: CoMeTState) -> list[bytes]:
    """All that a state holds, to see that nothing changed it."""
    names = [field.name for field in dataclasses.fields(state) if field.name != "model"]
    parts: list[Any] = []
    for name in names:
        part = getattr(state, name)
        parts += part if isinstance(part, tuple) else [part]
    return [array(x.detach() if isinstance(x, torch.Tensor) else x).tobytes() for x in parts]
