"""What files, calls and command lines have to bear: random damage, and what may come of it.

An attempt is made on a case that a strategy drew. It says in a word what came of it, and fails, as
an assertion does, where something wrong was taken for right, or told in another way than in a
sentence. The suite makes some attempts of each kind, and `python -m parity.reliability` many.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fast import CoMeTConfig, CoMeTModel, CoMeTState
from fast.__main__ import main
from fast.checkpoints import read_training, write_training
from fast.cupy_engine import CoMeTEngine
from fast.files import HEADER, UNFINISHED, atomic_save, atomic_write, put_parts
from fast.machine import machine
from fast.pretrained import save_published

from .assertions import array, assert_state_equal
from .strategies import random_model

TEXT = torch.arange(14).reshape(2, 7) % 11


def small(backbone: dict | None = None, memory: dict | None = None) -> CoMeTConfig:
    """A config of a few hundred weights, and fields changed by name."""
    return CoMeTConfig.from_dict(
        {
            "backbone": {
                "vocab_size": 11,
                "hidden_size": 6,
                "intermediate_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 4,
                **(backbone or {}),
            },
            "memory": {
                "chunk_size": 4,
                "global_memory_size": 2,
                "temporary_memory_size": 3,
                "compression_stride": 2,
                **(memory or {}),
            },
        }
    )


def same_weights(found: CoMeTModel, expected: CoMeTModel) -> bool:
    return found.config == expected.config and all(
        torch.equal(x, expected.state_dict()[name]) for name, x in found.state_dict().items()
    )


REFUSED, AS_BEFORE, WORKED = "refused", "as before", "worked"
"""What may come of an attempt: a sentence; a file that holds what it held; a call that did well."""

SENTENCE = 1000
"""Characters that a sentence has at most, paths among them."""


def told(error: BaseException, *words: str) -> str:
    """A sentence, not a page; one that names what is wrong, where words for that are given."""
    text = str(error)
    assert text, f"{type(error).__name__} without a word"
    assert "\n" not in text.strip(), text
    assert len(text) < SENTENCE, text
    assert not words or any(word in text for word in words), text
    return REFUSED


@dataclass
class Subject:
    """A model, an engine on its weights, and a state of each, in memory and in a folder's files."""

    folder: Path
    model: CoMeTModel
    engine: CoMeTEngine
    state: CoMeTState
    engine_state: CoMeTState

    @classmethod
    def make(cls, folder: Path) -> Subject:
        """Make them, and write `FILES`."""
        model = random_model(small(), 0)
        engine = CoMeTEngine.from_model(model, library="numpy")
        with torch.no_grad():
            state = model(TEXT, lengths=[7, 5], logits="none").state
        save_all(folder, model, state, 0)
        return cls(folder, model, engine, state, state.to(engine))


def _function() -> None:
    """What takes nothing."""


