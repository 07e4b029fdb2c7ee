"""Twins of `layers.py`: each equation, on random arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import layers as fast
from fast.layers import FEW, LARGE
from reference import layers as spec

from .assertions import YARDSTICK, assert_at_most, assert_near, assert_twin, typical_error
from .device import tensor, tensors
from .strategies import backbones, random_weights, seeds

B = 3


def normal(rng, *shape):
    return rng.normal(0.0, 1.5, shape)


def on_device(table):
    """The reference's rotary table, [n, e / 2] each, as `fast` takes it of sequences that are alike."""
    return fast.for_heads(tuple(tensor(part)[None] for part in table))


def layer_of(backbone, seed):
    from fast import CoMeTConfig, MemoryConfig

    config = CoMeTConfig(backbone, MemoryConfig(4, 0, 1, 0))
    return random_weights(config, seed)["layers"][0]


@given(seeds, st.sampled_from([None, 1e-12, 1e-2]), st.integers(1, 6))
def test_rms_norm(seed, eps, d):
    rng = np.random.default_rng(seed)
    x, w = normal(rng, B, 4, d), normal(rng, d)
    assert_twin(
        fast.rms_norm(tensor(x), tensor(w), eps), spec.rms_norm(x, w, eps), "rms_norm", tensor(x)
    )


@given(seeds, st.integers(1, 5), st.integers(1, 3))
def test_adapter_linear_sigmoid(seed, d, r):
    rng = np.random.default_rng(seed)
    x = normal(rng, B, 4, d)
    w = {"adapter_down": normal(rng, r, d), "adapter_up": normal(rng, d, r)}
    found = fast.adapter(tensor(x), tensors(w, torch.float64))
    assert_twin(found, spec.adapter(x, w), "adapter", tensor(x))
    bias = normal(rng, r)
    down = w["adapter_down"]
    for b in (None, bias):
        found = fast.linear(tensor(x), tensor(down), None if b is None else tensor(b))
        assert_twin(found, spec.linear(x, down, b), "linear", tensor(x))
    wide = 300 * x
    assert_twin(fast.sigmoid(tensor(wide)), spec.sigmoid(wide), "sigmoid", tensor(x))


