"""The FIFO temporary memory in PyTorch: twin of `reference/temporary_memory.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.config import MemoryConfig

from .layers import Weights, adapter, rms_norm, take_slots

__all__ = ["queue_entries", "update_temporary"]


def queue_entries(compression: Tensor, weights: Weights, eps: float) -> Tensor:
    """Queue entries adapter_t(rms_norm_t(C')). Twin of `reference.temporary_memory.queue_entries`.

    Args:
        compression: [b, c, d], the layer's output at the compression tokens.
        weights: "norm" [d], "adapter_down" [rank, d], "adapter_up" [d, rank].
        eps: added to the mean square.

    Returns:
        [b, c, d].
    """
    return adapter(rms_norm(compression, weights["norm"], eps), weights)


def update_temporary(
    queue: Tensor,
    compression: Tensor,
    weights: Weights,
    config: MemoryConfig,
    counts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """T_{t+1} = newest B of [T_t ; adapter_t(rms_norm_t(C'))]. Twin of
    `reference.temporary_memory.update_temporary`.

    Args:
        queue: [b, q, d], oldest first.
        compression: [b, c, d], C', in the order of the text.
        weights: a layer's "temporary_memory".
        counts: None where all slots are entries, else how many of each sequence's leading slots
            are: ([b, 1] of the queue, [b, 1] of the compression tokens), integers.

    Returns:
        [b, min(B, q + c), d]; sequence i's min(B, queue + compression) entries come first.
    """
    entries = queue_entries(compression, weights, config.temporary_norm_eps)
    joined = torch.cat([queue, entries], dim=1)
    size = min(config.temporary_memory_size, joined.shape[1])
    if counts is None:
        return joined[:, joined.shape[1] - size :]
    old, new = counts
    dropped = (old + new - config.temporary_memory_size).clamp(min=0)
    source = torch.arange(size, device=joined.device) + dropped  # [b, size], of queue then entries
    source = torch.where(source < old, source, source - old + queue.shape[1])
    return take_slots(joined, source.clamp(max=joined.shape[1] - 1))  # the rest: any value
