"""Windows are one call, read a piece at a time: the same loss, gradients and state, in the memory of
one window."""

import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import IGNORE
from reference.parameters import named_parameters

from .assertions import array, arrays_of, assert_near, assert_state_equal
from .device import DEVICE, tensor
from .strategies import VOCAB, cases, random_model, seeds, splits
from .test_batches import batches, padded, texts
from .test_gradients import assert_derivative, directional

GRADIENTS = 1e-10
"""Of sums that are added in another order."""


def gradients(model):
    """Those that `backward` has left, which are cleared."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in named_parameters(model.weights.to_dict()).items()
    }
    model.zero_grad()
    return found


@st.composite
def calls(draw):
    """A model, and what a call takes: a ragged batch, labels with holes, streams under way that
    stand at different chunks and places in them, chunks by hand where lengths allow."""
    config, seed, lengths = draw(batches())
    by_hand = draw(st.booleans())
    lengths = [max(lengths)] * len(lengths) if by_hand else lengths
    model = random_model(config, seed)
    b, rng = len(lengths), np.random.default_rng(draw(seeds))
    state = None
    if draw(st.booleans()):
        before = [int(n) for n in rng.integers(1, 3 * config.memory.chunk_size + 2, b)]
        state = model(padded(texts(before, seed), 0), lengths=before, logits="none").state.detach()
    ids = padded(texts(lengths, seed + 1), 0)
    ignored = tensor(rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.5])))
    labels = ids.masked_fill(ignored, IGNORE)
    sizes = draw(splits(lengths[0])) if by_hand else None
    return model, ids, {
        "labels": labels, "lengths": lengths, "state": state, "chunk_sizes": sizes,
        "backprop_chunks": draw(st.sampled_from([1, 1, 2, 3, 100])),
    }  # fmt: skip


@given(calls())
def test_windows_add_up_to_one_call(call):
    model, ids, options = call
    whole = model(ids, logits="none", **options)
    windows, nats, labels = [], 0.0, 0
    for window in model.windows(ids, **options):
        assert not any(t.requires_grad for t in tensors_of(window.state)), "a state with a graph"
        window.loss.backward()
        windows.append(window)
        nats, labels = nats + window.nats.item(), labels + int(window.num_labels)
    assert labels == int(window.text_labels)
    assert_state_equal(window.state, whole.state.detach(), "the last window's state")
    if whole.loss.isnan():
        assert labels == 0
        assert window.loss.isnan()
        return
    found = gradients(model)
    assert_near(nats / labels, whole.loss.detach(), "loss")
    whole.loss.backward()
    for name, expected in gradients(model).items():
        assert_near(found[name], array(expected), f"gradient of {name}", GRADIENTS)


@pytest.mark.host  # PyTorch's recomputation asks a device for its generator
@given(calls(), st.sampled_from(["cells", "chunks", "host"]))
def test_windows_that_are_recomputed_have_the_same_gradients(call, recompute):
    model, ids, options = call
    if sum(int(window.num_labels) for window in model.windows(ids, **options)) == 0:
        return
    found = []
    for again in ("none", recompute):
        for window in model.windows(ids, **options, recompute=again):
            window.loss.backward()
        found.append(gradients(model))
    for name, expected in found[0].items():
        assert_near(found[1][name], array(expected), f"gradient of {name}", GRADIENTS)


def tensors_of(state):
    return [*state.global_state, *state.temporary_memory, *state.keys, *state.values]


@given(calls())
def test_windows_of_a_ragged_batch_are_each_sequence_alone(call):
    """Streams whose windows end at different rounds wait for each other, and nothing else changes."""
    model, ids, options = call
    rows = range(len(ids))
    alone = [options["state"].select([i]) if options["state"] else None for i in rows]
    counts = sum(int(w.num_labels) for w in model.windows(ids, **options))
    if counts == 0:
        return
    for window in model.windows(ids, **options):
        window.loss.backward()
    together = gradients(model)
    for i, n in enumerate(options["lengths"]):
        own = options | {
            "labels": options["labels"][i : i + 1, :n], "lengths": None, "state": alone[i]
        }  # fmt: skip
        one = model(ids[i : i + 1, :n], logits="none", **own).loss
        share = int((own["labels"][:, 1:] != IGNORE).sum()) / counts
        if share:
            (one * share).backward()
    for name, expected in gradients(model).items():
        assert_near(together[name], array(expected), f"gradient of {name}", GRADIENTS)


@given(cases(), st.sampled_from([1, 2, 3]))
def test_the_gradient_of_all_windows_is_the_reference_s(case, backprop_chunks):
    config, seed, ids = case
    ids = ids if len(ids) > 1 else ids * 2
    model = random_model(config, seed)
    text = tensor([ids])
    for window in model.windows(text, text, backprop_chunks=backprop_chunks):
        window.loss.backward()
    rng = np.random.default_rng(seed)
    params = arrays_of(model)
    direction = {name: rng.normal(size=p.shape) for name, p in named_parameters(params).items()}
    expected = directional(params, direction, ids, config, backprop_chunks=backprop_chunks)
    assert_derivative(gradients(model), direction, expected, "all windows")


@given(calls())
def test_a_window_has_its_chunks_and_is_read_when_it_is_asked_for(call):
    """All sequences that go on stand at a border that the window's chunks divide."""
    model, ids, options = call
    every, before = options["backprop_chunks"], np.zeros(len(ids), int)
    if options["state"]:
        before = options["state"].tokens
    end, last = before + options["lengths"], before
    for window in model.windows(ids, **options):
        state = window.state
        goes_on = state.tokens < end
        assert (state.tokens > last).any(), "a window without text"
        assert (state.chunks % every == 0)[goes_on].all()
        assert (state.open_tokens == 0)[goes_on].all()
        last = state.tokens
    assert (last == end).all()


