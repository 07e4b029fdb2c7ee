"""Why keys are lost: writes to a memory in which nothing is to be written, and late keys."""

import json
from collections import Counter

import pytest
import torch

from fast.__main__ import main
from fast.tasks import passkey, passkey_diagnosis
from fast.tasks.passkey_diagnosis import (
    KINDS,
    Setting,
    diagnose,
    draw,
    find_writes,
    kind_of,
    load,
    save,
    table,
)

pytestmark = pytest.mark.host

SENTENCE = b"The door code is 4711. Remember it. 4711 is the door code."


def test_a_chunk_is_of_what_stands_in_it():
    text = b"x" * 100 + SENTENCE + b"y" * 400
    end = 100 + len(SENTENCE)
    assert kind_of(text, 101, 229) == "cut distractor"
    assert kind_of(text, end - 1, end + 127) == "cut distractor"
    assert kind_of(text, 0, 128) == "neither"  # the next chunk sees the cut
    assert kind_of(text, 100, 228) == "whole distractor"
    assert kind_of(text, 60, 188) == "whole distractor"
    assert kind_of(text, end, end + 128) == "neither"
    assert kind_of(text.replace(b"4711 is", b"4712 is"), 60, 188) == "neither"


def test_writes_are_the_chunks_that_change_the_memory():
    """Beside the states of one call a chunk; a key writes, and the filler does not."""
    model = passkey.load_model()
    example = passkey.Example(4096, 0.5, 3)
    texts = [example.text()[:3968], passkey.Example(4096, 1.0, 4).text()[:3968]]
    with torch.no_grad():
        steps = list(find_writes(model, texts, 128))
    assert [end for end, _ in steps] == list(range(128, 3969, 128))
    writes = [write for _, found in steps for write in found]
    of_key = [w for w in writes if w.text == 0 and "pass key is" in w.words]
    assert of_key
    assert all(w.start - 256 <= example.key_start <= w.start + 256 for w in of_key)
    assert len(of_key) >= 0.5 * sum(w.start > 512 for w in writes)
    with torch.no_grad():
        for write in writes:
            row = torch.from_numpy(passkey.encode(texts[write.text]))[None]
            before = model(row[:, : write.start], logits="none").state
            after = model(
                row[:, write.start : write.start + 128], state=before, logits="none"
            ).state
            before, after = (model.close_chunk(state).global_state for state in (before, after))
            moved = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if
                     (a - b).abs().max() > passkey_diagnosis.MOVED]  # fmt: skip
            assert tuple(moved) == write.layers


def test_a_diagnosis_tells_what_was_read(tmp_path):
    setting = Setting(bytes_read=16384, texts=2, lengths=(512, 2048), keys=6)
    found = diagnose(setting)
    assert sum(found.chunks.values()) == 2 * (16384 // 128 - 1)
    assert set(found.chunks) == set(KINDS)
    assert found.chunks["cut distractor"] > 0
    assert all(4 <= n <= 6 for n in found.taken_up), "the shipped model takes early keys up"
    assert diagnose(setting) == found
    told = table(found)
    assert f"| 512 | {found.taken_up[0]}/6 |" in told
    counts = Counter(write.kind for write in found.writes)
    assert all(f"| {kind} | {found.chunks[kind]} | {counts[kind]} |" in told for kind in KINDS)
    assert draw(found, tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    save(found, tmp_path / "d.json")
    assert load(tmp_path / "d.json") == found
    (tmp_path / "d.json").write_text('{"setting": []}')
    with pytest.raises(ValueError, match="d.json holds no diagnosis .*measure again"):
        load(tmp_path / "d.json")


def test_the_command_diagnoses(tmp_path, monkeypatch, capsys):
    small = Setting(bytes_read=2048, texts=1, lengths=(300,), keys=1)
    monkeypatch.setattr(passkey_diagnosis, "Setting", lambda **_: small)
    main(["eval", "passkey", "--diagnose", "--out", str(tmp_path)])
    assert "| chunks with | read | that write |" in capsys.readouterr().out
    saved = json.loads((tmp_path / "diagnosis.json").read_text())
    assert saved["setting"]["bytes_read"] == 2048
    assert (tmp_path / "diagnosis.png").exists()
