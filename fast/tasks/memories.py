"""Train the memories of a pretrained backbone, which stays as it is: `train`.

Each step reads one text, prose with a pass key hidden in it, and then asks for the key. Some passages
of the prose stand there twice, so that much can be told from what is gone. Two losses: that of every
token of the prose, which teaches the memories to disturb little and to tell of what is gone; and that
of the key's tokens, which teaches them to keep what is asked for. The gradient goes back through the
whole text. Only the memories' own weights move, so what is trained is a file of a
few megabytes (`CoMeTModel.save_memories`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference.config import MemoryConfig
from reference.parameters import named_parameters

from ..checkpoints import read_training, write_training
from ..files import check_regular
from ..inputs import check_count
from ..model import IGNORE, CoMeTModel
from ..pretrained.memories import memory_names
from ..pretrained.text import ByteText, TokenText, open_text
from .passkey import INFORMATION, QUESTION, draw_number

__all__ = [
    "MEMORY",
    "KeyText",
    "Recipe",
    "Trainer",
    "hide_key",
    "read_tokens",
    "repeat_passages",
    "split_tokens",
    "table",
]

MEMORY = MemoryConfig(
    chunk_size=256, global_memory_size=8, temporary_memory_size=128, compression_stride=8
)
"""The memories of the recipe."""

HELD_OUT = 10
"""The last tenth of a document is not trained on."""


@dataclass(frozen=True)
class Recipe:
    """What to do."""

    memory: MemoryConfig = MEMORY
    """The memories to train."""

    steps: int = 400
    """Texts to train on."""

    chunks: int = 8
    """Chunks of the longest text; a step's length is drawn evenly from one chunk's to that."""

    learning_rate: float = 3e-3
    """Of AdamW at the start; it falls to zero in a straight line."""

    warmup: int = 20
    """Steps over which it rises before."""

    answer_weight: float = 0.5
    """Of the loss of the key's tokens, beside that of the prose."""

    repeated: float = 0.3
    """Share of a text that is written over by passages from before."""

    passage: int = 48
    """Tokens of such a passage."""

    autocast: bool = True
    """Whether products are computed in bfloat16, which takes half the time where a processor has it;
    the memories' weights are float32 all the same."""

    seed: int = 0
    """Of the memories' start, and of the texts."""


@dataclass(frozen=True)
class KeyText:
    """A text with a key in it, and the question for it. Token ids, int64."""

    text: np.ndarray
    """[n] prose, the key's sentence somewhere in it."""

    question: np.ndarray
    """[q]."""

    answer: np.ndarray
    """[a] what is to follow the question: the key."""


def read_tokens(path: Path, text: ByteText | TokenText) -> np.ndarray:
    """A document's token ids, [n] int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a text of the tokenizer's.
    """
    check_regular(path)
    ids: list[int] = []
    with path.open("rb") as file:
        size, place = path.stat().st_size, 0
        while place < size:
            piece, place = text.read_piece(file, place)
            ids += piece
    return np.array(ids, dtype=np.int64)


