"""The layers of a round compile into one graph, and a steady stream has one shape.

The graph is traced by `torch.compile(fullgraph=True)`, in which anything that leaves the graph raises,
and run as it was traced: what a compiler makes of it is the compiler's business.
"""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fast import stream

from .assertions import assert_near
from .device import tensor
from .strategies import random_model


@pytest.fixture
def compiled(monkeypatch):
    """`stream.run_layers` compiled whole; counts its graphs."""
    torch._dynamo.reset()
    counter = CompileCounter()
    layers = torch.compile(stream.run_layers, fullgraph=True, backend=counter)
    original = stream.run_layers
    yield lambda on: (
        monkeypatch.setattr(stream, "run_layers", layers if on else original),
        counter,
    )[1]
    torch._dynamo.reset()


@pytest.mark.parametrize("backbone", [{}, {"attention_bias": True, "num_hidden_layers": 3}])
@pytest.mark.parametrize("gradient", [False, True])
def test_chunks_of_a_steady_stream_are_one_graph(compiled, make_config, backbone, gradient):
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
        counter = compiled(True)
        for out in expected:
            found = model(ids, state=state)
            assert_near(found.logits, out.logits.detach(), "compiled")
            state = found.state
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1], f"graphs after each call: {graphs}"
    assert graphs[-1] <= 6, "the open chunk's end, whole chunks, the last one"


def test_decoding_is_a_few_graphs(compiled, make_config):
    """The row grows, which is one graph of any length; borders of chunks and groups add a few."""
    model = random_model(make_config(), 5)
    ids = tensor(np.arange(22).reshape(2, -1) % 11)
    state = model(ids, logits="none").state
    expected = model.generate(ids[:, :1], state, 40)
    counter = compiled(True)
    found = model.generate(ids[:, :1], state, 40)
    assert found.ids == expected.ids
    assert counter.frame_count <= 8
