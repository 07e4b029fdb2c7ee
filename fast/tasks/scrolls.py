"""SCROLLS: seven data sets of long texts, with questions and their answers, or with summaries.

An example's input is its question, two line breaks, and a document; where there is only a summary
to write, it is the document. A text that is too long loses its document's end, as in the baselines
of SCROLLS. Answers are scored as its evaluator scores them.

Source: arXiv 2201.03533; github.com/tau-nlp/scrolls for truncation and the form of answers;
huggingface.co/datasets/tau/scrolls/tree/main/metrics for the metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import shown
from ..checkpoints import read_json
from ..files import check_regular
from ..inputs import check_choice
from .samples import Question, Sample, Words
from .scoring import best_of, exact_match, f1, geometric_mean, rouge

__all__ = [
    "DATASETS",
    "Example",
    "Kind",
    "Scrolls",
    "aggregate",
    "evaluate_predictions",
    "load_examples",
    "load_predictions",
    "measure",
    "split_input",
]

SPLITS = ("train", "validation", "test")

ARCHIVE = "https://huggingface.co/datasets/tau/scrolls/resolve/main/{dataset}.zip"
"""A data set on the hub: a folder of its name, with a file of JSON lines for each split."""

METRICS = {"exact_match": exact_match, "f1": f1}


@dataclass(frozen=True)
class Kind:
    """How a data set is asked and scored."""

    metric: str
    """One of `METRICS`, or "rouge"."""

    answer_tokens: int
    """Tokens of an answer, at most."""

    prompt: str = "\nQuestion: {query}\nAnswer:"
    """After a text. Without a {query} there is a summary to write."""


DATASETS = {
    "gov_report": Kind("rouge", 1024, "\nSummary:"),
    "summ_screen_fd": Kind("rouge", 512, "\nSummary:"),
    "qmsum": Kind("rouge", 512),
    "qasper": Kind("f1", 128),
    "narrative_qa": Kind("f1", 64),
    "quality": Kind("exact_match", 128),
    "contract_nli": Kind(
        "exact_match",
        16,
        "\nHypothesis: {query}\nEntailment, Contradiction or Not mentioned:",
    ),
}
"""By their names."""


@dataclass(frozen=True)
class Example:
    """A document, and what is asked about it."""

    id: str

    query: str
    """The question, with its options where it has some; "" where there is a summary to write."""

    document: str

    answers: tuple[str, ...]
    """Any of them is right; none where they are not public."""


def split_input(dataset: str, text: str) -> tuple[str, str]:
    """The question and the document of an example's input.

    Args:
        dataset: one of `DATASETS`. In "quality" the four options belong to the question.
        text: the input.

    Raises:
        ValueError: the input has no question, or no options.
    """
    if "{query}" not in DATASETS[dataset].prompt:
        return "", text
    end = text.find("\n\n")
    if dataset == "quality" and end >= 0:
        last_option = text.find("(D)", end)
        end = text.find("\n\n", last_option) if last_option >= 0 else -1
    if end < 0:
        part = "a question and its options (A) to (D)" if dataset == "quality" else "a question"
        raise ValueError(f"input is {shown(text)}; expected {part}, two line breaks, a document")
    return text[:end], text[end + 2 :]


def load_examples(
    dataset: str, folder: str | Path | None = None, split: str = "validation"
) -> tuple[Example, ...]:
    """The examples of a data set, in the order of its file.

    Args:
        dataset: one of `DATASETS`.
        folder: has the data set's own folder, with `train.jsonl`, `validation.jsonl` and
            `test.jsonl` as SCROLLS publishes them: a line of JSON for each right answer, with
            "id", "input" and "output". None is the hub; no code from there is run.
        split: one of `SPLITS`. The answers of "test" are not public.

    Raises:
        ImportError: the package `datasets` is not installed, and there is no folder.
        OSError: the file is missing, or the hub is not to be reached; what to download is told.
        ValueError: the file has no examples, or its form is another; the line is told.
    """
    check_choice("dataset", dataset, tuple(DATASETS))
    check_choice("split", split, SPLITS)
    if folder is None:
        return _parse(dataset, split, f"{dataset}/{split}.jsonl", _read_hub(dataset, split))
    path = Path(folder) / dataset / f"{split}.jsonl"
    check_regular(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; unpack {ARCHIVE.format(dataset=dataset)} in the folder {folder}."
        )
    with path.open("rb") as file:
        return _parse(dataset, split, str(path), file)


def _read_hub(dataset: str, split: str) -> Iterable[str]:
    """The lines of a file in a data set's archive."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ImportError(
            "SCROLLS from the hub takes the package datasets, which is not installed; run pip "
            'install "comet-memory[evaluation]", or give a folder.'
        ) from error
    archive = ARCHIVE.format(dataset=dataset)
    # As plain text: the hub has no table of SCROLLS, only these archives beside a script, which
    # `datasets` no longer runs; and what a line holds is ours to check.
    files = {split: f"zip://{dataset}/{split}.jsonl::{archive}"}
    try:
        return load_dataset("text", data_files=files, split=split)["text"]
    except Exception as error:  # of the network, the hub, the archive or the disk
        raise OSError(
            f"{dataset} could not be read from the hub ({type(error).__name__}: "
            f"{shown(str(error))}); download {archive}, unpack it, and give the folder that "
            f"{dataset} is in."
        ) from error


