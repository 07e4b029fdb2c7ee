"""What the bench compares with says the same: the literal schedule, which drops what it computes."""

from hypothesis import given

from fast.bench.literal import read_literal
from fast.model import predict
from reference import model as spec
from reference import stream

from .assertions import arrays_of, assert_logits
from .device import tensor
from .strategies import cases, random_model


@given(cases())
def test_the_literal_schedule_is_the_reference_s(case):
    config, seed, ids = case
    model = random_model(config, seed)
    expected, _ = spec.forward(ids, stream.new_state(config), arrays_of(model), config)
    hidden = read_literal(tensor([ids, ids[::-1]]), model.weights, config)
    assert_logits(predict(hidden[0], model.weights, config), expected, config, "literal")


@given(cases())
def test_the_literal_schedule_goes_on_from_memories(case):
    """From a state without an open chunk, and up to one."""
    config, seed, ids = case
    model = random_model(config, seed)
    params = arrays_of(model)
    _, before = stream.read(ids, stream.new_state(config), params, config)
    before = stream.close_chunk(before, params, config)
    expected, _ = spec.forward(ids[::-1], before, params, config)
    state = model.close_chunk(model(tensor([ids]), logits="none").state)
    for close_last in (False, True):
        hidden = read_literal(tensor([ids[::-1]]), model.weights, config, state, close_last)
        logits = predict(hidden[0], model.weights, config)
        assert_logits(logits, expected, config, "literal")
