"""Training a byte-level model from scratch to find a pass key: `train`.

Every step reads one window of chunks of a batch of texts, then asks, on a fork of the state, for
the keys that have gone by. The texts go on from the state before the question, and no gradient
crosses a window's start. A text, its question included, is never longer than 4,096 tokens.

Three losses: the answer's; every token's, which teaches to read; and how much a window without a
key changes the global memory, which teaches the gate to stay shut. The last one is what carries
over to texts that are longer by orders: what never changes does not age.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from reference.config import BackboneConfig, CoMeTConfig, MemoryConfig

from ..files import atomic_torch_save
from ..model import IGNORE, CoMeTModel
from ..state import CoMeTState
from ..tasks import passkey

__all__ = [
    "LONG",
    "PHASES",
    "STAGES",
    "Phase",
    "Recipe",
    "Texts",
    "Trainer",
    "small_config",
    "train",
]


def small_config() -> CoMeTConfig:
    """The shipped model: 200,451 parameters, 0.8 MB in float32."""
    return CoMeTConfig(
        BackboneConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
        ),
        MemoryConfig(
            chunk_size=128,
            global_memory_size=8,
            temporary_memory_size=16,
            compression_stride=8,
            gate_bias=True,
            gate_saturation=0.95,
        ),
    )


@dataclass(frozen=True)
class Phase:
    """A stretch of training."""

    steps: int
    """Windows to train on."""

    windows: tuple[tuple[int, int], ...]
    """Each text picks one: (chunks in a window, windows in a text at most)."""

    learning_rate: float
    """Of AdamW, at the phase's start."""

    decay: int = 0
    """Steps over which it falls linearly, to a fiftieth at most; 0: it stays."""

    language_weight: float = 0.2
    """Weight of the loss of every token, beside that of the answers."""

    stay_weight: float = 0.2
    """Weight of the mean change of the global state over a window that the key is not in."""

    noise: float = 0.02
    """Standard deviation of what is added to the global state before a window, so that what is
    stored is an attractor."""


SHORT = ((1, 1), (1, 3), (2, 3), (1, 10))
LONG = (*SHORT, (2, 8), (4, 7))
"""Windows of up to 2 chunks, and of up to 4; texts of up to 10 chunks, and of up to 28."""

PHASES = (
    Phase(2500, ((1, 1),), 2e-3),
    Phase(1500, LONG, 3e-3),
    Phase(5000, LONG, 3e-3, decay=5000, language_weight=0.05, noise=0.03),
    Phase(4500, SHORT, 2e-3, decay=4500, language_weight=0.05, noise=0.03),
)
"""Find the key one chunk back; carry it; settle; read more keys, in shorter texts."""

SPREAD = ((1, 1), (1, 1), (1, 4), (2, 3), (1, 10), (2, 8), (1, 27))
AGED = ((1, 1), (1, 4), (2, 3), (1, 10), (2, 8), (1, 26), (2, 12))
"""Windows of the later stages: the second number bounds where the key comes, see `Recipe.late`."""


@dataclass(frozen=True)
class Recipe:
    """What a run does: the same recipe and seed give the same weights on the same machine."""

    phases: tuple[Phase, ...] = PHASES
    batch_size: int = 32
    hide_queue: float = 0.3
    """Share of windows whose question is asked with an empty queue, so that the global memory
    learns what the queue could tell."""
    late: bool = False
    """Whether a text's key is as likely to come in any window as in the first. `AFTER` windows at
    most are trained on from there; those before are read without gradient. False: most keys come
    in the first window."""
    before: int = 0
    """Windows right before a `late` key's that are trained on too: other numbers are no key."""
    spacings: tuple[float, ...] = (150.0, 400.0, 1500.0)
    """Mean bytes between two distractors: each text has one of these."""
    cut: float = 0.0
    """Share of a `late` recipe's keys whose number is cut by a chunk's border, and of the answers
    that are, beside those that chance cuts."""
    numbers: float = 0.0
    """Mean places in a chunk of prose that other numbers are written over, in any form: prose has
    tables, literals and dates, which are no key either."""
    first_gate_bias: float = 2.0
    """The gate starts mostly shut, so that what is stored stays while writing is learned."""
    weight_scale: float = 4.0
    """Projections and embeddings start at 0.02 times this: the usual 0.02 is for wide models."""
    seed: int = 0

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the step within it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        return self.phases[-1], self.phases[-1].steps

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)


