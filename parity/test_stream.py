"""Twins of `stream.py`: rows, chunks and memories, call by call."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import stream as fast
from reference import stream as spec

from .assertions import arrays_of, assert_near, assert_same_stream
from .device import tensor
from .strategies import cases, pieces, random_model, splits


@given(cases(), st.data())
def test_every_call_leaves_the_reference_s_state(case, data):
    """Open row, both memories and counts of every layer, after every call."""
    config, seed, ids = case
    model = random_model(config, seed)
    params = arrays_of(model)
    state, expected = model.new_state(), spec.new_state(config)
    assert_same_stream(state, 0, expected, config, "before any text")
    for number, piece in enumerate(pieces(ids, data.draw(splits(len(ids))))):
        out = model(tensor([piece]), state=state, logits="none")
        state = out.state
        _, expected = spec.read(piece, expected, params, config)
        assert_same_stream(state, 0, expected, config, f"after call {number}")
        if data.draw(st.integers(0, 5)) == 0:
            state = model.close_chunk(state)
            expected = spec.close_chunk(expected, params, config)
            assert_same_stream(state, 0, expected, config, f"closed after call {number}")


@given(cases())
def test_open_chunk(case):
    config, seed, ids = case
    model = random_model(config, seed)
    params = arrays_of(model)
    state = model.close_chunk(model(tensor([ids]), logits="none").state)
    expected = spec.close_chunk(
        spec.read(ids, spec.new_state(config), params, config)[1], params, config
    )
    opened = fast.open_chunk(state, model.weights, config)
    assert_same_stream(opened, 0, spec.open_chunk(expected, params, config), config, "opened")


@given(cases())
def test_what_read_yields_is_the_top_layer_s_output(case):
    config, seed, ids = case
    model = random_model(config, seed)
    expected, _ = spec.read(ids, spec.new_state(config), arrays_of(model), config)
    rounds = list(fast.read(tensor([ids]), model.new_state(), model.weights, config))
    assert_near(fast.join(rounds, len(ids))[0], expected, "hidden")
    assert sum(int(r.row.take) for r in rounds) == len(ids)
    embeddings = model.weights["embed_tokens"](tensor([ids]))
    given = list(fast.read(embeddings, model.new_state(), model.weights, config))
    assert torch.equal(fast.join(given, len(ids)), fast.join(rounds, len(ids)))


@given(cases())
def test_memory_does_not_grow_with_the_text(case):
    """The state is bounded by the config alone, however long the text."""
    config, seed, ids = case
    model = random_model(config, seed)
    memory, backbone = config.memory, config.backbone
    entries = -(-memory.chunk_size // memory.compression_stride) if memory.has_temporary else 0
    queue = memory.temporary_memory_size if memory.has_temporary else 0
    row = memory.global_slots + queue + memory.chunk_size + entries
    slots = memory.global_memory_size + queue
    width = 2 * backbone.num_key_value_heads * backbone.head_dim
    bound = 8 * backbone.num_hidden_layers * (slots * backbone.hidden_size + row * width)
    state = model.new_state()
    for _ in range(3):
        state = model(tensor([ids]), state=state, logits="none").state
        assert state.num_bytes <= bound


@given(cases())
def test_a_round_has_no_more_outputs_than_are_asked_for(case):
    """Nothing is computed, or kept, to be dropped."""
    config, seed, ids = case
    model = random_model(config, seed)

    def widths(outputs):
        rounds = fast.read(tensor([ids]), model.new_state(), model.weights, config, outputs=outputs)
        return [part.hidden.shape[1] for part in rounds]

    size = config.memory.chunk_size
    takes = [min(size, len(ids) - start) for start in range(0, len(ids), size)]
    assert widths("all") == takes
    assert widths("last") == [0] * (len(takes) - 1) + [1]
    assert widths("none") == [0] * len(takes)


@given(cases(), st.booleans())
def test_a_row_keeps_no_storage_but_its_own(case, closes):
    """A view would keep the longer row alive that it was cut from, after its chunk has closed."""
    config, seed, ids = case
    model, half = random_model(config, seed), -(-len(ids) // 2)
    with torch.no_grad():
        state = model(tensor([ids, ids[::-1]]), lengths=[len(ids), half], logits="none").state
        state = model.close_chunk(state) if closes else state
    for t in (*state.keys, *state.values):
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


@given(cases())
def test_no_call_changes_its_arguments(case):
    config, seed, ids = case
    model = random_model(config, seed)
    text = tensor([ids])
    state = model(text, logits="none").state
    tensors = [*state.global_state, *state.temporary_memory, *state.keys, *state.values]
    before = [t.clone() for t in tensors]
    counts = [state.tokens.copy(), state.row_length.copy(), state.queue_length.copy()]
    model(text, state=state)
    model.close_chunk(state)
    model.generate(text, state, max_new_tokens=3)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    now = (state.tokens, state.row_length, state.queue_length)
    assert all(np.array_equal(c, n) for c, n in zip(counts, now, strict=True))
    assert text.tolist() == [ids]
