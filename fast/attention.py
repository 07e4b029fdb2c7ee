"""Attention over a row in two parts: keys that all queries see, and the queries' own.

Of the new slots of a row each sees all slots before them, and of themselves those up to itself. With a
mask the hidden half of their own square is computed all the same. Here each part is attention of its
own, without a mask, and both are joined by the logarithms of their sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["JOINED", "attend_after", "needs_mask"]

JOINED = 512
"""New slots from which on two parts are faster than one with a mask: `python -m fast bench --section
attention` measures it. Of fewer, the mask hides too little."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def needs_mask(device: str, past: int, new: int) -> bool:
    """Whether attention of slots that follow one another is to be given a mask.

    Args:
        device: its type.
        past: slots before the new ones.
        new: how many these are.
    """
    return device == "cpu" and past > 0 and 1 < new < JOINED


def attend_after(queries: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
    """softmax(<Q, K> / sqrt(e)) V, where query i sees the keys up to `past` + i, without a mask.

    Args:
        queries: [b, h, n, e], of any floating dtype.
        keys, values: [b, k, past + n, e]; h is a multiple of k. Of the queries' dtype or wider.
        past: keys that every query sees.

    Returns:
        [b, h, n, e], of the queries' dtype.

    Source: sums of exponentials that are joined by their maxima are those of online softmax (arXiv
    1805.02867).
    """
    n, grouped = queries.shape[2], queries.shape[1] != keys.shape[1]
    if n < 2:
        return F.scaled_dot_product_attention(queries, keys, values, enable_gqa=grouped)
    if not past:
        return F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=grouped
        )
    if queries.device.type != "cpu":
        from torch.nn.attention.bias import causal_lower_right  # which brings the compiler

        bias = causal_lower_right(n, past + n)
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, enable_gqa=grouped
        )
    keys, values = keys.to(queries.dtype), values.to(queries.dtype)  # autocast narrows queries
    if torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, values)):
        return _Joined.apply(queries, keys, values, past)
    return _attend(queries, keys, values, past)[0]


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, past: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and both parts' logarithms of sums [b, h, n]."""
    before, own = (
        _flash(queries, keys[:, :, start:end], values[:, :, start:end], is_causal=is_own)
        for start, end, is_own in ((0, past, False), (past, keys.shape[2], True))
    )
    share = torch.sigmoid(own[1] - before[1])[..., None]
    joined = torch.lerp(before[0].to(share.dtype), own[0].to(share.dtype), share)
    return joined.to(queries.dtype), before[1], own[1]


class _Joined(torch.autograd.Function):
    """`_attend` with a backward pass: of each part, given what both came to."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
        joined, before, own = _attend(queries, keys, values, past)
        ctx.save_for_backward(queries, keys, values, joined, torch.logaddexp(before, own))
        ctx.past = past
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, joined, sums = ctx.saved_tensors
        (of_queries, *before), (again, *own) = (
            _flash_backward(
                *(gradient, queries, keys[:, :, start:end], values[:, :, start:end]),
                *(joined, sums, 0.0, is_own),
            )
            for start, end, is_own in ((0, ctx.past, False), (ctx.past, keys.shape[2], True))
        )
        of_keys, of_values = (torch.cat(pair, dim=2) for pair in zip(before, own, strict=True))
        return of_queries + again, of_keys, of_values, None
