"""Documents become tokens piece by piece, and states that a question can be asked of."""

import io
import json
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from fast import CoMeTModel, CoMeTState, MemoryConfig
from fast.__main__ import main
from fast.checkpoints import read_header
from fast.pretrained.text import CONTEXT, ByteText, TokenText, open_text
from fast.reading import Mark, Source, ask, noted_source, read_document, table
from fast.tasks import passkey

from .assertions import assert_near, assert_state_equal

pytestmark = pytest.mark.host

PROSE = (Path(__file__).parent.parent / "docs" / "idea.md").read_text(encoding="utf-8")

MEMORY = MemoryConfig(
    chunk_size=32, global_memory_size=2, temporary_memory_size=8, compression_stride=8
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Llama 3's tokenizer, and much like it Qwen's, parts a text."""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SPECIAL = ["<s>", "<|end|>", "<|user|>", "<|assistant|>"]


@cache
def trained(kind):
    """A tokenizer of 450 tokens, in the manner of a family's."""
    tokenizer = Tokenizer(BPE(byte_fallback=kind == "llama2"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "llama2":  # a text starts with a space, and is not parted at all
        alphabet = []
        prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([prepend, replace])
        first = decoders.Strip(" ", 1, 0)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), first]
        )
    else:
        tokenizer.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        tokenizer.pre_tokenizer = level
    elif kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    elif kind == "llama3":
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)] if kind == "llama2" else []
    trainer = BpeTrainer(
        vocab_size=700 if kind == "llama2" else 450,
        special_tokens=[*SPECIAL, *bytes_],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    # Whole lines, empty ones among them: an unparted text would else become one token.
    lines = PROSE.splitlines() if kind == "llama2" else [PROSE, "a\n\nb\n\n\nc  d\n" * 20]
    tokenizer.train_from_iterator(
        [word for line in lines for word in line.split()] if kind == "llama2" else lines, trainer
    )
    if kind == "llama2":  # bytes are tokens like others, though the trainer takes them as special
        told = json.loads(tokenizer.to_str())
        told["added_tokens"] = [t for t in told["added_tokens"] if t["content"] in SPECIAL]
        tokenizer = Tokenizer.from_str(json.dumps(told))
    if kind == "llama3":
        start = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", start)])
    return tokenizer


def wrapped(kind, template=TEMPLATE):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained(kind), bos_token="<s>", eos_token="<|end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


KINDS = ("gpt2", "smollm", "llama2", "llama3")


def pieces(text, document, size):
    """The tokens of each piece, and where each ends."""
    file, place, found, ends = io.BytesIO(document), 0, [], []
    file.name = "book.txt"
    while place < len(document):
        ids, place = text.read_piece(file, place, size)
        found.append(ids)
        ends.append(place)
    return found, ends


PARTS = ["the", " memory", "\n", "\n\n", "  ", " ", ".", "!\n", "12", "3", "ü", " 日本", "🐳", "'s", "\t",
         "<|end|>", "\r\n", "Of", " chunks", ",", "-", "\u00a0", "\ufeff"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(
    parts=st.lists(st.sampled_from(PARTS), min_size=200, max_size=500), size=st.integers(500, 999)
)
@example(parts=[PROSE], size=512)
@example(parts=["word " * 400], size=700)
@example(parts=["a\n" + "\n" * 300 + " b "] * 5, size=600)
def test_pieces_have_the_tokens_of_the_whole(kind, parts, size):
    groups = ["".join(parts[i : i + 6]) for i in range(0, len(parts), 6)]
    document = " of the ".join(groups).removeprefix("\ufeff")  # with places to cut
    text = TokenText(wrapped(kind))
    found, ends = pieces(text, document.encode(), size)
    assert len(ends) >= len(document.encode()) // (size + 4 * CONTEXT)
    assert list(chain(*found)) == text.encode(document)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["a", "日", "\n", " ", "🐳"])
def test_a_text_without_a_place_to_cut_is_read_all_the_same(kind, unit):
    document, text = unit * 2000, TokenText(wrapped(kind))
    found, ends = pieces(text, document.encode(), 500)
    assert len(ends) > 2
    said = text.tokenizer.decode(list(chain(*found)))
    # Llama 2's puts a space in front of what is encoded alone.
    assert said == document or (kind == "llama2" and said.replace(" ", "") == document.strip(" "))


@pytest.mark.parametrize("text", [ByteText(), TokenText(wrapped("gpt2"))])
def test_no_piece_reads_more_of_a_file_than_its_size(text):
    """However long the file is; and it is the same piece again."""

    class File(io.BytesIO):
        most = 0

        def read(self, size=-1):
            data = super().read(size)
            self.most = max(self.most, len(data))
            return data

    file = File((PROSE * 50).encode())
    first, place = text.read_piece(file, 0, 2000)
    assert 500 < place <= 2000
    assert text.read_piece(file, place, 2000) == text.read_piece(file, place, 2000)
    assert 2000 <= file.most <= 2000 + 4 * CONTEXT


def test_a_mark_of_utf8_is_no_text():
    text = TokenText(wrapped("gpt2"))
    assert pieces(text, b"\xef\xbb\xbfA word.", 500) == ([text.encode("A word.")], [10])


@pytest.mark.parametrize("place", [0, 700, 1234])
def test_a_document_that_is_not_utf8_is_told_with_the_byte(place):
    document = bytearray(b"word " * 300)
    document[place] = 0xFF
    with pytest.raises(ValueError, match=f"book.txt is not UTF-8 at byte {place}; convert it"):
        pieces(TokenText(wrapped("gpt2")), bytes(document), 500)


def test_a_document_cut_within_a_character_is_not_utf8():
    with pytest.raises(ValueError, match="book.txt is not UTF-8 at byte 5"):
        pieces(TokenText(wrapped("gpt2")), "word 日".encode()[:-1], 500)


def test_special_tokens_of_a_document_are_spelled_out():
    text = TokenText(wrapped("llama3"))
    special = {trained("llama3").token_to_id(name) for name in SPECIAL}
    assert not special & set(text.encode("".join(SPECIAL)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_says_whole_characters_as_soon_as_they_are_there(kind):
    document = "Grüße, 日本 🐳!"
    text = TokenText(wrapped(kind))
    decode = text.decoder()
    parts = [decode(token) for token in [*text.encode(document), *text.stop_ids]]
    assert "".join(parts) == document
    assert "\ufffd" not in "".join(parts)
    assert sum(bool(part) for part in parts) > 5
    decode = ByteText().decoder()
    assert [decode(byte) for byte in "aü".encode()] == ["a", "", "ü"]


def test_a_prompt_goes_by_the_template_without_a_second_start():
    ids = {name: trained("llama3").token_to_id(name) for name in SPECIAL}
    text = TokenText(wrapped("llama3"))
    assert text.start == (ids["<s>"],)
    asked = [ids["<|user|>"], *text.encode("Why?"), ids["<|end|>"], ids["<|assistant|>"]]
    assert text.prompt("Why?") == asked
    begun = TokenText(wrapped("gpt2"))  # whose texts have no start, so that the template's stays
    assert begun.start == ()
    assert begun.prompt("Why?")[0] == ids["<s>"]
    assert TokenText(wrapped("llama3", None)).prompt("Why?") == text.encode("Why?")
    assert ByteText().prompt("ü") == [0xC3, 0xBC]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The folder of a tiny random Llama with a tokenizer, as transformers writes it."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=450,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    wrapped("llama3").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(backbone):
    return Source(str(backbone), MEMORY, 3)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


@pytest.fixture
def read(source, document, tmp_path):
    """A state that has read the document in pieces of 700 bytes, and its marks."""
    file = tmp_path / "book.state"
    return file, read_document(document, source, file, size=700)


def test_a_document_is_read_as_one_text(read, source):
    file, marks = read
    model, text = source.open()
    ids = [*text.start, *text.encode(PROSE)]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), logits="none").state
    found = CoMeTState.load(file, model)
    assert found.tokens[0] == len(ids) == marks[-1].tokens
    for x, y in zip(found.global_state, expected.global_state, strict=True):
        assert_near(x, y, "global state", 1e-4)


def test_marks_are_at_powers_of_two_and_the_end(read):
    _, marks = read
    tokens = [mark.tokens for mark in marks]
    assert [n.bit_length() for n in tokens[:-1]] == sorted({n.bit_length() for n in tokens[:-1]})
    assert len(tokens) == len({n.bit_length() for n in tokens}) + (
        tokens[-1].bit_length() == tokens[-2].bit_length()
    )
    assert marks[-1].bytes == len(PROSE.encode())
    assert all(a.seconds < b.seconds for a, b in zip(marks, marks[1:], strict=False))
    assert min(mark.memory for mark in marks) > 10**7
    lines = table(marks).splitlines()
    assert len(lines) == 2 + len(marks)
    assert all(line.count("|") == 7 and line.endswith("| - |") for line in lines[2:])


def test_the_loss_is_that_of_the_pieces(source, document, tmp_path):
    marks = read_document(document, source, tmp_path / "state", loss=True, size=700)
    model, text = source.open()
    found, _ = pieces(text, PROSE.encode(), 700)
    state, nats, waiting, predicted = None, 0.0, list(text.start), 0
    for i, ids in enumerate(found, 1):
        waiting += ids
        take = len(waiting) if i == len(found) else len(waiting) // 32 * 32  # whole chunks
        tokens, waiting = torch.tensor([waiting[:take]]), waiting[take:]
        with torch.no_grad():
            out = model(tokens, tokens, state=state, logits="none")
        state, nats = out.state, nats + float(out.loss) * (take - 1)
        predicted += take - 1
    assert marks[-1].predicted == predicted
    assert marks[-1].nats == pytest.approx(nats, rel=1e-6)
    assert "| - |" not in table(marks)


KILLED = """
import os, signal, sys
from pathlib import Path
from fast import MemoryConfig, reading

steps = int(sys.argv[4])
step = reading._Reading.step
def counted(self, *rest):
    global steps
    if not steps:
        os.kill(os.getpid(), signal.SIGKILL)
    steps -= 1
    step(self, *rest)
reading._Reading.step = counted
backbone, document, file = sys.argv[1:4]
memory = MemoryConfig(**eval(sys.argv[5]))
reading.read_document(
    Path(document), reading.Source(backbone, memory, 3), Path(file), every=0.0, size=700
)
"""


def test_a_killed_reading_goes_on_to_the_same_bits(read, source, document, tmp_path):
    whole, marks = read
    file = tmp_path / "killed.state"
    words = [source.path, document, file, "5", repr(vars(MEMORY))]
    run = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, words)], capture_output=True, timeout=300
    )
    assert run.returncode == -9, run.stderr
    place = read_header(file)["notes"]["document"]["mark"]
    assert 0 < place["bytes"] < len(PROSE.encode()) / 2
    again = read_document(document, source, file, size=700)
    assert [(m.bytes, m.tokens, m.state) for m in again] == [
        (m.bytes, m.tokens, m.state) for m in marks
    ]
    model, _ = source.open()
    found, expected = CoMeTState.load(file, model), CoMeTState.load(whole, model)
    assert_state_equal(found, expected, "the state of a killed reading")


