"""Evaluation of any model on any task: samples drawn, read, asked and scored; kept line by line.

    python -m fast eval needles --model FOLDER --lengths 1024 16384 --out FOLDER

A run writes each question with its answer to `answers.jsonl` as soon as it is scored, and goes on from
there when it is started again. Texts of one length are read side by side, in pieces, and the state is
forked for the questions of a text, so that a text is read once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..drawing import COLOURS, save_figure, style
from ..files import atomic_write, check_regular
from .samples import Evaluation, Sample, Words
from .scoring import interval

__all__ = ["Reader", "Scored", "Setting", "draw", "evaluate", "load_answers", "summarize", "table"]

PIECE = 4096
"""Tokens of a call, while a text is read."""


class Reader(Protocol):
    """What can be evaluated: a `CoMeTModel`, or any model that has its stream's face."""

    def __call__(self, ids: Tensor, *, state: Any = None, logits: str = "all") -> Any:
        """Read on: [b, n] ids; returns an output whose `state` is where the streams stand."""
        ...

    def generate(
        self,
        ids: Tensor,
        state: Any = None,
        max_new_tokens: int = 128,
        stop_ids: Any = (),
        *,
        lengths: Any = None,
    ) -> Any:
        """Go on from [b, n] ids, padded at the right; returns what has `ids`, a list a stream."""
        ...


@dataclass(frozen=True)
class Setting:
    """What is measured: everything that an answer depends on, but for the machine."""

    task: str
    """Its name."""

    model: str
    """What reads: a folder or file."""

    options: dict[str, Any] = field(default_factory=dict)
    """Of the task."""

    lengths: tuple[int, ...] = (1024, 4096, 16384)
    """Tokens of the texts."""

    samples: int = 10
    """Of each length."""

    batch_size: int = 1
    """Texts that are read side by side."""

    seed: int = 1
    """Of the samples: the same for every model that has the same tokenizer."""

    reader: str = "memories"
    """How the model reads, see `readers.READERS`."""

    budget: int | None = None
    """Bytes of a window's keys and values; None is as many as the memories take."""


@dataclass(frozen=True)
class Scored:
    """A question, answered."""

    length: int
    """Tokens of its text."""

    sample: int
    """Number of its text, among those of this length."""

    kind: str
    prompt: str
    answers: tuple[str, ...]
    """Of the `Question`."""

    said: str
    """What the model answered, up to the end of the line."""

    score: float
    """What that is worth, from 0 to 1."""


def draw_sample(
    task: Evaluation, setting: Setting, length: int, number: int, words: Words
) -> Sample:
    """The sample of that number: it depends on the seed, the length and the number alone."""
    rng = np.random.default_rng([setting.seed, length, number])
    sample = task.draw(length, rng, words)
    if not 0 < len(sample.ids) <= length or not sample.questions:
        raise ValueError(
            f"the task drew a text of {len(sample.ids)} tokens with {len(sample.questions)} "
            f"questions; expected 1 to {length} tokens and a question."
        )
    return sample


@torch.no_grad()
def answer(
    model: Reader, samples: Sequence[Sample], words: Words, answer_tokens: int, device: Any = "cpu"
) -> list[list[str]]:
    """What a model says to the questions of texts of one length.

    Args:
        model: reads the texts side by side, and answers all questions of all texts at once.
        samples: the texts.
        words: its tokenizer.
        answer_tokens: of an answer, at most.
        device: of the model.

    Returns:
        Of each sample, the answers in order, up to the end of their first line.
    """
    start = np.array(words.start, dtype=np.int64)
    ids = torch.from_numpy(np.stack([np.concatenate([start, s.ids]) for s in samples])).to(device)
    state: Any = None
    for piece in ids.split(PIECE, dim=1):
        state = model(piece, state=state, logits="none").state
    owners = [i for i, sample in enumerate(samples) for _ in sample.questions]
    prompts = [words.encode(question.prompt) for s in samples for question in s.questions]
    lengths = [len(prompt) for prompt in prompts]
    asked = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        asked[row, : len(prompt)] = torch.tensor(prompt)
    out = model.generate(
        asked.to(device),
        state.select(owners),
        answer_tokens,
        words.stop_ids,
        lengths=lengths,
    )
    said = iter([_first_line(words, ids) for ids in out.ids])
    return [[next(said) for _ in sample.questions] for sample in samples]


def _first_line(words: Words, ids: Sequence[int]) -> str:
    decode = words.decoder()
    text = "".join(map(decode, takewhile(lambda token: token not in words.stop_ids, ids)))
    return text.strip().partition("\n")[0].strip()


def load_answers(path: Path) -> tuple[Setting, list[Scored]]:
    """A run's setting and its answers so far; a last line that was not finished is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a run's answers; the line is told.
    """
    check_regular(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    found: list[Any] = []
    for number, line in enumerate(lines[:-1], 1):  # after the last line break nothing is whole
        try:
            data = json.loads(line)
            if number == 1:
                setting = data["setting"] | {"lengths": tuple(data["setting"]["lengths"])}
                found.append(Setting(**setting))
            else:
                found.append(Scored(**data | {"answers": tuple(data["answers"])}))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no answers in line {number} ({error}); take the line out, or measure "
                "anew in another folder."
            ) from error
    if not found:
        raise ValueError(f"{path} holds no setting; remove it.")
    return found[0], found[1:]


