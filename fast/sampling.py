"""The next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import widen

__all__ = ["sample"]


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
        likelier = chances.cumsum(dim=-1) - chances
        share = max(top_p, least) * chances.sum(dim=-1, keepdim=True)  # the likeliest always stays
        chances = chances.masked_fill(likelier >= share, 0)
    return tokens.gather(1, torch.multinomial(chances, 1, generator=generator))[:, 0]