def _parse(
    dataset: str, split: str, source: str, lines: Iterable[str | bytes]
) -> tuple[Example, ...]:
    """Lines of one id are one example.

    Args:
        dataset, split: what the lines are of.
        source: of the lines, for messages.
        lines: of JSON.
    """
    found: dict[str, tuple[int, str, str, list[str]]] = {}
    documents: dict[str, str] = {}  # dozens of questions may be about one: it is kept once
    for number, line in enumerate(lines, 1):
        try:
            name, text, answers = _read_line(line, split)
            query, document = split_input(dataset, text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{source}, line {number} is no example of {dataset}: {error}; is the file whole, "
                "and as SCROLLS publishes it?"
            ) from error
        document = documents.setdefault(document, document)
        first = found.setdefault(name, (number, query, document, []))
        if first[1:3] != (query, document):
            raise ValueError(
                f"{source}, line {number} has the id {name!r} of line {first[0]}, but another "
                "input; expected the same one, with another right answer."
            )
        first[3].extend(answers)
    if not found:
        raise ValueError(f"{source} is empty; download {ARCHIVE.format(dataset=dataset)} anew.")
    return tuple(
        Example(name, query, document, tuple(answers))
        for name, (_, query, document, answers) in found.items()
    )


def _read_line(line: str | bytes, split: str) -> tuple[str, str, list[str]]:
    """The id, the input and the answer, if there is one."""
    data = json.loads(line)
    if not isinstance(data, dict):
        raise ValueError(f"it is {shown(data)}; expected a JSON object")
    has_answer = split != "test" or data.get("output") is not None
    for name in ("id", "input", "output") if has_answer else ("id", "input"):
        if not isinstance(data.get(name), str):
            raise ValueError(f"{name} is {shown(data.get(name))}; expected text")
    return data["id"], data["input"], [data["output"]] if has_answer else []


def measure(dataset: str, said: str, answers: Sequence[str]) -> dict[str, float]:
    """What an answer is worth by the metric of a data set: the best that a right answer gives.

    Args:
        dataset: one of `DATASETS`.
        said: the answer.
        answers: the right ones, one at least.

    Returns:
        By the metric's name, from 0 to 1; for "rouge" all three, each with the right answer that is
        best for it.

    Raises:
        ImportError: as `rouge`.
    """
    metric = DATASETS[dataset].metric
    if metric != "rouge":
        return {metric: best_of(METRICS[metric], said, answers)}
    found = [rouge(said, right) for right in answers]
    return {name: max(scores[name] for scores in found) for name in found[0]}


def load_predictions(path: Path) -> dict[str, str]:
    """The answers of a file as SCROLLS takes it: a JSON object, by the examples' ids.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is of another form.
    """
    found = read_json(path)
    for name, said in found.items():
        if not isinstance(said, str):
            raise ValueError(f"{path}: the answer to {name!r} is {shown(said)}; expected text.")
    return found


