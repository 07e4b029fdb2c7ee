"""The simulator keeps to the schedule, and the formula of the bubble to the simulator."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast.parallel.simulator import Costs, bubble, simulate

pytestmark = pytest.mark.host

few = st.integers(1, 6)
times = st.floats(0.1, 3.0)
cells = st.lists(times, min_size=1, max_size=4).map(tuple)


def step_by_step(costs, layers, chunks, workers, block, naive):
    """Seconds of a step: every cell begins once what it needs is done, one after another."""
    where = [chunk // block % workers for chunk in range(chunks)]
    free, end = [0.0] * workers, {}
    passes = (
        (costs.forward, costs.head, range(chunks), range(layers)),
        (costs.backward, 0.0, range(chunks)[::-1], range(layers)[::-1]),
    )
    for number, (cell, head, chunk_order, layer_order) in enumerate(passes):
        groups = {}
        for chunk in chunk_order:
            groups.setdefault(chunk // block, []).append(chunk)
        for group in groups.values():
            worker, before = where[group[0]], group[0] + (1 if number else -1)
            for layer in layer_order:
                for chunk in group:
                    ready = free[worker]
                    if chunk == group[0] and 0 <= before < chunks:
                        needed = layer_order if naive else [layer]
                        late = max(end[number, before, i] for i in needed)
                        ready = max(ready, late + costs.transfer * (workers > 1))
                    seconds = cell[min(chunk, len(cell) - 1)]
                    free[worker] = end[number, chunk, layer] = ready + seconds
            free[worker] += head * len(group)
    return max(free) + costs.rest


@given(st.builds(Costs, cells, cells, times, times, times), few, st.integers(1, 12), few,
       st.integers(1, 4), st.booleans())  # fmt: skip
def test_the_simulator_is_the_schedule_cell_by_cell(costs, layers, chunks, workers, block, naive):
    found = simulate(costs, layers, chunks, workers, block, naive=naive)
    expected = step_by_step(costs, layers, chunks, workers, block, naive)
    assert found.seconds == pytest.approx(expected, rel=1e-12)
    busy = step_by_step(costs, layers, chunks, 1, 1, False) - costs.rest  # one never waits
    assert found.bubble == pytest.approx(1 - busy / (workers * expected), abs=1e-12)


@given(times, times, few, few, few, few)
def test_the_bubble_is_what_the_formula_says(forward, backward, layers, workers, block, rounds):
    found = simulate(
        Costs((forward,), (backward,)), layers, block * workers * rounds, workers, block
    )
    assert found.bubble == pytest.approx(bubble(layers, workers, rounds), abs=1e-12)


def test_with_a_block_each_the_bubble_is_that_of_the_paper():
    assert bubble(36, 16) == pytest.approx(15 / 51)
    assert simulate(Costs((1.0,), (2.0,)), 36, 16, 16).bubble == pytest.approx(15 / 51)


def test_by_chunks_workers_only_wait_for_each_other():
    costs = Costs((1.0,), (2.0,))
    for workers in (1, 2, 8):
        assert simulate(costs, 4, 16, workers, naive=True).seconds == 16 * 4 * 3.0
