"""How a round is laid out in slots, against a scan over its tokens."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fast import CoMeTConfig
from fast.chunking import Round
from fast.rows import count_round, lay_out
from fast.stream import new_state

from .strategies import backbones, memories

pytestmark = pytest.mark.host

COMPRESSION, READOUT = "C", "R"


def scan(memory, open_tokens, take, close):
    """What one sequence adds to its row, token by token: text by number, C, R."""
    stride, slots = memory.compression_stride, []
    for j in range(take):
        if stride and open_tokens + j > 0 and (open_tokens + j) % stride == 0:
            slots.append(COMPRESSION)
        slots.append(j)
    if close:
        slots += [COMPRESSION] * (stride > 0 and memory.trailing_compression)
        slots += [f"{READOUT}{r}" for r in range(memory.global_memory_size)]
    return slots


@st.composite
def rounds(draw):
    """A batch, alike or ragged, at any place of a chunk; and what it reads."""
    memory = draw(memories())
    size = st.integers(0, memory.chunk_size)
    sequence = st.tuples(size, size, st.booleans(), st.integers(0, 9), st.integers(0, 5))
    b = draw(st.integers(1, 4))
    batch = [draw(sequence)] * b if draw(st.booleans()) else [draw(sequence) for _ in range(b)]
    open_tokens, take, close, row, queue = (np.array(x) for x in zip(*batch, strict=True))
    take = np.minimum(take, memory.chunk_size - open_tokens)
    close = close & (open_tokens + take > 0)
    state = new_state(CoMeTConfig(draw(backbones()), memory), batch_size=b)
    state = dataclasses.replace(
        state,
        tokens=open_tokens,
        open_tokens=open_tokens,
        row_length=row,
        queue_length=np.minimum(queue, memory.temporary_memory_size),
        chunks=np.array([draw(st.integers(0, 2)) for _ in range(b)]),
    )
    return state, Round(np.arange(b), take, close), memory


def rows_of(index, b):
    return np.broadcast_to(index, (b, index.shape[1]))


@given(rounds())
def test_a_row_is_what_a_scan_over_its_tokens_lays(case):
    state, plan, memory = case
    b, width, end = state.batch_size, int(plan.take.max()), 99
    row = lay_out(state, plan, memory, end)
    readout = width + 1 + np.arange(memory.global_memory_size)
    kinds = {width: COMPRESSION} | {int(at): f"{READOUT}{r}" for r, at in enumerate(readout)}
    counts = count_round(state, plan, row, memory)
    for i in range(b):
        take = int(plan.take[i])
        expected = scan(memory, int(state.open_tokens[i]), take, bool(plan.close[i]))
        whole = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
        own = {name: rows_of(x, b)[i] for name, x in whole.items() if x is not None}
        source = own["source"][: len(expected)].tolist()
        assert [kinds.get(at, at) for at in source] == expected
        assert own["positions"][: len(expected)].tolist() == [
            int(state.row_length[i]) + j for j in range(len(expected))
        ]
        text = [j for j, kind in enumerate(expected) if isinstance(kind, int)]
        assert own["text"][:take].tolist() == text
        marks = [j for j, kind in enumerate(expected) if kind == COMPRESSION]
        assert own["compression"][: own["entries"][0]].tolist() == marks
        if plan.close[i]:
            first = len(expected) - memory.global_memory_size
            assert own["readout"].tolist() == list(range(first, len(expected)))
        else:
            assert counts["row_length"][i] == state.row_length[i] + len(expected)
        columns = [i + j if j < take else end for j in range(width)]
        assert own["columns"].tolist() == columns
        assert own["last"][0] == max(take - 1, 0)
        assert own["closes"][0] == plan.close[i]
        assert own["has_state"][0] == (state.chunks[i] > 0)
        queue = int(state.queue_length[i]) + len(marks)
        assert counts["queue_length"][i] == min(queue, memory.temporary_memory_size)
    assert all((x >= 0).all() for x in vars(row).values() if x is not None)
    assert (row.source < width + 1 + memory.global_memory_size).all()


@given(rounds(), st.sampled_from(["last", "none"]))
def test_outputs_are_the_text_asked_for_then_what_the_memories_take(case, outputs):
    state, plan, memory = case
    assume(outputs == "none" or plan.take.any())
    whole, row = lay_out(state, plan, memory, 99), lay_out(state, plan, memory, 99, outputs)
    text = whole.text[:, :0]
    if outputs == "last":
        text = np.take_along_axis(whole.text, whole.last, axis=1)
    expected = np.concatenate([text, whole.compression, whole.readout], axis=1)
    assert np.array_equal(row.queried, expected)
    assert (row.last == 0).all()


@given(rounds())
def test_sequences_alike_share_one_row(case):
    state, plan, memory = case
    row = lay_out(state, plan, memory, 99)
    counts = zip(
        *(plan.start, plan.take, plan.close, state.open_tokens),
        *(state.row_length, state.queue_length, state.chunks > 0),
        strict=True,
    )
    assert len(row.take) == (1 if len(set(counts)) == 1 else state.batch_size)


@given(rounds())
def test_a_row_is_mapped_in_one_copy(case):
    state, plan, memory = case
    row = lay_out(state, plan, memory, 99, "none")
    copies = []
    mapped = row.map(lambda x, widths: copies.append(x) or np.split(x, np.cumsum(widths)[:-1], 1))
    assert len(copies) == 1
    for name, x in vars(row).items():
        assert x is None or np.array_equal(getattr(mapped, name), x), name
