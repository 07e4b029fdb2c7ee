"""Official CoMeT checkpoints: their names and special tokens, in and out."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_api_compat import array_namespace

from reference.config import BackboneConfig, CoMeTConfig, MemoryConfig
from reference.parameters import map_parameters, named_parameters, shapes

from ..arrays import Array, shown
from ..checkpoints import (
    CONFIG,
    MODEL,
    check_layers,
    check_weights,
    named_tensors,
    of_file,
    read_json,
    read_tensors,
    refuse_broken,
    take_tensor,
)
from ..files import atomic_save, atomic_write

__all__ = [
    "LAYER_NAMES",
    "TOP_NAMES",
    "PublishedIds",
    "load_published",
    "published_name",
    "save_published",
]

TOP_NAMES = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
"""Our name of a weight outside the layers -> the published one."""

LAYER_NAMES = {
    "q_proj": "inner_layer.self_attn.q_proj.weight",
    "k_proj": "inner_layer.self_attn.k_proj.weight",
    "v_proj": "inner_layer.self_attn.v_proj.weight",
    "o_proj": "inner_layer.self_attn.o_proj.weight",
    "q_bias": "inner_layer.self_attn.q_proj.bias",
    "k_bias": "inner_layer.self_attn.k_proj.bias",
    "v_bias": "inner_layer.self_attn.v_proj.bias",
    "q_norm": "inner_layer.self_attn.q_norm.weight",
    "k_norm": "inner_layer.self_attn.k_norm.weight",
    "gate_proj": "inner_layer.mlp.gate_proj.weight",
    "up_proj": "inner_layer.mlp.up_proj.weight",
    "down_proj": "inner_layer.mlp.down_proj.weight",
    "input_layernorm": "inner_layer.input_layernorm.weight",
    "post_attention_layernorm": "inner_layer.post_attention_layernorm.weight",
    "global_memory.norm": "global_memory_net.norm.weight",
    "global_memory.gate": "global_memory_net.g_proj.weight",
    "global_memory.adapter_down": "global_memory_net.o_proj.down_proj.weight",
    "global_memory.adapter_up": "global_memory_net.o_proj.up_proj.weight",
    "temporary_memory.norm": "temp_memory_net.0.weight",
    "temporary_memory.adapter_down": "temp_memory_net.1.down_proj.weight",
    "temporary_memory.adapter_up": "temp_memory_net.1.up_proj.weight",
}
"""Our name of a layer's weight -> the published one."""

SPECIAL = ("compression_embedding", "readout_embeddings")
"""Our weights that are rows of the embedding table there."""

SHARED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "tie_word_embeddings",
)
"""Fields of BackboneConfig that the published config has under the same name."""

MEMORY_FIELDS = (
    "chunk_size",
    "global_memory_size",
    "temporary_memory_size",
    "compression_stride",
)
"""Fields of MemoryConfig that the published config has under other names."""

PUBLISHED_RANK = 8
"""Adapter rank that the published code knows."""

FIXED_BACKBONE = {"qk_norm": True, "attention_bias": False, "unrotated_layers": ()}
FIXED_MEMORY = {
    "adapter_rank": PUBLISHED_RANK,
    "gate": "scalar",
    "gate_bias": False,
    "gate_saturation": 1.0,
    "trailing_compression": True,
    "global_norm_eps": None,
    "temporary_norm_eps": 1e-12,
    "sink_slot": False,
}
"""What the published code goes by, in fields that its config has no place for."""


def published_name(name: str) -> str:
    """Published name of one of our weights: "layers.0.q_proj" -> "model.layers.0.inner_layer...".

    Args:
        name: dotted, as `reference.parameters.named_parameters` gives it; not the compression or
            readout embeddings, which are rows of a table there.
    """
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest]}"


@dataclass(frozen=True)
class PublishedIds:
    """Rows of the published embedding table that are not text."""

    compression: int
    """temp_beacon_id."""

    readout: tuple[int, ...]
    """global_beacon_ids."""

    placeholder: int
    """placeholder_id, which stands where memory slots go."""


