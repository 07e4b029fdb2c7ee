"""The pass-key task, its training and measurement, and the model that comes with it."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fast import CoMeTModel
from fast.__main__ import main
from fast.tasks import passkey
from fast.tasks.passkey_recipe import LATE_WINDOWS, RECIPE, Options
from fast.tasks.passkey_report import Part, Setting, join_parts, lower_bound, measure
from fast.tasks.passkey_training import PassKey
from fast.train import Phase, Processes, Settings, Trainer, build_model, read_settings
from reference.parameters import named_parameters

from .test_train import run_to_a_checkpoint

pytestmark = pytest.mark.host

SETTINGS = read_settings(RECIPE)


def task(settings=SETTINGS):
    return PassKey(settings, build_model(settings), Processes())


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


@pytest.mark.parametrize("phase", range(len(SETTINGS.phases)))
def test_training_meets_nothing_of_the_test_split(phase):
    """Neither its keys and distractors nor its prose, in the texts that a trainer makes.

    But for `numbers`, which are written over the prose as they come, distractors included.
    """
    trained = task()
    options = dataclasses.replace(trained.phases[phase], numbers=0.0)
    test = passkey.read_haystack(split="test")
    told = 0
    for seed in range(5):
        texts = trained.draw_texts(options, np.random.default_rng(seed), 512, 7)
        assert all(key % passkey.HELD_OUT for key in texts.keys)
        for row in texts.ids.tolist():
            numbers = re.findall(rb"is (\d+)\. Remember it", bytes(row))
            assert all(int(number) % passkey.HELD_OUT for number in numbers)
            told += len(numbers)
        pieces = [bytes(row[at : at + 100]) for row in texts.ids.tolist() for at in (900, 1700)]
        plain = [p for p in pieces if b"Remember" not in p and b"grass" not in p]
        assert len(plain) > 5
        assert not any(piece in test for piece in plain)
    assert told > 100


def test_no_text_of_the_training_is_longer_than_said():
    trained = task()
    chunk = trained.model.config.memory.chunk_size
    asked = len(f"\n{passkey.QUESTION} 50000.\n")
    for options in trained.phases:
        for chunks, most in options.windows:
            windows = most - 1 + LATE_WINDOWS if options.key_anywhere else most
            assert (chunks * windows + 1) * chunk + asked <= 4096


def test_keys_and_answers_are_cut_by_borders_and_come_late():
    """What the later stages are for; and no number is written over a key."""
    trained = task()
    options = dataclasses.replace(trained.phases[-1], border_share=1.0, numbers=3.0)
    chunk = trained.model.config.memory.chunk_size
    rng = np.random.default_rng(0)
    texts = trained.draw_texts(options, rng, window=chunk, windows=9, lead=6)
    for row, key, start, end in zip(
        texts.ids.tolist(), texts.keys, texts.starts, texts.ends, strict=True
    ):
        said = passkey.INFORMATION.format(key=key).encode()
        assert bytes(row[start:end]) == said[: len(row) - start]
        assert 5.5 * chunk <= start <= 8 * chunk
        digits = len(str(key))
        mentions = start + said.index(b"%d" % key), start + said.rindex(b"%d" % key)
        assert any(-place % chunk <= digits for place in mentions)
    question, answer = len(f"\n{passkey.QUESTION}"), len(" 12345.\n")
    tails = {texts.cutting_tail(rng) for _ in range(200)}
    assert tails == {chunk - question - cut for cut in range(answer + 1)}


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
    assert lower_bound(550, 1100) == pytest.approx(0.4748, abs=1e-4)


def test_the_processes_share_the_depths_and_change_nothing():
    (one,), (two,) = (
        list(measure([700], Setting(keys=2, tails=True, processes=n))) for n in (1, 2)
    )
    assert one.found == two.found
    assert one.trials == 22


def test_parts_go_back_to_their_depths():
    """Depth i is the (i // n)th of part i % n; speed is all text over the whole time."""
    depths = list(range(11))
    for n in (1, 2, 3, 11):
        parts = [Part(depths[i::n], 100, 5.0 + i, 15.0 + i, 7 * i) for i in range(n)]
        joined = join_parts(parts, 4096, 1)
        assert joined.found == depths
        assert joined.tokens_per_second == pytest.approx(100 * n / (10 + n - 1))
        assert joined.peak_bytes == 7 * (n - 1)


def test_peak_memory_is_the_process_s_own():
    """Not its parent's, which a new process starts with on Linux."""
    held = bytearray(b"x") * 600_000_000
    script = "from fast.machine import peak_memory; print(peak_memory())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 500_000_000 < len(held)


def test_training_starts_from_the_recipe_s_weights(tmp_path):
    """Projections four times the usual, gates that hold what is there, adapters and norms alone."""
    settings = dataclasses.replace(SETTINGS, seed=3)
    trained = task(settings)
    Trainer(trained, tmp_path)
    found = named_parameters(trained.model.weights.to_dict())
    usual = named_parameters(build_model(settings).weights.to_dict())
    for name, p in usual.items():
        leaf = name.rpartition(".")[2]
        scale = (
            4.0
            if leaf.endswith(("_proj", "lm_head", "embed_tokens", "readout_embeddings"))
            else 1.0
        )
        expected = torch.full_like(p, 2.0) if leaf == "gate_bias" else scale * p
        assert torch.equal(found[name], expected), name


TINY = {
    **SETTINGS.config,
    "backbone": {
        **SETTINGS.config["backbone"],
        "hidden_size": 16,
        "head_dim": 4,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    },
}


@pytest.mark.parametrize("phase", [1, -1])
def test_training_goes_on_where_it_stopped(phase, tmp_path):
    """To the bit: what a batch does depends on its number and the weights alone."""
    options = SETTINGS.phases[phase].options
    settings = Settings(
        task="passkey",
        config=TINY,
        batch_size=2,
        save_every=3,
        phases=(
            Phase(2, 1e-2, options={"windows": ((1, 1),)}),
            Phase(6, 1e-2, decay="linear", options=options),
        ),
    )
    whole = Trainer(task(settings), tmp_path / "whole")
    whole.run()
    cut = Trainer(task(settings), tmp_path / "cut")
    run_to_a_checkpoint(cut)
    rest = Trainer(task(settings), tmp_path / "cut")
    assert 3 <= rest.step < whole.step
    rest.run()
    assert rest.step == whole.step
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], expected), name
    metrics = whole.read_metrics()
    assert all(0 <= told.get("answers", 0) <= 1 for told in metrics)
    assert any("answers" in told for told in metrics)


