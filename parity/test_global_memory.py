"""Twins and laws of `global_memory.py`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import MemoryConfig
from fast import global_memory as fast
from reference import global_memory as spec
from reference.config import GATES

from .assertions import array, assert_near, assert_twin
from .device import tensor, tensors
from .strategies import seeds

D, M = 4, 3


def weights(rng, kind, bias, scale=0.7, sink=False):
    gates = 1 if kind == "scalar" else D
    w = {
        "norm": rng.uniform(0.5, 1.5, D),
        "gate": rng.normal(0, scale, (gates, 2 * D)),
        "adapter_down": rng.normal(0, 0.7, (2, D)),
        "adapter_up": rng.normal(0, 0.7, (D, 2)),
    }
    if bias:
        w["gate_bias"] = rng.normal(0, 2, gates)
    if sink:
        w["sink"] = rng.normal(0, 2, D)
    return w


kinds = st.sampled_from(GATES)
saturations = st.sampled_from([1.0, 0.95, 0.3])


@given(seeds, kinds, st.booleans(), saturations, st.booleans())
def test_propose_gate_and_read(seed, kind, bias, saturation, sink):
    rng = np.random.default_rng(seed)
    w = weights(rng, kind, bias, sink=sink)
    tw = tensors(w, torch.float64)
    x, s = rng.normal(0, 2, (2, M, D)), rng.normal(0, 2, (2, M, D))
    for eps in (None, 1e-3):
        found = fast.propose(tensor(x), tw, eps)
        assert_twin(found, spec.propose(x, w, eps), "propose", tensor(x))
    assert_twin(
        fast.gate(tensor(x), tensor(s), tw, saturation),
        spec.gate(x, s, w, saturation),
        "g",
        tensor(x),
    )
    read = np.stack([spec.read_global(x, w) for x in s])
    assert_twin(fast.read_global(tensor(s), tw), read, "G", tensor(s))
    if sink:
        assert np.array_equal(read[:, 0], [w["sink"]] * 2), (
            "the sink is as it was learned, in front"
        )


@given(seeds, kinds, st.booleans(), saturations, st.booleans())
def test_update_global(seed, kind, bias, saturation, first):
    rng = np.random.default_rng(seed)
    w = weights(rng, kind, bias)
    r, s = rng.normal(0, 2, (2, M, D)), rng.normal(0, 2, (2, M, D))
    c = MemoryConfig(4, M, 1, 0, gate=kind, gate_bias=bias, gate_saturation=saturation)
    found = fast.update_global(
        None if first else tensor(s), tensor(r), tensors(w, torch.float64), c
    )
    assert_twin(found, spec.update_global(None if first else s, r, w, c), "S", tensor(r))


@given(seeds, kinds, saturations)
def test_the_gate_is_a_convex_combination(seed, kind, saturation):
    rng = np.random.default_rng(seed)
    w = weights(rng, kind, True, scale=3.0)
    c = MemoryConfig(4, M, 1, 0, gate=kind, gate_bias=True, gate_saturation=saturation)
    r, s = rng.normal(0, 2, (1, M, D)), rng.normal(0, 2, (1, M, D))
    tw = tensors(w, torch.float64)
    new = fast.propose(tensor(r), tw, c.global_norm_eps)
    g = fast.gate(new, tensor(s), tw, saturation)
    assert ((g >= 0) & (g <= 1)).all()
    out = fast.update_global(tensor(s), tensor(r), tw, c)
    low, high = torch.minimum(new, tensor(s)), torch.maximum(new, tensor(s))
    assert ((out >= low - 1e-12) & (out <= high + 1e-12)).all()


@given(seeds, kinds)
def test_g_one_keeps_and_g_zero_replaces(seed, kind):
    rng = np.random.default_rng(seed)
    r, s = rng.normal(0, 2, (1, M, D)), rng.normal(0, 2, (1, M, D))
    c = MemoryConfig(4, M, 1, 0, gate=kind, gate_bias=True, gate_saturation=0.9)
    for bias, expected in ((50.0, s), (-800.0, None)):
        w = weights(rng, kind, True, scale=0.0)
        w["gate_bias"] = np.full_like(w["gate_bias"], bias)
        if expected is None:
            expected = spec.propose(r, w, None)
        out = fast.update_global(tensor(s), tensor(r), tensors(w, torch.float64), c)
        assert np.array_equal(array(out), expected) or bias < 0
        assert_near(out, expected, "S")
        assert_near(spec.update_global(s, r, w, c), expected, "reference S")


@pytest.mark.host
@given(seeds)
def test_a_saturated_gate_keeps_for_good_where_a_sigmoid_fades(seed):
    """A thousand chunks at the same gate logit: the published gate has forgotten."""
    rng = np.random.default_rng(seed)
    w = weights(rng, "scalar", True, scale=0.0)
    w["gate_bias"] = np.array([5.0])  # sigmoid 0.9933
    s = rng.normal(0, 2, (M, D))
    other = rng.normal(0, 2, (M, D))
    for saturation, kept in ((0.95, True), (1.0, False)):
        c = MemoryConfig(4, M, 1, 0, gate_bias=True, gate_saturation=saturation)
        state = s
        for _ in range(1000):
            state = spec.update_global(state, other, w, c)
        assert np.array_equal(state, s) == kept
        if not kept:
            target = spec.propose(other, w, None)
            assert np.abs(state - target).max() < 0.01 * max(1.0, np.abs(s - target).max())


@given(seeds)
def test_the_default_epsilon_is_the_dtypes_own(seed):
    """Float32's for half types, which is a law of `test_half_types.py`."""
    rng = np.random.default_rng(seed)
    w = weights(rng, "scalar", False)
    tiny = 1e-8 * rng.normal(size=(1, M, D))
    c = MemoryConfig(4, M, 1, 0)
    found = fast.update_global(None, tensor(tiny), tensors(w, torch.float64), c)
    assert_near(found, spec.update_global(None, tiny, w, c), "float64")
