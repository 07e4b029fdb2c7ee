"""The harness and its synthetic tasks: texts hold what is asked for, and answers are scored as said."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import BackboneConfig, CoMeTConfig, MemoryConfig
from fast.__main__ import main
from fast.pretrained.text import ByteText
from fast.tasks import harness, passkey, readers, scoring
from fast.tasks.harness import Setting, evaluate, load_answers, summarize
from fast.tasks.samples import Question, fit_text
from fast.tasks.synthetic import TASKS, Associations, CommonWords, Facts, Needles, Variables

from .strategies import VOCAB, random_model

pytestmark = pytest.mark.host

seeds = st.integers(0, 2**16)


class WordText(ByteText):
    """A token for each word or mark, with the space before it: as most tokenizers cut."""

    def __init__(self):
        self.known = {}

    def encode(self, text):
        parts = re.findall(r"\s?\w+|\s?[^\w\s]|\s", text)
        return [self.known.setdefault(part, len(self.known)) for part in parts]

    def decode(self, ids):
        names = [*self.known]
        return "".join(names[i] for i in ids)


def told(words, ids):
    return bytes(ids).decode() if type(words) is ByteText else words.decode(ids)


def solve(text, prompt):
    """The answers to a question of any task, from its text alone."""
    if "most common in the list" in prompt:
        counts = Counter(re.findall(r"[a-z]+", text))
        return {word for word, _ in counts.most_common(int(re.search(r"\d+", prompt)[0]))}
    if "have the value" in prompt:
        having = {re.search(r"\d+", prompt)[0]}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            having |= {name} if value in having else set()
        return {name for name in having if name.isalpha()}
    if prompt.startswith(("\nWhat is the", "\nWhat are all")):
        names = re.findall(r"the (\w+ \w+) number", prompt.partition("?")[0])
        return {n for name in names for n in re.findall(rf"The {name} number is (\d+)", text)}
    if prompt.startswith("\nWhere"):
        return {where(text, prompt)}
    return set(re.findall(rf"{prompt[1:]} (\d+);", text))


def where(text, prompt):
    """A person's place, or a thing's, now or before."""
    at, holder, been = {}, {}, {}
    for sentence in re.findall(r"[A-Z][a-z]+ (?:went to|took|put down) the [a-z]+(?=\.)", text):
        name, *_, what = sentence.split()
        if "went" in sentence:
            at[name] = what
            for thing in [t for t, person in holder.items() if person == name]:
                been[thing].append(what)
        elif "took" in sentence:
            holder[what] = name
            been.setdefault(what, [at[name]])
            assert been[what][-1] == at[name], "a thing is taken where it lies"
        else:
            assert holder.pop(what) == name, "who puts a thing down has it"
    if "before" in prompt:
        return been[re.search(r"the (\w+) before", prompt)[1]][-2]
    name = prompt.split("?")[0].split()[-1]
    return at[name] if name in at else been[name][-1]


@st.composite
def tasks(draw):
    """A task with any options, and a length that it fits into."""
    kind = draw(st.sampled_from(sorted(TASKS)))
    hay = {"haystack": draw(st.sampled_from(["prose", "filler"]))}
    if kind == "needles":
        keys = draw(st.integers(1, 4))
        options = {
            "keys": keys, "values": draw(st.integers(1, 3)), "queries": draw(st.integers(1, keys)),
            "questions": draw(st.integers(1, 2)), **hay,
        }  # fmt: skip
    elif kind == "variables":
        options = {"chains": draw(st.integers(1, 3)), "hops": draw(st.integers(0, 5)), **hay}
    elif kind == "common-words":
        options = {"common": draw(st.integers(1, 12)), "times": draw(st.sampled_from([12, 30]))}
    elif kind == "associations":
        options = {"pairs": draw(st.integers(1, 40)), "questions": draw(st.integers(1, 4))}
    else:
        options = {"supporting": draw(st.integers(1, 3)), "facts": draw(st.integers(3, 25)), **hay}
    return TASKS[kind](**options), draw(st.integers(1600, 5000))


@given(tasks(), seeds, st.booleans())
def test_answers_are_what_the_text_says(case, seed, is_bytes):
    """And the text has as many tokens as were asked for, whatever a token is."""
    task, length = case
    words = ByteText() if is_bytes else WordText()
    sample = task.draw(length, np.random.default_rng(seed), words)
    assert sample.ids.shape == (length,)
    assert sample.ids.dtype == np.int64
    text = told(words, sample.ids.tolist())
    for question in sample.questions:
        assert solve(text, question.prompt) == set(question.answers)
        right = " and ".join(question.answers)
        assert task.score(f" {right}.", question) == 1.0
        assert task.score("", question) == task.score("nothing", question) == 0.0


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abc")), max_size=5),
    st.integers(40, 300),
    seeds,
)
def test_parts_stand_at_their_places(parts, length, seed):
    start = seed % 3
    parts = [(place, f"<{name}{i}>") for i, (place, name) in enumerate(parts)]
    text = bytes(
        fit_text(length, parts, ["one ", "two-two ", "three. "], ByteText(), start).tolist()
    )
    assert len(text) == length
    found = re.findall(rb"<\w+>", text)
    assert [part.decode() for part in found] == [
        name for _, name in sorted(parts, key=lambda p: p[0])
    ]
    room, laid = length - sum(map(len, found)), 0
    for piece in re.split(rb"(<\w+>)", text):
        if piece in found:
            place = next(place for place, name in parts if name.encode() == piece)
            assert place * room <= laid <= place * room + len("two-two ")
        else:
            laid += len(piece)


class Oracle:
    """A model that remembers everything, and reads what is asked for off the text; its questions
    are asked of forks."""

    def __init__(self, wrong=lambda prompt: False):
        self.read, self.wrong = [], wrong

    def __call__(self, ids, *, state=None, logits):
        assert logits == "none"
        old = [""] * len(ids) if state is None else state.texts
        self.read.append(tuple(ids.shape))
        return SimpleNamespace(
            state=Texts([a + bytes(r).decode() for a, r in zip(old, ids.tolist(), strict=True)])
        )

    def generate(self, ids, state, max_new_tokens, stop_ids, *, lengths):
        said = []
        for row, n, text in zip(ids.tolist(), lengths, state.texts, strict=True):
            prompt = bytes(row[:n]).decode()
            answers = ["9"] if self.wrong(prompt) else sorted(solve(text, prompt))
            said.append(list(f" {', '.join(answers)}\nnever seen".encode()))
        return SimpleNamespace(ids=said)


class Texts:
    def __init__(self, texts):
        self.texts = texts

    def select(self, rows):
        return Texts([self.texts[i] for i in rows])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_who_remembers_all_is_right_in_all(name, tmp_path):
    """In texts that are read in pieces, side by side, whose number is no multiple of a batch."""
    setting = Setting(name, "oracle", lengths=(2000, 5000), samples=3, batch_size=2)
    model = Oracle()
    scored = evaluate(TASKS[name](), setting, model, ByteText(), tmp_path / "answers.jsonl")
    assert all(one.score == 1.0 for one in scored)
    assert {(one.length, one.sample) for one in scored} == {
        (n, i) for n in (2000, 5000) for i in range(3)
    }
    assert model.read == [(2, 2000), (1, 2000), (2, 4096), (2, 904), (1, 4096), (1, 904)]
    assert load_answers(tmp_path / "answers.jsonl") == (setting, scored)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    """Where a sample's last question is missing, or a line was not finished, it is read again."""
    task, path = Needles(keys=3, questions=2), tmp_path / "answers.jsonl"
    setting = Setting("needles", "oracle", lengths=(300, 400), samples=2)
    whole = evaluate(task, setting, Oracle(), ByteText(), path)
    lines = path.read_text().splitlines(keepends=True)
    for kept, again in ((1, 4), (3, 3), (4, 3), (6, 2), (9, 0)):
        path.write_text("".join(lines[:kept]) + lines[-1][:20] * (kept < 9))
        model = Oracle()
        assert evaluate(task, setting, model, ByteText(), path) == whole
        assert len(model.read) == again
        assert path.read_text() == "".join(lines)


