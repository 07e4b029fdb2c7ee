"""Hostile files, calls and command lines."""

from fast import CoMeTConfig


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