def evaluate(
    task: Evaluation,
    setting: Setting,
    model: Reader,
    words: Words,
    path: Path | None = None,
    device: Any = "cpu",
) -> list[Scored]:
    """Draw, read, ask and score, and keep each answer in a file.

    Args:
        task: of the setting.
        setting: what to measure.
        model: what reads.
        words: its tokenizer.
        path: gets a line of JSON for each question, after one for the setting. A run that it holds
            already goes on; None keeps nothing.
        device: of the model.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it holds another run; or a text is too short for the task, which is found out
            before anything is read.
    """
    from tqdm import tqdm  # of the extra `commands`

    for length in setting.lengths:
        draw_sample(task, setting, length, 0, words)
    scored: list[Scored] = []
    if path is not None and path.exists():
        scored = _resume(path, setting, task, words)
    elif path is not None:
        atomic_write(path, json.dumps({"setting": dataclasses.asdict(setting)}) + "\n")
    done = {(one.length, one.sample) for one in scored}
    total = sum(setting.lengths) * setting.samples
    with tqdm(total=total, unit="token", unit_scale=True) as bar:
        for length in setting.lengths:
            left = [i for i in range(setting.samples) if (length, i) not in done]
            bar.update(length * (setting.samples - len(left)))
            for first in range(0, len(left), setting.batch_size):
                numbers = left[first : first + setting.batch_size]
                new = list(_score(task, setting, model, words, length, numbers, device))
                if path is not None:
                    with path.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in new)
                scored += new
                bar.update(length * len(numbers))
    return scored


def _score(
    task: Evaluation,
    setting: Setting,
    model: Reader,
    words: Words,
    length: int,
    numbers: Sequence[int],
    device: Any,
) -> Iterator[Scored]:
    """Some samples of a length, read side by side."""
    samples = [draw_sample(task, setting, length, number, words) for number in numbers]
    # Texts that are shorter than asked for are read by themselves.
    is_even = len({len(sample.ids) for sample in samples}) == 1
    groups = [samples] if is_even else [[sample] for sample in samples]
    all_said = [
        said for group in groups for said in answer(model, group, words, task.answer_tokens, device)
    ]
    for number, sample, said in zip(numbers, samples, all_said, strict=True):
        for question, one in zip(sample.questions, said, strict=True):
            yield Scored(
                length,
                number,
                question.kind,
                question.prompt,
                question.answers,
                one,
                task.score(one, question),
            )


def _resume(path: Path, setting: Setting, task: Evaluation, words: Words) -> list[Scored]:
    """The answers of a file, those of samples that are not whole taken out of it."""
    found, scored = load_answers(path)
    if found != setting:
        names = [f.name for f in dataclasses.fields(Setting)]
        other = [name for name in names if getattr(found, name) != getattr(setting, name)]
        raise ValueError(
            f"{path} is of another run ({', '.join(other)}: {getattr(found, other[0])!r}); give "
            "another folder."
        )
    whole = {
        (length, number)
        for length, number in {(one.length, one.sample) for one in scored}
        if sum((one.length, one.sample) == (length, number) for one in scored)
        == len(draw_sample(task, setting, length, number, words).questions)
    }
    kept = [one for one in scored if (one.length, one.sample) in whole]
    head = {"setting": dataclasses.asdict(setting)}
    lines = [json.dumps(data) for data in (head, *map(dataclasses.asdict, kept))]
    atomic_write(path, "\n".join(lines) + "\n")
    return kept


def summarize(scored: Sequence[Scored]) -> dict[tuple[int, str], tuple[float, float, float, int]]:
    """Of each length and kind: the mean score, its bounds (`scoring.interval`), and how many questions.

    Returns:
        By (length, kind), in the order of the answers; where there are several kinds, by (length,
        "all") too.
    """
    groups: dict[tuple[int, str], dict[int, list[float]]] = {}
    kinds = {one.kind for one in scored}
    for one in scored:
        for kind in {one.kind, "all" if len(kinds) > 1 else one.kind}:
            groups.setdefault((one.length, kind), {}).setdefault(one.sample, []).append(one.score)
    found = {}
    for key, samples in groups.items():
        scores = [score for sample in samples.values() for score in sample]
        found[key] = (float(np.mean(scores)), *interval([*samples.values()]), len(scores))
    return found


def table(scored: Sequence[Scored]) -> str:
    """A Markdown table: length, kind, mean score with its bounds, questions."""
    lines = [
        "| length (tokens) | kind | score | 95 % | questions |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for (length, kind), (mean, low, high, number) in sorted(summarize(scored).items()):
        lines.append(
            f"| {length:,} | {kind} | {100 * mean:.1f} % | {100 * low:.1f} to {100 * high:.1f} % | "
            f"{number} |"
        )
    return "\n".join(lines)


def draw(scored: Sequence[Scored], title: str, path: Path) -> Path:
    """Scores against length with their bounds, a line for each kind.

    Args:
        title: of the picture.
        path: PNG or SVG.
    """
    found = summarize(scored)
    kinds = sorted({kind for _, kind in found})
    colours = list(COLOURS.values())
    with style(path.stem) as plt:
        figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
        for i, kind in enumerate(kinds):
            lengths = sorted(length for length, own in found if own == kind)
            mean, low, high, _ = zip(*(found[n, kind] for n in lengths), strict=True)
            colour = colours[i % len(colours)]
            axes.plot(lengths, mean, "o-", color=colour, label=kind or "score")
            axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(
            xscale="log", ylim=(-0.03, 1.03), xlabel="length (tokens)", ylabel="score", title=title
        )
        axes.legend()
        return save_figure(figure, path)
