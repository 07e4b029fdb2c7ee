"""No future token influences a past logit, nor a past memory, across chunk borders too."""

import dataclasses

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from .device import tensor
from .strategies import VOCAB, cases, random_model, seeds


@given(cases(), seeds, st.data())
def test_no_future_token_influences_a_past_logit(case, seed, data):
    config, weights, ids = case
    model = random_model(config, weights)
    cut = data.draw(st.integers(1, len(ids)))
    other = np.random.default_rng(seed).integers(0, VOCAB, len(ids) - cut).tolist()
    a = model(tensor([ids])).logits[0, :cut]
    b = model(tensor([ids[:cut] + other])).logits[0, :cut]
    assert torch.equal(a, b)


@given(cases(), st.data())
def test_gradients_reach_back_and_never_forward(case, data):
    """d logits_i / d embedding_j is zero for j > i, whichever chunks they are in; not for j = i."""
    config, seed, ids = case
    i = data.draw(st.integers(0, len(ids) - 1))
    # An id of its own for every position, so that an embedding row is a position.
    backbone = dataclasses.replace(config.backbone, vocab_size=len(ids), tie_word_embeddings=False)
    config = dataclasses.replace(config, backbone=backbone)
    model = random_model(config, seed)
    out = model(tensor(np.arange(len(ids)))[None])
    out.logits[0, i].sum().backward()
    grad = model.weights["embed_tokens"].weight.grad
    assert (grad[i + 1 :] == 0).all()
    assert grad[i].abs().sum() > 0


@given(cases())
def test_memory_carries_what_the_chunk_border_cuts(case):
    """With a memory on, the first token still reaches the last logit; with both off, it does not."""
    config, seed, ids = case
    size, memory = config.memory.chunk_size, config.memory
    n = 2 * size + 1
    carries = memory.has_global or (
        memory.has_temporary and (memory.trailing_compression or size > memory.compression_stride)
    )
    backbone = dataclasses.replace(config.backbone, vocab_size=n, tie_word_embeddings=False)
    # A queue that holds every entry, and a gate that is never quite shut.
    memory = dataclasses.replace(memory, temporary_memory_size=99, gate_saturation=1.0)
    model = random_model(dataclasses.replace(config, backbone=backbone, memory=memory), seed)
    out = model(tensor(np.arange(n))[None])
    out.logits[0, -1].sum().backward()
    reached = model.weights["embed_tokens"].weight.grad[0].abs().sum() > 0
    assert bool(reached) == carries
