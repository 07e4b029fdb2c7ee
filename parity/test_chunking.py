"""Ways of cutting a text, and how a call becomes rounds."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fast import chunking as fast
from reference import chunking

from .strategies import memories, splits

pytestmark = pytest.mark.host

sizes = st.integers(1, 40)
lengths = st.integers(0, 200)


@given(lengths, sizes)
def test_fixed_size_fills_from_the_left(n, size):
    cut = chunking.fixed_size(n, size)
    assert sum(cut) == n
    assert all(c == size for c in cut[:-1])
    assert all(1 <= c <= size for c in cut)


@given(lengths, sizes, st.integers(0, 40))
def test_right_aligned_fills_from_the_right_before_the_tail(n, size, tail):
    assume(tail <= size)
    cut = chunking.right_aligned(n, size, tail)
    assert sum(cut) == n
    assert all(1 <= c <= size for c in cut)
    if n > tail:
        body = cut[:-1] if tail else cut
        assert all(c == size for c in body[1:])
        assert not tail or cut[-1] == tail


@given(st.integers(1, 200), sizes)
def test_uniform_sizes_differ_by_one_at_most(n, chunks):
    assume(n >= chunks)
    cut = chunking.uniform(n, chunks)
    assert sum(cut) == n
    assert len(cut) == chunks
    assert max(cut) - min(cut) <= 1
    assert cut == sorted(cut, reverse=True)


bounds = st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 20))


@given(st.integers(1, 120), bounds, st.integers(0, 2**16))
def test_random_sizes_keep_every_bound_or_say_that_none_can(n, limits, seed):
    most, low, high = limits
    assume(low <= high)
    possible = n >= low and any(k * low <= n <= k * high for k in range(1, most + 1))
    args = (n, most, low, high)
    if not possible:
        with pytest.raises(ValueError, match="no cut of|fewer than"):
            chunking.random_sizes(*args, np.random.default_rng(seed))
        return
    cut = chunking.random_sizes(*args, np.random.default_rng(seed))
    assert sum(cut) == n
    assert len(cut) <= most
    assert all(low <= c <= high for c in cut)
    assert cut == chunking.random_sizes(*args, np.random.default_rng(seed))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=120), bounds, st.sets(st.integers(0, 5)))
def test_at_boundaries_keeps_every_bound_and_ends_at_boundaries_where_it_can(ids, limits, stops):
    most, low, high = limits
    assume(low <= high)
    n = len(ids)

    def can(m, k):
        return m == 0 or any(j * low <= m <= j * high for j in range(1, k + 1))

    if n < low or not can(n, most):
        with pytest.raises(ValueError, match="no cut of|fewer than"):
            chunking.at_boundaries(ids, most, low, high, stops)
        return
    cut = chunking.at_boundaries(ids, most, low, high, stops)
    assert sum(cut) == n
    assert len(cut) <= most
    assert all(low <= c <= high for c in cut)
    start = 0
    for number, size in enumerate(cut):
        left = most - number - 1
        welcome = [
            c
            for c in range(low, min(high, n - start) + 1)
            if ids[start + c - 1] in stops and can(n - start - c, left)
        ]
        if welcome:
            assert size == max(welcome), "the longest piece that ends at a boundary"
        start += size


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: chunking.fixed_size(-1, 4), "num_tokens is -1"),
        (lambda: chunking.fixed_size(5, 0), "chunk_size is 0"),
        (lambda: chunking.right_aligned(9, 4, 5), "priming_length is 5, more than chunk_size 4"),
        (lambda: chunking.uniform(2, 3), "num_tokens is 2, fewer than num_chunks 3"),
        (lambda: chunking.uniform(2, 0), "num_chunks is 0"),
        (lambda: chunking.random_sizes(3, 2, 4, 8, None), "num_tokens is 3, fewer than min"),
        (lambda: chunking.random_sizes(30, 2, 4, 8, None), "no cut of 30 tokens into at most 2"),
        (lambda: chunking.random_sizes(9, 2, 5, 4, None), "max_chunk_size is 4, less than min"),
        (lambda: chunking.at_boundaries([1] * 7, 9, 4, 5, {1}), "no cut of 7 tokens"),
        (lambda: chunking.at_boundaries([], 9, 4, 5, {1}), "num_tokens is 0, fewer than min"),
    ],
)
def test_impossible_cuts_say_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_examples():
    assert chunking.fixed_size(13, 5) == [5, 5, 3]
    assert chunking.right_aligned(13, 5) == [3, 5, 5]
    assert chunking.right_aligned(13, 5, 2) == [1, 5, 5, 2]
    assert chunking.right_aligned(2, 5, 3) == [2]
    assert chunking.uniform(13, 3) == [5, 4, 4]
    assert chunking.at_boundaries([0, 0, 1, 0, 0, 0, 1, 0], 9, 1, 4, {1}) == [3, 4, 1]


@given(memories(), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.data())
def test_rounds_read_everything_and_never_overfill_a_chunk(memory, lengths, data):
    size = memory.chunk_size
    filled = np.array([data.draw(st.integers(0, size)) for _ in lengths])
    rounds = list(fast.plan_rounds(np.array(lengths), filled, size))
    assert sum(r.take for r in rounds).tolist() == lengths
    start = np.zeros(len(lengths), dtype=int)
    for r in rounds:
        assert (r.start == start).all()
        start = start + r.take
        assert (filled + r.take <= size).all()
        assert (~r.close | (filled + r.take == size)).all(), "a chunk closes when it is full"
        filled = np.where(r.close, 0, filled + r.take)
    assert not rounds[-1].close.all()


@given(memories(), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.data())
def test_waiting_for_a_cut_changes_no_sequence_s_chunks(memory, lengths, data):
    """Each reads the pieces that it reads alone, and is cut at its own borders, all at once."""
    size, every, by_hand = memory.chunk_size, data.draw(st.integers(1, 4)), None
    if data.draw(st.booleans()):
        lengths = [lengths[0]] * len(lengths)
        by_hand = data.draw(splits(lengths[0]))
    filled = np.array([data.draw(st.integers(0, size)) for _ in lengths])
    chunks = np.array([data.draw(st.integers(0, 5)) for _ in lengths])
    rounds = list(fast.plan_rounds(np.array(lengths), filled, size, by_hand, chunks, every))
    for i, n in enumerate(lengths):
        alone = fast.plan_rounds(np.array([n]), filled[i : i + 1], size, by_hand)
        expected = [(p.start[0], p.take[0], p.close[0]) for p in alone]
        active = [r for r in rounds if r.take[i] or r.close[i]]
        assert [(r.start[i], r.take[i], r.close[i]) for r in active] == expected
        closed = chunks[i] + np.cumsum([r.close[i] for r in rounds])
        cuts = {int(c) for c, r in zip(closed, rounds, strict=True) if r.cut[i]}
        assert cuts == {c for c in range(chunks[i] + 1, closed[-1] + 1) if c % every == 0}
    for r in rounds:
        ended = r.start + r.take == lengths
        assert not r.cut.any() or (r.cut | ended).all(), "one cut ends the window of all"
