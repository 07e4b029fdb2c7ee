"""Memories of a backbone: trained without it, kept in a file of their own, and measured."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fast import CoMeTConfig, CoMeTModel, MemoryConfig
from fast.__main__ import main
from fast.pretrained.memories import load_memories, memory_names
from fast.pretrained.text import ByteText
from fast.tasks.memories import (
    RECIPE,
    Memories,
    hide_key,
    read_tokens,
    repeat_passages,
    split_tokens,
)
from fast.tasks.memories_report import READERS, Measured, Setting, measure, read_stream, read_window
from fast.tasks.memories_report import table as report_table
from fast.tasks.passkey import LARGEST_KEY
from fast.train import Phase, Processes, Settings, Trainer, build_model, read_settings

from .assertions import assert_near
from .strategies import configs, random_model, seeds, texts

pytestmark = pytest.mark.host

PROSE = (Path(__file__).parent.parent / "docs" / "idea.md").read_text(encoding="utf-8")

MEMORY = MemoryConfig(
    chunk_size=64, global_memory_size=2, temporary_memory_size=8, compression_stride=16
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny model of transformers that reads bytes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("backbone")
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)  # so that what a slot sees makes a difference
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("document") / "prose.txt"
    path.write_text(PROSE * 3)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("memories")


@given(configs(), seeds)
def test_a_file_of_memories_and_the_backbone_are_the_model(folder, config, seed):
    model = random_model(config, seed)
    model.save_memories(folder / "memories.safetensors")
    saved, tensors = load_memories(folder / "memories.safetensors")
    assert saved == config
    assert set(tensors) == {"backbone.norm", *memory_names(config)}
    assert sum(t.numel() for t in tensors.values()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_memories_come_back(backbone, tmp_path, dtype):
    """Bit by bit where the dtype is the same, in any dtype."""
    model = CoMeTModel.from_backbone(backbone, MEMORY, seed=3)
    path = tmp_path / "memories.safetensors"
    with torch.no_grad():
        for name in ("compression_embedding", "readout_embeddings"):
            model.weights[name].weight.mul_(2)
    model.save_memories(path)
    again = CoMeTModel.from_backbone(backbone, path, dtype=dtype)
    for name, p in model.to(dtype).state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name
    assert again.dtype == dtype


def test_memories_of_another_backbone_are_refused(backbone, tmp_path):
    path = tmp_path / "memories.safetensors"
    model = CoMeTModel.from_backbone(backbone, MEMORY)
    with torch.no_grad():
        model.weights["norm"].mul_(1.1)
    model.save_memories(path)
    with pytest.raises(ValueError, match="trained with another backbone, which has other weights"):
        CoMeTModel.from_backbone(backbone, path)
    smaller = dataclasses.replace(model.config.backbone, num_hidden_layers=1)
    CoMeTModel(CoMeTConfig(smaller, MEMORY)).save_memories(path)
    with pytest.raises(ValueError, match="trained with another backbone, which has other sizes"):
        CoMeTModel.from_backbone(backbone, path)


def test_what_is_no_file_of_memories_is_refused(backbone, tmp_path):
    path = tmp_path / "memories.safetensors"
    with pytest.raises(FileNotFoundError, match="memories.safetensors"):
        CoMeTModel.from_backbone(backbone, path)
    save_file({"norm": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="holds no memories .*written by CoMeTModel.save_memories"):
        CoMeTModel.from_backbone(backbone, path)
    model = CoMeTModel.from_backbone(backbone, MEMORY)
    model.save_memories(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="cut short"):
        CoMeTModel.from_backbone(backbone, path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged"):
        CoMeTModel.from_backbone(backbone, path)
    with pytest.raises(
        ValueError, match="memory is a int; expected a MemoryConfig, or a file of memories"
    ):
        CoMeTModel.from_backbone(backbone, 3)
    with torch.no_grad():
        model.weights["compression_embedding"].weight[0] = torch.nan
    with pytest.raises(ValueError, match="compression_embedding holds NaN"):
        model.save_memories(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def without(path, name):
    """Take a tensor out of a file, and the digest that would tell."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["comet"])
    header.pop("digest")
    tensors = {key: tensor for key, tensor in load_file(path).items() if key != name}
    save_file(tensors, path, {"comet": json.dumps(header)})


