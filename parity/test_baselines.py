"""Baselines against NumPy forms of their papers' equations, one sequence and one chunk at a time."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast.baselines import EPSILON, KINDS, Baseline, BaselineConfig
from reference.layers import decoder_layer, linear, rms_norm, rotary_tables, sigmoid
from reference.parameters import map_parameters, named_parameters

from .assertions import array, assert_near
from .device import tensor, tensors
from .strategies import VOCAB, backbones, seeds
from .test_windows import GRADIENTS

pytestmark = pytest.mark.host


def layer(row, i, params, backbone):
    """A decoder layer over a whole row."""
    none = np.zeros((backbone.num_key_value_heads, 0, backbone.head_dim))
    positions = np.arange(len(row))
    tables = rotary_tables(positions, backbone)[i in backbone.unrotated_layers]
    return decoder_layer(row, none, none, positions, tables, params["layers"][i], backbone)[0]


def transformer_xl(hidden, memory, params, config):
    """h_i from [sg(m_i) ; h_{i-1}], of which the memory's own outputs are dropped."""
    memory = memory or [np.zeros((0, hidden.shape[1]))] * config.backbone.num_hidden_layers
    after = []
    for i, past in enumerate(memory):
        row = np.concatenate([past, hidden])
        after.append(row[max(len(row) - config.slots, 0) :])
        hidden = layer(row, i, params, config.backbone)[len(past) :]
    return hidden, after


def rmt(hidden, memory, params, config):
    """[M ; text ; M] up all layers; what becomes of the last M is the next chunk's, normed."""
    before = memory if memory is not None else params["memory_embeddings"]
    row = np.concatenate([before, hidden, before])
    for i in range(config.backbone.num_hidden_layers):
        row = layer(row, i, params, config.backbone)
    m = len(before)
    norm = rms_norm(row[-m:], params["norm"], config.backbone.rms_norm_eps)
    return row[m:-m], norm


def phi(x, order):
    both = np.maximum(np.concatenate([x, -x]), 0)
    found = np.concatenate([both * np.roll(both, j) for j in range(1, order + 1)])
    return found / max(np.linalg.norm(found), 1e-12)


def armt(hidden, memory, params, config):
    """Each slot reads A^T q / (z q); memory tokens are written by the delta rule, all at once."""
    d, k = hidden.shape[1], 2 * config.order * config.key_size
    memory = memory or [(np.zeros((k, d)), np.zeros(k))] * config.backbone.num_hidden_layers
    row, after = np.concatenate([hidden, params["memory_embeddings"]]), []
    for i, (a, z) in enumerate(memory):
        w = params["layers"][i]

        def held(key, a=a, z=z):
            return key @ a / (key @ z + EPSILON)

        row = np.stack([x + held(phi(linear(x, w["memory_q_proj"]), config.order)) for x in row])
        row = layer(row, i, params, config.backbone)
        new_a, new_z = a.copy(), z.copy()
        for x in row[len(hidden) :]:
            key = phi(linear(x, w["memory_k_proj"]), config.order)
            new = linear(x, w["memory_v_proj"]) - held(key)
            new_a += sigmoid(linear(x, w["memory_beta_proj"])) * np.outer(key, new)
            new_z += np.clip(1 - key @ z, 0, 1) * key
        after.append((new_a, new_z))
    return row[: len(hidden)], after


FORMS = {"transformer-xl": transformer_xl, "rmt": rmt, "armt": armt}


def read(ids, params, config):
    """The logits of a text, chunk by chunk."""
    memory, found = None, []
    for start in range(0, len(ids), config.chunk_size):
        text = params["embed_tokens"][ids[start : start + config.chunk_size]]
        hidden, memory = FORMS[config.kind](text, memory, params, config)
        found.append(rms_norm(hidden, params["norm"], config.backbone.rms_norm_eps))
    tied = config.backbone.tie_word_embeddings
    return linear(np.concatenate(found), params["embed_tokens" if tied else "lm_head"])