def load_published(
    folder: Path, framework: str = "pt"
) -> tuple[CoMeTConfig, dict[str, Any], PublishedIds]:
    """Read an official CoMeT checkpoint.

    The compression and readout embeddings are copied out of the embedding table, whose rows stay
    where they are, so that ids and logits are the published ones.

    Returns:
        The config; a nested dict of tensors on the CPU; the rows of the special tokens.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short, foreign, or does not fit the config.
    """
    data = read_json(folder / CONFIG)
    tensors = read_tensors(folder, framework)
    config = _read_config(data, tensors, folder)
    check_layers(config, tensors, folder)
    _refuse_unknown(tensors, config, folder)
    ids = PublishedIds(
        data["temp_beacon_id"], tuple(data["global_beacon_ids"]), data["placeholder_id"]
    )
    table = take_tensor(tensors, TOP_NAMES["embed_tokens"], "embed_tokens", folder)
    used = [ids.compression] * config.memory.has_temporary + list(ids.readout)
    if any(not 0 <= i < len(table) for i in used):
        raise ValueError(
            f"{folder / CONFIG} puts special tokens at {used}, outside the table's {len(table)} rows."
        )

    def fetch(name: str, _: Any) -> Array:
        if name == "compression_embedding":
            return table[[ids.compression]][0]
        if name == "readout_embeddings":
            return table[list(ids.readout)]
        return take_tensor(tensors, published_name(name), name, folder)

    weights = map_parameters(fetch, shapes(config))
    check_weights(weights, config)
    return config, weights, ids


def save_published(
    folder: Path, config: CoMeTConfig, weights: Any, ids: PublishedIds | None = None
) -> PublishedIds:
    """Write an official CoMeT checkpoint.

    The compression and readout embeddings become rows of the table, and every row has a logit. A
    tied output makes it from the row itself; an output of its own gets new rows of zeros, so that
    the logit is 0. Logits of text stay as they are. But the special rows take part in the softmax,
    so loss and sampling change a little, and decoding can give such an id.

    Args:
        folder: made where it does not exist; files in it are replaced.
        config: of the model.
        weights: nested dict or `ParameterTree` of tensors.
        ids: the rows; None appends new ones after the vocabulary.

    Returns:
        The rows used.

    Raises:
        ValueError: a weight holds NaN or infinity; the model has what the published code does not
            know (a vector gate, a bias or saturation of the gate, no q/k norm, another adapter
            rank, any field that it has no place for); or ids do not fit. Nothing is written.
    """
    _check_publishable(config)
    memory, tied = config.memory, config.backbone.tie_word_embeddings
    named = named_tensors(config, weights)
    refuse_broken(named)
    xp = array_namespace(named["embed_tokens"])
    table = xp.asarray(named["embed_tokens"], copy=True)
    head = None if tied else named["lm_head"]
    vocab = len(table)
    if ids is None:
        extra = 2 + memory.global_memory_size
        ids = PublishedIds(vocab, tuple(range(vocab + 1, vocab + extra - 1)), vocab + extra - 1)
        rows = xp.zeros_like(table[[0] * extra])
        table = xp.concat([table, rows])
        head = None if head is None else xp.concat([head, rows])
    _check_ids(ids, memory.global_memory_size, len(table))
    if memory.has_temporary:
        table[ids.compression] = named["compression_embedding"]
    if memory.has_global:
        table[list(ids.readout)] = named["readout_embeddings"]
    tensors = {published_name(n): tensor for n, tensor in named.items() if n not in SPECIAL}
    tensors[TOP_NAMES["embed_tokens"]] = table
    if head is not None:
        tensors[TOP_NAMES["lm_head"]] = head
    data = _config_data(config, ids, table)
    atomic_save(folder / MODEL, tensors, {"format": "pt"})
    atomic_write(folder / CONFIG, json.dumps(data, indent=2) + "\n")
    return ids


