"""Training the pass key's model to keep what it has: its fifth stage, the task `keeping`.

`passkey_diagnosis` tells what loses keys in long prose: now and then a distractor that a chunk's border
cuts is taken for a key and written. So a batch here begins with a **pool**: states that have read much
such prose, half of them with a key at its start, half without one. Then three kinds of steps:

- **stay**: states of the pool read more of it. Of many, those whose memory changes most are trained on:
  the gate's logit is to stay above a margin, since a gate that saturates has no gradient above it; the
  memory is to stay; and the key, if there is one, is to be told.
- **late**: a state without a key reads one, and is asked for it.
- **fresh**: a new state reads a key that a border cuts, and is asked for it; and every byte is
  predicted, so that the model does not forget how to read.

Some of the texts are the published filler, so that keys in it are not forgotten either.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import IGNORE
from ..model import CoMeTModel
from ..state import CoMeTState
from ..train.settings import Settings
from ..train.trainer import Processes, Task
from . import passkey
from .passkey_diagnosis import find_writes
from .passkey_training import change_of

__all__ = ["RECIPE", "KeepingKeys", "Options"]

RECIPE = Path(__file__).parent / "passkey_keeping.toml"
"""The settings of the stage."""


NEAREST = tuple(name for name in passkey.DISTRACTOR_NAMES if {"key", "pass"} & set(name.split()))
"""Names of distractors that share a word with the key's."""


@dataclass(frozen=True)
class Options:
    """Of the task."""

    pool: int = 128
    """States of a batch, half of them with a key."""

    longest: int = 60
    """Chunks that they have read, at most."""

    steps: int = 100
    """Steps of a batch."""

    candidates: int = 64
    """States of which the ones to stay are chosen."""

    late: float = 0.4
    """Share of steps with late keys."""

    fresh: float = 0.2
    """Share of steps with fresh keys."""

    hinge: float = 0.3
    """Weight of what the gate's logits lack of the margin, beside the loss of the answer."""

    margin: float = 4.0
    """Of the gate's logit: what is to stay is kept by a sigmoid of it at least."""

    stay_weight: float = 2.0
    """Weight of the mean change of the global state."""

    answer_weight: float = 0.5
    """Weight of the answers, where a state is to stay."""

    language_weight: float = 0.05
    """Weight of the loss of every byte, where keys are fresh."""

    spacings: tuple[float, ...] = (25.0, 100.0, 400.0)
    """Mean bytes between two distractors."""

    cut: float = 0.7
    """Share of chunks' borders that are put into a distractor."""

    filler: float = 0.15
    """Share of texts that are the published filler, which has no distractors."""

    short: float = 0.0
    """Share of new keys that are as likely of few digits as of many; others are drawn evenly."""


