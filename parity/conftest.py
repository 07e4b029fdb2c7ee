"""Profiles and options of the parity suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from fast import BackboneConfig, CoMeTConfig, MemoryConfig

COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("default", max_examples=100, **COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, database=None, **COMMON)
settings.register_profile("faults", max_examples=60, derandomize=True, database=None, **COMMON)
settings.register_profile("thorough", max_examples=3000, **COMMON)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)

torch.set_num_threads(1)  # the models are tiny: a second thread only costs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of recorded cases, with a manifest.json (default: parity/golden)",
    )


@pytest.fixture
def make_config():
    """A small config with both memories, and fields changed by name."""

    def make(backbone: dict | None = None, memory: dict | None = None) -> CoMeTConfig:
        return CoMeTConfig(
            BackboneConfig(
                **{
                    "vocab_size": 11,
                    "hidden_size": 6,
                    "intermediate_size": 8,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 4,
                    "qk_norm": True,
                    **(backbone or {}),
                }
            ),
            MemoryConfig(
                **{
                    "chunk_size": 4,
                    "global_memory_size": 2,
                    "temporary_memory_size": 3,
                    "compression_stride": 2,
                    **(memory or {}),
                }
            ),
        )

    return make
