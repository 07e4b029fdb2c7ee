"""The model of transformers is the stream: whatever the padding, the cache and the way of decoding.

Users of other memory models report the same bugs again and again: padding between tokens reaches
the state, reading on from a cache differs from reading the whole, the mask is skipped at batch size
1, the cache is shorter than the mask. Each is a law here.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from fast import IGNORE, CoMeTState, MemoryConfig
from fast.huggingface import CoMeTCache, CoMeTForCausalLM
from reference import model as spec
from reference import stream

from .assertions import (
    arrays_of,
    assert_near,
    assert_same_states,
    assert_same_stream,
    assert_state_equal,
)
from .device import DEVICE, tensor
from .strategies import VOCAB, configs, corner_lengths, random_model, seeds
from .test_backbones import CONFIGS, in_float64, random_backbone

FEW = settings(max_examples=max(10, settings.default.max_examples // 4))


def wrapped(config, seed=0, dtype=torch.float64):
    """A random model of transformers, on the device."""
    return CoMeTForCausalLM.from_model(random_model(config, seed, dtype)).eval()


def assert_same_streams(found, expected, what):
    """Two states alike, stream by stream: after a row's own end stands anything."""
    for i in range(expected.batch_size):
        one, other = found.select([i]), expected.select([i])
        assert_same_states(one, other, f"{what}, sequence {i}")


@st.composite
def padded_texts(draw, config, least=1, columns=None):
    """Rows of tokens in columns: padded at the left, at the right, between, or not at all.

    Returns:
        rows, their token ids; ids [b, n] with anything in the padding; mask [b, n].
    """
    rng = np.random.default_rng(draw(seeds))
    b = draw(st.integers(1, 3)) if columns is None else columns
    lengths = [draw(corner_lengths(config)) if least else draw(st.integers(0, 9)) for _ in range(b)]
    n = max([*lengths, 1]) + draw(st.sampled_from([0, 0, 1, 3]))
    mask, ids = np.zeros((b, n), int), rng.choice([0, VOCAB - 1, 99], (b, n))
    rows = []
    for row, length in enumerate(lengths):
        side = draw(st.sampled_from(["left", "right", "between"]))
        places = {
            "left": np.arange(n - length, n),
            "right": np.arange(length),
            "between": np.sort(rng.permutation(n)[:length]),
        }[side]
        tokens = rng.integers(0, VOCAB, length)
        mask[row, places], ids[row, places] = 1, tokens
        rows.append(tokens.tolist())
    return rows, ids, mask


@FEW
@given(st.data())
def test_any_padding_computes_what_each_row_does_alone(data):
    """In one call or two, the second one's mask of its own columns or of all; rows may have no
    token in a call. A column of padding has the logits of the last token before it."""
    config, seed = data.draw(configs()), data.draw(seeds)
    model = wrapped(config, seed)
    params = arrays_of(model.model)
    calls = [data.draw(padded_texts(config))]
    calls += [data.draw(padded_texts(config, 0, len(calls[0][0])))] * data.draw(st.booleans())
    alone = [stream.new_state(config) for _ in calls[0][0]]
    standing = [np.zeros(VOCAB) for _ in alone]
    cache, read = None, np.zeros((len(alone), 0), int)
    for rows, ids, mask in calls:
        whole = np.concatenate([read, mask], axis=1)
        given_mask = tensor(data.draw(st.sampled_from([mask, whole])))
        if mask.all() and data.draw(st.booleans()):
            given_mask = None
        before = cache
        kept = model(
            tensor(ids), given_mask, cache=copy.copy(before) if before else None, logits_to_keep=1
        )
        out = model(tensor(ids), given_mask, cache=before)
        assert before is None or out.cache is before
        cache, read = out.cache, whole
        assert cache.get_seq_length() == read.shape[1]
        for i, tokens in enumerate(rows):
            logits = np.zeros((0, VOCAB))
            if tokens:
                logits, alone[i] = spec.forward(tokens, alone[i], params, config)
            held = np.concatenate([standing[i][None], logits])
            expected = held[np.cumsum(mask[i])]
            standing[i] = held[-1]
            assert_near(out.logits[i], expected, f"sequence {i}")
            assert_near(kept.logits[i], expected[-1:], f"sequence {i}, last")
            assert_same_stream(cache.state, i, alone[i], config, f"sequence {i}")


