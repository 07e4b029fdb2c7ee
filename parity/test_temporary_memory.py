"""Twins and laws of `temporary_memory.py`."""

import dataclasses

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import MemoryConfig
from fast import temporary_memory as fast
from reference import temporary_memory as spec

from .assertions import assert_near, assert_twin
from .device import tensor, tensors
from .strategies import seeds

D = 4


def weights(rng):
    return {
        "norm": rng.uniform(0.5, 1.5, D),
        "adapter_down": rng.normal(0, 0.7, (2, D)),
        "adapter_up": rng.normal(0, 0.7, (D, 2)),
    }


def config(size):
    return MemoryConfig(4, 0, size, 2, adapter_rank=2)


@given(seeds, st.integers(0, 4))
def test_queue_entries(seed, c):
    rng = np.random.default_rng(seed)
    w, x = weights(rng), rng.normal(0, 2, (2, c, D))
    found = fast.queue_entries(tensor(x), tensors(w, torch.float64), 1e-12)
    assert_twin(found, spec.queue_entries(x, w, 1e-12), "queue_entries", tensor(x))


@given(seeds, st.integers(1, 6), st.integers(0, 6), st.integers(0, 9))
def test_update_temporary(seed, size, old, new):
    rng = np.random.default_rng(seed)
    w, old = weights(rng), min(old, size)
    queue, compression = rng.normal(size=(3, old, D)), rng.normal(size=(3, new, D))
    found = fast.update_temporary(
        tensor(queue),
        tensor(compression),
        tensors(w, torch.float64),
        config(size),
    )
    for b in range(3):
        expected = spec.update_temporary(queue[b], compression[b], w, config(size))
        assert_near(found[b], expected, "T")


@given(seeds, st.integers(1, 6), st.integers(0, 6), st.integers(0, 9))
def test_update_temporary_of_a_ragged_batch_is_each_sequence_alone(seed, size, old, new):
    rng = np.random.default_rng(seed)
    w, old = weights(rng), min(old, size)
    olds, news = rng.integers(0, old + 1, 4), rng.integers(0, new + 1, 4)
    queue, compression = rng.normal(size=(4, old, D)), rng.normal(size=(4, new, D))
    found = fast.update_temporary(
        tensor(queue),
        tensor(compression),
        tensors(w, torch.float64),
        config(size),
        (tensor(olds)[:, None], tensor(news)[:, None]),
    )
    for b in range(4):
        expected = spec.update_temporary(
            queue[b, : olds[b]], compression[b, : news[b]], w, config(size)
        )
        assert_near(found[b, : len(expected)], expected, f"T of sequence {b}")


@given(seeds, st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_the_queue_keeps_exactly_the_newest(seed, size, pushes):
    """Pushed in any portions, the queue is the newest B entries in the order of the text."""
    rng = np.random.default_rng(seed)
    w = weights(rng)
    made = rng.normal(size=(sum(pushes), D))
    entries = spec.queue_entries(made, w, config(size).temporary_norm_eps)
    spec_queue = np.zeros((0, D))
    fast_queue = tensor(np.zeros((1, 0, D)))
    start = 0
    for push in pushes:
        new = made[start : start + push]
        start += push
        spec_queue = spec.update_temporary(spec_queue, new, w, config(size))
        fast_queue = fast.update_temporary(
            fast_queue, tensor(new)[None], tensors(w, torch.float64), config(size)
        )
        expected = entries[max(0, start - size) : start]
        assert_near(spec_queue, expected, "reference T")
        assert_near(fast_queue[0], expected, "fast T")


@given(seeds)
def test_the_norms_epsilon_is_its_own(seed):
    rng = np.random.default_rng(seed)
    w, tiny = weights(rng), 1e-7 * rng.normal(size=(1, 2, D))
    for eps in (1e-12, 1e-3):
        c = dataclasses.replace(config(5), temporary_norm_eps=eps)
        found = fast.update_temporary(
            tensor(np.zeros((1, 0, D))),
            tensor(tiny),
            tensors(w, torch.float64),
            c,
        )
        assert_near(found[0], spec.update_temporary(np.zeros((0, D)), tiny[0], w, c), f"eps {eps}")
