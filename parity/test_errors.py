"""Bad input gets an error that says what was wrong, what was expected and what to do, and leaves
the state that was passed in as it was."""

import pytest
import torch

from fast import CoMeTModel, CoMeTState

from .assertions import assert_state_equal
from .device import DEVICE, tensor
from .strategies import random_model

TEXT = tensor([[1, 2, 3, 4, 5, 6]])


@pytest.fixture
def model(make_config):
    return random_model(make_config(), 0)


@pytest.fixture
def state(model):
    return model(TEXT, logits="none").state


CALLS = [
    (lambda m, s: m([1, 2], state=s), "ids is a list; expected a tensor"),
    (lambda m, s: m(TEXT.double(), state=s), "ids has dtype torch.float64; expected integers"),
    (lambda m, s: m(TEXT > 2, state=s), "ids has dtype torch.bool"),
    (lambda m, s: m(TEXT[:, :0], state=s), r"ids has shape \(1, 0\).*empty text"),
    (lambda m, s: m(TEXT[None], state=s), r"ids has shape \(1, 1, 6\)"),
    (lambda m, s: m(TEXT + 5, state=s), r"ids range from 6 to 11; expected \[0, 11\)"),
    (lambda m, s: m(TEXT - 2, state=s), "ids range from -1"),
    (lambda m, s: m(TEXT.to("meta"), state=s), f"ids is on meta, the model on {DEVICE}; move one"),
    (lambda m, s: m(TEXT, lengths=[7], state=s), r"lengths is \[7\]; expected 1 to 6"),
    (lambda m, s: m(TEXT, lengths=[0], state=s), r"lengths is \[0\]; expected 1 to 6"),
    (lambda m, s: m(TEXT, lengths=[3, 3], state=s), "expected 1 integers"),
    (lambda m, s: m(TEXT, lengths=[2.5], state=s), "expected 1 integers"),
    (lambda m, s: m(TEXT, labels=TEXT[:, :3], state=s), r"labels has shape \(1, 3\)"),
    (lambda m, s: m(TEXT, labels=TEXT.float(), state=s), "labels has dtype torch.float32"),
    (lambda m, s: m(TEXT, labels=TEXT > 0, state=s), "labels has dtype torch.bool"),
    (lambda m, s: m(TEXT, labels=TEXT.tolist(), state=s), "labels is a list"),
    (lambda m, s: m(TEXT, labels=TEXT + 20, state=s), r"labels holds 22; expected \[0, 11\)"),
    (lambda m, s: m(TEXT, labels=TEXT * 0 - 1, state=s), "labels holds -1"),
    (lambda m, s: m(TEXT, state=s, logits="some"), "logits is 'some'; expected 'all'"),
    (lambda m, s: m(TEXT, state=s, chunk_sizes=[3, 2]), r"chunk_sizes is \[3, 2\], 5 tokens"),
    (
        lambda m, s: m(TEXT, state=s, chunk_sizes=[6, 0]),
        "chunk_sizes is 0; expected an integer of at least 1",
    ),
    (lambda m, s: m(TEXT, state=s, lengths=[5], chunk_sizes=[3, 3]), "but lengths differ"),
    (lambda m, s: m(TEXT, state=s, chunk_sizes=[2.5, 3.5]), "chunk_sizes is 2.5; expected an int"),
    (lambda m, s: m(TEXT, state=s, backprop_chunks=0), "backprop_chunks is 0"),
    (lambda m, s: m(TEXT, state=s, backprop_chunks=1.5), "backprop_chunks is 1.5"),
    (lambda m, s: m.windows(TEXT, TEXT, backprop_chunks=0), "backprop_chunks is 0"),
    (lambda m, s: m.windows(TEXT, TEXT, backprop_chunks=None), "backprop_chunks is None"),
    (lambda m, s: m.windows(TEXT, None, backprop_chunks=2), "labels is a NoneType; expected a"),
    (
        lambda m, s: m.windows(TEXT, TEXT, [7], backprop_chunks=2),
        r"lengths is \[7\]; expected 1 to",
    ),
    (lambda m, s: m(TEXT.expand(2, -1), state=s), "the state has batch size 1, the input 2"),
    (lambda m, s: m.generate(TEXT, s, max_new_tokens=-1), "max_new_tokens is -1"),
    (lambda m, s: m.generate(TEXT, s, max_new_tokens=2.5), "max_new_tokens is 2.5"),
    (lambda m, s: m.generate(TEXT, s, stop_ids=3), "stop_ids is 3; expected ids"),
    (lambda m, s: m.generate(TEXT, s, stop_ids=["3"]), "a stop id is '3'"),
    (lambda m, s: m.generate(TEXT, s, temperature=-1.0), "temperature is -1.0"),
    (lambda m, s: m.generate(TEXT, s, temperature=1.0, top_k=0), "top_k is 0"),
    (lambda m, s: m.generate(TEXT, s, temperature=1.0, top_k=1.5), "top_k is 1.5"),
    (lambda m, s: m.generate(TEXT, s, temperature=1.0, top_p=1.5), "top_p is 1.5"),
    (lambda m, s: m.generate(TEXT[:, :0], s), "empty text"),
    (lambda m, s: m.new_state(0), "batch_size is 0"),
    (lambda m, s: s.fork(0), "copies is 0"),
    (lambda m, s: s.select([]), "rows is"),
    (lambda m, s: s.select([1]), r"rows is \[1\]; expected integer indices in \[0, 1\)"),
    (lambda m, s: s.select([0, -1]), r"rows is \[0, -1\]; expected integer indices in \[0, 1\)"),
    (lambda m, s: s.forget_temporary(), "a chunk is open"),
    (lambda m, s: s.select([True]), r"rows is \[True\]; expected integer indices"),
    (lambda m, s: s.forget_temporary([1]), r"rows is \[1\]; expected 1 times True or False"),
    (lambda m, s: s.forget_temporary([True, False]), r"rows is \[True, False\]; expected 1 times"),
    (lambda m, s: m(TEXT, state=m(TEXT)), "state is a CoMeTOutput; expected a CoMeTState, such as"),
    (lambda m, s: m.close_chunk(3), "state is a int; expected a CoMeTState"),
    (lambda m, s: m(TEXT, state=s, backprop_chunks=2**70), "backprop_chunks is .* at most"),
    (lambda m, s: m(TEXT, state=s, chunk_sizes=6), "chunk_sizes is a int; expected a list"),
    (lambda m, s: m(TEXT, state=s, lengths=[None]), "expected 1 integers"),
    (lambda m, s: m.generate(TEXT, s, temperature="1"), "temperature is '1'; expected a finite"),
    (lambda m, s: m.generate(TEXT, s, temperature=None), "temperature is None"),
    (lambda m, s: m.generate(TEXT, s, temperature=1.0, top_p="1"), "top_p is '1'; expected a"),
    (lambda m, s: m.generate(TEXT, s, generator=5), "generator is a int; expected PyTorch's"),
    (lambda m, s: m.new_state(1.5), "batch_size is 1.5"),
    (lambda m, s: m.new_state(2**62), "batch_size is .* at most 2147483647"),
    (lambda m, s: s.fork(2**70), "copies is .*; expected at most 2147483647"),
    (lambda m, s: s.select([[0], [1, 2]]), r"rows is \[\[0\], \[1, 2\]\]; expected integer"),
    (lambda m, s: s.to("nowhere"), "place is 'nowhere'; expected a model, an engine, or a device"),
    (lambda m, s: s.to(None), "place is None; expected a model, an engine, or a device"),
    (lambda m, s: CoMeTState.cat([s, s.map_tensors(lambda t: t.float())]), "the states are .*32"),
    (lambda m, s: m(TEXT, state=s, lengths=[[1], [2, 3]]), "lengths is .* expected 1 integers"),
    (lambda m, s: m(TEXT, state=s, logits=TEXT), "logits is .*; expected 'all'"),
    (lambda m, s: m(TEXT, state=s, chunk_sizes={2, 4}), "chunk_sizes is a set; expected a list"),
    (lambda m, s: m(TEXT, state=s, recorder=3), "recorder is a int; expected a fast.Recorder"),
    (lambda m, s: m.generate(TEXT, s, roll="no"), "roll is a str; expected True or False"),
    (lambda m, s: m.generate(TEXT, s, on_token=3), "on_token is a int; expected a function"),
    (lambda m, s: m.generate(TEXT, s, temperature=10**400), "temperature is 1000"),
    (lambda m, s: m.generate(TEXT, s, max_new_tokens=-(10**5000)), "max_new_tokens is a int"),
    (lambda m, s: CoMeTModel(m.config, device="nowhere"), "device is 'nowhere'; expected one of"),
    (lambda m, s: CoMeTModel(m.config, weights=3), "weights is a int; expected a nested dict"),
    (lambda m, s: s.fork(2.0), "copies is 2.0; expected an integer"),
    (lambda m, s: CoMeTState.cat(s), "states is not a list of CoMeTState"),
    (lambda m, s: CoMeTState.cat([s, 3]), "states is not a list of CoMeTState"),
    (lambda m, s: CoMeTModel({}), "config is a dict; expected a CoMeTConfig"),
    (lambda m, s: CoMeTModel(m.config, seed="a"), "seed is 'a'; expected an integer"),
    (lambda m, s: CoMeTModel(m.config, dtype="float32"), "dtype is a str; expected a dtype of"),
]


