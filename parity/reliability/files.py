"""Files that something was done to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fast import CoMeTConfig, CoMeTModel, CoMeTState
from fast.checkpoints import read_training
from fast.files import HEADER, atomic_save
from fast.pretrained import save_published

from ..assertions import assert_state_equal
from ..strategies import random_model
from . import AS_BEFORE, FILES, WORKED, Subject, same_weights, told


def look(subject: Subject, name: str, words: tuple[str, ...] = ()) -> str:
    """Read one of `FILES` after something was done to it: it holds what it held, or is refused."""
    try:
        if name == "state":
            state = CoMeTState.load(subject.folder / name, subject.model)
            assert_state_equal(state, subject.state, "the damaged state")
        elif name == "training":
            run, tensors = read_training(subject.folder / name)
            weights = subject.model.state_dict()
            assert run["number"] == 0
            assert tensors.keys() == weights.keys()
            assert all(torch.equal(x, weights[key]) for key, x in tensors.items())
        else:
            model = CoMeTModel.from_pretrained(subject.folder / "model")
            assert same_weights(model, subject.model), "other weights were read"
    except ValueError as error:
        return told(error, "state", "onfig", str(subject.folder), *words)
    return AS_BEFORE


@contextlib.contextmanager
def written_over(path: Path, data: bytes) -> Iterator[None]:
    """Other bytes in a file, as long as the block lasts."""
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


@st.composite
def damages(draw: st.DrawFn, kinds: tuple[str, ...]) -> tuple[str, Callable[[bytes], bytes]]:
    """A file, and what happens to its bytes: one is changed, some are lost, some come between."""
    kind, where = draw(st.sampled_from(kinds)), draw(st.integers(0, 10**6))
    more = draw(st.binary(min_size=1, max_size=8))
    bits = draw(st.integers(1, 255))

    def damage(data: bytes) -> bytes:
        at = where % len(data)
        if kind == "flip":
            return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]
        return data[:at] if kind == "cut" else data[:at] + more + data[at:]

    return draw(st.sampled_from(FILES)), damage


def attempt_damage(subject: Subject, case: tuple[str, Callable[[bytes], bytes]]) -> str:
    name, damage = case
    path = subject.folder / name
    with written_over(path, damage(path.read_bytes())):
        return look(subject, name)


header_changes = st.tuples(
    st.sampled_from([name for name in FILES if not name.endswith(".json")]),
    st.integers(0, 10**6),
    st.sampled_from(["drop", "rename", "replace"]),
    st.sampled_from([None, True, 0, -1, 7, 2**70, "", "F32", "x", [], [0], [0, 8], {}, "0" * 64]),
)
"""A file, an entry of its header, at any depth, and what becomes of it."""


def attempt_header(subject: Subject, case: tuple[str, int, str, Any]) -> str:
    """One entry of a header is another, in a header that is whole and says how long it is."""
    name, number, how, value = case
    path = subject.folder / name
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    own = json.loads(header["__metadata__"][HEADER])
    before = json.dumps(own)
    places: list[tuple[dict[str, Any], str]] = []

    def walk(part: dict[str, Any]) -> None:
        for key, inner in part.items():
            places.append((part, key))
            if isinstance(inner, dict):
                walk(inner)

    walk(header)
    walk(own)
    part, key = places[number % len(places)]
    old = part.pop(key)
    if how != "drop":
        part["x" if how == "rename" else key] = old if how == "rename" else value
    if json.dumps(own) != before:
        header["__metadata__"][HEADER] = json.dumps(own)
    head = json.dumps(header).encode()
    with written_over(path, len(head).to_bytes(8, "little") + head + data[8 + size :]):
        return look(subject, name, ("header",))


COUNTS = ("tokens", "chunks", "open_tokens", "row_length", "queue_length")
count_changes = st.tuples(
    st.sampled_from(COUNTS), st.sampled_from([-5, -2, -1, 1, 2, 5, 2**62]), st.integers(0, 1)
)
"""A count of a state, what is added to it, and in which sequence."""


def attempt_counts(subject: Subject, case: tuple[str, int, int]) -> str:
    """A state whose counts contradict its row is refused, though its digest is right. More text
    closed before, or other chunks of it, is no contradiction.
    """
    name, change, row = case
    path = subject.folder / "counts"
    arrays = load_file(subject.folder / "state")
    arrays[f"count.{name}"][row] += change
    tokens, chunks, now = (int(arrays[f"count.{n}"][row]) for n in COUNTS[:3])
    is_possible = name in ("tokens", "chunks") and 1 <= chunks <= tokens - now
    atomic_save(path, arrays, {"kind": "state", "version": 2, "model": subject.state.model})
    try:
        loaded = CoMeTState.load(path, subject.model)
    except ValueError as error:
        if is_possible:
            raise AssertionError("counts that fit were refused") from error
        return told(error, "the state")
    finally:
        path.unlink()
    assert is_possible, "counts that contradict the row were loaded"
    assert int(getattr(loaded, name)[row]) == int(arrays[f"count.{name}"][row])
    return WORKED


NUMBERS = [10**9, 2**31, 2**63, 10**400, 1e300, -1, 0, 0.5, True, None, "4", [4], {}, [], "linear"]
config_changes = st.tuples(st.booleans(), st.integers(0, 60), st.sampled_from(NUMBERS))
"""Whether of an official checkpoint, a field of its config, and what it says."""


def attempt_config(subject: Subject, case: tuple[bool, int, Any]) -> str:
    """A config is refused, or taken at its word, beside weights that do not tell theirs."""
    is_official, number, value = case
    folder = subject.folder / "other"
    model = subject.model
    if is_official:
        backbone = dataclasses.replace(model.config.backbone, qk_norm=True)
        model = random_model(CoMeTConfig(backbone, model.config.memory), 0)
        save_published(folder, model.config, model.weights)
        data = json.loads((folder / "config.json").read_text())
        names = [(data, name) for name in sorted(data)]
    else:
        model.save_pretrained(folder)
        save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
        data = model.config.to_dict()
        names = [(data[part], name) for part in sorted(data) for name in sorted(data[part])]
    part, name = names[number % len(names)]
    before, part[name] = part[name], value
    (folder / "config.json").write_text(json.dumps(data))
    try:
        loaded = CoMeTModel.from_pretrained(folder)
    except ValueError as error:
        return told(error, name, "onfig", str(folder))
    finally:
        shutil.rmtree(folder)
    if is_official:
        tells_nothing = ("architectures", "model_type", "torch_dtype", "placeholder_id")
        assert name in tells_nothing or value == before or loaded.config != model.config
    else:
        assert loaded.config.to_dict() == data
    return WORKED
