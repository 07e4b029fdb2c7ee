"""Columns and tokens: from what transformers passes in, padded anywhere, to what a stream reads.

A call of transformers has n columns, some of which are padding. A stream reads each row's tokens,
in their order; what it gives is put back into the columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..arrays import numbers
from ..inputs import check_kind
from ..layers import take_slots

__all__ = ["Columns"]


@dataclass(frozen=True)
class Columns:
    """Which columns of a call hold tokens."""

    mask: Tensor | None
    """[b, n] bool, True at tokens; None where all are."""

    lengths: np.ndarray
    """[b] int64 tokens of each row, on the host."""

    @classmethod
    def of(cls, attention_mask: Any, text: Tensor, past: int) -> Self:
        """From an attention mask.

        Args:
            attention_mask: [b, n] or [b, past + n], 1 at tokens and 0 at padding; None is all 1.
            text: [b, n, ...].
            past: columns that were read before.

        Raises:
            ValueError: it is no tensor, of another shape, or holds other numbers.
        """
        b, n = text.shape[:2]
        if attention_mask is None:
            return cls(None, np.full(b, n))
        check_kind("attention_mask", attention_mask, Tensor, "a tensor of 0 and 1, or None")
        if attention_mask.shape not in ((b, n), (b, past + n)):
            longer = (
                f", or {(b, past + n)} with the columns that the cache has read" if past else ""
            )
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected {(b, n)}, as the "
                f"text has{longer}."
            )
        recent = attention_mask[:, -n:].to(text.device)
        mask = recent != 0
        if not torch.equal(recent, mask.to(recent.dtype)):
            raise ValueError(
                "attention_mask holds other numbers than 0 and 1; expected 1 at tokens, 0 at padding."
            )
        lengths = numbers(mask.sum(dim=1)).astype(np.int64)
        return cls(None if (lengths == n).all() else mask, lengths)

    def pack(self, x: Tensor) -> Tensor:
        """[b, n, ...] in columns -> the same with each row's tokens first, zero after them."""
        if self.mask is None:
            return x
        order = torch.argsort(~self.mask, dim=1, stable=True)
        return _zeroed(take_slots(x, order), self.mask.gather(1, order))

    def unpack(self, x: Tensor, before: Tensor) -> Tensor:
        """What `pack` packed, in columns; at one of padding, what stands at the last token before it.

        Args:
            x: [b, n, ...], each row's tokens first.
            before: [b, ...], what stands there before the first.
        """
        if self.mask is None:
            return x
        return take_slots(torch.cat([before[:, None], x], dim=1), self.mask.cumsum(dim=1))

    def zero(self, x: Tensor, fill: float = 0) -> Tensor:
        """[b, n, ...] in columns, with zeros, or another number, in the padding."""
        return x if self.mask is None else _zeroed(x, self.mask, fill)


def _zeroed(x: Tensor, mask: Tensor, fill: float = 0) -> Tensor:
    return x.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), fill)
