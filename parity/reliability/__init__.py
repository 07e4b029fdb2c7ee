"""What files, calls and command lines have to bear: random damage, and what may come of it.

An attempt is made on a case that a strategy drew. It says in a word what came of it, and fails, as
an assertion does, where something wrong was taken for right, or told in another way than in a
sentence. The suite makes some attempts of each kind, and `python -m parity.reliability` many.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fast import CoMeTConfig, CoMeTModel, CoMeTState
from fast.checkpoints import write_training
from fast.cupy_engine import CoMeTEngine

from ..strategies import random_model

TEXT = torch.arange(14).reshape(2, 7) % 11


def small(backbone: dict | None = None, memory: dict | None = None) -> CoMeTConfig:
    """A config of a few hundred weights, and fields changed by name."""
    return CoMeTConfig.from_dict(
        {
            "backbone": {
                "vocab_size": 11,
                "hidden_size": 6,
                "intermediate_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 4,
                **(backbone or {}),
            },
            "memory": {
                "chunk_size": 4,
                "global_memory_size": 2,
                "temporary_memory_size": 3,
                "compression_stride": 2,
                **(memory or {}),
            },
        }
    )


def same_weights(found: CoMeTModel, expected: CoMeTModel) -> bool:
    return found.config == expected.config and all(
        torch.equal(x, expected.state_dict()[name]) for name, x in found.state_dict().items()
    )


REFUSED, AS_BEFORE, WORKED = "refused", "as before", "worked"
"""What may come of an attempt: a sentence; a file that holds what it held; a call that did well."""

SENTENCE = 1000
"""Characters that a sentence has at most, paths among them."""


def told(error: BaseException, *words: str) -> str:
    """A sentence, not a page; one that names what is wrong, where words for that are given."""
    text = str(error)
    assert text, f"{type(error).__name__} without a word"
    assert "\n" not in text.strip(), text
    assert len(text) < SENTENCE, text
    assert not words or any(word in text for word in words), text
    return REFUSED


FILES = ("state", "model/model.safetensors", "model/config.json", "training")
"""What `save_all` writes."""


def save_all(folder: Path, model: CoMeTModel, state: CoMeTState, number: int) -> None:
    state.save(folder / "state", model)
    model.save_pretrained(folder / "model")
    write_training(folder / "training", model.state_dict(), {"number": number})


@dataclass
class Subject:
    """A model, an engine on its weights, and a state of each, in memory and in a folder's files."""

    folder: Path
    model: CoMeTModel
    engine: CoMeTEngine
    state: CoMeTState
    engine_state: CoMeTState

    @classmethod
    def make(cls, folder: Path) -> Subject:
        """Make them, and write `FILES`."""
        model = random_model(small(), 0)
        engine = CoMeTEngine.from_model(model, library="numpy")
        with torch.no_grad():
            state = model(TEXT, lengths=[7, 5], logits="none").state
        save_all(folder, model, state, 0)
        return cls(folder, model, engine, state, state.to(engine))
