"""The layers of a round compile into one graph, and a steady stream has one shape. A model that is
compiled whole says the same, by the graphs of its layers.

The graph is traced by `torch.compile(fullgraph=True)`, in which anything that leaves the graph raises,
and run as it was traced: what a compiler makes of it is the compiler's business.
"""

import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from .assertions import array, assert_near, assert_same_states
from .device import tensor
from .strategies import random_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "backbone", [{}, {"attention_bias": True, "num_hidden_layers": 3, "unrotated_layers": (1,)}]
)
@pytest.mark.parametrize("gradient", [False, True])
def test_chunks_of_a_steady_stream_are_one_graph(make_config, backbone, gradient):
    config = make_config(backbone)
    model = random_model(config, 3)
    length, vocab_size = 12 * config.memory.chunk_size, config.backbone.vocab_size
    ids = tensor(np.arange(length).reshape(2, -1) % vocab_size)
    with torch.set_grad_enabled(gradient):
        state = model(ids, logits="none").state.detach()  # memories full, the open chunk too
        expected, graphs = [], []
        for _ in range(4):
            out = model(ids, state=state if not expected else expected[-1].state)
            expected.append(out)
        counter = CompileCounter()
        model.compile(backend=counter)
        for out in expected:
            found = model(ids, state=state)
            assert_near(found.logits, out.logits.detach(), "compiled")
            state = found.state
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1], f"graphs after each call: {graphs}"
    assert graphs[-1] <= 6, "the open chunk's end, whole chunks, the last one"


def test_decoding_is_a_few_graphs(make_config):
    """The row grows, which is one graph of any length; borders of chunks and groups add a few."""
    model = random_model(make_config(), 5)
    ids = tensor(np.arange(22).reshape(2, -1) % 11)
    state = model(ids, logits="none").state
    expected = model.generate(ids[:, :1], state, 40)
    counter = CompileCounter()
    model.compile(backend=counter)
    found = model.generate(ids[:, :1], state, 40)
    assert found.ids == expected.ids
    assert counter.frame_count <= 8


def read_twice(model, call, ids, labels, logits):
    """Two calls of a stream, the second a ragged one, and the gradients of both."""
    first = call(ids, labels=labels, logits=logits)
    second = call(ids, labels=labels, logits=logits, lengths=[9, 5], state=first.state.detach())
    for out in (first, second):
        total = out.loss or sum(
            t.square().sum() for t in (*out.state.global_state, *out.state.temporary_memory)
        )
        total = total if out.logits is None else total + out.logits.square().sum()
        total.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return (first, second), grads


@pytest.mark.host
@pytest.mark.parametrize(
    ("backend", "logits", "has_labels"),
    [
        ("aot_eager", "none", True),
        ("eager", "none", False),
        ("eager", "all", False),
    ],
)
def test_a_compiled_model_is_the_model(make_config, backend, logits, has_labels):
    """Logits, loss, state and gradients of `torch.compile(model)`."""
    model = random_model(make_config({"num_hidden_layers": 1}), 1)
    ids = tensor(np.arange(18).reshape(2, -1) % 11)
    labels = ids if has_labels else None
    expected, grads = read_twice(model, model, ids, labels, logits)
    found, compiled = read_twice(model, torch.compile(model, backend=backend), ids, labels, logits)
    for out, other in zip(found, expected, strict=True):
        assert_same_states(out.state, other.state, "state")
        for name in ("logits", "loss"):
            x, y = getattr(out, name), getattr(other, name)
            assert (x is None) == (y is None)
            if x is not None:
                assert_near(x.detach(), array(y.detach()), name)
    for name, expected in grads.items():
        assert (compiled[name] is None) == (expected is None), name
        if expected is not None:
            assert_near(compiled[name], array(expected), f"gradient of {name}", 1e-10)


MODES = {
    "gradients": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.host
@pytest.mark.parametrize(
    ("whole", "mode", "recompute"),
    [
        (False, "gradients", "none"),
        (False, "gradients", "cells"),
        (False, "gradients", "chunks"),
        (False, "inference_mode", "none"),
        (True, "gradients", "cells"),
        (True, "gradients", "host"),
        (True, "no_grad", "none"),
        (True, "inference_mode", "none"),
        (True, "inference_mode", "chunks"),
    ],
)
def test_either_way_to_compile_works_in_every_mode(make_config, whole, mode, recompute):
    """`model.compile()`, and `torch.compile(model)`: a text with labels, read on, and its gradients."""
    model = random_model(make_config({"num_hidden_layers": 1}), 1)
    ids, found = tensor(np.arange(18).reshape(2, -1) % 11), {}
    for name in ("as written", "compiled"):
        call = model
        if name == "compiled" and whole:
            call = torch.compile(model, backend="eager")
        elif name == "compiled":
            model.compile(backend="eager")
        with MODES[mode]():
            state, losses = None, []
            for _ in range(2):
                out = call(ids, labels=ids, logits="none", state=state, recompute=recompute)
                state, losses = out.state.detach(), [*losses, out.loss]
            if mode == "gradients":
                sum(losses).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        found[name] = losses, state, gradients
    (losses, state, gradients), (expected, other, wanted) = found["compiled"], found["as written"]
    assert_near(torch.stack(losses).detach(), array(torch.stack(expected).detach()), "losses")
    assert_same_states(state, other, "state")
    for name, gradient in wanted.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            assert_near(gradients[name], array(gradient), f"gradient of {name}", 1e-10)


@pytest.mark.host
def test_windows_and_training_steps_are_a_few_graphs(make_config):
    """One for each kind of round, whatever the weights have become."""
    counter, model = CompileCounter(), random_model(make_config(), 4)
    ids = tensor(np.arange(48).reshape(2, -1) % 11)
    model.compile(backend=counter)
    optimizer, graphs = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(4):
        for window in model.windows(ids, labels=ids, backprop_chunks=2):
            window.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1], f"graphs after each step: {graphs}"


@pytest.mark.host
def test_a_copy_of_a_compiled_model_is_not_compiled(make_config):
    model, ids = random_model(make_config(), 2), tensor(np.arange(20).reshape(2, -1) % 11)
    counter = CompileCounter()
    model.compile(backend=counter)
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_near(copy(ids).logits.detach(), array(model(ids).logits.detach()), "logits")
    graphs = counter.frame_count
    assert graphs > 0
    copy(ids[:, :3])
    assert counter.frame_count == graphs, "the copy is compiled"


@pytest.mark.host
def test_a_compiled_model_has_the_layers_graphs(make_config):
    """And few others; reading on in the same way, or decoding, makes no new ones."""
    model = random_model(make_config(), 1)
    ids, counter = tensor(np.arange(32).reshape(2, -1) % 11), CompileCounter()
    call, graphs, state = torch.compile(model, backend=counter), [], None
    with torch.no_grad():
        for _ in range(5):
            state = call(ids, state=state, logits="last").state
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[2], f"graphs after each call: {graphs}"
    assert counter.op_count > 100, "the layers are in none of them"
    generate = torch.compile(model.generate, backend=counter)
    assert generate(ids, state, 9).ids == model.generate(ids, state, 9).ids
