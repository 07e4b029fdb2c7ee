"""The stream's state: an explicit value that can be saved, loaded, forked and selected from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reference.config import CoMeTConfig

from .files import atomic_save

if TYPE_CHECKING:
    from .model import CoMeTModel

__all__ = ["CoMeTState"]

COUNTS = ("tokens", "chunks", "open_tokens", "row_length", "queue_length")
TENSORS = ("global_state", "temporary_memory", "keys", "values")


def fingerprint(config: CoMeTConfig) -> str:
    """Short name of a model's shape; states fit models of an equal config."""
    canonical = json.dumps(_plain(config.to_dict()), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Nested dicts with every number a float, since 10000 equals 10000.0 but is written otherwise."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else value


@dataclass(frozen=True)
class CoMeTState:
    """Where a batch of streams stands. Nothing else remembers anything, and no call changes one.

    Counts are NumPy [b] int64 on the host, so that planning a call needs no device. Tensors are
    one a layer.
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

    global_state: tuple[Tensor, ...]
    """Per layer [b, m, d], S. Zeros before the first chunk closes. Empty tuple where m = 0."""

    temporary_memory: tuple[Tensor, ...]
    """Per layer [b, q, d], T, oldest first; row i's entries are its first `queue_length[i]`. An
    entry joins as its compression token is read; the open chunk's row was made before. Empty
    tuple where s = 0."""

    keys: tuple[Tensor, ...]
    """Per layer [b, k, p, e], rotated keys of the open chunk's row, index = position. Empty tuple
    where no chunk is open."""

    values: tuple[Tensor, ...]
    """Per layer [b, k, p, e], its values."""

    @property
    def batch_size(self) -> int:
        """Sequences in the batch."""
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors: bounded by the config, unless chunks never close."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{layer}": tensor
            for name in TENSORS
            for layer, tensor in enumerate(getattr(self, name))
        }

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> CoMeTState:
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
        if copies < 1:
            raise ValueError(f"copies is {copies}; expected at least 1.")
        counts: dict[str, Any] = {name: np.repeat(getattr(self, name), copies) for name in COUNTS}
        forked = self.map_tensors(lambda t: t.repeat_interleave(copies, dim=0))
        return dataclasses.replace(forked, **counts)

    def select(self, rows: Sequence[int]) -> CoMeTState:
        """The state of some of the sequences, in the order given.

        Args:
            rows: indices into the batch; one may be named more than once.

        Returns:
            State of batch size len(rows), which shares no memory with this one.

        Raises:
            ValueError: no index, or one outside the batch.
        """
        index = np.asarray(rows)
        if (
            index.ndim != 1
            or not np.issubdtype(index.dtype, np.integer)
            or index.size == 0
            or index.min() < 0
            or index.max() >= self.batch_size
        ):
            raise ValueError(
                f"rows is {rows}; expected integer indices in [0, {self.batch_size}), at least one."
            )
        counts = {name: getattr(self, name)[index] for name in COUNTS}
        chosen = torch.from_numpy(index)
        picked = self.map_tensors(lambda t: t.index_select(0, chosen.to(t.device)))
        slots, row = int(counts["queue_length"].max()), int(counts["row_length"].max())
        return dataclasses.replace(
            picked,
            **counts,
            temporary_memory=tuple(t[:, :slots] for t in picked.temporary_memory),
            keys=tuple(k[:, :, :row] for k in picked.keys) if row else (),
            values=tuple(v[:, :, :row] for v in picked.values) if row else (),
        )

    def to(self, model: CoMeTModel) -> CoMeTState:
        """The same state on a model's device and in its dtype."""
        return self.map_tensors(lambda t: t.to(model.device, model.dtype))

    def detach(self) -> CoMeTState:
        """The same state, through which no gradient flows back."""
        return self.map_tensors(Tensor.detach)

    def forget_temporary(self, rows: Sequence[bool] | np.ndarray | None = None) -> CoMeTState:
        """The state with an empty queue: what is read next must come from the global memory.

        Args:
            rows: [b] which sequences forget; None is all. Those have no open chunk.

        Raises:
            ValueError: a chunk is open, whose row has seen the queue already.
        """
        forget = np.ones(self.batch_size, bool) if rows is None else np.asarray(rows)
        if forget.shape != (self.batch_size,) or forget.dtype != bool:
            raise ValueError(f"rows is {rows}; expected {self.batch_size} times True or False.")
        if (self.row_length[forget] > 0).any():
            raise ValueError(
                "a chunk is open and its row already holds the queue; close it first "
                "(model.close_chunk)."
            )
        return dataclasses.replace(self, queue_length=np.where(forget, 0, self.queue_length))

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file; an existing file is replaced whole or not at
        all.

        Args:
            path: file to write.
        """
        counts = {f"count.{name}": torch.from_numpy(getattr(self, name)) for name in COUNTS}
        tensors = counts | self._tensors()
        header = {"format": "comet-state", "version": "1", "model": self.model}
        # Copies: safetensors refuses tensors that share memory, as a new state's counts do.
        atomic_save(Path(path), {name: t.detach().clone() for name, t in tensors.items()}, header)

    @classmethod
    def load(cls, path: str | Path, model: CoMeTModel) -> CoMeTState:
        """Read a state that `save` wrote, onto the model's device and in its dtype.

        Args:
            path: file to read.
            model: the model that it will be used with.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a state, cut short, or of a model of another config.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}); it may be cut short. "
                "Save the state again."
            ) from error
        if header.get("format") != "comet-state" or header.get("version") != "1":
            raise ValueError(
                f"{path} is not a CoMeT state (header {json.dumps(header)}); expected a file "
                "written by CoMeTState.save."
            )
        state = cls._from_tensors(header.get("model", ""), tensors, str(path))
        state = state.to(model)
        state.check(model.config, state.batch_size, model.dtype, model.device)
        return state

    @classmethod
    def _from_tensors(cls, model: str, tensors: dict[str, Tensor], origin: str) -> CoMeTState:
        counts: dict[str, Any] = {}
        for name in COUNTS:
            count = tensors.pop(f"count.{name}", None)
            if count is None or count.dtype != torch.int64 or count.dim() != 1 or not len(count):
                raise ValueError(
                    f"{origin} lacks count.{name} as int64 of one dimension; it is not a whole state."
                )
            counts[name] = count.numpy()
        grouped: dict[str, Any] = {}
        for name in TENSORS:
            layers = sum(key.rpartition(".")[0] == name for key in tensors)
            found = [tensors.pop(f"{name}.{layer}", None) for layer in range(layers)]
            if any(tensor is None for tensor in found):
                raise ValueError(f"{origin} lacks layers of {name}; it is not a whole state.")
            grouped[name] = tuple(found)
        if tensors:
            raise ValueError(f"{origin} holds {sorted(tensors)}, which no state has.")
        if not all(t.isfinite().all() for name in TENSORS for t in grouped[name]):
            raise ValueError(
                f"{origin} holds NaN or infinity; the stream was lost before it was saved."
            )
        return cls(model=model, **counts, **grouped)

    def check(
        self,
        config: CoMeTConfig,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raise unless the state fits a model and a batch.

        Raises:
            ValueError: it belongs to another config, batch size, dtype or device, or its parts do
                not fit each other.
        """
        if self.model != fingerprint(config):
            raise ValueError(
                f"the state belongs to a model with config {self.model or '(none)'}, this model's "
                f"is {fingerprint(config)}; use the model that made the state, or start with "
                "model.new_state()."
            )
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
            "keys": (layers if self.row_length.any() else 0, (b, k, None, e)),
            "values": (layers if self.row_length.any() else 0, (b, k, None, e)),
        }
        for name, (number, shape) in expected.items():
            tensors = getattr(self, name)
            if len(tensors) != number:
                raise ValueError(
                    f"the state's {name} has {len(tensors)} layers, expected {number}."
                )
            for tensor in tensors:
                fits = tensor.dim() == len(shape) and all(
                    want is None or have == want
                    for have, want in zip(tensor.shape, shape, strict=True)
                )
                if not fits:
                    raise ValueError(
                        f"the state's {name} has shape {tuple(tensor.shape)}, expected {shape} "
                        "(None: any); the file or the state was changed."
                    )
                if tensor.dtype != dtype or tensor.device != device:
                    raise ValueError(
                        f"the state is {tensor.dtype} on {tensor.device}, the model {dtype} on "
                        f"{device}; convert it: state.to(model)."
                    )
        for name in COUNTS:
            if getattr(self, name).shape != (b,) or (getattr(self, name) < 0).any():
                raise ValueError(
                    f"the state's {name} is {getattr(self, name)}; expected [{b}] >= 0."
                )
        held = {
            "queue_length": min((t.shape[1] for t in self.temporary_memory), default=0),
            "row_length": min((t.shape[2] for t in self.keys + self.values), default=0),
        }
        for name, room in held.items():
            if getattr(self, name).max() > room:
                raise ValueError(
                    f"the state's {name} is {getattr(self, name)}, more than the {room} slots it "
                    "holds; the file or the state was changed."
                )
        agree = {
            "queue_length at most temporary_memory_size": self.queue_length
            <= config.memory.temporary_memory_size,
            "tokens at least open_tokens + chunks": self.tokens >= self.open_tokens + self.chunks,
            "row_length at least open_tokens": self.row_length >= self.open_tokens,
            "a row where open_tokens": (self.row_length > 0) == (self.open_tokens > 0),
        }
        for rule, holds in agree.items():
            if not holds.all():
                raise ValueError(
                    f"the state breaks the rule {rule!r} in sequences "
                    f"{np.flatnonzero(~holds).tolist()}; the file or the state was changed."
                )
