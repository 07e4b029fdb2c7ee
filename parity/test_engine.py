"""The engine on arrays: the twins' equations and the stream's laws, in the homes of `homes.py`."""

import inspect
import sys
from types import SimpleNamespace
from unittest.mock import patch

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast import BackboneConfig, CoMeTConfig, CoMeTModel, CoMeTState, MemoryConfig
from fast.arrays import FLOATS, HALF_TYPES, dtype_name
from fast.cupy_engine import CoMeTEngine, kernels, operations
from fast.cupy_engine import global_memory as engine_global
from fast.cupy_engine import layers as engine_layers
from fast.cupy_engine import stream as engine_stream
from fast.cupy_engine import temporary_memory as engine_temporary
from fast.cupy_engine.sampling import sample
from fast.parameters import to_tensors
from reference import global_memory, layers, stream, temporary_memory
from reference import model as spec
from reference.config import GATES
from reference.parameters import map_parameters

from .assertions import (
    HALF_YARDSTICK,
    TOLERANCE,
    YARDSTICK,
    array,
    assert_at_most,
    assert_logits,
    assert_near,
    assert_same_stream,
    assert_state_equal,
    largest_error,
    relative_error,
    typical_error,
)
from .homes import KERNELS, NO_FLOAT64, NUMPY, STRICT
from .strategies import (
    VOCAB,
    backbones,
    cases,
    even_weights,
    nudged,
    pieces,
    random_weights,
    seeds,
    splits,
    widened,
)
from .test_batches import batches, padded, texts

pytestmark = pytest.mark.host

