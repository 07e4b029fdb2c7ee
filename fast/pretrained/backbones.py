"""Pretrained backbones of the Llama family: what Hugging Face and llama.cpp write, read as ours.

A folder with config.json and safetensors, a GGUF file, or a model of `transformers` that is in
memory. What the backbone computes is what its own code computes, or it is refused by name: sliding
windows, experts, other activations and other kinds of rotation have no place here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference.config import ROPE_TYPES, BackboneConfig, CoMeTConfig, MemoryConfig
from reference.parameters import map_parameters, named_parameters, shapes

from ..arrays import shown
from ..checkpoints import CONFIG, of_file, read_json, read_tensors
from ..inputs import check_count
from ..recorder import Recorder
from ..stream import new_state, read
from .published import LAYER_NAMES, TOP_NAMES

__all__ = [
    "BLANKS",
    "FAMILIES",
    "Backbone",
    "backbone_config",
    "backbone_name",
    "backbone_shapes",
    "check_tensors",
    "plug_in",
    "read_backbone",
]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "smollm3": {},
}
"""Hugging Face's model_type -> the fields of BackboneConfig that it has whatever its config says.
SmolLM and SmolLM2 are of the type llama."""

THETAS = {"smollm3": 2000000.0}
"""rope_theta of the families that have another than 10000 where their config does not say."""

BLANKS = ("Ġ", "▁", " ")
"""How tokenizers write a single space."""

NO_MEMORY = MemoryConfig(global_memory_size=0, compression_stride=0)
"""A backbone alone, whose chunk is closed and forgotten."""

NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True)
class Backbone:
    """A pretrained model, before it has memories."""

    config: BackboneConfig
    """What it computes."""

    tensors: Callable[[str], Tensor]
    """A weight by our dotted name, on the CPU; each is asked for once, so that none is kept twice."""

    blank: int | None
    """Id of the token of a single space; None where no tokenizer is there, or it has none."""


def backbone_name(name: str) -> str:
    """Hugging Face's name of one of our weights: "layers.0.q_proj" ->
    "model.layers.0.self_attn.q_proj.weight".
    """
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest].removeprefix('inner_layer.')}"


def backbone_config(data: dict[str, Any], where: Any) -> BackboneConfig:
    """A backbone's config from Hugging Face's, of transformers 4 or 5.

    Args:
        data: what config.json holds.
        where: the file, for messages.

    Raises:
        ValueError: fields are missing, or it is a model that ours would read otherwise.
    """
    family = data.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"{where} is of the type {shown(family)}; known are {', '.join(sorted(FAMILIES))}. Another "
            "type needs its own line in fast.pretrained.backbones.FAMILIES, and a proof."
        )
    missing = [name for name in NEEDED if name not in data]
    if missing:
        raise ValueError(f"{where} lacks {missing}; is the file whole?")
    sizes = {name: data[name] for name in NEEDED}
    with of_file(where):
        for name, size in sizes.items():
            check_count(name, size, 1)
    _refuse_other_equations(data, where)
    theta, scaling = _rotation(data, where)
    heads, keys, width = (
        sizes["num_attention_heads"],
        data.get("num_key_value_heads"),
        data.get("head_dim"),
    )
    with of_file(where):
        return BackboneConfig(
            **sizes,
            num_key_value_heads=heads if keys is None else keys,
            head_dim=data["hidden_size"] // heads if width is None else width,
            rms_norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=data.get("tie_word_embeddings", family == "smollm3"),
            unrotated_layers=_unrotated_layers(data, where),
            **FAMILIES[family],
        )


def _refuse_other_equations(data: dict[str, Any], where: Any) -> None:
    """Raise ValueError for what changes the equations and has no place in a BackboneConfig."""
    family = data["model_type"]
    layers, full = data.get("layer_types"), "full_attention"
    if isinstance(layers, list):
        layers = next((kind for kind in layers if kind != full), None)
    # Mistral's has one unless its config says null.
    window = data.get("sliding_window", 4096) if family == "mistral" else None
    found = {
        "hidden_act": (data.get("hidden_act", "silu"), "silu"),
        "mlp_bias": (data.get("mlp_bias", False), False),
        "use_sliding_window": (data.get("use_sliding_window", False), False),
        "sliding_window": (window, None),
        "layer_types": (full if layers is None else layers, full),
    }
    if family != "qwen2":  # whose q, k and v have one always, and o never
        found["attention_bias"] = (bool(data.get("attention_bias", False)), False)
    for name, (value, known) in found.items():
        if value != known:
            raise ValueError(
                f"{where} has {name} {shown(value)}, which changes the equations; only {known!r} "
                "is known here."
            )


def _unrotated_layers(data: dict[str, Any], where: Any) -> tuple[int, ...]:
    """Layers of SmolLM3 without rotation: those with 0 in no_rope_layers, a name that says the
    opposite of what it holds; without that list, the last of every no_rope_layer_interval.
    """
    if data["model_type"] != "smollm3":
        return ()
    layers, marks = data["num_hidden_layers"], data.get("no_rope_layers")
    if marks is None:
        every = data.get("no_rope_layer_interval", 4)
        check_count("no_rope_layer_interval", every, 1)
        return tuple(range(every - 1, layers, every))
    if not isinstance(marks, list) or len(marks) < layers or any(m not in (0, 1) for m in marks):
        raise ValueError(
            f"no_rope_layers is {shown(marks)}; expected a 1 or, for a layer that is not rotated, "
            f"a 0 for each of {layers} layers."
        )
    return tuple(i for i, is_rotated in enumerate(marks[:layers]) if not is_rotated)


def _rotation(data: dict[str, Any], where: Any) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling: apart in transformers 4, in one dict in 5."""
    scaling = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"{where} has rope_scaling {shown(scaling)}; expected an object, or null.")
    usual = THETAS.get(data["model_type"], 10000.0)
    theta = scaling.get("rope_theta", data.get("rope_theta", usual))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    share = scaling.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ValueError(f"{where} has rope_type {shown(kind)}; known are {sorted(ROPE_TYPES)}.")
    if share != 1.0:
        raise ValueError(
            f"{where} turns {shown(share)} of each head; only whole heads are known here."
        )
    if kind == "default":
        return theta, None
    return theta, {"rope_type": kind} | {name: scaling.get(name) for name in ROPE_TYPES[kind]}


