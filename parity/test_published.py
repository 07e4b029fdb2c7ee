"""Official CoMeT checkpoints: what goes out comes in again, and what ours would read otherwise
is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fast import CoMeTModel
from fast.checkpoints import load_checkpoint
from fast.pretrained import PublishedIds, load_published, save_published

from .assertions import array, assert_near
from .device import DEVICE, tensor
from .strategies import random_model
from .test_checkpoints import refused


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
    """Written without ids, the special rows come after the vocabulary; text logits stay the same."""
    config = make_config({"tie_word_embeddings": tied}, memory)
    model = random_model(config, 2)
    ids = save_published(tmp_path, config, model.weights)
    m = config.memory.global_memory_size
    assert ids == PublishedIds(11, tuple(range(12, 12 + m)), 12 + m)
    back, weights, found = load_published(tmp_path)
    assert found == ids
    assert back.backbone.vocab_size == 13 + m
    again = CoMeTModel(back, weights).to(DEVICE)
    text = tensor([[1, 5, 2, 8, 3, 3, 7, 9, 0, 4]])
    assert_near(again(text).logits[..., :11], array(model(text).logits), "logits")
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