def test_windows_hold_how_many_chunks(make_config):
    """One stream from its start: N full chunks each, the last what is left."""
    model = random_model(make_config(), 0)
    text = tensor([list(range(11)) * 3])  # 33 tokens in chunks of 4
    for every, tokens in ((1, [*range(4, 33, 4), 33]), (2, [8, 16, 24, 32, 33]), (3, [12, 24, 33])):
        windows = list(model.windows(text, text, backprop_chunks=every))
        assert [int(w.state.tokens[0]) for w in windows] == tokens
        assert [int(w.num_labels) for w in windows[:-1]] == np.diff([0, *tokens[:-1]]).tolist()
    full = model(text[:, :4], logits="none").state  # its chunk closes with the next token
    first = next(model.windows(text, text, state=full, backprop_chunks=1))
    assert int(first.state.tokens[0]) == 8


WRITERS = {"readout_embeddings"} | {
    f"layers.{i}.{name}"
    for i in range(2)
    for name in (
        "global_memory.norm", "global_memory.gate", "global_memory.gate_bias",
        "temporary_memory.norm", "temporary_memory.adapter_down", "temporary_memory.adapter_up",
    )
}  # fmt: skip
"""What writes the memories, and does nothing else."""


@pytest.mark.parametrize(("memory", "untrained"), [
    ({}, WRITERS),
    ({"compression_stride": 9}, WRITERS | {"compression_embedding"}),
    ({"global_memory_size": 0}, {name for name in WRITERS if "temporary" in name}),
    ({"compression_stride": 0}, {name for name in WRITERS if "temporary" not in name}),
])  # fmt: skip
def test_windows_of_one_chunk_never_train_what_writes_the_memories(make_config, memory, untrained):
    """Exactly those; two chunks train every parameter. A compression token is seen by the rest of
    its chunk, unless it stands at its end."""
    model = random_model(make_config({}, {"gate_bias": True, **memory}), 0)
    text = tensor(np.random.default_rng(0).integers(0, VOCAB, (2, 33)))
    for every, expected in ((1, untrained), (2, set())):
        for window in model.windows(text, text, backprop_chunks=every):
            window.loss.backward()
        found = {name for name, g in gradients(model).items() if (g == 0).all()}
        assert found == expected, f"windows of {every}"