def test_a_file_that_lacks_a_weight_is_refused(backbone, tmp_path):
    path = tmp_path / "memories.safetensors"
    CoMeTModel.from_backbone(backbone, MEMORY).save_memories(path)
    without(path, "layers.1.global_memory.gate")
    with pytest.raises(ValueError, match=r"holds \['layers.1.global_memory.gate'\] otherwise"):
        CoMeTModel.from_backbone(backbone, path)


@given(st.data(), seeds)
def test_a_key_is_where_it_is_said_to_be(data, seed):
    """The text has the length that is asked for, the key once, the answer is the key."""
    prose = np.full(400, ord("x"))
    length, depth = data.draw(st.integers(90, 400)), data.draw(st.floats(0, 1))
    found = hide_key(prose, length, depth, ByteText(), np.random.default_rng(seed))
    text, answer = bytes(found.text.tolist()).decode(), bytes(found.answer.tolist()).decode()
    assert len(text) == length
    assert 1 <= int(answer) <= LARGEST_KEY
    assert text.strip("x\n") == f"The pass key is{answer}. Remember it.{answer} is the pass key."
    assert abs(text.index("\nThe") - depth * (length - len(text.strip("x")))) <= 1
    assert bytes(found.question.tolist()).decode().endswith("The pass key is")


@given(st.integers(1, 300), st.floats(0, 1), st.integers(1, 40), seeds)
def test_passages_stand_again_later(n, share, size, seed):
    """Each in place of what was there, at least its size away, and no more than the share of all."""
    prose = np.arange(n)
    found = repeat_passages(prose, share, size, np.random.default_rng(seed))
    assert np.array_equal(prose, np.arange(n))
    changed = found != prose
    assert changed.sum() <= share * n
    assert (found[changed] <= np.flatnonzero(changed) - size).all()
    if share * n >= size and n >= 3 * size:
        several = [repeat_passages(prose, share, size, np.random.default_rng(i)) for i in range(20)]
        assert any((x != prose).any() for x in several)


def test_a_text_too_long_for_the_prose_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="of 90 tokens needs at least .* there are 10"):
        hide_key(np.zeros(10, np.int64), 90, 0.5, ByteText(), rng)
    with pytest.raises(ValueError, match="of 9 tokens needs at least"):
        hide_key(np.zeros(10, np.int64), 9, 0.5, ByteText(), rng)


def task(backbone, document, processes=None, **changes):
    given = {
        "task": "memories",
        "train": "memories",
        "backbone": str(backbone),
        "memory": dataclasses.asdict(MEMORY),
        "text": (str(document),),
        "batch_size": 3,
        "phases": (Phase(4, 3e-3, warmup=2),),
        "memory_rate": 1.0,
        "options": {"chunks": 3, "fewest": 2},
    }
    settings = Settings(**{**given, **changes})
    return Memories(settings, build_model(settings), processes or Processes())


def test_training_moves_the_memories_alone(backbone, document, tmp_path):
    trainer = Trainer(task(backbone, document), tmp_path)
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    trainer.run()
    after = trainer.model.state_dict()
    moved = {name for name, p in before.items() if not torch.equal(after[name], p)}
    assert moved == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(trainer.trained) == set(memory_names(trainer.model.config))
    again = CoMeTModel.from_backbone(backbone, trainer.result)
    assert all(torch.equal(again.state_dict()[name], p) for name, p in after.items())
    assert all({"prose", "key", "tokens"} <= set(told) for told in trainer.read_metrics())


def test_the_loss_of_a_text_falls(backbone, document, tmp_path):
    """Of the same text, its key included, in twenty steps."""
    trained = task(backbone, document, phases=(Phase(20, 1e-2),))
    text = hide_key(trained.prose, 150, 0.5, ByteText(), np.random.default_rng(3))
    with torch.no_grad():
        before = [float(x) for x in trained.losses([text])]
    Trainer(trained, tmp_path).run()
    with torch.no_grad():
        after = [float(x) for x in trained.losses([text])]
    assert all(b - a > 0.1 for a, b in zip(after, before, strict=True)), (before, after)