def read_backbone(source: str | Path | Any) -> Backbone:
    """A pretrained backbone.

    Args:
        source: a folder with config.json and model.safetensors (or its shards and their index), a
            file in the GGUF format, or a causal language model of `transformers`, which is copied.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: a GGUF file, and the package `gguf` is not installed.
        ValueError: a file is cut short or foreign, or holds what has no place here.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_file():
            from .gguf import read_gguf

            return read_gguf(path)
        return _read_folder(path)
    if not hasattr(source, "config") or not hasattr(source, "state_dict"):
        raise ValueError(
            f"source is a {type(source).__name__}; expected a folder, a GGUF file, or a model of "
            "transformers."
        )
    state = {name: tensor.detach() for name, tensor in source.state_dict().items()}
    where = f"the config of {type(source).__name__}"
    return _backbone(source.config.to_dict(), state, where, None, copy=True)


def _read_folder(folder: Path) -> Backbone:
    data = read_json(folder / CONFIG)
    blank = None
    if (folder / "tokenizer.json").exists():
        model = read_json(folder / "tokenizer.json").get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):  # a list, as some are, has its ids in another form
            blank = next((vocabulary[b] for b in BLANKS if b in vocabulary), None)
    return _backbone(data, read_tensors(folder), folder / CONFIG, blank)


def _backbone(
    data: dict[str, Any],
    state: dict[str, Tensor],
    where: Any,
    blank: int | None,
    copy: bool = False,
) -> Backbone:
    """A backbone of Hugging Face's config and weights."""
    config = backbone_config(data, where)
    if config.tie_word_embeddings:
        state.pop(TOP_NAMES["lm_head"], None)
    shapes_there = {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not name.endswith("rotary_emb.inv_freq")  # which older files hold
    }
    check_tensors(shapes_there, config, backbone_name, where)

    def take(name: str) -> Tensor:
        tensor = state.pop(backbone_name(name))
        return tensor.clone() if copy else tensor

    return Backbone(config, take, blank)


