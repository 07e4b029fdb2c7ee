"""bfloat16 and float16: every operation errs by a few roundings of its result, and a text by what
its weights' own rounding would.

Inputs are rounded first, and the float64 reference gets those same numbers, so only the operation
errs. Where an epsilon is left to the dtype, it is float32's.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import BackboneConfig, CoMeTConfig, CoMeTModel, MemoryConfig
from fast import global_memory as fast_global
from fast import layers as fast
from fast import temporary_memory as fast_temporary
from reference import global_memory, stream, temporary_memory
from reference import layers as spec
from reference.model import forward
from reference.parameters import map_parameters

from .assertions import (
    HALF_MEDIAN,
    HALF_SHARE,
    HALF_TYPES,
    HALF_YARDSTICK,
    array,
    arrays_of,
    assert_at_most,
    assert_logits,
    assert_near,
    assert_rounded,
    assert_same_stream,
    relative_error,
    typical_error,
)
from .device import DEVICE, tensor, tensors
from .strategies import VOCAB, cases, even_weights, nudged, random_model, seeds, widened

half = pytest.mark.parametrize("dtype", HALF_TYPES)

SLOTS, NEW = 300, 8
"""A row, and its new slots: bfloat16 counts no further than 256."""

EPSILON = float(np.finfo(np.float32).eps)


def small_config(seed):
    """Every kind of backbone and gate, wide enough that single errors average out."""
    kind = [bool(seed >> bit & 1) for bit in range(5)]
    return CoMeTConfig(
        BackboneConfig(VOCAB, 32, 48, 1, 4, 2, 8, qk_norm=kind[0], attention_bias=kind[1]),
        MemoryConfig(
            chunk_size=4,
            global_memory_size=12,
            sink_slot=kind[4],
            temporary_memory_size=20,
            compression_stride=2,
            adapter_rank=4,
            gate="vector" if kind[2] else "scalar",
            gate_bias=True,
            gate_saturation=0.95 if kind[3] else 1.0,
        ),
    )


def even_model(config, seed):
    """The fast model with them, in float64."""
    return CoMeTModel(config, tensors(even_weights(config, seed), torch.float64))


def rounded(x, dtype):
    """An array in the half type, and the same numbers for the reference."""
    there = tensor(x).to(dtype)
    return there, array(there.double())


def layer(seed, dtype):
    """A config; the first layer's weights, and the same numbers for the reference."""
    config = small_config(seed)
    there = tensors(even_weights(config, seed), dtype)["layers"][0]
    return config, there, map_parameters(lambda _, t: array(t.double()), there)


def places(positions):
    """Positions of a batch of one, as `fast` takes them."""
    return tensor(positions)[None]


def rotation(positions, backbone):
    """Their rotary table as a model makes it, and the reference's."""
    table = spec.rotary_table(positions, backbone)
    return fast.for_heads(tuple(tensor(t)[None].float() for t in table)), table


@half
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 300.0]), eps=st.sampled_from([None, 1e-6]))
def test_rms_norm_takes_its_statistic_and_its_epsilon_in_float32(dtype, seed, scale, eps):
    """The small numbers are far below the half types' own epsilons; the squares of the large ones
    are beyond float16."""
    rng = np.random.default_rng(seed)
    x, same = rounded(rng.normal(0, scale, (12, 32)), dtype)
    weight, same_weight = rounded(rng.uniform(0.5, 1.5, 32), dtype)
    expected = spec.rms_norm(same, same_weight, EPSILON if eps is None else eps)
    assert_rounded(fast.rms_norm(x, weight, eps), expected, "rms_norm", dtype)


@half
@given(seed=seeds)
def test_a_norm_is_rounded_before_its_weight(dtype, seed):
    """As in the published code; once more after it, to the bit."""
    rng = np.random.default_rng(seed)
    x, weight = (rounded(rng.normal(0, 1, shape), dtype)[0] for shape in ((12, 32), 32))
    alone = fast.rms_norm(x, torch.ones_like(weight), None)
    assert torch.equal(fast.rms_norm(x, weight, None), alone * weight)


