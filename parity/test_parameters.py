"""Names, shapes and random start of the weights, and the config that they follow."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from fast import BackboneConfig, CoMeTConfig, CoMeTModel, MemoryConfig
from fast.parameters import initialize, to_arrays
from fast.pretrained import LAYER_NAMES, TOP_NAMES
from reference import parameters as spec

from .strategies import configs, random_model, random_weights, seeds

pytestmark = pytest.mark.host


@given(configs(), seeds)
def test_both_start_from_the_same_weights(config, seed):
    expected = spec.initialize(config, np.random.default_rng(seed))
    found = initialize(config, np.random.default_rng(seed))
    for name, value in spec.named_parameters(expected).items():
        twin = spec.named_parameters(found)[name]
        assert twin.dtype == torch.float32
        assert torch.equal(twin, torch.tensor(value, dtype=torch.float32)), name


@given(configs(), seeds)
def test_a_module_has_exactly_the_named_shapes(config, seed):
    model = CoMeTModel(config, seed=seed)
    shapes = spec.named_parameters(spec.shapes(config))
    weights = spec.named_parameters(model.weights.to_dict())
    assert {name: tuple(p.shape) for name, p in weights.items()} == shapes
    assert list(weights) == list(shapes)
    assert {id(p) for p in weights.values()} == {id(p) for p in model.parameters()}


@given(configs(), seeds)
def test_map_parameters_keeps_the_form(config, seed):
    tree = random_weights(config, seed)
    doubled = spec.map_parameters(lambda _, p: 2 * p, tree)
    names = spec.named_parameters(tree)
    assert all(np.array_equal(p, 2 * names[n]) for n, p in spec.named_parameters(doubled).items())


@given(configs())
def test_a_config_round_trips_through_json(config):
    assert CoMeTConfig.from_json(config.to_json()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.memory.chunk_size = 3


@given(configs())
def test_every_field_of_a_config_is_documented(config):
    import inspect

    for part in (config, config.backbone, config.memory):
        source = inspect.getsource(type(part))
        for field in dataclasses.fields(part):
            after = source.split(f"    {field.name}: ", 1)[1].split("\n", 1)[1].lstrip()
            assert after.startswith('"""'), f"{type(part).__name__}.{field.name}"


BACKBONE = {
    "vocab_size": 5,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; expected an integer of at least 1"),
        ({"hidden_size": 4.0}, "hidden_size is 4.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"head_dim": 3}, "head_dim is 3; expected an even number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"qk_norm": 1}, "qk_norm is 1; expected True or False"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is one of"),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "is {'rope_type': 'linear'}; expected .* a finite number above 0.0 under 'factor'",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type is one of"),
        ({"unrotated_layers": (0, 0)}, r"unrotated_layers is \(0, 0\); expected a tuple of layers"),
        ({"unrotated_layers": (-1,)}, "expected a tuple of layers, in order"),
        ({"unrotated_layers": ("0",)}, "expected a tuple of layers, in order"),
        ({"unrotated_layers": (True,)}, "expected a tuple of layers, in order"),
        ({"unrotated_layers": 0}, "unrotated_layers is 0; expected a tuple of layers"),
        ({"unrotated_layers": (0, 1)}, "names layer 1, num_hidden_layers is 1; layers are counted"),
    ],
)
def test_a_bad_backbone_says_what_is_wrong(changes, match):
    with pytest.raises(ValueError, match=match):
        BackboneConfig(**(BACKBONE | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"global_memory_size": -1}, "global_memory_size is -1"),
        ({"temporary_memory_size": 0}, "temporary_memory_size is 0 with compression_stride 8"),
        ({"gate": "matrix"}, "gate is 'matrix'; expected 'scalar' or 'vector'"),
        ({"gate_saturation": 1.5}, "gate_saturation is 1.5; .* at most 1.0"),
        ({"gate_saturation": 0.0}, "gate_saturation is 0.0"),
        ({"global_norm_eps": -1.0}, "global_norm_eps is -1.0"),
        ({"adapter_rank": 0}, "adapter_rank is 0"),
        (
            {"sink_slot": True, "global_memory_size": 0},
            "sink_slot is True with global_memory_size 0",
        ),
        ({"sink_slot": 1}, "sink_slot is 1; expected True or False"),
    ],
)
def test_a_bad_memory_says_what_is_wrong(changes, match):
    with pytest.raises(ValueError, match=match):
        MemoryConfig(**changes)


def test_a_bad_config_file_says_what_is_wrong():
    good = CoMeTConfig(BackboneConfig(**BACKBONE)).to_dict()
    for text, match in (
        ("{", "not JSON"),
        ("[]", "keys 'backbone' and 'memory'"),
        (json.dumps({"backbone": {}, "memory": {}}), "BackboneConfig lacks head_dim"),
        (json.dumps(good | {"memory": {"chunks": 3}}), "MemoryConfig has no field chunks"),
        (json.dumps(good | {"memory": 3}), "MemoryConfig is int"),
    ):
        with pytest.raises(ValueError, match=match):
            CoMeTConfig.from_json(text)
    with pytest.raises(ValueError, match="expected a BackboneConfig"):
        CoMeTConfig({})
    with pytest.raises(ValueError, match="expected a MemoryConfig"):
        CoMeTConfig(BackboneConfig(**BACKBONE), {})


@given(configs(), seeds)
def test_random_model_holds_random_weights(config, seed):
    arrays = spec.named_parameters(to_arrays(random_model(config, seed).weights))
    expected = spec.named_parameters(random_weights(config, seed))
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)


def test_the_notation_page_is_whole():
    """Every config field with its default, every weight with its published name."""
    page = (Path(__file__).parent.parent / "docs" / "notation.md").read_text()
    rows = {
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in page.splitlines()
        if line.startswith("|")
    }
    for kind in (BackboneConfig, MemoryConfig):
        for field in dataclasses.fields(kind):
            (told,) = [row[2].strip('`"') for row in rows if row[0] == f"`{field.name}`"]
            missing = field.default is dataclasses.MISSING
            default = "" if missing else str(field.default)
            assert told == default or float(told) == float(default), field.name
    weights = {row[0].split(" (")[0]: row[-1].strip("`") for row in rows if len(row) == 3}
    assert {name: weights[f"layer `{name}`"] for name in LAYER_NAMES} == LAYER_NAMES
    assert {name: weights[f"`{name}`"] for name in TOP_NAMES} == TOP_NAMES
