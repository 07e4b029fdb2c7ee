"""The pass-key task, its training and measurement, and the model that comes with it."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from fast.tasks import passkey
from fast.tasks.passkey_report import lower_bound, measure
from fast.train.passkey import LONG, PHASES, Phase, Recipe, Trainer, small_config


@pytest.mark.parametrize("variant", passkey.VARIANTS)
@pytest.mark.parametrize("length", [300, 1024, 5001])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_text_has_its_length_its_five_parts_and_its_key(variant, length, depth):
    haystack = passkey.read_haystack() if variant == "prose" else None
    example = passkey.Example(length, depth, 3, haystack)
    text = example.text()
    information = passkey.INFORMATION.format(key=example.key).encode()
    assert len(text) == length
    assert text == example.text()
    assert text.startswith(passkey.DESCRIPTION.encode())
    assert text.endswith(b"\n" + passkey.QUESTION.encode())
    assert text[example.key_start : example.key_end] == information
    assert text.count(b"The pass key is") == 2
    assert b"".join(passkey.blocks(example, 128)) == text


def test_depths_go_from_start_to_end():
    ends = [passkey.Example(4096, d, 0).key_end for d in np.linspace(0, 1, 11)]
    assert ends == sorted(ends)
    assert ends[0] < 300
    assert ends[-1] > 3900


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_draws_all_of_its_numbers_and_no_others(split):
    rng = np.random.default_rng(0)
    drawn = {passkey.draw_number(rng, split) for _ in range(200_000)}
    own = [n for n in range(1, 50001) if (n % passkey.HELD_OUT == 0) == (split == "test")]
    assert drawn <= set(own)
    assert own[0] in drawn
    assert own[-1] in drawn
    assert len(drawn) > 0.97 * len(own)


def test_training_meets_no_number_of_the_test_split():
    haystack = passkey.read_haystack(split="train")
    for seed in range(20):
        text = passkey.Example(4096, 0.5, seed, haystack, spacing=150, split="train").text()
        told = re.findall(rb"is (\d+)\. Remember it", text)
        assert len(told) > 5
        assert all(int(number) % passkey.HELD_OUT for number in told)


def test_no_text_of_the_training_is_longer_than_said():
    chunk = small_config().memory.chunk_size
    asked = len(f"\n{passkey.QUESTION} 50000.\n")
    for phase in PHASES:
        assert max((a * b + 1) * chunk + asked for a, b in phase.windows) <= 4096


def test_bad_texts_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"depth is 1\.5"):
        passkey.Example(1000, 1.5, 0)
    with pytest.raises(ValueError, match="length is 100 bytes; the task's fixed parts need 2"):
        passkey.Example(100, 0.5, 0)


def test_the_first_number_counts():
    assert passkey.first_number(b" 123.\n") == 123
    assert passkey.first_number(b"is 7, not 8") == 7
    assert passkey.first_number(b"none") is None


def test_the_bound_is_clopper_and_pearson_s():
    assert lower_bound(55, 55) == pytest.approx(0.05 ** (1 / 55), abs=1e-9)
    assert lower_bound(0, 9) == 0.0
    assert lower_bound(9, 10) == pytest.approx(0.6058, abs=1e-4)


def test_the_processes_share_the_depths_and_change_nothing():
    one, three = (measure([700], keys=2, tails=True, processes=processes) for processes in (1, 3))
    assert one[0].found == three[0].found
    assert one[0].trials == 22


class _Interrupted(Trainer):
    def save(self):
        super().save()
        raise KeyboardInterrupt


def test_training_goes_on_where_it_stopped(tmp_path):
    """To the bit: what a step does depends on the step's number and the weights alone."""
    config = small_config()
    config = dataclasses.replace(
        config,
        backbone=dataclasses.replace(
            config.backbone, hidden_size=16, head_dim=4, intermediate_size=16, num_hidden_layers=1
        ),
    )
    phases = (Phase(2, ((1, 1),), 1e-2), Phase(4, LONG, 1e-2, decays=True))
    recipe = Recipe(phases=phases, batch_size=2)
    whole = Trainer(config, recipe, tmp_path / "whole")
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        _Interrupted(config, recipe, tmp_path / "cut").run(save_every=3)
    rest = Trainer(config, recipe, tmp_path / "cut")
    assert 3 <= rest.step < whole.step
    rest.run()
    assert rest.step == whole.step
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], expected), name


def test_a_run_s_folder_keeps_to_its_config(tmp_path):
    Trainer(small_config(), Recipe(), tmp_path).save()
    config = small_config()
    other = dataclasses.replace(
        config, memory=dataclasses.replace(config.memory, gate_saturation=0.5)
    )
    with pytest.raises(ValueError, match=r"another config; give an empty folder"):
        Trainer(other, Recipe(), tmp_path)


def test_the_shipped_model_finds_keys():
    """Far from a measurement: enough to notice that it has stopped working."""
    model = passkey.load_model()
    right = sum(passkey.found(model, [passkey.Example(5000, d / 10, d) for d in range(11)]))
    assert right >= 9
