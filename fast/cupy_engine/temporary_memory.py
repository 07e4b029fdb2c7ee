"""The FIFO temporary memory on arrays: twin of `reference/temporary_memory.py`."""

from __future__ import annotations

from array_api_compat import array_namespace, device

from reference.config import MemoryConfig

from ..arrays import Array
from .layers import Weights, adapter, rms_norm, take_slots

__all__ = ["queue_entries", "update_temporary"]


def queue_entries(compression: Array, weights: Weights, eps: float) -> Array:
    """Queue entries adapter_t(rms_norm_t(C')). Twin of
    `reference.temporary_memory.queue_entries`.

    Args:
        compression: [b, c, d], the layer's output at the compression tokens.
        weights: "norm" [d], "adapter_down" [rank, d], "adapter_up" [d, rank].
        eps: added to the mean square.

    Returns:
        [b, c, d].
    """
    return adapter(rms_norm(compression, weights["norm"], eps), weights)


def update_temporary(
    queue: Array,
    compression: Array,
    weights: Weights,
    config: MemoryConfig,
    counts: tuple[Array, Array] | None = None,
) -> Array:
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
    xp = array_namespace(queue)
    entries = queue_entries(compression, weights, config.temporary_norm_eps)
    joined = xp.concat([queue, entries], axis=1)
    size = min(config.temporary_memory_size, joined.shape[1])
    if counts is None:
        return joined[:, joined.shape[1] - size :, :]
    old, new = counts
    dropped = xp.maximum(old + new - config.temporary_memory_size, xp.zeros_like(old))
    source = xp.arange(size, dtype=old.dtype, device=device(old)) + dropped  # [b, size]
    source = xp.where(source < old, source, source - old + queue.shape[1])
    last = xp.zeros_like(source) + (joined.shape[1] - 1)
    return take_slots(joined, xp.minimum(source, last))  # slots after the last entry: any value
