"""Five ways of cutting a text into chunks, as the published training uses them.

Each returns chunk sizes in text tokens, in order, that add up to the text. Source of the five:
the published implementation; where it breaks its own bounds, these keep them, and raise ValueError
where no cut does (docs/divergences.md).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

__all__ = ["at_boundaries", "fixed_size", "random_sizes", "right_aligned", "uniform"]


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}.")


def fixed_size(num_tokens: int, chunk_size: int) -> list[int]:
    """Full chunks from the start, the remainder last: (13, 5) -> [5, 5, 3].

    This is how streaming cuts. An empty text has no chunks.

    Args:
        num_tokens: tokens of the text.
        chunk_size: tokens of a full chunk.

    Returns:
        Chunk sizes, in tokens.

    Raises:
        ValueError: num_tokens below 0 or chunk_size below 1.
    """
    _at_least("num_tokens", num_tokens, 0)
    _at_least("chunk_size", chunk_size, 1)
    full, rest = divmod(num_tokens, chunk_size)
    return [chunk_size] * full + [rest] * (rest > 0)


def right_aligned(num_tokens: int, chunk_size: int, priming_length: int = 0) -> list[int]:
    """The remainder first, full chunks after it, a priming tail last:
    (13, 5) -> [3, 5, 5]; (13, 5, 2) -> [1, 5, 5, 2].

    The tail is a chunk of its own, so that what is asked last starts with both memories made.
    A text no longer than the tail is one chunk.

    Args:
        num_tokens: tokens of the text.
        chunk_size: tokens of a full chunk.
        priming_length: tokens of the tail, at most chunk_size.

    Returns:
        Chunk sizes, in tokens.

    Raises:
        ValueError: a size out of range, or a tail longer than a chunk.
    """
    _at_least("num_tokens", num_tokens, 0)
    _at_least("chunk_size", chunk_size, 1)
    _at_least("priming_length", priming_length, 0)
    if priming_length > chunk_size:
        raise ValueError(
            f"priming_length is {priming_length}, more than chunk_size {chunk_size}; the tail is "
            "one chunk, so shorten it or lengthen the chunk."
        )
    if num_tokens <= priming_length:
        return [num_tokens] * (num_tokens > 0)
    full, rest = divmod(num_tokens - priming_length, chunk_size)
    return [rest] * (rest > 0) + [chunk_size] * full + [priming_length] * (priming_length > 0)


def uniform(num_tokens: int, num_chunks: int) -> list[int]:
    """A given number of chunks of sizes that differ by one at most, larger first:
    (13, 3) -> [5, 4, 4].

    Args:
        num_tokens: tokens of the text, at least num_chunks.
        num_chunks: chunks to make.

    Returns:
        Chunk sizes, in tokens.

    Raises:
        ValueError: num_chunks below 1, or fewer tokens than chunks.
    """
    _at_least("num_chunks", num_chunks, 1)
    if num_tokens < num_chunks:
        raise ValueError(
            f"num_tokens is {num_tokens}, fewer than num_chunks {num_chunks}; a chunk needs a "
            "token, so ask for fewer chunks."
        )
    size, rest = divmod(num_tokens, num_chunks)
    return [size + 1] * rest + [size] * (num_chunks - rest)


def random_sizes(
    num_tokens: int,
    max_num_chunks: int,
    min_chunk_size: int,
    max_chunk_size: int,
    rng: np.random.Generator,
) -> list[int]:
    """A random number of chunks of random sizes within bounds.

    The number is uniform over all that fit. Every chunk starts at the minimum; each token left
    goes to a random chunk that is not full yet.

    Args:
        num_tokens: tokens of the text.
        max_num_chunks: most chunks allowed.
        min_chunk_size, max_chunk_size: bounds of every chunk, in tokens.
        rng: source of the choices: the same seed gives the same sizes.

    Returns:
        Chunk sizes, in tokens.

    Raises:
        ValueError: fewer tokens than the minimum, or bounds that no number of chunks meets.
    """
    bounds = max_num_chunks, min_chunk_size, max_chunk_size
    _check_bounds(num_tokens, *bounds)
    possible = _numbers_of_chunks(num_tokens, *bounds)
    sizes = [min_chunk_size] * int(rng.integers(possible.start, possible.stop))
    has_room = [i for i in range(len(sizes)) if min_chunk_size < max_chunk_size]
    for _ in range(num_tokens - sum(sizes)):
        pick = int(rng.integers(len(has_room)))
        sizes[has_room[pick]] += 1
        if sizes[has_room[pick]] == max_chunk_size:
            has_room.pop(pick)
    return sizes


def at_boundaries(
    ids: Sequence[int],
    max_num_chunks: int,
    min_chunk_size: int,
    max_chunk_size: int,
    boundary_ids: Collection[int],
) -> list[int]:
    """Chunks that end at boundary tokens (a full stop, a newline) where the bounds let them.

    From the start, each chunk takes the longest piece within the bounds that ends with a boundary
    token and leaves a rest that can still be cut; without such a token it takes the longest piece
    that leaves such a rest.

    Args:
        ids: token ids of the text.
        max_num_chunks: most chunks allowed.
        min_chunk_size, max_chunk_size: bounds of every chunk, in tokens.
        boundary_ids: ids after which a cut is welcome.

    Returns:
        Chunk sizes, in tokens.

    Raises:
        ValueError: fewer tokens than the minimum, or bounds that no cut meets.
    """
    _check_bounds(len(ids), max_num_chunks, min_chunk_size, max_chunk_size)
    sizes: list[int] = []
    start = 0
    while start < len(ids):
        rest, left = len(ids) - start, max_num_chunks - len(sizes) - 1
        possible = [
            size
            for size in range(min(max_chunk_size, rest), min_chunk_size - 1, -1)
            if _numbers_of_chunks(rest - size, left, min_chunk_size, max_chunk_size)
        ]
        welcome = [size for size in possible if int(ids[start + size - 1]) in boundary_ids]
        sizes.append((welcome or possible)[0])
        start += sizes[-1]
    return sizes


def _numbers_of_chunks(
    num_tokens: int, max_num_chunks: int, min_chunk_size: int, max_chunk_size: int
) -> range:
    """Numbers of chunks that can hold the text; empty where none can."""
    fewest = -(-num_tokens // max_chunk_size)
    return range(fewest, min(num_tokens // min_chunk_size, max_num_chunks) + 1)


def _check_bounds(
    num_tokens: int, max_num_chunks: int, min_chunk_size: int, max_chunk_size: int
) -> None:
    """Raise a ValueError where no cut keeps the bounds."""
    _at_least("max_num_chunks", max_num_chunks, 1)
    _at_least("min_chunk_size", min_chunk_size, 1)
    if max_chunk_size < min_chunk_size:
        raise ValueError(
            f"max_chunk_size is {max_chunk_size}, less than min_chunk_size {min_chunk_size}; "
            "swap them or widen the bounds."
        )
    if num_tokens < min_chunk_size:
        raise ValueError(
            f"num_tokens is {num_tokens}, fewer than min_chunk_size {min_chunk_size}; lower the "
            "minimum or give more text."
        )
    if not _numbers_of_chunks(num_tokens, max_num_chunks, min_chunk_size, max_chunk_size):
        raise ValueError(
            f"no cut of {num_tokens} tokens into at most {max_num_chunks} chunks of "
            f"{min_chunk_size} to {max_chunk_size} tokens exists; allow more chunks or widen the "
            "bounds."
        )