BEHIND_SENTENCES = Recipe(
    phases=(Phase(7000, AGED, 1.2e-3, decay=7000, language_weight=0.05, noise=0.03),),
    late=True,
    before=1,
    cut=0.4,
    spacings=(25.0, 100.0, 400.0, 1500.0),
)
"""The third stage, see `STAGES`."""

STAGES = (
    Recipe(),
    Recipe(
        phases=(Phase(8019, SPREAD, 2e-3, decay=16000, language_weight=0.05, noise=0.03),),
        late=True,
        cut=0.4,
    ),
    BEHIND_SENTENCES,
    dataclasses.replace(
        BEHIND_SENTENCES,
        phases=(Phase(4500, AGED, 1e-3, decay=4500, language_weight=0.05, noise=0.03),),
        numbers=0.3,
    ),
)
"""One run after the other, each from the model of the one before: learn to find keys at all; then
those that come late, and those that borders cut; then those behind many other sentences with
numbers; then those behind numbers of any form."""

AFTER = 4
"""Most windows of a `late` recipe's text that are trained on, the key's included."""

WARMUP = 100
"""Steps over which the learning rate rises at the start of training."""


class Trainer:
    """Trains a model; `run` goes on from the folder's checkpoint where there is one.

    Args:
        config: of the model.
        recipe: what to do.
        folder: of the run.
        start: a model's folder to begin with; None begins with random weights.

    Raises:
        ValueError: the folder's checkpoint or the start is not readable or of another config, or
            the checkpoint is of another recipe.
    """

    def __init__(
        self, config: CoMeTConfig, recipe: Recipe, folder: Path, start: Path | None = None
    ) -> None:
        self.recipe, self.folder = recipe, folder
        self.model = CoMeTModel(config, seed=recipe.seed)
        if start is None:
            self._start_weights()
        else:
            before = CoMeTModel.from_pretrained(start)
            if before.config != config:
                raise ValueError(
                    f"{start} has another config; expected the one to train. Start from a model "
                    "of that config, or give its config."
                )
            self.model.load_state_dict(before.state_dict())
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=(0.9, 0.95),
        )
        self.haystack = passkey.read_haystack(split="train")
        self.step = 0
        self.texts = 0
        self.accuracy = 0.0
        self._load()

    @property
    def checkpoint(self) -> Path:
        """Where the run is kept."""
        return self.folder / "training.pt"

    def _start_weights(self) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                leaf = name.rpartition(".")[2]
                if leaf == "gate_bias":
                    p.fill_(self.recipe.first_gate_bias)
                elif p.dim() > 1 and leaf != "gate" and not leaf.startswith("adapter"):
                    p.mul_(self.recipe.weight_scale)

    def _load(self) -> None:
        if not self.checkpoint.exists():
            return
        try:
            saved = torch.load(self.checkpoint, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.checkpoint} is not a readable checkpoint ({error}); give another folder."
            ) from error
        own = {"config": self.model.config.to_json(), "recipe": dataclasses.asdict(self.recipe)}
        for name, value in own.items():
            if saved[name] != value:
                raise ValueError(
                    f"{self.checkpoint} is of a run of another {name}; give an empty folder, or "
                    "the seed and recipe that it was started with."
                )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.texts, self.accuracy = saved["step"], saved["texts"], saved["accuracy"]

    def save(self) -> None:
        """Write the model as it is, and the run's checkpoint."""
        run: dict[str, Any] = {
            "config": self.model.config.to_json(),
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "texts": self.texts,
            "accuracy": self.accuracy,
        }
        self.model.save_pretrained(self.folder / "model")
        atomic_torch_save(self.checkpoint, run)  # last: a run that ended has left its model

    def run(self, save_every: int = 500) -> None:
        """Train to the recipe's end.

        Args:
            save_every: steps between checkpoints, taken where a batch of texts ends.
        """
        bar = tqdm(total=self.recipe.steps, initial=self.step, unit="step", smoothing=0.02)
        saved = self.step
        while self.step < self.recipe.steps:
            for loss in self._read_texts():
                bar.update(1)
                bar.set_postfix(answers=f"{self.accuracy:.3f}", loss=f"{loss:.3f}")
            if self.step - saved >= save_every or self.step >= self.recipe.steps:
                self.save()
                saved = self.step
        bar.close()

    def _read_texts(self) -> Iterator[float]:
        """One batch of texts, window by window; yields each step's loss."""
        rng = np.random.default_rng([self.recipe.seed, self.texts])
        torch.manual_seed(int(rng.integers(2**31)))
        self.texts += 1
        phase, _ = self.recipe.phase_at(self.step)
        chunks, most = phase.windows[rng.integers(len(phase.windows))]
        length = chunks * self.model.config.memory.chunk_size
        lead = int(rng.integers(most)) if self.recipe.late else 0
        windows = lead + int(rng.integers(1, (AFTER if self.recipe.late else most) + 1))
        texts = Texts(self, rng, length, windows, lead)
        state: CoMeTState | None = None
        first = max(lead - self.recipe.before, 0)
        if first:
            with torch.no_grad():
                out = self.model(texts.ids[:, : first * length], logits="none")
                state = self.model.close_chunk(out.state)
        for start in range(first * length, windows * length, length):
            state, loss = self._window(texts, state, start, rng)
            yield loss

    def _window(
        self, texts: Texts, state: CoMeTState | None, start: int, rng: np.random.Generator
    ) -> tuple[CoMeTState, float]:
        phase, step = self.recipe.phase_at(self.step)
        rate = phase.learning_rate * min(1.0, (self.step + 1) / WARMUP)
        if phase.decay:
            rate *= max(1 - step / phase.decay, 0.02)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if state is not None:
            state = dataclasses.replace(
                state,
                global_state=tuple(
                    s + phase.noise * torch.randn_like(s) for s in state.global_state
                ),
            )
        end = start + texts.window
        part = texts.ids[:, start:end]
        out = self.model(part, labels=part, state=state, logits="none")
        closed = self.model.close_chunk(out.state)
        asked = closed
        tail = int(rng.integers(self.model.config.memory.chunk_size))
        if self.recipe.cut and rng.random() < self.recipe.cut:
            tail = texts.cutting_tail(rng)
        gone_by = texts.ends <= end + tail
        if rng.random() < self.recipe.hide_queue:
            asked = closed.forget_temporary()
            gone_by = texts.ends <= end
        loss = phase.language_weight * out.loss
        if state is not None:
            quiet = torch.from_numpy((texts.starts >= end) | (texts.ends <= start))
            loss = loss + phase.stay_weight * _change(state, closed)[quiet].sum() / len(quiet)
        if gone_by.any():
            question, targets = texts.ask(end, tail, gone_by)
            logits = self.model(question, state=asked).logits[:, -targets.shape[1] :]
            loss = loss + F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE
            )
            right = (logits.argmax(-1) == targets) | (targets == IGNORE)
            share = float(right.all(1)[torch.from_numpy(gone_by)].float().mean())
            self.accuracy += 0.02 * (share - self.accuracy)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if norm.isfinite():
            self.optimizer.step()
        self.step += 1
        return closed.detach(), loss.item()


