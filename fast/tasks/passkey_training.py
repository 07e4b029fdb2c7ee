"""Training a byte-level model to find a pass key: the task.

Every step reads one window of chunks of a batch of texts, then asks, on a fork of the state, for
the keys that have gone by. The texts go on from the state before the question, and no gradient
crosses a window's start. A text, its question included, is never longer than 4,096 tokens.

Three losses: the answer's; every token's, which teaches to read; and how much a window without a
key changes the global memory, which teaches the gate to stay shut. The last one is what carries
over to texts that are longer by orders: what never changes does not age.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.parameters import named_parameters

from ..model import IGNORE, CoMeTModel
from ..state import CoMeTState
from ..train.settings import Settings
from ..train.trainer import Processes, Task
from . import passkey
from .passkey_recipe import LATE_WINDOWS, Options
from .passkey_texts import Texts

__all__ = ["PassKey", "change_of"]


class PassKey(Task):
    """The task, of a model that reads bytes."""

    options_class = Options

    def __init__(self, settings: Settings, model: CoMeTModel, processes: Processes) -> None:
        super().__init__(settings, model, processes)
        self.haystack = passkey.read_haystack(split="train")

    def start(self) -> None:
        """Projections and embeddings that are larger than usual, and gates that are mostly shut."""
        options = self.phases[0]
        with torch.no_grad():
            for name, p in named_parameters(self.model.weights.to_dict()).items():
                leaf = name.rpartition(".")[2]
                if leaf == "gate_bias":
                    p.fill_(options.first_gate_bias)
                elif p.dim() > 1 and leaf != "gate" and not leaf.startswith("adapter"):
                    p.mul_(options.weight_scale)

    def draw_texts(
        self,
        options: Options,
        rng: np.random.Generator,
        window: int,
        windows: int,
        lead: int = 0,
    ) -> Texts:
        """A batch of the run: the arguments are those of `Texts`."""
        chunk = self.model.config.memory.chunk_size
        b = self.settings.batch_size
        return Texts(options, b, self.haystack, chunk, rng, window, windows, lead)

    def read(
        self, number: int, rng: np.random.Generator, options: Options
    ) -> Iterator[Iterable[Tensor]]:
        """See `Task.read`: one window a step."""
        chunks, most = options.windows[rng.integers(len(options.windows))]
        length = chunks * self.model.config.memory.chunk_size
        lead = int(rng.integers(most)) if options.key_anywhere else 0
        windows = lead + int(rng.integers(1, (LATE_WINDOWS if options.key_anywhere else most) + 1))
        rows = self.processes.rows(self.settings.batch_size)
        texts = self.draw_texts(options, rng, length, windows, lead).part(rows)
        share = len(texts.keys) / self.settings.batch_size
        state: CoMeTState | None = None
        first = max(lead - options.lead_windows, 0)
        if first:
            with torch.no_grad():
                before = texts.ids[:, : first * length].to(self.model.device)
                out = self.model(before, logits="none")
                state = self.model.close_chunk(out.state)
        for start in range(first * length, windows * length, length):
            state, loss = self._read_window(texts, state, start, rng, options)
            state = state.detach()
            yield [loss * share]

    def _read_window(
        self,
        texts: Texts,
        state: CoMeTState | None,
        start: int,
        rng: np.random.Generator,
        options: Options,
    ) -> tuple[CoMeTState, Tensor]:
        """Read the window that starts at a token, and ask.

        Returns:
            The state after the window, and the loss.
        """
        if state is not None:
            state = _with_noise(state, options.noise)
        end = start + texts.window
        part = texts.ids[:, start:end].to(self.model.device)
        out = self.model(part, labels=part, state=state, logits="none")
        closed = self.model.close_chunk(out.state)
        loss = options.language_weight * out.loss
        if state is not None:
            quiet = torch.from_numpy((texts.starts >= end) | (texts.ends <= start))
            change = change_of(state, closed)[quiet.to(self.model.device)]
            loss = loss + options.stay_weight * change.sum() / len(quiet)
        answer = self._ask(texts, closed, end, rng, options)
        return closed, loss if answer is None else loss + answer

    def _ask(
        self,
        texts: Texts,
        state: CoMeTState,
        end: int,
        rng: np.random.Generator,
        options: Options,
    ) -> Tensor | None:
        """The loss of the answers to the question, asked after a window that ends at a token.

        None where no key has gone by.
        """
        self.told = {}
        tail = int(rng.integers(texts.chunk))
        if options.border_share and rng.random() < options.border_share:
            tail = texts.cutting_tail(rng)
        gone_by = texts.ends <= end + tail
        if rng.random() < options.hide_queue:
            state = state.forget_temporary()
            gone_by = texts.ends <= end
        if not gone_by.any():
            return None
        question, targets = (x.to(self.model.device) for x in texts.ask(end, tail, gone_by))
        logits = self.model(question, state=state).logits[:, -targets.shape[1] :]
        right = (logits.argmax(-1) == targets) | (targets == IGNORE)
        self.told = {"answers": float(right.all(1).cpu()[torch.from_numpy(gone_by)].float().mean())}
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def _with_noise(state: CoMeTState, size: float) -> CoMeTState:
    """The state with noise of a standard deviation added to its global memory."""
    noisy = tuple(s + size * torch.randn_like(s) for s in state.global_state)
    return dataclasses.replace(state, global_state=noisy)


def change_of(before: CoMeTState, after: CoMeTState) -> Tensor:
    """Mean absolute change of the global state, [b]."""
    pairs = zip(before.global_state, after.global_state, strict=True)
    return torch.stack([(new - old).abs().mean((1, 2)) for old, new in pairs]).mean(0)