def split_tokens(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What of a document is trained on, and its last tenth, which is held out."""
    end = len(ids) - len(ids) // HELD_OUT
    return ids[:end], ids[end:]


def repeat_passages(
    prose: np.ndarray, share: float, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Prose in which some passages stand again later, in place of what was there.

    Args:
        prose: [n] token ids; they are left as they are.
        share: of the tokens that are written over, at most.
        size: tokens of a passage.
        rng: source of the places.

    Returns:
        [n].
    """
    found = prose.copy()
    for _ in range(int(share * len(prose)) // size):
        first, again = np.sort(rng.integers(len(prose) - size + 1, size=2))
        if again - first >= size:
            found[again : again + size] = found[first : first + size]
    return found


def hide_key(
    prose: np.ndarray,
    length: int,
    depth: float,
    text: Any,
    rng: np.random.Generator,
    split: str = "train",
    repeats: tuple[float, int] | None = None,
) -> KeyText:
    """A part of some prose with a pass key in it.

    Args:
        prose: token ids; the part is drawn from them.
        length: tokens of the text, the key's sentence among them.
        depth: from 0 to 1, where the sentence stands.
        text: what makes tokens, see `open_text`.
        rng: source of the part and the key.
        split: of the keys, see `draw_number`.
        repeats: share and size of `repeat_passages`; None leaves the part as it is.

    Raises:
        ValueError: the prose is shorter than the text.
    """
    key = draw_number(rng, split)
    sentence = np.array(text.encode("\n" + INFORMATION.format(key=key) + "\n"), dtype=np.int64)
    rest = length - len(sentence)
    if not 0 <= rest <= len(prose):
        raise ValueError(
            f"a text of {length} tokens needs at least {len(sentence)} for the key and "
            f"{max(rest, 0)} of prose; there are {len(prose)}. Give a longer document."
        )
    start = int(rng.integers(len(prose) - rest + 1))
    part, place = prose[start : start + rest], round(depth * rest)
    if repeats is not None:
        part = repeat_passages(part, *repeats, rng)
    asked, told = (text.encode(words) for words in ("\n" + QUESTION, f" {key}"))
    return KeyText(
        np.concatenate([part[:place], sentence, part[place:]]),
        np.array(asked, dtype=np.int64),
        np.array(told, dtype=np.int64),
    )


class Trainer:
    """Trains a backbone's memories; `run` goes on from the folder's checkpoint where there is one.

    Args:
        backbone: a folder or a GGUF file, with its tokenizer.
        documents: prose to train on; the last tenth of each is left out.
        recipe: what to do.
        folder: of the run.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not fit, or the folder is of another run.
    """

    def __init__(
        self, backbone: Path, documents: Sequence[Path], recipe: Recipe, folder: Path
    ) -> None:
        check_count("steps", recipe.steps, 1)
        self.recipe, self.folder = recipe, folder
        self.model = CoMeTModel.from_backbone(backbone, recipe.memory, seed=recipe.seed)
        self.text: Any = open_text(backbone, self.model.config.backbone.vocab_size)
        parts = [split_tokens(read_tokens(path, self.text))[0] for path in documents]
        self.prose = np.concatenate(parts)
        weights = named_parameters(self.model.weights.to_dict())
        self.model.requires_grad_(False)
        self.trained = {name: weights[name] for name in memory_names(self.model.config)}
        for p in self.trained.values():
            p.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.log: list[dict[str, float]] = []
        self._load()

    @property
    def checkpoint(self) -> Path:
        """Where the run is kept."""
        return self.folder / "training.pt"

    @property
    def result(self) -> Path:
        """Where the memories are written."""
        return self.folder / "memories.safetensors"

    def _own(self) -> dict[str, Any]:
        """What a run is known by."""
        recipe = dataclasses.asdict(self.recipe)
        return {"config": self.model.config.to_json(), "recipe": recipe, "tokens": len(self.prose)}

    def _load(self) -> None:
        if not self.checkpoint.exists():
            return
        saved = read_training(self.checkpoint)
        kept = (*self._own(), "weights", "optimizer", "log")
        if not isinstance(saved, dict) or not all(name in saved for name in kept):
            raise ValueError(f"{self.checkpoint} is not of a run; give another folder.")
        for name, value in self._own().items():
            if saved[name] != value:
                raise ValueError(
                    f"{self.checkpoint} is of a run of another {name}; give an empty folder, or "
                    "what it was started with."
                )
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.log = saved["log"]

    def save(self) -> None:
        """Write the memories as they are, and the run's checkpoint."""
        self.model.save_memories(self.result)
        run = {
            **self._own(),
            "weights": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
        }
        write_training(self.checkpoint, run)  # last: a run that ended has left its memories

    def run(self, save_every: int = 20) -> None:
        """Train to the recipe's end.

        Args:
            save_every: steps between checkpoints.
        """
        from tqdm import tqdm  # of the extra `commands`

        steps = self.recipe.steps
        with tqdm(total=steps, initial=len(self.log), unit="step", smoothing=0.05) as bar:
            while len(self.log) < steps:
                found = self.step()
                bar.update(1)
                bar.set_postfix(prose=f"{found['prose']:.3f}", key=f"{found['key']:.3f}")
                if len(self.log) % save_every == 0 or len(self.log) == steps:
                    self.save()

    def step(self) -> dict[str, float]:
        """One step. Its text depends on the seed and the step's number alone.

        Returns:
            Nats a token, of the prose and of the key; tokens read; seconds.
        """
        begun, number, recipe = time.perf_counter(), len(self.log), self.recipe
        rng = np.random.default_rng([recipe.seed, number])
        size = recipe.memory.chunk_size
        length = int(rng.integers(size, recipe.chunks * size + 1))
        repeats = (recipe.repeated, recipe.passage)
        text = hide_key(self.prose, length, rng.random(), self.text, rng, repeats=repeats)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=recipe.autocast):
            prose, key = self.losses(text)
        rate = min(1.0, (number + 1) / recipe.warmup) * (1 - number / recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        self.optimizer.zero_grad()
        (prose + recipe.answer_weight * key).backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        seconds = time.perf_counter() - begun
        found = {"prose": prose.item(), "key": key.item(), "tokens": length, "seconds": seconds}
        self.log.append(found)
        return found

    def losses(self, text: KeyText) -> tuple[Tensor, Tensor]:
        """Mean negative log likelihood of a text's tokens, and of the key's: scalars, in nats."""
        ids = torch.from_numpy(text.text)[None]
        read = self.model(ids, labels=ids, logits="none")
        asked = torch.from_numpy(np.concatenate([text.question, text.answer]))[None]
        labels = asked.clone()
        labels[:, : len(text.question)] = IGNORE
        answered = self.model(asked, labels=labels, state=read.state, logits="none")
        assert read.loss is not None  # there are labels
        assert answered.loss is not None
        return read.loss, answered.loss


def table(log: Sequence[dict[str, float]], rows: int = 10) -> str:
    """What a run has logged, as a Markdown table of means over equal parts of its steps."""
    lines = ["| steps | prose, nats a token | key, nats a token | tokens a second |"]
    lines.append("|" + " ---: |" * 4)
    for part in np.array_split(np.arange(len(log)), min(rows, len(log))):
        found = [log[i] for i in part]
        prose, key = (np.mean([step[name] for step in found]) for name in ("prose", "key"))
        speed = sum(step["tokens"] for step in found) / sum(step["seconds"] for step in found)
        steps = f"{part[0] + 1} to {part[-1] + 1}"
        lines.append(f"| {steps} | {prose:.3f} | {key:.3f} | {speed:,.0f} |")
    return "\n".join(lines)
