"""The trainer: settings, data, resuming, sharing, and the curves that it tells."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fast import CoMeTConfig, CoMeTModel
from fast.__main__ import TASKS, main
from fast.inputs import IGNORE
from fast.parallel import WorkerLostError
from fast.pretrained.text import open_text
from fast.tasks.chats import Labelled, encode_chat, pack, read_chats
from fast.tasks.passkey_recipe import RECIPE
from fast.tasks.text import MIXES, Text, at_stride, draw_cut, draw_stride
from fast.train import Phase, Processes, Settings, Trainer, build_model, read_settings
from fast.train.report import table

from .assertions import assert_near
from .strategies import configs, random_model, seeds

pytestmark = pytest.mark.host

PROSE = (Path(__file__).parent.parent / "docs" / "idea.md").read_text(encoding="utf-8")

CONFIG = {
    "backbone": {
        "vocab_size": 256,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    },
    "memory": {
        "chunk_size": 16,
        "global_memory_size": 2,
        "temporary_memory_size": 6,
        "compression_stride": 4,
    },
}


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("document") / "prose.txt"
    path.write_text(PROSE)
    return path


def settings(document, **changes):
    given = {
        "config": CONFIG,
        "text": (str(document),),
        "batch_size": 4,
        "phases": (Phase(6, 1e-2, warmup=2),),
        "options": {"chunks": 4},
    }
    return Settings(**{**given, **changes})


def trainer(settings, folder, processes=None):
    model = build_model(settings)
    return Trainer(TASKS[settings.task](settings, model, processes or Processes()), folder)


def weights(run):
    return {name: p.clone() for name, p in run.model.state_dict().items()}


def run_to_a_checkpoint(run):
    """Train until the first checkpoint is written, and no further."""

    def save(own=run.save):
        own()
        raise KeyboardInterrupt

    run.save = save
    with pytest.raises(KeyboardInterrupt):
        run.run()


def write_settings(path, top):
    """A TOML file of some lines, and of the sizes of the tests' model."""
    sizes = (
        f"[config.{part}]\n" + "\n".join(f"{name} = {value}" for name, value in fields.items())
        for part, fields in CONFIG.items()
    )
    path.write_text("\n".join([top, *sizes]))


# Settings


DOCS = (Path(__file__).parent.parent / "docs" / "trainer.md").read_text(encoding="utf-8")


def test_the_page_s_settings_are_settings(tmp_path):
    """Its example is read, and every setting and option of its tables is one, with that default."""
    path = tmp_path / "s.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", DOCS, re.DOTALL)[1])
    found = read_settings(path)
    assert found.steps == 1000
    assert [Text.options_class(**found.options_at(step)).chunks for step in (0, 999)] == [2, 8]
    fields = {f.name for kind in (Settings, Text.options_class) for f in dataclasses.fields(kind)}
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*?) \|", DOCS, re.MULTILINE)
    named = {name for names, _ in rows for name in re.findall(r"\w+", names)}
    assert len(named) > 15
    assert named <= fields
    defaults = {**vars(Settings()), **vars(Text.options_class())}
    for names, told in rows:
        for name, value in zip(re.findall(r"\w+", names), told.split(", "), strict=False):
            if value.isdecimal():
                assert defaults[name] == int(value), name
            elif value == "none":
                assert not defaults[name], name


def test_a_phase_s_rate_rises_and_falls():
    phase = Phase(10, 2.0, warmup=4, decay="linear", least=0.25)
    rates = [phase.rate_at(step) for step in range(12)]
    assert rates[:3] == pytest.approx([0.5, 0.9, 1.2])
    assert rates[5] == pytest.approx(1.0)
    assert rates[8:] == pytest.approx([0.5, 0.5, 0.5, 0.5])
    cosine = Phase(10, 2.0, decay="cosine")
    assert [cosine.rate_at(step) for step in (0, 5, 10)] == pytest.approx([2.0, 1.0, 0.0])
    assert Phase(10, 2.0, decay="none").rate_at(9) == 2.0
    assert Phase(10, 2.0, decay="linear", decay_steps=20).rate_at(10) == pytest.approx(1.0)


