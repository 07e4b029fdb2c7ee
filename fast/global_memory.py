"""The gated global memory in PyTorch: twin of `reference/global_memory.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.config import MemoryConfig

from .layers import Weights, adapter, linear, rms_norm, sigmoid

__all__ = ["gate", "propose", "read_global", "update_global"]


def propose(readout: Tensor, weights: Weights, eps: float | None) -> Tensor:
    """What the chunk proposes to remember: candidate = rms_norm(R'). Twin of
    `reference.global_memory.propose`.

    Args:
        readout: [b, m, d], the layer's output at the readout tokens.
        weights: "norm" [d].
        eps: see `rms_norm`.

    Returns:
        [b, m, d].
    """
    return rms_norm(readout, weights["norm"], eps)


def gate(candidate: Tensor, state: Tensor, weights: Weights, saturation: float) -> Tensor:
    """The share of S_t kept: g = min(1, sigmoid(W_g [candidate ; S_t] + b_g) / saturation). Twin of
    `reference.global_memory.gate`.

    Args:
        candidate, state: [b, m, d].
        weights: "gate" [1, 2d] (scalar) or [d, 2d] (vector), and "gate_bias" where there is one.
        saturation: in (0, 1]; 1.0 is the published gate.

    Returns:
        [b, m, 1] (scalar) or [b, m, d] (vector), in [0, 1]: the share of the old state kept.
    """
    joined = torch.cat([candidate, state], dim=-1)  # [b, m, 2d], candidate first
    has_bias = "gate_bias" in weights
    bias = weights["gate_bias"] if has_bias else None
    g = sigmoid(linear(joined, weights["gate"], bias))
    return g if saturation == 1.0 else torch.clamp(g / saturation, max=1.0)


def update_global(
    state: Tensor | None,
    readout: Tensor,
    weights: Weights,
    config: MemoryConfig,
    has_state: Tensor | None = None,
) -> Tensor:
    """The new state: S_{t+1} = g * S_t + (1 - g) * candidate, or the candidate on the first chunk.

    Twin of `reference.global_memory.update_global`.

    Args:
        state: [b, m, d], or None on the first chunk.
        readout: [b, m, d], R'.
        weights: a layer's "global_memory".
        has_state: [r, 1] int64, 0 where this is the sequence's first chunk, else 1; None is 1 for
            all. r is 1 or b.

    Returns:
        [b, m, d].
    """
    candidate = propose(readout, weights, config.global_norm_eps)
    if state is None:
        return candidate
    g = gate(candidate, state, weights, config.gate_saturation)
    if has_state is not None:
        g = g * has_state[..., None]
    candidate, g = candidate.to(state.dtype), g.to(state.dtype)  # under autocast g is narrower
    return torch.lerp(candidate, state, g)  # exactly one of them where g is 0 or 1


def read_global(state: Tensor, weights: Weights) -> Tensor:
    """What the next chunk sees: G = adapter_g(S), after the sink where there is one. Twin of
    `reference.global_memory.read_global`.

    Args:
        state: [b, m, d].
        weights: "adapter_down" [rank, d], "adapter_up" [d, rank], and "sink" [d] where configured.

    Returns:
        [b, m, d], or [b, 1 + m, d] with a sink.
    """
    read = adapter(state, weights)
    if "sink" not in weights:
        return read
    return torch.cat([weights["sink"].expand(len(read), 1, -1), read], dim=1)
