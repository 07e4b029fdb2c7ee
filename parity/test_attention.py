"""Attention without a mask: in two parts that are joined, and of one query; and models that use it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fast.attention
from fast.attention import attend_after, needs_mask
from fast.layers import attention, causal_mask
from reference import layers as spec
from reference import model as reference
from reference import stream
from reference.parameters import named_parameters

from .assertions import array, arrays_of, assert_near
from .device import tensor
from .strategies import cases, random_model, seeds
from .test_gradients import assert_derivative, directional, gradients

pytestmark = pytest.mark.host  # on other devices a kernel of theirs takes a bias


@pytest.fixture
def always(monkeypatch):
    """Two parts, however few the slots."""
    monkeypatch.setattr(fast.attention, "JOINED", 2)


@st.composite
def rows(draw):
    """Queries, keys and values of new slots, and how many stand before them."""
    groups, heads, n = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 70))
    past, e, b = draw(st.integers(0, 40)), draw(st.sampled_from([2, 4, 6])), draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(seeds))
    sizes = ((groups * heads, n), (heads, past + n), (heads, past + n))
    return [rng.normal(size=(b, h, x, e)) for h, x in sizes], past


@given(rows())
def test_attention_without_a_mask_is_the_reference_s(case):
    arrays, past = case
    n = arrays[0].shape[2]
    found = attend_after(*(torch.from_numpy(x) for x in arrays), past)
    for i in range(len(arrays[0])):
        expected = spec.attention(*(x[i] for x in arrays), np.arange(past, past + n))
        assert_near(found[i], expected, "output")


@given(rows())
def test_its_gradients_are_those_of_attention_with_a_mask(case):
    arrays, past = case
    n = arrays[0].shape[2]
    positions = torch.arange(past, past + n)[None]
    mask = causal_mask(positions, past + n, torch.float64)
    found = []
    for given_past, given_mask in ((past, None), (None, mask)):
        inputs = [torch.from_numpy(x).requires_grad_() for x in arrays]
        out = attention(*inputs, positions, given_mask, given_past)
        factor = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos()
        found.append([out, *torch.autograd.grad(out, inputs, factor)])
    for what, a, b in zip(("output", "queries", "keys", "values"), *found, strict=True):
        assert_near(a, array(b.detach()), what)


@pytest.mark.usefixtures("always")
@given(cases())
def test_a_model_of_it_is_the_reference(case):
    config, seed, ids = case
    model = random_model(config, seed)
    expected, after = reference.forward(ids, stream.new_state(config), arrays_of(model), config)
    out = model(tensor([ids]))
    assert_near(out.logits[0], expected, "logits")
    for layer, state in enumerate(after.global_state):
        assert_near(out.state.global_state[layer][0], state, f"global state of layer {layer}")


@pytest.mark.usefixtures("always")
@given(cases(), st.sampled_from(["none", "cells", "chunks"]))
def test_a_model_of_it_has_the_reference_s_gradient(case, recompute):
    config, seed, ids = case
    ids = ids if len(ids) > 1 else ids * 2
    model = random_model(config, seed)
    found = gradients(model, ids, recompute=recompute)
    rng = np.random.default_rng(seed)
    params = arrays_of(model)
    direction = {name: rng.normal(size=p.shape) for name, p in named_parameters(params).items()}
    expected = directional(params, direction, ids, config)
    assert_derivative(found, direction, expected, "all parameters")


@pytest.mark.usefixtures("always")
def test_half_precision_and_autocast_take_it_too(make_config):
    config = make_config({}, {"chunk_size": 32, "temporary_memory_size": 8})
    model, ids = random_model(config, 0).float(), torch.arange(100)[None] % 7
    with torch.no_grad():
        expected = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(ids).logits
        narrow = model.to(torch.bfloat16)(ids).logits
    for found in (cast, narrow):
        assert_near(found.float(), array(expected), "logits", 0.1)


def test_a_mask_is_made_for_few_slots_on_a_cpu_alone():
    assert [needs_mask("cpu", 8, n) for n in (1, 2, 511, 512)] == [False, True, True, False]
    assert not needs_mask("cpu", 0, 100)
    assert not needs_mask("cuda", 8, 100)