@FEW
@given(st.data())
def test_padding_between_tokens_leaks_nothing_into_the_state(data):
    """Nor do the ids that stand there: not a bit differs."""
    config, seed = data.draw(configs()), data.draw(seeds)
    model = wrapped(config, seed)
    rows, ids, mask = data.draw(padded_texts(config))
    first = model(tensor(ids), tensor(mask)).cache
    other = np.where(mask, ids, (ids + 1) % VOCAB)
    second = model(tensor(other), tensor(mask)).cache
    for i in range(len(rows)):
        one, other = first.state.select([i]), second.state.select([i])
        assert_state_equal(other, one, f"other ids in the padding, sequence {i}")
    sizes = list(map(len, rows))
    packed = np.zeros((len(rows), max(sizes)), int)
    for i, row in enumerate(rows):
        packed[i, : len(row)] = row
    alone = model.model(tensor(packed), lengths=sizes, logits="none").state
    assert_same_streams(first.state, alone, "padded and packed")


def test_the_mask_is_honoured_at_batch_size_1(make_config):
    model = wrapped(make_config())
    ids, mask = [[3, 9, 1, 9, 9, 4]], [[0, 1, 1, 0, 1, 1]]
    out = model(tensor(ids), tensor(mask))
    assert out.cache.state.tokens == 4
    expected = model.model(tensor([[9, 1, 9, 4]]))
    assert_near(out.logits[:, [1, 2, 4, 5]], expected.logits.detach(), "logits")
    assert_same_streams(out.cache.state, expected.state, "state")
    more = model(tensor([[5, 6]]), tensor([[*mask[0], 1, 1]]), cache=copy.copy(out.cache))
    assert more.cache.state.tokens == 6
    text = model.generate(tensor(ids), attention_mask=tensor(mask), max_new_tokens=5)
    assert (
        text[0, 6:].tolist()
        == model.model.generate(tensor([[9, 1, 9, 4]]), max_new_tokens=5).ids[0]
    )


@FEW
@given(st.data())
def test_reading_on_from_a_cache_is_reading_the_whole(data):
    config, seed = data.draw(configs()), data.draw(seeds)
    model = wrapped(config, seed)
    _, ids, mask = data.draw(padded_texts(config))
    whole = model(tensor(ids), tensor(mask))
    cut = data.draw(st.integers(1, ids.shape[1]))
    first = model(tensor(ids[:, :cut]), tensor(mask[:, :cut]))
    logits, cache = [first.logits], first.cache
    if cut < ids.shape[1]:
        logits += [model(tensor(ids[:, cut:]), tensor(mask), cache=cache).logits]
    assert_near(torch.cat(logits, dim=1), whole.logits.detach(), "logits")
    assert_same_streams(cache.state, whole.cache.state, "state")


@pytest.mark.parametrize("columns", [0, 1, 5, 7, 9, 11])
def test_a_mask_covers_the_new_columns_or_all_of_them(make_config, columns):
    """4 columns are in the cache, 2 are new: any other width is refused."""
    model = wrapped(make_config())
    cache = model(tensor([[1, 2, 3, 4]])).cache
    mask = tensor(np.ones((1, columns), int))
    told = (
        r"attention_mask has shape \(1, .*\(1, 2\), as the text has, or \(1, 6\) with the columns"
    )
    with pytest.raises(ValueError, match=told):
        model(tensor([[5, 6]]), mask, cache=cache)
    assert cache.state.tokens == 4


