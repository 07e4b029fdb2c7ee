"""The stream's state: an explicit value that can be saved, loaded, forked and selected from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from array_api_compat import array_namespace, device, size, to_device

from reference.config import LATER, CoMeTConfig, MemoryConfig

from .arrays import Array, all_finite, dtype_name, numbers, shown, take_rows
from .checkpoints import Layers, read_state, weights_digest, write_state
from .rows import NEVER

__all__ = ["CoMeTState"]

COUNTS = ("tokens", "chunks", "open_tokens", "row_length", "queue_length")
TENSORS = ("global_state", "temporary_memory", "keys", "values")
ROW = ("keys", "values")

MOST_STREAMS = 2**31 - 1
"""The largest batch."""


class Model(Protocol):
    """What a state has to know of a model."""

    config: CoMeTConfig
    weights: Any
    framework: str
    """Whose arrays its files are read as: "pt" or "np"."""

    def place(self, array: Array) -> Array:
        """An array on the model's device, in its dtype."""


def _kind(x: Array) -> str:
    """An array's dtype, device and library, in words."""
    return f"{x.dtype} on {device(x)} ({array_namespace(x).__name__.split('.')[-1]})"


def _check_model(model: Any) -> None:
    """Raise ValueError unless it is a model or an engine."""
    if not hasattr(model, "place"):
        raise ValueError(
            f"model is a {type(model).__name__}; expected a CoMeTModel or a CoMeTEngine."
        )