def test_texts_of_a_batch_are_each_alone(backbone, document):
    """Questions and keys of unequal lengths too."""
    trained, rng = task(backbone, document), np.random.default_rng(1)
    texts = [hide_key(trained.prose, 150, i / 7, ByteText(), rng) for i in range(8)]
    assert len({len(text.answer) for text in texts}) > 1
    with torch.no_grad():
        together = trained.losses(texts)
        alone = [trained.losses([text]) for text in texts]
    assert_near(together[0], np.mean([float(prose) for prose, _ in alone]), "prose", 1e-5)
    weights = [len(text.answer) for text in texts]
    expected = np.average([float(key) for _, key in alone], weights=weights)
    assert_near(together[1], expected, "keys", 1e-5)


def test_processes_share_the_texts(backbone, document):
    """Each reads its own; the shares add up."""

    def read(processes=None):
        trained = task(backbone, document, processes)
        rng = np.random.default_rng(0)
        ((loss,),) = trained.read(0, rng, trained.options_at(0))
        return trained, loss.item()

    (whole, loss), *parts = [
        read(Processes(group=rank, number=n)) for rank, n in ((0, 1), (0, 2), (1, 2))
    ]
    assert sum(part for _, part in parts) == pytest.approx(loss, rel=0.2)  # keys differ in length
    prose = [trained.told["prose"] for trained, _ in parts]
    assert np.average(prose, weights=[2, 1]) == pytest.approx(whole.told["prose"], rel=1e-5)


@pytest.mark.parametrize("name", ["memories.toml", "memories_whole.toml"])
def test_a_recipe_is_whole(backbone, document, name):
    settings = read_settings(
        RECIPE.with_name(name), backbone=str(backbone), text=[str(document) for _ in range(9)]
    )
    trained = Memories(settings, build_model(settings), Processes())
    assert settings.train == ("all" if "whole" in name else "memories")
    longest = max(options.chunks for options in trained.phases)
    text = trained._draw(longest * 128, np.random.default_rng(0), trained.phases[-1])
    assert len(text.text) == longest * 128


