"""Backbones in llama.cpp's format GGUF, quantised or not, read with the package `gguf`."""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference.config import BackboneConfig
from reference.layers import rotary_frequencies

from .backbones import BLANKS, Backbone, backbone_config, check_tensors

__all__ = ["gguf_name", "read_gguf"]

TOP = {
    "embed_tokens": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
}
"""Our name of a weight outside the layers -> GGUF's."""

LAYER = {
    "q_proj": "attn_q.weight",
    "k_proj": "attn_k.weight",
    "v_proj": "attn_v.weight",
    "o_proj": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "gate_proj": "ffn_gate.weight",
    "up_proj": "ffn_up.weight",
    "down_proj": "ffn_down.weight",
    "input_layernorm": "attn_norm.weight",
    "post_attention_layernorm": "ffn_norm.weight",
}
"""Our name of a layer's weight -> GGUF's."""

FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
"""Hugging Face's field -> GGUF's, after the architecture's name."""


DIVISORS = "rope_freqs.weight"
"""What the rotary frequencies are divided by: Llama 3's rotation, [e / 2]."""

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The rotation of all of Llama 3.1, 3.2 and 3.3, but for its factor, the largest of `DIVISORS`."""

PAIRED = ("llama", "smollm3")
"""Architectures whose rows of q and k are stored in the order of llama.cpp's rotation."""

LONG = ("tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
"""Fields as long as a vocabulary that are not looked at."""


def _plain(value: Any) -> Any:
    """A field's value; numbers are stored as float32, whose shortest form is what was meant."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _check_divisors(divisors: np.ndarray, config: BackboneConfig, path: Path) -> None:
    """Raise ValueError unless a config divides the rotary frequencies by what the file stores, whose
    own frequencies were float32.
    """
    plain = rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
    ours = plain / rotary_frequencies(config)
    if divisors.shape != ours.shape or not np.allclose(divisors, ours, rtol=1e-6, atol=0):
        raise ValueError(
            f"{path} holds {DIVISORS} that is not Llama 3's of {LLAMA3}, and no other is known; take "
            "that model's folder of safetensors."
        )


def gguf_name(name: str) -> str:
    """GGUF's name of one of our weights: "layers.0.q_proj" -> "blk.0.attn_q.weight"."""
    if name in TOP:
        return TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{LAYER[rest]}"


def read_gguf(path: Path) -> Backbone:
    """A backbone from a GGUF file.

    Quantised weights become float32 as they are asked for.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: the file is cut short or foreign, or holds what has no place here.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{path} is a GGUF file, and the package gguf is not installed; run pip install "
            '"comet-memory[pretrained]", or give a folder of safetensors.'
        ) from error

    class Reader(GGUFReader):
        """It keeps a view for each token of a vocabulary: plain ones take a fraction of the time and
        memory that those of NumPy's class of mapped files take.
        """

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "data":
                self.mapping, value = value.base, np.asarray(value)
            super().__setattr__(name, value)

    try:
        reader = Reader(path)
        fields = {
            name: _plain(field.contents())
            for name, field in reader.fields.items()
            if name not in LONG
        }
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{path} is not a readable GGUF file ({error!r}); is it whole?") from error
    family = fields.get("general.architecture")
    mapping, stored = reader.mapping, {tensor.name: tensor for tensor in reader.tensors}
    found = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in stored.items()}
    data: dict[str, Any] = {
        name: fields[f"{family}.{theirs}"]
        for name, theirs in FIELDS.items()
        if f"{family}.{theirs}" in fields
    }
    scaling = fields.get(f"{family}.rope.scaling.type", "none")
    data |= {
        "model_type": family,
        "vocab_size": found.get(TOP["embed_tokens"], (0,))[0],
        "tie_word_embeddings": TOP["lm_head"] not in found,
        "use_sliding_window": data.pop("sliding_window", None) is not None,
    }
    if scaling != "none":
        factor = fields.get(f"{family}.rope.scaling.factor")
        data["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    divisors = None
    if family == "llama" and scaling == "none" and found.pop(DIVISORS, None):
        divisors = np.asarray(stored.pop(DIVISORS).data, np.float64)
        data["rope_scaling"] = LLAMA3 | {"factor": float(divisors.max(initial=0))}
    # Of SmolLM3 it does not say which layers rotate: as in llama.cpp, each fourth does not.
    config = backbone_config(data, path)
    if divisors is not None:
        _check_divisors(divisors, config, path)
    turned = fields.get(f"{family}.rope.dimension_count", config.head_dim)
    if turned != config.head_dim:
        raise ValueError(
            f"{path} turns {turned} of the {config.head_dim} channels of a head; only whole heads "
            "are known here."
        )
    check_tensors(found, config, gguf_name, path)

    def take(name: str) -> Tensor:
        tensor = stored.pop(gguf_name(name))
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if hasattr(mmap, "MADV_DONTNEED"):  # what was read of the file need not stay in memory
            mapping.madvise(mmap.MADV_DONTNEED)
        weight = weight.reshape(found[tensor.name])
        if family in PAIRED and name.endswith(("q_proj", "k_proj")):
            # Its rows were put in pairs (j, j + e/2) side by side.
            pairs = weight.view(-1, config.head_dim // 2, 2, config.hidden_size)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        return weight

    tokens = fields.get("tokenizer.ggml.tokens", [])
    blank = next((tokens.index(b) for b in BLANKS if b in tokens), None)
    return Backbone(config, take, blank)
