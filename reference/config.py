"""What a CoMeT model is made of: two frozen, validated dataclasses and their JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_integer(owner: Any, name: str, least: int) -> None:
    value = getattr(owner, name)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    _require(
        is_integer and value >= least,
        f"{type(owner).__name__}.{name} is {value!r}; expected an integer of at least {least}.",
    )


def _require_number(owner: Any, name: str, least: float, most: float = math.inf) -> None:
    value = getattr(owner, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(
        is_number and math.isfinite(value) and least < value <= most,
        f"{type(owner).__name__}.{name} is {value!r}; expected a finite number above {least}"
        + (f" and at most {most}." if most < math.inf else "."),
    )


def _require_flag(owner: Any, name: str) -> None:
    value = getattr(owner, name)
    _require(
        isinstance(value, bool),
        f"{type(owner).__name__}.{name} is {value!r}; expected True or False.",
    )


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

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # the caller may change its own
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        ):
            _require_integer(self, name, 1)
        _require_integer(self, "head_dim", 2)
        _require(
            self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}; expected an even number, for rotary pairs.",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads is {self.num_attention_heads}, which num_key_value_heads "
            f"{self.num_key_value_heads} does not divide; choose a divisor.",
        )
        _require_number(self, "rms_norm_eps", 0.0)
        _require_number(self, "rope_theta", 0.0)
        for name in ("qk_norm", "attention_bias", "tie_word_embeddings"):
            _require_flag(self, name)
        if self.rope_scaling is not None:
            self._check_rope_scaling(self.rope_scaling)

    @staticmethod
    def _check_rope_scaling(scaling: dict[str, Any]) -> None:
        _require(
            isinstance(scaling, dict) and scaling.get("rope_type") in ROPE_TYPES,
            f"rope_scaling is {scaling!r}; expected None or a dict whose rope_type is one of "
            f"{sorted(ROPE_TYPES)}.",
        )
        for name in ROPE_TYPES[scaling["rope_type"]]:
            value = scaling.get(name)
            _require(
                isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0,
                f"rope_scaling[{name!r}] is {value!r}; rope_type {scaling['rope_type']!r} needs a "
                "positive number there.",
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
    """Rank r of the residual adapter of each memory."""

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

    def __post_init__(self) -> None:
        _require_integer(self, "chunk_size", 1)
        _require_integer(self, "global_memory_size", 0)
        _require_integer(self, "temporary_memory_size", 0)
        _require_integer(self, "compression_stride", 0)
        _require_integer(self, "adapter_rank", 1)
        _require(
            self.compression_stride == 0 or self.temporary_memory_size >= 1,
            f"temporary_memory_size is {self.temporary_memory_size} with compression_stride "
            f"{self.compression_stride}; give the queue at least one slot, or turn it off with "
            "compression_stride=0.",
        )
        _require(
            self.gate in ("scalar", "vector"),
            f"gate is {self.gate!r}; expected 'scalar' or 'vector'.",
        )
        _require_number(self, "gate_saturation", 0.0, 1.0)
        _require_number(self, "temporary_norm_eps", 0.0)
        if self.global_norm_eps is not None:
            _require_number(self, "global_norm_eps", 0.0)
        for name in ("gate_bias", "trailing_compression"):
            _require_flag(self, name)

    @property
    def has_global(self) -> bool:
        """Whether there is a global memory."""
        return self.global_memory_size > 0

    @property
    def has_temporary(self) -> bool:
        """Whether there is a temporary memory."""
        return self.compression_stride > 0


@dataclass(frozen=True)
class CoMeTConfig:
    """A whole model: `CoMeTConfig(backbone=BackboneConfig(...), memory=MemoryConfig(...))`."""

    backbone: BackboneConfig
    """The transformer."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The memories."""

    def __post_init__(self) -> None:
        _require(
            isinstance(self.backbone, BackboneConfig),
            f"backbone is a {type(self.backbone).__name__}; expected a BackboneConfig.",
        )
        _require(
            isinstance(self.memory, MemoryConfig),
            f"memory is a {type(self.memory).__name__}; expected a MemoryConfig.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of every field, fit for JSON."""
        return dataclasses.asdict(self)

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
    _require(
        isinstance(data, dict),
        f"{kind.__name__} is {type(data).__name__} in the config; expected a dict of its fields.",
    )
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - known)
    _require(
        not unknown,
        f"{kind.__name__} has no field {', '.join(unknown)}; known are {', '.join(sorted(known))}.",
    )
    required = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(data))
    _require(not missing, f"{kind.__name__} lacks {', '.join(missing)}; give every field.")
    return kind(**data)