homes = pytest.mark.engine(NUMPY, STRICT)
TEXT = torch.tensor([[1, 2, 3]])
fewer = settings(max_examples=max(1, settings.default.max_examples // 2))
"""The laws have been tried on PyTorch too; here each is tried on two homes."""


def normal(rng, *shape):
    return rng.normal(0.0, 1.5, shape)


@homes
@fewer
@given(backbone=backbones(), seed=seeds, past=st.integers(0, 4), n=st.integers(1, 4))
def test_layers(home, backbone, seed, past, n):
    """Each equation of a decoder layer, and the whole."""
    rng, b, d = np.random.default_rng(seed), 2, backbone.hidden_size
    config = CoMeTConfig(backbone, MemoryConfig(4, 1, 1, 1, adapter_rank=2))
    w = random_weights(config, seed)["layers"][0]
    own, x = home.tree(w), normal(rng, b, n, d)
    hidden, at = home.array(x), np.arange(past, past + n)
    for eps in (None, 1e-3):
        found = engine_layers.rms_norm(hidden, own["input_layernorm"], eps)
        assert_near(found, layers.rms_norm(x, w["input_layernorm"], eps), "rms_norm")
    found = engine_layers.adapter(hidden, own["global_memory"])
    assert_near(found, layers.adapter(x, w["global_memory"]), "adapter")
    assert_near(engine_layers.swiglu(hidden, own), layers.swiglu(x, w), "swiglu")
    table = engine_layers.rotary_table(at[None], backbone, hidden)
    expected = layers.rotary_table(at, backbone)
    for name, f, e in zip(("cos", "sin"), table, expected, strict=True):
        assert_near(f[0, ...], e, name)
    shape = (b, backbone.num_key_value_heads, past, backbone.head_dim)
    keys, values = normal(rng, *shape), normal(rng, *shape)
    positions = home.array(at[None])
    found = engine_layers.decoder_layer(
        hidden, home.array(keys), home.array(values), positions, table, own, backbone
    )
    memory = engine_layers.project_memory(hidden, table, own, backbone)
    for i in range(b):
        whole = layers.decoder_layer(x[i], keys[i], values[i], at, expected, w, backbone)
        for name, f, e in zip(("hidden", "keys", "values"), found, whole, strict=True):
            assert_near(f[i, ...], e, f"decoder_layer, {name}")
        for name, f, e in zip(("keys", "values"), memory, whole[1:], strict=True):
            assert_near(f[i, ...], e[:, past:], f"project_memory, {name}")


@homes
@fewer
@given(
    seed=seeds,
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    past=st.integers(0, 5),
    n=st.integers(1, 5),
)
def test_attention_over_ragged_rows(home, seed, heads, past, n):
    """Each row of a length of its own: keys are put after it, and what lies beyond is not seen."""
    rng, b, e, (h, k) = np.random.default_rng(seed), 3, 4, heads
    lengths = rng.integers(0, past + 1, b)
    q, new, old = normal(rng, b, h, n, e), normal(rng, b, k, n, e), normal(rng, b, k, past, e)
    positions = home.array(lengths[:, None] + np.arange(n))
    keys = engine_layers.append_slots(home.array(old), home.array(new), positions)
    found = engine_layers.attention(home.array(q), keys, keys, positions)
    for i, length in enumerate(lengths):
        row = np.concatenate([old[i, :, :length], new[i]], axis=1)
        expected = layers.attention(q[i], row, row, length + np.arange(n))
        assert_near(found[i, ...], expected, "attention")


@homes
@fewer
@given(
    seed=seeds,
    kind=st.sampled_from(GATES),
    bias=st.booleans(),
    saturation=st.sampled_from([1.0, 0.95, 0.3]),
    first=st.booleans(),
    sink=st.booleans(),
)
def test_global_memory(home, seed, kind, bias, saturation, first, sink):
    rng, d, m = np.random.default_rng(seed), 4, 3
    config = MemoryConfig(
        4, m, 1, 0, gate=kind, gate_bias=bias, gate_saturation=saturation, sink_slot=sink
    )
    backbone = BackboneConfig(VOCAB, d, 3, 1, 1, 1, 2)
    w = random_weights(CoMeTConfig(backbone, config), seed)["layers"][0]["global_memory"]
    readout, state = normal(rng, 2, m, d), normal(rng, 2, m, d)
    own, old = home.tree(w), None if first else home.array(state)
    ones, some = home.array(np.ones((2, 1), np.int64)), home.array(np.array([[0], [1]]))
    found, read = engine_global.update_global(old, home.array(readout), own, config)
    closed, _ = engine_global.update_global(home.array(state), found, own, config, ones, some)
    for i in range(2):
        before = None if first else state[i]
        expected = global_memory.update_global(before, readout[i], w, config)
        assert_near(found[i, ...], expected, "S")
        assert_near(read[i, ...], global_memory.read_global(expected, w), "G")
        new = global_memory.update_global(state[i], expected, w, config) if i else state[i]
        assert_near(closed[i, ...], new, "S where one chunk closes")


@homes
@fewer
@given(seed=seeds, size=st.integers(1, 6), old=st.integers(0, 6), new=st.integers(0, 9))
def test_temporary_memory_of_a_ragged_batch(home, seed, size, old, new):
    rng, d, b, old = np.random.default_rng(seed), 4, 3, min(old, size)
    config = MemoryConfig(4, 0, size, 2, adapter_rank=2)
    backbone = BackboneConfig(VOCAB, d, 3, 1, 1, 1, 2)
    w = random_weights(CoMeTConfig(backbone, config), seed)["layers"][0]["temporary_memory"]
    olds, news = rng.integers(0, old + 1, b), rng.integers(0, new + 1, b)
    queue, compression = normal(rng, b, old, d), normal(rng, b, new, d)
    args = home.array(queue), home.array(compression), home.tree(w), config
    counts = home.array(olds[:, None]), home.array(news[:, None])
    ragged = engine_temporary.update_temporary(*args, counts)
    full = engine_temporary.update_temporary(*args)
    for i in range(b):
        parts = queue[i, : olds[i]], compression[i, : news[i]]
        expected = temporary_memory.update_temporary(*parts, w, config)
        assert_near(ragged[i, : len(expected), :], expected, "T of a ragged batch")
        expected = temporary_memory.update_temporary(queue[i], compression[i], w, config)
        assert_near(full[i, ...], expected, "T")


@homes
@fewer
@given(case=cases(), data=st.data())
def test_every_call_leaves_the_reference_s_state(home, case, data):
    """Split anywhere, closed by hand now and then, asked for all, the last or no logits."""
    config, seed, ids = case
    params = random_weights(config, seed)
    engine = home.engine(config, params)
    state, expected, start = None, stream.new_state(config), 0
    for number, piece in enumerate(pieces(ids, data.draw(splits(len(ids))))):
        asked = data.draw(st.sampled_from(["all", "last", "none"]))
        out = engine(home.array([piece]), state=state, logits=asked)
        logits, expected = spec.forward(piece, expected, params, config)
        state, start = out.state, start + len(piece)
        first = {"all": 0, "last": len(piece) - 1}.get(asked)
        if first is None:
            assert out.logits is None
        else:
            assert_logits(out.logits[0, ...], logits[first:], config, f"{asked} logits")
        assert_same_stream(state, 0, expected, config, f"after call {number}")
        if data.draw(st.integers(0, 5)) == 0:
            state = engine.close_chunk(state)
            expected = stream.close_chunk(expected, params, config)
            assert_same_stream(state, 0, expected, config, f"closed after call {number}")


@homes
@fewer
@given(case=cases())
def test_open_chunk(home, case):
    config, seed, ids = case
    params = random_weights(config, seed)
    engine = home.engine(config, params)
    state = engine.close_chunk(engine(home.array([ids]), logits="none").state)
    _, expected = stream.read(ids, stream.new_state(config), params, config)
    expected = stream.open_chunk(stream.close_chunk(expected, params, config), params, config)
    opened = engine_stream.open_chunk(state, engine.weights, config)
    assert_same_stream(opened, 0, expected, config, "opened")


@homes
@fewer
@given(case=cases(), data=st.data())
def test_chunks_by_hand(home, case, data):
    config, seed, ids = case
    params, sizes = random_weights(config, seed), data.draw(splits(len(ids)))
    out = home.engine(config, params)(home.array([ids]), chunk_sizes=sizes)
    expected, state = spec.forward(ids, stream.new_state(config), params, config, chunk_sizes=sizes)
    assert_near(out.logits[0, ...], expected, f"chunks {sizes}")
    assert_same_stream(out.state, 0, state, config)


@homes
@fewer
@given(batch=batches(), fill=st.sampled_from([0, VOCAB - 1, -7, 10**6]), closes=st.booleans())
def test_a_ragged_batch_is_each_sequence_alone(home, batch, fill, closes):
    """Twice in a row, with lengths of its own each time, closed by hand or not; then selected and
    forked. Random weights blow a rounding up from chunk to chunk: what one does to the reference is
    the yardstick beside the tolerance."""
    config, seed, lengths = batch
    params = random_weights(config, seed)
    engine, state = home.engine(config, params), None
    alone = [stream.new_state(config) for _ in lengths]
    rounded = [nudged(params, i, np.finfo(np.float64).eps) for i in range(2)]
    moved = [[stream.new_state(config) for _ in lengths] for _ in rounded]

    def limit(i, expected=(), others=()):
        def memories(one):
            return (*one.global_state, *one.temporary_memory)

        pairs = [(other, expected) for other in others]
        for states in moved:
            pairs += zip(memories(states[i]), memories(alone[i]), strict=True)
        own = max((largest_error(a, b) for a, b in pairs), default=0.0)
        return max(TOLERANCE, YARDSTICK * own)

    for call in range(2):
        rows = texts(lengths if call == 0 else lengths[::-1], [seed, call])
        ids, sizes = home.array(padded(rows, fill, extra=call).numpy()), list(map(len, rows))
        last = engine(ids, lengths=sizes, state=state, logits="last").logits
        out = engine(ids, lengths=sizes, state=state)
        state = out.state
        for i, row in enumerate(rows):
            expected, alone[i] = spec.forward(row, alone[i], params, config)
            others = []
            for weights, states in zip(rounded, moved, strict=True):
                other, states[i] = spec.forward(row, states[i], weights, config)
                others.append(other)
            what, near = f"call {call}, sequence {i}", limit(i, expected, others)
            logits = array(out.logits)[i]
            assert_logits(logits[: len(row)], expected, config, what, near)
            assert (logits[len(row) :] == 0).all(), "padding has no logits"
            assert_near(array(last)[i, 0], expected[-1], f"{what}, last", near)
            assert_same_stream(state, i, alone[i], config, what, near)
        if closes:
            state = engine.close_chunk(state)
            alone = [stream.close_chunk(one, params, config) for one in alone]
            for weights, states in zip(rounded, moved, strict=True):
                states[:] = [stream.close_chunk(one, weights, config) for one in states]
            for i, one in enumerate(alone):
                what = f"closed after call {call}"
                assert_same_stream(state, i, one, config, what, limit(i))
    order = [len(lengths) - 1, 0]
    for i, source in enumerate(order):
        what = "selected"
        assert_same_stream(state.select(order), i, alone[source], config, what, limit(source))
    for i in range(2 * len(lengths)):
        assert_same_stream(state.fork(2), i, alone[i // 2], config, "forked", limit(i // 2))


@homes
@fewer
@given(case=cases(), new_tokens=st.integers(0, 9), roll=st.booleans(), seed=seeds)
def test_decoding_is_the_reference_s(home, case, new_tokens, roll, seed):
    """Ragged prompts side by side, each ending at its own stop token."""
    config, weights, ids = case
    params, rng = random_weights(config, weights), np.random.default_rng(seed)
    rows = [ids, ids[: 1 + len(ids) // 2], rng.integers(0, VOCAB, 3).tolist()]
    stops = {int(rng.integers(VOCAB))}
    out = home.engine(config, params).generate(
        home.array(padded(rows, 0).numpy()),
        max_new_tokens=new_tokens,
        stop_ids=stops,
        roll=roll,
        lengths=list(map(len, rows)),
    )
    for i, row in enumerate(rows):
        new, state = spec.generate(
            row, stream.new_state(config), params, config, new_tokens, stops, roll
        )
        assert out.ids[i] == new
        assert_same_stream(out.state, i, state, config, f"sequence {i}")


@homes
@fewer
@given(case=cases(), seed=seeds, data=st.data())
def test_no_future_token_influences_a_past_logit(home, case, seed, data):
    config, weights, ids = case
    engine = home.engine(config, random_weights(config, weights))
    cut = data.draw(st.integers(1, len(ids)))
    other = np.random.default_rng(seed).integers(0, VOCAB, len(ids) - cut).tolist()
    a = array(engine(home.array([ids])).logits)[0, :cut]
    b = array(engine(home.array([ids[:cut] + other])).logits)[0, :cut]
    assert_near(a, b, "past logits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@homes
@fewer
@given(case=cases())
def test_states_go_from_one_path_to_the_other(home, folder, case):
    """What the model saved the engine loads, and the other way round; both then say the same."""
    config, seed, ids = case
    params = random_weights(config, seed)
    engine, model = (
        home.engine(config, params),
        CoMeTModel(config, to_tensors(params, torch.float64)),
    )
    text, path = torch.tensor([ids]), folder / "state"
    with torch.no_grad():
        of_model = model(text, logits="none").state
        of_engine = engine(home.array([ids]), logits="none").state
        expected = model.generate(text, of_model, 5)
        of_model.save(path, model)
        found = engine.generate(home.array([ids]), CoMeTState.load(path, engine), 5)
        assert found.ids == expected.ids
        of_engine.save(path, engine)
        loaded = CoMeTState.load(path, engine)
        assert_near(loaded.num_bytes, of_engine.num_bytes, "bytes")
        for name in ("global_state", "temporary_memory", "keys", "values"):
            for a, b in zip(getattr(loaded, name), getattr(of_engine, name), strict=True):
                assert np.array_equal(array(a), array(b)), f"{name} changed in its file"
        assert model.generate(text, CoMeTState.load(path, model), 5).ids == expected.ids
    assert_state_equal(CoMeTState.load(path, model), of_engine.to(model), "read or converted")


@pytest.mark.engine(NUMPY)
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_have_one_digest_on_both_paths(home, tmp_path, make_config, dtype):
    """A state goes across in every dtype, and not to weights of another dtype."""
    config = make_config()
    model = CoMeTModel(config, to_tensors(random_weights(config, 0), getattr(torch, dtype)))
    model.save_pretrained(tmp_path)
    engine = CoMeTEngine.from_pretrained(tmp_path, library=home.xp)
    path = tmp_path / "state"
    model(torch.tensor([[1, 2, 3, 4, 5]])).state.save(path, model)
    state = CoMeTState.load(path, engine)
    state.save(path, engine)
    assert_state_equal(CoMeTState.load(path, model), state.to(model), "back again")
    narrow = CoMeTEngine.from_pretrained(tmp_path, "float16", library=home.xp)
    if dtype == "float16":
        CoMeTState.load(path, narrow)
    else:
        with pytest.raises(ValueError, match="or with the same in another dtype"):
            CoMeTState.load(path, narrow)


@pytest.mark.engine(NUMPY, NO_FLOAT64, KERNELS)
@fewer
@given(case=cases(), data=st.data())
def test_float32_is_as_exact_as_the_reference_in_float32(home, case, data):
    """A text in two calls, beside one that is half as long; on a device that has no float64,
    nothing asks for one."""
    config, seed, ids = case
    weights = map_parameters(lambda _, p: p.astype(np.float32), random_weights(config, seed))
    params = map_parameters(lambda _, p: p.astype(np.float64), weights)
    cut = data.draw(st.integers(1, len(ids)))
    texts = [[ids[:cut], ids[: -(-cut // 2)]]]
    if cut < len(ids):
        texts.append([ids[cut:], ids[: -(-(len(ids) - cut) // 2)]])
    engine, state, found = home.engine(config, weights), None, []
    for rows in texts:
        with home.at_work():
            lengths = list(map(len, rows))
            out = engine(home.array(padded(rows, 0).numpy()), state=state, lengths=lengths)
        state = out.state
        assert dtype_name(out.logits) == dtype_name(state.keys[0]) == "float32"
        found.append([array(out.logits)[i, :length] for i, length in enumerate(lengths)])
    for i in range(2):
        text = [token for rows in texts for token in rows[i]]
        truth, _ = spec.forward(text, stream.new_state(config), params, widened(config))
        own, epsilon = 0.0, float(np.finfo(np.float32).eps)
        for jitter in range(4):  # how far one rounding of the weights moves float32
            moved = nudged(params, jitter, epsilon * (jitter > 0))
            moved = map_parameters(lambda _, p: p.astype(np.float32), moved)
            logits, _ = spec.forward(text, stream.new_state(config, np.float32), moved, config)
            own = max(own, largest_error(logits, truth))
        limit = YARDSTICK * (own + 8 * epsilon)
        logits = np.concatenate([rows[i] for rows in found])
        assert_at_most(largest_error(logits, truth), limit, f"float32, sequence {i}")


@given(
    seed=seeds,
    top_k=st.sampled_from([None, 1, 3]),
    top_p=st.sampled_from([None, 0.5, 0.9]),
    shift=st.sampled_from([0.0, 1000.0, -1000.0]),
)
def test_sampling_draws_each_token_as_often_as_its_chance(seed, top_k, top_p, shift):
    """Evenly spaced draws in place of random ones: the counts are the chances, which do not depend
    on a number that is added to all logits."""
    rng, draws = np.random.default_rng(seed), 4000
    logits, temperature = normal(rng, 1, 7), 0.7
    chances = np.exp(logits[0] / temperature) / np.exp(logits[0] / temperature).sum()
    order = np.argsort(-chances)
    kept = np.zeros(7, dtype=bool)
    for rank, token in enumerate(order):
        reached = chances[order[:rank]].sum() >= (top_p or 1.0) * chances[order[:top_k]].sum()
        kept[token] = (top_k is None or rank < top_k) and not (top_p and reached)
    expected = np.where(kept, chances, 0) / chances[kept].sum()

    class Even:
        def random(self, n):
            return (np.arange(n) + 0.5) / n

    tokens = sample(np.repeat(logits + shift, draws, axis=0), temperature, top_k, top_p, Even())
    counts = np.bincount(tokens, minlength=7) / draws
    assert_at_most(np.abs(counts - expected).max(), 1 / draws, "share of draws")


@given(case=cases())
def test_an_engine_shares_the_weights_of_its_model(case):
    config, seed, ids = case
    model = CoMeTModel(config, to_tensors(random_weights(config, seed), torch.float64))
    engine = CoMeTEngine.from_model(model, library="numpy")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        expected = model(torch.tensor([ids])).logits
    assert_near(engine(np.array([ids])).logits, array(expected), "the model's changed weights")
    with pytest.raises(ValueError, match="the model is torch.bfloat16 on cpu, which"):
        CoMeTEngine.from_model(model.bfloat16(), library="numpy")


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.engine(NUMPY, KERNELS)
@fewer
@given(case=cases())
def test_half_types_err_as_a_rounding_of_the_weights_does(home, dtype, case):
    """Over a whole text, memories and all."""
    config, seed, ids = case
    weights = map_parameters(lambda _, p: p.astype(dtype), even_weights(config, seed))
    params = map_parameters(lambda _, p: p.astype(np.float64), weights)
    with home.at_work():
        out = home.engine(config, weights)(home.array([ids]))
    kept = (*out.state.global_state, *out.state.temporary_memory, *out.state.keys)
    assert {dtype_name(x) for x in (out.logits, *kept)} == {dtype}
    epsilon, wide = float(ml_dtypes.finfo(dtype).eps), widened(config)
    moved = [params, *(nudged(params, jitter, epsilon) for jitter in range(3))]
    expected, *others = (spec.forward(ids, stream.new_state(wide), p, wide)[0] for p in moved)
    for error in (relative_error, typical_error):
        own = max(error(other, expected) for other in others)
        limit = HALF_YARDSTICK * (own + 8 * epsilon)
        assert_at_most(error(array(out.logits)[0], expected), limit, error.__name__)


def launches(run):
    """The kernels that are launched meanwhile, and what is returned."""
    names = set()
    with KERNELS.at_work():
        emulator = kernels.run
        with patch.object(kernels, "run", lambda *a: names.add(a[0]) or emulator(*a)):
            run()
    return {name.partition("<")[0] for name in names}


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_one_dictionary_says_which_kernels_run(make_config, gate):
    config = make_config(memory={"gate": gate})
    params, ids = random_weights(config, 0), np.arange(9)[None]
    single, double = (NUMPY.engine(config, params, dtype) for dtype in ("float32", "float64"))
    update = {"update_global"} if gate == "scalar" else {"blend_global"}
    every = {"attention", "rms_norm", "rotate", "silu_product"} | update
    assert launches(lambda: single(ids)) == every
    assert launches(lambda: double(ids)) == set()
    gone = {name: {name} for name in operations.KERNELS} | {"update_global": update}
    if gate == "vector":
        gone["rms_norm"] = set()  # which `update_global` launches there
    for name in gone:
        with patch.dict(operations.KERNELS):
            del operations.KERNELS[name]
            assert launches(lambda: single(ids)) == every - gone[name]


@pytest.mark.parametrize("name", operations.KERNELS)
def test_both_forms_of_an_operation_take_the_same(name):
    module = engine_global if name == "update_global" else engine_layers
    forms = inspect.signature(getattr(module, name)), inspect.signature(operations.KERNELS[name])
    assert list(forms[0].parameters) == list(forms[1].parameters)


def test_what_float16_cannot_hold_is_refused(make_config, tmp_path):
    config = make_config()
    params = random_weights(config, 0)
    params["norm"] = params["norm"] * 1e6
    CoMeTModel(config, to_tensors(params, torch.float64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="norm holds .* more than float16 can"):
        CoMeTEngine.from_pretrained(tmp_path, dtype="float16", library="numpy")
    params["norm"] = np.full_like(params["norm"], 65504)  # the largest that it can
    CoMeTModel(config, to_tensors(params, torch.float64)).save_pretrained(tmp_path)
    engine = CoMeTEngine.from_pretrained(tmp_path, dtype="float16", library="numpy")
    assert (engine.weights["norm"] == 65504).all()


def test_it_reads_the_shipped_checkpoint():
    from fast.tasks import passkey

    engine, model = passkey.load_model(engine="numpy"), passkey.load_model()
    ids = np.random.default_rng(0).integers(0, 256, (1, 300))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits
    assert_near(engine(ids).logits, array(expected), "shipped model", 2e-5)


def test_the_shipped_model_finds_its_key_on_numpy():
    from fast.tasks import passkey

    example = passkey.Example(5000, 0.4, seed=3)
    assert passkey.found(passkey.load_model(engine="numpy"), [example]) == [True]


def test_bad_input_says_what_is_wrong(make_config, tmp_path):
    config = make_config()
    params = random_weights(config, 0)
    engine, strict = NUMPY.engine(config, params), STRICT.engine(config, params)
    ids, model = np.array([[1, 2, 3]]), CoMeTModel(config, to_tensors(params, torch.float64))
    state = engine(ids).state
    mixed = STRICT.tree(params) | {"norm": params["norm"]}
    elsewhere = STRICT.tree(params)
    elsewhere["norm"] = array_api_strict.asarray(params["norm"])
    for call, match in (
        (lambda: engine([[1, 2]]), r"ids is a list; expected an array, e.g. numpy.asarray\(ids\)"),
        (lambda: engine(torch.tensor([[1]])), "ids is a torch.Tensor; expected an array"),
        (lambda: strict(ids), "ids is a numpy.ndarray; expected an array"),
        (lambda: engine(ids.astype(float)), "ids has dtype float64; expected integers"),
        (lambda: engine(ids + 9), r"ids range from 10 to 12; expected \[0, 11\)"),
        (lambda: engine(ids, lengths=[4]), "expected 1 to 3 tokens"),
        (lambda: engine(ids, logits="some"), "logits is 'some'"),
        (lambda: engine(ids, chunk_sizes=[1]), "1 tokens; expected sizes that add up"),
        (lambda: engine.generate(ids, temperature=-1.0), "temperature is -1.0"),
        (
            lambda: strict(STRICT.array(ids), state=state),
            r"the state is float64 .*state.to\(model\)",
        ),
        (lambda: strict(array_api_strict.asarray(ids)), "ids is on .*CPU_DEVICE.*device1"),
        (lambda: CoMeTEngine(config, mixed), "give arrays of one library"),
        (lambda: CoMeTEngine(config, elsewhere), "move all weights to one device"),
        (lambda: CoMeTEngine(config, {}), "the weight norm is a NoneType"),
        (lambda: CoMeTEngine(config, model.weights), "make an engine with CoMeTEngine.from_model"),
        (
            lambda: NUMPY.engine(config, params, "int64"),
            "the weights are int64; the engine computes",
        ),
        (lambda: engine.generate(ids, generator=torch.Generator()), "generator is a Generator"),
        (lambda: engine(ids, state=model(TEXT).state), r"the model float64 .*state.to\(model\)"),
        (lambda: CoMeTEngine.from_pretrained(tmp_path, dtype="int64"), "dtype is 'int64'"),
        (lambda: CoMeTEngine.from_pretrained(tmp_path, library="jax"), "library is 'jax'"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert strict(STRICT.array(ids), state=state.to(strict)).logits is not None
    of_model = model.bfloat16()(TEXT).state  # with a graph, in a dtype that NumPy has not
    assert engine(ids, state=of_model.to(engine)).logits is not None


def test_reading_asks_for_no_more_than_it_is_asked():
    """A round's outputs are [b, 0, d] where none are wanted, and [b, 1, d] where the text ends and
    its last one is: nothing is computed to be dropped.
    """
    config = CoMeTConfig(BackboneConfig(VOCAB, 4, 3, 1, 1, 1, 2), MemoryConfig(3, 1, 2, 2))
    engine = NUMPY.engine(config, random_weights(config, 0))
    ids = np.arange(8)[None] % VOCAB
    for outputs, widths in (("all", [3, 3, 2]), ("last", [0, 0, 1]), ("none", [0, 0, 0])):
        parts = engine_stream.read(ids, engine.new_state(), engine.weights, config, outputs=outputs)
        assert [part.hidden.shape[1] for part in parts] == widths


@given(case=cases(), closes=st.booleans())
def test_a_row_keeps_no_memory_but_its_own(case, closes):
    """A view would keep the longer row alive that it was cut from, after its chunk has closed."""
    config, seed, ids = case
    engine = NUMPY.engine(config, random_weights(config, seed))
    lengths = [len(ids), -(-len(ids) // 2)]
    state = engine(np.array([ids, ids[::-1]]), lengths=lengths, logits="none").state
    state = engine.close_chunk(state) if closes else state
    for x in (*state.keys, *state.values):
        assert x.base is None or x.base.nbytes == x.nbytes


def no_gpu():
    raise RuntimeError("cudaErrorNoDevice")


def no_compiler(*_):
    raise OSError("libnvrtc.so.12: cannot open shared object file")


def fake_cupy(built=12090, driver=12080, count=lambda: 1, ones=np.ones):
    """A module with what the engine asks CuPy before it computes; the driver is a CUDA version."""
    runtime = SimpleNamespace(
        runtimeGetVersion=lambda: built, driverGetVersion=lambda: driver, getDeviceCount=count
    )
    return SimpleNamespace(__version__="14.2.0", cuda=SimpleNamespace(runtime=runtime), ones=ones)


@pytest.mark.parametrize(
    ("cupy", "words"),
    [
        (None, r"CuPy is not installed .* pip install \"comet-memory\[cupy\]\" for CUDA 12"),
        (fake_cupy(driver=0), r"finds no NVIDIA driver \(libcuda.so.1\); install one"),
        (fake_cupy(13000, 12080), "built for CUDA 13, the driver knows CUDA 12.8 at most; install"),
        (fake_cupy(count=no_gpu), r"finds no GPU \(cudaErrorNoDevice\); check nvidia-smi and CUDA"),
        (
            fake_cupy(ones=no_compiler),
            r"cannot compute on it \(libnvrtc.* pip install \"cupy-cuda12x\[ctk\]\"",
        ),
    ],
)
def test_a_cupy_that_cannot_compute_says_what_to_do(monkeypatch, tmp_path, cupy, words):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(ImportError, match=words):
        CoMeTEngine.from_pretrained(tmp_path)


def test_a_cupy_that_does_not_load_says_what_to_do(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcuda.so.1: no such file')")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"does not load \(libcuda.so.1: .* nvidia-smi"):
        CoMeTEngine.from_pretrained(tmp_path)


def test_too_little_memory_says_what_to_do_and_loses_nothing(make_config, tmp_path):
    config, ids = make_config(), np.array([[1, 2, 3, 4, 5, 6]])
    engine = NUMPY.engine(config, random_weights(config, 0))
    state = engine(ids).state
    expected = engine(ids, state=state).logits

    def full(*_, **__):
        raise MemoryError("1 TB asked for")

    with patch("fast.cupy_engine.layers.swiglu", full):
        for call in (engine.__call__, engine.generate):
            with pytest.raises(MemoryError, match=r"for the call: read fewer .*\(1 TB asked for\)"):
                call(ids, state=state)
    assert np.array_equal(engine(ids, state=state).logits, expected)
    CoMeTModel(config, to_tensors(engine.weights, torch.float64)).save_pretrained(tmp_path)
    with (
        patch("fast.cupy_engine.engine.map_parameters", full),
        pytest.raises(MemoryError, match="for the weights: take a narrower dtype"),
    ):
        CoMeTEngine.from_pretrained(tmp_path, library="numpy")