def test_rows_have_few_lengths_however_long_the_document_is(source, tmp_path):
    """Or else kernels for each would be kept."""
    lengths, whole = [], CoMeTModel.forward

    def counted(self, ids, *rest, **options):
        lengths.append(ids.shape[1])
        return whole(self, ids, *rest, **options)

    document = tmp_path / "long.txt"
    document.write_text(PROSE * 4, encoding="utf-8")
    with patch.object(CoMeTModel, "forward", counted):
        read_document(document, source, tmp_path / "state", size=700)
    assert len(lengths) > 30
    assert all(length % MEMORY.chunk_size == 0 for length in lengths[:-1])


def test_a_chunk_may_be_longer_than_a_piece(source, document, tmp_path):
    memory = MemoryConfig(chunk_size=1000, global_memory_size=2, compression_stride=0)
    long, file = Source(source.path, memory), tmp_path / "state"
    marks = read_document(document, long, file, size=700)
    model, text = long.open()
    state = CoMeTState.load(file, model)
    assert state.tokens[0] == marks[-1].tokens == len(text.encode(PROSE)) + 1
    assert state.chunks[0] == (state.tokens[0] - 1) // 1000


def test_a_document_that_has_been_read_is_not_read_again(read, source, document):
    file, marks = read
    before = file.stat().st_ino
    assert read_document(document, source, file, size=700) == marks
    assert file.stat().st_ino == before  # nor is the file written again


