"""Train a model on a task of the harness: texts whose answers are known, then the questions.

Each step reads a batch of texts of one length, side by side, and asks what is asked of each on forks of
the state. Two losses: that of the answers, and, with a small weight, that of the text. The gradient
goes back through the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..inputs import IGNORE, check_choice
from ..pretrained.text import open_text
from ..train.settings import Settings, fit
from ..train.trainer import Processes, Task
from .evaluations import EVALUATIONS
from .samples import Sample

__all__ = ["Options", "Questions", "answer_text"]

HELD_OUT = 64
"""Texts on which a run is evaluated; their seed is none of the training's."""


def answer_text(answers: Sequence[str]) -> str:
    """Right answers as a model is to say them: after a space, with commas between them, in a line."""
    return f" {', '.join(answers)}\n"


@dataclass(frozen=True)
class Options:
    """Of the task."""

    evaluation: str = "associations"
    """The task of the harness."""

    of_evaluation: dict[str, Any] = field(default_factory=dict)
    """Its options."""

    fewest: int = 1
    """Chunks of the shortest text."""

    chunks: int = 8
    """Chunks of the longest; a batch's length is drawn evenly between the two."""

    text_weight: float = 0.05
    """Of the loss of the text's tokens, beside that of the answers'."""

    def __post_init__(self) -> None:
        check_choice("evaluation", self.evaluation, sorted(EVALUATIONS))
        if not 1 <= self.fewest <= self.chunks:
            raise ValueError(
                f"fewest is {self.fewest} and chunks {self.chunks}; expected 1 <= fewest <= chunks."
            )


class Questions(Task):
    """The task.

    Raises:
        FileNotFoundError: the model's tokenizer is missing.
        ValueError: options that the evaluation does not take.
    """

    options_class = Options

    def __init__(self, settings: Settings, model: Any, processes: Processes) -> None:
        super().__init__(settings, model, processes)
        source = Path(settings.backbone or settings.model or "")
        self.words = open_text(source, model.config.backbone.vocab_size)
        for options in self.phases:
            self._evaluation(options)

    @staticmethod
    def _evaluation(options: Options) -> Any:
        return fit(EVALUATIONS[options.evaluation], options.of_evaluation, "of_evaluation")

    def read(
        self, number: int, rng: np.random.Generator, options: Options
    ) -> Iterator[Iterable[Tensor]]:
        """See `Task.read`: a batch of texts of one length, and their questions."""
        size, evaluation = self.chunk_size, self._evaluation(options)
        length = int(rng.integers(options.fewest * size, options.chunks * size + 1))
        batch = [evaluation.draw(length, rng, self.words) for _ in range(self.settings.batch_size)]
        own = batch[self.processes.rows(len(batch))]
        text, answers, _ = self.losses(own)
        self.told = {"text": text.item(), "answers": answers.item(), "length": length}
        yield [(answers + options.text_weight * text) * (len(own) / len(batch))]

    @property
    def chunk_size(self) -> int:
        """Tokens of the model's chunks."""
        return self.model.config.memory.chunk_size

    def losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean negative log likelihood of the texts' tokens and of the answers', in nats, and the share of
        the answers' tokens that are the likeliest.

        Args:
            samples: of one length.
        """
        device, again = self.model.device, self.settings.recompute
        ids = torch.from_numpy(np.stack([sample.ids for sample in samples])).to(device)
        read = self.model(ids, labels=ids, logits="none", recompute=again)
        owners = [i for i, sample in enumerate(samples) for _ in sample.questions]
        questions = [question for sample in samples for question in sample.questions]
        prompts = [self.words.encode(question.prompt) for question in questions]
        told = [self.words.encode(answer_text(question.answers)) for question in questions]
        lengths = [len(a) + len(b) for a, b in zip(prompts, told, strict=True)]
        asked = torch.zeros(len(questions), max(lengths), dtype=torch.int64)
        labels = torch.full_like(asked, IGNORE)
        for row, (prompt, answer) in enumerate(zip(prompts, told, strict=True)):
            end = len(prompt) + len(answer)
            asked[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = asked[row, len(prompt) : end]
        out = self.model(
            asked.to(device),
            labels=labels.to(device),
            lengths=lengths,
            state=read.state.select(owners),
            recompute=again,
        )
        likeliest = out.logits[:, :-1].argmax(dim=-1).cpu()
        wanted = labels[:, 1:]
        right = (likeliest == wanted)[wanted != IGNORE].float().mean()
        assert read.loss is not None  # there are labels
        assert out.loss is not None
        return read.loss, out.loss, right

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """See `Task.evaluate`: texts as long as the longest, drawn from a seed of their own."""
        options = self.phases[-1]
        evaluation, length = self._evaluation(options), options.chunks * self.chunk_size
        rng = np.random.default_rng([self.settings.seed, 2**31])
        samples = [evaluation.draw(length, rng, self.words) for _ in range(HELD_OUT)]
        found = [
            self.losses(samples[i : i + self.settings.batch_size])
            for i in range(0, HELD_OUT, self.settings.batch_size)
        ]
        _, answers, right = (torch.stack(x).mean().item() for x in zip(*found, strict=True))
        return {"answers": answers, "right": right}