def test_settings_come_from_a_file_and_from_words(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(
        'task = "text"\nbatch_size = 3\n[options]\nchunks = 2\n[[phases]]\nsteps = 5\n'
        "[[phases]]\nsteps = 7\n[phases.options]\nchunks = 4\n"
    )
    changes = [
        "batch_size=5",
        "phases.1.learning_rate=1",
        "options.cuts=published",
        "betas=[0.5,1]",
    ]
    found = read_settings(file, changes, seed=4, model=None)
    assert found.batch_size == 5
    assert found.betas == (0.5, 1.0)
    assert found.seed == 4
    assert found.phases[1].learning_rate == 1.0
    assert found.steps == 12
    assert found.options_at(4) == {"chunks": 2, "cuts": "published"}
    assert found.options_at(5) == {"chunks": 4, "cuts": "published"}
    assert found.phase_at(6) == (found.phases[1], 1)
    assert found.phase_at(40) == (found.phases[1], 35)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("batch_size=0", "batch_size is 0; expected at least 1"),
        ("batch_size=2.5", "batch_size is 2.5; expected an integer"),
        ("batches=2", "Settings has no batches; known are accumulate"),
        ("clip=none", "clip is 'none'; expected a number"),
        ("phases=[]", r"phases is \(\); expected one phase"),
        ("phases.1.steps=3", "phases.1.steps: '1' is none of 1 items"),
        ("phases.0.steps=0", "steps is 0; expected at least 1"),
        ("phases.0.decay=square", "decay is 'square'; expected one of none, linear, cosine"),
        ("phases=[{}]", "Phase lacks steps"),
        ("train=some", "train is 'some'; expected 'all' or 'memories'"),
        ("memory.chunk_size=3", "memory is given without a backbone"),
        ("seed", "'seed' is not of the form name=value"),
        ("seed.x=3", "seed.x: seed is 0, which has no fields"),
        ("betas=[1]", "betas has 1 items; expected 2"),
        ("options=3", "options is 3; expected a table"),
        ("autocast=1", "autocast is 1; expected true or false"),
    ],
)
def test_bad_settings_are_refused(tmp_path, change, told):
    file = tmp_path / "s.toml"
    file.write_text("seed = 0\n[[phases]]\nsteps = 5\n")
    with pytest.raises(ValueError, match=told):
        read_settings(file, [change])