HOSTILE: list[Callable[[Subject], Any]] = [
    *(
        lambda _, value=value: value
        for value in (
            *(None, True, False, 0, 1, 3, -1, 2**62, 2**63, 2**70, -(2**70), 10**5000),
            *(0.0, 0.5, 1.0, -1.5, 1e-46, 1e-320, 1e308, float("nan"), float("inf")),
            *("", "1", "all", "last", "none", "cpu", "nowhere", b"x", "\0", "\ud800", 1j),
            *((), [], [[]], [0], [1], [7, 5], [5, 7], (3, 4), [2.5, 1], [[1], [1, 2]], [None] * 2),
            *({}, {1, 2}, {"a": 1}, range(1, 3), object(), _function, Path("file"), int),
            *([True, False], [1e400, 1], ["a", "b"], [2**70, 1]),
        )
    ),
    *(
        lambda _, kind=kind: np.array([7, 5]).astype(kind)
        for kind in ("int32", "uint64", "float16", "bool", "complex64", "O", "U3", "M8[s]")
    ),
    lambda _: np.zeros((0, 3), np.int64),
    lambda _: np.array(3),
    lambda _: np.int64(2),
    lambda _: np.bool_(True),
    lambda _: np.float32(0.5),
    lambda _: np.array(["all", "x"]),
    *(
        lambda _, kind=kind: TEXT.to(kind)
        for kind in (
            *(torch.int64, torch.int32, torch.uint8, torch.uint64, torch.bool),
            *(torch.float32, torch.bfloat16, torch.complex64),
        )
    ),
    lambda _: TEXT.numpy(),
    lambda _: TEXT.numpy().astype(np.uint16),
    lambda _: TEXT.numpy() + 5,
    lambda _: TEXT - 1,
    lambda _: TEXT[0],
    lambda _: TEXT[:, :0],
    lambda _: TEXT[None],
    lambda _: TEXT.sum(),
    lambda _: TEXT.to("meta"),
    lambda _: TEXT.to_sparse(),
    lambda _: TEXT * 2**40,
    lambda _: torch.tensor([7, 5]),
    lambda _: torch.tensor([1.5, 2.0]),
    lambda _: torch.tensor([7, 5], device="meta"),
    lambda _: torch.tensor([float("nan")] * 2),
    lambda _: torch.float32,
    lambda _: torch.int8,
    lambda _: torch.Generator(),
    lambda _: np.random.default_rng(0),
    lambda s: s.model,
    lambda s: s.engine,
    lambda s: s.model.config,
    lambda s: s.model.config.to_dict(),
    lambda s: s.model.weights,
    lambda s: {**s.engine.weights, "norm": 3},
    lambda s: s.engine.weights,
    lambda s: s.state,
    lambda s: s.engine_state,
    lambda s: [s.state, s.engine_state],
    lambda s: [s.state, s.state],
    lambda s: s.state.select([0]),
    lambda s: s.state.to("meta"),
    lambda s: s.state.map_tensors(lambda t: t.float()),
    lambda s: random_model(small({"rope_theta": 5.0}), 0).new_state(2),
    lambda s: dataclasses.replace(s.state, chunks=s.state.chunks + 9),
    lambda s: dataclasses.replace(s.state, keys=s.state.keys[:1]),
    lambda s: s.model(TEXT),
]
"""What nobody should give, or few: of each subject, or of none."""

hostile = st.one_of(
    st.sampled_from(HOSTILE),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=4,
    ).map(lambda value: lambda _: value),
)
"""A value as a function of the subject."""

LIKELY: dict[str, list[Any]] = {
    "ids": [TEXT.int(), TEXT.to(torch.uint8), TEXT.numpy(), TEXT.numpy().astype(np.uint64)],
    "labels": [None, TEXT.int(), TEXT * 0 - 100],
    "lengths": [[7, 5], (1, 7), np.array([2, 3], np.uint8), torch.tensor([7, 4])],
    "state": [None],
    "logits": ["all", "last", "none"],
    "chunk_sizes": [[3, 4], (1, 6), np.array([7]), range(3, 5)],
    "backprop_chunks": [1, np.int64(2), 2**62],
    "max_new_tokens": [0, 1, np.int64(3)],
    "stop_ids": [[1], {3, 4}, range(11), np.array([2])],
    "roll": [False, np.bool_(True)],
    "temperature": [0, 0.0, 1e-320, 1e308, np.float32(0.5)],
    "top_k": [None, 1, 2**62],
    "top_p": [None, 1, 1.0, 1e-46, 1e-320],
    "on_token": [len],
    "batch_size": [1, np.int32(3)],
    "copies": [1, np.uint8(2)],
    "rows": [[1, 0], (0,), np.array([1, 1]), torch.tensor([0]), None, [False, False]],
    "dtype": [torch.float32, torch.bfloat16, "float16", None],
    "seed": [1, 2**62],
    "folder": ["model", Path("model"), "new"],
    "path": ["state", Path("state")],
}
"""What is given seldom, and right, to some of the calls at least."""

