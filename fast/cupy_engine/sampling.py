"""The next token from logits, on the host: twin of `fast/sampling.py`."""

from __future__ import annotations

import numpy as np

__all__ = ["sample"]


def sample(
    logits: np.ndarray,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """One token a sequence.

    Args:
        logits: [b, vocab].
        temperature: 0 takes the likeliest; above, samples softmax(logits / temperature).
        top_k: among the k likeliest only.
        top_p: among the fewest likeliest whose probabilities reach p (arXiv 1904.09751).
        generator: source of the samples; None is a fresh one.

    Returns:
        [b] int64.
    """
    if temperature == 0.0:
        return logits.argmax(axis=-1)
    tokens = np.argsort(-logits, axis=-1, kind="stable")
    scores = np.take_along_axis(logits, tokens, axis=-1).astype(np.float64)
    # The likeliest at 0, so that no temperature overflows and the tiniest is greedy.
    with np.errstate(over="ignore"):
        chances = np.exp((scores - scores[:, :1]) / max(temperature, np.finfo(np.float64).tiny))
    chances /= chances.sum(axis=-1, keepdims=True)
    if top_k is not None:
        chances[:, top_k:] = 0
    if top_p is not None:
        likelier = chances.cumsum(axis=-1) - chances
        chances[likelier >= top_p * chances.sum(axis=-1, keepdims=True)] = 0
    rng = np.random.default_rng() if generator is None else generator
    sums = chances.cumsum(axis=-1)
    drawn = rng.random(len(logits))[:, None] * sums[:, -1:]
    return np.take_along_axis(tokens, (sums <= drawn).sum(axis=-1, keepdims=True), axis=-1)[:, 0]