def test_files_that_are_no_settings_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.toml"):
        read_settings(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("seed = = 3")
    with pytest.raises(ValueError, match=r"bad\.toml is not TOML"):
        read_settings(tmp_path / "bad.toml")


def test_what_a_run_starts_from_has_to_be_said(document, tmp_path):
    with pytest.raises(ValueError, match="name no model; give a checkpoint"):
        trainer(settings(document, config=None), tmp_path)
    with pytest.raises(ValueError, match="model and config are given; expected one"):
        settings(document, model="x")
    with pytest.raises(ValueError, match=r"Options has no chunk; known are"):
        trainer(settings(document, options={"chunk": 3}), tmp_path)
    with pytest.raises(ValueError, match=r"chunks is 0; expected at least 1"):
        trainer(settings(document, phases=(Phase(3), Phase(2, options={"chunks": 0}))), tmp_path)
    with pytest.raises(ValueError, match="expected files of plain text"):
        trainer(settings(document, text=()), tmp_path)
    with pytest.raises(ValueError, match="tokens to train on, fewer than the 16000000 of"):
        trainer(settings(document, options={"chunks": 10**6}), tmp_path)
    with pytest.raises(ValueError, match="2 processes need a text each"):
        trainer(settings(document, batch_size=1), tmp_path, Processes(group=0, number=2))


# Cuts and strides


@given(st.data(), seeds)
def test_drawn_cuts_keep_their_bounds(data, seed):
    chunk, most = data.draw(st.integers(4, 12)), data.draw(st.integers(1, 6))
    n = data.draw(st.integers(1, chunk * most))
    rng = np.random.default_rng(seed)
    sizes = draw_cut(list(range(n)), chunk * most, chunk, {3, 7}, rng)
    assert sum(sizes) == n
    assert len(sizes) <= most
    assert max(sizes) <= chunk


def test_cuts_are_mixed_as_published():
    """In the middle range four texts in ten are cut otherwise than from the start, by all five."""
    rng = np.random.default_rng(0)
    ids = list(range(50))
    cuts = [draw_cut(ids, 100, 10, {13}, rng) for _ in range(4000)]
    fixed = sum(cut == [10] * 5 for cut in cuts) / 4000
    # Right-aligned it is the same, and so it is at random where the fewest chunks are drawn.
    assert fixed == pytest.approx(0.6 + 0.1 + 0.2 / 6, abs=0.03)
    even = sum(cut == [5] * 10 for cut in cuts) / 4000
    assert even == pytest.approx(0.05, abs=0.02)
    ending = sum(len(cut) > 1 and np.cumsum(cut)[1] == 14 for cut in cuts) / 4000
    assert ending == pytest.approx(0.05, abs=0.03)
    for _, shares in MIXES:
        assert sum(shares.values()) == pytest.approx(1.0)


def test_strides_are_drawn_with_falling_weights():
    rng = np.random.default_rng(0)
    drawn = [draw_stride((8, 16, 32), rng) for _ in range(7000)]
    assert [drawn.count(s) / 7000 for s in (8, 16, 32)] == pytest.approx(
        [9 / 14, 4 / 14, 1 / 14], abs=0.02
    )


@given(configs(), seeds, st.integers(1, 9))
def test_another_stride_is_the_same_weights(config, seed, stride):
    if not config.memory.has_temporary:
        return
    model = random_model(config, seed)
    memory = dataclasses.replace(config.memory, compression_stride=stride)
    other = CoMeTModel(dataclasses.replace(config, memory=memory), model.weights.to_dict())
    ids = torch.arange(11)[None] % config.backbone.vocab_size
    with torch.no_grad():
        found = at_stride(model, stride)(ids).logits
        assert torch.equal(found, other(ids).logits)
    assert model.config == config


# Chats


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A tiny backbone with a tokenizer of words and a chat template."""
    words = ["<|im_start|>", "<|im_end|>", "user", "assistant", "system", "\n", ".", "[?]"]
    words += list("abcdefghij")
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[?]")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    raw.add_special_tokens(words[:2])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[?]")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }} <|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    folder = tmp_path_factory.mktemp("chatty")
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat(*said):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": words} for role, words in zip(roles, said, strict=False)]


def test_what_the_assistant_says_is_predicted(chatty):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(chatty)
    found = encode_chat(tokenizer, chat("a b", "c d e", "f", "g"))
    words = tokenizer.convert_ids_to_tokens(found.ids)
    told = [w for w, label in zip(words, found.labels, strict=True) if label != IGNORE]
    assert told == ["c", "d", "e", "<|im_end|>", "g", "<|im_end|>"]
    assert (found.labels[found.labels != IGNORE] == found.ids[found.labels != IGNORE]).all()
    tokenizer.chat_template = "{{ messages | length }} a {{ messages[-1].content }}"
    with pytest.raises(ValueError, match="writes the beginning of a chat otherwise"):
        encode_chat(tokenizer, chat("a", "b", "c", "d"))


def test_chats_are_read_in_both_forms(tmp_path):
    path = tmp_path / "chats.jsonl"
    one, two = chat("a", "b"), chat("c", "d", "e", "f")
    lines = [{"messages": one, "id": 3}, {"messages": json.dumps(two)}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert list(read_chats(path)) == [one, two]
    path.write_text('{"messages": [{"role": "user"}]}')
    with pytest.raises(ValueError, match=r"chats.jsonl, line 1 is no chat \(KeyError"):
        list(read_chats(path))


@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=12), st.integers(1, 12))
def test_chats_are_packed_in_order_and_none_is_cut_but_at_the_length(drawn, length):
    chats = [
        Labelled(np.full(n, i), np.full(n, i if some else IGNORE))
        for i, (n, some) in enumerate(drawn)
    ]
    texts = pack(chats, length)
    expected = [np.full(min(n, length), i) for i, (n, some) in enumerate(drawn) if some]
    joined = np.concatenate([text.ids for text in texts]) if texts else np.empty(0)
    assert np.array_equal(joined, np.concatenate(expected) if expected else [])
    assert all(len(text.ids) == len(text.labels) <= length for text in texts)
    for one, other in itertools.pairwise(texts):  # the next one did not fit
        assert len(one.ids) + (other.ids == other.ids[0]).sum() > length


def test_chats_are_trained_on(chatty, tmp_path):
    """The loss of what the assistant says falls; an epoch reads each text once."""
    path = tmp_path / "chats.jsonl"
    said = [chat(f"{a} {b}", f"{b} {a}") for a in "abcde" for b in "fghij"]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in said))
    run = trainer(
        Settings(
            backbone=str(chatty),
            memory={"chunk_size": 8, "global_memory_size": 2, "compression_stride": 4},
            chat=(str(path),),
            batch_size=2,
            phases=(Phase(12, 2e-2),),
            options={"chunks": 3, "cuts": "published", "strides": (2, 4)},
        ),
        tmp_path,
    )
    assert {id(run.task._chat(i)) for i in range(len(run.task.chats))} == {
        id(text) for text in run.task.chats
    }
    run.run()
    found = run.read_metrics()
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert (run.result / "model.safetensors").exists()
    short = dataclasses.replace(run.task.options_at(0), chunks=1)
    longest = run.task.longest
    run.task.chats = [  # of which a shorter text has nothing that is predicted
        Labelled(np.zeros(longest, np.int64), np.r_[np.full(longest - 1, IGNORE), 0])
    ]
    (losses,) = run.task.read(0, np.random.default_rng(0), short)
    assert [loss.item() for loss in losses] == [0.0, 0.0]
    again = open_text(run.result, run.model.config.backbone.vocab_size)
    assert again.prompt("a b") == run.task.words.prompt("a b")


def test_processes_that_would_lose_step_are_refused(chatty, tmp_path):
    given = Settings(
        backbone=str(chatty),
        memory={"chunk_size": 8, "global_memory_size": 2, "compression_stride": 4},
        chat=("chats.jsonl",),
        options={"each_window": True, "backprop_chunks": 2},
    )
    with pytest.raises(ValueError, match="each_window: chats have different numbers of windows"):
        trainer(given, tmp_path, Processes(group=1, number=2))


# The loop


def test_the_gradient_is_that_of_one_call(document, tmp_path):
    """However it is cut: accumulated, recomputed, shared; each process reads its own texts."""
    base = settings(document, batch_size=4, options={"chunks": 4, "cuts": "published"})

    def gradient(changed, processes=None):
        run = trainer(changed, tmp_path / "none", processes)
        rng = np.random.default_rng(5)
        for losses in run.task.read(0, rng, run.task.options_at(0)):
            total = 0.0
            for loss in losses:
                loss.backward()
                total += loss.item()
        return total, {name: p.grad.clone() for name, p in run.trained.items()}

    expected, grads = gradient(base)
    for changed in (
        dataclasses.replace(base, recompute="chunks"),
        dataclasses.replace(base, options={**base.options, "backprop_chunks": 10}),
    ):
        found, same = gradient(changed)
        assert found == pytest.approx(expected, rel=1e-6)
        for name, grad in grads.items():
            assert_near(same[name].numpy(), grad.numpy(), name, 1e-5)
    parts = [gradient(base, Processes(group=rank, number=3)) for rank in range(3)]
    assert sum(loss for loss, _ in parts) == pytest.approx(expected, rel=1e-6)
    for name, grad in grads.items():
        assert_near(sum(g[name] for _, g in parts).numpy(), grad.numpy(), name, 1e-5)


def test_accumulated_batches_are_one_step(document, tmp_path):
    """Three of two texts are one of six."""
    parts = []
    for size, number in ((2, 3), (6, 1)):
        given = settings(document, batch_size=size, accumulate=number)
        task = trainer(given, tmp_path).task
        (losses,) = task.read(0, np.random.default_rng(0), task.options_at(0))
        parts.append([loss.item() for loss in losses])
    assert list(map(len, parts)) == [3, 1]
    assert sum(parts[0]) == pytest.approx(parts[1][0], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"options": {"chunks": 4, "fewest": 2, "backprop_chunks": 2, "each_window": True}},
        {"phases": (Phase(3, 1e-2), Phase(3, 1e-3, fresh_optimizer=True, options={"chunks": 2}))},
        {"train": "memories", "autocast": True, "recompute": "chunks"},
    ],
)
def test_a_run_goes_on_where_it_stopped(document, tmp_path, changes):
    """To the bit: weights, metrics, and the optimizer."""
    given = settings(document, save_every=2, **changes)
    whole = trainer(given, tmp_path / "whole")
    whole.run()
    cut = trainer(given, tmp_path / "cut")
    run_to_a_checkpoint(cut)
    assert 2 <= cut.step < whole.step
    with cut.metrics.open("a") as file:
        file.write('{"step": 99, "loss": 1}\n{"step": 1')  # told after the checkpoint, and torn
    rest = trainer(given, tmp_path / "cut")
    rest.run()
    assert rest.step == whole.step
    for name, p in weights(whole).items():
        assert torch.equal(rest.model.state_dict()[name], p), name
    for one, other in zip(whole.read_metrics(), rest.read_metrics(), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert len(rest.checkpoints) == given.keep
    again = trainer(given, tmp_path / "cut")  # a run that has ended does nothing more
    again.run()
    assert again.step == whole.step


def test_a_run_that_is_killed_goes_on(document, tmp_path):
    """By SIGKILL, at any moment."""
    toml = tmp_path / "s.toml"
    write_settings(toml, "batch_size = 2\nsave_every = 2\n[[phases]]\nsteps = 12")
    words = ["train", "text", "--settings", str(toml), "--text", str(document), "--threads", "1"]
    command = [sys.executable, "-m", "fast", *words, "--out"]
    threads = torch.get_num_threads()
    try:
        main([*words, "--out", str(tmp_path / "whole")])
    finally:
        torch.set_num_threads(threads)
    folder = tmp_path / "cut"
    for moment in (1, 5):
        process = subprocess.Popen([*command, str(folder)], stderr=subprocess.DEVNULL)
        metrics = folder / "metrics.jsonl"
        while process.poll() is None and (
            not metrics.exists() or metrics.read_text().count("\n") < moment
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(folder)], check=True, capture_output=True)
    one, other = (folder.parent / name / "model" / "model.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()


def test_processes_of_torchrun_train_the_same_model(document, tmp_path):
    """Two with texts of their own, and four of which two share each text, beside one process: the
    same losses and, but for rounding, weights.
    """
    toml = tmp_path / "s.toml"
    write_settings(
        toml,
        "batch_size = 3\noptions = { cuts = 'published', strides = [2, 4] }\n"
        "[[phases]]\nsteps = 3\nlearning_rate = 1e-3",
    )
    words = ["-m", "fast", "train", "text", "--settings", str(toml), "--text", str(document)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    runs: dict[str, tuple[list[str], list[str]]] = {
        "one": ([sys.executable], []),
        "two": ([*torchrun, "2"], []),
        "four": ([*torchrun, "4"], ["--set", "pipeline=2"]),
    }
    for name, (start, more) in runs.items():
        subprocess.run(
            [*start, *words, "--out", str(tmp_path / name), *more],
            check=True,
            capture_output=True,
            env=environment,
        )
    losses = {
        name: [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in runs
    }
    models = {name: CoMeTModel.from_pretrained(tmp_path / name / "model") for name in runs}
    for name in ("two", "four"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-5)
        for weight, p in models["one"].state_dict().items():
            assert_near(models[name].state_dict()[weight].numpy(), p.numpy(), weight, 1e-3)


def test_a_process_that_is_killed_ends_the_run_which_goes_on(document, tmp_path):
    """Where two share a text, by SIGKILL: no process is left, no checkpoint is torn."""
    toml = tmp_path / "s.toml"
    write_settings(
        toml, "batch_size = 2\npipeline = 2\nsave_every = 1\n[[phases]]\nsteps = 8\nwarmup = 2"
    )
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "fast", "train", "text", "--settings", str(toml), "--text", str(document), "--out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folders = [tmp_path / "whole", tmp_path / "cut"]
    subprocess.run([*command, str(folders[0])], check=True, capture_output=True, env=environment)
    start = subprocess.Popen(
        [*command, str(folders[1])], stderr=subprocess.DEVNULL, env=environment
    )
    metrics = folders[1] / "metrics.jsonl"
    while start.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.01)
    workers = [pid for pid, parent in parents() if parent == start.pid]
    os.kill(workers[-1], signal.SIGKILL)
    assert start.wait(timeout=60) != 0
    assert not set(workers) & {pid for pid, _ in parents()}, "a process that was left"
    subprocess.run([*command, str(folders[1])], check=True, capture_output=True, env=environment)
    one, other = (CoMeTModel.from_pretrained(folder / "model").state_dict() for folder in folders)
    for name, p in one.items():
        assert_near(other[name].numpy(), p.numpy(), name, 1e-6)


def parents():
    """Of each process its number and its parent's, those left out that have ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                kind, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if kind != "Z":
                    found.append((int(folder.name), int(parent)))
    return found


def test_a_lost_process_is_told_of_as_a_connection(document, monkeypatch):
    """By the command, too, which says so in one sentence."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**place, "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "1"}.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(ConnectionError, match="worker 1 is gone"),
        Processes.joined(settings(document)),
    ):
        raise WorkerLostError("worker 1 is gone")
    assert not torch.distributed.is_initialized()


def test_texts_that_cannot_be_shared_are_refused(document, tmp_path):
    with (
        pytest.raises(ValueError, match="pipeline is 2, and this is one process"),
        Processes.joined(settings(document, pipeline=2)),
    ):
        pass
    several = Processes(mesh=object())  # which is not looked at
    for changes, told in (
        ({"accumulate": 2}, "no place for accumulate"),
        ({"options": {"backprop_chunks": 2, "each_window": True}}, "backprop_chunks, each_window"),
    ):
        with pytest.raises(ValueError, match=told):
            trainer(settings(document, pipeline=2, **changes), tmp_path, several)
    with pytest.raises(ValueError, match="the task passkey cannot share a text among processes"):
        trainer(
            settings(document, task="passkey", text=(), options={}, pipeline=2), tmp_path, several
        )


def test_the_memories_alone_move(document, tmp_path):
    run = trainer(settings(document, train="memories"), tmp_path)
    before = weights(run)
    run.run()
    moved = {name for name, p in weights(run).items() if not torch.equal(before[name], p)}
    assert moved
    assert all("memory" in name or name.startswith("weights.") for name in moved)
    assert not any("_proj" in name or "embed_tokens" in name for name in moved)
    assert run.result.name == "memories.safetensors"
    assert run.result.exists()


def test_a_run_may_keep_a_share_of_what_it_started_from(document, tmp_path):
    """In its result, not in the weights that it goes on from."""
    build_model(settings(document)).save_pretrained(tmp_path / "start")
    given = {"config": None, "model": str(tmp_path / "start")}
    runs = {}
    for share in (0.0, 0.25):
        runs[share] = trainer(settings(document, **given, start_share=share), tmp_path / str(share))
        runs[share].run()
    start = CoMeTModel.from_pretrained(tmp_path / "start").state_dict()
    trained, mixed = (CoMeTModel.from_pretrained(run.result).state_dict() for run in runs.values())
    for name, p in mixed.items():
        assert not torch.equal(trained[name], start[name]), name
        torch.testing.assert_close(p, 0.75 * trained[name] + 0.25 * start[name])
    again = trainer(settings(document, **given, start_share=0.25), tmp_path / "0.25")
    for name, p in again.model.state_dict().items():
        assert torch.equal(p, trained[name]), name
    for changes in ({"start_share": 1.0}, {"start_share": 0.5, "model": None, "config": CONFIG}):
        with pytest.raises(
            ValueError, match=r"start_share is .*; expected a share below 1, of a run"
        ):
            settings(document, **{**given, **changes})


def test_memories_have_a_rate_of_their_own(document, tmp_path):
    """AdamW's first step moves each weight by its rate."""
    phases = (Phase(1, 1e-4, decay="none"),)
    run = trainer(settings(document, phases=phases, memory_rate=3.0, clip=1e9), tmp_path)
    before = weights(run)
    run.run()
    after = weights(run)
    steps = {name: float((after[name] - p).abs().max()) for name, p in before.items()}
    assert steps["weights.layers.0.q_proj.weight"] == pytest.approx(1e-4, rel=0.02)
    assert steps["weights.layers.0.temporary_memory.adapter_up.weight"] == pytest.approx(
        3e-4, rel=0.02
    )


def test_the_held_out_loss_falls(document, tmp_path):
    run = trainer(
        settings(document, phases=(Phase(30, 1e-2),), evaluate_every=10, batch_size=8), tmp_path
    )
    run.run()
    found = [told["held_out_nats"] for told in run.read_metrics() if "held_out_nats" in told]
    assert len(found) == 3
    assert found[-1] < found[0] < 5.6
    assert run.task.evaluate()["nats"] == pytest.approx(found[-1])
    with torch.no_grad():
        n = run.task.longest
        ids = torch.from_numpy(run.task.held_out_prose[:n])[None]
        assert run.model(ids, labels=ids).loss.item() == pytest.approx(found[-1], rel=0.3)


def test_tensorboard_is_told_where_it_is_installed(document, tmp_path, monkeypatch):
    """What the metrics tell, from the step on that the run goes on from."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append((folder.name, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def close(self):
            told.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = trainer(settings(document, phases=(Phase(2, 1e-3),)), tmp_path)
    run.run()
    assert told[0] == ("tensorboard", 1)
    assert told[-1] == "closed"
    losses = [(value, step) for name, value, step in told[1:-1] if name == "loss"]
    assert losses == [(found["loss"], found["step"]) for found in run.read_metrics()]


def test_a_folder_keeps_to_its_run(document, tmp_path):
    given = settings(document)
    run = trainer(given, tmp_path)
    run.run()
    with pytest.raises(ValueError, match=r"is of a run of other settings \(seed: 0\)"):
        trainer(dataclasses.replace(given, seed=1), tmp_path)
    trainer(dataclasses.replace(given, keep=9, evaluate_every=1, recompute="cells"), tmp_path)
    newest = run.checkpoints[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short"):
        trainer(given, tmp_path)


def test_a_loss_that_is_no_number_ends_the_run(document, tmp_path):
    run = trainer(settings(document), tmp_path)
    with torch.no_grad():
        run.trained["norm"].fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan; go on from"):
        run.run()


def test_the_command_trains_and_tells(chatty, document, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "text", "--text", str(document), "--out", str(tmp_path)])
    assert "the settings name no model" in capsys.readouterr().err
    main(
        [
            "train",
            "text",
            "--text",
            str(document),
            "--out",
            str(tmp_path),
            "--backbone",
            str(chatty),
        ]
        + ["--set", "phases.0.steps=3", "memory={chunk_size = 8}", "train=memories", "batch_size=2"]
    )
    told = capsys.readouterr().out
    assert "| steps | loss | learning rate | gradient norm | seconds |" in told
    assert "| 3 to 3 |" in told
    assert f"wrote {tmp_path / 'memories.safetensors'}" in told
    assert (tmp_path / "metrics.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_means_what_was_told():
    metrics = [{"step": i + 1, "loss": float(i)} for i in range(4)]
    metrics[3]["answers"] = 0.5
    assert table(metrics, rows=2).splitlines() == [
        "| steps | loss | answers |",
        "| ---: | ---: | ---: |",
        "| 1 to 2 | 0.5 |  |",
        "| 3 to 4 | 2.5 | 0.5 |",
    ]


def test_the_shipped_recipe_is_of_the_shipped_model():
    found = read_settings(RECIPE)
    shipped = Path(RECIPE).parent / "passkey_model"
    config = CoMeTModel.from_pretrained(shipped).config
    assert CoMeTConfig.from_dict(found.config) == config