READING: dict[str, Any] = {"lengths": None, "state": "state", "recorder": None}
DECODING = {
    **READING,
    "max_new_tokens": 3,
    "stop_ids": (),
    "roll": True,
    "temperature": 1.0,
    "top_k": 5,
    "top_p": 0.9,
    "on_token": None,
}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "model": (
        lambda s, **a: s.model(**a),
        {
            **READING,
            "ids": TEXT,
            "labels": TEXT,
            "logits": "all",
            "chunk_sizes": None,
            "backprop_chunks": None,
        },
    ),
    "model.generate": (
        lambda s, **a: s.model.generate(**a),
        {**DECODING, "ids": TEXT, "generator": "torch"},
    ),
    "model.new_state": (lambda s, **a: s.model.new_state(**a), {"batch_size": 2}),
    "model.close_chunk": (
        lambda s, **a: s.model.close_chunk(**a),
        {"state": "state", "recorder": None},
    ),
    "engine": (
        lambda s, **a: s.engine(**a),
        {
            **READING,
            "state": "engine_state",
            "ids": TEXT.numpy(),
            "logits": "all",
            "chunk_sizes": None,
        },
    ),
    "engine.generate": (
        lambda s, **a: s.engine.generate(**a),
        {**DECODING, "state": "engine_state", "ids": TEXT.numpy(), "generator": "numpy"},
    ),
    "engine.new_state": (lambda s, **a: s.engine.new_state(**a), {"batch_size": 2}),
    "engine.close_chunk": (
        lambda s, **a: s.engine.close_chunk(**a),
        {"state": "engine_state", "recorder": None},
    ),
    "state.fork": (lambda s, copies: s.state.fork(copies), {"copies": 2}),
    "state.select": (lambda s, rows: s.state.select(rows), {"rows": [0]}),
    "state.forget_temporary": (lambda s, rows: s.state.forget_temporary(rows), {"rows": None}),
    "state.to": (lambda s, place: s.state.to(place), {"place": "cpu"}),
    "CoMeTState.cat": (lambda s, states: CoMeTState.cat(states), {"states": "states"}),
    "state.save": (
        lambda s, path, model: s.state.save(path, model),
        {"path": "saved", "model": None},
    ),
    "CoMeTState.load": (
        lambda s, **a: CoMeTState.load(**a),
        {"path": "state", "model": "model", "other_weights": False},
    ),
    "CoMeTModel": (
        lambda s, **a: CoMeTModel(**a),
        {"config": "config", "weights": None, "seed": 0, "device": None, "dtype": None},
    ),
    "CoMeTEngine": (
        lambda s, **a: CoMeTEngine(**a),
        {"config": "config", "weights": "weights"},
    ),
    "CoMeTModel.from_pretrained": (
        lambda s, **a: CoMeTModel.from_pretrained(**a),
        {"folder": "model", "dtype": None, "device": None},
    ),
    "CoMeTEngine.from_pretrained": (
        lambda s, **a: CoMeTEngine.from_pretrained(**a),
        {"folder": "model", "dtype": None, "device": None, "library": "numpy"},
    ),
    "model.save_pretrained": (lambda s, **a: s.model.save_pretrained(**a), {"folder": "saved"}),
}
"""Each call, and good arguments of it; in words those that a subject has."""

SEEDED: dict[str, Callable[[Subject], Any]] = {
    "state": lambda s: s.state,
    "engine_state": lambda s: s.engine_state,
    "states": lambda s: [s.state, s.state],
    "torch": lambda _: torch.Generator().manual_seed(0),
    "numpy": lambda _: np.random.default_rng(0),
    "model": lambda s: s.model,
    "config": lambda s: s.model.config,
    "weights": lambda s: s.engine.weights,
}
WORDS = ("generator", "state", "states", "model", "config", "weights")
"""Arguments whose good value is a word of `SEEDED`."""

LONG = {"max_new_tokens": 2**62, "batch_size": 2**31, "copies": 2**30}
"""Arguments that are no mistake up to here, but take long: they are made 50 at most."""


