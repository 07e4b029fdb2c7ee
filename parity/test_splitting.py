"""The first law: however a text is split into calls, the result is the same."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import model as spec
from reference import stream

from .assertions import arrays_of, assert_logits, assert_near, assert_same_stream
from .device import tensor
from .strategies import VOCAB, cases, pieces, random_model, splits


@given(cases(), st.booleans(), st.data())
def test_splitting_a_text_changes_nothing(case, gradient, data):
    """Read for training or for inference."""
    config, seed, ids = case
    model = random_model(config, seed)
    whole, end = spec.forward(ids, stream.new_state(config), arrays_of(model), config)
    state, found = None, []
    for piece in pieces(ids, data.draw(splits(len(ids)))):
        with torch.set_grad_enabled(gradient):
            out = model(tensor([piece]), state=state)
        state = out.state
        found.append(out.logits)
    assert_logits(torch.cat(found, dim=1)[0], whole, config, "split")
    assert_same_stream(state, 0, end, config, "end")


@given(cases(), st.data())
def test_asking_for_fewer_outputs_changes_nothing_else(case, data):
    """What is not asked for is not computed at the top layer; the rest is as it was."""
    config, seed, ids = case
    model = random_model(config, seed)
    whole, end = spec.forward(ids, stream.new_state(config), arrays_of(model), config)
    state, stop = None, 0
    for piece in pieces(ids, data.draw(splits(len(ids)))):
        stop += len(piece)
        asked = data.draw(st.sampled_from(["all", "last", "none"]))
        labels = data.draw(st.sampled_from([None, tensor([piece])]))
        out = model(tensor([piece]), labels=labels, state=state, logits=asked)
        state = out.state
        first = {"all": stop - len(piece), "last": stop - 1, "none": stop}[asked]
        found = np.zeros((1, 0, VOCAB)) if asked == "none" else out.logits
        assert_near(found[0], whole[first:stop], f"{asked} logits, up to token {stop}")
        if labels is not None and len(piece) > 1:
            expected = spec.language_loss(whole[stop - len(piece) : stop], piece)
            assert_near(out.loss, expected, f"loss up to token {stop}")
    assert_same_stream(state, 0, end, config, "end")


@pytest.mark.host
@given(cases(), st.data())
def test_splitting_changes_nothing_in_the_reference(case, data):
    config, seed, ids = case
    params = arrays_of(random_model(config, seed))
    whole, _ = spec.forward(ids, stream.new_state(config), params, config)
    state, start = stream.new_state(config), 0
    for piece in pieces(ids, data.draw(splits(len(ids)))):
        logits, state = spec.forward(piece, state, params, config)
        assert_near(logits, whole[start : start + len(piece)], f"tokens from {start}")
        start += len(piece)


@given(cases(), st.data())
def test_chunks_by_hand_are_chunks_closed_by_hand(case, data):
    """`chunk_sizes` and `close_chunk` are one thing said twice."""
    config, seed, ids = case
    model = random_model(config, seed)
    sizes = data.draw(splits(len(ids)))
    sizes = [s for size in sizes for s in _within(size, config.memory.chunk_size)]
    at_once = model(tensor([ids]), chunk_sizes=sizes)
    state, found = model.new_state(), []
    for number, piece in enumerate(pieces(ids, sizes)):
        state = model.close_chunk(state) if number else state
        out = model(tensor([piece]), state=state)
        state = out.state
        found.append(out.logits)
    expected, _ = spec.forward(
        ids, stream.new_state(config), arrays_of(model), config, chunk_sizes=sizes
    )
    assert_near(at_once.logits[0], expected, "chunk_sizes")
    assert_near(torch.cat(found, dim=1)[0], expected, "close_chunk")


def _within(size, most):
    while size > 0:
        yield min(size, most)
        size -= most
