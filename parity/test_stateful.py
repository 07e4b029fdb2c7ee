"""Random walks: streams are fed, decoded, closed, forked, saved, loaded and dropped in any order,
the reference and the fast path in lockstep."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule

from fast import CoMeTState
from reference import model as spec
from reference import stream

from .assertions import (
    NOTES,
    arrays_of,
    assert_logits,
    assert_same_stream,
    assert_state_equal,
)
from .device import tensor
from .strategies import VOCAB, configs, random_model, seeds


class Streams(RuleBasedStateMachine):
    """Pairs of states, fast and reference, that must never part."""

    pairs = Bundle("pairs")

    @initialize(target=pairs, config=configs(), seed=seeds)
    def start(self, config, seed):
        self.config = config
        self.model = random_model(config, seed)
        self.params = arrays_of(self.model)
        self.folder = tempfile.TemporaryDirectory()
        return self.fresh()

    def fresh(self):
        return self.model.new_state(), stream.new_state(self.config)

    def same(self, pair, what):
        assert_same_stream(pair[0], 0, pair[1], self.config, what)
        return pair

    @rule(target=pairs)
    def begin(self):
        return self.fresh()

    @rule(target=pairs, pair=pairs, n=st.integers(1, 12), seed=seeds)
    def feed(self, pair, n, seed):
        ids = np.random.default_rng(seed).integers(0, VOCAB, n).tolist()
        out = self.model(tensor([ids]), state=pair[0])
        logits, expected = spec.forward(ids, pair[1], self.params, self.config)
        assert_logits(out.logits[0], logits, self.config, "feed")
        return self.same((out.state, expected), "feed")

    @rule(target=pairs, pair=pairs, token=st.integers(0, VOCAB - 1), n=st.integers(1, 6))
    def decode(self, pair, token, n):
        out = self.model.generate(tensor([[token]]), pair[0], max_new_tokens=n)
        new, expected = spec.generate([token], pair[1], self.params, self.config, n)
        assert out.ids == [new]
        return self.same((out.state, expected), "decode")

    @rule(target=pairs, pair=pairs)
    def close(self, pair):
        fast = self.model.close_chunk(pair[0])
        return self.same((fast, stream.close_chunk(pair[1], self.params, self.config)), "close")

    @rule(target=pairs, pair=pairs)
    def fork(self, pair):
        return multiple(pair, self.same((pair[0].fork(), pair[1]), "fork"))

    @rule(target=pairs, pair=pairs)
    def save_and_load(self, pair):
        path = Path(self.folder.name) / "state"
        pair[0].save(path)
        loaded = CoMeTState.load(path, self.model)
        assert_state_equal(loaded, pair[0], "loaded")
        return loaded, pair[1]

    @rule(pair=consumes(pairs))
    def drop(self, pair):
        del pair

    @rule(pair=pairs)
    def still_the_same(self, pair):
        """What was done to other streams since has not touched this one."""
        self.same(pair, "later")

    def teardown(self):
        NOTES.cases += 1
        if hasattr(self, "folder"):
            self.folder.cleanup()


Streams.TestCase.settings = settings(
    max_examples=max(20, settings.default.max_examples // 2), stateful_step_count=15
)
TestStreams = Streams.TestCase
