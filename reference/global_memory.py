"""The global memory: m slots a layer, carried from chunk to chunk under a gate.

candidate = rms_norm(R')
g         = min(1, sigmoid(W_g [candidate ; S_t] + b_g) / saturation)
S_{t+1}   = g * S_t + (1 - g) * candidate
G_{t+1}   = [sink | adapter_g(S_{t+1})]                     the sink only with `sink_slot`
"""

from __future__ import annotations

import numpy as np

from .config import MemoryConfig
from .layers import Array, Weights, adapter, linear, rms_norm, sigmoid

__all__ = ["gate", "propose", "read_global", "update_global"]


def propose(readout: Array, weights: Weights, eps: float | None) -> Array:
    """What the chunk proposes to remember: candidate = rms_norm(R').

    Args:
        readout: [m, d], R', the layer's output at the readout tokens.
        weights: "norm" [d].
        eps: see `rms_norm`.

    Returns:
        [m, d].
    """
    return rms_norm(readout, weights["norm"], eps)


def gate(candidate: Array, state: Array, weights: Weights, saturation: float) -> Array:
    """The share of S_t kept: g = min(1, sigmoid(W_g [candidate ; S_t] + b_g) / saturation).

    A sigmoid is never 1, so what it keeps fades: 0.999 a chunk is a third after a thousand chunks.
    A saturation below 1 lets g be exactly 1.

    Args:
        candidate, state: [m, d].
        weights: "gate" [1, 2d] (scalar) or [d, 2d] (vector), and "gate_bias" where there is one.
        saturation: in (0, 1]; 1.0 is the published gate.

    Returns:
        [m, 1] (scalar) or [m, d] (vector), in [0, 1].
    """
    joined = np.concatenate([candidate, state], axis=-1)  # [m, 2d], candidate first
    g = sigmoid(linear(joined, weights["gate"], weights.get("gate_bias")))
    return np.where(g.real < saturation, g / saturation, np.ones_like(g))


def update_global(
    state: Array | None, readout: Array, weights: Weights, config: MemoryConfig
) -> Array:
    """The new state: S_{t+1} = g * S_t + (1 - g) * candidate, or the candidate on the first chunk.

    Args:
        state: [m, d], S_t, or None on the first chunk.
        readout: [m, d], R'.
        weights: a layer's "global_memory".

    Returns:
        [m, d], S_{t+1}.
    """
    candidate = propose(readout, weights, config.global_norm_eps)
    if state is None:
        return candidate
    g = gate(candidate, state, weights, config.gate_saturation)
    return g * state + (1 - g) * candidate


def read_global(state: Array, weights: Weights) -> Array:
    """What the next chunk sees: G_{t+1} = adapter_g(S_{t+1}), after the sink where there is one.

    Args:
        state: [m, d], S.
        weights: "adapter_down" [rank, d], "adapter_up" [d, rank], and "sink" [d] where configured.

    Returns:
        [m, d], or [1 + m, d] with a sink.
    """
    read = adapter(state, weights)
    return np.concatenate([weights["sink"][None], read]) if "sink" in weights else read