def _read_config(data: dict[str, Any], tensors: dict[str, Array], folder: Path) -> CoMeTConfig:
    """Our config from the published one; the adapters' rank is told by the weights alone."""
    needed = (
        *("vocab_size", "chunk_size", "temp_beacon_stride", "temp_mem_budget"),
        *("global_beacon_ids", "placeholder_id"),
        *(name for name in SHARED_FIELDS if name != "rope_scaling"),
    )
    missing = [name for name in needed if name not in data]
    if missing:
        raise ValueError(f"{folder / CONFIG} lacks {missing}; is the file whole?")
    readout = data["global_beacon_ids"]
    special = [data["temp_beacon_id"], data["placeholder_id"], data["temp_beacon_stride"]]
    special += readout if isinstance(readout, list) else [None]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in special):
        raise ValueError(
            f"{folder / CONFIG} has temp_beacon_id {shown(data['temp_beacon_id'])}, placeholder_id "
            f"{shown(data['placeholder_id'])}, temp_beacon_stride "
            f"{shown(data['temp_beacon_stride'])} and global_beacon_ids {shown(readout)}; expected "
            "integers, and a list of them."
        )
    for name, known in (("hidden_act", "silu"), ("use_sliding_window", False)):
        if data.get(name, known) != known:
            raise ValueError(
                f"{folder / CONFIG} has {name} {data[name]!r}, which changes the equations; only "
                f"{known!r} is known here."
            )
    down = [
        t for name, t in tensors.items() if name.endswith("down_proj.weight") and "_net." in name
    ]
    shared: dict[str, Any] = {name: data.get(name) for name in SHARED_FIELDS}
    with of_file(folder / CONFIG):
        return CoMeTConfig(
            BackboneConfig(vocab_size=data["vocab_size"], qk_norm=True, **shared),
            MemoryConfig(
                chunk_size=data["chunk_size"],
                global_memory_size=len(readout),
                temporary_memory_size=data["temp_mem_budget"],
                compression_stride=max(data["temp_beacon_stride"], 0),
                adapter_rank=len(down[0]) if down else PUBLISHED_RANK,
            ),
        )


def _config_data(config: CoMeTConfig, ids: PublishedIds, table: Array) -> dict[str, Any]:
    """The published config, for JSON."""
    memory = config.memory
    data = {
        "architectures": ["MemQwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "vocab_size": len(table),
        "chunk_size": memory.chunk_size,
        "temp_beacon_stride": memory.compression_stride or -1,
        "temp_mem_budget": memory.temporary_memory_size,
        "temp_beacon_id": ids.compression,
        "global_beacon_ids": list(ids.readout),
        "placeholder_id": ids.placeholder,
        "torch_dtype": str(table.dtype).removeprefix("torch."),
    }
    return data | {name: getattr(config.backbone, name) for name in SHARED_FIELDS}


def _refuse_unknown(tensors: dict[str, Array], config: CoMeTConfig, folder: Path) -> None:
    """Raise where a published checkpoint holds what the model would leave out without a word."""
    used = {
        published_name(name) for name in named_parameters(shapes(config)) if name not in SPECIAL
    }
    used |= set(TOP_NAMES.values())  # lm_head may be there though it is tied
    layers = range(config.backbone.num_hidden_layers)  # nets of a memory that is off do nothing
    unused = {f"model.layers.{i}.{name}" for i in layers for name in LAYER_NAMES.values()}
    used |= {name for name in unused if "_memory_net." in name}
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise ValueError(
            f"{folder} holds {unknown[:4]}, which this model has no place for; its logits would not "
            "be the checkpoint's."
        )


def _check_ids(ids: PublishedIds, readouts: int, size: int) -> None:
    """Raise where the special rows do not fit a table of `size` rows."""
    rows = [ids.compression, *ids.readout, ids.placeholder]
    inside = all(0 <= row < size for row in rows)
    if len(ids.readout) != readouts or not inside or len(set(rows)) < len(rows):
        raise ValueError(
            f"ids are {ids}; expected {readouts} readout rows, all rows different "
            f"and in [0, {size})."
        )


def _check_publishable(config: CoMeTConfig) -> None:
    """Raise where the published code does not know what the model has: a field that it has no place
    for, whichever that is, may only have the value that the published code goes by, or else its
    default.
    """
    for part, names, fixed in (
        ("backbone", ("vocab_size", *SHARED_FIELDS), FIXED_BACKBONE),
        ("memory", MEMORY_FIELDS, FIXED_MEMORY),
    ):
        for field in dataclasses.fields(getattr(config, part)):
            value = getattr(getattr(config, part), field.name)
            known = fixed.get(field.name, field.default)
            if (field.name in fixed or field.name not in names) and value != known:
                wanted = "no such field" if known is dataclasses.MISSING else f"{known!r} only"
                raise ValueError(
                    f"{part}.{field.name} is {value!r}; the published code knows {wanted}. Save the "
                    "model with save_pretrained instead."
                )
