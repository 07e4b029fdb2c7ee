"""Scores of answers: exact match, F1 and ROUGE as SCROLLS and SQuAD count them, and how sure a mean is.

Source: SQuAD (arXiv 1606.05250) for normalisation and F1, SCROLLS (arXiv 2201.03533) for which task is
scored by what, and its aggregate.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from .passkey_report import lower_bound

__all__ = [
    "best_of",
    "contains_all",
    "exact_match",
    "f1",
    "geometric_mean",
    "interval",
    "normalize",
    "rouge",
]

ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles, and more than one space in a row."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(said: str, right: str) -> float:
    """1.0 where both are the same once normalized, else 0.0."""
    return float(normalize(said) == normalize(right))


def f1(said: str, right: str) -> float:
    """Harmonic mean of precision and recall over normalized words."""
    found, wanted = normalize(said).split(), normalize(right).split()
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def contains_all(said: str, wanted: Sequence[str]) -> float:
    """Share of some words or numbers that an answer has, each standing by itself."""
    found = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", said) is not None for word in wanted]
    return sum(found) / len(found)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise ImportError(
            "ROUGE takes the package rouge-score, which is not installed; run pip install "
            '"comet-memory[evaluation]".'
        ) from error
    return RougeScorer(["rouge1", "rouge2", "rougeL"])  # as SCROLLS: words are not stemmed


def rouge(said: str, right: str) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L over the whole text, words as they are.

    Returns:
        "rouge1", "rouge2", "rougeL", from 0 to 1.

    Raises:
        ImportError: the package `rouge-score` is not installed.
    """
    found = _rouge_scorer().score(right, said)
    return {name: found[name].fmeasure for name in found}


def best_of(score: Callable[[str, str], float], said: str, answers: Sequence[str]) -> float:
    """The best score that any of several right answers gives."""
    return max(score(said, right) for right in answers)


def interval(scores: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, float]:
    """Where the mean score of a task is, with a given confidence.

    Where every sample came to 0 or to 1 as a whole, the exact interval of Clopper and Pearson over
    samples; else that of samples drawn again (bootstrap, 2,000 times). Questions about one text do not
    err by themselves, so it is samples that count.

    Args:
        scores: of each sample those of its questions; one score at least.
        confidence: of both bounds together.

    Returns:
        The lower bound and the upper.
    """
    whole = [set(sample) for sample in scores]
    if all(values in ({0.0}, {1.0}) for values in whole):
        one_sided = (1 + confidence) / 2
        right, trials = whole.count({1.0}), len(whole)
        return (
            lower_bound(right, trials, one_sided),
            1 - lower_bound(trials - right, trials, one_sided),
        )
    sums = np.array([[sum(sample), len(sample)] for sample in scores])
    drawn = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
    totals = sums[drawn].sum(axis=1)
    means = totals[:, 0] / totals[:, 1]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers of which none is negative; 0 where one is."""
    return math.prod(values) ** (1 / len(values))