@FEW
@given(st.data())
def test_the_loss_counts_tokens_that_follow_a_token(data):
    """Of each row, across padding; labels of padding and of a row's first token are not looked at."""
    config, seed = data.draw(configs()), data.draw(seeds)
    model = wrapped(config, seed)
    rows, ids, mask = data.draw(padded_texts(config))
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(ids.shape) < 0.3, IGNORE, ids)
    total, number = 0.0, 0
    for i, tokens in enumerate(rows):
        own = labels[i][mask[i] == 1]
        logits, _ = spec.forward(tokens, stream.new_state(config), arrays_of(model.model), config)
        if (own[1:] != IGNORE).any():
            count = int((own[1:] != IGNORE).sum())
            total, number = total + spec.language_loss(logits, own) * count, number + count
    arguments = {"attention_mask": tensor(mask), "labels": tensor(labels)}
    for keep in (0, 1):
        loss = model(tensor(ids), **arguments, logits_to_keep=keep).loss
        shared = model(tensor(ids), **arguments, logits_to_keep=keep, num_items_in_batch=tensor(7))
        assert_near(shared.loss.detach(), total / 7, "of 7")
        if number:
            assert_near(loss.detach(), total / number, "loss")
        else:
            assert loss.isnan()


@FEW
@given(st.data())
def test_hidden_states_are_those_of_text_tokens(data):
    """The embeddings, each layer's output, and the last one normed, which the logits are made of;
    in pieces as in the whole."""
    config, seed = data.draw(configs()), data.draw(seeds)
    model = wrapped(config, seed)
    _, ids, mask = data.draw(padded_texts(config))
    out = model(tensor(ids), tensor(mask), output_hidden_states=True, logits_to_keep=1)
    assert len(out.hidden_states) == config.backbone.num_hidden_layers + 1
    is_text = tensor(mask) == 1
    for states in out.hidden_states:
        assert states.shape == (*ids.shape, config.backbone.hidden_size)
        assert (states[~is_text] == 0).all()
    table = model.get_input_embeddings().weight
    assert torch.equal(out.hidden_states[0][is_text], table[tensor(ids)[is_text]])
    logits = out.hidden_states[-1] @ model.get_output_embeddings().weight.T
    expected = model(tensor(ids), tensor(mask)).logits
    assert_near(logits[is_text].detach(), expected[is_text].detach(), "logits")
    cut = data.draw(st.integers(1, ids.shape[1]))
    cache, pieces = CoMeTCache(), []
    for part in (slice(0, cut), slice(cut, None)):
        if ids[:, part].size:
            found = model(
                tensor(ids[:, part]), tensor(mask[:, part]), cache=cache, output_hidden_states=True
            )
            pieces.append(found.hidden_states)
    for i, layer in enumerate(zip(*pieces, strict=True)):
        assert_near(torch.cat(layer, dim=1), out.hidden_states[i].detach(), f"layer {i}, in pieces")


@FEW
@given(st.data())
def test_embeddings_are_read_as_the_ids_that_they_are_of(data):
    """With gradients; what stands in the padding is not looked at."""
    config, seed = data.draw(configs()), data.draw(seeds)
    model = wrapped(config, seed)
    _, ids, mask = data.draw(padded_texts(config))
    table = model.get_input_embeddings()
    embeddings = table(tensor(np.where(mask, ids, 0))).detach()
    embeddings[tensor(mask) == 0] = torch.nan
    embeddings.requires_grad_()
    found = model(inputs_embeds=embeddings, attention_mask=tensor(mask))
    expected = model(tensor(ids), tensor(mask))
    assert torch.equal(found.logits, expected.logits)
    assert_same_streams(found.cache.state, expected.cache.state, "state")
    found.logits.square().sum().backward()
    assert (embeddings.grad[tensor(mask) == 0] == 0).all()
    assert embeddings.grad[tensor(mask) == 1].isfinite().all()


