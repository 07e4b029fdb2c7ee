"""The recorder: it changes nothing, and what it tells is what the reference computes.

The reference has no recorder. Its functions are watched instead: `Watched` puts itself before those
that a layer calls, and asks the reference's own attention for its weights, by giving it unit
vectors as values.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import CoMeTModel, Recorder
from fast.cupy_engine import CoMeTEngine
from fast.rows import KINDS
from reference import global_memory, layers, stream
from reference import model as spec

from .assertions import array, assert_near, assert_state_equal
from .device import tensor, tensors
from .strategies import cases, pieces, random_weights, splits
from .test_batches import padded


class Watched:
    """What the reference does to one stream."""

    def __init__(self, params, config):
        self.params, self.config, self.kind = params, config, None
        self.row, self.made = [], []  # kinds of the row's slots; tokens read at each queue entry
        self.attention = []  # a text token: layers x [h, 4]
        self.gates, self.moved = [], []  # a chunk: layers x [m, 1 or d], and x [m]

    @contextmanager
    def watching(self):
        parts = {
            (stream, "open_chunk"): self.open_chunk,
            (stream, "run_row"): self.run_row,
            (stream, "read_compression"): self.read_compression,
            (stream, "close_chunk"): self.close_chunk,
            (layers, "attention"): self.attend,
            (global_memory, "gate"): self.gate,
        }
        self.originals = {name: getattr(module, name) for module, name in parts}
        with ExitStack() as stack:
            for (module, name), spy in parts.items():
                stack.enter_context(patch.object(module, name, spy))
            yield

    def open_chunk(self, state, *args):
        held = self.config.memory.global_slots if state.global_state else 0
        self.kind = None
        state = self.originals["open_chunk"](state, *args)
        self.row = [0] * held + [1] * (state.row_length - held)
        return state

    def run_row(self, hidden, *args):
        if hidden is self.params.get("readout_embeddings"):
            self.kind = "readout"
        elif self.kind != "compression":
            self.kind = "text"
        self.row += [KINDS.index(self.kind)] * len(hidden)
        if self.kind == "text":
            self.attention.append([])
        found = self.originals["run_row"](hidden, *args)
        self.kind = None
        return found

    def read_compression(self, state, *args):
        self.kind = "compression"
        self.made = [*self.made, state.tokens][-self.config.memory.temporary_memory_size :]
        return self.originals["read_compression"](state, *args)

    def close_chunk(self, state, *args):
        self.gates.append([])
        new = self.originals["close_chunk"](state, *args)
        old = state.global_state or [0.0 * s for s in new.global_state]
        moved = [
            np.linalg.norm(b - a, axis=-1) / np.linalg.norm(b, axis=-1)
            for a, b in zip(old, new.global_state, strict=True)
        ]
        self.moved.append(moved)
        return new

    def attend(self, queries, keys, values, positions):
        if self.kind == "text":
            units = np.broadcast_to(np.eye(keys.shape[1]), (*keys.shape[:2], keys.shape[1]))
            shares = self.originals["attention"](queries, keys, units, positions)[:, 0]  # [h, l]
            of_kind = np.array(self.row)[:, None] == np.arange(4)
            self.attention[-1].append(shares @ of_kind)
        return self.originals["attention"](queries, keys, values, positions)

    def gate(self, *args):
        found = self.originals["gate"](*args)
        self.gates[-1].append(found)
        return found


def of_model(config, params):
    return CoMeTModel(config, tensors(params, torch.float64)), tensor


def of_engine(config, params):
    return CoMeTEngine(config, params), np.array


paths = pytest.mark.parametrize("path", [of_model, pytest.param(of_engine, marks=pytest.mark.host)])


def gathered(rounds, name, layer, i):
    """A stream's part of what was recorded, of the rounds that hold some."""
    return [getattr(r, name)[layer][i] for r in rounds if getattr(r, name)]


