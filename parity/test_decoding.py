"""Decoding is teacher forcing, one token at a time, and rolls into new chunks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast.sampling import sample
from reference import model as spec
from reference import stream

from .assertions import (
    TOLERANCE,
    YARDSTICK,
    array,
    arrays_of,
    assert_near,
    assert_same_stream,
    largest_error,
)
from .device import generator, tensor
from .strategies import VOCAB, cases, nudged, random_model, seeds


def sensitivity(ids, model, **options):
    """What a rounding of the weights does to the reference's logits, over a dozen chunks too."""
    params, epsilon = arrays_of(model), np.finfo(np.float64).eps
    expected, *others = (
        spec.forward(ids, stream.new_state(model.config), weights, model.config, **options)[0]
        for weights in (params, *(nudged(params, seed, epsilon) for seed in range(2)))
    )
    return max(largest_error(other, expected) for other in others)


@given(cases(), st.integers(0, 12), st.booleans())
def test_greedy_decoding_is_the_reference_s(case, new_tokens, roll):
    config, seed, ids = case
    model = random_model(config, seed)
    out = model.generate(tensor([ids]), max_new_tokens=new_tokens, roll=roll)
    new, state = spec.generate(
        ids, stream.new_state(config), arrays_of(model), config, new_tokens, roll=roll
    )
    assert out.ids == [new]
    limit = max(TOLERANCE, YARDSTICK * sensitivity([*ids, *new], model, roll=roll))
    assert_same_stream(out.state, 0, state, config, "after decoding", limit)


@given(cases(), st.integers(1, 12))
def test_decoding_is_teacher_forcing(case, new_tokens):
    """Each new token is the likeliest one when the whole text so far is read at once."""
    config, seed, ids = case
    model = random_model(config, seed)
    new = model.generate(tensor([ids]), max_new_tokens=new_tokens).ids[0]
    params = arrays_of(model)
    logits, _ = spec.forward([*ids, *new], stream.new_state(config), params, config)
    at = slice(len(ids) - 1, len(ids) + len(new) - 1)
    chosen = logits[at][np.arange(len(new)), new]
    assert_near(chosen, logits[at].max(axis=-1), "chosen logits")


@given(cases(), st.integers(1, 9), seeds)
def test_a_batch_decodes_as_its_members_alone(case, new_tokens, seed):
    """Ragged prompts, each sequence ending at its own stop token."""
    config, weights, ids = case
    model = random_model(config, weights)
    rng = np.random.default_rng(seed)
    rows = [ids, ids[: 1 + len(ids) // 2], rng.integers(0, VOCAB, 3).tolist()]
    widest = max(map(len, rows))
    text = tensor([row + [0] * (widest - len(row)) for row in rows])
    stops = {int(rng.integers(VOCAB)), int(rng.integers(VOCAB))}
    steps = []
    out = model.generate(
        text,
        max_new_tokens=new_tokens,
        stop_ids=stops,
        lengths=list(map(len, rows)),
        on_token=steps.append,
    )
    for i, row in enumerate(rows):
        new, state = spec.generate(
            row, stream.new_state(config), arrays_of(model), config, new_tokens, stops
        )
        assert out.ids[i] == new
        assert [s[i] for s in steps if s[i] is not None] == new
        assert_same_stream(out.state, i, state, config, f"sequence {i}")


@given(cases())
def test_decoding_needs_no_more_memory_than_reading(case):
    config, seed, ids = case
    model = random_model(config, seed)
    size = config.memory.chunk_size
    out = model.generate(tensor([ids]), max_new_tokens=3 * size + 1)
    assert out.state.open_tokens[0] <= size
    assert out.state.tokens[0] == len(ids) + len(out.ids[0])
    read = model(tensor([ids + out.ids[0]]), logits="none").state
    assert out.state.num_bytes == read.num_bytes


@given(cases())
def test_a_stop_token_ends_the_text_and_state_goes_on(case):
    config, seed, ids = case
    model = random_model(config, seed)
    text = tensor([ids])
    whole = model.generate(text, max_new_tokens=6)
    first = model.generate(text, max_new_tokens=2)
    rest = model.generate(tensor([whole.ids[0][2:3]]), first.state, max_new_tokens=3)
    assert first.ids[0] == whole.ids[0][:2]
    assert rest.ids[0] == whole.ids[0][3:]
    assert rest.state.tokens[0] == whole.state.tokens[0]
    stopped = model.generate(text, max_new_tokens=6, stop_ids=whole.ids[0][:1])
    assert stopped.ids[0] == whole.ids[0][:1]


def test_sampling_follows_the_probabilities():
    logits = torch.log(tensor([[0.5, 0.3, 0.15, 0.05]])) + 1000  # which no chance depends on
    source = generator(0)

    def shares(n=20_000, **options):
        many = sample(logits.expand(n, -1), generator=source, **options)
        return torch.bincount(many, minlength=4) / n

    spread = 4 * 0.5 / 20_000**0.5  # four standard deviations at the widest
    for options, expected in (
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.4}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 1e-45}, [1, 0, 0, 0]),
        ({"temperature": 1e30}, [0.25, 0.25, 0.25, 0.25]),
    ):
        assert (shares(**options) - tensor(expected)).abs().max() < spread, options


def chances(logits, temperature, top_k, top_p):
    """Of one sequence's tokens, with ties broken anyhow."""
    order = np.argsort(-logits)
    share = np.exp((logits[order] - logits[order[0]]) / temperature)
    share[top_k or VOCAB :] = 0
    share /= share.sum()
    if top_p is not None:
        share[np.cumsum(share) - share >= top_p] = 0
    found = np.zeros(len(logits))
    found[order] = share / share.sum()
    return found


@given(
    seed=seeds,
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 2, 4, VOCAB + 1]),
    top_p=st.sampled_from([None, 0.2, 0.7, 1.0]),
)
def test_every_sequence_of_a_batch_samples_its_own_chances(seed, temperature, top_k, top_p):
    """However temperature, top_k and top_p meet: four sequences, each two thousand times."""
    draws, logits = 2000, np.random.default_rng(seed).normal(size=(4, VOCAB))
    many = tensor(logits).repeat_interleave(draws, dim=0)
    tokens = array(sample(many, temperature, top_k, top_p, generator(seed))).reshape(4, draws)
    for i, row in enumerate(tokens):
        expected = chances(logits[i], temperature, top_k, top_p)
        apart = np.abs(np.bincount(row, minlength=VOCAB) / draws - expected)
        spread = np.sqrt(expected * (1 - expected) / draws)
        assert (apart <= 6 * spread + (expected > 0) * 6 / draws).all(), f"sequence {i}: {apart}"


@pytest.mark.parametrize("options", [{"temperature": 1.3}, {"temperature": 0.7, "top_k": 3}])
def test_the_same_generator_samples_the_same_text(make_config, options):
    model = random_model(make_config(), 3)
    texts = [
        model.generate(
            tensor([[1, 2, 3]]),
            max_new_tokens=20,
            generator=generator(5),
            **options,
        ).ids
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0][0])) > 1
