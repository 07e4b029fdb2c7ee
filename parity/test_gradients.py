"""Gradients are the reference's own, by a complex step: Im f(x + i h v) / h, exact for tiny h."""

import dataclasses
import gc
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fast import IGNORE
from fast.stream import join, read
from reference import model as spec
from reference import stream
from reference.parameters import map_parameters, named_parameters

from .assertions import GRADIENT_TOLERANCE, array, arrays_of, assert_at_most, assert_near
from .calls import World, calls
from .device import tensor
from .strategies import cases, configs, random_model, seeds

STEP = 1e-30


def directional(params, direction, ids, config, **options):
    """Derivative of the reference's loss along a direction."""
    moved = map_parameters(lambda name, p: p + 1j * STEP * direction[name], params)
    logits, _ = spec.forward(ids, stream.new_state(config), moved, config, **options)
    return spec.language_loss(logits, ids).imag / STEP


def gradients(model, ids, **options):
    model(tensor([ids]), labels=tensor([ids]), logits="none", **options).loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in named_parameters(model.weights.to_dict()).items()
    }


def assert_derivative(found, direction, expected, what):
    terms = np.concatenate([(array(found[name]) * v).ravel() for name, v in direction.items()])
    error = abs(terms.sum() - expected) / max(1.0, np.abs(terms).sum())
    what = f"{what}: {terms.sum()!r}, complex step {expected!r}"
    assert_at_most(error, GRADIENT_TOLERANCE, what, next(iter(found.values())))


@given(cases(), st.sampled_from([None, None, 1, 2]))
def test_gradients_along_random_directions(case, backprop_chunks):
    config, seed, ids = case
    ids = ids if len(ids) > 1 else ids * 2
    model = random_model(config, seed)
    params = arrays_of(model)
    options = {"backprop_chunks": backprop_chunks}
    found = gradients(model, ids, **options)
    rng = np.random.default_rng(seed)
    for _ in range(2):
        direction = {name: rng.normal(size=p.shape) for name, p in named_parameters(params).items()}
        expected = directional(params, direction, ids, config, **options)
        assert_derivative(found, direction, expected, "all parameters")


@st.composite
def streams_of_calls(draw):
    """A batch of streams, read in two calls or three."""
    b = draw(st.integers(1, 3))
    return draw(configs()), draw(seeds), draw(st.lists(calls(b), min_size=2, max_size=3))


def objective(config, params, sequence, coefficients):
    """What a stream of calls is trained on, in the reference: every loss, and every logit that was
    asked for, times some number."""
    alone = [stream.new_state(config) for _ in sequence[0].rows]
    total = 0.0
    for call, factor in zip(sequence, coefficients, strict=True):
        losses, count = 0.0, 0
        for i, row in enumerate(call.rows):
            logits, alone[i] = spec.forward(row, alone[i], params, config, **call.options)
            if call.logits != "none":
                asked = logits if call.logits == "all" else logits[-1:]
                total = total + (factor[i, : len(asked)] * asked).sum()
            labels = call.labels[i] if call.labels else []
            if number := sum(label != IGNORE for label in labels[1:]):
                losses = losses + spec.language_loss(logits, labels) * number
                count += number
        if count:
            total = total + losses / count
    return total


@given(streams_of_calls())
def test_gradients_through_calls(case):
    """Through the states that were passed in, and cut where truncation says so, counted from each
    stream's start: ragged batches, chunks by hand, labels and logits, all at once."""
    config, seed, sequence = case
    world, rng = World(config, seed), np.random.default_rng(seed)
    model, streams, total = world.model, world.begin(len(sequence[0].rows)), 0.0
    coefficients = [
        rng.normal(size=(len(c.rows), 9, model.config.backbone.vocab_size)) for c in sequence
    ]
    for call, factor in zip(sequence, coefficients, strict=True):
        out, streams = world.read(call, streams)
        if out.logits is not None:
            width = min(9, out.logits.shape[1])  # padding is zero, whatever it is times
            total = total + (tensor(factor)[:, :width] * out.logits[:, :width]).sum()
        if call.labels and not out.loss.isnan():
            total = total + out.loss
    if not isinstance(total, torch.Tensor):  # nothing was asked for
        return
    weights = named_parameters(model.weights.to_dict())
    total.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights.values()]
    params = arrays_of(model)
    direction = {name: rng.normal(size=p.shape) for name, p in named_parameters(params).items()}
    moved = map_parameters(lambda name, p: p + 1j * STEP * direction[name], params)
    expected = objective(config, moved, sequence, coefficients).imag / STEP
    assert_derivative(dict(zip(weights, found, strict=True)), direction, expected, "all parameters")