@settings(max_examples=max(6, settings.default.max_examples // 10))
@given(family=st.sampled_from(["llama", "qwen3"]), seed=seeds, tied=st.booleans())
def test_a_backbone_alone_does_what_it_does_in_transformers(family, seed, tied):
    """Logits, loss, every hidden state; greedy and beam search over unequal prompts, padded left."""
    config = CONFIGS[family](
        vocab_size=13,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=5,
    )
    plain = MemoryConfig(chunk_size=64, global_memory_size=0, compression_stride=0)
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(0, 13, (3, 7)), np.ones((3, 7), int)
    mask[0, :3] = mask[2, :6] = 0
    with in_float64(), torch.no_grad():
        theirs = random_backbone(config, seed)
        ours = CoMeTForCausalLM.from_backbone(theirs, plain, device=DEVICE).eval()
        expected = theirs(
            torch.from_numpy(ids), output_hidden_states=True, labels=torch.from_numpy(ids)
        )
        found = ours(tensor(ids), output_hidden_states=True, labels=tensor(ids))
        assert_near(found.logits, expected.logits, "logits", 1e-9)
        assert_near(found.loss, expected.loss, "loss", 1e-9)
        for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert_near(a, b, "hidden states", 1e-9)
        for options in (
            {},
            {"num_beams": 3},
            {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        ):
            options = {"max_new_tokens": 6, "do_sample": False, **options}
            a = ours.generate(tensor(ids), attention_mask=tensor(mask), **options)
            b = theirs.generate(
                torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **options
            )
            assert a.tolist() == b.tolist(), options


@FEW
@given(st.data())
def test_decoding_is_the_model_s_own(data):
    """Greedy, over unequal prompts of many chunks, padded anywhere; with a cache and without, the
    prompt whole and in pieces."""
    config, seed = data.draw(configs()), data.draw(seeds)
    model = wrapped(config, seed)
    rows, ids, mask = data.draw(padded_texts(config))
    options = data.draw(st.sampled_from([{}, {"use_cache": False}, {"prefill_chunk_size": 3}]))
    found = model.generate(
        tensor(ids), attention_mask=tensor(mask), max_new_tokens=6, do_sample=False, **options
    )
    for i, row in enumerate(rows):
        expected = model.model.generate(tensor([row]), max_new_tokens=6).ids[0]
        assert found[i, ids.shape[1] :].tolist() == expected, (i, options)


@FEW
@given(st.data())
def test_samples_and_beams_keep_their_own_streams(data):
    """The logits, or the scores, that a sequence was decoded with are those of reading it alone."""
    config, seed = data.draw(configs()), data.draw(seeds)
    model = wrapped(config, seed)
    rows, ids, mask = data.draw(padded_texts(config))
    options = data.draw(
        st.sampled_from(
            [
                {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
                {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0},
                {"num_beams": 2, "do_sample": True, "length_penalty": 0.0, "top_k": 0},
            ]
        )
    )
    torch.manual_seed(seed)
    out = model.generate(
        tensor(ids),
        attention_mask=tensor(mask),
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **options,
    )
    copies = options.get("num_return_sequences", 1)
    assert len(out.sequences) == copies * len(rows)
    for i, sequence in enumerate(out.sequences):
        new = sequence[ids.shape[1] :].tolist()
        text = [*rows[i // copies], *new]
        logits = model.model(tensor([text])).logits[0, -6:-1].detach()
        if "num_beams" in options:
            chosen = logits.log_softmax(dim=-1).gather(1, tensor(new)[:, None]).sum()
            assert_near(out.sequences_scores[i], chosen, "score of the sequence", 1e-6)  # float32
        else:
            found = torch.stack(out.logits, dim=1)[i]
            assert_near(found, logits.float(), "logits of the sequence", 1e-6)


def test_streamers_criteria_and_processors_see_every_token(make_config):
    model = wrapped(make_config())
    ids = tensor([[1, 2, 3, 4, 5, 6, 7]])
    seen, called = [], []

    class Streamer:
        def put(self, tokens):
            seen.extend(tokens.flatten().tolist())

        def end(self):
            seen.append("end")

    def stop(so_far, scores):
        called.append(so_far.shape[1])
        return torch.full((1,), so_far.shape[1] >= 12, device=so_far.device)

    def forbid(so_far, scores):
        return scores.index_fill(1, so_far[:, -1], -torch.inf)  # no token twice in a row

    found = model.generate(
        ids,
        max_new_tokens=9,
        streamer=Streamer(),
        stopping_criteria=[stop],
        logits_processor=[forbid],
    )
    assert found.shape == (1, 12)
    assert seen == [*found[0].tolist(), "end"]
    assert called == [8, 9, 10, 11, 12]
    assert (found[0, 7:] != found[0, 6:-1]).all()
    first = int(found[0, 7])
    ended = model.generate(ids, max_new_tokens=9, eos_token_id=first, pad_token_id=0)
    assert ended[0, 7:].tolist()[:1] == model.model.generate(ids, max_new_tokens=1).ids[0]


@FEW
@given(st.data())
def test_decoding_goes_on_from_a_returned_cache(data):
    """Given the whole text; given new ids and a mask of all; given new ids and a cache that begins
    at its state. A copy is a branch of its own."""
    config, seed = data.draw(configs()), data.draw(seeds)
    model = wrapped(config, seed)
    _, ids, mask = data.draw(padded_texts(config))
    options = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(
        tensor(ids), attention_mask=tensor(mask), max_new_tokens=9, **options
    ).sequences
    first = model.generate(tensor(ids), attention_mask=tensor(mask), max_new_tokens=4, **options)
    n, cache = ids.shape[1], first.cache
    assert cache.get_seq_length() == n + 3
    ones = tensor(np.ones((len(ids), 4), int))
    mask = torch.cat([tensor(mask), ones], dim=1)
    last = first.sequences[:, -1:]
    for branch, text, given_mask in (
        (copy.copy(cache), first.sequences, mask),
        (copy.copy(cache), last, mask),
        (CoMeTCache(cache.state), last, None),
        (cache, first.sequences, mask),
    ):
        found = model.generate(
            text, attention_mask=given_mask, cache=branch, max_new_tokens=5, **options
        )
        assert torch.equal(found.sequences[:, -5:], whole[:, -5:])
        assert found.cache is branch
        assert found.cache.state.tokens[0] == first.cache.state.tokens[0] + 5 * (
            branch is not cache
        )


@pytest.mark.host
def test_a_deep_copy_of_a_cache_is_a_branch_too(make_config):
    model = wrapped(make_config())
    with torch.no_grad():
        cache = model(tensor([[1, 2, 3, 4, 5]])).cache
        branch = copy.deepcopy(cache)
        expected = model(tensor([[6, 7]]), cache=cache).logits
        assert torch.equal(model(tensor([[6, 7]]), cache=branch).logits, expected)


def test_ids_that_do_not_go_on_from_a_cache_are_refused(make_config):
    """transformers would cut off as many as the cache has read, in silence."""
    model = wrapped(make_config())
    cache = model(tensor([[1, 2, 3, 4, 5]])).cache
    told = r"the cache has read 5 columns, and the .* of input_ids do not begin with those; give"
    for width in (4, 8):
        with pytest.raises(
            ValueError, match=f"attention_mask has {width} columns, input_ids 2 and"
        ):
            model.generate(
                tensor([[6, 7]]),
                attention_mask=tensor([[1] * width]),
                cache=cache,
                max_new_tokens=2,
            )
    for ids in ([[6, 7]], [[1, 2, 3, 4, 5]], [[1, 2, 3, 9, 5, 6]], [[6, 7, 8, 9, 1, 2, 3]]):
        for options in ({}, {"prefill_chunk_size": 2}):
            with pytest.raises(ValueError, match=told):
                model.generate(tensor(ids), cache=cache, max_new_tokens=2, **options)
    assert cache.columns == 5
    found = model.generate(tensor([[1, 2, 3, 4, 5, 6]]), cache=cache, max_new_tokens=3)
    expected = model.generate(tensor([[1, 2, 3, 4, 5, 6]]), max_new_tokens=3)
    assert torch.equal(found, expected)


def test_a_document_is_read_once_and_asked_many_times(make_config):
    """A cache of one stream is forked for beams and samples, and stays where it was."""
    model = wrapped(make_config())
    document, question = tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]]), tensor([[3, 1]])
    state = model(document).cache.state
    whole = torch.cat([document, question], dim=1)
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        cache = CoMeTCache(state)
        found = model.generate(question, cache=cache, max_new_tokens=4, **options)
        expected = model.generate(whole, max_new_tokens=4, **options)
        assert torch.equal(found[:, 2:], expected[:, 11:])
        assert cache.state is state
    three = CoMeTCache(state.fork(3))
    found = model.generate(question.repeat(3, 1), cache=three, max_new_tokens=4)
    assert torch.equal(found[2, 2:], model.generate(whole, max_new_tokens=4)[0, 11:])
    assert three.state.tokens.tolist() == [9 + 2 + 3] * 3


def test_a_cache_is_the_stream_s_state(make_config, tmp_path):
    """Saved and loaded, rearranged, reset."""
    model = wrapped(make_config())
    ids = tensor([[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]])
    out = model(ids)
    cache = out.cache
    assert isinstance(cache.state, CoMeTState)
    assert_same_states(cache.state, model.model(ids).state, "state")
    cache.state.save(tmp_path / "state", model.model)
    loaded = CoMeTCache(CoMeTState.load(tmp_path / "state", model.model))
    more = tensor([[3], [3]])
    expected = model(more, cache=copy.copy(cache)).logits
    assert torch.equal(model(more, cache=loaded).logits, expected)
    cache.reorder_cache(tensor([1, 1, 0]))
    cache.batch_repeat_interleave(2)
    assert (cache.batch_size, len(cache), cache.get_seq_length()) == (6, 2, 7)
    rows = [1, 1, 1, 1, 0, 0]
    held = model(tensor([[0]] * 6), tensor([[0]] * 6), cache=cache).logits[:, 0]
    assert_near(held, out.logits[rows, -1].detach(), "logits that stand")
    assert_near(model(more[[0] * 6], cache=cache).logits, expected[rows].detach(), "rearranged")
    cache.batch_select_indices(tensor([4]))
    assert (cache.batch_size, cache.get_max_length(), cache.is_linear) == (1, -1, [False])
    assert cache.get_mask_sizes(2) == (9 + 2, 0)
    assert repr(cache) == "CoMeTCache(batch_size=1, columns=9)"
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove is -1, but memories cannot take back"):
        cache.crop(-1)
    assert not cache.is_croppable
    cache.reset()
    assert (cache.batch_size, cache.columns, cache.is_initialized) == (-1, 0, False)
    assert torch.equal(model(ids, cache=cache).logits, out.logits)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"input_ids": None}, "give one of input_ids and inputs_embeds, and not both"),
        ({"inputs_embeds": 1}, "give one of input_ids and inputs_embeds, and not both"),
        ({"input_ids": None, "inputs_embeds": 3}, "inputs_embeds is a int; expected a tensor"),
        ({"input_ids": [[1]]}, "ids is a list; expected a tensor"),
        ({"input_ids": torch.tensor([[1, 11]])}, "ids range from 1 to 11; expected \\[0, 11\\)"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 5)},
            "inputs_embeds has shape \\(1, 2, 5\\) and dtype torch.float32; expected .* 6\\] of",
        ),
        (
            {"attention_mask": [[1, 1]]},
            "attention_mask is a list; expected a tensor of 0 and 1, or",
        ),
        (
            {"attention_mask": torch.ones(1, 3)},
            "has shape \\(1, 3\\); expected \\(1, 2\\), as the tex",
        ),
        ({"attention_mask": torch.tensor([[1, 2]])}, "other numbers than 0 and 1; expected 1 at"),
        ({"labels": torch.tensor([[1]])}, "labels has shape \\(1, 1\\); expected \\(1, 2\\)"),
        ({"labels": torch.tensor([[1, 11]])}, "labels holds 11; expected \\[0, 11\\)"),
        ({"cache": DynamicCache()}, "cache is a DynamicCache; expected a CoMeTCache, such as"),
        ({"output_attentions": True}, "output_attentions is bool True; leave it out: attention is"),
        ({"position_ids": 3}, "position_ids is int 3; leave it out: positions follow from"),
        ({"past_key_values": 3}, "past_key_values is int 3; leave it out: transformers 5.24 calls"),
        ({"token_type_ids": 3}, "token_type_ids is int 3; leave it out: forward takes no such"),
    ],
)
def test_what_forward_cannot_do_is_refused_in_a_sentence(make_config, arguments, told):
    model = wrapped(make_config())
    arguments = {
        name: tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    with pytest.raises(ValueError, match=told):
        model(**({"input_ids": tensor([[1, 2]])} | arguments))
    assert model(tensor([[1, 2]]), output_attentions=False, position_ids=None).attentions is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"cache_implementation": "static"},
            "cache_implementation is 'static'; expected None: a str",
        ),
        (
            {"cache_implementation": "quantized"},
            "cache_implementation is 'quantized'; expected None",
        ),
        ({"cache": DynamicCache()}, "cache is a DynamicCache; expected a CoMeTCache, such as"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful"),
        ({"attention_mask": torch.ones(1, 9)}, "attention_mask has 9 columns, input_ids 2 and the"),
        ({"attention_mask": torch.zeros(1, 1)}, "attention_mask has 1 columns, input_ids 2 and"),
    ],
)
def test_what_generate_cannot_do_is_refused_in_a_sentence(make_config, arguments, told):
    model = wrapped(make_config())
    arguments = {
        name: tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    with pytest.raises(ValueError, match=told):
        model.generate(tensor([[1, 2]]), max_new_tokens=2, **arguments)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        model.generate(tensor([[1, 2]]), assistant_model=model, max_new_tokens=2)


def test_a_cache_of_another_batch_or_model_is_refused(make_config):
    model = wrapped(make_config())
    cache = model(tensor([[1, 2], [3, 4]])).cache
    with pytest.raises(ValueError, match="the state has batch size 2, the input 1; make"):
        model(tensor([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="the state belongs to a model with config"):
        wrapped(make_config(memory={"chunk_size": 9}))(tensor([[1], [2]]), cache=cache)
    with pytest.raises(ValueError, match="state is a int; expected a CoMeTState"):
        CoMeTCache(3)


@pytest.mark.parametrize("padding", ["left", "between"])
def test_it_runs_under_autocast(make_config, padding):
    """A padded text and its continuation, trained and decoded."""
    config = make_config({"hidden_size": 32, "head_dim": 8})
    model = wrapped(config, 0, torch.float32)
    ids = tensor(np.random.default_rng(0).integers(0, 11, (2, 11)))
    mask = np.ones((2, 11), int)
    mask[0, slice(0, 3) if padding == "left" else slice(4, 7)] = 0
    exact = model(ids, tensor(mask), labels=ids)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model.train()(ids, tensor(mask), labels=ids)
        model(ids, cache=out.cache, labels=ids).loss.backward()
        model.eval().generate(ids, attention_mask=tensor(mask), max_new_tokens=3)
    assert out.logits.dtype == torch.bfloat16
    assert_near(out.loss.detach(), exact.loss.detach(), "loss", 0.05)


def test_what_comes_back_is_what_was_asked_for(make_config):
    model = wrapped(make_config())
    ids = tensor([[1, 2, 3]])
    assert model(ids, use_cache=False).cache is None
    assert model(ids, use_cache=False, cache=CoMeTCache()).cache.columns == 3
    model.config.use_cache = False
    assert model(ids).cache is None
    logits, cache = model(ids, use_cache=True, return_dict=False)
    assert (logits.shape, cache.columns) == ((1, 3, 11), 3)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3


@pytest.mark.host  # the pretend device does not take a mask as an index
def test_logits_are_of_the_columns_that_are_named(make_config):
    model = wrapped(make_config())
    ids = tensor([[1, 2, 3]])
    whole = model(ids).logits
    for keep, columns in (
        (0, [0, 1, 2]),
        (1, [2]),
        (2, [1, 2]),
        (tensor([0, 2]), [0, 2]),
        (tensor([[1, 0]]), [1, 0]),
    ):
        assert_near(model(ids, logits_to_keep=keep).logits, whole[:, columns].detach(), f"{keep}")
    named = tensor([[True, False, True]])
    found = model(ids, logits_to_keep=named, labels=ids)
    assert_near(found.logits, whole[named].detach(), "of a mask")
    assert_near(found.loss, model(ids, labels=ids).loss.detach(), "loss")
