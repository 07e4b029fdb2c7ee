"""The next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import widen

__all__ = ["check_sampling", "sample"]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError unless the arguments of `sample` are in range."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a finite number, 0 for greedy.")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k is {top_k!r}; expected an integer of at least 1, or None.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; expected a number in (0, 1], or None.")


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a sequence.

    Args:
        logits: [b, vocab].
        temperature: 0 takes the likeliest; above, samples softmax(logits / temperature).
        top_k: among the k likeliest only.
        top_p: among the fewest likeliest whose probabilities reach p (arXiv 1904.09751).
        generator: source of the samples.

    Returns:
        [b] int64.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    scores, tokens = widen(logits).sort(dim=-1, descending=True)
    # The likeliest at 0, so that no temperature overflows and the tiniest is greedy.
    least = torch.finfo(scores.dtype).tiny
    chances = ((scores - scores[:, :1]) / max(temperature, least)).softmax(dim=-1)
    if top_k is not None:
        chances[:, top_k:] = 0
    if top_p is not None:
        before = chances.cumsum(dim=-1) - chances
        chances = chances.masked_fill(before >= top_p * chances.sum(dim=-1, keepdim=True), 0)
    return tokens.gather(1, torch.multinomial(chances, 1, generator=generator))[:, 0]