def test_a_document_that_has_grown_is_read_on(read, source, document):
    file, marks = read
    with document.open("a") as opened:
        opened.write("\nAnd one line more.\n")
    assert read_document(document, source, file)[-1].tokens > marks[-1].tokens


def test_an_answer_is_the_models_and_leaves_the_state(read, source):
    file, before = read[0], read[0].read_bytes()
    model, text = source.open()
    ids = torch.tensor([text.prompt("What is kept?")])
    out = model.generate(ids, CoMeTState.load(file, model), 20, text.stop_ids)
    parts = []
    ask(file, "What is kept?", None, parts.append, max_new_tokens=20)
    assert len(parts) == len(out.ids[0])
    held = "".join(parts)  # all but what a character at the end still waits for
    assert held
    assert text.tokenizer.decode(out.ids[0], skip_special_tokens=True).startswith(held)
    assert file.read_bytes() == before


def test_a_saved_answer_can_be_asked_on(read, source, document, tmp_path):
    file, more = read[0], tmp_path / "more.state"
    ask(file, "What is kept?", None, len, max_new_tokens=5, save=more)
    model, text = source.open()
    ids = torch.tensor([text.prompt("What is kept?")])
    out = model.generate(ids, CoMeTState.load(file, model), 5, text.stop_ids)
    assert_state_equal(CoMeTState.load(more, model), out.state, "the state after an answer")
    assert noted_source(more) == source
    with pytest.raises(ValueError, match=f"{more} is there, and no reading to go on with"):
        read_document(document, source, more)


