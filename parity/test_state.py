"""Save, load, fork and detach change nothing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fast import CoMeTConfig, CoMeTState, Recorder
from fast.cupy_engine import CoMeTEngine
from fast.state import fingerprint
from reference import stream
from reference.config import LATER

from .assertions import array, arrays_of, assert_near, assert_same_stream, assert_state_equal
from .device import tensor
from .strategies import VOCAB, cases, random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@given(case=cases(), closes=st.booleans())
def test_save_and_load_change_nothing(folder, case, closes):
    """In the middle of a chunk, and between two, where there is no row to be saved."""
    config, seed, ids = case
    model = random_model(config, seed)
    state = model(tensor([ids]), logits="none").state
    state = model.close_chunk(state) if closes else state
    path = folder / "state.safetensors"
    state.save(path)
    loaded = CoMeTState.load(path, model)
    assert_state_equal(loaded, state, "loaded")
    more = tensor([ids])
    expected = array(model(more, state=state).logits)
    assert_near(model(more, state=loaded).logits, expected, "logits after the loaded state")
    assert [p.name for p in folder.iterdir()] == ["state.safetensors"], "a temporary file was left"


@given(cases(), st.integers(1, 3))
def test_forks_go_on_alone(case, copies):
    """A fork reads on without the other knowing: one document, many questions."""
    config, seed, ids = case
    model = random_model(config, seed)
    params = arrays_of(model)
    state = model(tensor([ids]), logits="none").state
    before = state.fork()
    branches = state.fork(copies)
    rng = np.random.default_rng(seed)
    questions = rng.integers(0, VOCAB, (copies, 5)).tolist()
    after = model(tensor(questions), state=branches, logits="none").state
    _, read = stream.read(ids, stream.new_state(config), params, config)
    for i, question in enumerate(questions):
        _, expected = stream.read(question, read, params, config)
        assert_same_stream(after, i, expected, config, f"fork {i}")
    assert_state_equal(state, before, "the state forked from")
    shared = {t.data_ptr() for t in (*state.keys, *state.global_state) if t.numel()}
    assert not shared & {t.data_ptr() for t in (*before.keys, *before.global_state) if t.numel()}


@given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_a_state_tells_its_bytes(case, dtype):
    config, seed, ids = case
    model = random_model(config, seed).to(dtype)
    with torch.no_grad():
        state = model(tensor([ids, ids[::-1]]), logits="none").state
    tensors = (*state.global_state, *state.temporary_memory, *state.keys, *state.values)
    assert state.num_bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_what_a_call_returns_cannot_be_changed(make_config):
    model = random_model(make_config(), 0)
    engine, ids, recorder = (
        CoMeTEngine(model.config, arrays_of(model)),
        tensor([[1, 2]]),
        Recorder(),
    )
    returned = [model(ids, recorder=recorder), model.generate(ids, max_new_tokens=1)]
    returned += [engine(array(ids)), engine.generate(array(ids), max_new_tokens=1)]
    for value in (*returned, returned[0].state, recorder.rounds[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)


@given(cases())
def test_detach_keeps_values_and_cuts_gradients(case):
    config, seed, ids = case
    model = random_model(config, seed)
    state = model(tensor([ids]), logits="none").state
    cut = state.detach()
    assert_state_equal(cut, state, "detached")
    assert not any(t.requires_grad for t in (*cut.keys, *cut.global_state, *cut.temporary_memory))


@given(cases())
def test_forgetting_the_queue_leaves_the_global_memory(case):
    config, seed, ids = case
    model = random_model(config, seed)
    params = arrays_of(model)
    state = model.close_chunk(model(tensor([ids]), logits="none").state)
    state = state.forget_temporary()
    _, expected = stream.read(ids, stream.new_state(config), params, config)
    expected = stream.close_chunk(expected, params, config)
    empty = tuple(t[:0] for t in expected.temporary_memory)
    expected = dataclasses.replace(expected, temporary_memory=empty)
    _, expected = stream.read(ids, expected, params, config)
    after = model(tensor([ids]), state=state, logits="none").state
    assert_same_stream(after, 0, expected, config, "after forgetting")


@given(case=cases(), which=st.integers(0, 1000))
def test_a_state_of_other_weights_is_loaded_by_name_alone(folder, case, which):
    """One weight that differs in its last bit is enough; a file that does not tell is loaded."""
    config, seed, ids = case
    model, other = random_model(config, seed), random_model(config, seed)
    state = model(tensor([ids]), logits="none").state
    path = folder / "told.safetensors"
    state.save(path, model)
    assert_state_equal(CoMeTState.load(path, other), state, "loaded with equal weights")
    names = sorted(other.state_dict())
    weight = other.state_dict()[names[which % len(names)]].view(-1)
    weight[-1] = torch.nextafter(weight[-1], weight[-1] + 1)
    with pytest.raises(ValueError, match=r"read with other weights .* other_weights=True"):
        CoMeTState.load(path, other)
    assert_state_equal(CoMeTState.load(path, other, other_weights=True), state, "by name")
    state.save(path)
    assert_state_equal(CoMeTState.load(path, other), state, "of a file that does not tell")
    path.unlink()


def test_a_state_is_not_saved_as_of_another_model(tmp_path, make_config):
    state, model = state_and_model(make_config)
    other = random_model(make_config({"rope_theta": 5.0}), 1)
    with pytest.raises(ValueError, match="the state belongs to a model with config"):
        state.save(tmp_path / "state", other)
    for wrong in (model.config, "model", 3):
        with pytest.raises(ValueError, match="expected a CoMeTModel or a CoMeTEngine"):
            state.save(tmp_path / "state", wrong)
        with pytest.raises(ValueError, match="expected a CoMeTModel or a CoMeTEngine"):
            CoMeTState.load(tmp_path / "state", wrong)
    with pytest.raises(ValueError, match="other_weights is 'no'; expected True or False"):
        CoMeTState.load(tmp_path / "state", model, "no")
    assert not list(tmp_path.iterdir())


def state_and_model(make_config):
    model = random_model(make_config(), 1)
    return model(tensor([[1, 2, 3, 4, 5, 6]]), logits="none").state, model


def test_a_damaged_or_foreign_file_is_refused(tmp_path, make_config):
    state, model = state_and_model(make_config)
    path = tmp_path / "state.safetensors"
    state.save(path)
    whole = path.read_bytes()
    for cut in (0, 7, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut short"):
            CoMeTState.load(path, model)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a CoMeT state"):
        CoMeTState.load(path, model)
    with pytest.raises(FileNotFoundError):
        CoMeTState.load(tmp_path / "nothing", model)


def test_a_changed_file_is_refused(tmp_path, make_config):
    """Counts that point beyond the tensors, missing parts, other shapes."""
    state, model = state_and_model(make_config)
    path = tmp_path / "state.safetensors"
    state.save(path)
    header = {"format": "comet-state", "version": "1", "model": state.model}
    whole = load_file(path)

    def refused(changes, match):
        save_file({k: v for k, v in (whole | changes).items() if v is not None}, path, header)
        with pytest.raises(ValueError, match=match):
            CoMeTState.load(path, model)

    refused({"count.row_length": torch.tensor([99])}, "row_length")
    refused({"count.queue_length": torch.tensor([99])}, "queue_length")
    refused({"count.chunks": torch.tensor([-1])}, "chunks")
    refused({"count.tokens": None}, "tokens")
    refused({"keys.0": None}, "keys")
    refused({"keys.0": whole["keys.0"][:, :, :, :1].contiguous()}, "keys")
    for i in (0, 1):  # one layer with less than the counts say
        shorter = whole[f"temporary_memory.{i}"][:, 1:].contiguous()
        refused({f"temporary_memory.{i}": shorter}, "queue_length")
        for part in ("keys", "values"):
            refused({f"{part}.{i}": whole[f"{part}.{i}"][:, :, 1:].contiguous()}, "row_length")
    refused({"stranger": torch.zeros(1)}, "stranger")
    refused({"keys.x": torch.zeros(1)}, "layers of keys")
    refused({"keys.0": None, "keys.7": whole["keys.0"]}, "layers of keys")
    refused({"keys.0": whole["keys.0"] * float("nan")}, "NaN or infinity")
    refused({"count.tokens": torch.tensor(6)}, "int64 of one dimension")
    refused({"count.tokens": torch.tensor([6.5])}, "int64 of one dimension")
    refused({"count.tokens": torch.tensor([6], dtype=torch.uint64)}, "int64 of one dimension")
    refused({"count.tokens": torch.tensor([0])}, "tokens at least")
    refused({"count.open_tokens": torch.tensor([0])}, "a row where open_tokens")
    refused({"count.open_tokens": torch.tensor([99])}, "tokens at least")
    queue = {f"temporary_memory.{i}": torch.zeros(1, 50, 6, dtype=torch.float64) for i in (0, 1)}
    refused(queue | {"count.queue_length": torch.tensor([50])}, "at most temporary_memory_size")


def test_states_fit_models_of_an_equal_config(make_config):
    """However its numbers are written and its dicts ordered; and a frozen config stays frozen."""
    scaling = {"rope_type": "linear", "factor": 2}
    one = random_model(make_config({"rope_theta": 10000, "rope_scaling": scaling}), 0)
    other = random_model(
        make_config({"rope_theta": 10000.0, "rope_scaling": dict(reversed(scaling.items()))}), 0
    )
    scaling["factor"] = 3
    assert one.config == other.config
    state = one(tensor([[1, 2, 3]])).state
    assert other(tensor([[4]]), state=state).state.tokens[0] == 4


OTHER = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 9,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "qk_norm": False,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "unrotated_layers": (1,),
    "chunk_size": 5,
    "global_memory_size": 3,
    "temporary_memory_size": 4,
    "compression_stride": 3,
    "adapter_rank": 2,
    "gate": "vector",
    "gate_bias": True,
    "gate_saturation": 0.5,
    "trailing_compression": False,
    "global_norm_eps": 1e-3,
    "temporary_norm_eps": 1e-3,
    "sink_slot": True,
}
"""Another value of every field, than `make_config` has."""


def test_a_state_knows_every_field_of_its_config(make_config):
    config = make_config()
    state = random_model(config, 0).new_state()
    for part in ("backbone", "memory"):
        for field in dataclasses.fields(getattr(config, part)):
            changed = make_config(**{part: {field.name: OTHER[field.name]}})
            assert changed != config
            model = random_model(changed, 0)
            with pytest.raises(ValueError, match="belongs to a model with config"):
                model(tensor([[1, 2]]), state=state)


@pytest.mark.host
def test_a_field_that_came_later_leaves_old_states_what_they_were(make_config, monkeypatch):
    """Fingerprints are those that were recorded before there was such a field."""
    config = make_config()
    assert fingerprint(config) == "3326e2f8e5ad37a7"
    shipped = Path(__file__).parent.parent / "fast" / "tasks" / "passkey_model" / "config.json"
    assert fingerprint(CoMeTConfig.from_json(shipped.read_text())) == "233e50f8196bb71b"
    told = config.to_dict()
    assert {name: (told["backbone"] | told["memory"])[name] for name in LATER} == LATER
    monkeypatch.setattr("fast.state.LATER", dict.fromkeys(LATER, "another"))
    assert fingerprint(config) != "3326e2f8e5ad37a7"


def contradictions(state, config, row):
    """What cannot be of a sequence, given the rest of it: counts by name."""
    tokens, chunks, open_tokens, row_length, _ = (
        int(getattr(state, name)[row])
        for name in ("tokens", "chunks", "open_tokens", "row_length", "queue_length")
    )
    most = config.memory.temporary_memory_size
    found = {
        "a queue beyond its size": {"queue_length": most + 1},
        "fewer tokens than are open": {"tokens": open_tokens + chunks - 1, "chunks": chunks},
    }
    if tokens > open_tokens:
        found["text closed, and no chunk"] = {"chunks": 0}
    else:
        found["a chunk closed, and no text"] = {"chunks": 1, "tokens": open_tokens}
    if open_tokens:
        found |= {
            "a chunk without a row": {"row_length": 0},
            "a row shorter than its text": {"row_length": open_tokens - 1},
            "a row longer than memories and text": {
                "row_length": config.memory.global_memory_size + most + 2 * open_tokens + 1
            },
        }
    else:
        found["a row without a chunk"] = {"row_length": 1, "open_tokens": 0}
    return found


@given(cases(), st.data())
def test_a_contradiction_in_any_sequence_is_told(case, data):
    """Every rule holds for every sequence, and the one that breaks it is named."""
    config, seed, ids = case
    model = random_model(config, seed)
    rows = [ids, ids[: 1 + len(ids) // 2], ids[:1]]
    with torch.no_grad():
        states = [model(tensor([row]), logits="none").state for row in rows]
        states = [model.close_chunk(s) if data.draw(st.booleans()) else s for s in states]
        state = CoMeTState.cat(states)
        model(tensor([[1]] * 3), state=state, logits="none")
        row = data.draw(st.integers(0, 2))
        what = contradictions(state, config, row)
        changes = what[data.draw(st.sampled_from(sorted(what)))]
        # Room for what the counts claim: tensors that are too small are told by another rule.
        slots = 64 + config.memory.temporary_memory_size
        changed = dataclasses.replace(
            state,
            temporary_memory=tuple(
                torch.nn.functional.pad(t, (0, 0, 0, slots)) for t in state.temporary_memory
            ),
            keys=tuple(torch.nn.functional.pad(t, (0, 0, 0, slots)) for t in state.keys),
            values=tuple(torch.nn.functional.pad(t, (0, 0, 0, slots)) for t in state.values),
        )
        for name, value in changes.items():
            counts = getattr(changed, name).copy()
            counts[row] = value
            changed = dataclasses.replace(changed, **{name: counts})
        message = r"more than the 0 slots|expected \[3\] >= 0|in sequences \[" + str(row) + r"\]"
        with pytest.raises(ValueError, match=message):
            model(tensor([[1]] * 3), state=changed, logits="none")


def test_saving_over_a_state_replaces_it_whole(tmp_path, make_config, monkeypatch):
    state, model = state_and_model(make_config)
    path = tmp_path / "state.safetensors"
    state.save(path)
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        model(tensor([[1]]), state=state).state.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("part", ["global_state", "temporary_memory", "keys", "values"])
def test_a_stream_that_left_float16_is_noticed(part, make_config):
    """On demand, and where a token is handed out; not before."""
    model = random_model(make_config(), 0).half()
    ids = tensor([[1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        state = model(ids).state
    state.check_finite()
    broken = list(getattr(state, part))
    broken[1] = broken[1] * 1e6
    state = dataclasses.replace(state, **{part: tuple(broken)})
    with pytest.raises(FloatingPointError, match=f"{part} holds NaN or infinity in layer 1: a str"):
        state.check_finite()
    engine = CoMeTEngine(model.config, arrays_of(model))
    for reader, text in ((model, ids), (engine, array(ids))):
        told = pytest.raises(FloatingPointError, match="logits are not finite numbers: .* float16")
        with told, np.errstate(all="ignore"):
            reader.generate(text, state.to(reader), 5)
