"""Random walks: batches of streams are closed, forked, picked from, joined, moved, saved and loaded,
and read or decode on, in any order, the reference and the fast paths in lockstep."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from fast import CoMeTState

from .assertions import NOTES, assert_state_equal
from .calls import World, calls, decodings, snapshot
from .strategies import configs, seeds

MOST = 4
"""Sequences of a batch."""


class Walk(RuleBasedStateMachine):
    """Batches of streams, fast and reference, that must never part."""

    batches = Bundle("batches")

    @initialize(target=batches, config=configs(), seed=seeds, b=st.integers(1, 3))
    def start(self, config, seed, b):
        self.world = World(config, seed)
        self.folder = tempfile.TemporaryDirectory()
        self.met = []
        return self.world.begin(b)

    @rule(target=batches, streams=batches, other=batches, data=st.data())
    def read_on(self, streams, other, data):
        streams = self.changed(streams, other, data)
        call, on_engine = data.draw(calls(len(streams[1]))), data.draw(st.booleans())
        before = snapshot(streams[0])
        with torch.set_grad_enabled(data.draw(st.booleans())):
            _, (state, alone) = self.world.read(call, streams, on_engine)
        assert snapshot(streams[0]) == before, "the state that was passed in has changed"
        self.met.append((state.detach(), alone))
        return self.met[-1]

    @rule(target=batches, streams=batches, other=batches, data=st.data())
    def decode_on(self, streams, other, data):
        streams = self.changed(streams, other, data)
        how, on_engine = data.draw(decodings(len(streams[1]))), data.draw(st.booleans())
        before = snapshot(streams[0])
        self.met.append(self.world.decode(how, streams, on_engine))
        assert snapshot(streams[0]) == before, "the state that was passed in has changed"
        return self.met[-1]

    def changed(self, streams, other, data):
        """The streams after what else can be done to them."""
        names = [
            "nothing",
            "begin anew",
            "close",
            "fork",
            "select",
            "join",
            "forget",
            "save and load",
        ]
        change = data.draw(st.sampled_from(names))
        state, alone = streams
        if change == "begin anew":
            return self.world.begin(data.draw(st.integers(1, 3)))
        if change == "close":
            with torch.no_grad():
                return self.world.close(streams, data.draw(st.booleans()))
        if change == "fork":
            copies = data.draw(st.integers(1, MOST // len(alone)))
            forked = [one for one in alone for _ in range(copies)]
            return self.world.same((state.fork(copies), forked), "forked")
        if change == "select":
            picks = st.lists(st.integers(0, len(alone) - 1), min_size=1, max_size=MOST)
            rows, form = data.draw(picks), data.draw(st.sampled_from([list, tuple, np.array]))
            picked = [alone[i] for i in rows]
            return self.world.same((state.select(form(rows)), picked), "selected")
        if change == "join" and len(alone) + len(other[1]) <= MOST:
            joined = CoMeTState.cat([state, other[0]]), [*alone, *other[1]]
            return self.world.same(joined, "joined")
        if change == "forget":
            return self.forgotten(streams, data)
        if change == "save and load":
            path = Path(self.folder.name) / "state"
            (state.to(self.world.engine) if data.draw(st.booleans()) else state).save(path)
            loaded = CoMeTState.load(path, self.world.model)
            assert_state_equal(loaded, state, "loaded")
            return loaded, alone
        return streams

    def forgotten(self, streams, data):
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


Walk.TestCase.settings = settings(
    max_examples=max(20, settings.default.max_examples // 2), stateful_step_count=8
)
TestWalk = Walk.TestCase