@settings(max_examples=settings.default.max_examples // 5)
@given(cases())
def test_the_gradient_of_every_parameter(case):
    config, seed, ids = case
    ids = ids if len(ids) > 1 else ids * 2
    model = random_model(config, seed)
    params = arrays_of(model)
    found = gradients(model, ids)
    rng = np.random.default_rng(seed)
    names = named_parameters(params)
    assert set(names) == set(found)
    for name, p in names.items():
        direction = {other: np.zeros(q.shape) for other, q in names.items()}
        direction[name] = rng.normal(size=p.shape)
        expected = directional(params, direction, ids, config)
        assert_derivative(found, direction, expected, name)


@given(cases())
def test_truncating_backpropagation_really_cuts_it(case):
    """A token before the cut gets no gradient, one after it does; values stay the same."""
    config, seed, ids = case
    size = config.memory.chunk_size
    n = 3 * size
    backbone = dataclasses.replace(config.backbone, vocab_size=n, tie_word_embeddings=False)
    config = dataclasses.replace(config, backbone=backbone)
    text = tensor(np.arange(n))[None]
    model = random_model(config, seed)
    whole = model(text).logits
    for chunks in (1, 2):
        model.zero_grad()
        cut = model(text, backprop_chunks=chunks).logits
        assert torch.equal(cut, whole)
        cut[0, -1].sum().backward()
        grad = model.weights["embed_tokens"].weight.grad
        assert (grad[: 2 * size] == 0).all()  # two chunks have closed
        assert grad[n - 1].abs().sum() > 0


@given(cases())
def test_a_detached_state_cuts_too(case):
    config, seed, ids = case
    model = random_model(config, seed)
    state = model(tensor([ids]), logits="none").state
    for carried, flows in ((state, True), (state.detach(), False)):
        tensors = (*carried.global_state, *carried.temporary_memory, *carried.keys)
        assert any(t.requires_grad and t.numel() for t in tensors) == flows


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_truncation_counts_chunks(make_config, chunks):
    """With k chunks, the gradient reaches back to the last border whose number k divides."""
    config = make_config({"vocab_size": 28, "tie_word_embeddings": False})
    model = random_model(config, 0)
    model(tensor(np.arange(28))[None], backprop_chunks=chunks).logits[0, -1].sum().backward()
    grad = model.weights["embed_tokens"].weight.grad.abs().sum(-1)
    border = (6 // chunks) * chunks * 4  # six chunks of four closed after 28 tokens
    assert (grad[:border] == 0).all()
    assert (grad[border:24] > 0).any() or border == 24
    assert grad[27] > 0


def bytes_kept(run):
    """Bytes that a forward pass leaves for the backward pass: those saved in the graph, those that
    a recomputation holds, and the result's; each storage once, those from before left out."""
    storages = {}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def alive():
        gc.collect()
        return [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]

    before = {x.untyped_storage().data_ptr() for x in alive()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = run()
    for x in alive():
        note(x)
    del result
    return sum(size for place, size in storages.items() if place not in before)


@pytest.mark.host  # it asks a device for its generator, and the pretend one has none
@given(cases())
def test_recomputing_cells_changes_no_gradient(case):
    """Of the whole stream: memories pass from chunk to chunk through what is computed again."""
    config, seed, ids = case
    model = random_model(config, seed)

    def gradients_of(recompute):
        model.zero_grad()
        rounds = read(tensor([ids]), model.new_state(), model.weights, config, recompute=recompute)
        join(list(rounds), len(ids)).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients_of(None)
    found = gradients_of(partial(checkpoint, use_reentrant=False))
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(found[name], gradient), name


@pytest.mark.host  # likewise
@given(cases(), st.sampled_from([None, None, 1, 2]), st.sampled_from(["cells", "chunks", "host"]))
def test_recomputed_gradients_along_random_directions(case, backprop_chunks, recompute):
    config, seed, ids = case
    ids = ids if len(ids) > 1 else ids * 2
    model = random_model(config, seed)
    params = arrays_of(model)
    found = gradients(model, ids, backprop_chunks=backprop_chunks, recompute=recompute)
    rng = np.random.default_rng(seed)
    direction = {name: rng.normal(size=p.shape) for name, p in named_parameters(params).items()}
    expected = directional(params, direction, ids, config, backprop_chunks=backprop_chunks)
    assert_derivative(found, direction, expected, "all parameters")


@pytest.mark.host
def test_recomputing_cells_keeps_less_for_the_backward_pass(make_config):
    config = make_config(
        {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4},
        {"chunk_size": 32, "temporary_memory_size": 16, "compression_stride": 8},
    )
    model = random_model(config, 0)
    ids = torch.arange(160)[None] % 11

    def run(recompute):
        rounds = read(tensor(ids), model.new_state(), model.weights, config, recompute=recompute)
        return [part.hidden for part in rounds]

    whole = bytes_kept(lambda: run(None))
    kept = bytes_kept(lambda: run(partial(checkpoint, use_reentrant=False)))
    assert_at_most(kept / whole, 0.15, "bytes kept, of those without")


@pytest.mark.host
@pytest.mark.parametrize("recompute", ["cells", "chunks", "host"])
def test_a_loss_is_recomputed_without_its_logits(make_config, recompute):
    """Of a large vocabulary, whose logits would be the most by far; the loss is the same."""
    config = make_config({"vocab_size": 20_000, "hidden_size": 16}, {"chunk_size": 512})
    model = random_model(config, 0)
    ids = torch.arange(1100)[None]
    losses = []

    def kept(**options):
        def run():
            loss = model(ids, labels=ids, logits="none", **options).loss
            losses.append(loss.item())
            return loss

        return bytes_kept(run)

    logits = ids.numel() * 20_000 * 8
    assert kept() > logits
    assert_at_most(kept(recompute=recompute) / logits, 0.05, "bytes kept, of the logits'")
    assert_near(np.float64(losses[1]), losses[0], "loss")


@pytest.mark.parametrize("wrong", ["all", True, None, []])
def test_what_recompute_may_be(make_config, wrong):
    model = random_model(make_config(), 0)
    with pytest.raises(
        ValueError, match=r"recompute is .*; expected 'none', 'cells', 'chunks' or 'host'"
    ):
        model(tensor([[1]]), recompute=wrong)
