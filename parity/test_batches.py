"""A batch is what its members are alone: padding reaches no memory, position or loss."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import IGNORE, CoMeTState
from reference import model as spec
from reference import stream

from .assertions import (
    TOLERANCE,
    YARDSTICK,
    array,
    arrays_of,
    assert_logits,
    assert_near,
    assert_same_stream,
    largest_error,
)
from .device import tensor
from .strategies import VOCAB, configs, corner_lengths, nudged, random_model, seeds


@st.composite
def batches(draw):
    config = draw(configs())
    ragged = st.lists(corner_lengths(config), min_size=2, max_size=4)
    alike = corner_lengths(config).map(lambda n: [n, n])
    lengths = draw(ragged | ragged | alike)
    return config, draw(seeds), lengths


def padded(rows, fill, extra=0):
    """The rows side by side, with columns after the longest one too."""
    widest = max(map(len, rows)) + extra
    return tensor([[*row, *[fill] * (widest - len(row))] for row in rows])


def texts(lengths, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


@given(batches(), st.integers(1, 3), st.sampled_from([0, VOCAB - 1, -7, 10**6]))
def test_a_ragged_batch_is_each_sequence_alone(batch, calls, fill):
    """Several calls, each with lengths of its own; padding holds any number at all. Some calls end
    by closing every chunk by hand.

    Random weights blow a rounding up from chunk to chunk, so from the third call on the reference's
    own sensitivity to one, in the same sequence, is the yardstick beside the tolerance.
    """
    config, seed, lengths = batch
    model = random_model(config, seed)
    params = arrays_of(model)
    state = before = None
    alone = [stream.new_state(config) for _ in lengths]
    rounded = [nudged(params, i, np.finfo(np.float64).eps) for i in range(2)]
    moved = [[stream.new_state(config) for _ in lengths] for _ in rounded]
    sensitivity = [0.0 for _ in lengths]
    for call in range(calls):
        rng = np.random.default_rng([seed, call])
        now = [int(n) for n in rng.permutation(lengths)]
        rows = texts(now, [seed, call, 1])
        ids = padded(rows, fill, extra=call)
        out = model(ids, lengths=now, state=state)
        assert out.logits.shape[:2] == ids.shape
        state = out.state
        last = model(ids, lengths=now, state=before, logits="last")
        for i, row in enumerate(rows):
            expected, alone[i] = spec.forward(row, alone[i], params, config)
            for weights, states in zip(rounded, moved, strict=True):
                other, states[i] = spec.forward(row, states[i], weights, config)
                sensitivity[i] = max(sensitivity[i], largest_error(other, expected))
            what = f"call {call}, sequence {i}"
            limit = TOLERANCE if call < 2 else max(TOLERANCE, YARDSTICK * sensitivity[i])
            assert_logits(out.logits[i, : len(row)], expected, config, what, limit)
            assert_near(last.logits[i, 0], expected[-1], f"{what}, last", limit)
            assert (out.logits[i, len(row) :] == 0).all(), f"{what}: logits of padding"
            assert_same_stream(state, i, alone[i], config, what, limit)
        if rng.random() < 0.3:
            state = model.close_chunk(state)
            alone = [stream.close_chunk(s, params, config) for s in alone]
            moved = [
                [stream.close_chunk(s, weights, config) for s in states]
                for weights, states in zip(rounded, moved, strict=True)
            ]
            for i, one in enumerate(alone):
                limit = TOLERANCE if call < 2 else max(TOLERANCE, YARDSTICK * sensitivity[i])
                assert_same_stream(state, i, one, config, f"closed after call {call}", limit)
        before = state


@given(batches())
def test_the_loss_of_a_ragged_batch_counts_its_own_tokens_alone(batch):
    config, seed, lengths = batch
    model = random_model(config, seed)
    rows = texts(lengths, seed)
    labels = padded(rows, 10**6)
    labels[:, 0] = 10**6  # nothing predicts a first token, so its label is not looked at either
    out = model(padded(rows, 0), labels=labels, lengths=lengths, logits="none")
    total, number = 0.0, 0
    for row in rows:
        logits, _ = spec.forward(row, stream.new_state(config), arrays_of(model), config)
        if len(row) > 1:
            total += spec.language_loss(logits, row) * (len(row) - 1)
            number += len(row) - 1
    if number:
        assert_near(out.loss, total / number, "loss")
    else:
        assert out.loss.isnan()
    ignored = torch.full_like(padded(rows, 0), IGNORE)
    assert model(padded(rows, 0), labels=ignored, lengths=lengths).loss.isnan()


@given(batches())
def test_gradients_of_a_ragged_batch_are_the_sum_of_each_alone(batch):
    config, seed, lengths = batch
    if max(lengths) < 2:
        return
    rows = texts(lengths, seed)
    model = random_model(config, seed)
    counts = sum(len(row) - 1 for row in rows)
    out = model(padded(rows, 0), labels=padded(rows, 0), lengths=lengths, logits="none")
    out.loss.backward()
    together = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model = random_model(config, seed)
    for row in rows:
        if len(row) > 1:
            one = model(tensor([row]), labels=tensor([row]), logits="none").loss
            (one * (len(row) - 1) / counts).backward()
    for name, p in model.named_parameters():
        a = together[name] if together[name] is not None else torch.zeros_like(p)
        b = p.grad if p.grad is not None else torch.zeros_like(p)
        assert_near(a, array(b), f"gradient of {name}", 1e-10)


@given(batches(), seeds)
def test_select_and_fork_rearrange_a_batch(batch, seed):
    config, weights, lengths = batch
    model = random_model(config, weights)
    params = arrays_of(model)
    rows = texts(lengths, weights)
    state = model(padded(rows, 0), lengths=lengths, logits="none").state
    rng = np.random.default_rng(seed)
    order = rng.integers(0, len(rows), 3).tolist()
    more = texts([4] * 3, seed)
    out = model(tensor(more), state=state.select(order))
    for i, source in enumerate(order):
        _, alone = stream.read(rows[source], stream.new_state(config), params, config)
        expected, alone = spec.forward(more[i], alone, params, config)
        assert_near(out.logits[i], expected, f"selected {source}")
        assert_same_stream(out.state, i, alone, config, f"selected {source}")
    forked = state.fork(2)
    for i in range(2 * len(rows)):
        _, alone = stream.read(rows[i // 2], stream.new_state(config), params, config)
        assert_same_stream(forked, i, alone, config, "forked")


@given(batches(), seeds)
def test_streams_that_were_read_apart_go_on_side_by_side(batch, seed):
    config, weights, lengths = batch
    model = random_model(config, weights)
    params = arrays_of(model)
    rows, more = texts(lengths, weights), texts(lengths[::-1], seed)
    states = [model(tensor([row]), logits="none").state for row in rows]
    states = [CoMeTState.cat(states[:2]), *states[2:]]
    joined = CoMeTState.cat(states)
    sizes = [len(row) for row in more]
    out = model(padded(more, 0), lengths=sizes, state=joined)
    for i, (row, text) in enumerate(zip(rows, more, strict=True)):
        _, alone = stream.read(row, stream.new_state(config), params, config)
        assert_same_stream(joined, i, alone, config, f"joined, sequence {i}")
        expected, alone = spec.forward(text, alone, params, config)
        assert_logits(out.logits[i, : len(text)], expected, config, f"sequence {i}")
        assert_same_stream(out.state, i, alone, config, f"sequence {i}")


def test_what_cannot_be_joined_says_why(make_config):
    one = random_model(make_config(), 0).new_state()
    other = random_model(make_config(memory={"chunk_size": 5}), 0).new_state()
    with pytest.raises(ValueError, match="states is empty; expected at least one"):
        CoMeTState.cat([])
    with pytest.raises(ValueError, match=r"configs .*, .*; join those of one"):
        CoMeTState.cat([one, other])
