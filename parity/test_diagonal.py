"""Chunks that are read along diagonals: the same as one after another."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import CoMeTModel, Recorder, stream
from fast.diagonal import read_diagonals

from .assertions import (
    TOLERANCE,
    YARDSTICK,
    array,
    assert_near,
    assert_same_states,
    largest_error,
)
from .device import tensor, tensors
from .strategies import VOCAB, configs, even_weights, nudged, random_model, seeds
from .test_rereading import gradients
from .test_windows import GRADIENTS, calls


@given(calls())
def test_diagonals_change_nothing(call):
    """Of ragged batches, whose chunks are read one after another, and of others."""
    model, ids, options = call
    options = {**options, "ids": ids}
    if model(**options).loss.isnan():
        return
    expected, whole = gradients(model, **options)
    found, same = gradients(model, **options, diagonal=True)
    assert_near(same.logits.detach(), array(whole.logits.detach()), "logits")
    assert_near(same.loss.detach(), array(whole.loss.detach()), "loss")
    assert_same_states(same.state, whole.state, "state")
    for name, gradient in expected.items():
        if gradient is not None:
            assert_near(found[name], array(gradient), f"gradient of {name}", GRADIENTS)


@given(
    configs(),
    st.integers(1, 3),
    st.integers(2, 20),
    st.sampled_from(["all", "last", "none"]),
    seeds,
)
def test_long_texts_are_read_along_diagonals(config, batch_size, chunks, logits, seed):
    """From where memories are full, to the last whole chunk."""
    weights, size = even_weights(config, seed), config.memory.chunk_size
    model, moved = (
        CoMeTModel(config, tensors(w, torch.float64))
        for w in (weights, nudged(weights, seed, np.finfo(np.float64).eps))
    )
    text = tensor(np.random.default_rng(seed).integers(0, VOCAB, (batch_size, chunks * size + 1)))
    started = [one.close_chunk(one(text, logits="none").state.detach()) for one in (model, moved)]
    state, other = started
    lengths = []

    def counted(texts, *rest):
        lengths.append(len(texts))
        return read_diagonals(texts, *rest)

    with patch.object(stream, "read_diagonals", counted):
        found = model(text, state=state, logits=logits, diagonal=True)
    expected = model(text, state=state, logits=logits)
    rounded = moved(text, state=other, logits=logits)
    memory = config.memory
    if not memory.has_temporary or state.queue_length[0] == memory.temporary_memory_size:
        assert sum(lengths) == chunks, "chunks were read one after another"
    apart = [
        largest_error(a.detach(), array(b.detach()))
        for name in ("global_state", "temporary_memory", "keys", "values")
        for a, b in zip(getattr(rounded.state, name), getattr(expected.state, name), strict=True)
    ]
    if logits != "none":
        apart.append(largest_error(rounded.logits.detach(), array(expected.logits.detach())))
    limit = max(TOLERANCE, YARDSTICK * max(apart))
    assert_same_states(found.state, expected.state, "state", limit)
    if logits != "none":
        assert_near(found.logits.detach(), array(expected.logits.detach()), "logits", limit)


@given(configs(), st.integers(1, 2), st.integers(2, 8), seeds)
def test_gradients_flow_back_along_diagonals(config, batch_size, chunks, seed):
    """Through all memories, to every weight, and to the embeddings that a call may be given."""
    model, size = (
        CoMeTModel(config, tensors(even_weights(config, seed), torch.float64)),
        (config.memory.chunk_size),
    )
    text = tensor(np.random.default_rng(seed).integers(0, VOCAB, (batch_size, chunks * size + 1)))
    state = model.close_chunk(model(text, logits="none").state).detach()
    found = []
    for diagonal in (False, True):
        model.zero_grad()
        out = model(text, labels=text, state=state, diagonal=diagonal)
        memories = [*out.state.global_state, *out.state.temporary_memory]
        (out.loss + sum(t.square().sum() for t in memories)).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:
            assert_near(found[1][name], array(gradient), f"gradient of {name}", GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_diagonals_of_narrow_types(make_config, dtype):
    """As far from float64 as chunk after chunk, or less than twice as far."""
    config = make_config({"attention_bias": True, "qk_norm": True})
    weights = even_weights(config, 0)
    exact, model = (CoMeTModel(config, tensors(weights, kind)) for kind in (torch.float64, dtype))
    text = tensor(np.random.default_rng(0).integers(0, VOCAB, (2, 41)))
    with torch.no_grad(), patch.object(stream, "read_diagonals", wraps=read_diagonals) as along:
        expected = array(exact(text).logits)
        errors = [
            np.abs(array(model(text, diagonal=diagonal).logits) - expected).mean()
            for diagonal in (False, True)
        ]
    assert along.call_count == 1
    assert errors[1] <= 2 * errors[0], errors


def test_what_diagonals_do_not_call_is_told(make_config):
    model = random_model(make_config(), 0)
    text = tensor([list(range(11)) * 3])
    with pytest.raises(ValueError, match=r"diagonal=True with recompute='cells', which goes chunk"):
        model(text, labels=text, diagonal=True, recompute="cells")
    with pytest.raises(ValueError, match="diagonal=True with a recorder"):
        model(text, diagonal=True, recorder=Recorder())
    with pytest.raises(ValueError, match="diagonal is a int; expected True or False"):
        model(text, diagonal=1)
    handle = model.weights["layers"][1]["q_proj"].register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"layers\.1\.q_proj has hooks, which diagonals do not call"
    ):
        model(text, diagonal=True)
    handle.remove()
    taken = model.weights["layers"][0]["o_proj"]
    model.weights["layers"][0].o_proj = torch.nn.Sequential(taken)
    with pytest.raises(ValueError, match=r"layers\.0\.o_proj is a .*Sequential, not one tensor"):
        model(text, diagonal=True)