@paths
@given(case=cases(), data=st.data())
def test_what_is_recorded_is_what_the_reference_computes(path, case, data):
    """A text in any pieces beside one half as long, closed by hand now and then."""
    config, seed, ids = case
    params, memory = random_weights(config, seed), config.memory
    (model, make), recorder, state = path(config, params), Recorder(), None
    watched = [Watched(params, config) for _ in range(2)]
    alone = [stream.new_state(config) for _ in range(2)]
    for piece in pieces(ids, data.draw(splits(len(ids)))):
        rows = [piece, piece[: -(-len(piece) // 2)]]
        asked = data.draw(st.sampled_from(["all", "last", "none"]))
        batch, lengths = make(padded(rows, 0).tolist()), [len(row) for row in rows]
        state = model(batch, state=state, lengths=lengths, logits=asked, recorder=recorder).state
        closes = data.draw(st.booleans())
        if closes:
            state = model.close_chunk(state, recorder=recorder)
        for i, row in enumerate(rows):
            with watched[i].watching():
                _, alone[i] = spec.forward(row, alone[i], params, config)
                if closes:
                    alone[i] = stream.close_chunk(alone[i], params, config)
            made = recorder.rounds[-1].ages[i]
            found = alone[i].tokens - made[made >= 0]
            assert found.tolist() == watched[i].made, "ages"
            if not closes and alone[i].open_tokens:
                kinds = recorder.rounds[-1].kinds[i]
                assert kinds[kinds >= 0].tolist() == watched[i].row, "kinds"
    for i, seen in enumerate(watched):
        assert sum(int(r.take[i]) for r in recorder.rounds) == alone[i].tokens
        assert sum(bool(r.closes[i]) for r in recorder.rounds) == alone[i].chunks
        for layer in range(config.backbone.num_hidden_layers):
            text = [r.attention[layer][i][:, : r.take[i]].swapaxes(0, 1) for r in recorder.rounds]
            padding = [r.attention[layer][i][:, r.take[i] :] for r in recorder.rounds]
            assert all(np.isnan(part).all() for part in padding)
            expected = np.array([token[layer] for token in seen.attention])
            assert_near(np.concatenate(text), expected, f"attention of layer {layer}")
            if not memory.has_global:
                assert not any(r.gate or r.moved for r in recorder.rounds)
                continue
            gates, moved = (
                [x for x in gathered(recorder.rounds, name, layer, i) if not np.isnan(x).all()]
                for name in ("gate", "moved")
            )
            assert len(gates) == len(moved) == alone[i].chunks
            for chunk, gate in enumerate(gates):
                wanted = seen.gates[chunk][layer] if chunk else np.zeros_like(gate)
                assert_near(gate, wanted, f"gate of layer {layer}, chunk {chunk}")
                wanted = seen.moved[chunk][layer]
                assert_near(moved[chunk], wanted, f"S of layer {layer}, chunk {chunk}")


@paths
@given(case=cases())
def test_recording_changes_nothing(path, case):
    """To the bit, in reading, closing and decoding."""
    config, seed, ids = case
    (model, make), found = path(config, random_weights(config, seed)), []
    text = make([ids, ids[::-1]])
    for recorder in (None, Recorder()):
        out = model(text, recorder=recorder)
        state = model.close_chunk(out.state, recorder=recorder)
        said = model.generate(text, state, 5, recorder=recorder)
        found.append((out.logits, said.ids, said.state))
    assert len(recorder.rounds) > 5
    assert np.array_equal(array(found[0][0]), array(found[1][0]))
    assert found[0][1] == found[1][1]
    states = [s.map_tensors(lambda t: torch.as_tensor(array(t))) for *_, s in found]
    assert_state_equal(*states, "after decoding")


def test_ages_are_unknown_where_the_recorder_came_late(make_config):
    model, _ = of_model(make_config(), random_weights(make_config(), 0))
    text, recorder = tensor([[1, 2, 3, 4, 5, 6]]), Recorder()
    state = model(text).state
    model(text, state=state, recorder=recorder)
    first = recorder.rounds[0].ages[0].tolist()
    assert first == [-1, -1, 2, 0][-len(first) :]
