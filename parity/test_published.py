"""Official CoMeT checkpoints: what goes out comes in again, and what ours would read otherwise
is refused."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from fast import BackboneConfig, CoMeTModel, MemoryConfig
from fast.checkpoints import load_checkpoint
from fast.pretrained import PublishedIds, load_published, save_published
from fast.pretrained.published import FIXED_BACKBONE, FIXED_MEMORY
from reference import config as config_module

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
        ({}, {"adapter_rank": 8, "sink_slot": True}, "memory.sink_slot is True"),
        ({"qk_norm": False}, {"adapter_rank": 8}, "backbone.qk_norm is False"),
        ({"attention_bias": True}, {"adapter_rank": 8}, "backbone.attention_bias is True"),
        ({"unrotated_layers": (0,)}, {"adapter_rank": 8}, "backbone.unrotated_layers is \\(0,\\)"),
    ):
        config = make_config(backbone, memory)
        with pytest.raises(ValueError, match=match):
            save_published(tmp_path, config, random_model(config, 0).weights)
    assert list(tmp_path.iterdir()) == []


OTHERS = {
    "backbone": {
        "vocab_size": 9, "hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 1,
        "num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 2, "rms_norm_eps": 1e-3,
        "rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "qk_norm": False, "attention_bias": True, "tie_word_embeddings": True,
        "unrotated_layers": (1,),
    },
    "memory": {
        "chunk_size": 5, "global_memory_size": 0, "temporary_memory_size": 7,
        "compression_stride": 0, "adapter_rank": 4, "gate": "vector", "gate_bias": True,
        "gate_saturation": 0.9, "trailing_compression": False, "global_norm_eps": 1e-3,
        "temporary_norm_eps": 1e-3, "sink_slot": True,
    },
}  # fmt: skip
"""For every field of a config a value that is not the test model's."""


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (part, field.name)
        for part, kind in (("backbone", BackboneConfig), ("memory", MemoryConfig))
        for field in dataclasses.fields(kind)
    ],
)
def test_every_field_comes_back_or_is_named(tmp_path, make_config, part, field):
    """A new field fails here until it has a value in `OTHERS`."""
    changed = {"backbone": {}, "memory": {"adapter_rank": 8}}
    changed[part][field] = OTHERS[part][field]
    if field == "num_key_value_heads":
        changed[part]["num_attention_heads"] = 2
    config = make_config(**changed)
    before = getattr(getattr(make_config({}, {"adapter_rank": 8}), part), field)
    assert before != OTHERS[part][field], "the same value"
    weights = random_model(config, 0).weights
    if field in {**FIXED_BACKBONE, **FIXED_MEMORY}:
        told = f"{part}.{field} is {OTHERS[part][field]!r}; the published code knows "
        with pytest.raises(ValueError, match=re.escape(told)):
            save_published(tmp_path, config, weights)
        assert list(tmp_path.iterdir()) == []
        return
    save_published(tmp_path, config, weights)
    back = load_published(tmp_path)[0]
    if field == "vocab_size":  # with the special tokens
        changed[part][field] += 2 + config.memory.global_memory_size
        config = make_config(**changed)
    assert getattr(getattr(back, part), field) == getattr(getattr(config, part), field)


@dataclasses.dataclass(frozen=True)
class WiderConfig(MemoryConfig):
    """What a variant may make of it."""

    sharpness: float = 1.0


def test_a_variant_s_field_and_gate_are_named_too(tmp_path, make_config, monkeypatch):
    """Not in a KeyError of a weight's name."""
    checks = config_module.MEMORY_CHECKS
    monkeypatch.setitem(checks, "sharpness", lambda _: None)
    monkeypatch.setitem(checks, "gate", lambda _: None)
    base = make_config({}, {"adapter_rank": 8})
    weights = random_model(base, 0).weights
    for value, gate, told in (
        (2.0, "scalar", "memory.sharpness is 2.0; the published code knows 1.0 only. Save"),
        (1.0, "learned", "memory.gate is 'learned'; the published code knows 'scalar' only. Save"),
    ):
        fields = vars(base.memory) | {"sharpness": value, "gate": gate}
        config = dataclasses.replace(base, memory=WiderConfig(**fields))
        with pytest.raises(ValueError, match=told):
            save_published(tmp_path, config, weights)
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