def test_samples_follow_the_seed(read):
    def sampled(seed):
        parts = []
        ask(read[0], "Why?", None, parts.append, max_new_tokens=30, temperature=1.5, seed=seed)
        return "".join(parts)

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_model_that_reads_bytes_needs_no_tokenizer(tmp_path, capsys):
    """The shipped one finds its key."""
    example = passkey.Example(3000, 0.4, 5, None)
    question = f"\n{passkey.QUESTION}"
    document, file = tmp_path / "text", tmp_path / "state"
    document.write_bytes(example.text().removesuffix(question.encode()) + b"\n\xff\n")
    main(["read", str(document), "--model", str(passkey.SHIPPED), "--save", str(file)])
    assert f"wrote {file}" in capsys.readouterr().out
    main(["ask", str(file), question])
    assert capsys.readouterr().out.strip() == f"{example.key}."


def test_the_commands_read_and_ask(backbone, document, tmp_path, capsys):
    """A state finds its model, which may have moved."""
    file, report, moved = tmp_path / "state", tmp_path / "report.json", tmp_path / "moved"
    sizes = ["--chunk-size", "32", "--global-memory-size", "2", "--seed", "1", "--loss"]
    words = ["read", str(document), "--backbone", str(backbone), "--save", str(file)]
    main([*words, *sizes, "--dtype", "bfloat16", "--report", str(report)])
    assert "| tokens |" in capsys.readouterr().out
    told = json.loads(report.read_text())
    assert told["marks"][-1]["bytes"] == document.stat().st_size
    assert told["source"]["memory"]["chunk_size"] == 32
    source = noted_source(file)
    assert source == Source(
        str(backbone), MemoryConfig(chunk_size=32, global_memory_size=2, temporary_memory_size=256),
        1, "bfloat16",
    )  # fmt: skip
    main(["ask", str(file), "Why?", "--max-new-tokens", "5"])
    said = capsys.readouterr().out
    assert said.endswith("\n")
    for path in backbone.iterdir():
        moved.mkdir(exist_ok=True)
        (moved / path.name).write_bytes(path.read_bytes())
    main(["ask", str(file), "Why?", "--max-new-tokens", "5", "--backbone", str(moved)])
    assert capsys.readouterr().out == said