def test_processes_share_a_batch(tmp_path):
    """Their texts are those of one process, each text one process's."""
    settings = dataclasses.replace(SETTINGS, batch_size=5)
    trained = task(settings)
    texts = trained.draw_texts(Options(), np.random.default_rng(0), 128, 2)
    parts = [texts.part(Processes(group=rank, number=2).rows(5)) for rank in range(2)]
    assert sorted(parts[0].keys + parts[1].keys) == sorted(texts.keys)
    assert torch.equal(parts[1].ids, texts.ids[1::2])
    assert np.array_equal(parts[0].ends, texts.ends[::2])


def test_the_command_trains_and_writes_a_model(tmp_path, capsys):
    changes = ["batch_size=2", "phases=[{steps=2, learning_rate=0.01}]"]
    command = ["train", "passkey", "--out", str(tmp_path), "--seed", "3", "--set", *changes]
    main(command)
    told = capsys.readouterr().out
    assert f"wrote {tmp_path / 'model'}" in told
    written = tmp_path / "model" / "model.safetensors"
    before = written.stat().st_mtime_ns
    assert CoMeTModel.from_pretrained(tmp_path / "model").config == task().model.config
    main(command)  # a run that is done is not done again
    assert written.stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        main([*command[:-1], "phases=[{steps=3}]"])
    assert "is of a run of other settings (phases" in capsys.readouterr().err


def test_the_shipped_model_finds_keys():
    """Far from a measurement: enough to notice that it has stopped working."""
    model = passkey.load_model()
    right = sum(passkey.found(model, [passkey.Example(5000, d / 10, d) for d in range(11)]))
    assert right >= 9
