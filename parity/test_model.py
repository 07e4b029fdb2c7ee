"""Twins of `model.py`: logits and loss of whole texts, cut in every way."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import IGNORE, CoMeTModel
from fast import model as fast
from reference import chunking, stream
from reference import model as spec
from reference.layers import decoder_layer, rotary_tables
from reference.parameters import map_parameters

from .assertions import (
    YARDSTICK,
    array,
    arrays_of,
    assert_at_most,
    assert_logits,
    assert_near,
    largest_error,
)
from .device import DEVICE, tensor
from .strategies import cases, nudged, random_model, seeds, widened


@given(cases())
def test_logits(case):
    config, seed, ids = case
    model = random_model(config, seed)
    out = model(tensor([ids]))
    expected, _ = spec.forward(ids, stream.new_state(config), arrays_of(model), config)
    assert out.logits.dtype == torch.float64
    assert_logits(out.logits[0], expected, config, "forward")
    last = model(tensor([ids]), logits="last").logits
    assert_near(last[0], expected[-1:], "last")
    assert model(tensor([ids]), logits="none").logits is None


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
    out = model(tensor([ids]), chunk_sizes=plan)
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
    out = model(tensor([ids]), labels=tensor(labels)[None], logits="none")
    logits, _ = spec.forward(ids, stream.new_state(config), arrays_of(model), config)
    expected = spec.language_loss(logits, labels)
    twin = fast.language_loss(tensor(logits)[None], tensor(labels)[None])
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
    tables = rotary_tables(at, backbone)
    for i, weights in enumerate(params["layers"]):
        table = tables[i in backbone.unrotated_layers]
        hidden, _, _ = decoder_layer(hidden, none, none, at, table, weights, backbone)
    expected = spec.predict(hidden, params, config)
    assert_near(model(tensor([ids])).logits[0], expected, "fast")
    assert_near(
        spec.forward(ids, stream.new_state(config), params, config)[0], expected, "reference"
    )


@given(cases())
def test_float32_is_as_exact_as_the_reference_in_float32(case):
    """Over a whole text, memories and all, against the float64 reference."""
    config, seed, ids = case
    model = random_model(config, seed, torch.float32)
    params = map_parameters(lambda _, p: p.astype(np.float64), arrays_of(model))
    truth, _ = spec.forward(ids, stream.new_state(config), params, widened(config))
    found = model(tensor([ids])).logits
    assert found.dtype == torch.float32
    own, epsilon = 0.0, float(np.finfo(np.float32).eps)
    for jitter in range(4):  # how far one rounding of the weights moves float32
        moved = nudged(params, jitter, epsilon * (jitter > 0))
        moved = map_parameters(lambda _, p: p.astype(np.float32), moved)
        logits, _ = spec.forward(ids, stream.new_state(config, np.float32), moved, config)
        assert logits.dtype == np.float32
        own = max(own, largest_error(logits, truth))
    assert_at_most(largest_error(found[0], truth), YARDSTICK * (own + 8 * epsilon), "logits", found)


def test_a_model_comes_in_the_dtype_and_on_the_device_that_are_asked_for(make_config, tmp_path):
    config = make_config()
    fresh = CoMeTModel(config, seed=3, dtype=torch.bfloat16, device=DEVICE)
    fresh.save_pretrained(tmp_path)
    loaded = CoMeTModel.from_pretrained(tmp_path, dtype=torch.float64, device=DEVICE)
    for model, dtype in ((fresh, torch.bfloat16), (loaded, torch.float64)):
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {p.device for p in model.parameters()} == {DEVICE}
    state = loaded(tensor([[1, 2, 3, 4, 5]])).state
    there = state.to("cpu").to(DEVICE)
    assert there.keys[0].device == DEVICE
    assert_near(there.keys[0], array(state.keys[0]), "keys")
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match="dtype is '.*'; expected 'float64', 'float32',"):
            CoMeTModel(config, dtype=dtype)


def test_on_the_meta_device_a_fresh_model_is_names_and_shapes(make_config):
    """Nothing is drawn, and the dtype is PyTorch's default one."""
    with torch.device("meta"):
        blank = CoMeTModel(make_config())
    fresh = random_model(make_config(), 0)
    assert all(p.is_meta and p.dtype == torch.get_default_dtype() for p in blank.parameters())
    assert [(name, p.shape) for name, p in blank.named_parameters()] == [
        (name, p.shape) for name, p in fresh.named_parameters()
    ]