@half
@given(seed=seeds)
def test_products_are_rounded_once_each(dtype, seed):
    rng = np.random.default_rng(seed)
    _, tensors, weights = layer(seed, dtype)
    x, same = rounded(rng.normal(size=(1, 12, 32)), dtype)
    found = fast.linear(x, tensors["gate_proj"])
    assert_rounded(found, spec.linear(same, weights["gate_proj"]), "linear", dtype)
    assert_rounded(fast.swiglu(x, tensors), spec.swiglu(same, weights), "swiglu", dtype)
    for memory in ("global_memory", "temporary_memory"):
        found = fast.adapter(x, tensors[memory])
        assert_rounded(found, spec.adapter(same, weights[memory]), "adapter", dtype)


@half
@given(seed=seeds, start=st.integers(257, 5000))
def test_a_rotation_is_rounded_once(dtype, seed, start):
    """Its table is not: rounding that too would err by a quarter more, over many slots."""
    rng = np.random.default_rng(seed)
    table, same_table = rotation(start + np.arange(SLOTS), small_config(seed).backbone)
    x, same = rounded(rng.normal(size=(1, 4, SLOTS, 8)), dtype)
    found = fast.rotate(x, table)
    assert_rounded(found[0], spec.rotate(same[0], same_table), "rotate", dtype)


@half
@given(seed=seeds)
def test_attention_over_a_long_row_sums_in_float32(dtype, seed):
    rng = np.random.default_rng(seed)
    q, same_q = rounded(rng.normal(size=(1, 4, NEW, 8)), dtype)
    k, same_k = rounded(rng.normal(size=(1, 2, SLOTS, 8)), dtype)
    v, same_v = rounded(rng.normal(size=(1, 2, SLOTS, 8)), dtype)
    at = np.arange(SLOTS - NEW, SLOTS)
    found = fast.attention(q, k, v, places(at))
    expected = spec.attention(same_q[0], same_k[0], same_v[0], at)
    assert_rounded(found[0], expected, "attention", dtype)


@half
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0]))
def test_the_global_memory_errs_by_roundings(dtype, seed, scale):
    """What it proposes is normed with float32's epsilon, the dtype's own being too coarse."""
    rng = np.random.default_rng(seed)
    config, tensors, weights = layer(seed, dtype)
    tensors, weights = tensors["global_memory"], weights["global_memory"]
    memory, wide = config.memory, widened(config).memory
    s, same_s = rounded(rng.normal(size=(1, 12, 32)), dtype)
    r, same_r = rounded(rng.normal(0, scale, (1, 12, 32)), dtype)
    found = fast_global.gate(r, s, tensors, memory.gate_saturation)
    expected = global_memory.gate(same_r[0], same_s[0], weights, memory.gate_saturation)
    assert_rounded(found[0], expected, "gate", dtype)
    found = fast_global.update_global(None, r, tensors, memory)
    expected = global_memory.update_global(None, same_r[0], weights, wide)
    assert_rounded(found[0], expected, "rms_norm", dtype)
    found = fast_global.update_global(s, r, tensors, memory)
    expected = global_memory.update_global(same_s[0], same_r[0], weights, wide)
    assert_rounded(found[0], expected, "update_global", dtype)


@half
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0]))
def test_queue_entries_err_by_roundings_and_older_ones_stay(dtype, seed, scale):
    rng = np.random.default_rng(seed)
    config, tensors, weights = layer(seed, dtype)
    tensors, weights = tensors["temporary_memory"], weights["temporary_memory"]
    queue, same_queue = rounded(rng.normal(size=(1, 20, 32)), dtype)
    c, same = rounded(rng.normal(0, scale, (1, 12, 32)), dtype)
    found = fast_temporary.update_temporary(queue, c, tensors, config.memory)
    expected = temporary_memory.update_temporary(same_queue[0], same[0], weights, config.memory)
    assert torch.equal(found[:, :8], queue[:, 12:])
    assert_rounded(found[0, 8:], expected[8:], "queue_entries", dtype)