@pytest.mark.parametrize(("call", "match"), CALLS)
def test_bad_input_is_refused_and_the_state_kept(model, state, call, match):
    before = state.fork()
    with pytest.raises(ValueError, match=match):
        call(model, state)
    assert_state_equal(state, before, "the state passed in")
    model(TEXT, state=state)


def test_the_largest_count_is_a_count(model, state):
    expected = model(TEXT, state=state).logits
    assert torch.equal(model(TEXT, state=state, backprop_chunks=2**62).logits, expected)
    with pytest.raises(ValueError, match=f"at most {2**62}"):
        model(TEXT, state=state, backprop_chunks=2**62 + 1)


def test_a_state_of_another_model_is_refused(model, state, make_config):
    other = random_model(make_config(memory={"chunk_size": 5}), 0)
    for call in (lambda: other(TEXT, state=state), lambda: other.close_chunk(state)):
        with pytest.raises(ValueError, match="the state belongs to a model with config"):
            call()
    assert other.new_state().batch_size == 1


def test_a_state_of_another_dtype_is_refused_until_converted(model, state):
    single = random_model(model.config, 0).float()
    with pytest.raises(ValueError, match=r"the state is torch.float64 .* state.to\(model\)"):
        single(TEXT, state=state)
    single(TEXT, state=state.to(single))


def test_an_error_half_way_through_a_text_leaves_the_state(model, state, monkeypatch):
    """Whatever fails, wherever: the state passed in can be used again."""
    before = state.fork()
    calls = []

    def fail_later(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return original(*args, **options)

    import fast.cells

    original = fast.cells.decoder_layer
    monkeypatch.setattr("fast.cells.decoder_layer", fail_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(TEXT.repeat(1, 4), state=state)
    assert_state_equal(state, before, "the state passed in")


def test_the_smallest_top_p_is_greedy(model, state):
    greedy = model.generate(TEXT, state, 5).ids
    assert model.generate(TEXT, state, 5, temperature=1.0, top_p=1e-46).ids == greedy