def test_a_model_that_was_trained_whole_can_be_trained_on_and_measured(
    backbone, document, tmp_path, capsys
):
    """Its folder is a model's, and stands where a file of memories does."""
    trainer = Trainer(task(backbone, document, train="all"), tmp_path / "run")
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    trainer.run()
    moved = [n for n, p in trainer.model.state_dict().items() if not torch.equal(before[n], p)]
    assert "weights.layers.0.q_proj.weight" in moved
    words = ["--backbone", str(backbone), "--text", str(document), "--windows", "1", "--keys", "1"]
    main(["eval", "memories", *words, "--memories", str(trainer.result), "--lengths", "128"])
    told = capsys.readouterr().out
    rows = {name: re.search(rf"^\| {name} \| (.*)$", told, re.MULTILINE)[1] for name in READERS}
    assert rows["fresh"] != rows["trained"]
    assert "\n| without | " in told
    on = ["--text", str(document), "--model", str(trainer.result), "--out", str(tmp_path / "on")]
    main(["train", "memories", *on, "--set", "phases=[{steps=1}]", "options={chunks=3}"])
    assert (tmp_path / "on" / "memories.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"text": ()}, "expected files of prose"),
        ({"options": {"fewest": 4, "chunks": 3}}, "fewest is 4 and chunks 3"),
        ({"options": {"repeated": 2}}, "repeated 2.0"),
        ({"options": {"passage": 0}}, "passage is 0"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(backbone, document, changes, told):
    with pytest.raises(ValueError, match=told):
        task(backbone, document, **changes)


def test_the_last_tenth_is_held_out(document):
    ids = read_tokens(document, ByteText())
    assert bytes(ids.tolist()) == document.read_bytes()
    first, last = split_tokens(ids)
    assert np.array_equal(np.concatenate([first, last]), ids)
    assert len(last) == len(ids) // 10


@given(configs(), seeds, st.data())
def test_readers_score_each_token_from_those_before_it(config, seed, data):
    """A stream as one call does; a window that reaches back to the start as the whole row does."""
    model = random_model(config, seed)
    ids = torch.tensor([*data.draw(texts(config)), 3])
    last = data.draw(st.integers(1, len(ids) - 1))
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")[-last:]
    size = data.draw(st.integers(1, 9))
    with torch.no_grad():
        nats, right = read_stream(model, size, ids, last)
    assert_near(nats, expected.double().numpy(), "stream", 1e-5)
    assert np.array_equal(right, (logits.argmax(-1) == ids[1:]).numpy()[-last:])

    plain = MemoryConfig(chunk_size=2**20, global_memory_size=0, compression_stride=0)
    whole = random_model(CoMeTConfig(config.backbone, plain), seed)
    before = data.draw(st.integers(0, 9))
    with torch.no_grad():
        nats, _ = read_window(whole, size, before, ids, last)
        for j, found in zip(range(len(ids) - 1 - last, len(ids) - 1), nats, strict=True):
            row = ids[max(j // size * size - before, 0) : j + 1]
            expected = -whole(row[None]).logits[0, -1].float().log_softmax(-1)[ids[j + 1]]
            assert_near(found, float(expected), f"window, token {j}", 1e-5)


def test_the_commands_train_and_measure(backbone, document, tmp_path, capsys):
    """From a folder of weights to a table and a picture; without memories all readers agree where
    they see the same."""
    given = ["--backbone", str(backbone), "--text", str(document)]
    sizes = ["chunk_size=64", "temporary_memory_size=8", "compression_stride=16"]
    changes = [*(f"memory.{size}" for size in sizes), "phases=[{steps=2}]", "options={chunks=3}"]
    main(["train", "memories", *given, "--out", str(tmp_path / "run"), "--set", *changes])
    memories = tmp_path / "run" / "memories.safetensors"
    told = capsys.readouterr().out
    assert f"wrote {memories}" in told
    assert "| 2 to 2 |" in told
    main(
        ["eval", "memories", *given, "--memories", str(memories), "--windows", "2", "--keys", "2"]
        + ["--lengths", "128", "256", "--out", str(tmp_path / "out")]
    )
    told = capsys.readouterr().out
    assert all(f"\n| {name} | " in told for name in READERS)
    assert (tmp_path / "out" / "memories.json").stat().st_size > 1000
    assert (tmp_path / "out" / "memories.png").read_bytes()[:4] == b"\x89PNG"

    main(
        [
            "read",
            str(document),
            *given[:2],
            "--memories",
            str(memories),
            "--save",
            str(tmp_path / "s"),
        ]
    )
    main(["ask", str(tmp_path / "s"), "The pass key is", "--max-new-tokens", "3"])
    with pytest.raises(SystemExit):
        main(
            ["read", str(document), *given[:2], "--memories", str(memories), "--save", "x"]
            + ["--chunk-size", "64"]
        )
    assert "of fresh memories; what --memories names has its own" in capsys.readouterr().err


def test_the_first_chunk_is_the_same_however_the_rest_is_read(backbone, document, tmp_path):
    """Without compression tokens in it; and memories without weight on anything change nothing."""
    memory = dataclasses.replace(MEMORY, compression_stride=10**6)
    model = CoMeTModel.from_backbone(backbone, memory)
    path = tmp_path / "memories.safetensors"
    model.save_memories(path)
    setting = Setting(
        str(backbone), str(path), (str(document),), chunks=3, windows=2, lengths=(100,), keys=2
    )
    found = {r.name: np.array(r.nats) for r in measure(setting)}
    for name in READERS:
        assert_near(found[name][:, 0], found["whole"][:, 0], f"first chunk, {name}", 1e-4)
    assert np.array_equal(found["fresh"], found["trained"])
    for one, other in itertools.combinations(("whole", "chunks", "window", "fresh"), 2):
        assert not np.allclose(found[one][:, 1:], found[other][:, 1:], atol=1e-6), (one, other)


def test_the_tables_tell_what_was_measured():
    rows = [
        Measured(name, [[3.0, 2.0 + i], [3.0, 2.2 + i]], [[0.5, 1.5]], [1])
        for i, name in enumerate(READERS)
    ]
    told = report_table(rows, Setting("b", "m", ("d",), lengths=(512,), keys=2)).splitlines()
    assert told[2] == "| whole | 3.000 | 2.100 | -2.000 ± 0.000 |"
    assert told[4] == "| window | 3.000 | 4.100 |  |"
    assert told[-1] == "| trained | 1; 1.00 |"
