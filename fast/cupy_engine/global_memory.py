"""The gated global memory on arrays: twin of `reference/global_memory.py`."""

from __future__ import annotations

from array_api_compat import array_namespace

from reference.config import MemoryConfig

from ..arrays import Array
from .layers import Weights, adapter, choose, linear, narrow, rms_norm, sigmoid, widen
from .operations import operation

__all__ = ["gate", "propose", "read_global", "update_global"]

Arrays = tuple[Array, Array]


def propose(readout: Array, weights: Weights, eps: float | None) -> Array:
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


def gate(candidate: Array, state: Array, weights: Weights, saturation: float) -> Array:
    """The share of S_t kept: g = min(1, sigmoid(W_g [candidate ; S_t] + b_g) / saturation). Twin of
    `reference.global_memory.gate`.

    Args:
        candidate, state: [b, m, d].
        weights: "gate" [1, 2d] (scalar) or [d, 2d] (vector), and "gate_bias" where there is one.
        saturation: in (0, 1]; 1.0 is the published gate.

    Returns:
        [b, m, 1] (scalar) or [b, m, d] (vector), in [0, 1]: the share of the old state kept.
    """
    xp = array_namespace(candidate)
    joined = xp.concat([candidate, state], axis=-1)  # [b, m, 2d], candidate first
    logit = linear(joined, weights["gate"], weights.get("gate_bias"))
    g = sigmoid(widen(logit)) / saturation
    return narrow(xp.minimum(g, xp.ones_like(g)), logit)


@operation
def update_global(
    state: Array | None,
    readout: Array,
    weights: Weights,
    config: MemoryConfig,
    has_state: Array | None = None,
    closes: Array | None = None,
) -> Arrays:
    """The new state S_{t+1} = g * S_t + (1 - g) * candidate, or the candidate on the first chunk;
    and what the next chunk sees of it, so that one pass makes both.

    Twin of `reference.global_memory.update_global`, and of `read_global` after it.

    Args:
        state: [b, m, d], or None on the first chunk.
        readout: [b, m, d], R'.
        weights: a layer's "global_memory".
        config: gate, saturation and epsilon.
        has_state: [r, 1] int64, 0 where this is the sequence's first chunk, else 1; None is 1 for
            all.
        closes: [r, 1] int64, 1 where the chunk closes, else 0, where the state stays as it was;
            None is 1 for all.

    Returns:
        S_{t+1}, [b, m, d], and G_{t+1}, see `read_global`.
    """
    candidate = propose(readout, weights, config.global_norm_eps)
    if state is None:
        return candidate, read_global(candidate, weights)
    g = widen(gate(candidate, state, weights, config.gate_saturation))
    if has_state is not None:
        g = g * narrow(has_state, g)[:, :, None]
    new = narrow(g * widen(state) + (1.0 - g) * widen(candidate), state)
    if closes is not None:
        new = choose(closes[:, :, None] > 0, new, state)
    return new, read_global(new, weights)


def read_global(state: Array, weights: Weights) -> Array:
    """What the next chunk sees: G = adapter_g(S), after the sink where there is one. Twin of
    `reference.global_memory.read_global`.

    Args:
        state: [b, m, d].
        weights: "adapter_down" [rank, d], "adapter_up" [d, rank], and "sink" [d] where configured.

    Returns:
        [b, m, d], or [b, 1 + m, d] with a sink.
    """
    xp, (b, _, d), read = array_namespace(state), state.shape, adapter(state, weights)
    if "sink" not in weights:
        return read
    return xp.concat([xp.broadcast_to(weights["sink"][None, None, :], (b, 1, d)), read], axis=1)