@pytest.mark.host
@pytest.mark.parametrize("rows", [0, 1, 2, FEW, FEW + 1])
@pytest.mark.parametrize("biased", [False, True])
def test_a_few_rows_are_multiplied_as_many_are(rows, biased):
    """By weights that are large enough for the product to be another one; gradients too."""
    rng = np.random.default_rng(rows)
    weight, bias = rng.normal(size=(LARGE // 256, 256)), rng.normal(size=LARGE // 256)
    x = rng.normal(size=(1, rows, 256))
    expected = spec.linear(x[0], weight) + biased * bias
    tensors = [torch.tensor(t, dtype=torch.float32, requires_grad=True) for t in (x, weight, bias)]
    found = fast.linear(*tensors[: 2 + biased])
    assert found.shape == (1, rows, LARGE // 256)
    assert_near(found[0].detach().numpy(), expected, "product", 1e-5)
    found.sum().backward()
    sums = np.broadcast_to(x.sum(1), weight.shape)
    for t, grad in zip(tensors, (weight.sum(0), sums, np.full(len(bias), rows)), strict=True):
        if t.grad is not None:
            assert_near(t.grad.numpy(), np.broadcast_to(grad, t.shape), "gradient", 1e-4)


@pytest.mark.host
@given(backbones(), st.integers(0, 100_000))
def test_rotary_table_and_frequencies(backbone, start):
    positions = np.arange(start, start + 5)
    assert_near(fast.rotary_frequencies(backbone), spec.rotary_frequencies(backbone), "frequencies")
    tables = fast.rotary_tables(torch.from_numpy(positions)[None], backbone)
    for found, expected in zip(tables, spec.rotary_tables(positions, backbone), strict=True):
        for name, f, e in zip(("cos", "sin"), found, expected, strict=True):
            assert_near(f[0], e, name, 1e-10)  # an ulp of an angle of 1e5 radians is 1.5e-11


@pytest.mark.host
@given(backbones(), seeds)
def test_layers_without_rotation_turn_nothing(backbone, seed):
    """Exactly; and where every layer rotates there is one table."""
    tables = spec.rotary_tables(np.arange(7), backbone)
    assert len(tables) == 1 + bool(backbone.unrotated_layers)
    x = np.random.default_rng(seed).normal(size=(1, 7, backbone.head_dim))
    for table in tables[1:]:
        assert np.array_equal(spec.rotate(x, table), x)
    assert not np.array_equal(spec.rotate(x, tables[0]), x)


@given(backbones(), seeds)
def test_rotate_and_heads(backbone, seed):
    rng = np.random.default_rng(seed)
    h, e = backbone.num_attention_heads, backbone.head_dim
    x = normal(rng, B, 5, h * e)
    table = spec.rotary_table(np.arange(3, 8), backbone)
    split = fast.split_heads(tensor(x), h)
    turned = fast.rotate(split, on_device(table))
    merged = fast.merge_heads(turned)
    for b in range(B):
        assert_near(split[b], spec.split_heads(x[b], h), "split_heads")
        expected = spec.rotate(spec.split_heads(x[b], h), table)
        assert_near(turned[b], expected, "rotate")
        assert_near(merged[b], spec.merge_heads(expected), "merge_heads")


@pytest.mark.host
@given(backbones(), seeds)
def test_rotation_keeps_lengths_and_depends_on_distance_alone(backbone, seed):
    rng = np.random.default_rng(seed)
    q, k = normal(rng, 1, 1, backbone.head_dim), normal(rng, 1, 1, backbone.head_dim)

    def turn(x, position):
        return spec.rotate(x, spec.rotary_table(np.array([position]), backbone))

    assert_near(np.linalg.norm(turn(q, 7)), np.linalg.norm(q), "length")
    near = np.sum(turn(q, 9) * turn(k, 4))
    assert_near(np.sum(turn(q, 105) * turn(k, 100)), near, "distance", 1e-10)


@given(seeds, st.sampled_from([(1, 1), (2, 1), (4, 2)]), st.integers(0, 5), st.integers(1, 5))
def test_attention(seed, heads, past, n):
    rng = np.random.default_rng(seed)
    h, k = heads
    q = normal(rng, B, h, n, 4)
    keys, values = normal(rng, B, k, past + n, 4), normal(rng, B, k, past + n, 4)
    at = np.arange(past, past + n)
    found = fast.attention(tensor(q), tensor(keys), tensor(values), tensor(at)[None])
    ragged = fast.attention(
        tensor(q), tensor(keys), tensor(values), tensor(np.broadcast_to(at, (B, n)).copy())
    )
    for b in range(B):
        expected = spec.attention(q[b], keys[b], values[b], at)
        assert_near(found[b], expected, "attention")
        assert_near(ragged[b], expected, "attention of ragged rows")


@given(seeds, st.integers(1, 4), st.booleans())
def test_attention_goes_by_positions_not_by_order(seed, n, ragged):
    """Where sequences differ, the slots that are asked for come in any order, some more than once."""
    rng = np.random.default_rng(seed)
    q, keys, values = (normal(rng, B, 1, n, 4) for _ in range(3))
    at = rng.integers(0, n, (B, n)) if ragged else np.arange(n)[None]
    found = fast.attention(tensor(q), tensor(keys), tensor(values), tensor(at))
    for b in range(B):
        own = at[b if ragged else 0]
        assert_near(found[b], spec.attention(q[b], keys[b], values[b], own), "attention")


@pytest.mark.host
@given(seeds)
def test_softmax_sums_to_one_over_what_is_visible(seed):
    rng = np.random.default_rng(seed)
    scores = 100 * normal(rng, 4, 6)
    visible = rng.random((4, 6)) < 0.5
    visible[:, 0] = True
    p = spec.softmax(scores, visible)
    assert_near(p.sum(-1), np.ones(4), "sum")
    assert (p[~visible] == 0).all()


@given(backbones(), seeds)
def test_swiglu_and_keys_values(backbone, seed):
    rng = np.random.default_rng(seed)
    w = layer_of(backbone, seed)
    tw = tensors(w, torch.float64)
    x = normal(rng, B, 4, backbone.hidden_size)
    assert_twin(fast.swiglu(tensor(x), tw), spec.swiglu(x, w), "swiglu", tensor(x))
    table = spec.rotary_table(np.arange(4), backbone)
    found = fast.project_keys_values(tensor(x), on_device(table), tw, backbone)
    slots = fast.project_memory(tensor(x), on_device(table), tw, backbone)
    for b in range(B):
        expected = spec.project_keys_values(x[b], table, w, backbone)
        for name, f, e in zip(("keys", "values"), found, expected, strict=True):
            assert_near(f[b], e, name)
        none = np.zeros((backbone.num_key_value_heads, 0, backbone.head_dim))
        _, k, v = spec.decoder_layer(x[b], none, none, np.arange(4), table, w, backbone)
        assert_near(slots[0][b], k, "memory slot's key, the whole layer run")
        assert_near(slots[1][b], v, "memory slot's value, the whole layer run")


@given(backbones(), seeds, st.integers(0, 4), st.integers(1, 4))
def test_decoder_layer(backbone, seed, past, n):
    rng = np.random.default_rng(seed)
    w = layer_of(backbone, seed)
    x = normal(rng, B, n, backbone.hidden_size)
    shape = (B, backbone.num_key_value_heads, past, backbone.head_dim)
    keys, values = normal(rng, *shape), normal(rng, *shape)
    at = np.arange(past, past + n)
    table = spec.rotary_table(at, backbone)
    args = (tensor(at)[None], on_device(table), tensors(w, torch.float64), backbone)
    found = fast.decoder_layer(tensor(x), tensor(keys), tensor(values), *args)
    for b in range(B):
        expected = spec.decoder_layer(x[b], keys[b], values[b], at, table, w, backbone)
        for name, f, e in zip(("hidden", "keys", "values"), found, expected, strict=True):
            assert f.dtype == torch.float64
            assert_near(f[b], e, f"decoder_layer, {name}")


@given(seeds, st.integers(0, 4), st.integers(1, 4))
def test_append_slots_puts_every_slot_at_its_position(seed, past, n):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, past + 1, B)
    counts = rng.integers(0, n + 1, B)
    old, new = normal(rng, B, 1, past, 2), normal(rng, B, 1, n, 2)
    offset = np.arange(n)
    at = lengths[:, None] + offset  # padding after a row's own slots
    found = fast.append_slots(tensor(old), tensor(new), tensor(at))
    for b in range(B):
        expected = np.concatenate([old[b, 0, : lengths[b]], new[b, 0, : counts[b]]])
        assert_near(found[b, 0, : len(expected)], expected, "row")


@given(backbones(), seeds)
def test_float32_is_as_exact_as_the_reference_in_float32(backbone, seed):
    rng = np.random.default_rng(seed)
    w = layer_of(backbone, seed)
    x = normal(rng, 6, backbone.hidden_size)
    none = np.zeros((backbone.num_key_value_heads, 0, backbone.head_dim))
    at = np.arange(6)
    table = spec.rotary_table(at, backbone)
    exact = spec.decoder_layer(x, none, none, at, table, w, backbone)[0]
    w32 = {k: v.astype(np.float32) for k, v in w.items()}
    x32, none32 = x.astype(np.float32), none.astype(np.float32)
    own = spec.decoder_layer(x32, none32, none32, at, table, w32, backbone)[0]
    assert own.dtype == np.float32
    t32 = tuple(t.float() for t in on_device(table))
    tw = tensors(w, torch.float32)
    empty = tensor(none32)[None]
    found = fast.decoder_layer(
        tensor(x32)[None], empty, empty, tensor(at)[None], t32, tw, backbone
    )[0]
    allowed = YARDSTICK * (typical_error(own, exact) + np.finfo(np.float32).eps)
    assert found.dtype == torch.float32
    assert_at_most(typical_error(found[0], exact), allowed, "decoder_layer", found)