@half
@given(seed=seeds)
def test_a_decoder_layer_at_the_end_of_a_long_row_errs_by_roundings(dtype, seed):
    rng = np.random.default_rng(seed)
    config, tensors, weights = layer(seed, dtype)
    backbone, past = config.backbone, SLOTS - NEW
    x, same = rounded(rng.normal(size=(1, NEW, 32)), dtype)
    k, same_k = rounded(rng.normal(size=(1, 2, past, 8)), dtype)
    v, same_v = rounded(rng.normal(size=(1, 2, past, 8)), dtype)
    at = np.arange(past, SLOTS)
    table, same_table = rotation(at, backbone)
    found = fast.decoder_layer(x, k, v, places(at), table, tensors, backbone)
    expected = spec.decoder_layer(same[0], same_k[0], same_v[0], at, same_table, weights, backbone)
    assert torch.equal(found[1][:, :, :past], k)
    assert torch.equal(found[2][:, :, :past], v)
    assert_rounded(found[0][0], expected[0], "decoder_layer", dtype)
    for f, e in zip(found[1:], expected[1:], strict=True):
        assert_rounded(f[0, :, past:], e[:, past:], "keys_values", dtype)


@half
def test_heads_are_turned_by_tables_of_float32(monkeypatch, make_config, dtype):
    """A chunk of hundreds of slots: the heads get the reference's angles, whatever the dtype."""
    memory = {"chunk_size": 400, "global_memory_size": 0, "compression_stride": 0}
    config, tables, rotate = make_config(memory=memory), [], fast.rotate
    monkeypatch.setattr(fast, "rotate", lambda x, table: tables.append(table) or rotate(x, table))
    random_model(config, 0).to(dtype)(tensor(np.zeros((1, 400), np.int64)))
    table = spec.rotary_table(np.arange(400), config.backbone)
    expected = fast.for_heads(tuple(map(torch.from_numpy, table)))
    assert len(tables) == 2 * config.backbone.num_hidden_layers  # queries and keys
    for table in tables:
        for name, f, e in zip(("cos", "sin"), table, expected, strict=True):
            assert f.dtype == torch.float32
            assert_near(f.reshape(e.shape), e.numpy(), name, EPSILON / 2)


def logits_of(model, ids, roundings):
    """Logits of a model in a half type; the reference's; and the reference's after roundings of the
    weights to that type, one each. The model becomes float64."""
    found, epsilon = model(tensor([ids])).logits[0], torch.finfo(model.dtype).eps
    params, config = arrays_of(model.double()), widened(model.config)
    moved = [nudged(params, seed, epsilon) for seed in range(roundings)]
    expected, *others = (
        forward(ids, stream.new_state(config), weights, config)[0] for weights in (params, *moved)
    )
    return found.double(), expected, others


@half
@given(case=cases())
def test_half_types_err_as_a_rounding_of_the_weights_does(dtype, case):
    """Over a whole text, memories and all; every dtype keeps its own."""
    config, seed, ids = case
    model = even_model(config, seed).to(dtype)
    out = model(tensor([ids]), labels=tensor([ids]))
    assert out.logits.dtype == dtype
    assert out.loss.dtype == torch.float32
    assert all(t.dtype == dtype for t in (*out.state.keys, *out.state.global_state))
    found, expected, others = logits_of(model, ids, roundings=3)
    for error in (relative_error, typical_error):
        own = max(error(other, expected) for other in others)
        limit = HALF_YARDSTICK * (own + 8 * torch.finfo(dtype).eps)
        assert_at_most(error(found, expected), limit, error.__name__, out.logits)


def long_case(seed):
    """A random model, and a text of two chunks and a bit in rows of hundreds of slots."""
    rng = np.random.default_rng(seed)

    def one_of(*options):
        return options[rng.integers(len(options))]

    heads = one_of(1, 2)
    backbone = BackboneConfig(
        vocab_size=VOCAB,
        hidden_size=one_of(8, 16),
        intermediate_size=24,
        num_hidden_layers=one_of(1, 2, 3),
        num_attention_heads=heads * one_of(1, 2),
        num_key_value_heads=heads,
        head_dim=one_of(4, 8),
        rope_theta=one_of(100.0, 10000.0),
        qk_norm=one_of(True, False),
        attention_bias=one_of(True, False),
        tie_word_embeddings=one_of(True, False),
    )
    memory = MemoryConfig(
        chunk_size=one_of(257, 280),
        global_memory_size=one_of(0, 3, 64),
        temporary_memory_size=one_of(40, 150),
        compression_stride=one_of(0, 5, 8),
        gate=one_of("scalar", "vector"),
        gate_bias=one_of(True, False),
        gate_saturation=one_of(1.0, 0.5),
        adapter_rank=one_of(1, 2),
    )
    config = CoMeTConfig(backbone, memory)
    ids = rng.integers(0, VOCAB, 2 * memory.chunk_size + one_of(1, 20, 60)).tolist()
    return even_model(config, seed), ids