def evaluate_predictions(
    dataset: str, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Scores of the answers to a data set, as the evaluator of SCROLLS counts them.

    Args:
        dataset: one of `DATASETS`.
        predictions: the answers, by the examples' ids.
        references: the right ones, by the same.

    Returns:
        Means over the examples times 100, by the metric's name; and "score", which is that metric,
        or the geometric mean of the three of ROUGE, taken of their means. Four decimals are kept,
        as there.

    Raises:
        ImportError: as `rouge`.
        ValueError: the data set is unknown, an answer is missing, one is of no example, all are of
            another data set, or the right answers are not there.
    """
    check_choice("dataset", dataset, tuple(DATASETS))
    answered = sum(len(answers) > 0 for answers in references.values())
    if answered == 0 or answered < len(references):
        raise ValueError(
            f"there are right answers to {answered} of {len(references)} examples of {dataset}; "
            "expected them to all, and those to the split test are not public, so take validation."
        )
    _check_ids(dataset, predictions, references)
    found = [measure(dataset, said, references[name]) for name, said in predictions.items()]
    means = {name: 100 * sum(one[name] for one in found) / len(found) for name in found[0]}
    means["score"] = geometric_mean([*means.values()])
    return {name: round(mean, 4) for name, mean in means.items()}


def _check_ids(dataset: str, predictions: Mapping[str, str], references: Mapping[str, Any]) -> None:
    """Raise unless both have the same ids."""
    missing = [name for name in references if name not in predictions]
    others = [name for name in predictions if name not in references]
    if others and len(missing) == len(references):
        raise ValueError(
            f"the answers are of another data set or split than {dataset}'s: their first id is "
            f"{others[0]!r}; expected {missing[0]!r} and so on."
        )
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(references)} examples of {dataset} have no answer, the first "
            f'is {missing[0]!r}; answer all, with "" where there is nothing to say.'
        )
    if others:
        raise ValueError(
            f"{len(others)} of {len(predictions)} answers are of no example of {dataset}, the "
            f"first is {others[0]!r}; take them out."
        )


def aggregate(scores: Mapping[str, float]) -> float:
    """The score of SCROLLS: the mean over its data sets.

    Args:
        scores: "score" of `evaluate_predictions`, of each of `DATASETS`.

    Raises:
        ValueError: a data set is missing, or one is unknown.
    """
    for name in scores:
        check_choice("a data set", name, tuple(DATASETS))
    missing = [name for name in DATASETS if name not in scores]
    if missing:
        raise ValueError(f"there is no score of {', '.join(missing)}; measure all seven first.")
    return sum(scores.values()) / len(scores)


@cache
def _examples(dataset: str, folder: str | None, split: str) -> tuple[Example, ...]:
    return load_examples(dataset, folder, split)


@dataclass(frozen=True)
class Scrolls:
    """Questions about long texts that people wrote, or summaries of them: a data set of SCROLLS.

    No examples with answers are shown before. A text that is shorter than asked for stays so.
    """

    dataset: str = "qasper"
    """One of `DATASETS`."""

    folder: str | None = None
    """As `load_examples` takes it."""

    split: str = "validation"
    """Or "train"; the answers of "test" are not public."""

    def __post_init__(self) -> None:
        check_choice("dataset", self.dataset, tuple(DATASETS))
        check_choice("split", self.split, SPLITS[:2])

    @property
    def answer_tokens(self) -> int:
        """See `Evaluation`."""
        return DATASETS[self.dataset].answer_tokens

    def draw(self, length: int, rng: np.random.Generator, words: Words) -> Sample:
        """See `Evaluation.draw`; the text has so many tokens at most.

        Raises:
            ImportError, OSError: as `load_examples`.
            ValueError: as there, or as `ask`.
        """
        examples = _examples(self.dataset, self.folder, self.split)
        return self.ask(examples[int(rng.integers(len(examples)))], length, words)

    def ask(self, example: Example, length: int, words: Words) -> Sample:
        """An example's input, without the end of its document where it is longer, and its question
        once more.

        Args:
            example: of the data set.
            length: of the text, in tokens, at most.
            words: what makes tokens.

        Raises:
            ValueError: the question alone is as long.
        """
        head = words.encode(f"{example.query}\n\n") if example.query else []
        if len(head) >= length:
            raise ValueError(
                f"the length is {length} tokens; the question of {example.id!r} takes {len(head)}, "
                "and its document some more."
            )
        ids = [*head, *words.encode(example.document)][:length]
        prompt = DATASETS[self.dataset].prompt.format(query=example.query)
        return Sample(
            np.array(ids, dtype=np.int64), (Question(prompt, example.answers, self.dataset),)
        )

    def score(self, said: str, question: Question) -> float:
        """The metric of the data set; of ROUGE the geometric mean of the three.

        The mean of these over questions is SCROLLS's score. Of ROUGE it is at most that, since
        SCROLLS takes the geometric mean of means, see `evaluate_predictions`.
        """
        return geometric_mean([*measure(self.dataset, said, question.answers).values()])
