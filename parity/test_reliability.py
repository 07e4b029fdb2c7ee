"""Damaged, foreign and hostile files: what is wrong is told in a ValueError, and never read as if it
were right.

Bytes are changed at random, anywhere; a file that still loads must hold what it held.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from fast import CoMeTConfig, CoMeTModel, CoMeTState
from fast.__main__ import main
from fast.cupy_engine import CoMeTEngine
from fast.pretrained import save_published
from reference.config import LATER

from .assertions import assert_state_equal
from .reliability import AS_BEFORE, REFUSED, TEXT, WORKED, Subject, same_weights, small
from .reliability.calls import attempt_call, bad_calls
from .reliability.commands import (
    attempt_command,
    command_lines,
    make_places,
    nothing_measured,
)
from .reliability.files import (
    COUNTS,
    attempt_config,
    attempt_counts,
    attempt_damage,
    attempt_header,
    config_changes,
    count_changes,
    damages,
    header_changes,
)
from .reliability.kills import kill_writers
from .strategies import random_model

pytestmark = pytest.mark.host

CONFIG, MODEL = "config.json", "model.safetensors"


@contextlib.contextmanager
def within(seconds):
    """Fail what takes longer."""

    def stop(*_):
        pytest.fail(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject.make(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with files of all kinds, to be named on command lines."""
    folder = tmp_path_factory.mktemp("places")
    make_places(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, a state of its, and a folder with both as files."""
    folder = tmp_path_factory.mktemp("reliability")
    config = small()
    model = random_model(config, 0)
    model.save_pretrained(folder)
    state = model(torch.arange(14).reshape(2, 7) % 11, lengths=[7, 5], logits="none").state
    state.save(folder / "state")
    return model, state, folder


@given(case=damages(("flip", "flip", "cut", "grow")))
def test_damage_is_told_or_does_no_harm(subject, case):
    assert attempt_damage(subject, case) in (REFUSED, AS_BEFORE)


@given(case=header_changes)
def test_a_changed_header_is_told_or_does_no_harm(subject, case):
    """In a file that is whole otherwise."""
    assert attempt_header(subject, case) in (REFUSED, AS_BEFORE)


def test_weights_are_never_read_with_another_config(saved, tmp_path):
    model, _, _ = saved
    model.save_pretrained(tmp_path)
    other = small(memory={"gate_saturation": 0.5})
    (tmp_path / CONFIG).write_text(other.to_json())  # as a kill between the two files leaves it
    for load in (
        CoMeTModel.from_pretrained,
        lambda folder: CoMeTEngine.from_pretrained(folder, library="numpy"),
    ):
        with pytest.raises(ValueError, match=r"differs .* in memory.gate_saturation; a save was"):
            load(tmp_path)
    (tmp_path / CONFIG).unlink()
    assert same_weights(CoMeTModel.from_pretrained(tmp_path), model), "the weights' own config"


def test_files_of_others_have_no_digest_and_load(saved, tmp_path):
    model, _, folder = saved
    save_file(load_file(folder / MODEL), tmp_path / MODEL)
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    assert same_weights(CoMeTModel.from_pretrained(tmp_path), model)


def test_states_of_the_first_version_load(saved, tmp_path):
    model, state, folder = saved
    header = {"format": "comet-state", "version": "1", "model": state.model}
    save_file(load_file(folder / "state"), tmp_path / "state", metadata=header)
    assert_state_equal(CoMeTState.load(tmp_path / "state", model), state, "loaded")


def test_the_same_is_saved_as_the_same_bytes(saved, tmp_path):
    """In another process too, where hashes are salted otherwise."""
    model, _, folder = saved
    model.save_pretrained(tmp_path)
    script = (
        "import sys; from fast import CoMeTModel, CoMeTState\n"
        "model = CoMeTModel.from_pretrained(sys.argv[1])\n"
        "CoMeTState.load(sys.argv[1] + '/state', model).save(sys.argv[2] + '/state')"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", script, folder, tmp_path], check=True, cwd=root)
    for name in ("state", MODEL, CONFIG):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_what_is_not_finite_is_not_written_over_a_good_file(saved, tmp_path):
    model, state, _ = saved
    model.save_pretrained(tmp_path)
    state.save(tmp_path / "state")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = random_model(model.config, 0)
    with torch.no_grad():
        broken.weights["norm"][0] = float("nan")
    with pytest.raises(ValueError, match="norm holds NaN or infinity, so nothing was written"):
        broken.save_pretrained(tmp_path)
    backbone = dataclasses.replace(model.config.backbone, qk_norm=True)  # as the published one
    fits = random_model(CoMeTConfig(backbone, model.config.memory), 0)
    with torch.no_grad():
        fits.weights["norm"][0] = float("inf")
    with pytest.raises(ValueError, match="norm holds NaN or infinity, so nothing was written"):
        save_published(tmp_path, fits.config, fits.weights)
    lost = state.map_tensors(lambda t: t * float("inf"))
    with pytest.raises(ValueError, match="holds NaN or infinity, so nothing was written"):
        lost.save(tmp_path / "state")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("part", ["global_state", "temporary_memory", "keys", "values"])
def test_a_state_beyond_the_model_s_dtype_is_refused(saved, tmp_path, part):
    """Whichever tensor of it is."""
    model, state, _ = saved
    first, *others = getattr(state, part)
    dataclasses.replace(state, **{part: (first + 1e6, *others)}).save(tmp_path / "state")
    half = random_model(model.config, 0).half()
    with pytest.raises(ValueError, match="numbers beyond the model's dtype; load it onto"):
        CoMeTState.load(tmp_path / "state", half)


@given(case=count_changes)
def test_counts_that_contradict_the_row_are_refused(subject, case):
    assert attempt_counts(subject, case) in (REFUSED, WORKED)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("row", [0, 1])
def test_a_negative_count_is_refused(name, row):
    """Of a sequence that has read nothing too, whose counts fit each other with many a mistake."""
    model = random_model(small(), 0)
    state = model.new_state(2)
    counts = getattr(state, name).copy()
    counts[row] = -1
    state = dataclasses.replace(state, **{name: counts})
    with pytest.raises(ValueError, match=rf"the state's {name} is .*; expected \[2\] >= 0"):
        model(torch.tensor([[1], [2]]), state=state)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        "[" * 100_000,
        '{"backbone": ' * 50_000,
        '{"backbone": 1, "memory": NaN}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
    ids=["number", "deep list", "deep dict", "NaN", "surrogate"],
)
def test_hostile_json_is_refused(tmp_path, text):
    (tmp_path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    with within(10), pytest.raises(ValueError, match="config"):
        CoMeTModel.from_pretrained(tmp_path)


@given(case=config_changes)
def test_no_value_in_a_config_hangs_it(subject, case):
    """Nothing is built before the numbers are held against the tensors of the file."""
    with within(10):
        assert attempt_config(subject, case) in (REFUSED, WORKED)


@pytest.mark.parametrize("part", ["backbone", "memory"])
def test_a_config_without_a_field_is_read_where_the_weights_tell_it(saved, tmp_path, part):
    """Else a default might stand for what the weights were trained with. A field that came later is
    no such case."""
    model, _, folder = saved
    whole = model.config.to_dict()
    for name in sorted(set(whole[part]) - set(LATER)):
        (tmp_path / MODEL).write_bytes((folder / MODEL).read_bytes())
        data = {**whole, part: {n: x for n, x in whole[part].items() if n != name}}
        (tmp_path / CONFIG).write_text(json.dumps(data))
        with contextlib.suppress(ValueError):
            assert same_weights(CoMeTModel.from_pretrained(tmp_path), model)
        save_file(load_file(folder / MODEL), tmp_path / MODEL)
        with pytest.raises(ValueError, match=f"lacks .*{name}; .*field"):
            CoMeTModel.from_pretrained(tmp_path)


def test_a_pipe_in_place_of_a_file_is_refused(saved, tmp_path):
    model, _, folder = saved
    for name in (CONFIG, MODEL):
        for other in (CONFIG, MODEL):
            (tmp_path / other).unlink(missing_ok=True)
            (tmp_path / other).write_bytes((folder / other).read_bytes())
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with within(10), pytest.raises(ValueError, match="is not a regular file"):
            CoMeTModel.from_pretrained(tmp_path)
    os.mkfifo(tmp_path / "state")
    with within(10), pytest.raises(ValueError, match="is not a regular file"):
        CoMeTState.load(tmp_path / "state", model)


@given(case=bad_calls())
def test_a_call_does_well_or_is_refused_in_a_sentence(subject, case):
    """Whatever is given as any argument; the state stands where it stood."""
    assert attempt_call(subject, case) in (REFUSED, WORKED)


@given(words=command_lines())
def test_a_command_begins_or_is_refused_in_a_sentence(places, words):
    """With status 2 and no traceback, whatever it is given."""
    assert attempt_command(places, words) in (REFUSED, WORKED)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("demo --out file/in", "file/in/demo.json"),
        ("eval passkey --out file", "file/published.json"),
        ("eval passkey --lengths 1024 50", "length is 50 bytes"),
        ("eval passkey --model model", "a vocabulary of 11; a byte-level one has 256"),
        ("eval passkey --variant prose --haystack file", "the haystack has 29 bytes"),
        ("eval passkey --keys 0", "--keys is 0; expected an integer of at least 1"),
        ("bench --out file", "file/bench.json"),
        ("bench --page page.md", "page.md needs <!-- prefill --> and then"),
        ("train passkey --out file", "file/metrics.jsonl"),
        ("train passkey --settings file", "file is not TOML"),
        ("train passkey --set batch_size=0", "batch_size is 0; expected at least 1"),
        ("train text --text file", "the settings name no model"),
        ("train passkey --set task=poem", "task is 'poem'; expected 'keeping', 'memories',"),
        ("train text --text file --model model", "model/tokenizer.json is missing"),
        ("train passkey --threads 0", "--threads is 0"),
        ("watch state --html folder", "folder"),
        ("watch state --html file/in", "file/in"),
    ],
)
def test_what_cannot_end_well_is_refused_before_it_begins(places, words, wrong, capsys):
    with nothing_measured(places), pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert wrong in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("same_config", [True, False])
def test_a_writer_that_is_killed_leaves_whole_files(tmp_path, same_config):
    """Old ones or new ones; `make thorough` kills many."""
    times = settings().max_examples // 20
    found = kill_writers(tmp_path, times, 0, same_config)
    assert found["whole"] + found["of two saves, refused"] == 4 * times


def test_counts_of_a_state_are_read_only():
    """Each is its own, and none changes a state by way of another."""
    model = random_model(small(), 0)
    for state in (model.new_state(2), model(TEXT).state, model(TEXT).state.fork(2)):
        for name in COUNTS:
            with pytest.raises(ValueError, match="read-only"):
                getattr(state, name)[0] = 5
    counts = np.zeros(2, np.int64)
    state = dataclasses.replace(model.new_state(2), tokens=counts)
    assert not state.tokens.flags.writeable
    assert counts.flags.writeable, "the caller's array is the caller's"
