"""What was made under `torch.inference_mode()` can be used with gradients, as what was made under
`torch.no_grad()` can."""

import numpy as np
import pytest
import torch
from hypothesis import given

from fast import CoMeTModel, CoMeTState

from .assertions import array, assert_near
from .device import tensor
from .strategies import cases, random_model
from .test_windows import GRADIENTS

pytestmark = pytest.mark.host  # the mode is PyTorch's, and asks no device


def read_on(model, ids, state, close):
    """The loss of text after a state, the gradients that it leaves, and the state then."""
    text = tensor([ids * 2])
    if close:
        state = model.close_chunk(state)
    out = model(text, labels=text, state=state, logits="last")
    out.loss.backward()
    for window in model.windows(text, text, state=state.detach(), backprop_chunks=1):
        window.loss.backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return out, found


@given(cases())
def test_a_state_of_inference_mode_can_be_trained_on(case):
    config, seed, ids = case
    model = random_model(config, seed)
    states = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            state = model.generate(tensor([ids]), max_new_tokens=2).state
            states.append(CoMeTState.cat([state.fork()]).select([0]))
    assert states[1].keys[0].is_inference()
    for close in (False, True):
        (a, expected), (b, found) = (read_on(model, ids, state, close) for state in states)
        assert_near(b.loss.detach(), array(a.loss.detach()), "loss")
        assert b.state.keys[0].requires_grad
        for x, y in zip(expected, found, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert_near(y, array(x), "gradient", GRADIENTS)
    assert model.generate(tensor([ids]), states[1], 3).ids == (
        model.generate(tensor([ids]), states[0], 3).ids
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_that_was_made_under_inference_mode_is_trained(make_config, tmp_path, mode):
    """From its weights, at random, or from a file."""
    config = make_config()
    text = tensor(np.arange(9)[None] % 11)
    before = random_model(config, 0)
    before.save_pretrained(tmp_path)
    with mode():
        copies = {name: p.detach() + 0.0 for name, p in random_model(config, 0).named_parameters()}
        models = [
            random_model(config, 0),
            CoMeTModel.from_pretrained(tmp_path, device=before.device),
            CoMeTModel(config, seed=3, dtype=torch.float64, device=before.device),
        ]
        models[2].load_state_dict(copies)
        state = before(text).state
    before(text, labels=text, state=state).loss.backward()
    for model in models:
        model(text, labels=text, state=state).loss.backward()
        for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
            assert_near(p.grad, array(q.grad), f"gradient of {name}", GRADIENTS)
