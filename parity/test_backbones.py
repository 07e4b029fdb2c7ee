"""A pretrained backbone computes here what it computes in transformers, in every family."""

import json
from contextlib import contextmanager
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fast import BackboneConfig, CoMeTModel, MemoryConfig
from fast.layers import rms_norm
from fast.pretrained.backbones import FAMILIES, backbone_config
from fast.pretrained.gguf import LLAMA3
from reference.config import ROPE_TYPES

from .assertions import assert_near
from .strategies import ROPE_SCALINGS, seeds

pytestmark = pytest.mark.host

PLAIN = MemoryConfig(chunk_size=64, global_memory_size=0, compression_stride=0)
"""No memories, and one chunk: the backbone alone."""

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "smollm3": transformers.SmolLM3Config,
}


@contextmanager
def in_float64():
    """What transformers computes in float32 whatever the model's dtype, norms, rotations and the
    softmax, it computes in float64."""
    with (
        patch.object(torch, "float32", torch.float64),
        patch.object(torch, "float", torch.float64),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


@st.composite
def configs(draw):
    """Of every family, with heads of their own width, tied and untied."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    keys = draw(st.sampled_from([1, 2]))
    heads = keys * draw(st.sampled_from([1, 2]))
    width = draw(st.sampled_from([2, 4]))
    layers = draw(st.integers(1, 3))
    free = {"head_dim": draw(st.sampled_from([width, 6]))} if family != "qwen2" else {}
    if family == "smollm3":
        free = {"pad_token_id": None} | draw(
            st.one_of(
                st.fixed_dictionaries({"no_rope_layer_interval": st.integers(1, 4)}),
                st.fixed_dictionaries(
                    {
                        "no_rope_layers": st.lists(
                            st.sampled_from([0, 1]), min_size=layers, max_size=layers
                        )
                    }
                ),
            )
        )
    return CONFIGS[family](
        vocab_size=13,
        hidden_size=heads * width,
        intermediate_size=draw(st.sampled_from([5, 8])),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=64,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        rope_parameters={
            "rope_theta": 500.0,
            **draw(st.sampled_from([{"rope_type": "default"}, *ROPE_SCALINGS])),
        },
        tie_word_embeddings=draw(st.booleans()),
        **({"sliding_window": None} if family == "mistral" else {}),
        **free,
    )


def random_backbone(config, seed):
    """A model of transformers in float64 in which every part matters."""
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            shape = tuple(parameter.shape)
            x = rng.normal(0, 0.7, shape) if len(shape) > 1 else rng.uniform(0.5, 1.5, shape)
            parameter.copy_(torch.from_numpy(x))
    return model


def layer_outputs(model):
    """A list that gets what every layer gives."""
    outputs = []
    for layer in model.weights["layers"]:
        layer.register_forward_hook(lambda _module, _args, results: outputs.append(results[0]))
    return outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("backbones")


@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(config=configs(), seed=seeds, n=st.integers(1, 40), shards=st.booleans())
def test_a_backbone_computes_what_it_does_in_transformers(folder, config, seed, n, shards):
    """Its logits, and every layer's output; from a folder, whole or in shards, and from memory."""
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 13, (2, n)))
    with in_float64(), torch.no_grad():
        theirs = random_backbone(config, seed)
        found = theirs(ids, output_hidden_states=True)
        for path in folder.iterdir():
            path.unlink()
        theirs.save_pretrained(folder, max_shard_size="1KB" if shards else "1GB")
    for source in (folder, theirs):
        model = CoMeTModel.from_backbone(source, PLAIN)
        assert model.dtype == torch.float64
        outputs = layer_outputs(model)
        assert_near(model(ids).logits, found.logits, "logits", 1e-9)
        outputs[-1] = rms_norm(outputs[-1], model.weights["norm"], config.rms_norm_eps)
        # Theirs begin with the embeddings, and the last is normed.
        for i, (ours, expected) in enumerate(zip(outputs, found.hidden_states[1:], strict=True)):
            assert_near(ours, expected, f"the output of layer {i}", 1e-9)


