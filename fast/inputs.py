"""Checks of what a user passes in: each returns the argument in its one form, or says what is wrong.

A message tells the value seen, what was expected, and what to do. `CoMeTModel` and the engine on
arrays share them: arrays are any library's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj

from .arrays import Array, all_finite, dtype_name, is_integer, numbers, shown
from .state import MOST_STREAMS, CoMeTState

__all__ = [
    "IGNORE",
    "MOST",
    "MOST_STREAMS",
    "check_call",
    "check_choice",
    "check_chunk_sizes",
    "check_count",
    "check_flag",
    "check_ids",
    "check_kind",
    "check_labels",
    "check_lengths",
    "check_logits",
    "check_sampling",
    "check_state",
    "check_stop_ids",
    "check_vocabulary",
    "check_watchers",
    "zero_padding",
]

IGNORE = -100
"""Label of a token that is not predicted, as in PyTorch's cross entropy."""


MOST = 2**62
"""The largest count: what is added to it still is an int64."""


def check_count(name: str, value: int, least: int, most: int = MOST) -> int:
    """An integer of at least `least` and at most `most`, or a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {shown(value)}; expected an integer of at least {least}.")
    if value > most:
        raise ValueError(f"{name} is {shown(value)}; expected an integer of at most {most}.")
    return int(value)


def check_flag(name: str, value: bool) -> None:
    """Raise ValueError unless the value is True or False."""
    check_kind(name, value, (bool, np.bool_), "True or False")


def check_kind(name: str, value: Any, kind: Any, wanted: str) -> None:
    """Raise ValueError unless the value is of a class, or of one of a tuple of them.

    Args:
        wanted: the class, and where such a value comes from, in words.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} is a {type(value).__name__}; expected {wanted}.")


def check_state(state: Any) -> None:
    """Raise ValueError unless it is a state at all; whether it fits, it tells itself."""
    check_kind("state", state, CoMeTState, "a CoMeTState, such as out.state or model.new_state()")


def check_watchers(recorder: Any, on_token: Callable[..., None] | None = None) -> None:
    """Raise ValueError unless what watches a call is None, or can be told of it."""
    if recorder is not None and not hasattr(recorder, "begin"):
        raise ValueError(f"recorder is a {type(recorder).__name__}; expected a fast.Recorder.")
    if on_token is not None and not callable(on_token):
        raise ValueError(f"on_token is a {type(on_token).__name__}; expected a function.")


def check_logits(largest: Array) -> None:
    """Raise FloatingPointError unless each sequence's largest logit is a finite number.

    Args:
        largest: [b], NaN where a logit is.
    """
    if not all_finite(largest):
        raise FloatingPointError(
            f"logits are not finite numbers: a stream has left the range of {dtype_name(largest)}. "
            "Read again, from a state that check_finite passes, in a wider dtype."
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        wanted = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{name} is {shown(value)}; expected {wanted}.")


def _check_integers(name: str, ids: Array, like: Array) -> Array:
    """[b, n] int64 from integers [b, n] or [n], or a ValueError.

    Args:
        name: of the argument.
        ids: of it.
        like: an array of the model's library, on its device.
    """
    xp = array_namespace(like)
    kind = "tensor" if xp.__name__.endswith("torch") else "array"
    if not is_array_api_obj(ids) or array_namespace(ids) is not xp:
        found = f"{type(ids).__module__.partition('.')[0]}.{type(ids).__name__}"
        found = found.removeprefix("builtins.")
        raise ValueError(
            f"{name} is a {found}; expected a{'n' * (kind == 'array')} {kind}, e.g. "
            f"{xp.__name__.split('.')[-1]}.{'tensor' if kind == 'tensor' else 'asarray'}({name})."
        )
    if not is_integer(ids):
        raise ValueError(f"{name} has dtype {ids.dtype}; expected integers, e.g. int64.")
    layout = str(getattr(ids, "layout", "torch.strided"))
    if layout != "torch.strided":
        raise ValueError(f"{name} has layout {layout}; expected a dense tensor.")
    ids = xp.astype(ids, xp.int64, copy=False)
    return ids[None, :] if ids.ndim == 1 else ids


def check_ids(ids: Array, like: Array) -> Array:
    """Text of a call, [b, n] int64 with b and n at least 1, or a ValueError.

    Args:
        ids: [b, n] or [n] integers.
        like: an array of the model's library, on its device.
    """
    ids = _check_integers("ids", ids, like)
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}; expected [batch, tokens] with at least one of "
            "each: an empty text has nothing to read."
        )
    if device(ids) != device(like):
        raise ValueError(
            f"ids is on {device(ids)}, the model on {device(like)}; move one: "
            "ids.to(model.device), or make it there."
        )
    return ids


