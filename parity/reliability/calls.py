"""Calls with arguments of any kind."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fast import CoMeTModel, CoMeTState
from fast.cupy_engine import CoMeTEngine

from ..assertions import array
from ..strategies import random_model
from . import TEXT, WORKED, Subject, small, told


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