def test_what_is_no_run_s_file_is_told(tmp_path):
    task, path = Needles(), tmp_path / "answers.jsonl"
    setting = Setting("needles", "oracle", lengths=(300,), samples=1)
    evaluate(task, setting, Oracle(), ByteText(), path)
    other = Setting("needles", "another", lengths=(300,), samples=1)
    with pytest.raises(
        ValueError, match=r"is of another run \(model: 'oracle'\); give another folder"
    ):
        evaluate(task, other, Oracle(), ByteText(), path)
    text = path.read_text()
    path.write_text(text.replace('"said"', '"spoke"'))
    with pytest.raises(ValueError, match=r"answers\.jsonl holds no answers in line 2 .*spoke"):
        evaluate(task, setting, Oracle(), ByteText(), path)
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="holds no answers in line 1"):
        evaluate(task, setting, Oracle(), ByteText(), path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no setting"):
        evaluate(task, setting, Oracle(), ByteText(), path)


def test_scores_are_told_by_length_and_kind():
    wrong = Oracle(lambda prompt: "Ben" in prompt or "Anna" in prompt)
    task = Facts(facts=30)
    setting = Setting("facts", "oracle", lengths=(2000, 3000), samples=20)
    scored = evaluate(task, setting, wrong, ByteText())
    found = summarize(scored)
    assert set(found) == {(2000, "1 fact"), (3000, "1 fact")}
    mean, low, high, number = found[2000, "1 fact"]
    own = [one.score for one in scored if one.length == 2000]
    assert number == 20
    assert mean == np.mean(own)
    assert 0 < low < mean < high < 1
    row = next(line for line in harness.table(scored).splitlines() if "2,000" in line)
    assert f"{100 * mean:.1f} %" in row


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=20))
def test_the_mean_is_within_its_bounds(scores):
    low, high = scoring.interval(scores)
    mean = np.mean([s for sample in scores for s in sample])
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1