def train(folder: Path, seed: int = 0) -> Path:
    """Train the small model from start to end: every stage, each in a folder of its own.

    Args:
        folder: of the stages' folders; what is there already is gone on with.
        seed: of weights and texts.

    Returns:
        The trained model's folder, `from_pretrained` reads it.
    """
    start: Path | None = None
    for number, recipe in enumerate(STAGES, 1):
        stage = folder / f"stage{number}"
        Trainer(small_config(), dataclasses.replace(recipe, seed=seed), stage, start).run()
        start = stage / "model"
    assert start is not None  # there are stages
    return start


def _change(before: CoMeTState, after: CoMeTState) -> Tensor:
    """Mean absolute change of the global state, [b]."""
    pairs = zip(before.global_state, after.global_state, strict=True)
    return torch.stack([(new - old).abs().mean((1, 2)) for old, new in pairs]).mean(0)


class Texts:
    """A batch of texts of one length, with their keys.

    Args:
        trainer: whose haystack, batch size and chunk size they follow.
        rng: source of everything random.
        window: tokens of a window.
        windows: windows of a text; a chunk more is kept for what comes before the question.
        lead: windows before the key's, in a `late` recipe.
    """

    def __init__(
        self,
        trainer: Trainer,
        rng: np.random.Generator,
        window: int,
        windows: int,
        lead: int = 0,
    ) -> None:
        self.window, self.chunk = window, trainer.model.config.memory.chunk_size
        recipe = trainer.recipe
        length = window * windows + self.chunk
        rows, keys, starts, ends = [], [], [], []
        for _ in range(recipe.batch_size):
            # Most texts start anywhere, and most keys come early, so that they are asked for often.
            skip = 0 if rng.random() < 0.25 else len(passkey.DESCRIPTION) + 1
            reach = min(1.0, window / length) if recipe.late or rng.random() < 0.6 else 0.95
            example = passkey.Example(
                length + skip + 200,
                depth=rng.random() * reach,
                seed=int(rng.integers(2**62)),
                haystack=None if rng.random() < 0.4 else trainer.haystack,
                spacing=float(rng.choice(recipe.spacings)),
                split="train",
            )
            if recipe.late:  # half a chunk more than its window: asked for while it is read
                start = lead * window + int(rng.integers(window + self.chunk // 2))
                if rng.random() < recipe.cut:
                    start = _cut(start, example.key, self.chunk, rng)
                example = _move(example, start + skip)
            row = passkey.encode(example.text()[skip : skip + length]).copy()
            if recipe.numbers and example.haystack is not None:
                places = int(rng.poisson(recipe.numbers * length / self.chunk))
                key = range(example.key_start - skip, example.key_end - skip)
                _write_numbers(row, places, key, rng)
            rows.append(row)
            keys.append(example.key)
            starts.append(example.key_start - skip)
            ends.append(example.key_end - skip)
        self.ids = torch.from_numpy(np.stack(rows))
        self.keys, self.starts, self.ends = keys, np.array(starts), np.array(ends)

    def cutting_tail(self, rng: np.random.Generator) -> int:
        """A tail after which a chunk's border is somewhere in the answer."""
        return self.chunk - len(passkey.QUESTION) - 1 - int(rng.integers(len(" 12345.\n") + 1))

    def ask(self, end: int, tail: int, gone_by: np.ndarray) -> tuple[Tensor, Tensor]:
        """The texts' next `tail` tokens with the question and answer behind them.

        Returns:
            Ids, but for the answer's last; targets [b, answer], IGNORE where a key is yet to come.
        """
        question = passkey.encode(f"\n{passkey.QUESTION}")
        said = [passkey.encode(passkey.ANSWER.format(key=key)) for key in self.keys]
        longest = max(map(len, said))
        answer = torch.tensor([[*a, *[0] * (longest - len(a))] for a in said])
        known = torch.tensor([[i < len(a) for i in range(longest)] for a in said])
        targets = answer.masked_fill(~(known & torch.from_numpy(gone_by)[:, None]), IGNORE)
        asked = torch.from_numpy(question).expand(len(said), -1)
        ids = torch.cat([self.ids[:, end : end + tail], asked, answer], dim=1)
        return ids[:, :-1], targets


def _cut(start: int, key: int, chunk: int, rng: np.random.Generator) -> int:
    """The nearest start of a key's sentence that puts a border into one of its two mentions."""
    said, digits = passkey.INFORMATION.format(key=key), str(key)
    mention = said.index(digits) if rng.random() < 0.5 else said.rindex(digits)
    border = start + mention + int(rng.integers(len(digits) + 1))
    return start - ((border + chunk // 2) % chunk - chunk // 2)


def _move(example: passkey.Example, start: int) -> passkey.Example:
    """The example with its key's sentence at a byte, or as near to it as its text allows."""
    first, last = (dataclasses.replace(example, depth=d).key_start for d in (0.0, 1.0))
    return dataclasses.replace(example, depth=min(max((start - first) / (last - first), 0.0), 1.0))


def _write_numbers(row: np.ndarray, places: int, key: range, rng: np.random.Generator) -> None:
    """Write numbers of any form over a text, the key's sentence excepted."""
    for _ in range(places):
        join = (" ", ", ", "\n", "   ", ".", ":", "-", ",", "")[rng.integers(9)]
        base = "0123456789abcdef"[: 16 if rng.random() < 0.2 else 10]
        words = []
        for _ in range(int(rng.integers(1, 7))):
            digits = rng.integers(len(base), size=int(rng.integers(1, 9)))
            words.append(
                ("", "", "0x", "$", "-")[rng.integers(5)] + "".join(base[i] for i in digits)
            )
        said = passkey.encode(join.join(words))
        start = int(rng.integers(len(row)))
        end = min(start + len(said), len(row))
        if end <= key.start or start >= key.stop:
            row[start:end] = said[: end - start]
