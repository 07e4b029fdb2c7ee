"""The temporary memory: a FIFO queue of at most B slots a layer, one entry per group of text.

T_{t+1} = newest B of [T_t ; adapter_t(rms_norm_t(C'))]
"""

from __future__ import annotations

import numpy as np

from .config import MemoryConfig
from .layers import Array, Weights, adapter, rms_norm

__all__ = ["queue_entries", "update_temporary"]


def queue_entries(compression: Array, weights: Weights, eps: float) -> Array:
    """Queue entries adapter_t(rms_norm_t(C')).

    Args:
        compression: [c, d], C', the layer's output at the compression tokens.
        weights: "norm" [d], "adapter_down" [rank, d], "adapter_up" [d, rank].
        eps: added to the mean square.

    Returns:
        [c, d].
    """
    return adapter(rms_norm(compression, weights["norm"], eps), weights)


def update_temporary(
    queue: Array, compression: Array, weights: Weights, config: MemoryConfig
) -> Array:
    """T_{t+1} = newest B of [T_t ; adapter_t(rms_norm_t(C'))].

    To push the entries of a chunk one by one or all at once is the same.

    Args:
        queue: [q, d], oldest first.
        compression: [c, d], C', in the order of the text.
        weights: a layer's "temporary_memory".

    Returns:
        [min(B, q + c), d], oldest first.
    """
    entries = queue_entries(compression, weights, config.temporary_norm_eps)
    joined = np.concatenate([queue, entries])
    return joined[max(0, len(joined) - config.temporary_memory_size) :]