class KeepingKeys(Task):
    """The task, of a model that `PassKey` has trained.

    Raises:
        ValueError: several processes, which would all do the same.
    """

    options_class = Options

    def __init__(self, settings: Settings, model: CoMeTModel, processes: Processes) -> None:
        super().__init__(settings, model, processes)
        if processes.number > 1:
            raise ValueError(f"{processes.number} processes; this task is one process's.")
        self.haystack = passkey.read_haystack(split="train")

    def read(
        self, number: int, rng: np.random.Generator, options: Options
    ) -> Iterator[Iterable[Tensor]]:
        """See `Task.read`: a pool, and the steps on it."""
        size, b = self.model.config.memory.chunk_size, self.settings.batch_size
        chunks, half = int(rng.integers(1, options.longest + 1)), options.pool // 2
        keys = [passkey.draw_number(rng, "train") for _ in range(half)]
        texts = [self._prose(chunks * size, rng, options, key) for key in keys]
        texts += [self._prose(chunks * size, rng, options) for _ in range(options.pool - half)]
        with torch.no_grad():
            state = self._read(None, texts)
        for _ in range(options.steps):
            kind = rng.random()
            if kind < options.late:
                rows = half + rng.choice(options.pool - half, b, replace=False)
                yield [self._take_up(state.select(rows.tolist()), rng, options)]
            elif kind < options.late + options.fresh:
                yield [self._take_up(None, rng, options)]
            else:
                loss, rows, after = self._stay(state, keys, rng, options)
                yield [loss]
                state = _replace(state, rows, after.detach())

    def _prose(
        self,
        length: int,
        rng: np.random.Generator,
        options: Options,
        key: int | None = None,
    ) -> bytes:
        """Prose with distractors that borders cut, or the published filler; a key at its start."""
        size, spacing = self.model.config.memory.chunk_size, float(rng.choice(options.spacings))
        text = bytearray()
        if key is not None:
            text += f"\n{passkey.INFORMATION.format(key=key)}\n".encode()
        if rng.random() < options.filler:
            return bytes(text + _filler(length, rng))[:length]

        def fill(end: int) -> None:
            """Go on to the word that ends there, or before."""
            if end > len(text):
                prose = passkey.prose(end - len(text), self.haystack, rng, spacing, "train")
                piece = b"".join(prose)
                text.extend(piece[max(piece.find(b" "), 0) : piece.rfind(b" ") + 1])

        for border in range(size, length, size):
            if rng.random() < options.cut:
                said = _distractor(rng)
                start = border - int(rng.integers(1, len(said)))
                fill(start)
                if text and len(text) <= start:
                    text += said
        fill(length)
        text += b"".join(
            passkey.prose(max(length - len(text), 0), self.haystack, rng, 1e9, "train")
        )
        return bytes(text[:length])

    def _read(self, state: CoMeTState | None, texts: Sequence[bytes]) -> CoMeTState:
        """The state after texts of one length, its chunk closed."""
        ids = torch.from_numpy(np.stack([passkey.encode(text) for text in texts]))
        out = self.model(ids.to(self.model.device), state=state, logits="none")
        return self.model.close_chunk(out.state)

    def _stay(
        self,
        state: CoMeTState,
        keys: Sequence[int],
        rng: np.random.Generator,
        options: Options,
    ) -> tuple[Tensor, np.ndarray, CoMeTState]:
        """A step of those states of the pool whose memory more prose changes most.

        Returns:
            The loss; the states' rows in the pool; the states after it.
        """
        size = 2 * self.model.config.memory.chunk_size
        many = rng.choice(options.pool, min(options.candidates, options.pool), replace=False)
        texts = [self._prose(size, rng, options) for _ in many]
        before = state.select(many.tolist())
        with torch.no_grad():
            moved = change_of(before, self._read(before, texts))
        hardest = moved.argsort(descending=True)[: self.settings.batch_size].cpu().numpy()
        rows, before = many[hardest], before.select(hardest.tolist())
        with self._gate_logits() as logits:
            after = self._read(before, [texts[i] for i in hardest])
        lacks = torch.stack([F.relu(options.margin - x).mean() for x in logits]).mean()
        loss = options.hinge * lacks + options.stay_weight * change_of(before, after).mean()
        held = [int(row) for row in rows if row < len(keys)]
        if held:
            own = after.select([i for i, row in enumerate(rows) if row < len(keys)])
            loss = loss + options.answer_weight * self._answer(
                own, [keys[row] for row in held], rng, options
            )
        self.told = {"lacks": lacks.item(), "change": float(moved.mean())}
        return loss, rows, after

    def _take_up(
        self, state: CoMeTState | None, rng: np.random.Generator, options: Options
    ) -> Tensor:
        """The loss of keys that are read now and asked for; of every byte too where they are fresh."""
        size = self.model.config.memory.chunk_size
        keys = [_draw_key(rng, options.short) for _ in range(self.settings.batch_size)]
        texts = []
        for key in keys:
            said = f"\n{passkey.INFORMATION.format(key=key)}\n".encode()
            text = bytearray(self._prose(3 * size, rng, options))
            start = size - int(rng.integers(1, len(said)))  # the first border is in the sentence
            if rng.random() < 0.5:
                start = int(rng.integers(2 * size - len(said)))
            text[start : start + len(said)] = said
            texts.append(bytes(text))
        ids = torch.from_numpy(np.stack([passkey.encode(text) for text in texts]))
        ids = ids.to(self.model.device)
        out = self.model(ids, labels=ids, state=state, logits="none")
        assert out.loss is not None  # there are labels
        answer = self._answer(self.model.close_chunk(out.state), keys, rng, options)
        self.told = {"fresh" if state is None else "late": answer.item()}
        return answer if state is not None else answer + options.language_weight * out.loss

    def _answer(
        self, state: CoMeTState, keys: Sequence[int], rng: np.random.Generator, options: Options
    ) -> Tensor:
        """The loss of keys, asked for after a little text, some of them without the queue."""
        if rng.random() < 0.5:
            state = state.forget_temporary()
        size = self.model.config.memory.chunk_size
        length = int(rng.integers(size))
        before = b"".join(passkey.prose(length, self.haystack, rng, 1e9, "train"))
        if rng.random() < options.filler:
            before = _filler(length, rng)
        asked = passkey.encode(before + f"\n{passkey.QUESTION}".encode())
        said = [passkey.encode(passkey.ANSWER.format(key=key)) for key in keys]
        lengths = [len(asked) + len(answer) for answer in said]
        ids = np.zeros((len(keys), max(lengths)), dtype=np.int64)
        labels = np.full_like(ids, IGNORE)
        for i, (answer, length) in enumerate(zip(said, lengths, strict=True)):
            ids[i, :length] = np.concatenate([asked, answer])
            labels[i, len(asked) : length] = answer
        device = self.model.device
        pair = (torch.from_numpy(x).to(device) for x in (ids, labels))
        loss = self.model(*pair, lengths=lengths, state=state, logits="none").loss
        assert loss is not None  # there are labels
        return loss

    @contextlib.contextmanager
    def _gate_logits(self) -> Iterator[list[Tensor]]:
        """What the gates' matrices give, each layer's and chunk's, as long as the block lasts."""
        found: list[Tensor] = []
        hooks = [
            layer["global_memory"]["gate"].register_forward_hook(
                lambda _module, _args, output: found.append(output)
            )
            for layer in self.model.weights["layers"]
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Writes in a million bytes of training prose, and the share of late keys taken up there."""
        options, rng = Options(cut=0.0, spacings=(1500.0,), filler=0.0), np.random.default_rng(0)
        size = self.model.config.memory.chunk_size
        texts = [self._prose(256 * size, rng, options) for _ in range(16)]
        writes = sum(len(found) for _, found in find_writes(self.model, texts, size))
        state = self._read(None, texts)
        keys = [passkey.draw_number(rng, "train") for _ in texts]
        said = [self._prose(6 * size, rng, options, key) for key in keys]
        state = self._read(state, said)
        asked = torch.from_numpy(passkey.encode(f"\n{passkey.QUESTION}")).expand(len(keys), -1)
        out = self.model.generate(asked.to(self.model.device), state, 8, stop_ids=(10,))
        right = [passkey.first_number(bytes(ids)) for ids in out.ids]
        taken = np.mean([a == b for a, b in zip(right, keys, strict=True)])
        read = sum(map(len, texts)) / 1e6
        return {"writes": writes / read, "late": float(taken)}


def _draw_key(rng: np.random.Generator, short: float) -> int:
    """A key to be read; see `Options.short`."""
    key = passkey.draw_number(rng, "train")
    if rng.random() < short:
        size = int(rng.integers(1, len(str(passkey.LARGEST_KEY)) + 1))
        while len(str(key)) != size:
            key = passkey.draw_number(rng, "train") % 10**size
            key += key % passkey.HELD_OUT == 0
    return key


def _filler(length: int, rng: np.random.Generator) -> bytes:
    """The published filler, from any place in it."""
    start = int(rng.integers(len(passkey.FILLER)))
    return b"".join(passkey.filler(start + length))[start:]


def _distractor(rng: np.random.Generator) -> bytes:
    """One of all, or as often one of those that are nearest to the key."""
    names = NEAREST if rng.random() < 0.5 else passkey.DISTRACTOR_NAMES
    name = names[rng.integers(len(names))]
    number = passkey.draw_number(rng, "train")
    return passkey.DISTRACTOR.format(name=name, number=number).encode()


def _replace(state: CoMeTState, rows: np.ndarray, after: CoMeTState) -> CoMeTState:
    """A batch of states, some of them replaced; all stand at a closed chunk."""
    index = torch.from_numpy(rows)

    def put(old: Tensor, new: Tensor) -> Tensor:
        found = old.clone()
        found[index.to(old.device)] = new
        return found

    def both(name: str) -> tuple[Any, ...]:
        pairs = zip(getattr(state, name), getattr(after, name), strict=True)
        return tuple(put(old, new) for old, new in pairs)

    changes: dict[str, Any] = {}
    for name in ("tokens", "chunks", "queue_length"):
        changes[name] = getattr(state, name).copy()
        changes[name][rows] = getattr(after, name)
    changes |= {name: both(name) for name in ("global_state", "temporary_memory")}
    return dataclasses.replace(state, **changes)