def test_a_checkpoint_keeps_its_tokenizer_beside_its_weights(backbone, document, tmp_path, capsys):
    folder, file = tmp_path / "model", tmp_path / "state"
    model = CoMeTModel.from_backbone(backbone, MEMORY)
    model.save_pretrained(folder)
    words = ["read", str(document), "--model", str(folder), "--save", str(file)]
    with pytest.raises(SystemExit):
        main(words)
    assert f"{folder / 'tokenizer.json'} is missing; put the" in capsys.readouterr().err
    wrapped("llama3").save_pretrained(folder)
    main(words)
    capsys.readouterr()
    asking = ["ask", str(file), "Why?", "--max-new-tokens", "5"]
    main(asking)
    said = capsys.readouterr().out
    assert len(said) > 1
    CoMeTState.load(file, model).save(file, model)  # which notes nothing
    with pytest.raises(ValueError, match="does not tell which model it belongs to; give"):
        ask(file, "Why?", None, len)
    main([*asking, "--model", str(folder)])
    assert capsys.readouterr().out == said


def test_control_characters_of_an_answer_do_not_reach_the_terminal(read, capsys):
    with patch("fast.reading.TokenText.decoder", lambda self: lambda token: "a\x1b[2J\x07\n"):
        main(["ask", str(read[0]), "Why?", "--max-new-tokens", "1"])
    assert capsys.readouterr().out == "a\ufffd[2J\ufffd\n\n"


