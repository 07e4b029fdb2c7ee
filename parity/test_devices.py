"""Nothing in the stream asks the device for a value, or mixes devices.

On the meta device a tensor has a shape and no numbers: what would need one, on the host or beside a
tensor of another device, raises. What passes here can be queued on a GPU without a stop.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast.model import IGNORE, predict, sum_of_losses
from fast.parameters import ParameterTree
from fast.stream import close_chunk, new_state, read
from reference.parameters import map_parameters, shapes

from .strategies import configs, corner_lengths

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@contextmanager
def on_the_device():
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        raise AssertionError(f"a value was asked for, or devices were mixed: {error}") from error


def meta_weights(config, dtype):
    """Weights without numbers."""
    tree = map_parameters(
        lambda _, shape: torch.empty(shape, dtype=dtype, device="meta"), shapes(config)
    )
    return ParameterTree(tree)


@st.composite
def meta_cases(draw):
    config, dtype = draw(configs()), draw(DTYPES)
    lengths = np.array(draw(st.lists(corner_lengths(config), min_size=1, max_size=3)))
    ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64, device="meta")
    return config, dtype, lengths, ids


def assert_on_meta(tensors, dtype, what):
    for tensor in tensors:
        assert tensor.device.type == "meta", f"{what} on {tensor.device}"
        assert tensor.dtype == dtype, f"{what} is {tensor.dtype}"


@given(meta_cases(), st.booleans())
def test_reading_and_decoding_stay_on_the_device(case, alike):
    config, dtype, lengths, ids = case
    params = meta_weights(config, dtype)
    state = new_state(config, dtype, len(ids), "meta")
    with torch.no_grad(), on_the_device():
        for part in read(
            ids, state, params, config, lengths=None if alike else lengths, outputs="last"
        ):
            state = part.state
        for _ in range(config.memory.chunk_size + 1):  # into the next chunk
            for part in read(ids[:, :1], state, params, config, outputs="last"):
                state = part.state
            logits = predict(part.last(None), params, config)
        state = close_chunk(state, params, config)
    assert_on_meta([logits], dtype, "logits")
    assert_on_meta((*state.global_state, *state.temporary_memory), dtype, "memories")


@given(meta_cases())
def test_a_training_step_stays_on_the_device(case):
    config, dtype, lengths, ids = case
    params = meta_weights(config, dtype)
    loss = torch.zeros((), device="meta")
    with on_the_device():
        for part in read(
            ids, new_state(config, dtype, len(ids), "meta"), params, config, lengths=lengths
        ):
            targets = torch.full(part.hidden.shape[:2], IGNORE, device="meta")
            loss = loss + sum_of_losses(predict(part.hidden, params, config), targets)
        loss.backward()
    found = [p.grad for p in params.parameters() if p.grad is not None]
    assert len(found) > 10
    assert_on_meta(found, dtype, "gradient")


def test_a_value_asked_for_would_be_noticed():
    with pytest.raises((NotImplementedError, RuntimeError)):
        bool(torch.zeros((), device="meta") > 0)
    with pytest.raises(RuntimeError):
        torch.zeros(2, device="meta") + torch.zeros(2)