def write_gguf(path, model, quantised=False, more=None):
    """A model of transformers as llama.cpp's converter writes it, and more tensors."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    writer.add_token_list(["a", "Ġ", *map(str, range(config.vocab_size - 2))])
    names = gguf.get_tensor_name_map(
        {
            "llama": gguf.MODEL_ARCH.LLAMA,
            "qwen2": gguf.MODEL_ARCH.QWEN2,
            "qwen3": gguf.MODEL_ARCH.QWEN3,
            "smollm3": gguf.MODEL_ARCH.SMOLLM3,
        }[family],
        config.num_hidden_layers,
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        x = tensor.float().numpy()
        if family in ("llama", "smollm3") and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            x = x.reshape(heads, 2, len(x) // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)
        kind = (
            gguf.GGMLQuantizationType.Q8_0
            if quantised and x.ndim == 2
            else gguf.GGMLQuantizationType.F32
        )
        stored = gguf.quants.quantize(np.ascontiguousarray(x), kind)
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(place, stored, raw_dtype=kind)
    for name, x in (more or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small(family, layers=2, theta=500.0, **changes):
    """A model of transformers, in float32, whose rows GGUF can quantise."""
    config = CONFIGS[family](
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        **({"pad_token_id": None} if family == "smollm3" else {}),
        **changes,
    )
    return random_backbone(config, 3).float()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
def test_a_gguf_file_holds_the_same_backbone(tmp_path, family, quantised, tied):
    """Quantised weights are those that transformers makes of the same file."""
    theirs = small(family, 5 if family == "smollm3" else 2, tie_word_embeddings=tied)
    path = tmp_path / "model.gguf"
    write_gguf(path, theirs, quantised)
    model = CoMeTModel.from_backbone(path, PLAIN)
    if quantised:
        theirs.load_state_dict({n: rounded(p) for n, p in theirs.state_dict().items()})
    ours = CoMeTModel.from_backbone(theirs, PLAIN)
    for (name, found), expected in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert model.config == ours.config


def rounded(x):
    """A weight after it was stored as Q8_0: blocks of 32 numbers, each of 8 bits and one scale."""
    if x.ndim < 2:
        return x
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind).copy()
    )


SMOLLM3 = {"model_type": "smollm3"}


@pytest.fixture
def saved(tmp_path):
    """A folder with a backbone, and what changes its config.json."""
    small("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())

    def change(**fields):
        kept = {name: value for name, value in (data | fields).items() if value != "left out"}
        path.write_text(json.dumps(kept))
        return tmp_path

    return change


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "mixtral"},
            "of the type 'mixtral'; known are llama, mistral, qwen2, qwen3, smollm3",
        ),
        ({"model_type": "left out"}, "of the type None; known are"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', which changes the equations; only 'silu'"),
        ({"attention_bias": True}, "attention_bias True, which changes"),
        ({"mlp_bias": True}, "mlp_bias True, which changes"),
        ({"use_sliding_window": True}, "use_sliding_window True, which changes"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096, which changes"),
        ({"model_type": "mistral"}, "sliding_window 4096, which changes"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types 'sliding_attention'",
        ),
        (SMOLLM3 | {"no_rope_layers": [1]}, "no_rope_layers is \\[1\\]; expected a 1 or"),
        (SMOLLM3 | {"no_rope_layers": [1, 2]}, "a 0 for each of 2 layers"),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, "config.json .*no_rope_layer_interval is 0"),
        (SMOLLM3 | {"use_sliding_window": True}, "use_sliding_window True, which changes"),
        (SMOLLM3 | {"attention_bias": True}, "attention_bias True, which changes"),
        (SMOLLM3 | {"mlp_bias": True}, "mlp_bias True, which changes"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'; known are"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type \\['yarn'\\]; known are"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "turns 0.5 of each head; only whole"),
        ({"rope_parameters": 3}, "rope_scaling 3; expected an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "finite number above 0.0 under 'factor'"),
        ({"hidden_size": "left out"}, "lacks \\['hidden_size'\\]; is the file whole"),
        ({"num_hidden_layers": 3}, "lack .*layers.2.* and hold unknown \\[\\]"),
        ({"num_hidden_layers": 10**9}, "says 1000000000 layers, but there are 21 tensors"),
        ({"num_hidden_layers": 1}, "lack \\[\\] and hold unknown .*layers.1"),
        ({"intermediate_size": 95}, "shape \\(96, 64\\), .* says \\(95, 64\\)"),
        (
            {"num_attention_heads": "four"},
            "num_attention_heads is 'four'; expected an integer of at least 1",
        ),
        ({"vocab_size": 33}, "shape \\(32, 64\\), .* says \\(33, 64\\)"),
    ],
)
def test_what_ours_would_compute_otherwise_is_refused_by_name(saved, fields, message):
    with pytest.raises(ValueError, match=message):
        CoMeTModel.from_backbone(saved(**fields), PLAIN)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([10**30, 1e400, "silu", "", [], ["full_attention", {}], {}, {"rope_type": 1}]),
    st.floats(allow_nan=True),
)


@given(data=st.data(), value=VALUES)
def test_a_config_with_any_field_replaced_is_read_or_refused_in_a_sentence(data, value):
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    config = CONFIGS[family](
        hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1
    ).to_dict()
    config |= {"sliding_window": None} if family == "mistral" else {}
    assert backbone_config(config, "config.json").hidden_size == 8
    read = ("model_type", "num_attention_heads", "head_dim", "layer_types", "rope_parameters")
    read += ("no_rope_layers", "no_rope_layer_interval") if family == "smollm3" else ()
    name = data.draw(st.sampled_from([*read, *sorted(config)]))
    config[name] = value
    if data.draw(st.booleans()):
        config.pop(data.draw(st.sampled_from(sorted(config))))
    told = None
    try:
        found = backbone_config(config, "config.json")
    except ValueError as error:
        told = str(error)
    if told is None:
        assert isinstance(found, BackboneConfig)
    else:
        assert "config.json" in told
        assert len(told) < 400


@pytest.mark.parametrize("place", [32, -1, "first", True, None])
def test_a_tokenizer_of_another_model_is_refused(saved, place):
    folder = saved()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"Ġ": place}}}))
    if place is None:
        CoMeTModel.from_backbone(folder, PLAIN)  # no such token
        return
    with pytest.raises(ValueError, match="the tokenizer has a space at .*, the embedding table 32"):
        CoMeTModel.from_backbone(folder, PLAIN)


@pytest.mark.parametrize("text", ['{"model": 3}', '{"model": {"vocab": [["a", 0.0]]}}', "{}"])
def test_a_tokenizer_without_a_vocabulary_by_name_is_left_alone(saved, text):
    folder = saved()
    (folder / "tokenizer.json").write_text(text)
    CoMeTModel.from_backbone(folder, PLAIN)


def stored_divisors(scaling, theta, width):
    """What llama.cpp's converter stores of Llama 3's rotation: it goes by wavelengths, in float32."""
    frequencies = 1 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    waves = 2 * np.pi / frequencies.astype(np.float32)
    factor, low, high, context = (scaling[name] for name in ROPE_TYPES["llama3"])
    share = (context / waves - low) / (high - low)
    blended = 1 / ((1 - share) / factor + share)
    found = np.where(waves < context / high, 1, np.where(waves > context / low, factor, blended))
    return found.astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_s_rotation_is_read_from_a_gguf_file(tmp_path, factor):
    """Its frequencies are stored as what they are divided by, some of them blended."""
    theirs = small("llama", theta=500000.0)
    scaling, path = {**LLAMA3, "factor": factor}, tmp_path / "model.gguf"
    divisors = stored_divisors(scaling, np.float32(500000.0), 16)
    assert ((divisors > 1) & (divisors < factor)).any()
    write_gguf(path, theirs, more={"rope_freqs.weight": divisors})
    theirs.config.rope_parameters = {**scaling, "rope_theta": 500000.0}
    expected = CoMeTModel.from_backbone(theirs, PLAIN)
    assert CoMeTModel.from_backbone(path, PLAIN).config == expected.config


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:-1],
        lambda x: x * (1 + 1e-5 * (np.arange(len(x)) == 4)),
        lambda x: x + np.nan,
        lambda x: x[::-1],
        lambda x: stored_divisors(
            {**LLAMA3, "factor": 8.0} | {"low_freq_factor": 2.0}, 500000.0, 16
        ),
    ],
    ids=["short", "changed", "NaN", "turned", "other"],
)
def test_another_rotation_in_a_gguf_file_is_refused(tmp_path, change):
    path = tmp_path / "model.gguf"
    divisors = change(stored_divisors({**LLAMA3, "factor": 8.0}, 500000.0, 16)).astype(np.float32)
    write_gguf(path, small("llama", theta=500000.0), more={"rope_freqs.weight": divisors})
    with pytest.raises(ValueError, match="holds rope_freqs.weight that is not Llama 3's|factor"):
        CoMeTModel.from_backbone(path, PLAIN)


@pytest.mark.parametrize("every", [1, 2, 3, 4, None])
def test_smollm3_s_unrotated_layers_may_be_told_by_their_interval(every):
    told = {} if every is None else {"no_rope_layer_interval": every}
    marks = transformers.SmolLM3Config(num_hidden_layers=9, **told).no_rope_layers
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 9}
    config = backbone_config({**SMOLLM3, **sizes, "num_attention_heads": 2, **told}, "a config")
    assert config.unrotated_layers == tuple(i for i in range(9) if not marks[i])
    assert (config.rope_theta, config.tie_word_embeddings) == (2000000.0, True)


def test_configs_of_transformers_4_are_read_too():
    """rope_theta stands apart there, and rope_scaling may say `type`."""
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    old = {**sizes, "model_type": "llama", "num_attention_heads": 2, "rope_theta": 500.0}
    found = backbone_config(old | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "a config")
    assert (found.rope_theta, found.rope_scaling) == (500.0, {"rope_type": "linear", "factor": 4.0})
    assert (found.num_key_value_heads, found.head_dim) == (2, 4)
    assert backbone_config(old | {"rope_scaling": None}, "a config").rope_scaling is None


def test_a_folder_that_is_not_whole_is_refused(saved, tmp_path):
    folder = saved()
    small("llama").save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[0].write_bytes(shards[0].read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{shards[0].name} is not a readable safetensors file"):
        CoMeTModel.from_backbone(folder, PLAIN)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[0].name} is missing"):
        CoMeTModel.from_backbone(folder, PLAIN)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards[1].name, "../" + shards[1].name))
    with pytest.raises(ValueError, match="expected files of that folder"):
        CoMeTModel.from_backbone(folder, PLAIN)
    with pytest.raises(FileNotFoundError):
        CoMeTModel.from_backbone(tmp_path / "nothing", PLAIN)


def test_a_gguf_file_that_is_not_whole_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(path, small("llama"))
    whole = path.read_bytes()
    for cut in (0, 3, 100, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is not a readable GGUF file"):
            CoMeTModel.from_backbone(path, PLAIN)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match="the package gguf is not installed; run pip install"):
        CoMeTModel.from_backbone(path, PLAIN)


def test_what_is_no_backbone_is_refused():
    with pytest.raises(ValueError, match="source is a int; expected a folder, a GGUF file"):
        CoMeTModel.from_backbone(3, PLAIN)
    with pytest.raises(ValueError, match="memory is a dict; expected a MemoryConfig"):
        CoMeTModel.from_backbone("folder", {})


def test_new_memories_disturb_a_backbone_little(tmp_path):
    """Compression tokens are spaces, readouts differ, adapters add nothing; and it can be trained."""
    theirs = small("llama")
    write_gguf(tmp_path / "model.gguf", theirs)
    memory = MemoryConfig(
        chunk_size=8,
        global_memory_size=3,
        temporary_memory_size=4,
        compression_stride=4,
        gate_bias=True,
    )
    one, other = (
        CoMeTModel.from_backbone(tmp_path / "model.gguf", memory, seed=seed) for seed in (0, 0)
    )
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), f"{name}: the same seed gives other weights"
    weights = one.weights
    assert torch.equal(weights["compression_embedding"].weight, weights["embed_tokens"].weight[1])
    assert len(weights["readout_embeddings"].weight.unique(dim=0)) == 3
    for layer in weights["layers"]:
        for net in ("global_memory", "temporary_memory"):
            assert not layer[net]["adapter_up"].weight.any()
            assert layer[net]["adapter_down"].weight.any()
            assert (layer[net]["norm"] == 1).all()
        assert not layer["global_memory"]["gate_bias"].any()
    ids = torch.arange(30)[None] % 32
    first = one(ids[:, :8]).logits
    assert_near(
        first[:, :4], theirs(ids[:, :4]).logits.detach(), "before a compression token", 1e-5
    )
    one(ids, labels=ids).loss.backward()
    assert all(
        p.grad is not None and p.grad.any()
        for p in (weights["readout_embeddings"].weight, weights["layers"][0]["q_proj"].weight)
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_sink_starts_as_a_space_at_the_start_of_a_text(tmp_path, family):
    """What goes into each layer there; nothing else starts otherwise for it, and it learns."""
    theirs = small(family, 3, **({"sliding_window": None} if family == "mistral" else {}))
    theirs.save_pretrained(tmp_path)
    memory = {"chunk_size": 4, "global_memory_size": 2, "compression_stride": 2}
    for blank in (5, 0):
        if blank:
            (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"▁": blank}}}))
        else:
            (tmp_path / "tokenizer.json").unlink()
        with torch.no_grad():
            expected = theirs(torch.tensor([[blank]]), output_hidden_states=True).hidden_states
        model = CoMeTModel.from_backbone(tmp_path, MemoryConfig(**memory, sink_slot=True))
        for i, layer in enumerate(model.weights["layers"]):
            assert_near(layer["global_memory"]["sink"], expected[i][0, 0], f"sink {i}", 1e-5)
        without = CoMeTModel.from_backbone(tmp_path, MemoryConfig(**memory))
        named = dict(model.named_parameters())
        assert all(torch.equal(named[name], p) for name, p in without.named_parameters())
        assert len(named) == len(list(without.parameters())) + 3
        ids = torch.arange(20)[None]
        model(ids, labels=ids).loss.backward()
        assert all(layer["global_memory"]["sink"].grad.any() for layer in model.weights["layers"])


def test_weights_come_in_the_dtype_that_is_asked_for(saved):
    model = CoMeTModel.from_backbone(saved(), PLAIN, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
