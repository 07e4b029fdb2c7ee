"""What a run of training does: one dataclass, read from a TOML file and from `name=value`."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from ..arrays import shown
from ..files import check_regular

__all__ = ["DECAYS", "Phase", "Settings", "fit", "put", "read_settings"]

DECAYS = ("none", "linear", "cosine")
"""How a learning rate falls."""


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {shown(value)}; expected {wanted}.")


@dataclass(frozen=True)
class Phase:
    """A stretch of a run. A curriculum is a run of several."""

    steps: int
    """Steps of the optimizer."""

    learning_rate: float = 5e-5
    """Of AdamW, at its highest."""

    warmup: int = 0
    """Steps over which it rises first, in a straight line."""

    decay: str = "cosine"
    """How it falls: "none", "linear" or "cosine"."""

    decay_steps: int | None = None
    """Steps over which it would fall to nothing; None is the phase's own."""

    least: float = 0.0
    """The share of the rate that it does not fall below."""

    fresh_optimizer: bool = False
    """Whether the phase starts with an optimizer that has seen no gradient."""

    options: dict[str, Any] = field(default_factory=dict)
    """Options of the task in place of those of the run: longer texts, for instance."""

    def __post_init__(self) -> None:
        for name in ("steps", "decay_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(self.warmup >= 0, "warmup", self.warmup, "at least 0")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        _require(self.decay in DECAYS, "decay", self.decay, "one of " + ", ".join(DECAYS))
        _require(0 <= self.least <= 1, "least", self.least, "a share from 0 to 1")

    def rate_at(self, step: int) -> float:
        """The learning rate of one of its steps, counted from 0."""
        share = 1.0
        done = min(step / (self.decay_steps or self.steps), 1.0)
        if self.decay == "linear":
            share = 1 - done
        elif self.decay == "cosine":
            share = (1 + math.cos(math.pi * done)) / 2
        rising = min((step + 1) / self.warmup, 1.0) if self.warmup else 1.0
        return self.learning_rate * rising * max(share, self.least)


@dataclass(frozen=True)
class Settings:
    """A run: all that decides what comes out of it, on one machine with one number of threads.

    The defaults of the optimizer are those of the published training.
    """

    task: str = "text"
    """What is trained on: "text", "memories", "passkey", "keeping" or "questions"."""

    options: dict[str, Any] = field(default_factory=dict)
    """Of the task."""

    phases: tuple[Phase, ...] = (Phase(1000, warmup=10),)
    """One after the other."""

    model: str | None = None
    """Folder of the checkpoint to start from; this, `backbone` or `config`."""

    backbone: str | None = None
    """A pretrained model's folder or GGUF file, to be given fresh memories."""

    config: dict[str, Any] | None = None
    """Sizes of a fresh model, as `CoMeTConfig.to_dict` gives them."""

    baseline: dict[str, Any] | None = None
    """A memory of another kind in the place of CoMeT's: its `kind`, and sizes of
    `fast.baselines.BaselineConfig`. Backbone and chunk size are those of `config`."""

    memory: dict[str, Any] = field(default_factory=dict)
    """Fields of the `MemoryConfig` of a backbone's memories."""

    pipeline: int = 1
    """Processes that share each text, see `fast.parallel`; the others read texts of their own."""

    block: int = 1
    """Consecutive chunks of a text that one of them reads at a time."""

    device: str | None = None
    """Where the model is trained; None is a GPU where there is one, each process's own, else the CPU."""

    text: tuple[str, ...] = ()
    """Files of plain text, UTF-8."""

    chat: tuple[str, ...] = ()
    """Files of chats: in each line an object whose "messages" is a list of them, or its JSON."""

    train: str = "all"
    """Which weights move: "all", or those of the "memories" alone."""

    batch_size: int = 8
    """Texts that are read side by side."""

    accumulate: int = 1
    """Batches whose gradients add up to one step."""

    memory_rate: float = 5.0
    """How many times the learning rate the memories' weights have."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""

    weight_decay: float = 0.0
    """Of AdamW, for matrices."""

    clip: float = 1.5
    """Norm of the gradient at most; it is scaled down to it."""

    autocast: bool = False
    """Whether products are computed in bfloat16; weights stay in float32."""

    recompute: str = "none"
    """What is computed again in the backward pass, not kept: "none", the inside of "cells" or of
    "chunks", or "host", as `CoMeTModel` takes it; "none" or "cells" with a pipeline."""

    start_share: float = 0.0
    """Share of the weights that the run started from in those that it ends with: so a model that is
    trained further keeps what it could (WiSE-FT, arXiv 2109.01903). Of runs from a `model`."""

    evaluate_every: int = 0
    """Steps between evaluations on what is held out; 0 is none."""

    save_every: int = 500
    """Steps between checkpoints, about: they are taken where a batch of texts ends."""

    keep: int = 2
    """Checkpoints that are kept, the newest."""

    seed: int = 0
    """Of fresh weights, and of all that is drawn."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "pipeline", "block", "save_every", "keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("evaluate_every", "seed", "weight_decay"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        is_share = 0 <= self.start_share < 1 and (self.model or not self.start_share)
        expected = "a share below 1, of a run that starts from a model"
        _require(bool(is_share), "start_share", self.start_share, expected)
        for name in ("memory_rate", "clip"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        _require(len(self.phases) > 0, "phases", self.phases, "one phase at least")
        _require(self.train in ("all", "memories"), "train", self.train, "'all' or 'memories'")
        kinds = ("none", "cells", "chunks", "host")
        _require(self.recompute in kinds, "recompute", self.recompute, f"one of {', '.join(kinds)}")
        starts = [name for name in ("model", "backbone", "config") if getattr(self, name)]
        if len(starts) > 1:
            raise ValueError(
                f"{' and '.join(starts)} are given; expected one of them to start from."
            )
        if self.baseline is not None and not self.config:
            raise ValueError(
                "baseline is given without a config; a model in a folder is what its files say."
            )
        if self.memory and not self.backbone:
            raise ValueError(
                "memory is given without a backbone; what a model or a config says holds."
            )

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step of the run, and the step within it; the last one's after the end."""
        for phase in self.phases[:-1]:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        return self.phases[-1], step

    def options_at(self, step: int) -> dict[str, Any]:
        """The task's options at a step."""
        return {**self.options, **self.phase_at(step)[0].options}


def read_settings(path: Path | None = None, changes: Sequence[str] = (), **given: Any) -> Settings:
    """Settings from a file, and what is given in place of what it says.

    Args:
        path: a TOML file of the fields of `Settings`; None begins with the defaults.
        changes: "name=value" each, the value as in TOML or else a string, the name with a dot where
            it is of a table or a list: "phases.0.steps=100".
        given: fields; None leaves what the file says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, or a field is unknown or has a bad value.
    """
    data: dict[str, Any] = {"phases": [dataclasses.asdict(phase) for phase in Settings().phases]}
    where = "the settings"
    if path is not None:
        check_regular(path)
        where = str(path)
        try:
            data |= tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}.") from error
    data |= {name: value for name, value in given.items() if value is not None}
    for change in changes:
        put(data, change)
    return fit(Settings, data, where)


def put(data: dict[str, Any], change: str) -> None:
    """Put "name=value", as `read_settings` takes it, into nested tables.

    Raises:
        ValueError: it is of another form, or has no place there.
    """
    name, sign, text = change.partition("=")
    if not sign or not name:
        raise ValueError(f"{change!r} is not of the form name=value, such as batch_size=4.")
    value: Any
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    place: Any = data
    *path, last = name.split(".")
    for key in path:
        place = (
            place[_index(place, key, name)]
            if isinstance(place, list)
            else place.setdefault(key, {})
        )
        if not isinstance(place, (dict, list)):
            raise ValueError(f"{name}: {key} is {shown(place)}, which has no fields.")
    place[_index(place, last, name) if isinstance(place, list) else last] = value


def _index(items: list[Any], key: str, name: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise ValueError(f"{name}: {key!r} is none of {len(items)} items, counted from 0.")
    return int(key)


def fit(kind: Any, data: Any, where: str) -> Any:
    """A dataclass from a dict of its fields, as TOML and JSON give it, each of its field's type.

    Args:
        kind: a dataclass.
        data: of its fields; what has a default may be missing.
        where: the data come from, for messages.

    Raises:
        ValueError: a field is unknown, missing, or of another type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {shown(data)} is no table; expected {kind.__name__}'s fields.")
    known = typing.get_type_hints(kind)
    hints = {item.name: known[item.name] for item in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ValueError(
            f"{where}: {kind.__name__} has no {', '.join(unknown)}; known are "
            f"{', '.join(sorted(hints))}."
        )
    for item in dataclasses.fields(kind):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in data:
            raise ValueError(f"{where}: {kind.__name__} lacks {item.name}.")
    values = {name: _fit(hints[name], value, f"{where}: {name}") for name, value in data.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _fit(hint: Any, value: Any, where: str) -> Any:
    """A value of a type: int, float, bool, str, a dict, a tuple, a dataclass, or None."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        return _fit(next(kind for kind in hint.__args__ if kind is not type(None)), value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else fit(hint, value, where)
    kind = typing.get_origin(hint) or hint
    if kind is tuple and isinstance(value, (list, tuple)):
        kinds = typing.get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_fit(part, x, f"{where}.{i}") for i, (part, x) in pairs)
        raise ValueError(f"{where} has {len(value)} items; expected {len(kinds)}.")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {dict: "a table", tuple: "a list", str: "a string", bool: "true or false"}
        names |= {int: "an integer", float: "a number"}
        raise ValueError(f"{where} is {shown(value)}; expected {names[kind]}.")
    return value