def backbone_shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Our names and the shapes of a backbone's weights, which are all but the memories' own."""
    return named_parameters(shapes(CoMeTConfig(config, NO_MEMORY)))


def check_tensors(
    found: dict[str, tuple[int, ...]],
    config: BackboneConfig,
    stored: Callable[[str], str],
    where: Any,
) -> None:
    """Raise ValueError unless there are a backbone's weights, all of them and nothing else.

    Args:
        found: shapes by their names in the file.
        config: the backbone.
        stored: our name of a weight -> its name in the file.
        where: the file, for messages.
    """
    if config.num_hidden_layers > len(found):  # before a list of that length is made
        raise ValueError(
            f"{where} says {config.num_hidden_layers} layers, but there are {len(found)} tensors."
        )
    expected = {stored(name): shape for name, shape in backbone_shapes(config).items()}
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"the weights of {where} lack {missing[:4]} and hold unknown {unknown[:4]}; is this "
            "the config of these weights, and are all files there?"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{name} has shape {found[name]}, {where} says {shape}.")


class _Inputs(Recorder):
    """Keeps what goes into each layer at a text's first token, [d] each."""

    def begin(self, *_: Any, **__: Any) -> None:
        """Start a round, the only one."""
        self.found: list[Tensor] = []

    def layer(self, before: Tensor, *_: Any, **__: Any) -> None:
        """Record one layer."""
        self.found.append(before[0, 0].clone())


def _first_inputs(token: int, weights: dict[str, Any], config: BackboneConfig) -> list[Tensor]:
    """What goes into each layer of a backbone where a token is the whole text, [d] each."""
    plain, inputs = CoMeTConfig(config, NO_MEMORY), _Inputs()
    state = new_state(plain, weights["norm"].dtype)
    with torch.no_grad():
        for _ in read(torch.tensor([[token]]), state, weights, plain, recorder=inputs):
            pass
    return inputs.found


def plug_in(
    backbone: Backbone, memory: MemoryConfig, dtype: torch.dtype | None, seed: int
) -> tuple[CoMeTConfig, dict[str, Any]]:
    """A model of a backbone and fresh memories.

    What is new starts so that the backbone is disturbed little: compression tokens as a space,
    readout tokens at N(0, 0.02), all different, adapters that add nothing. A sink starts as what goes
    into its layer where a space, or else token 0, is all there is. Norms start at one, biases at
    zero, the rest at N(0, 0.02).

    Args:
        memory: the memories to add.
        dtype: of all weights; None is that of the embedding table.
        seed: of the new weights.

    Returns:
        The config; a nested dict of tensors on the CPU. A backbone can be plugged in once.

    Raises:
        ValueError: the tokenizer's space is no row of the embedding table.
    """
    config, rng = CoMeTConfig(backbone.config, memory), np.random.default_rng(seed)
    table = backbone.tensors("embed_tokens")
    dtype = dtype or table.dtype
    blank = backbone.blank
    if blank is not None and (type(blank) is not int or blank not in range(len(table))):
        raise ValueError(
            f"the tokenizer has a space at {shown(blank)}, the embedding table "
            f"{len(table)} rows; it is of another model, so put the right one in its place or take "
            "it away."
        )
    given = backbone_shapes(backbone.config)

    def start(name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "embed_tokens":
            return table.to(dtype)
        if name in given:
            return backbone.tensors(name).to(dtype)
        leaf = name.rpartition(".")[2]
        if name == "compression_embedding" and blank is not None:
            return table[blank].to(dtype).clone()
        if leaf in ("adapter_up", "sink") or leaf.endswith("bias"):
            return torch.zeros(shape, dtype=dtype)
        if leaf == "norm":
            return torch.ones(shape, dtype=dtype)
        return torch.from_numpy(rng.normal(0.0, 0.02, shape)).to(dtype)

    weights = map_parameters(start, shapes(config))
    if memory.sink_slot:  # the backbone is there by now
        sinks = _first_inputs(blank or 0, weights, backbone.config)
        for layer, sink in zip(weights["layers"], sinks, strict=True):
            layer["global_memory"]["sink"] = sink
    return config, weights
