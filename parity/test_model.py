"""Twins of `model.py`: logits and loss of whole texts, cut in every way."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import IGNORE
from fast import model as fast
from reference import chunking, stream
from reference import model as spec
from reference.layers import decoder_layer, rotary_table

from .assertions import (
    HALF_EPSILONS,
    YARDSTICK,
    arrays_of,
    assert_logits,
    assert_near,
    largest_error,
)
from .strategies import cases, random_model, random_weights, seeds


@given(cases())
def test_logits(case):
    config, seed, ids = case
    model = random_model(config, seed)
    out = model(torch.tensor([ids]))
    expected, _ = spec.forward(ids, stream.new_state(config), arrays_of(model), config)
    assert out.logits.dtype == torch.float64
    assert_logits(out.logits[0], expected, config, "forward")
    last = model(torch.tensor([ids]), logits="last").logits
    assert_near(last[0], expected[-1:], "last")
    assert model(torch.tensor([ids]), logits="none").logits is None


@given(cases(), st.data())
def test_a_text_cut_by_any_plan(case, data):
    """Fixed, right-aligned, uniform, random, at boundaries: chunk sizes by hand."""
    config, seed, ids = case
    n, rng = len(ids), np.random.default_rng(seed)
    plan = data.draw(
        st.sampled_from(
            [
                chunking.fixed_size(n, 3),
                chunking.right_aligned(n, 4, 2),
                chunking.uniform(n, min(n, 3)),
                chunking.random_sizes(n, n, 1, 5, rng),
                chunking.at_boundaries(ids, n, 1, 5, {1, 2}),
            ]
        )
    )
    model = random_model(config, seed)
    out = model(torch.tensor([ids]), chunk_sizes=plan)
    expected, state = spec.forward(
        ids, stream.new_state(config), arrays_of(model), config, chunk_sizes=plan
    )
    assert state.chunks == len(plan) - 1
    assert_near(out.logits[0], expected, f"chunks {plan}")


@given(cases(), seeds)
def test_loss(case, seed):
    config, weights, ids = case
    model = random_model(config, weights)
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(len(ids)) < 0.3, IGNORE, ids)
    out = model(torch.tensor([ids]), labels=torch.tensor(labels)[None], logits="none")
    logits, _ = spec.forward(ids, stream.new_state(config), arrays_of(model), config)
    expected = spec.language_loss(logits, labels)
    twin = fast.language_loss(torch.tensor(logits)[None], torch.tensor(labels)[None])
    if (labels[1:] == IGNORE).all():
        assert math.isnan(out.loss.detach())
        assert math.isnan(twin)
        assert np.isnan(expected)
    else:
        assert_near(twin, expected, "language_loss")
        assert_near(out.loss, expected, "loss")


@given(cases())
def test_one_chunk_is_the_plain_decoder(case):
    """With everything in one open chunk and no compression, CoMeT is its backbone."""
    config, seed, ids = case
    memory = dataclasses.replace(config.memory, chunk_size=len(ids), compression_stride=0)
    config = dataclasses.replace(config, memory=memory)
    model = random_model(config, seed)
    params = arrays_of(model)
    backbone, at = config.backbone, np.arange(len(ids))
    hidden = params["embed_tokens"][ids]
    none = np.zeros((backbone.num_key_value_heads, 0, backbone.head_dim))
    for weights in params["layers"]:
        hidden, _, _ = decoder_layer(
            hidden, none, none, at, rotary_table(at, backbone), weights, backbone
        )
    expected = spec.predict(hidden, params, config)
    assert_near(model(torch.tensor([ids])).logits[0], expected, "fast")
    assert_near(
        spec.forward(ids, stream.new_state(config), params, config)[0], expected, "reference"
    )


def cast(tree, dtype):
    if isinstance(tree, dict):
        return {k: cast(v, dtype) for k, v in tree.items()}
    return [cast(v, dtype) for v in tree] if isinstance(tree, list) else tree.astype(dtype)


def nudged(tree, rng):
    """Every weight one rounding up, down, or as it is."""
    if isinstance(tree, dict):
        return {k: nudged(v, rng) for k, v in tree.items()}
    if isinstance(tree, list):
        return [nudged(v, rng) for v in tree]
    return tree + rng.integers(-1, 2, tree.shape).astype(np.float32) * np.spacing(np.abs(tree))


@given(cases())
def test_float32_is_as_exact_as_the_reference_in_float32(case):
    """Over a whole text, memories and all, against the float64 reference."""
    config, seed, ids = case
    params = cast(random_weights(config, seed), np.float32)
    rounded = cast(params, np.float64)
    # The default epsilon is the dtype's own: give float64 float32's.
    eps = config.memory.global_norm_eps or float(np.finfo(np.float32).eps)
    wide = dataclasses.replace(
        config, memory=dataclasses.replace(config.memory, global_norm_eps=eps)
    )
    truth, _ = spec.forward(ids, stream.new_state(wide), rounded, wide)
    model = random_model(config, seed, torch.float32)
    found = model(torch.tensor([ids])).logits
    assert found.dtype == torch.float32
    own = 0.0
    for jitter in range(4):  # how far one rounding of the weights moves float32
        narrow = stream.new_state(config, np.float32)
        moved = nudged(params, np.random.default_rng(jitter)) if jitter else params
        logits, _ = spec.forward(ids, narrow, moved, config)
        assert logits.dtype == np.float32
        own = max(own, largest_error(logits, truth))
    allowed = YARDSTICK * (own + 8 * np.finfo(np.float32).eps)
    assert largest_error(found[0], truth) <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(case=cases())
def test_narrow_dtypes_run_and_stay_near(dtype, case):
    """Every dtype keeps its own; nothing turns into NaN; the first chunk's first logits are near."""
    config, seed, ids = case
    model = random_model(config, seed).to(dtype)
    out = model(torch.tensor([ids]), labels=torch.tensor([ids]))
    assert out.logits.dtype == dtype
    assert out.logits.isfinite().all()
    assert out.loss.dtype == torch.float32
    assert all(t.dtype == dtype for t in (*out.state.keys, *out.state.global_state))
    params = arrays_of(random_model(config, seed))
    exact, _ = spec.forward(ids[:1], stream.new_state(config), params, config)
    error = largest_error(out.logits[0, :1].double(), exact)
    assert error <= HALF_EPSILONS * torch.finfo(dtype).eps
