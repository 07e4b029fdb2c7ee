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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.config import CoMeTConfig
from reference.parameters import named_parameters

from ..checkpoints import of_file, read_training, write_training
from ..files import check_writable
from ..model import IGNORE, CoMeTModel
from ..state import CoMeTState
from . import passkey
from .passkey_recipe import LATE_WINDOWS, STAGES, Recipe, small_config
from .passkey_texts import Texts

__all__ = ["Trainer", "check", "train"]

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
            for name, p in named_parameters(self.model.weights.to_dict()).items():
                leaf = name.rpartition(".")[2]
                if leaf == "gate_bias":
                    p.fill_(self.recipe.first_gate_bias)
                elif p.dim() > 1 and leaf != "gate" and not leaf.startswith("adapter"):
                    p.mul_(self.recipe.weight_scale)

    def _load(self) -> None:
        if not self.checkpoint.exists():
            return
        saved = read_training(self.checkpoint)
        config = self.model.config
        own = {"config": config.to_json(), "recipe": dataclasses.asdict(self.recipe)}
        kept = (*own, "model", "optimizer", "step", "texts", "accuracy")
        if not isinstance(saved, dict) or not all(name in saved for name in kept):
            raise ValueError(f"{self.checkpoint} is not of a run; give another folder.")
        with of_file(self.checkpoint):  # it may be from before a field of the config came
            saved["config"] = CoMeTConfig.from_json(str(saved["config"])).to_json()
        for name, value in own.items():
            if saved[name] != value:
                raise ValueError(
                    f"{self.checkpoint} is of a run of another {name}; give an empty folder, or "
                    "the seed and recipe that it was started with."
                )
        if set(saved["model"]) != set(self.model.state_dict()):
            raise ValueError(
                f"{self.checkpoint} is of another version's run; give an empty folder."
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
        write_training(self.checkpoint, run)  # last: a run that ended has left its model

    def run(self, save_every: int = 500) -> None:
        """Train to the recipe's end.

        Args:
            save_every: steps between checkpoints, taken where a batch of texts ends.
        """
        from tqdm import tqdm  # of the extra `commands`

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

    def draw_texts(
        self, rng: np.random.Generator, window: int, windows: int, lead: int = 0
    ) -> Texts:
        """Texts of the run's recipe and prose: the arguments are those of `Texts`."""
        chunk = self.model.config.memory.chunk_size
        return Texts(self.recipe, self.haystack, chunk, rng, window, windows, lead)

    def _read_texts(self) -> Iterator[float]:
        """One batch of texts, window by window; yields each step's loss."""
        rng = np.random.default_rng([self.recipe.seed, self.texts])
        torch.manual_seed(int(rng.integers(2**31)))
        self.texts += 1
        phase, _ = self.recipe.phase_at(self.step)
        chunks, most = phase.windows[rng.integers(len(phase.windows))]
        length = chunks * self.model.config.memory.chunk_size
        lead = int(rng.integers(most)) if self.recipe.key_anywhere else 0
        windows = lead + int(
            rng.integers(1, (LATE_WINDOWS if self.recipe.key_anywhere else most) + 1)
        )
        texts = self.draw_texts(rng, length, windows, lead)
        state: CoMeTState | None = None
        first = max(lead - self.recipe.lead_windows, 0)
        if first:
            with torch.no_grad():
                out = self.model(texts.ids[:, : first * length], logits="none")
                state = self.model.close_chunk(out.state)
        for start in range(first * length, windows * length, length):
            state, loss = self._train_on_window(texts, state, start, rng)
            yield loss

    def _train_on_window(
        self, texts: Texts, state: CoMeTState | None, start: int, rng: np.random.Generator
    ) -> tuple[CoMeTState, float]:
        """One step: read the window that starts at a token, ask, and move the weights.

        Returns:
            The state after the window, and the step's loss.
        """
        phase, _ = self.recipe.phase_at(self.step)
        if state is not None:
            state = _with_noise(state, phase.noise)
        end = start + texts.window
        part = texts.ids[:, start:end]
        out = self.model(part, labels=part, state=state, logits="none")
        closed = self.model.close_chunk(out.state)
        loss = phase.language_weight * out.loss
        if state is not None:
            quiet = torch.from_numpy((texts.starts >= end) | (texts.ends <= start))
            loss = loss + phase.stay_weight * _change(state, closed)[quiet].sum() / len(quiet)
        answer = self._ask(texts, closed, end, rng)
        if answer is not None:
            loss = loss + answer
        self._move_weights(loss)
        return closed.detach(), loss.item()

    def _ask(
        self, texts: Texts, state: CoMeTState, end: int, rng: np.random.Generator
    ) -> Tensor | None:
        """The loss of the answers to the question, asked after a window that ends at a token.

        None where no key has gone by.
        """
        tail = int(rng.integers(texts.chunk))
        if self.recipe.border_share and rng.random() < self.recipe.border_share:
            tail = texts.cutting_tail(rng)
        gone_by = texts.ends <= end + tail
        if rng.random() < self.recipe.hide_queue:
            state = state.forget_temporary()
            gone_by = texts.ends <= end
        if not gone_by.any():
            return None
        question, targets = texts.ask(end, tail, gone_by)
        logits = self.model(question, state=state).logits[:, -targets.shape[1] :]
        right = (logits.argmax(-1) == targets) | (targets == IGNORE)
        share = float(right.all(1)[torch.from_numpy(gone_by)].float().mean())
        self.accuracy += 0.02 * (share - self.accuracy)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    def _move_weights(self, loss: Tensor) -> None:
        """A step of the optimizer against the loss; skipped where the gradient is not finite."""
        phase, step = self.recipe.phase_at(self.step)
        rate = phase.learning_rate * min(1.0, (self.step + 1) / WARMUP) * phase.share_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if norm.isfinite():
            self.optimizer.step()
        self.step += 1


def check(folder: Path) -> None:
    """Raise OSError unless every stage of `train` can write its checkpoint, before the first begins."""
    for number in range(1, len(STAGES) + 1):
        check_writable(folder / f"stage{number}" / "training.pt")


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


def _with_noise(state: CoMeTState, size: float) -> CoMeTState:
    """The state with noise of a standard deviation added to its global memory."""
    noisy = tuple(s + size * torch.randn_like(s) for s in state.global_state)
    return dataclasses.replace(state, global_state=noisy)


def _change(before: CoMeTState, after: CoMeTState) -> Tensor:
    """Mean absolute change of the global state, [b]."""
    pairs = zip(before.global_state, after.global_state, strict=True)
    return torch.stack([(new - old).abs().mean((1, 2)) for old, new in pairs]).mean(0)
