"""The model around the stream: logits, loss, greedy decoding.

`params`, `config` and `state` are as in `stream`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from .config import CoMeTConfig
from .layers import Array, Weights, linear, rms_norm
from .stream import StreamState, read

__all__ = ["IGNORE", "forward", "generate", "language_loss", "predict"]

IGNORE = -100
"""Label of a token that is not predicted."""


def forward(
    ids: Sequence[int],
    state: StreamState,
    params: Weights,
    config: CoMeTConfig,
    *,
    chunk_sizes: Sequence[int] | None = None,
    roll: bool = True,
    backprop_chunks: int | None = None,
) -> tuple[Array, StreamState]:
    """Read text and predict: the arguments are those of `read`.

    Returns:
        Logits [n, vocab], where row j predicts the token after ids[j]; the state after the text.
    """
    hidden, state = read(
        ids,
        state,
        params,
        config,
        chunk_sizes=chunk_sizes,
        roll=roll,
        backprop_chunks=backprop_chunks,
    )
    return predict(hidden, params, config), state


def predict(hidden: Array, params: Weights, config: CoMeTConfig) -> Array:
    """Logits: W rms_norm(H'), W the embedding table where tied.

    Args:
        hidden: [n, d], the top layer's output at text tokens.

    Returns:
        [n, vocab].
    """
    tied = config.backbone.tie_word_embeddings
    table = params["embed_tokens"] if tied else params["lm_head"]
    return linear(rms_norm(hidden, params["norm"], config.backbone.rms_norm_eps), table)


def language_loss(logits: Array, labels: Sequence[int]) -> Array:
    """Mean over labels of -log softmax(logits), each token predicted from the one before it.

    Labels are shifted over the whole text, so a chunk's last token predicts the next one's first.

    Args:
        logits: [n, vocab].
        labels: [n], the text's own ids, or IGNORE where not predicted; the first is not.

    Returns:
        Scalar, nats per label; nan where nothing is predicted.
    """
    targets = np.asarray(labels)[1:]
    rows = np.flatnonzero(targets != IGNORE)
    scores = logits[rows]
    highest = scores.real.max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(scores - highest).sum(axis=-1)) + highest[:, 0]
    picked = scores[np.arange(len(rows)), targets[rows]]
    return (normaliser - picked).sum() / len(rows) if len(rows) else np.full((), np.nan)


def generate(
    ids: Sequence[int],
    state: StreamState,
    params: Weights,
    config: CoMeTConfig,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    roll: bool = True,
) -> tuple[list[int], StreamState]:
    """Greedy decoding: read, take the likeliest token, read that, and so on.

    Args:
        ids: [n >= 1] text to continue.
        state: where the stream stands.
        max_new_tokens: text tokens at most; 0 reads the text alone.
        stop_ids: decoding ends after one of these.
        roll: whether new tokens open new chunks, which keeps memory flat; False stays in the open
            chunk, as the published code does.

    Returns:
        The new tokens; the state, which has read them all.
    """
    logits, state = forward(ids, state, params, config)
    new: list[int] = []
    while len(new) < max_new_tokens:
        new.append(int(np.argmax(logits[-1].real)))
        logits, state = forward(new[-1:], state, params, config, roll=roll)
        if new[-1] in stop_ids:
            break
    return new, state