def test_stop_ids_of_a_folder_are_read(backbone, tmp_path):
    wrapped("llama3").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9, "x", 10000]}')
    assert open_text(tmp_path, 450).stop_ids == (1, 7, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert open_text(tmp_path, 450).stop_ids == (1,)


def damaged_tokenizer(folder):
    wrapped("llama3").save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("prepare", "size", "message"),
    [
        (lambda folder: None, 450, "tokenizer.json is missing; put the tokenizer of the model's"),
        (damaged_tokenizer, 450, "has no readable tokenizer"),
        (lambda folder: wrapped("llama3").save_pretrained(folder), 449, "has 450 tokens, the model's "
         "vocabulary 449; it is of another model"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_does_not_fit_is_told(prepare, size, message, tmp_path):
    prepare(tmp_path)
    with pytest.raises((OSError, ValueError), match=message) as told:
        open_text(tmp_path, size)
    assert str(tmp_path) in str(told.value)


def refused(words, capsys):
    """The sentence that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert "Traceback" not in told.err
    return told.err.strip().rpartition("\r")[2].splitlines()[-1]


def test_mistakes_are_told_in_a_sentence(read, source, backbone, document, tmp_path, capsys):
    file, other, empty = read[0], tmp_path / "other.txt", tmp_path / "empty.txt"
    other.write_text("Another book.\n" * 500)
    empty.touch()
    sizes = ["--chunk-size", "32", "--global-memory-size", "2", "--temporary-memory-size", "8"]
    words = ["--backbone", backbone, *sizes, "--seed", "3"]
    missing, file_before = tmp_path / "missing", file.read_bytes()
    told = {
        f"{missing} is missing; expected the text": ["read", missing, *words, "--save", missing],
        f"{empty} is empty; give a text": ["read", empty, *words, "--save", missing],
        f"{missing} is not there; give the model": ["read", other, "--model", missing, "--save", missing],
        f"document named book.txt, with which {other} does not begin": ["read", other, *words, "--save", file],
        f"{file} was read with other weights": ["read", document, *words[:-1], 4, "--save", file],
        f"{file}: the state belongs to a model with config": ["read", document, "--backbone", backbone, "--save", file],
        f"{other} is not a readable safetensors file": ["read", document, *words, "--save", other],
        "--chunk-size, --seed: of fresh memories": ["read", document, "--model", backbone, "--chunk-size", 9, "--seed", 1, "--save", missing],
        "chunk_size is 0": ["read", document, "--backbone", backbone, "--chunk-size", 0, "--save", missing],
        "the question is empty": ["ask", file, ""],
        "No such file or directory": ["ask", missing, "Why?"],
        "--max-new-tokens is 0": ["ask", file, "Why?", "--max-new-tokens", 0],
        "temperature is -1.0": ["ask", file, "Why?", "--temperature", -1],
        "the question '\\udcff' is not UTF-8": ["ask", file, "\udcff"],
    }  # fmt: skip
    for sentence, line in told.items():
        assert sentence in refused(line, capsys), line
    assert file.read_bytes() == file_before
    assert not missing.exists()


def test_a_state_of_several_streams_is_told(read, source):
    model, _ = source.open()
    CoMeTState.load(read[0], model).fork(2).save(read[0], model, read_header(read[0])["notes"])
    with pytest.raises(ValueError, match=f"{read[0]} holds 2 streams; expected one"):
        ask(read[0], "Why?", None, len)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", {"path": 1}),
        ("source", {"path": "x", "memory": {"chunk_size": -1}}),
        ("source", {"path": "x", "memory": 1}),
        ("source", {"path": "x", "dtype": "int8"}),
        ("source", {"path": "x", "seed": -1}),
        ("source", {"path": "x", "colour": 1}),
        ("document", {"name": "x"}),
        ("document", {"mark": 1, "marks": [], "name": "x", "sha256": "x"}),
        ("document", {"mark": {"bytes": "x"}, "marks": [], "name": "x", "sha256": "x"}),
        ("document", {"mark": {}, "marks": [], "name": "x", "sha256": "x", "waiting": ["x"]}),
    ],
)
def test_notes_of_another_form_are_told(read, source, document, name, value):
    file = read[0]
    model, _ = source.open()
    notes = read_header(file)["notes"] | {name: value}
    CoMeTState.load(file, model).save(file, model, notes)
    with pytest.raises(ValueError, match=f"{file} tells of its .* in another form"):
        ask(file, "Why?", None, len) if name == "source" else read_document(document, source, file)


def test_a_document_that_shrinks_is_told(source, document, tmp_path):
    class Shrunk(ByteText):
        def read_piece(self, file, place, size=0):
            return [], place

    model, _ = source.open()
    with (
        patch.object(Source, "open", lambda self: (model, Shrunk())),
        pytest.raises(ValueError, match="book.txt has become shorter while it was read"),
    ):
        read_document(document, source, tmp_path / "state")


BLOCKED = """
import sys
sys.modules |= dict.fromkeys(sys.argv.pop(1).split(","))  # None: an import of it fails
from fast.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("package", "sentence"),
    [
        ("transformers", 'not installed; run pip install "comet-memory[pretrained]".'),
        ("tqdm", 'This command needs tqdm; run pip install "comet-memory[commands]" first.'),
    ],
)
def test_reading_says_what_to_install(backbone, document, tmp_path, package, sentence):
    words = ["read", document, "--backbone", backbone, "--save", tmp_path / "state"]
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED, package, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.strip().endswith(sentence)
    assert not (tmp_path / "state").exists()


def test_a_gguf_file_without_its_extra_is_told(document, tmp_path, capsys):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    words = ["read", document, "--backbone", file, "--save", tmp_path / "state"]
    with patch.dict(sys.modules, {"gguf": None}):
        assert f"{file} is a GGUF file, and the package gguf is not" in refused(words, capsys)
    assert f"{file} is not a readable GGUF file" in refused(words, capsys)
    assert Mark() == Mark(bytes=0)
