"""The strategies reach every corner that the design names: a property is as deep as its inputs."""

import dataclasses

import pytest
from hypothesis import Phase, find, given, settings

from reference import BackboneConfig, MemoryConfig, stream
from reference.config import GATES

from .strategies import cases, configs, queue_entries, random_weights

pytestmark = pytest.mark.host


def chunk(case):
    return case[0].memory.chunk_size


def entries(case):
    return queue_entries(case[0], len(case[2]))


CORNERS = {
    "shorter than a chunk": lambda c: len(c[2]) < chunk(c) - 1,
    "k * chunk - 1": lambda c: chunk(c) > 2 and len(c[2]) % chunk(c) == chunk(c) - 1,
    "k * chunk": lambda c: len(c[2]) > chunk(c) > 2 and len(c[2]) % chunk(c) == 0,
    "k * chunk + 1": lambda c: len(c[2]) > chunk(c) > 2 and len(c[2]) % chunk(c) == 1,
    "three chunks and more": lambda c: len(c[2]) > 3 * chunk(c),
    "one token": lambda c: len(c[2]) == 1,
    "a chunk of one token": lambda c: chunk(c) == 1 and len(c[2]) > 1,
    "queue empty": lambda c: c[0].memory.has_temporary and entries(c) == 0,
    "queue not full": lambda c: 0 < entries(c) < c[0].memory.temporary_memory_size,
    "queue exactly full": lambda c: (
        len(c[2]) > chunk(c) and entries(c) == c[0].memory.temporary_memory_size
    ),
    "queue overflows by less than a chunk": lambda c: (
        0 < entries(c) - c[0].memory.temporary_memory_size < chunk(c)
    ),
    "queue overflows by more than a chunk": lambda c: (
        entries(c) - c[0].memory.temporary_memory_size > chunk(c)
    ),
    "stride does not divide the chunk": lambda c: (
        c[0].memory.has_temporary and chunk(c) > c[0].memory.compression_stride
        and chunk(c) % c[0].memory.compression_stride != 0
    ),
    "stride exceeds the chunk": lambda c: c[0].memory.compression_stride > chunk(c),
    "no global memory": lambda c: not c[0].memory.has_global and c[0].memory.has_temporary,
    "no temporary memory": lambda c: c[0].memory.has_global and not c[0].memory.has_temporary,
    "no memory": lambda c: not c[0].memory.has_global and not c[0].memory.has_temporary,
    "vector gate": lambda c: c[0].memory.has_global and c[0].memory.gate == "vector",
    "saturating gate with a bias": lambda c: (
        c[0].memory.has_global and c[0].memory.gate_bias and c[0].memory.gate_saturation < 1
    ),
    "published inference": lambda c: not c[0].memory.trailing_compression,
    "one layer": lambda c: c[0].backbone.num_hidden_layers == 1,
    "three layers": lambda c: c[0].backbone.num_hidden_layers == 3,
    "one head": lambda c: c[0].backbone.num_attention_heads == 1,
    "grouped heads": lambda c: (
        c[0].backbone.num_attention_heads > c[0].backbone.num_key_value_heads > 1
    ),
    "Qwen3": lambda c: c[0].backbone.qk_norm and not c[0].backbone.attention_bias,
    "Qwen2": lambda c: c[0].backbone.attention_bias and not c[0].backbone.qk_norm,
    "layers without rotation beside others": lambda c: (
        0 < len(c[0].backbone.unrotated_layers) < c[0].backbone.num_hidden_layers
    ),
    "a sink before a memory of several chunks": lambda c: (
        c[0].memory.sink_slot and len(c[2]) > 2 * chunk(c)
    ),
    "tied": lambda c: c[0].backbone.tie_word_embeddings,
    "scaled positions": lambda c: c[0].backbone.rope_scaling is not None,
}  # fmt: skip


@pytest.mark.parametrize("corner", CORNERS)
def test_a_corner_is_reached(corner):
    """One case in twenty is in the rarest, so 300 are enough; `find` raises where there is none."""
    few = settings(max_examples=300, database=None, derandomize=True, phases=[Phase.generate])
    find(cases(), CORNERS[corner], settings=few)


@given(cases())
def test_the_queue_s_entries_are_counted_right(case):
    config, seed, ids = case
    params = random_weights(config, seed)
    state = stream.read(ids, stream.new_state(config), params, config)[-1]
    kept = len(state.temporary_memory[0]) if config.memory.has_temporary else 0
    assert kept == min(entries(case), config.memory.temporary_memory_size)


FIELDS = [
    (part, field.name)
    for part, kind in (("backbone", BackboneConfig), ("memory", MemoryConfig))
    for field in dataclasses.fields(kind)
    if field.name != "vocab_size"  # texts are drawn in one alphabet
]


@pytest.mark.parametrize(("part", "name"), FIELDS)
def test_every_field_of_a_config_is_drawn(part, name):
    """A field that is never drawn is never tested: a new gate, say, written wrong in one tree."""
    seen = set()

    def is_new(config):
        seen.add(repr(getattr(getattr(config, part), name)))
        return len(seen) > 1

    once = settings(max_examples=1000, database=None, phases=[Phase.generate])
    find(configs(), is_new, settings=once)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_drawn(gate):
    """With a global memory that keeps something from chunk to chunk."""

    def has(case):
        return (
            case[0].memory.gate == gate
            and case[0].memory.has_global
            and len(case[2]) > 2 * chunk(case)
        )

    find(cases(), has, settings=settings(max_examples=300, database=None, phases=[Phase.generate]))