def test_bounds_count_samples_not_questions():
    """Ten questions about one text say no more than one."""
    assert scoring.interval([[1.0] * 10]) == scoring.interval([[1.0]]) == pytest.approx((0.025, 1))
    low, high = scoring.interval([[1.0]] * 9 + [[0.0]])
    assert (round(low, 3), round(high, 4)) == (0.555, 0.9975)  # R: binom.test(9, 10)


def test_answers_are_normalized_as_squad_s_are():
    assert scoring.normalize("The  Cat's, a-an hat!") == "cats aan hat"
    assert scoring.exact_match("the Hat.", "hat") == 1.0
    assert scoring.f1("a red big hat", "the red hat") == pytest.approx(2 * 2 / (3 + 2))
    assert scoring.f1("", "hat") == 0.0
    assert scoring.contains_all("4712, 13", ["471", "13"]) == 0.5
    assert scoring.best_of(scoring.f1, "red hat", ["blue", "a hat"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("task", "length", "says"),
    [
        (
            Needles(keys=5),
            100,
            r"the length is 100 tokens; what this task puts into a text takes \d+",
        ),
        (CommonWords(), 300, r"the length is 300 tokens; this task takes about \d+"),
        (Associations(pairs=700), 9000, "pairs is 700; there are 676 groups of two letters"),
        (Variables(hops=40), 200, "the length is 200 tokens"),
    ],
)
def test_a_text_too_short_is_told_before_anything_is_read(task, length, says):
    model = Oracle()
    with pytest.raises(ValueError, match=says):
        evaluate(task, Setting("x", "x", lengths=(5000, length)), model, ByteText())
    assert not model.read


def test_the_command_measures_and_goes_on(tmp_path, capsys):
    words = [
        "eval",
        "needles",
        "--model",
        str(passkey.SHIPPED),
        "--lengths",
        "300",
        "500",
        "--samples",
    ]
    words += [
        "3",
        "--batch-size",
        "2",
        "--set",
        "keys=2",
        "haystack=filler",
        "--out",
        str(tmp_path),
    ]
    main(words)
    first = capsys.readouterr().out
    assert len(re.findall(r"^\| (300|500) \|  \| \d+\.\d % \|", first, re.MULTILINE)) == 2
    assert (tmp_path / "needles.png").exists()
    head = json.loads((tmp_path / "needles.jsonl").read_text().splitlines()[0])["setting"]
    assert head["options"] == {
        "haystack": "filler", "file": None, "keys": 2, "values": 1, "queries": 1, "questions": 1,
        "digits": 5,
    }  # fmt: skip
    main(words)
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--set", "keys=0"], "--set: keys is 0; expected"),
        (["--set", "needles=2"], "Needles has no needles; known are digits, file, haystack"),
        (["--set", "queries=2"], "queries is 2; there are 1 keys to ask for"),
        (["--set", "haystack=hay"], "haystack is 'hay'; expected"),
        (["--lengths", "20"], "the length is 20 tokens"),
        (["--lengths", "0"], "--lengths"),
        (["--memories", "m.safetensors"], "--memories: of a backbone"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", "needles", "--model", str(passkey.SHIPPED), *words])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err


@given(seeds, st.integers(1, 12), st.integers(1, 3))
def test_a_window_is_the_backbone_on_the_last_tokens(seed, size, b):
    """Of each stream, whatever its question's length; all of them where there is no limit."""
    rng = np.random.default_rng(seed)
    model = random_model(CoMeTConfig(*small_config(rng)), seed, torch.float32)
    plain = readers.without_memories(model)
    text = torch.from_numpy(rng.integers(0, VOCAB, (b, int(rng.integers(1, 20)))))
    prompts = [rng.integers(0, VOCAB, int(rng.integers(1, 5))) for _ in range(b)]
    asked = torch.zeros(b, 5, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        asked[row, : len(prompt)] = torch.from_numpy(prompt)
    window, full = readers.LastTokens(model, size), readers.open_reader("full", model)
    for reader, known in ((window, size), (full, 99)):
        state = None
        for piece in text.split(4, dim=1):
            state = reader(piece, state=state, logits="none").state
        if reader is window:
            assert state.ids.shape[1] == min(known, text.shape[1])
        out = reader.generate(asked, state, 3, (), lengths=[len(p) for p in prompts])
        for row, prompt in enumerate(prompts):
            ids = torch.from_numpy(np.concatenate([text[row].numpy(), prompt])[-known:])
            assert out.ids[row] == plain.generate(ids, max_new_tokens=3).ids[0]


def small_config(rng):
    backbone = BackboneConfig(VOCAB, 6, 8, 2, 2, 1, 4, attention_bias=bool(rng.integers(2)))
    return backbone, MemoryConfig(3, 2, 3, 2, adapter_rank=2, gate_bias=True, sink_slot=True)


def test_a_window_has_the_memories_budget():
    """The shipped model: 3 layers of 24 slots of 64 numbers are the keys and values of 12 tokens."""
    model = passkey.load_model()
    assert readers.open_reader("window", model).size == 3 * 24 * 64 // (2 * 3 * 64)
    assert readers.open_reader("window", model, 10_000).size == 10_000 // (2 * 3 * 64 * 4)
    memory = readers.open_reader("full", model).config.memory
    assert not memory.has_global
    assert not memory.has_temporary
    assert readers.open_reader("memories", model) is model
    with pytest.raises(
        ValueError, match="the budget is 100 bytes; keys and values of one token take 1536"
    ):
        readers.open_reader("window", model, 100)
    with pytest.raises(
        ValueError, match="a budget of 5 bytes is of the reader window, not of full"
    ):
        readers.open_reader("full", model, 5)


def test_the_command_reads_with_a_window(capsys):
    words = ["--lengths", "300", "--samples", "1", "--set", "haystack=filler", "--reader", "window"]
    main(["eval", "needles", "--model", str(passkey.SHIPPED), *words, "--budget", "200000"])
    assert "| 300 |" in capsys.readouterr().out


def test_questions_are_asked_of_forks():
    """A model's answer to one does not depend on the others, nor on the texts beside it."""
    model, words = passkey.load_model(), ByteText()
    texts = [b"The pass key is 4711. " * 20, b"The pass key is 1234. " * 20]
    prompts = ["\nWhat is the pass key? The pass key is", "\nThe pass"]
    questions = tuple(Question(prompt, ("1",)) for prompt in prompts)
    samples = [harness.Sample(passkey.encode(text), questions) for text in texts]
    together = harness.answer(model, samples, words, 8)
    alone = [
        [harness.answer(model, [harness.Sample(s.ids, (q,))], words, 8)[0][0] for q in questions]
        for s in samples
    ]
    assert together == alone
    assert together[0][0].startswith("4711")
    assert torch.is_grad_enabled()