@st.composite
def baselines(draw):
    config = BaselineConfig(
        draw(st.sampled_from(KINDS)), draw(backbones()), draw(st.integers(1, 5)),
        draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3)),
    )  # fmt: skip
    rng = np.random.default_rng(draw(seeds))

    def start(name, shape):
        small = name.rsplit(".", 1)[-1].endswith("norm")
        return (
            rng.uniform(0.5, 1.5, shape) if small else rng.normal(0, 0.7 / shape[-1] ** 0.5, shape)
        )

    params = map_parameters(start, config.shapes())
    ids = rng.integers(0, VOCAB, (draw(st.integers(1, 3)), draw(st.integers(1, 17))))
    return config, params, Baseline(config, tensors(params, torch.float64)), ids


@given(baselines())
def test_each_is_its_paper_s_equations(case):
    config, params, model, ids = case
    found = model(tensor(ids)).logits
    for row, text in zip(found, ids, strict=True):
        assert_near(row.detach(), read(text, params, config), config.kind)


@given(baselines(), st.data())
def test_a_text_may_be_split_anywhere(case, data):
    """Into calls: logits, losses and answers are those of one."""
    config, _, model, ids = case
    text, state, parts, start = tensor(ids), None, [], 0
    whole = model(text, labels=text)
    while start < ids.shape[1]:
        end = data.draw(st.integers(start + 1, ids.shape[1]))
        out = model(text[:, start:end], state=state)
        state, start = out.state, end
        parts.append(out.logits)
    assert_near(torch.cat(parts, 1).detach(), array(whole.logits.detach()), "logits")
    for x, y in zip(state.memory, whole.state.memory, strict=True):
        assert_near(x.detach(), array(y.detach()), "memory")
    assert torch.equal(state.ids, whole.state.ids)
    last = model(text, logits="last").logits[:, 0]
    assert_near(last.detach(), array(whole.logits[:, -1].detach()), "the last logits")
    if ids.shape[1] > 1:
        nats = -torch.log_softmax(whole.logits[:, :-1], -1).gather(2, text[:, 1:, None]).mean()
        assert_near(whole.loss.detach(), array(nats.detach()), "loss")
    held = sum(t.numel() for t in whole.state.memory) / len(ids)
    full = config.kind == "armt" or ids.shape[1] > config.chunk_size * config.slots
    assert held <= config.state_numbers
    assert not full or held == config.state_numbers


@given(baselines())
def test_questions_of_any_length_are_answered_side_by_side(case):
    """As each by itself, on forks."""
    config, _, model, ids = case
    text = tensor(ids)
    state = model(text, logits="none").state
    asked = tensor(np.array([[1, 2, 3], [4, 0, 0]]) % VOCAB)
    rows = [0, len(ids) - 1]
    together = model.generate(asked, state.select(rows), 4, lengths=[3, 1]).ids
    for row, n, said in zip(range(2), (3, 1), together, strict=True):
        own = state.select([rows[row]])
        assert said == model.generate(asked[row : row + 1, :n], own, 4).ids[0]
        known, new = torch.cat([own.ids[0], asked[row, :n]]), []
        for _ in range(4):
            hidden, _ = model.read_chunk(known[None], own.memory, False)
            new.append(int(model._predict(hidden[0, -1]).argmax()))
            known = torch.cat([known, tensor(np.array(new[-1:]))])
        assert said == new


@given(baselines())
def test_chunks_are_read_again_in_the_backward_pass(case):
    """With the same gradients, of every weight."""
    _, _, model, ids = case
    text, found = tensor(np.repeat(ids, 2, axis=1)), []
    for recompute in ("none", "chunks"):
        model.zero_grad()
        model(text, labels=text, logits="none", recompute=recompute).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:
            assert_near(found[1][name], array(gradient), name, GRADIENTS)


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_a_model(kind, tmp_path, make_config):
    config = BaselineConfig(kind, make_config().backbone, 4, 3)
    model = Baseline(config, seed=3)
    model.save_pretrained(tmp_path)
    again = Baseline.from_pretrained(tmp_path)
    assert again.config == config
    for name, p in named_parameters(model.weights.to_dict()).items():
        assert torch.equal(named_parameters(again.weights.to_dict())[name], p), name
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"slots": 5}))
    with pytest.raises(ValueError, match="was written with another config than config.json"):
        Baseline.from_pretrained(tmp_path)
