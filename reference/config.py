"""What a CoMeT model is made of: two frozen, validated dataclasses and their JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rope_scaling, and the numbers that each needs."""

Check = Callable[[Any], str | None]
"""What a field may hold: called with a value, it returns None, or the words for what it expected."""


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)  # True is an int in Python


def _expect(words: str, fits: Callable[[Any], bool]) -> Check:
    return lambda value: None if fits(value) else words


MOST = 2**48
"""The largest size: more is a damaged file, and overflows what counts in 64 bits."""


def _integer(least: int) -> Check:
    words = f"an integer of at least {least}"
    whole = f"{words} and at most {MOST}"
    return lambda v: words if not _is_number(v, int) or v < least else (whole if v > MOST else None)


def _number(above: float, most: float = math.inf) -> Check:
    words = f"a finite number above {above}" + (f" and at most {most}" if most < math.inf else "")
    return _expect(
        words, lambda v: _is_number(v, int, float) and above < v <= most and v < math.inf
    )


def _optional(check: Check) -> Check:
    return lambda v: None if v is None or check(v) is None else f"None or {check(v)}"


def _rope_scaling(value: Any) -> str | None:
    kind = value.get("rope_type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        return f"a dict whose rope_type is one of {sorted(ROPE_TYPES)}"
    for name in ROPE_TYPES[kind]:
        if words := _number(0.0)(value.get(name)):
            return f"a dict with {words} under {name!r}, which rope_type {kind!r} needs"
    return None


def _layers(value: Any) -> str | None:
    fits = isinstance(value, tuple) and all(_is_number(v, int) and v >= 0 for v in value)
    return None if fits and sorted(set(value)) == list(value) else "a tuple of layers, in order"


_FLAG = _expect("True or False", lambda v: isinstance(v, bool))
_EVEN = _expect(
    "an even number of at least 2, for rotary pairs",
    lambda v: _is_number(v, int) and 2 <= v <= MOST and v % 2 == 0,
)

BACKBONE_CHECKS: dict[str, Check] = {
    "vocab_size": _integer(1),
    "hidden_size": _integer(1),
    "intermediate_size": _integer(1),
    "num_hidden_layers": _integer(1),
    "num_attention_heads": _integer(1),
    "num_key_value_heads": _integer(1),
    "head_dim": _EVEN,
    "rms_norm_eps": _number(0.0),
    "rope_theta": _number(0.0),
    "rope_scaling": _optional(_rope_scaling),
    "qk_norm": _FLAG,
    "attention_bias": _FLAG,
    "tie_word_embeddings": _FLAG,
    "unrotated_layers": _layers,
}

GATES = ("scalar", "vector")
"""Kinds of gate."""

MEMORY_CHECKS: dict[str, Check] = {
    "chunk_size": _integer(1),
    "global_memory_size": _integer(0),
    "temporary_memory_size": _integer(0),
    "compression_stride": _integer(0),
    "adapter_rank": _integer(1),
    "gate": _expect(" or ".join(map(repr, GATES)), lambda v: v in GATES),
    "gate_bias": _FLAG,
    "gate_saturation": _number(0.0, 1.0),
    "trailing_compression": _FLAG,
    "global_norm_eps": _optional(_number(0.0)),
    "temporary_norm_eps": _number(0.0),
    "sink_slot": _FLAG,
}


LATER: dict[str, Any] = {"unrotated_layers": [], "sink_slot": False}
"""Fields that came after saved states and checkpoints did, and what held before, as `to_dict` has
it. With that value a config is the one that it was, and a file that lacks the field means it."""


def _check_fields(config: Any, checks: Mapping[str, Check]) -> None:
    """Raise a ValueError for the first field whose value its check refuses."""
    for name, value in vars(config).items():
        if words := checks[name](value):
            raise ValueError(f"{type(config).__name__}.{name} is {value!r}; expected {words}.")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class BackboneConfig:
    """The decoder-only transformer that CoMeT plugs into. Field names are Hugging Face's."""

    vocab_size: int
    """Number of token ids: a text is integers in [0, vocab_size)."""

    hidden_size: int
    """Width d of the residual stream."""

    intermediate_size: int
    """Width of the SwiGLU product."""

    num_hidden_layers: int
    """Number of decoder layers, each with memories of its own."""

    num_attention_heads: int
    """Number of query heads."""

    num_key_value_heads: int
    """Number of key and value heads; divides num_attention_heads (grouped-query attention)."""

    head_dim: int
    """Width of one head; even, because rotary positions turn pairs."""

    rms_norm_eps: float = 1e-6
    """Added to the mean square in the decoder layer's norms and in q/k norm."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies theta ** (-2j / head_dim)."""

    rope_scaling: dict[str, Any] | None = None
    """Change of the rotary frequencies: None, or a dict with "rope_type" one of ROPE_TYPES."""

    qk_norm: bool = False
    """RMSNorm of every query and key head before rotation (Qwen3)."""

    attention_bias: bool = False
    """Bias in the q, k and v projections (Qwen2)."""

    tie_word_embeddings: bool = False
    """The output projection is the embedding table itself."""

    unrotated_layers: tuple[int, ...] = ()
    """Layers, from 0 and in order, whose queries and keys are not rotated (SmolLM3)."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # the caller may change its own
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))
        if isinstance(self.unrotated_layers, list):  # as JSON has it
            object.__setattr__(self, "unrotated_layers", tuple(self.unrotated_layers))
        _check_fields(self, BACKBONE_CHECKS)
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads is {self.num_attention_heads}, which num_key_value_heads "
            f"{self.num_key_value_heads} does not divide; choose a divisor.",
        )
        last = max(self.unrotated_layers, default=0)
        _require(
            last < self.num_hidden_layers,
            f"unrotated_layers names layer {last}, num_hidden_layers is "
            f"{self.num_hidden_layers}; layers are counted from 0.",
        )


@dataclass(frozen=True)
class MemoryConfig:
    """The two memories, and how text is cut into chunks. Sizes are in tokens or slots."""

    chunk_size: int = 2048
    """Text tokens a chunk holds before the next token closes it."""

    global_memory_size: int = 512
    """Slots m of the global memory; 0 turns it off."""

    temporary_memory_size: int = 2048
    """Slots B that the FIFO queue of the temporary memory holds at most."""

    compression_stride: int = 8
    """Text tokens s per compression token; 0 turns the temporary memory off."""

    adapter_rank: int = 8
    """Rank of the residual adapter of each memory."""

    gate: str = "scalar"
    """"scalar": one gate value per slot (published). "vector": one per slot and channel."""

    gate_bias: bool = False
    """Whether the gate has a bias b_g; published checkpoints have none."""

    gate_saturation: float = 1.0
    """The gate is min(1, sigmoid / gate_saturation): below 1 it can keep a slot for good. 1.0 is
    the published gate."""

    trailing_compression: bool = True
    """Whether a closing chunk's last group, full or partial, gets a compression token. True is
    the published training, False reproduces the published inference."""

    global_norm_eps: float | None = None
    """Added to the mean square in the candidate's norm; None is the dtype's machine epsilon
    (float32's for narrower dtypes), as published."""

    temporary_norm_eps: float = 1e-12
    """Added to the mean square in the norm of the temporary memory's entries."""

    sink_slot: bool = False
    """Whether one more slot, learned and the same in every chunk, stands before the global memory
    where a row begins with it. Pretrained models give their first position much attention for
    nothing; this slot can take it. Ours: neither paper nor published code has one."""

    def __post_init__(self) -> None:
        _check_fields(self, MEMORY_CHECKS)
        _require(
            self.compression_stride == 0 or self.temporary_memory_size >= 1,
            f"temporary_memory_size is {self.temporary_memory_size} with compression_stride "
            f"{self.compression_stride}; give the queue at least one slot, or turn it off with "
            "compression_stride=0.",
        )
        _require(
            not self.sink_slot or self.has_global,
            "sink_slot is True with global_memory_size 0; it stands before the global memory, so "
            "give that at least one slot, or leave it out.",
        )

    @property
    def has_global(self) -> bool:
        """Whether there is a global memory."""
        return self.global_memory_size > 0

    @property
    def global_slots(self) -> int:
        """Slots that a row begins with where there is a global state: G's, the sink among them."""
        return self.global_memory_size + self.sink_slot

    @property
    def has_temporary(self) -> bool:
        """Whether there is a temporary memory."""
        return self.compression_stride > 0


CONFIG_CHECKS: dict[str, Check] = {
    "backbone": _expect("a BackboneConfig", lambda v: isinstance(v, BackboneConfig)),
    "memory": _expect("a MemoryConfig", lambda v: isinstance(v, MemoryConfig)),
}


@dataclass(frozen=True)
class CoMeTConfig:
    """A whole model: `CoMeTConfig(backbone=BackboneConfig(...), memory=MemoryConfig(...))`."""

    backbone: BackboneConfig
    """The transformer."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The memories."""

    def __post_init__(self) -> None:
        _check_fields(self, CONFIG_CHECKS)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of every field, fit for JSON."""
        data = dataclasses.asdict(self)
        data["backbone"]["unrotated_layers"] = list(self.backbone.unrotated_layers)
        return data

    def to_json(self) -> str:
        """JSON text, indented, that `from_json` turns back into an equal config."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> CoMeTConfig:
        """Config from the nested dict of `to_dict`.

        Raises:
            ValueError: a section or field is missing, unknown, or has a bad value.
        """
        _require(
            isinstance(data, dict) and set(data) == {"backbone", "memory"},
            "a config is a dict with the keys 'backbone' and 'memory'; found "
            f"{sorted(data) if isinstance(data, dict) else type(data).__name__}.",
        )
        return cls(
            backbone=_section(BackboneConfig, data["backbone"]),
            memory=_section(MemoryConfig, data["memory"]),
        )

    @classmethod
    def from_json(cls, text: str) -> CoMeTConfig:
        """Config from the JSON text of `to_json`.

        Raises:
            ValueError: not JSON, or not a config (see `from_dict`).
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"config is not JSON: {error}.") from error
        return cls.from_dict(data)


def _section(kind: type, data: Any) -> Any:
    """One of the two configs from a dict of its fields."""
    _require(
        isinstance(data, dict),
        f"{kind.__name__} is {type(data).__name__} in the config; expected a dict of its fields.",
    )
    fields = dataclasses.fields(kind)
    known = sorted(f.name for f in fields)
    unknown = sorted(set(data) - set(known))
    _require(
        not unknown,
        f"{kind.__name__} has no field {', '.join(unknown)}; known are {', '.join(known)}.",
    )
    missing = sorted(f.name for f in fields if f.default is MISSING and f.name not in data)
    _require(
        not missing, f"{kind.__name__} lacks {', '.join(missing)}; only fields with a default may."
    )
    return kind(**data)
