"""Rounds that are read again in the backward pass: gradients are those of rounds that are kept."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import Recorder

from .assertions import array, assert_at_most, assert_near, assert_state_equal
from .strategies import random_model
from .test_gradients import bytes_kept
from .test_windows import GRADIENTS, calls

pytestmark = pytest.mark.host  # random numbers are asked of a device that has some


def gradients(model, **options):
    model.zero_grad()
    out = model(**options)
    out.loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, out


@given(calls(), st.sampled_from(["chunks", "host"]))
def test_rereading_changes_nothing(call, recompute):
    """Not the loss, the state, nor which weights have a gradient."""
    model, ids, options = call
    options = {**options, "ids": ids, "logits": "none"}
    if model(**options).loss.isnan():
        return
    expected, whole = gradients(model, **options)
    found, again = gradients(model, **options, recompute=recompute)
    assert torch.equal(again.loss, whole.loss)
    assert_state_equal(again.state.detach(), whole.state.detach(), "state")
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            assert_near(found[name], array(gradient), f"gradient of {name}", GRADIENTS)


@given(calls())
def test_logits_and_states_have_gradients_too(call):
    """Of a loss that is made of all that a call returns."""
    model, ids, options = call
    found = []
    for recompute in ("none", "chunks"):
        model.zero_grad()
        out = model(ids, **{**options, "labels": None}, recompute=recompute)
        made = [out.logits, *out.state.global_state, *out.state.temporary_memory, *out.state.keys]
        sum(t.square().sum() for t in made).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        if gradient is not None:
            assert_near(found[1][name], array(gradient), f"gradient of {name}", GRADIENTS)


def test_what_is_kept_of_a_chunk_is_what_it_wrote(make_config):
    """Its global memory, and its own entries of the queue, not the queue."""
    config = make_config(
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
        {
            "chunk_size": 32,
            "global_memory_size": 4,
            "temporary_memory_size": 32,
            "compression_stride": 8,
        },
    )
    model = random_model(config, 0)

    def kept(chunks):
        ids = torch.arange(32 * chunks)[None] % 11
        return bytes_kept(lambda: model(ids, labels=ids, logits="none", recompute="chunks").loss)

    growth = (kept(24) - kept(8)) / 16
    slots = config.memory.global_memory_size + 32 // 8
    written = 4 * slots * 64 * 8  # layers, slots, numbers of eight bytes
    assert_at_most(growth / written, 1.5, "bytes kept of a chunk, of those that it wrote")


def test_a_recorder_sees_each_round_once(make_config):
    """And the same as without."""
    model = random_model(make_config(), 0)
    ids = torch.arange(11)[None] % 7
    seen = []
    for recompute in ("none", "chunks"):
        recorder = Recorder()
        model(ids, labels=ids, recompute=recompute, recorder=recorder).loss.backward()
        seen.append(recorder.rounds)
    assert len(seen[0]) == len(seen[1]) == 3
    for expected, found in zip(*seen, strict=True):
        for a, b in zip(
            expected.attention + expected.moved, found.attention + found.moved, strict=True
        ):
            assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("recompute", ["cells", "chunks"])
def test_random_numbers_are_the_same_again(make_config, recompute):
    """Of dropout, which PEFT puts before its adapters, for instance."""
    config = make_config()
    model = random_model(config, 0)
    for layer in model.weights["layers"]:
        layer.register_forward_hook(
            lambda _, __, out: (torch.nn.functional.dropout(out[0], 0.5), *out[1:])
        )
    ids = torch.arange(11)[None] % 7
    found = []
    for again in ("none", recompute):
        torch.manual_seed(0)
        found.append(gradients(model, ids=ids, labels=ids, recompute=again)[0])
        found[-1]["after"] = torch.rand(3)  # the backward pass leaves the generator where it was
    for name, gradient in found[0].items():
        if gradient is not None:
            assert_near(found[1][name], array(gradient), f"gradient of {name}", GRADIENTS)


@pytest.mark.parametrize("within", [True, False])
def test_chunks_are_read_again_under_the_autocast_of_the_first_time(make_config, within):
    """With the backward pass within its block or after it, and another loss beside."""
    model = random_model(make_config(), 0).float()
    noted = []
    for layer in model.weights["layers"]:
        layer.register_forward_hook(lambda *_: noted.append(torch.is_autocast_enabled("cpu")))
    ids = torch.arange(11)[None] % 7
    found = []
    for recompute in ("none", "chunks"):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, logits="none", recompute=recompute).loss
            loss = loss + model(ids, labels=ids, logits="none").loss
            if within:
                loss.backward()
        if not within:
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    layers, rounds = len(model.weights["layers"]), 3
    assert noted == [True] * 5 * layers * rounds
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:  # sums are rounded in another order
            assert_near(found[1][name], array(gradient), f"gradient of {name}", 2**-7)


def test_an_output_that_nothing_is_made_of_has_no_gradient(make_config):
    """Not one of zero, which an overflow on its way would turn into NaN."""
    model = random_model(make_config(), 0)
    for layer in model.weights["layers"]:
        with torch.no_grad():
            layer["global_memory"]["norm"].fill_(1e300)  # S, in which a square overflows
    ids = torch.arange(5)[None] % 7
    found, _ = gradients(model, ids=ids, labels=ids, chunk_sizes=[5], recompute="chunks")
    expected, _ = gradients(model, ids=ids, labels=ids, chunk_sizes=[5])
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(found[name], gradient), name


def test_gradients_that_are_asked_for_by_name_are_refused(make_config):
    model = random_model(make_config(), 0)
    ids = torch.arange(11)[None] % 7
    loss = model(ids, labels=ids, recompute="chunks").loss
    for name, weight in model.named_parameters():
        try:
            said = torch.autograd.grad(loss, weight, allow_unused=True, retain_graph=True)
        except RuntimeError as error:
            said = str(error)
        assert "add gradients to weights' own: call loss.backward" in said, name


def test_a_model_that_is_frozen_reads_all_the_same(make_config):
    """Only the bottom layer's memory trains: the first chunk's loss depends on nothing that does."""
    model = random_model(make_config(), 0).requires_grad_(False)
    trained = model.weights["layers"][0]["global_memory"]["norm"].requires_grad_()
    ids = torch.arange(11)[None] % 7
    found = []
    for recompute in ("none", "chunks"):
        trained.grad = None
        for window in model.windows(ids, ids, backprop_chunks=2, recompute=recompute):
            if window.loss.requires_grad:
                window.loss.backward()
        found.append(trained.grad)
    assert_near(found[1], array(found[0]), "gradient", GRADIENTS)


def test_queues_that_come_to_be_of_one_length(make_config):
    """Streams that stand at different places in a chunk, and are alike from its end on: what was
    padding in the queue of one is no entry."""
    config = make_config(
        {}, {"chunk_size": 4, "compression_stride": 2, "temporary_memory_size": 12}
    )
    model = random_model(config, 0)
    first, ids = torch.arange(3).expand(2, -1), torch.arange(14).expand(2, -1) % 7
    before = model(first, lengths=[3, 2], logits="none").state.detach()
    for n in range(3, 8):
        state, found = before, []
        for recompute in ("none", "chunks"):
            out = model(
                ids, labels=ids, state=state, chunk_sizes=[n, 2, 12 - n], recompute=recompute
            )
            model.zero_grad()
            out.loss.backward()
            found.append((out.loss, {name: p.grad for name, p in model.named_parameters()}))
        assert torch.equal(found[0][0], found[1][0])
        for name, gradient in found[0][1].items():
            if gradient is not None:
                assert_near(found[1][1][name], array(gradient), f"gradient of {name}", GRADIENTS)
