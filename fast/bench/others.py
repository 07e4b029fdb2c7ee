"""Ours beside other models of one backbone, with the same weights: transformers' own, its sliding
window, and full attention by our code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..model import CoMeTModel
from .pretrained import decode, import_transformers
from .speed import Case, take_turns

__all__ = ["CONTESTANTS", "EAGER", "measure_others"]

CONTESTANTS = (
    "ours",
    "full attention",
    "transformers",
    "transformers, eager",
    "sliding window",
)
"""In the order of the tables. The window is transformers' too: each token sees as many as ours has
memory slots, the text is read a chunk at a time, and only a window's keys are kept."""

EAGER = 4096
"""Tokens of the longest text that "transformers, eager" reads: it holds all scores of a layer."""


def _theirs(case: Case, attention: str, window: int | None = None) -> Any:
    """The backbone in transformers, fresh."""
    transformers = import_transformers()
    backbone = case.config.backbone
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps"),
    )
    sizes = {name: getattr(backbone, name) for name in names}
    kind: Any = transformers.LlamaConfig
    if window is not None:
        kind, sizes["sliding_window"] = transformers.MistralConfig, window
    config = kind(**sizes, max_position_embeddings=2**20, attn_implementation=attention)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.inference_mode()
def measure_others(
    case: Case, lengths: Sequence[int], new: int
) -> dict[int, dict[str, dict[str, list[float]]]]:
    """Reading whole texts from their start, up to the last token's logits, and decoding after them.

    Args:
        case: what to measure.
        lengths: tokens of the texts.
        new: tokens to decode in a turn.

    Returns:
        Per length, "reading" and "decoding": seconds of each contestant, of decoding those a token.

    Raises:
        AssertionError: those that compute the same do not agree.
        ImportError: the package `transformers` is not installed.
    """
    memory = case.config.memory
    slots = memory.global_memory_size + memory.temporary_memory_size
    sdpa, eager = _theirs(case, "sdpa"), _theirs(case, "eager")
    window = _theirs(case, "sdpa", slots)
    for model in (eager, window):
        model.load_state_dict(sdpa.state_dict())
    ours = CoMeTModel.from_backbone(sdpa, memory)
    full = CoMeTModel.from_backbone(sdpa, case.plain.memory)
    _check_same(full, sdpa, eager, window, slots)
    found: dict[int, dict[str, dict[str, list[float]]]] = {}
    models = dict(zip(CONTESTANTS, (ours, full, sdpa, eager, window), strict=True))
    pieces = {"sliding window": memory.chunk_size}
    for length in lengths:
        ids = torch.randint(case.config.backbone.vocab_size, (case.batch_size, length))
        readers = {
            name: partial(_read, model, ids, pieces.get(name, length))
            for name, model in models.items()
            if name != "transformers, eager" or length <= EAGER
        }
        reading = take_turns(readers, case.rounds)
        writers = {
            name: _decoding(models[name], read(), ids[:, -1:], length, new)
            for name, read in readers.items()
        }
        decoding = take_turns(writers, case.rounds)
        found[length] = {
            "reading": reading.seconds,
            "decoding": {
                name: [s / new for s in turns] for name, turns in decoding.seconds.items()
            },
        }
    return found


def _read(model: Any, ids: Tensor, size: int) -> Any:
    """A model's output after a text, of which transformers' gets so many tokens at a time."""
    if isinstance(model, CoMeTModel):
        return model(ids, logits="last")
    out, cache = None, None
    for piece in ids.split(size, dim=1):
        out = model(input_ids=piece, cache=cache, use_cache=True, logits_to_keep=1)
        cache = out.cache
    return out


def _decoding(model: Any, read: Any, last: Tensor, length: int, new: int) -> Callable[[], object]:
    """A turn of decoding after a text that was read; each goes on from the text's end."""
    if isinstance(model, CoMeTModel):
        return lambda: model.generate(last, read.state, new)
    cache = read.cache
    grows = cache.get_seq_length() == length and cache.layers[0].keys.shape[2] == length

    def turn() -> None:
        decode(model, cache, last, new)
        if grows:
            cache.crop(-new)  # what the turn has put in

    return turn


def _check_same(full: CoMeTModel, sdpa: Any, eager: Any, window: Any, slots: int) -> None:
    """Raise AssertionError unless all give the same logits, within a window."""
    ids = torch.randint(full.config.backbone.vocab_size, (1, min(slots, 24)))
    expected = sdpa(input_ids=ids).logits
    for name, logits in (
        ("full attention", full(ids).logits),
        ("transformers, eager", eager(input_ids=ids).logits),
        ("sliding window", window(input_ids=ids).logits),
    ):
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3, msg=name)