@half
def test_long_rows_err_by_half_of_what_a_rounding_of_the_weights_does(dtype):
    """Every case has its limit, and so has their median: not all may come near it."""
    shares, like = [], tensor([0.0], dtype)
    for seed in range(16):
        model, ids = long_case(seed)
        found, expected, (other,) = logits_of(model.to(dtype), ids, roundings=1)
        shares.append(typical_error(found, expected) / typical_error(other, expected))
    assert_at_most(max(shares), HALF_SHARE, "largest share", like)
    assert_at_most(np.median(shares), HALF_MEDIAN, "median share", like)


def test_the_published_memory_setting():
    """512 global slots, a full queue of 2048, chunks of 2048 with a compression token every 8: over
    two chunks and a bit, float64 is the reference, and half types err by roundings."""
    backbone = BackboneConfig(VOCAB, 16, 24, 2, 1, 1, 8, qk_norm=True)
    config = CoMeTConfig(backbone, MemoryConfig(2048, 512, 2048, 8))
    wide, rng = widened(config), np.random.default_rng(0)

    def both(x):
        """Numbers of either half type, so that one run of the reference serves all."""
        return torch.from_numpy(x).bfloat16().half().double().numpy()

    params = map_parameters(lambda _, p: both(p), even_weights(config, 0))
    memories = [
        tuple(both(rng.normal(size=(slots, 16))) for _ in range(2)) for slots in (512, 2048)
    ]
    ids = rng.integers(0, VOCAB, 2 * 2048 + 9).tolist()
    read = {"tokens": 8 * 2048, "chunks": 8}
    state = dataclasses.replace(
        stream.new_state(wide), global_state=memories[0], temporary_memory=memories[1], **read
    )
    expected, state = forward(ids, state, params, wide)
    for dtype in (torch.float64, *HALF_TYPES):
        own = wide if dtype == torch.float64 else config
        model = CoMeTModel(own, tensors(params, dtype))
        kept, queue = (tuple(tensor(x)[None].to(dtype) for x in m) for m in memories)
        start = dataclasses.replace(
            model.new_state(),
            global_state=kept,
            temporary_memory=queue,
            queue_length=np.array([2048]),
            **{name: np.array([number]) for name, number in read.items()},
        )
        with torch.no_grad():
            out = model(tensor([ids]), state=start)
        if dtype == torch.float64:
            assert_logits(out.logits[0], expected, config, "float64")
            assert_same_stream(out.state, 0, state, config)
        else:
            assert_rounded(out.logits[0], expected, "published_text", dtype)


@given(case=cases())
def test_under_autocast_a_stream_errs_as_a_rounding_of_the_weights_does(case):
    """Float32 weights, products in bfloat16: a text in two calls beside a short one, trained on and
    decoded from. The state keeps float32."""
    config, seed, ids = case
    model = even_model(config, seed).float()
    short, eps = -(-len(ids) // 2), torch.finfo(torch.bfloat16).eps
    batch, lengths = tensor([ids, ids]), [len(ids), short]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        first = model(batch, labels=batch, lengths=lengths)
        second = model(batch, state=first.state, lengths=lengths)
        model.generate(batch, second.state, 3)
    for state in (first.state, second.state, model.close_chunk(second.state)):
        tensors = (*state.keys, *state.values, *state.global_state, *state.temporary_memory)
        assert {t.dtype for t in tensors} == {torch.float32}
    assert first.loss.dtype == torch.float32
    second.logits.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    params, wide = arrays_of(model.double()), widened(config)
    for i, length in enumerate(lengths):
        found = torch.cat([out.logits[i, :length] for out in (first, second)])
        text = ids[:length] * 2
        expected, *others = (
            forward(text, stream.new_state(wide), weights, wide)[0]
            for weights in (params, *(nudged(params, jitter, eps) for jitter in range(3)))
        )
        for error in (relative_error, typical_error):
            own = max(error(other, expected) for other in others)
            limit = HALF_YARDSTICK * (own + 8 * eps)
            what = f"sequence {i}, {error.__name__}"
            assert_at_most(error(found.double(), expected), limit, what, found)
