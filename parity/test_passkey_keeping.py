"""The pass key's fifth stage: pools of states, what is trained on of them, and that it goes on."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from fast.tasks import passkey
from fast.tasks.passkey_diagnosis import SENTENCE
from fast.tasks.passkey_keeping import RECIPE, KeepingKeys, Options, _draw_key, _replace
from fast.tasks.passkey_recipe import RECIPE as FIRST
from fast.tasks.passkey_training import change_of
from fast.train import Phase, Processes, Settings, Trainer, build_model, read_settings

from .assertions import assert_state_equal
from .test_train import run_to_a_checkpoint

pytestmark = pytest.mark.host

CONFIG = read_settings(FIRST).config
TINY = {
    **CONFIG,
    "backbone": {
        **CONFIG["backbone"],
        "hidden_size": 16,
        "head_dim": 4,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
    },
}


def task(**changes):
    given = {
        "task": "keeping",
        "config": TINY,
        "batch_size": 4,
        "phases": (Phase(10, 1e-3),),
        "options": {"pool": 12, "longest": 3, "steps": 5, "candidates": 8},
        "memory_rate": 1.0,
    }
    settings = Settings(**{**given, **changes})
    return KeepingKeys(settings, build_model(settings), Processes())


def test_the_recipe_is_whole():
    settings = read_settings(RECIPE, model=str(passkey.SHIPPED))
    trained = KeepingKeys(settings, build_model(settings), Processes())
    assert settings.steps == 5200
    assert [options.hinge for options in trained.phases] == [0.1, 0.3, 0.3]
    with pytest.raises(ValueError, match="2 processes; this task is one process's"):
        KeepingKeys(settings, trained.model, Processes(group=0, number=2))


def test_borders_cut_distractors_and_a_key_comes_first():
    """And none of the numbers is of the test split."""
    trained, rng = task(), np.random.default_rng(0)
    options = Options(cut=1.0, spacings=(1e6,), filler=0.0)
    text = trained._prose(20 * 128, rng, options, key=1234)
    assert len(text) == 20 * 128
    assert text.startswith(b"\n" + passkey.INFORMATION.format(key=1234).encode())
    spans = [m.span() for m in SENTENCE.finditer(text)]
    cut = [any(first < at < last for first, last in spans) for at in range(256, 20 * 128, 128)]
    assert np.mean(cut) > 0.7  # a long word before it may take a distractor's place
    assert all(text[first - 1 : first] in b" \n" for first, _ in spans), "amid a word"
    numbers = [int(n) for n in re.findall(rb"is (\d+)\. Remember it", text)[1:]]
    assert len(numbers) > 10
    assert all(n % passkey.HELD_OUT for n in numbers)
    plain = trained._prose(20 * 128, rng, dataclasses.replace(options, cut=0.0))
    assert not SENTENCE.search(plain)


def test_some_texts_are_the_published_filler():
    trained, rng = task(), np.random.default_rng(0)
    options = Options(filler=1.0)
    text = trained._prose(500, rng, options, key=1234).decode()
    _, said, rest = text.split("\n", 2)
    assert said == passkey.INFORMATION.format(key=1234)
    assert len(text) == 500
    assert rest in passkey.FILLER * 8
    texts = [trained._prose(500, rng, Options()) for _ in range(200)]
    share = np.mean([text.decode("latin1") in passkey.FILLER * 8 for text in texts])
    assert 0.05 < share < 0.3


@pytest.mark.parametrize("short", [0.0, 1.0])
def test_new_keys_are_drawn_evenly_or_of_any_size(short):
    rng = np.random.default_rng(0)
    keys = [_draw_key(rng, short) for _ in range(400)]
    assert all(0 < key <= passkey.LARGEST_KEY and key % passkey.HELD_OUT for key in keys)
    sizes = np.bincount([len(str(key)) for key in keys], minlength=6)[1:] / len(keys)
    assert (np.abs(sizes - 0.2) < 0.07).all() if short else sizes[4] > 0.7


def test_states_that_move_most_are_trained_on():
    """And take their places in the pool, while the others stay as they are."""
    trained, rng = task(), np.random.default_rng(1)
    options = trained.options_at(0)
    texts = [trained._prose(256, rng, options) for _ in range(options.pool)]
    with torch.no_grad():
        state = trained._read(None, texts)
    seen = []

    def read(before, texts, own=trained._read):
        after = own(before, texts)
        seen.append((before, after))
        return after

    trained._read = read
    loss, rows, after = trained._stay(state, [7, 8], rng, options)
    (before, first), (chosen, _) = seen
    moved = change_of(before, first)
    kept = change_of(chosen, after)
    assert len(moved) == 8
    assert torch.allclose(kept.detach(), moved.sort(descending=True).values[:4], atol=1e-6)
    assert loss.requires_grad
    assert_state_equal(state.select(rows.tolist()), chosen, "the rows that are named")
    replaced = _replace(state, rows, after.detach())
    assert_state_equal(replaced.select(rows.tolist()), after.detach(), "what was replaced")
    others = sorted(set(range(options.pool)) - set(rows.tolist()))
    assert_state_equal(replaced.select(others), state.select(others), "the others")


def test_gate_logits_are_told_with_their_gradient():
    """Of each layer and each chunk after the first; nothing is left of the hooks."""
    trained, rng = task(), np.random.default_rng(1)
    texts = [trained._prose(256, rng, Options()) for _ in range(2)]
    with trained._gate_logits() as logits:
        trained._read(None, texts)
    assert len(logits) == 2 * 2
    logits[-1].sum().backward()
    layer = trained.model.weights["layers"][1]["global_memory"]
    assert layer["gate"].weight.grad.abs().sum() > 0
    assert layer["gate"].bias.grad is not None
    assert not layer["gate"]._forward_hooks


def test_all_kinds_of_steps_are_taken_and_go_on_where_they_stopped(tmp_path):
    settings = {"save_every": 5, "phases": (Phase(15, 1e-3),)}
    whole = Trainer(task(**settings), tmp_path / "whole")
    whole.run()
    told = {name for found in whole.read_metrics() for name in found}
    assert {"lacks", "change", "fresh", "late"} <= told
    cut = Trainer(task(**settings), tmp_path / "cut")
    run_to_a_checkpoint(cut)
    rest = Trainer(task(**settings), tmp_path / "cut")
    assert rest.step == 5
    rest.run()
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], expected), name


def test_what_is_held_out_is_told():
    """The shipped model takes late keys up, and writes now and then."""
    settings = read_settings(RECIPE, model=str(passkey.SHIPPED))
    found = KeepingKeys(settings, build_model(settings), Processes()).evaluate()
    assert found["late"] >= 0.9
    assert 0 <= found["writes"] < 100
