"""Checkpoints: what goes out comes in again, and nothing else comes in."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file

from fast import CoMeTModel
from fast.weights import (
    PublishedIds,
    load_arrays,
    load_checkpoint,
    load_published,
    save_checkpoint,
    save_published,
)
from reference import model as spec
from reference import stream
from reference.parameters import named_parameters

from .assertions import arrays_of, assert_near
from .strategies import cases, random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@given(case=cases())
def test_save_and_load_change_nothing(folder, case):
    config, seed, ids = case
    model = random_model(config, seed)
    model.save_pretrained(folder)
    again = CoMeTModel.from_pretrained(folder)
    assert again.config == config
    assert again.dtype == torch.float64
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    logits, _ = spec.forward(ids, stream.new_state(config), arrays_of(model), config)
    assert_near(again(torch.tensor([ids])).logits[0], logits, "logits")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    _, arrays = load_arrays(folder)
    expected = named_parameters(arrays_of(model))
    assert all(np.array_equal(a, expected[n]) for n, a in named_parameters(arrays).items())


def test_the_reference_runs_a_bfloat16_checkpoint(tmp_path, make_config):
    model = random_model(make_config(), 0).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config, arrays = load_arrays(tmp_path)
    assert arrays["norm"].dtype == np.float32
    logits, _ = spec.forward([1, 2, 3], stream.new_state(config, np.float32), arrays, config)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "memory",
    [
        {"adapter_rank": 8},
        {"adapter_rank": 8, "compression_stride": 0},
        {"adapter_rank": 8, "global_memory_size": 0},
    ],
)
def test_published_names_round_trip(tmp_path, make_config, tied, memory):
    """Written without ids, the special rows go behind the vocabulary; text logits stay the same."""
    config = make_config({"tie_word_embeddings": tied}, memory)
    model = random_model(config, 2)
    ids = save_published(tmp_path, config, model.weights)
    m = config.memory.global_memory_size
    assert ids == PublishedIds(11, tuple(range(12, 12 + m)), 12 + m)
    back, weights, found = load_published(tmp_path)
    assert found == ids
    assert back.backbone.vocab_size == 13 + m
    again = CoMeTModel(back, weights)
    text = torch.tensor([[1, 5, 2, 8, 3, 3, 7, 9, 0, 4]])
    assert_near(again(text).logits[..., :11], model(text).logits.detach().numpy(), "logits")
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    second = tmp_path / "second"
    assert save_published(second, back, weights, ids) == ids
    a, b = (load_file(f / "model.safetensors") for f in (tmp_path, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_special_rows_are_rows_of_their_own(tmp_path, make_config):
    config = make_config({}, {"adapter_rank": 8})
    weights = random_model(config, 0).weights
    for ids in (PublishedIds(5, (5, 6), 7), PublishedIds(5, (6, 7), 11), PublishedIds(5, (6,), 7)):
        with pytest.raises(ValueError, match="expected 2 readout rows, all rows different"):
            save_published(tmp_path, config, weights, ids)
    assert list(tmp_path.iterdir()) == []


def test_a_published_checkpoint_that_ours_would_read_otherwise_is_refused(tmp_path, make_config):
    config = make_config({}, {"adapter_rank": 8})
    save_published(tmp_path, config, random_model(config, 0).weights)
    path, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    data, tensors = json.loads(path.read_text()), load_file(file)
    for change, match in (
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"temp_beacon_id": None}, "expected integers"),
        ({"global_beacon_ids": None}, "expected integers"),
        ({"temp_beacon_stride": "8"}, "expected integers"),
    ):
        path.write_text(json.dumps(data | change))
        refused(tmp_path, match)
    path.write_text(json.dumps(data))
    for name in ("inner_layer.self_attn.o_proj.bias", "inner_layer.self_attn.q_proj.bias"):
        save_file(tensors | {f"model.layers.0.{name}": torch.ones(6)}, file)
        refused(tmp_path, f"holds .*{name}.*no place for")
    save_file(tensors | {"model.layers.2.inner_layer.mlp.up_proj.weight": torch.ones(2, 2)}, file)
    refused(tmp_path, "no place for")


def test_what_the_published_code_does_not_know_is_not_written(tmp_path, make_config):
    for backbone, memory, match in (
        ({}, {"adapter_rank": 8, "gate": "vector"}, "memory.gate is 'vector'"),
        ({}, {"adapter_rank": 8, "gate_bias": True}, "memory.gate_bias is True"),
        ({}, {"adapter_rank": 8, "gate_saturation": 0.9}, "memory.gate_saturation is 0.9"),
        ({}, {"adapter_rank": 4}, "memory.adapter_rank is 4"),
        (
            {},
            {"adapter_rank": 8, "trailing_compression": False},
            "memory.trailing_compression is False",
        ),
        ({"qk_norm": False}, {"adapter_rank": 8}, "backbone.qk_norm is False"),
        ({"attention_bias": True}, {"adapter_rank": 8}, "backbone.attention_bias is True"),
    ):
        config = make_config(backbone, memory)
        with pytest.raises(ValueError, match=match):
            save_published(tmp_path, config, random_model(config, 0).weights)
    assert list(tmp_path.iterdir()) == []


def saved(tmp_path, make_config):
    config = make_config()
    model = random_model(config, 0)
    model.save_pretrained(tmp_path)
    return config, model, tmp_path / "config.json", tmp_path / "model.safetensors"


def refused(folder, match):
    with pytest.raises(ValueError, match=match):
        CoMeTModel.from_pretrained(folder)


def test_a_damaged_checkpoint_is_refused(tmp_path, make_config):
    _, _, config, weights = saved(tmp_path, make_config)
    whole, text = weights.read_bytes(), config.read_text()
    for cut in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        refused(tmp_path, "cut short")
    weights.write_bytes(whole)
    config.write_text(text[: len(text) // 2])
    refused(tmp_path, "not JSON")
    config.write_text('{"model_type": "llama"}')
    refused(tmp_path, "neither a CoMeT config")
    config.write_text("[1]")
    refused(tmp_path, "holds a list")
    config.unlink()
    with pytest.raises(FileNotFoundError):
        CoMeTModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path, make_config):
    _, _, _, path = saved(tmp_path, make_config)
    whole = load_file(path)

    def with_changes(changes, match):
        save_file({k: v for k, v in (whole | changes).items() if v is not None}, path)
        refused(tmp_path, match)

    with_changes({"norm": None}, "lacks the tensor norm")
    with_changes({"stranger": torch.zeros(1)}, "stranger")
    with_changes({"norm": torch.ones(7, dtype=torch.float64)}, r"norm has shape \(7,\)")
    with_changes({"norm": torch.ones(6, dtype=torch.float32)}, "float")
    bad = whole["layers.1.q_proj"].clone()
    bad[0, 0] = float("nan")
    with_changes({"layers.1.q_proj": bad}, "layers.1.q_proj holds NaN")


def test_weights_given_as_a_dict_are_checked(make_config):
    config = make_config()
    from fast.parameters import to_tensors

    from .strategies import random_weights

    weights = to_tensors(random_weights(config, 0), torch.float32)
    CoMeTModel(config, weights)
    weights["norm"][0] = float("inf")
    with pytest.raises(ValueError, match="norm holds NaN or infinity"):
        CoMeTModel(config, weights)
    del weights["norm"]
    with pytest.raises(ValueError, match=r"lack \['norm'\]"):
        CoMeTModel(config, weights)


def test_nothing_is_ever_unpickled(tmp_path, make_config):
    _, _, _, path = saved(tmp_path, make_config)

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path.write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "not a readable safetensors file")


def test_shards_are_read_from_their_own_folder_alone(tmp_path, make_config):
    config = make_config({}, {"adapter_rank": 8})
    model = random_model(config, 0)
    save_published(tmp_path, config, model.weights)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    half = {name: tensors[name] for name in names[: len(names) // 2]}
    rest = {name: tensors[name] for name in names[len(names) // 2 :]}
    save_file(half, tmp_path / "a.safetensors")
    save_file(rest, tmp_path / "b.safetensors")
    path.unlink()
    index = tmp_path / "model.safetensors.index.json"
    places = dict.fromkeys(half, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")
    index.write_text(json.dumps({"weight_map": places}))
    assert CoMeTModel.from_pretrained(tmp_path).config.backbone.vocab_size == 15
    for wrong in ({"x": "../a.safetensors"}, {"x": 3}, []):
        index.write_text(json.dumps({"weight_map": wrong}))
        refused(tmp_path, "expected files of that folder")
    index.write_text(json.dumps({"weight_map": {"x": "c.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="c.safetensors is missing"):
        load_checkpoint(tmp_path)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, make_config, monkeypatch):
    config, model, path, weights = saved(tmp_path, make_config)
    before = path.read_bytes(), weights.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("fast.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, config, model.weights)
    assert (path.read_bytes(), weights.read_bytes()) == before
    assert sorted(tmp_path.iterdir()) == [path, weights]
