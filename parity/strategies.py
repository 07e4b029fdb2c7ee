"""Random models, texts and splits, made to hit the corners.

Sizes are small, so that a case takes milliseconds and its smallest form can be read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fast import BackboneConfig, CoMeTConfig, CoMeTModel, MemoryConfig
from reference.config import GATES
from reference.parameters import map_parameters, shapes

from .device import tensors

VOCAB = 11

ROPE_SCALINGS = (
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)


@st.composite
def backbones(draw: st.DrawFn) -> BackboneConfig:
    """Llama-, Qwen2-, Qwen3- and SmolLM3-like: one layer to three, one head, grouped heads."""
    keys = draw(st.sampled_from([1, 2]))
    scaling = draw(st.sampled_from([None, None, *ROPE_SCALINGS]))
    layers = draw(st.integers(1, 3))
    unrotated = draw(st.one_of(st.just(set()), st.sets(st.integers(0, layers - 1))))
    return BackboneConfig(
        vocab_size=VOCAB,
        hidden_size=draw(st.sampled_from([4, 6])),
        intermediate_size=draw(st.sampled_from([3, 8])),
        num_hidden_layers=layers,
        num_attention_heads=keys * draw(st.sampled_from([1, 2])),
        num_key_value_heads=keys,
        head_dim=draw(st.sampled_from([2, 4])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        rope_scaling=scaling,
        qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        unrotated_layers=tuple(sorted(unrotated)),
    )


@st.composite
def memories(draw: st.DrawFn) -> MemoryConfig:
    """Every regime: each memory on and off, the queue smaller and larger than a chunk's entries,
    a stride that divides the chunk, does not, and exceeds it."""
    slots = draw(st.sampled_from([0, 1, 2, 3]))
    return MemoryConfig(
        chunk_size=draw(st.integers(1, 7)),
        global_memory_size=slots,
        temporary_memory_size=draw(st.sampled_from([1, 2, 3, 5, 40])),
        compression_stride=draw(st.sampled_from([0, 1, 2, 3, 9])),
        adapter_rank=draw(st.sampled_from([1, 2])),
        gate=draw(st.sampled_from(GATES)),
        gate_bias=draw(st.booleans()),
        gate_saturation=draw(st.sampled_from([1.0, 0.5])),
        trailing_compression=draw(st.sampled_from([True, True, False])),
        global_norm_eps=draw(st.sampled_from([None, 1e-3])),
        temporary_norm_eps=draw(st.sampled_from([1e-12, 1e-3])),
        sink_slot=slots > 0 and draw(st.booleans()),
    )


@st.composite
def configs(draw: st.DrawFn) -> CoMeTConfig:
    """A backbone with memories."""
    return CoMeTConfig(draw(backbones()), draw(memories()))


def random_weights(config: CoMeTConfig, seed: int) -> dict[str, Any]:
    """Weights of a size at which every part matters: no norm is one, no bias zero."""
    rng = np.random.default_rng(seed)

    def start(name: str, shape: Any) -> np.ndarray:
        leaf = name.rsplit(".", 1)[-1]
        if leaf.endswith("norm"):
            return rng.uniform(0.5, 1.5, shape)
        return rng.normal(0.0, 0.7, shape)

    return map_parameters(start, shapes(config))


def even_weights(config: CoMeTConfig, seed: int) -> dict[str, Any]:
    """`random_weights` whose products are as large as what they are given: nothing is blown up."""

    def even(name: str, p: np.ndarray) -> np.ndarray:
        return p / (0.7 * p.shape[-1] ** 0.5) if p.ndim == 2 and "embed" not in name else p

    return map_parameters(even, random_weights(config, seed))


def nudged(params: dict[str, Any], seed: int, epsilon: float) -> dict[str, Any]:
    """Every weight moved by at most a relative epsilon."""
    rng = np.random.default_rng(seed)
    return map_parameters(lambda _, p: p * (1 + epsilon * rng.uniform(-1, 1, p.shape)), params)


def random_model(config: CoMeTConfig, seed: int, dtype: torch.dtype = torch.float64) -> CoMeTModel:
    """The fast model with `random_weights`, on the device."""
    return CoMeTModel(config, tensors(random_weights(config, seed), dtype))


def widened(config):
    """The default epsilon is the dtype's own, float32's at least: for float64 to have the same."""
    eps = config.memory.global_norm_eps or float(np.finfo(np.float32).eps)
    memory = dataclasses.replace(config.memory, global_norm_eps=eps)
    return dataclasses.replace(config, memory=memory)


seeds = st.integers(0, 2**16)


def queue_entries(config: CoMeTConfig, n: int) -> int:
    """Entries that a text of n tokens, its last chunk left open, has put into the queue, however
    many stay. A full group's compression token is read when the next text token comes, or the
    chunk closes."""
    memory = config.memory
    size, stride = memory.chunk_size, memory.compression_stride
    if not stride:
        return 0
    full, last = divmod(n - 1, size)
    closed = -(-size // stride) if memory.trailing_compression else (size - 1) // stride
    return full * closed + last // stride


def corner_lengths(config: CoMeTConfig) -> st.SearchStrategy[int]:
    """Text lengths around multiples of the chunk: k * chunk - 1, k * chunk, k * chunk + 1; those
    that just fill the queue; and any others, shorter than a chunk too."""
    size, capacity = config.memory.chunk_size, config.memory.temporary_memory_size
    around = {k * size + j for k in range(1, 5) for j in (-1, 0, 1)}
    anywhere = range(1, 4 * size + 3)
    filling = [n for n in anywhere if queue_entries(config, n) == capacity]
    strategies = [st.sampled_from(sorted(n for n in around if n >= 1)), st.sampled_from(anywhere)]
    return st.one_of(*strategies, *([st.sampled_from(filling)] if filling else []))


@st.composite
def texts(draw: st.DrawFn, config: CoMeTConfig) -> list[int]:
    """Token ids of a corner length."""
    n = draw(corner_lengths(config))
    return np.random.default_rng(draw(seeds)).integers(0, VOCAB, n).tolist()


@st.composite
def splits(draw: st.DrawFn, n: int) -> list[int]:
    """Sizes of the calls that a text of n tokens is fed in, adding up to n."""
    sizes: list[int] = []
    while sum(sizes) < n:
        left = n - sum(sizes)
        sizes.append(min(left, draw(st.sampled_from([1, 1, 2, 3, 5, 8, 30]))))
    return sizes


@st.composite
def cases(draw: st.DrawFn) -> tuple[CoMeTConfig, int, list[int]]:
    """A config, a seed of its weights, and a text."""
    config = draw(configs())
    return config, draw(seeds), draw(texts(config))


def pieces(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """The text cut into calls."""
    cut = np.cumsum([0, *sizes])
    return [ids[a:b] for a, b in zip(cut[:-1], cut[1:], strict=True)]