@st.composite
def bad_calls(draw: st.DrawFn) -> tuple[str, dict[str, Callable[[Subject], Any]]]:
    """A call, and one or two arguments that are made hostile."""
    name = draw(st.sampled_from(sorted(CALLS)))
    names = st.lists(st.sampled_from(sorted(CALLS[name][1])), min_size=1, max_size=2, unique=True)
    changes = {}
    for argument in draw(names):
        likely = LIKELY.get(argument, [None])
        if draw(st.sampled_from([False, False, True])):
            changes[argument] = draw(hostile)
        else:
            changes[argument] = draw(st.sampled_from(likely).map(lambda value: lambda _: value))
    return name, changes


def plain(value: Any) -> Any:
    """A value in the one form that says the same."""
    if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.ndim > 0:
        return value.long()
    if isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "iu":
        return value.astype(np.int64)
    return value.item() if isinstance(value, np.generic) else value


def attempt_call(subject: Subject, case: tuple[str, dict[str, Callable[[Subject], Any]]]) -> str:
    """It does well, as the same call does in plain types; or it is refused in a sentence; and the
    states are as they were.
    """
    name, changes = case
    call, good = CALLS[name]

    def arguments(form: Callable[[Any], Any]) -> dict[str, Any]:
        made = {
            key: SEEDED[value](subject) if key in WORDS and value in SEEDED else value
            for key, value in good.items()
        }
        for key, change in changes.items():
            made[key] = form(change(subject))
            if key == "on_token" and callable(made[key]):
                made[key] = len  # what another function raises is its own
            is_number = isinstance(made[key], int)
            if is_number and 50 < made[key] <= LONG.get(key, 0):
                made[key] = 50
        return made

    before = subject.state.fork(), subject.engine_state.fork()
    files = {path.name for path in subject.folder.iterdir()}
    is_of_files = "path" in good or "folder" in good
    refusals = (ValueError, TypeError, *([OSError] if is_of_files else []))
    with contextlib.chdir(subject.folder):
        try:
            found = call(subject, **arguments(lambda value: value))
        except refusals as error:
            outcome = told(error)
        else:
            outcome = WORKED
            draws_anew = "generator" in changes
            if not (is_of_files or draws_anew):
                assert_same(found, call(subject, **arguments(plain)))
    for path in subject.folder.iterdir():  # what a call wrote where it was told to
        if path.name not in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_same((subject.state, subject.engine_state), before)
    assert files == {path.name for path in subject.folder.iterdir()}
    return outcome


