"""Random walks: batches of streams are closed, forked, picked from, joined, moved, saved and loaded,
and read or decode on, in any order, the reference and the fast paths in lockstep."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, rule

from fast import CoMeTState

from .assertions import NOTES, assert_state_equal
from .calls import World, calls, decodings, snapshot
from .strategies import configs, seeds

MOST = 3
"""Sequences of a batch, unless it is joined or forked: then twice as many."""

CHANGES = ["close", "fork", "select", "join", "forget", "save_and_load"]
"""What can be done to streams without reading."""


class Streams(RuleBasedStateMachine):
    """Batches of streams, fast and reference, that must never part."""

    batches = Bundle("batches")

    @initialize(
        target=batches,
        config=configs(),
        seed=seeds,
        dtype=st.sampled_from(["float64", "float64", "float64", "bfloat16", "float16"]),
        data=st.data(),
    )
    def start(self, config, seed, dtype, data):
        self.world = World(config, seed, dtype)
        self.folder = tempfile.TemporaryDirectory()
        self.met = []
        one, two, three = (self.go_on(self.begin(data), data) for _ in range(3))
        return multiple(
            one, two, self.close(three, one, data)
        )  # open and closed ones, to be joined

    def begin(self, data):
        return self.world.begin(data.draw(st.integers(1, 3)))

    def go_on(self, streams, data):
        """Read, or decode."""
        before, b = snapshot(streams[0]), len(streams[1])
        on_engine = data.draw(st.booleans())
        if data.draw(st.booleans()):
            call = data.draw(calls(b))
            with torch.set_grad_enabled(data.draw(st.booleans())):
                _, (state, alone) = self.world.read(call, streams, on_engine)
            after = state.detach(), alone
        else:
            after = self.world.decode(data.draw(decodings(b)), streams, on_engine)
        assert snapshot(streams[0]) == before, "the state that was passed in has changed"
        self.met.append(after)
        return after

    def close(self, streams, other, data):
        with torch.no_grad():
            return self.world.close(streams, data.draw(st.booleans()))

    def fork(self, streams, other, data):
        state, alone = streams
        copies = data.draw(st.integers(1, max(1, 2 * MOST // len(alone))))
        forked = [one for one in alone for _ in range(copies)]
        return self.world.same((state.fork(copies), forked), "forked")

    def select(self, streams, other, data):
        state, alone = streams
        picks = st.lists(st.integers(0, len(alone) - 1), min_size=1, max_size=MOST)
        rows, form = data.draw(picks), data.draw(st.sampled_from([list, tuple, np.array]))
        return self.world.same((state.select(form(rows)), [alone[i] for i in rows]), "selected")

    def join(self, streams, other, data):
        state, alone = streams
        parts = data.draw(st.permutations([state, other[0]]))
        both = [*alone, *other[1]] if parts[0] is state else [*other[1], *alone]
        if len(both) > 2 * MOST:
            return streams
        return self.world.same((CoMeTState.cat(parts), both), "joined")

    def save_and_load(self, streams, other, data):
        state, alone = streams
        path = Path(self.folder.name) / "state"
        writer = data.draw(st.sampled_from([self.world.model, self.world.engine]))
        bound = data.draw(st.sampled_from([(), (writer,)]))  # to the weights, or not
        state.to(writer).save(path, *bound)
        loaded = CoMeTState.load(path, self.world.model)
        assert_state_equal(loaded, state, "loaded")
        return loaded, alone

    def forget(self, streams, other, data):
        """Some sequences without their queues; a begun row has seen the queue already."""
        state, alone = streams
        waits = [one.state.row_length == 0 for one in alone]
        if not all(waits):
            with pytest.raises(ValueError, match="a chunk is open"):
                state.forget_temporary()
        elif data.draw(st.booleans()):
            return self.world.forget(streams, None)
        rows = [flag and data.draw(st.booleans()) for flag in waits]
        form = data.draw(st.sampled_from([list, tuple, np.array]))
        return self.world.forget(streams, form(rows))

    def teardown(self):
        """What was done to other streams since has not touched any."""
        NOTES.cases += 1
        if hasattr(self, "folder"):
            self.folder.cleanup()
            for streams in self.met:
                self.world.same(streams, "later")


class Walk(Streams):
    """Streams that are changed, and then read or decode on."""

    @rule(target=Streams.batches, streams=Streams.batches, other=Streams.batches, data=st.data())
    def change_and_go_on(self, streams, other, data):
        for change in data.draw(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=3)):
            streams = getattr(self, change)(streams, other, data)
        return self.go_on(streams, data)


class Changes(Streams):
    """Streams that are changed, one way after another, which takes less time than to read."""

    @rule(
        target=Streams.batches,
        streams=Streams.batches,
        other=Streams.batches,
        data=st.data(),
        change=st.sampled_from(CHANGES),
    )
    def change(self, streams, other, data, change):
        self.met.append(getattr(self, change)(streams, other, data))
        return self.met[-1]


for machine, steps in ((Walk, 8), (Changes, 16)):
    machine.TestCase.settings = settings(
        max_examples=max(20, settings.default.max_examples // 2), stateful_step_count=steps
    )
TestWalk, TestChanges = Walk.TestCase, Changes.TestCase
