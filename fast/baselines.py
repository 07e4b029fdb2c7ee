"""Other memories on the same backbone and the same chunks: what CoMeT is compared with.

- **Transformer-XL** (arXiv 1901.02860): each layer sees its own inputs of the tokens just before the
  chunk, through which no gradient flows.
- **RMT**, recurrent memory tokens (arXiv 2207.06881): a few vectors stand before the chunk and again
  after it; what the top layer makes of the latter are the next chunk's.
- **ARMT**, its associative form (arXiv 2407.04841): memory tokens after the chunk are written into an
  associative memory of each layer, from which each token of later chunks reads before the layer.

Positions are rotary and count from the row's start, as in CoMeT. `params` and the letters of shapes are
as in `layers`; m are memory tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reference.config import BackboneConfig, CoMeTConfig, MemoryConfig
from reference.parameters import map_parameters, named_parameters, shapes

from .checkpoints import (
    CONFIG,
    MODEL,
    read_header,
    read_json,
    read_tensors,
    refuse_broken,
    take_tensor,
)
from .files import atomic_save, atomic_write
from .inputs import IGNORE, check_choice, check_count
from .layers import (
    Weights,
    decoder_layer,
    for_heads,
    linear,
    look_up,
    project_memory,
    rms_norm,
    rotary_tables,
    tensor_of,
    widen,
)
from .model import predict, shift_labels, sum_of_losses
from .parameters import ParameterTree, to_tensors

__all__ = [
    "KINDS",
    "Baseline",
    "BaselineConfig",
    "BaselineGeneration",
    "BaselineOutput",
    "BaselineState",
    "dpfp",
    "is_baseline",
    "read_associations",
    "write_associations",
]

KINDS = ("transformer-xl", "rmt", "armt")
"""What there is."""

EPSILON = 1e-5
"""Added to what divides a reading of an associative memory."""


@dataclass(frozen=True)
class BaselineConfig:
    """A backbone, its chunks, and a memory."""

    kind: str
    """One of `KINDS`."""

    backbone: BackboneConfig

    chunk_size: int
    """Text tokens of a chunk."""

    slots: int
    """Tokens that a layer sees of the text before (Transformer-XL); memory tokens (RMT, ARMT)."""

    key_size: int = 16
    """Of ARMT: numbers of a key, before `dpfp` makes 2 `order` times as many of them."""

    order: int = 3
    """Of ARMT's `dpfp`."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        for name in ("chunk_size", "slots", "key_size", "order"):
            check_count(name, getattr(self, name), 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return own | {"backbone": self.plain.to_dict()["backbone"]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BaselineConfig:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: a field is unknown, missing, or has a bad value.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(data) != names:
            wrong = sorted(set(data) ^ names)
            raise ValueError(f"a baseline's config has the fields {sorted(names)}, not {wrong}.")
        plain = {"chunk_size": 1, "global_memory_size": 0, "compression_stride": 0}
        backbone = CoMeTConfig.from_dict({"backbone": data["backbone"], "memory": plain}).backbone
        return cls(**data | {"backbone": backbone})

    @property
    def memory(self) -> MemoryConfig:
        """The chunks, without CoMeT's memories."""
        return self.plain.memory

    @property
    def plain(self) -> CoMeTConfig:
        """The backbone alone."""
        memory = MemoryConfig(
            chunk_size=self.chunk_size, global_memory_size=0, compression_stride=0
        )
        return CoMeTConfig(self.backbone, memory)

    @property
    def state_numbers(self) -> int:
        """Numbers that a stream's memory holds, whatever it has read."""
        d, layers = self.backbone.hidden_size, self.backbone.num_hidden_layers
        if self.kind == "rmt":
            return self.slots * d
        if self.kind == "armt":
            return layers * 2 * self.order * self.key_size * (d + 1)
        return layers * self.slots * d

    def shapes(self) -> dict[str, Any]:
        """Names and shapes of the weights: the backbone's, and those of the memory."""
        tree, d = shapes(self.plain), self.backbone.hidden_size
        if self.kind != "transformer-xl":
            tree["memory_embeddings"] = (self.slots, d)
        if self.kind == "armt":
            own = {"memory_q_proj": (self.key_size, d), "memory_k_proj": (self.key_size, d)}
            own |= {"memory_v_proj": (d, d), "memory_beta_proj": (1, d)}
            tree["layers"] = [layer | own for layer in tree["layers"]]
        return tree


def dpfp(x: Tensor, order: int) -> Tensor:
    """Deterministic parameter-free projection: products of rectified numbers and their neighbours.

    Args:
        x: [..., k].
        order: how far a neighbour is, at most.

    Returns:
        [..., 2 order k], none of them negative.

    Source: arXiv 2102.11174.
    """
    both = F.relu(torch.cat([x, -x], dim=-1))
    return torch.cat([both * both.roll(j, dims=-1) for j in range(1, order + 1)], dim=-1)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def read_associations(
    hidden: Tensor, memory: tuple[Tensor, Tensor], weights: Weights, order: int
) -> Tensor:
    """What an associative memory holds for each slot: A^T q / (<z, q> + eps), q = phi(W_q h).

    Args:
        hidden: [b, n, d].
        memory: A [b, k, d] and z [b, k].
        weights: a layer's "memory_q_proj".
        order: of `dpfp`, whose result has unit length here: phi.

    Returns:
        [b, n, d], zero while nothing is held.
    """
    queries = _unit(dpfp(linear(hidden, weights["memory_q_proj"]), order))
    return _look_up(queries, memory)


def _look_up(keys: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
    values, normalizer = memory
    return (keys @ values) / ((keys @ normalizer[..., None]) + EPSILON)


def write_associations(
    tokens: Tensor, memory: tuple[Tensor, Tensor], weights: Weights, order: int
) -> tuple[Tensor, Tensor]:
    """The memory after it has got what memory tokens say, by the delta rule.

    A + sum beta k (v - held(k))^T, where held(k) is what k gives so far; z + sum gamma k, where gamma is
    the share of k that is new, 1 - <z, k>, cut to [0, 1]. No gradient flows through gamma.

    Args:
        tokens: [b, m, d], the layer's output at the memory tokens.
        memory: as in `read_associations`.
        weights: a layer's "memory_k_proj", "memory_v_proj", "memory_beta_proj".
        order: of `dpfp`.

    Returns:
        A and z.
    """
    values, normalizer = memory
    keys = _unit(dpfp(linear(tokens, weights["memory_k_proj"]), order))
    new = linear(tokens, weights["memory_v_proj"]) - _look_up(keys, memory)
    beta = torch.sigmoid(linear(tokens, weights["memory_beta_proj"]))
    gamma = (1 - keys @ normalizer[..., None]).clamp(0, 1).detach()
    return values + keys.mT @ (beta * new), normalizer + (gamma * keys).sum(dim=1)


@dataclass(frozen=True)
class BaselineOutput:
    """What a call returns: as `CoMeTOutput`, of a baseline's state."""

    state: BaselineState
    logits: Tensor | None
    loss: Tensor | None


@dataclass(frozen=True)
class BaselineGeneration:
    """What `generate` returns."""

    ids: list[list[int]]
    """New tokens of every sequence, the stop token included where one was reached."""


@dataclass(frozen=True)
class BaselineState:
    """Where streams stand that are alike: a value, as `CoMeTState` is."""

    memory: tuple[Tensor, ...]
    """Of Transformer-XL, a layer's inputs [b, up to slots, d] each; of RMT, one [b, m, d], or none before
    the first chunk has closed; of ARMT, A [b, k, d] and z [b, k] of each layer."""

    ids: Tensor
    """[b, n] tokens of the open chunk: they are read again in each call."""

    def select(self, rows: Sequence[int]) -> BaselineState:
        """The streams of some rows, which may be named more than once."""
        index = torch.as_tensor(rows, device=self.ids.device)
        return BaselineState(tuple(t[index] for t in self.memory), self.ids[index])

    def detach(self) -> BaselineState:
        """The state through which no gradient flows back."""
        return BaselineState(tuple(t.detach() for t in self.memory), self.ids)


class Baseline(nn.Module):
    """A model with the stream's face: `model(ids, state=state)`, and `generate`.

    Sequences of a batch are alike, except in a call that ends them: where `lengths` differ, all text of
    the call stays in the open chunk, however long it gets, and the state is not to be read on from.

    Args:
        config: the model.
        weights: nested dict of tensors under the names of `BaselineConfig.shapes`; None starts at random
            as CoMeT does.
        seed: of the random start.
    """

    def __init__(
        self, config: BaselineConfig, weights: dict[str, Any] | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        if weights is None:
            weights = to_tensors(_initialize(config, np.random.default_rng(seed)), torch.float32)
        self.weights = ParameterTree(weights)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.weights["norm"].device

    def new_state(self, batch_size: int = 1) -> BaselineState:
        """The state before any text."""
        backbone, like = self.config.backbone, self.weights["norm"]
        d, layers = backbone.hidden_size, range(backbone.num_hidden_layers)
        memory: tuple[Tensor, ...] = ()
        if self.config.kind == "transformer-xl":
            memory = tuple(like.new_zeros(batch_size, 0, d) for _ in layers)
        elif self.config.kind == "armt":
            k = 2 * self.config.order * self.config.key_size
            memory = tuple(like.new_zeros(batch_size, *s) for _ in layers for s in ((k, d), (k,)))
        none = torch.zeros(batch_size, 0, dtype=torch.int64, device=like.device)
        return BaselineState(memory, none)

    def read_chunk(
        self, ids: Tensor, memory: tuple[Tensor, ...], closes: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One chunk, or what there is of it.

        Args:
            ids: [b, n] its tokens.
            memory: of the chunks before.
            closes: whether the memory after it is asked for; else it is as it was.

        Returns:
            The top layer's output at the tokens, [b, n, d], and the memory.
        """
        hidden = look_up(ids, self.weights["embed_tokens"])
        read = {"transformer-xl": self._read_xl, "rmt": self._read_rmt, "armt": self._read_armt}
        return read[self.config.kind](hidden, memory, closes)

    def _read_xl(
        self, hidden: Tensor, memory: tuple[Tensor, ...], closes: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = []
        for i, past in enumerate(memory):
            joined = torch.cat([past, hidden], dim=1)
            found.append(joined[:, max(joined.shape[1] - self.config.slots, 0) :].detach())
            hidden = self._layer(i, hidden, past)
        return hidden, tuple(found) if closes else memory

    def _read_rmt(
        self, hidden: Tensor, memory: tuple[Tensor, ...], closes: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        start = tensor_of(self.weights["memory_embeddings"])
        before = memory[0] if memory else start.expand(len(hidden), -1, -1)
        m, n = before.shape[1], hidden.shape[1]
        row = torch.cat([before, hidden, before] if closes else [before, hidden], dim=1)
        for i in range(self.config.backbone.num_hidden_layers):
            row = self._layer(i, row)
        if closes:
            norm, eps = self.weights["norm"], self.config.backbone.rms_norm_eps
            memory = (rms_norm(row[:, m + n :], norm, eps),)
        return row[:, m : m + n], memory

    def _read_armt(
        self, hidden: Tensor, memory: tuple[Tensor, ...], closes: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        n, order, found = hidden.shape[1], self.config.order, list[Tensor]()
        if closes:
            start = tensor_of(self.weights["memory_embeddings"])
            hidden = torch.cat([hidden, start.expand(len(hidden), -1, -1)], dim=1)
        for i, weights in enumerate(self.weights["layers"]):
            own = memory[2 * i], memory[2 * i + 1]
            hidden = hidden + read_associations(hidden, own, weights, order)
            hidden = self._layer(i, hidden)
            if closes:
                found += write_associations(hidden[:, n:], own, weights, order)
        return hidden[:, :n], tuple(found) if closes else memory

    def _layer(self, i: int, hidden: Tensor, past: Tensor | None = None) -> Tensor:
        """A decoder layer over a row, after slots that are keys and values alone."""
        backbone, weights = self.config.backbone, self.weights["layers"][i]
        p = 0 if past is None else past.shape[1]
        positions = torch.arange(p + hidden.shape[1], device=hidden.device)[None]
        tables = rotary_tables(positions.cpu(), backbone)[i in backbone.unrotated_layers]
        cos, sin = for_heads(tables)
        cos, sin = (part.to(hidden.device, widen(hidden).dtype) for part in (cos, sin))
        none = hidden.new_zeros(len(hidden), backbone.num_key_value_heads, 0, backbone.head_dim)
        keys, values = none, none
        if past is not None and p:
            keys, values = project_memory(past, (cos[:, :p], sin[:, :p]), weights, backbone)
        rotation = cos[:, p:], sin[:, p:]
        return decoder_layer(hidden, keys, values, positions[:, p:], rotation, weights, backbone)[0]

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        state: BaselineState | None = None,
        logits: str = "all",
        *,
        recompute: str = "none",
    ) -> BaselineOutput:
        """Read text; arguments and result are as `CoMeTModel.forward`'s.

        Args:
            recompute: "none" or "chunks": whether the inside of a chunk is computed again in a backward
                pass.
        """
        state = self.new_state(len(ids)) if state is None else state
        sizes = np.full(len(ids), ids.shape[1]) if lengths is None else np.asarray(lengths)
        alike, old, memory = bool((sizes == ids.shape[1]).all()), state.ids.shape[1], state.memory
        text = torch.cat([state.ids, ids], dim=1)
        pieces = text.split(self.config.chunk_size, dim=1) if alike else (text,)
        read = self.read_chunk
        if recompute == "chunks":
            read = partial(checkpoint, self.read_chunk, use_reentrant=False)
        parts = []
        for i, piece in enumerate(pieces):
            hidden, memory = read(piece, memory, i + 1 < len(pieces))
            parts.append(hidden)
        hidden = torch.cat(parts, dim=1)[:, old:]
        loss = found = None
        if labels is not None:
            targets = shift_labels(labels, sizes)
            wanted = targets != IGNORE
            nats = sum_of_losses(self._predict(hidden[wanted]), targets[wanted])
            loss = nats / wanted.sum()
        if logits == "all":
            found = self._predict(hidden)
        elif logits == "last":
            rows = torch.arange(len(ids), device=ids.device)
            found = self._predict(hidden[rows, torch.as_tensor(sizes - 1, device=ids.device)])[
                :, None
            ]
        return BaselineOutput(BaselineState(memory, pieces[-1]), found, loss)

    def _predict(self, hidden: Tensor) -> Tensor:
        return predict(hidden, self.weights, self.config.plain)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        state: BaselineState | None = None,
        max_new_tokens: int = 128,
        stop_ids: Collection[int] = (),
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> BaselineGeneration:
        """Continue texts greedily in the open chunk; see `CoMeTModel.generate`. The chunk is read again
        for each token.
        """
        state = self.new_state(len(ids)) if state is None else state
        sizes = [ids.shape[1]] * len(ids) if lengths is None else [int(n) for n in lengths]
        rows = [
            torch.cat([old, row[:n]]) for old, row, n in zip(state.ids, ids, sizes, strict=True)
        ]
        new: list[list[int]] = [[] for _ in rows]
        running = [max_new_tokens > 0] * len(rows)
        while any(running):
            text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            hidden, _ = self.read_chunk(text, state.memory, False)
            last = torch.tensor([len(row) - 1 for row in rows], device=text.device)
            tokens = self._predict(hidden[torch.arange(len(rows)), last]).argmax(dim=-1)
            for i, token in enumerate(tokens.tolist()):
                if running[i]:
                    new[i].append(token)
                    rows[i] = torch.cat([rows[i], tokens[i : i + 1]])
                    running[i] = token not in stop_ids and len(new[i]) < max_new_tokens
        return BaselineGeneration(new)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each whole or not at all.

        Raises:
            ValueError: a weight holds NaN or infinity; nothing is written.
        """
        tensors = {n: p.detach() for n, p in named_parameters(self.weights.to_dict()).items()}
        refuse_broken(tensors)
        atomic_save(Path(folder) / MODEL, tensors, {"config": self.config.to_dict()})
        atomic_write(Path(folder) / CONFIG, json.dumps(self.config.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Baseline:
        """Read a model that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is cut short or not of this form, or the weights do not fit the config.
        """
        folder = Path(folder)
        data = read_json(folder / CONFIG)
        config = BaselineConfig.from_dict(data)
        if read_header(folder / MODEL).get("config") != data:
            raise ValueError(
                f"{folder / MODEL} was written with another config than {CONFIG} beside it; put back "
                "the one that it came with."
            )
        tensors = read_tensors(folder)

        def take(name: str, shape: tuple[int, ...]) -> Tensor:
            tensor = take_tensor(tensors, name, name, folder)
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} of {folder} has the shape {tuple(tensor.shape)}; the config says {shape}."
                )
            return tensor

        return cls(config, map_parameters(take, config.shapes()))


def _initialize(config: BaselineConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Fresh weights: norms at one, biases at zero, all else at N(0, 0.02), as `reference.parameters`."""

    def start(name: str, shape: tuple[int, ...]) -> np.ndarray:
        leaf = name.rsplit(".", 1)[-1]
        if leaf.endswith("norm"):
            return np.ones(shape)
        return np.zeros(shape) if leaf.endswith("bias") else rng.normal(0.0, 0.02, shape)

    return map_parameters(start, config.shapes())


def is_baseline(folder: str | Path) -> bool:
    """Whether a folder holds what `Baseline.save_pretrained` wrote."""
    config = Path(folder) / CONFIG
    return config.exists() and "kind" in read_json(config)
