"""The literal schedule of the bench, which drops what it computes, gives the same result."""

import torch
from hypothesis import given

from fast.bench.literal import read_literal
from fast.model import predict
from reference import model as spec
from reference import stream

from .assertions import arrays_of, assert_logits
from .strategies import cases, random_model


@given(cases())
def test_the_literal_schedule_is_the_reference_s(case):
    config, seed, ids = case
    model = random_model(config, seed)
    expected, _ = spec.forward(ids, stream.new_state(config), arrays_of(model), config)
    hidden = read_literal(torch.tensor([ids, ids[::-1]]), model.weights, config)
    assert_logits(predict(hidden[0], model.weights, config), expected, config, "literal")