class Saved:
    """Counts the bytes that autograd keeps for a backward pass, and their peak."""

    def __init__(self):
        self.now = self.peak = 0

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(self, tensor):
        kept, size = Saved.Kept(tensor.detach()), tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self.free, size)
        return kept

    def free(self, size):
        self.now -= size

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)


@pytest.mark.host  # what autograd keeps is the same wherever it is
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("lengths", [None, [1.0, 0.4]])
def test_memory_is_that_of_a_window_however_long_the_text(make_config, lengths, backward):
    """Also where nobody calls `backward`: a window that is let go takes its graph along."""
    model = random_model(make_config(), 0)
    size, peaks = 8, {}  # tokens of a window
    for windows in (4, 16, 64):
        text = tensor(np.random.default_rng(0).integers(0, VOCAB, (2, windows * size)))
        cut = lengths and [int(share * windows * size) for share in lengths]
        saved = Saved()
        with saved.hooks():
            for window in model.windows(text, text, cut, backprop_chunks=2):
                if backward:
                    window.loss.backward()
                    assert saved.now <= 0.05 * saved.peak, "kept after backward"
        del window
        assert saved.now == 0, "kept after the last window"
        peaks[windows] = saved.peak
    whole = Saved()
    with whole.hooks():
        loss = model(text, labels=text, lengths=cut, logits="none", backprop_chunks=2).loss
    assert loss.requires_grad
    assert max(peaks.values()) <= 1.01 * peaks[4], peaks
    assert whole.peak > 10 * peaks[64], "one call keeps the whole text"


@given(cases(), st.sampled_from([1, 2]))
def test_the_weights_may_move_between_windows(case, backprop_chunks):
    """A window is then what the moved weights make of the rest of the text, from the state so far.
    One without labels moves nothing."""
    config, seed, ids = case
    model, text = random_model(config, seed), tensor([ids])
    optimizer, state = torch.optim.SGD(model.parameters(), lr=0.01), None
    for window in model.windows(text, text, backprop_chunks=backprop_chunks):
        start = 0 if state is None else int(state.tokens[0])
        # The last token of a window predicts the first of the next.
        part = text[:, start : int(window.state.tokens[0]) + 1]
        expected = model(part, labels=part, state=state, logits="none")
        if part.shape[1] > 1:
            assert_near(window.mean_loss.detach(), array(expected.loss.detach()), f"from {start}")
        else:
            assert window.mean_loss == 0
        optimizer.zero_grad()
        window.mean_loss.backward()
        optimizer.step()
        state = window.state
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("moves", [False, True])
def test_under_autocast_every_window_casts_the_weights_as_they_are(make_config, moves):
    """One region around the loop, with `backward` inside it, is a region around each window."""
    text = tensor(np.random.default_rng(0).integers(0, VOCAB, (2, 33)))

    def train(outer, inner):
        model = random_model(make_config(), 0, torch.float32)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
        windows = model.windows(text, text, backprop_chunks=2)
        region = {True: torch.autocast(DEVICE.type, torch.bfloat16), False: nullcontext()}
        with region[outer]:
            while True:
                with region[inner]:
                    window = next(windows, None)
                if window is None:
                    return model, losses
                assert window.nats.dtype == torch.float32
                assert window.state.keys[0].dtype == torch.float32
                window.loss.backward()
                losses.append(window.loss.item())
                if moves:
                    optimizer.step()
                    optimizer.zero_grad()

    (around, losses), (each, expected), (_, wide) = (
        train(True, False), train(False, True), train(False, False)
    )  # fmt: skip
    assert losses == expected
    assert losses != wide, "nothing was cast"
    for (name, p), q in zip(around.named_parameters(), each.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert moves or torch.equal(p.grad, q.grad), name


def test_without_gradients_windows_only_tell_the_loss(make_config):
    model, text = random_model(make_config(), 0), tensor([list(range(11)) * 3])
    with torch.no_grad():
        windows = list(model.windows(text, text, backprop_chunks=1))
    assert not any(window.loss.requires_grad for window in windows)
    expected = model(text, labels=text, logits="none").loss.detach()
    assert_near(sum(window.loss for window in windows), array(expected), "loss")