def assert_same(found: Any, expected: Any) -> None:
    """Two results of a call are one."""
    assert type(found) is type(expected)
    if dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(found, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif getattr(found, "is_meta", False):
        assert found.shape == expected.shape
    elif isinstance(found, (torch.Tensor, np.ndarray)):
        x, y = array(found), array(expected)
        assert np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
    elif isinstance(found, list):
        assert found == expected


FILES = ("state", "model/model.safetensors", "model/config.json", "training.pt")
"""What `save_all` writes."""


def look(subject: Subject, name: str, words: tuple[str, ...] = ()) -> str:
    """Read one of `FILES` after something was done to it: it holds what it held, or is refused."""
    try:
        if name == "state":
            state = CoMeTState.load(subject.folder / name, subject.model)
            assert_state_equal(state, subject.state, "the damaged state")
        elif name == "training.pt":
            run = read_training(subject.folder / name)
            weights = subject.model.state_dict()
            assert run["number"] == 0
            assert run["model"].keys() == weights.keys()
            assert all(torch.equal(x, weights[key]) for key, x in run["model"].items())
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


class StartedError(Exception):
    """A command has checked what it was given, and would begin its work."""


NUMBERS_IN_WORDS = (
    *("-1", "0", "1", "1.5", "nan", "1e3", "x", "", "9" * 30, "9" * 5000, "300", "99999"),
)
PATHS_IN_WORDS = (
    *("", "file", "file/in", ".", "folder", "missing/deep", "/proc/no/such", "pipe", "state"),
    *("\0", "\ud800", "loop", "page.md", "model", "broken"),
)
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "demo": {
        "--out": PATHS_IN_WORDS,
        "--lengths": NUMBERS_IN_WORDS,
        "--processes": NUMBERS_IN_WORDS,
    },
    "eval": {
        "": ("passkey", "no task", ""),
        "--variant": ("published", "prose", "poem", ""),
        "--lengths": NUMBERS_IN_WORDS,
        "--keys": NUMBERS_IN_WORDS,
        "--tails": (),
        "--seed": NUMBERS_IN_WORDS,
        "--model": PATHS_IN_WORDS,
        "--engine": ("numpy", "jax", ""),
        "--haystack": PATHS_IN_WORDS,
        "--out": PATHS_IN_WORDS,
        "--processes": NUMBERS_IN_WORDS,
    },
    "bench": {
        "--out": PATHS_IN_WORDS,
        "--device": ("cpu", "cuda", "tpu"),
        "--quick": (),
        "--page": PATHS_IN_WORDS,
    },
    "train": {
        "": ("passkey", "no task"),
        "--out": PATHS_IN_WORDS,
        "--seed": NUMBERS_IN_WORDS,
        "--threads": NUMBERS_IN_WORDS,
    },
    "watch": {
        "": tuple(path for path in PATHS_IN_WORDS if path != "pipe"),  # which is waited for
        "--model": PATHS_IN_WORDS,
        "--chunks": NUMBERS_IN_WORDS,
        "--answer": NUMBERS_IN_WORDS,
        "--highlight": ("[", "(", "*", "a", "\ud800", ""),
        "--port": ("0", "-1", "99999", "x"),
        "--html": PATHS_IN_WORDS,
    },
    "no command": {"": ("x",)},
}
"""The options of each command, and what they are given; "" is what stands without one."""


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its options, wrong ones among them, or one that no command has."""
    name = draw(st.sampled_from(sorted(OPTIONS)))
    words = [name]
    if "" in OPTIONS[name]:
        words += draw(st.lists(st.sampled_from(OPTIONS[name][""]), min_size=1, max_size=1))
    options = sorted({*OPTIONS[name], "--unknown"} - {""})
    for option in draw(st.lists(st.sampled_from(options), max_size=3, unique=True)):
        values = OPTIONS[name].get(option, ())
        words += [option, *([draw(st.sampled_from(values))] if values else [])]
    return words


@contextlib.contextmanager
def nothing_measured(folder: Path) -> Iterator[None]:
    """Commands start their work by `StartedError`, in a folder with the files that `OPTIONS` name."""

    def start(*_args: Any, **_options: Any) -> None:
        raise StartedError

    places = ("passkey_report.collect", "bench.report.run", "passkey_training.train")
    with contextlib.ExitStack() as stack:
        for place in places:
            module, _, function = place.rpartition(".")
            package = "fast." if module.startswith("bench") else "fast.tasks."
            stack.enter_context(patch(f"{package}{module}.{function}", start))
        stack.enter_context(patch("fast.watch.read", start))
        stack.enter_context(patch("torch.set_num_threads"))
        stack.enter_context(patch("fast.__main__.keep_memory"))
        stack.enter_context(contextlib.chdir(folder))
        yield


def make_places(folder: Path) -> None:
    """The files that `OPTIONS` name."""
    (folder / "file").write_text("a text of thirty bytes or so\n")
    (folder / "folder").mkdir()
    (folder / "page.md").write_text("<!-- machine -->\n<!-- end -->\n")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"backbone": ')
    random_model(small(), 0).save_pretrained(folder / "model")
    random_model(small(), 0).new_state().save(folder / "state")


def attempt_command(folder: Path, words: list[str]) -> str:
    """It begins its work, or tells a sentence and exits with status 2, without a traceback."""
    errors, printed = io.StringIO(), io.StringIO()
    with (
        nothing_measured(folder),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(printed),
    ):
        try:
            main(words)
        except StartedError:
            return WORKED
        except SystemExit as end:
            status = end.code
        else:
            raise AssertionError(f"{words} began nothing, and told nothing")
    lines = errors.getvalue().strip().splitlines()
    assert status == 2, (words, status, lines)
    assert lines, words
    assert "Traceback" not in errors.getvalue(), lines
    is_usage = lines[0].startswith("usage: ")
    assert is_usage or len(lines) == 1, lines
    assert len(lines[-1]) < SENTENCE + sum(map(len, words)), lines
    return REFUSED


def saved_pairs(same_config: bool) -> list[tuple[CoMeTModel, CoMeTState]]:
    """Two models of other weights, and a state of each."""
    pairs = []
    for number in (0, 1):
        wide = {"vocab_size": 11 if same_config else 11 + number, "intermediate_size": 3000}
        model = random_model(small(wide), number)
        pairs.append((model, model(TEXT, logits="none").state))
    return pairs


def save_all(folder: Path, model: CoMeTModel, state: CoMeTState, number: int) -> None:
    state.save(folder / "state", model)
    model.save_pretrained(folder / "model")
    write_training(folder / "training.pt", {"model": model.state_dict(), "number": number})


def save_forever(folder: Path, same_config: bool, ready: Connection) -> None:
    """Save one pair's files and then the other's, until the process is killed."""
    torch.set_num_threads(1)
    with torch.no_grad():
        pairs = saved_pairs(same_config)
    ready.send(True)
    while True:
        for number, (model, state) in enumerate(pairs):
            save_all(folder, model, state, number)


def kill_writers(folder: Path, times: int, seed: int, same_config: bool) -> Counter:
    """Kill a process that saves, at a random moment, again and again; look at its files each time.

    Args:
        folder: empty; the files of one process are the next one's old ones.
        times: processes to kill.
        seed: of the moments.
        same_config: whether the two models have one config, so that weights and config fit always.

    Returns:
        How often each file was whole, how often a file was left unfinished, and how often config
        and weights were of two saves and refused.
    """
    rng, found = random.Random(seed), Counter()
    with torch.no_grad():
        pairs = saved_pairs(same_config)
    context = multiprocessing.get_context("forkserver")  # imports PyTorch once
    context.set_forkserver_preload(["fast.__main__", "parity.strategies"])
    save_all(folder, *pairs[0], 0)
    for _ in range(times):
        ready, there = context.Pipe(duplex=False)
        process = context.Process(target=save_forever, args=(folder, same_config, there))
        process.start()
        assert ready.poll(60), "the process did not begin"
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        left = [path for path in folder.rglob("*") if path.name.endswith(UNFINISHED)]
        found["left unfinished"] += bool(left)
        found.update(_look_at_files(folder, pairs, same_config))
        for name in ("state", "training.pt"):
            assert not [path for path in left if name in path.name][1:], "one writer, one file"
    save_all(folder, *pairs[0], 0)
    names = {path.name for path in folder.rglob("*")}
    assert names == {"state", "training.pt", "model", "config.json", "model.safetensors"}, names
    return found


def _look_at_files(
    folder: Path, pairs: list[tuple[CoMeTModel, CoMeTState]], same_config: bool
) -> Counter:
    """Hold the files against what was saved: each is the one pair's or the other's."""
    loaded = []
    for model, state in pairs:
        with contextlib.suppress(ValueError):
            assert_state_equal(CoMeTState.load(folder / "state", model), state, "the state")
            loaded.append(model)
    assert len(loaded) == 1, "the state is that of one model"
    run = read_training(folder / "training.pt")
    weights = pairs[run["number"]][0].state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in run["model"].items())
    words = None
    try:
        model = CoMeTModel.from_pretrained(folder / "model")
    except ValueError as error:
        words = str(error)
    if words is not None:
        assert not same_config, words
        assert "a save was cut between the two" in words, words
        return Counter({"whole": 3, "of two saves, refused": 1})
    assert any(same_weights(model, expected) for expected, _ in pairs)
    return Counter({"whole": 4})


@dataclass(frozen=True)
class Trial:
    """What is tried many times."""

    what: str
    """In words."""

    cases: st.SearchStrategy[Any]
    attempt: Callable[[Any, Any], str]
    times: int


TRIALS = (
    Trial("one byte of a file changed", damages(("flip",)), attempt_damage, 1000),
    Trial("a file cut short", damages(("cut",)), attempt_damage, 1000),
    Trial("bytes put into a file", damages(("grow",)), attempt_damage, 1000),
    Trial("an entry of a header dropped, renamed or replaced", header_changes, attempt_header, 1000),
    Trial("a count of a state changed, the digest right", count_changes, attempt_counts, 1000),
    Trial("a config's field replaced, beside weights that tell no config", config_changes,
          attempt_config, 1000),
    Trial("a call with one or two arguments of any kind", bad_calls(), attempt_call, 1000),
)  # fmt: skip
COMMANDS = Trial("a command line of right and wrong words", command_lines(), attempt_command, 1000)
KILLS = 100


def tally(trial: Trial, subject: Any) -> Counter:
    """Make a trial's attempts; those that fail are counted as wrong, and the first is printed."""
    found: Counter = Counter()

    @seed(0)
    @settings(
        max_examples=trial.times,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(trial.cases)
    def run(case: Any) -> None:
        try:
            found[trial.attempt(subject, case)] += 1
        except Exception as error:
            found["wrong"] += 1
            if found["wrong"] == 1:
                print(f"{trial.what}: {error!r}")

    run()
    return found


def table() -> tuple[str, int]:
    """Make all trials: a Markdown table, and how many attempts went wrong."""
    rows, wrong = [], 0

    def add(what: str, found: Counter) -> None:
        good = found[AS_BEFORE] + found[WORKED]
        total = found[REFUSED] + good + found["wrong"]
        rows.append(f"| {what} | {total:,} | {found[REFUSED]:,} | {good:,} | {found['wrong']:,} |")
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("subject", "places", "same", "other")}
        for place in places.values():
            place.mkdir()
        subject = Subject.make(places["subject"])
        make_places(places["places"])
        for trial in (*TRIALS, COMMANDS):
            found = tally(trial, places["places"] if trial is COMMANDS else subject)
            wrong += found["wrong"]
            add(trial.what, found)
        unfinished = 0
        for name, same in (("same", True), ("other", False)):
            found = kill_writers(places[name], KILLS // 2, 0, same)
            what = "one config" if same else "two configs"
            outcomes = {AS_BEFORE: found["whole"], REFUSED: found["of two saves, refused"]}
            add(f"a file after {KILLS // 2} kills, saves of {what} in turn", Counter(outcomes))
            unfinished += found["left unfinished"]
    head = "| what was tried | times | refused in a sentence | held what it held, or did well | wrong |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: |", *rows, ""]
    lines.append(
        f"Of {KILLS} kills {unfinished} came in the middle of a file; the next save removed what "
        "was left of it."
    )
    return "\n".join(lines), wrong


def fill() -> None:
    """Make all trials, and put the table into a page where one is named."""
    parser = argparse.ArgumentParser(prog="python -m parity.reliability", description=__doc__)
    parser.add_argument("--page", type=Path, help="a Markdown page to put the table into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text, wrong = table()
    parts = {"machine": machine("1 thread"), "tries": text}
    if args.page is not None:
        page = args.page.read_text(encoding="utf-8")
        atomic_write(args.page, put_parts(page, parts, args.page))
    print(f"\n{text}\n\n{parts['machine']}")
    if wrong:
        parser.exit(1, f"{wrong} attempts went wrong\n")


if __name__ == "__main__":
    fill()
