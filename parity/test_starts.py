"""The comparison of starts reads what it says, from weights that it says."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from fast import CoMeTModel, MemoryConfig
from fast.__main__ import main
from fast.bench import starts
from reference.parameters import named_parameters

from .test_backbones import random_backbone

pytestmark = pytest.mark.host

SIZE = 16
MEMORY = MemoryConfig(
    chunk_size=SIZE, global_memory_size=9, temporary_memory_size=4, compression_stride=4
)
WORDS = [*"abcdefghijkl", "Ġ"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny backbone with a tokenizer of words."""
    path = tmp_path_factory.mktemp("backbone")
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    random_backbone(config, 0).float().save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, 12, 7 * SIZE).tolist()


def text_of(ids):
    return " ".join(WORDS[i] for i in ids)


def losses(logits, ids):
    """Nats a label in the first chunk, and in the others."""
    nats = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return [float(nats[:SIZE].mean()), float(nats[SIZE:].mean())]


@torch.no_grad()
def test_every_start_is_measured_as_it_is_named(folder, ids, tmp_path):
    document = tmp_path / "text"
    document.write_text(text_of(ids))
    found = {start.name: nats for start, nats in starts.measure_starts(folder, document, 2, MEMORY)}
    assert list(found) == [start.name for start in starts.STARTS]
    windows = [ids[at : at + 3 * SIZE] for at in (0, len(ids) - 3 * SIZE)]
    backbone = transformers.AutoModelForCausalLM.from_pretrained(folder)
    alone = [
        losses(torch.cat([backbone(c[None]).logits[0] for c in torch.tensor(w).split(SIZE)]), w)
        for w in windows
    ]
    np.testing.assert_allclose(found[starts.STARTS[0].name], alone, rtol=1e-5)
    for start in starts.STARTS:
        model = CoMeTModel.from_backbone(folder, dataclasses.replace(MEMORY, **start.memory))
        weights = named_parameters(model.weights.to_dict())
        if "published" in start.name:
            continue
        for name in ("compression_embedding", "readout_embeddings"):
            if "mean" in start.name:
                weights[name].copy_(weights["embed_tokens"].mean(dim=0).expand(weights[name].shape))
            if "zeros" in start.name:
                weights[name].zero_()
        expected = [losses(model(torch.tensor([w])).logits[0], w) for w in windows]
        # After fewer readouts the gates draw other numbers, of which only the first chunk is free.
        same = 1 if start.memory.get("global_memory_size", 0) else 2
        np.testing.assert_allclose(
            found[start.name][:, :same], np.array(expected)[:, :same], rtol=1e-5, err_msg=start.name
        )


def test_the_published_start_draws_all_that_is_new_but_norms_and_gates():
    rng, ones = torch.Generator().manual_seed(0), torch.ones(40, 50)
    (published,) = [start for start in starts.STARTS if "published" in start.name]
    for name in ("compression_embedding", "layers.1.global_memory.adapter_up"):
        drawn = published.change(name, ones, ones, rng)
        assert 0.018 < float(drawn.std()) < 0.022
        assert not torch.equal(drawn, published.change(name, ones, ones, rng))
    for name in ("layers.0.global_memory.norm", "layers.0.q_proj", "embed_tokens"):
        assert published.change(name, ones, ones, rng) is ones


def test_the_table_tells_what_a_start_costs():
    nats = np.array([[4.0, 3.0], [5.0, 4.0], [3.0, 5.0]])
    first, other = starts.STARTS[:2]
    lines = starts.table([(first, nats), (other, nats + [[0, 1], [1, 2], [2, 3]])]).splitlines()
    assert lines[2] == f"| {first.name} | 4.00 | 4.00 |  |"
    assert lines[3] == f"| {other.name} | 5.00 | 6.00 | 2.00 ± {1 / 3**0.5:.2f} |"


def test_windows_lie_beside_each_other():
    assert starts.place_windows(100, 10, 4) == [0, 30, 60, 90]
    assert starts.place_windows(30, 10, 3) == [0, 10, 20]
    assert starts.place_windows(30, 10, 1) == [0]
    with pytest.raises(ValueError, match="has 30 tokens, 4 windows of 10 need 40; give a longer"):
        starts.place_windows(30, 10, 4)


def test_the_command_prints_its_table_or_a_sentence(folder, ids, tmp_path, capsys, monkeypatch):
    document = tmp_path / "text"
    document.write_text(text_of(ids))
    words = ["eval", "starts", "--backbone", str(folder), "--text", str(document), "--windows"]
    measure = starts.measure_starts
    monkeypatch.setattr(starts, "measure_starts", lambda *args: measure(*args, MEMORY))
    main([*words, "2"])
    printed = capsys.readouterr().out.split("\n\n")[-2].splitlines()
    assert len(printed) == 2 + len(starts.STARTS)
    for change, told in (
        ({7: "3"}, "has 112 tokens, 3 windows of 48 need 144"),
        ({3: str(tmp_path)}, f"{tmp_path / 'config.json'}"),
        ({3: str(tmp_path / "no")}, f"{tmp_path / 'no' / 'config.json'}"),
        ({5: str(tmp_path / "bytes")}, "bytes is not UTF-8 at byte 0"),
    ):
        (tmp_path / "bytes").write_bytes(b"\xff")
        with pytest.raises(SystemExit):
            main([change.get(i, word) for i, word in enumerate([*words, "2"])])
        assert told in capsys.readouterr().err