def fingerprint(config: CoMeTConfig) -> str:
    """Short name of a model's shape; states fit models of an equal config. A field that came later
    is left out where it says what held before, so that states from then still fit.
    """
    told = {
        part: {name: v for name, v in fields.items() if name not in LATER or v != LATER[name]}
        for part, fields in config.to_dict().items()
    }
    canonical = json.dumps(_plain(told), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _join(parts: Sequence[Array], axis: int | None) -> Array:
    """Arrays [b, ...] one after the other, once each has been filled up along an axis with zeros
    to the longest.
    """
    xp = array_namespace(*parts)
    if axis is not None:
        longest = max(part.shape[axis] for part in parts)
        filled = []
        for part in parts:
            shape = list(part.shape)
            shape[axis] = longest - shape[axis]
            zeros = xp.zeros(tuple(shape), dtype=part.dtype, device=device(part))
            filled.append(xp.concat([part, zeros], axis=axis))
        parts = filled
    return xp.concat(parts, axis=0)


def _plain(value: Any) -> Any:
    """Nested dicts with every number a float, since 10000 equals 10000.0 but is written otherwise."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else value


@dataclass(frozen=True)
class CoMeTState:
    """Where a batch of streams stands. Nothing else remembers anything, and no call changes one.

    Counts are NumPy [b] int64 on the host, read-only, so that planning a call needs no device.
    Tensors are one a layer.
    """

    model: str
    """Fingerprint of the config that the state belongs to."""

    tokens: np.ndarray
    """[b] text tokens read since the start."""

    chunks: np.ndarray
    """[b] chunks closed."""

    open_tokens: np.ndarray
    """[b] text tokens in the open chunk."""

    row_length: np.ndarray
    """[b] slots in the open chunk's row, memory slots included; 0 before its first token."""

    queue_length: np.ndarray
    """[b] entries in the temporary memory."""

    global_state: tuple[Array, ...]
    """Per layer [b, m, d], S. Zeros before the first chunk closes. Empty tuple where m = 0."""

    temporary_memory: tuple[Array, ...]
    """Per layer [b, q, d], T, oldest first; row i's entries are its first `queue_length[i]`. An
    entry joins as its compression token is read; the open chunk's row was made before. Empty
    tuple where s = 0."""

    keys: tuple[Array, ...]
    """Per layer [b, k, p, e], rotated keys of the open chunk's row, index = position. p = 0 where
    no chunk is open."""

    values: tuple[Array, ...]
    """Per layer [b, k, p, e], its values."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            count = getattr(self, name).view()
            count.flags.writeable = False  # a state is a value
            object.__setattr__(self, name, count)

    @property
    def batch_size(self) -> int:
        """Sequences in the batch."""
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors: bounded by the config, unless chunks never close."""
        tensors = [t for name in TENSORS for t in getattr(self, name)]
        return sum((size(t) or 0) * int(dtype_name(t)[-2:]) // 8 for t in tensors)

    def map_tensors(self, function: Callable[[Array], Array]) -> CoMeTState:
        """The state with `function` applied to every tensor."""
        tensors: dict[str, Any] = {
            name: tuple(function(t) for t in getattr(self, name)) for name in TENSORS
        }
        return dataclasses.replace(self, **tensors)

    def fork(self, copies: int = 1) -> CoMeTState:
        """An independent copy, each sequence repeated `copies` times side by side.

        A document is read once and asked many times: `state.fork(8)` continues each sequence
        eight ways in one batch.

        Args:
            copies: how often each sequence appears in the result.

        Returns:
            State of batch size b * copies; sequence i becomes i * copies ... i * copies +
            copies - 1. It shares no memory with this one.

        Raises:
            ValueError: copies below 1.
        """
        if isinstance(copies, bool) or not isinstance(copies, (int, np.integer)) or copies < 1:
            raise ValueError(f"copies is {shown(copies)}; expected an integer of at least 1.")
        if copies * self.batch_size > MOST_STREAMS:
            raise ValueError(
                f"copies is {shown(copies)}; expected at most {MOST_STREAMS // self.batch_size}."
            )
        return self._take(np.repeat(np.arange(self.batch_size), copies))

    def select(self, rows: Sequence[int]) -> CoMeTState:
        """The state of some of the sequences, in the order given.

        Args:
            rows: indices into the batch; one may be named more than once.

        Returns:
            State of batch size len(rows), which shares no memory with this one.

        Raises:
            ValueError: no index, or one outside the batch.
        """
        index = numbers(rows)
        if (
            index.ndim != 1
            or not np.issubdtype(index.dtype, np.integer)
            or index.size == 0
            or index.min() < 0
            or index.max() >= self.batch_size
        ):
            raise ValueError(
                f"rows is {shown(rows)}; expected integer indices in [0, {self.batch_size}), at "
                "least one."
            )
        return self._take(index)

    def _take(self, index: np.ndarray) -> CoMeTState:
        """Some sequences, copied, no slots kept that none of them has."""
        counts: dict[str, Any] = {name: getattr(self, name)[index] for name in COUNTS}
        slots, row = int(counts["queue_length"].max()), int(counts["row_length"].max())
        return dataclasses.replace(
            self,
            **counts,
            global_state=tuple(take_rows(t, index) for t in self.global_state),
            temporary_memory=tuple(
                take_rows(t[:, :slots, :], index) for t in self.temporary_memory
            ),
            keys=tuple(take_rows(k[:, :, :row, :], index) for k in self.keys),
            values=tuple(take_rows(v[:, :, :row, :], index) for v in self.values),
        )

    @classmethod
    def cat(cls, states: Sequence[CoMeTState]) -> CoMeTState:
        """Streams that were read apart as one batch, to be read on side by side.

        Args:
            states: of one model, in one library and dtype, on one device.

        Returns:
            State whose batch size is the sum of theirs, in their order.

        Raises:
            ValueError: no states, or of several models, libraries, dtypes or devices.
        """
        if not isinstance(states, Sequence) or not all(isinstance(s, CoMeTState) for s in states):
            raise ValueError("states is not a list of CoMeTState; expected one state or more.")
        if not states:
            raise ValueError("states is empty; expected at least one state to join.")
        models = sorted({state.model for state in states})
        if len(models) > 1:
            raise ValueError(
                f"the states belong to models with configs {', '.join(models)}; join those of one."
            )

        kinds = sorted({_kind(t) for state in states for t in state.keys[:1]})
        if len(kinds) > 1:
            raise ValueError(
                f"the states are {', '.join(kinds)}; convert them to one: state.to(model)."
            )

        def join(name: str, axis: int | None) -> Layers:
            layers = zip(*(getattr(state, name) for state in states), strict=True)
            return tuple(_join(parts, axis) for parts in layers)

        counts: dict[str, Any] = {
            name: np.concatenate([getattr(state, name) for state in states]) for name in COUNTS
        }
        return cls(
            model=models[0],
            **counts,
            global_state=join("global_state", None),
            temporary_memory=join("temporary_memory", 1),
            keys=join("keys", 2),
            values=join("values", 2),
        )

    def to(self, place: Model | Any) -> CoMeTState:
        """The same state elsewhere.

        Args:
            place: a model or an engine, for its library, dtype and device; or a device of the
                state's library, such as "cuda".

        Raises:
            ValueError: it is none of these, or is not there.
        """
        if hasattr(place, "place"):
            return self.map_tensors(place.place)
        try:
            if type(place) not in (str, int) and type(place).__name__.lower() != "device":
                raise TypeError("it is neither")
            to_device(self.keys[0][:0], place)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(
                f"place is {shown(place)}; expected a model, an engine, or a device that is there "
                f"({reason})."
            ) from error
        return self.map_tensors(lambda t: to_device(t, place))

    def detach(self) -> CoMeTState:
        """The same state, through which no gradient flows back."""
        return self.map_tensors(lambda t: t.detach() if hasattr(t, "detach") else t)

    def forget_temporary(self, rows: Sequence[bool] | np.ndarray | None = None) -> CoMeTState:
        """The state with an empty queue: what is read next must come from the global memory.

        Args:
            rows: [b] which sequences forget; None is all. Those have no open chunk.

        Raises:
            ValueError: a chunk is open, whose row has seen the queue already.
        """
        forget = np.ones(self.batch_size, bool) if rows is None else numbers(rows)
        if forget.shape != (self.batch_size,) or forget.dtype != bool:
            raise ValueError(
                f"rows is {shown(rows)}; expected {self.batch_size} times True or False."
            )
        if (self.row_length[forget] > 0).any():
            raise ValueError(
                "a chunk is open and its row already holds the queue; close it first "
                "(model.close_chunk)."
            )
        return dataclasses.replace(self, queue_length=np.where(forget, 0, self.queue_length))

    def check_finite(self) -> None:
        """Raise unless all numbers are finite: those of a stream that has left its dtype's range
        are not, as happens first in float16. Reading does not ask, since that takes time; `save`
        and `load` do.

        Raises:
            FloatingPointError: names the first tensor that holds NaN or infinity.
        """
        for name in TENSORS:
            for layer, tensor in enumerate(getattr(self, name)):
                if not all_finite(tensor):
                    raise FloatingPointError(
                        f"the state's {name} holds NaN or infinity in layer {layer}: a stream has "
                        f"left the range of {dtype_name(tensor)}. Read again from an earlier state "
                        "in a wider dtype."
                    )

    def save(
        self,
        path: str | Path,
        model: Model | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Write the state to one safetensors file; an existing file is replaced whole or not at
        all.

        Args:
            path: file to write.
            model: the model or engine that read the text. The file then tells of its weights, by
                their digest, and `load` refuses it for others. That takes about a second a
                gigabyte of weights, here and in `load`. None leaves it out.
            notes: what else the file tells, fit for JSON, for whoever reads its header; `load` does
                not look at it. None is nothing.

        Raises:
            ValueError: the state holds NaN or infinity, or the model is of another config; nothing
                is written.
        """
        weights = None
        if model is not None:
            _check_model(model)
            self._check_config(model.config)
            weights = weights_digest(model.config, model.weights)
        counts = {name: getattr(self, name) for name in COUNTS}
        left_out = () if self.row_length.any() else ROW  # of no slots
        tensors = {name: getattr(self, name) for name in TENSORS if name not in left_out}
        write_state(Path(path), self.model, counts, tensors, weights, notes)

    @classmethod
    def load(cls, path: str | Path, model: Model, other_weights: bool = False) -> CoMeTState:
        """Read a state that `save` wrote, onto the model's device and in its dtype.

        Args:
            path: file to read.
            model: the model or engine that it will be used with.
            other_weights: whether a state that was read with other weights of the config will do,
                such as those of an earlier step, or the same in another dtype. Of a file that does
                not tell of its weights nothing is asked.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a state, cut short, of a model of another config, or of other weights.
        """
        _check_model(model)
        if not isinstance(other_weights, bool):
            raise ValueError(f"other_weights is {shown(other_weights)}; expected True or False.")
        name, weights, counts, tensors = read_state(Path(path), COUNTS, TENSORS, model.framework)
        batch_size, backbone = len(counts["tokens"]), model.config.backbone
        if not counts["row_length"].any():
            shape = (batch_size, backbone.num_key_value_heads, 0, backbone.head_dim)
            empty = (model.place(np.zeros(shape)),) * backbone.num_hidden_layers
            tensors |= {part: tensors[part] or empty for part in ROW}
        state = cls(model=name, **cast(Any, counts), **cast(Any, tensors)).to(model)
        state.check(model.config, batch_size, model.place(np.zeros(0)))
        is_known = weights is None or other_weights
        if not is_known and weights != weights_digest(model.config, model.weights):
            raise ValueError(
                f"{path} was read with other weights than the model's, or with the same in another "
                "dtype; use the model that read it, or give other_weights=True to go on with this "
                "one."
            )
        if not all(all_finite(t) for part in TENSORS for t in getattr(state, part)):
            raise ValueError(
                f"{path} holds numbers beyond the model's dtype; load it onto a model in a wider "
                "one, such as float32."
            )
        return state

    def _check_config(self, config: CoMeTConfig) -> None:
        """Raise ValueError unless the state is of a model of that config."""
        if self.model != fingerprint(config):
            raise ValueError(
                f"the state belongs to a model with config {self.model or '(none)'}, this model's "
                f"is {fingerprint(config)}; use the model that made the state, or start with "
                "model.new_state()."
            )

    def _fits_row(self, memory: MemoryConfig) -> np.ndarray:
        """[b] whether a row's length is that of the global memory, the queue as it was when the row
        began, the text, and its full groups' compression tokens.
        """
        groups = np.maximum(self.open_tokens - 1, 0) // (memory.compression_stride or NEVER)
        begun = self.row_length - self.open_tokens - groups  # memory slots
        queue = begun - (self.chunks > 0) * memory.global_slots
        most = memory.temporary_memory_size * memory.has_temporary
        fits = (queue >= 0) & (queue <= most)
        fits &= np.minimum(queue + groups, most) == self.queue_length
        return fits | (self.open_tokens == 0)

    def check(
        self,
        config: CoMeTConfig,
        batch_size: int,
        like: Array,
    ) -> None:
        """Raise unless the state fits a model and a batch.

        Args:
            config: the model's.
            batch_size: of the input.
            like: an array of the model's library, in its dtype and on its device.

        Raises:
            ValueError: it belongs to another config, batch size, library, dtype or device, or its
                parts do not fit each other.
        """
        self._check_config(config)
        if self.batch_size != batch_size:
            raise ValueError(
                f"the state has batch size {self.batch_size}, the input {batch_size}; make them "
                "equal (state.fork repeats a sequence, state.select picks some)."
            )
        layers, b, backbone = config.backbone.num_hidden_layers, self.batch_size, config.backbone
        m, d, k, e = (
            config.memory.global_memory_size,
            backbone.hidden_size,
            backbone.num_key_value_heads,
            backbone.head_dim,
        )
        expected = {
            "global_state": (layers if m else 0, (b, m, d)),
            "temporary_memory": (layers if config.memory.has_temporary else 0, (b, None, d)),
            "keys": (layers, (b, k, None, e)),
            "values": (layers, (b, k, None, e)),
        }

        dtype, where = str(like.dtype), device(like)
        for name, (number, shape) in expected.items():
            tensors = getattr(self, name)
            if len(tensors) != number:
                raise ValueError(
                    f"the state's {name} has {len(tensors)} layers, expected {number}."
                )
            for tensor in tensors:
                fits = tensor.ndim == len(shape) and all(
                    want is None or have == want
                    for have, want in zip(tensor.shape, shape, strict=True)
                )
                if not fits:
                    raise ValueError(
                        f"the state's {name} has shape {tuple(tensor.shape)}, expected {shape} "
                        "(None: any); the file or the state was changed."
                    )
                if str(tensor.dtype) != dtype or device(tensor) != where:
                    raise ValueError(
                        f"the state is {_kind(tensor)}, the model {_kind(like)}; convert it: "
                        "state.to(model)."
                    )
        for name in COUNTS:
            if getattr(self, name).shape != (b,) or (getattr(self, name) < 0).any():
                raise ValueError(
                    f"the state's {name} is {shown(getattr(self, name))}; expected [{b}] >= 0."
                )
        rooms = {
            "queue_length": min((t.shape[1] for t in self.temporary_memory), default=0),
            "row_length": min(t.shape[2] for t in self.keys + self.values),
        }
        for name, room in rooms.items():
            if getattr(self, name).max() > room:
                raise ValueError(
                    f"the state's {name} is {shown(getattr(self, name))}, more than the {room} "
                    "slots it holds; the file or the state was changed."
                )
        rules = {
            "queue_length at most temporary_memory_size": self.queue_length
            <= config.memory.temporary_memory_size,
            "tokens at least open_tokens + chunks": self.tokens >= self.open_tokens + self.chunks,
            "row_length at least open_tokens": self.row_length >= self.open_tokens,
            "a row where open_tokens": (self.row_length > 0) == (self.open_tokens > 0),
            "closed chunks where text is closed": (self.chunks > 0)
            == (self.tokens > self.open_tokens),
            "row_length the slots of its memories and its text": self._fits_row(config.memory),
        }
        for rule, holds in rules.items():
            if not holds.all():
                raise ValueError(
                    f"the state breaks the rule {rule!r} in sequences "
                    f"{shown(np.flatnonzero(~holds).tolist())}; the file or the state was changed."
                )