def check_call(
    model: Any,
    ids: Array,
    lengths: Array | Sequence[int] | None,
    state: CoMeTState | None,
    recorder: Any,
) -> tuple[Array, np.ndarray, CoMeTState]:
    """What every call of a model or an engine takes, in its one form, or a ValueError.

    Args:
        model: a `CoMeTModel` or a `CoMeTEngine`.
        ids: [b, n] or [n] integers in [0, vocab_size); padding may be anything.
        lengths: [b] tokens of each sequence, 1 to n; None is n for all.
        state: where the streams stand; None starts new ones.
        recorder: what watches, or None.

    Returns:
        ids [b, n] int64, zero in the padding; lengths [b] int64 on the host; the state.
    """
    check_watchers(recorder)
    like = model.weights["norm"]
    ids = check_ids(ids, like)
    sizes = check_lengths(lengths, *ids.shape)
    ids = zero_padding(ids, sizes)
    check_vocabulary(ids, model.config.backbone.vocab_size)
    if state is None:
        state = model.new_state(ids.shape[0])
    check_state(state)
    state.check(model.config, ids.shape[0], like)
    return ids, sizes, state


def check_lengths(lengths: Array | Sequence[int] | None, b: int, n: int) -> np.ndarray:
    """[b] int64 tokens of each sequence, 1 to n; None is n for all. Else a ValueError."""
    if lengths is None:
        return np.full(b, n)
    found = numbers(lengths)
    if found.shape != (b,) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"lengths is {shown(lengths)}; expected {b} integers, one a sequence.")
    if found.min() < 1 or found.max() > n:
        raise ValueError(f"lengths is {shown(found.tolist())}; expected 1 to {n} tokens each.")
    return found.astype(np.int64)


def zero_padding(ids: Array, lengths: np.ndarray) -> Array:
    """[b, n] with zeros after each sequence's length: padding may be anything."""
    xp = array_namespace(ids)
    is_text = np.arange(ids.shape[1]) < lengths[:, None]
    return xp.where(xp.asarray(is_text, device=device(ids)), ids, xp.zeros_like(ids))


def check_vocabulary(ids: Array, vocab_size: int) -> None:
    """Raise ValueError unless all ids are in [0, vocab_size)."""
    xp = array_namespace(ids)
    low, high = int(xp.min(ids)), int(xp.max(ids))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"ids range from {low} to {high}; expected [0, {vocab_size}), the model's vocabulary. "
            "Is this the model's tokenizer?"
        )


def check_labels(labels: Array, ids: Array, lengths: np.ndarray, vocab_size: int) -> Array:
    """Labels, [b, n] int64, or a ValueError.

    Args:
        labels: [b, n] or [n] integers; a sequence's first, and its padding, may be anything.
        ids: [b, n], the text.
        lengths: [b] tokens of each sequence.
        vocab_size: labels are in [0, vocab_size), or IGNORE.
    """
    labels = _check_integers("labels", labels, ids)
    if labels.shape != ids.shape or device(labels) != device(ids):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, on {device(labels)}; expected "
            f"{tuple(ids.shape)} on {device(ids)}, like ids."
        )
    used = zero_padding(labels, lengths)[:, 1:]
    foreign = (used != IGNORE) & ((used < 0) | (used >= vocab_size))
    if foreign.any():
        raise ValueError(
            f"labels holds {int(used[foreign][0])}; expected [0, {vocab_size}), or {IGNORE} for "
            "a token that is not predicted."
        )
    return labels


def check_chunk_sizes(chunk_sizes: Sequence[int], lengths: np.ndarray, n: int) -> list[int]:
    """Sizes of a call's chunks, in tokens, that add up to its n, or a ValueError.

    Args:
        chunk_sizes: integers of at least 1.
        lengths: [b] tokens of each sequence, which must all be n.
        n: tokens of the call.
    """
    is_list = isinstance(chunk_sizes, (Sequence, np.ndarray)) and np.ndim(chunk_sizes) == 1
    if not is_list:  # a set has no order
        kind = type(chunk_sizes).__name__
        raise ValueError(f"chunk_sizes is a {kind}; expected a list of sizes in tokens.")
    found = [check_count("chunk_sizes", size, 1) for size in chunk_sizes]
    if sum(found) != n:
        raise ValueError(
            f"chunk_sizes is {shown(found)}, {sum(found)} tokens; expected sizes that add up to the "
            f"text's {n}."
        )
    if (lengths != n).any():
        raise ValueError(
            "chunk_sizes cuts all sequences alike, but lengths differ; read them one by one."
        )
    return found


def check_stop_ids(stop_ids: Collection[int]) -> frozenset[int]:
    """Stop tokens as a set, or a ValueError."""
    if not isinstance(stop_ids, Collection) or isinstance(stop_ids, str):
        raise ValueError(f"stop_ids is {shown(stop_ids)}; expected ids, e.g. (2,).")
    return frozenset(check_count("a stop id", i, 0) for i in stop_ids)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError unless the arguments of `sampling.sample` are in range."""
    if isinstance(temperature, np.floating):  # a narrow one cannot be compared with the largest
        temperature = temperature.item()
    if not _is_number(temperature) or not 0.0 <= temperature <= sys.float_info.max:
        raise ValueError(
            f"temperature is {shown(temperature)}; expected a finite number, 0 for greedy."
        )
    if top_k is not None:
        check_count("top_k", top_k, 1)
    if top_p is not None and not (_is_number(top_p) and 0.0 < top_p <= 1.0):
        raise ValueError(f"top_p is {shown(top_p)}; expected a number in (0, 1], or None.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
