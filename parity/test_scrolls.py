"""SCROLLS: files are read as it publishes them, texts cut and answers scored as it does that."""

import importlib.util
import json
import re
import runpy
import string
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from fast.pretrained.text import ByteText
from fast.tasks import scrolls
from fast.tasks.harness import Setting, evaluate, load_answers
from fast.tasks.samples import Question
from fast.tasks.scrolls import (
    DATASETS,
    Example,
    Scrolls,
    aggregate,
    evaluate_predictions,
    load_examples,
    load_predictions,
    measure,
    split_input,
)

from .test_evaluation import Oracle, WordText, told

pytestmark = pytest.mark.host

OPTIONS = "\n\n (A) She was tired\n (B) The river rose\n (C) Her brother wrote\n (D) Nobody asked"
EXAMPLES = {
    "gov_report": [
        (
            "",
            "The harbour office counts ships.\n\nIt did so twice in the year of the flood.",
            ["Ships are counted."],
        ),
        (
            "",
            "Bridges are painted every nine years. Two of them were late.",
            ["Two bridges were painted late."],
        ),
    ],
    "summ_screen_fd": [
        (
            "",
            "Ida: Who took the lamp?\nOtto: Not me.\n[Otto hides the lamp]",
            ["Otto takes Ida's lamp."],
        ),
    ],
    "qmsum": [
        (
            "What was decided about the roof?",
            "Chair: The roof leaks.\n\nClerk: We mend it in May.",
            ["To mend it in May."],
        ),
    ],
    "qasper": [
        (
            "Which corpus do they train on?",
            "Parsing letters\n\nWe train on 900 letters of sailors.",
            ["letters of sailors", "900 letters"],
        ),
        ("Do they share code?", "Parsing letters\n\nWe train on 900 letters of sailors.", ["No"]),
    ],
    "narrative_qa": [
        (
            "Who feeds the heron?",
            "An old miller fed a heron.\n\n\nEvery day it came.",
            ["The miller", "An old miller"],
        ),
    ],
    "quality": [
        (
            "Why did Mara leave the mill?" + OPTIONS,
            "\nMara saw the water at the door. She went.",
            ["The river rose"],
        ),
        (
            "Who wrote (D)?" + OPTIONS,
            "\nHer brother (D) wrote.\n\n(D) he signed.",
            ["Her brother wrote"],
        ),
    ],
    "contract_nli": [
        (
            "The receiver may copy the plans.",
            "1. The plans are secret.\n\n2. No plan may be copied.",
            ["Contradiction"],
        ),
    ],
}
"""Of each data set: the question, the document, and what is right."""

names = st.sampled_from(sorted(DATASETS))


def rows(name):
    """The objects of a file."""
    return [
        {
            "id": f"{name}_{i}",
            "pid": f"{name}_{i}_{k}",
            "input": f"{query}\n\n{document}" if query else document,
            "output": answer,
        }
        for i, (query, document, answers) in enumerate(EXAMPLES[name])
        for k, answer in enumerate(answers)
    ]


def write(folder, name, lines, split="validation"):
    path = folder / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scrolls")
    for name in DATASETS:
        for split in ("train", "validation"):
            write(folder, name, rows(name), split)
        write(folder, name, [row | {"output": None} for row in rows(name)], "test")
    return folder


def expected(name):
    return tuple(
        Example(f"{name}_{i}", query, document, tuple(answers))
        for i, (query, document, answers) in enumerate(EXAMPLES[name])
    )


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_examples_are_what_the_files_say(name, folder):
    """Lines of one id are one example with several right answers."""
    for split in ("train", "validation"):
        assert load_examples(name, folder, split) == expected(name)
    for example in load_examples(name, str(folder), "test"):
        assert example.answers == ()


def test_a_document_of_many_questions_is_kept_once(folder):
    first, second = load_examples("qasper", folder)
    assert first.document is second.document


def test_lines_may_have_more_fields_and_lack_an_answer_in_the_test_split(tmp_path):
    row = rows("quality")[0]
    write(tmp_path, "quality", [row | {"is_hard": True}], "train")
    assert load_examples("quality", tmp_path, "train")[0].answers == (row["output"],)
    write(
        tmp_path, "quality", [{"id": row["id"], "input": row["input"]}, rows("quality")[1]], "test"
    )
    assert [e.answers for e in load_examples("quality", tmp_path, "test")] == [
        (), ("Her brother wrote",)
    ]  # fmt: skip


@given(names, st.text(), st.lists(st.text(), min_size=4, max_size=4), st.text())
def test_an_input_is_its_question_two_line_breaks_and_its_document(name, query, options, document):
    if name == "quality":
        told_options = [f" ({x}) {o}" for x, o in zip("ABCD", options, strict=True)]
        query = "\n".join([query, "", *told_options])
    text = f"{query}\n\n{document}"
    found = split_input(name, text)
    if DATASETS[name].prompt == "\nSummary:":
        assert found == ("", text)
        return
    assert "\n\n".join(found) == text
    if name == "quality":
        assert "(D)" in found[0]
        assert "\n\n" not in found[0].rpartition("(D)")[2]
    else:
        assert "\n\n" not in found[0]


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("qasper", "{", r"line 2 is no example of qasper: Expecting property name"),
        ("qasper", "", r"line 2 is no example of qasper: Expecting value"),
        ("qasper", "[1]", r"line 2 is no example of qasper: it is \[1\]; expected a JSON object"),
        ("qasper", {"input": "a\n\nb", "output": "c"}, r"line 2 .*: id is None; expected text"),
        ("qasper", {"id": "x", "input": 5, "output": "c"}, r"line 2 .*: input is 5; expected text"),
        ("qasper", {"id": "x", "input": "a\n\nb"}, r"line 2 .*: output is None; expected text"),
        (
            "qasper",
            {"id": "x", "input": "one line", "output": "c"},
            r"input is 'one line'; expected a question, two line breaks, a document; is the",
        ),
        (
            "quality",
            {"id": "x", "input": "q\n\n(A) a (B) b (C) c\n\nd", "output": "c"},
            r"expected a question and its options \(A\) to \(D\), two line breaks, a document",
        ),
        (
            "quality",
            {"id": "x", "input": "q\n\n(A) a (B) b (C) c (D) d", "output": "c"},
            r"expected a question and its options",
        ),
        (
            "qasper",
            {"id": "qasper_0", "input": "another\n\none", "output": "c"},
            r"line 2 has the id 'qasper_0' of line 1, but another input; expected the same one",
        ),
    ],
)
def test_a_line_that_is_no_example_is_told(name, line, says, tmp_path):
    path = write(tmp_path, name, [rows(name)[0], line])
    with pytest.raises(ValueError, match=says) as error:
        load_examples(name, tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_told(tmp_path):
    write(tmp_path, "qmsum", [""]).write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(
        ValueError, match=r"line 1 is no example of qmsum: .*can't decode byte 0xff"
    ):
        load_examples("qmsum", tmp_path)


def test_what_is_missing_or_unknown_is_told(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"qasper/train\.jsonl is missing; unpack https://\S*/qasper\.zip in the folder",
    ):
        load_examples("qasper", tmp_path, "train")
    path = write(tmp_path, "qasper", [])
    with pytest.raises(ValueError, match=rf"{path} is empty; download \S*/qasper\.zip anew"):
        load_examples("qasper", tmp_path)
    (tmp_path / "qmsum" / "validation.jsonl").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        load_examples("qmsum", tmp_path)
    for wrong in (load_examples, Scrolls):
        with pytest.raises(ValueError, match=r"dataset is 'squad'; expected 'gov_report', 'summ"):
            wrong("squad")
    with pytest.raises(
        ValueError, match=r"split is 'dev'; expected 'train', 'validation' or 'test'"
    ):
        load_examples("qasper", tmp_path, "dev")
    with pytest.raises(ValueError, match=r"split is 'test'; expected 'train' or 'validation'"):
        Scrolls(split="test")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's archives in a folder; `datasets` keeps what it makes there too."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    monkeypatch.setattr(scrolls, "ARCHIVE", f"{tmp_path}/{{dataset}}.zip")
    return tmp_path


def test_the_hub_s_archives_are_read_by_datasets(hub):
    """With the package itself: a line separator inside of a text separates no lines."""
    lines = [rows("qasper")[0] | {"output": "one\u2028two"}, *rows("qasper")[1:]]
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    with zipfile.ZipFile(hub / "qasper.zip", "w") as archive:
        archive.writestr("qasper/train.jsonl", "not asked for")
        archive.writestr("qasper/validation.jsonl", text)
    found = load_examples("qasper")
    assert found[1:] == expected("qasper")[1:]
    assert found[0].answers == ("one\u2028two", "900 letters")


def test_a_hub_out_of_reach_is_told_in_one_sentence(hub, monkeypatch):
    says = r"qmsum could not be read from the hub \(\w+: .*\); download \S*/qmsum\.zip, unpack it"
    with pytest.raises(OSError, match=says) as error:
        load_examples("qmsum")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"takes the package datasets, which is not installed"):
        load_examples("qmsum")


@given(names, st.integers(0, 9), st.integers(-30, 90), st.booleans())
def test_the_end_of_the_document_is_cut_and_the_question_kept_whole(name, number, room, is_bytes):
    """To the token, whatever a token is; what is shorter stays so."""
    words = ByteText() if is_bytes else WordText()
    example = expected(name)[number % len(EXAMPLES[name])]
    head = f"{example.query}\n\n" if example.query else ""
    taken = len(words.encode(head))
    length = max(taken + room, 1)
    if taken >= length:
        says = rf"the length is {length} tokens; the question of '{example.id}' takes {taken}"
        with pytest.raises(ValueError, match=says):
            Scrolls(name).ask(example, length, words)
        return
    sample = Scrolls(name).ask(example, length, words)
    text = told(words, sample.ids.tolist())
    assert sample.ids.dtype == np.int64
    assert len(sample.ids) == min(length, taken + len(words.encode(example.document)))
    assert text.startswith(head)
    assert f"{head}{example.document}".startswith(text)
    (question,) = sample.questions
    assert example.query in question.prompt
    assert (question.answers, question.kind) == (example.answers, name)


def test_braces_in_a_question_are_text():
    example = Example("1", "What is {query} or {0}?", "Nothing.", ("nothing",))
    (question,) = Scrolls("qasper").ask(example, 40, ByteText()).questions
    assert question.prompt == "\nQuestion: What is {query} or {0}?\nAnswer:"


def test_every_example_is_drawn(folder):
    task = Scrolls("qasper", str(folder))
    drawn = {
        task.draw(99, np.random.default_rng(seed), ByteText()).questions[0].answers
        for seed in range(40)
    }
    assert drawn == {e.answers for e in expected("qasper")}


PUBLISHED = {
    "predictions": ["exact match example", "hello there", "general kenobi"],
    "references": [["exact match example"], ["hello", "hi there"], ["commander kenobi"]],
    "gov_report": {"rouge1": 72.2222, "rouge2": 33.3333, "rougeL": 72.2222, "score": 55.8136},
    "contract_nli": {"exact_match": 33.3333, "score": 33.3333},
    "narrative_qa": {"f1": 72.2222, "score": 72.2222},
}
"""What the evaluator of SCROLLS says of its own example, in the docstring of its metric."""


@pytest.mark.parametrize("name", ["gov_report", "contract_nli", "narrative_qa"])
def test_scores_are_those_that_the_evaluator_publishes(name):
    predictions = dict(enumerate(PUBLISHED["predictions"]))
    references = dict(enumerate(PUBLISHED["references"]))
    assert evaluate_predictions(name, predictions, references) == PUBLISHED[name]


def test_the_metrics_are_those_of_the_paper():
    """Table 1 of arXiv 2201.03533."""
    assert {name: kind.metric for name, kind in DATASETS.items()} == {
        "gov_report": "rouge", "summ_screen_fd": "rouge", "qmsum": "rouge", "qasper": "f1",
        "narrative_qa": "f1", "quality": "exact_match", "contract_nli": "exact_match",
    }  # fmt: skip


words_of_summaries = st.lists(
    st.sampled_from(["ship", "ships", "the", "count", "counting", "Harbour,", "\n", "9.", ""]),
    max_size=12,
).map(" ".join)


@given(words_of_summaries, st.lists(words_of_summaries, min_size=1, max_size=3))
def test_rouge_is_that_of_the_package(said, answers):
    """Without stemming, over the whole text, and for each kind the answer that is best for it."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    found = measure("qmsum", said, answers)
    assert found == {
        name: max(scorer.score(right, said)[name].fmeasure for right in answers)
        for name in ("rouge1", "rouge2", "rougeL")
    }


@pytest.mark.parametrize(
    ("said", "right", "scores"),
    [
        ("counting ships", "counted ship", (0, 0, 0)),  # no stemming
        ("ships\ncounts", "ships counts", (1, 1, 1)),  # a line break is a space
        ("a b c d", "a c b d", (1, 0, 0.75)),
        ("a b\nc d", "c d\na b", (1, 2 / 3, 0.5)),  # summaries are one sequence, not lines
        ("a", "b", (0, 0, 0)),
        ("", "b", (0, 0, 0)),
        ("The SHIP!", "the ship", (1, 1, 1)),
        ("a b", "a b c", (0.8, 2 / 3, 0.8)),
    ],
)
def test_rouge_case_by_case(said, right, scores):
    found = measure("gov_report", said, [right])
    assert tuple(found.values()) == pytest.approx(scores)


def bare_words(text):
    """As SQuAD normalizes: written anew."""
    text = text.lower().translate({ord(mark): None for mark in string.punctuation})
    return re.sub(r"(?<!\w)(an|a|the)(?!\w)", " ", text).split()


def share(said, right):
    found, wanted = Counter(bare_words(said)), Counter(bare_words(right))
    common = (found & wanted).total()
    if not common:
        return 0.0
    precision, recall = common / found.total(), common / wanted.total()
    return 2 * precision * recall / (precision + recall)


answers_of_questions = st.one_of(
    st.text(max_size=12),
    st.lists(
        st.sampled_from(
            ["the", "The", "a", "an", "hat", "Hat.", "red-hat", "a'the", "A.", "\t", "9"]
        ),
        max_size=6,
    ).map(" ".join),
)


@pytest.fixture(scope="module")
def installed():
    """SQuAD's own metric as lm-eval has it: the file alone, since the package is big."""
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent
    return SimpleNamespace(**runpy.run_path(str(folder / "tasks" / "qasper" / "metrics.py")))


@given(answers_of_questions, st.lists(answers_of_questions, min_size=1, max_size=3))
def test_words_are_counted_as_squad_counts_them(installed, said, answers):
    found = measure("qasper", said, answers)["f1"]
    assert found == pytest.approx(max(share(said, right) for right in answers))
    assert found == pytest.approx(
        max(installed.f1_abstractive([said], [right]) for right in answers)
    )
    same = measure("quality", said, answers)["exact_match"]
    assert same == any(bare_words(said) == bare_words(right) for right in answers)
    normal = installed.normalize_answer
    assert same == any(normal(said) == normal(right) for right in answers)


@given(st.lists(st.tuples(words_of_summaries, words_of_summaries), min_size=1, max_size=4))
def test_the_geometric_mean_is_taken_of_means(pairs):
    """And the mean of the scores of questions, which the harness has, is not above it."""
    predictions = {str(i): said for i, (said, _) in enumerate(pairs)}
    references = {str(i): [right] for i, (_, right) in enumerate(pairs)}
    found = evaluate_predictions("gov_report", predictions, references)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scores = [scorer.score(right, said) for said, right in pairs]
    means = [100 * np.mean([s[x].fmeasure for s in scores]) for x in ("rouge1", "rouge2", "rougeL")]
    assert [*found.values()] == pytest.approx([*means, np.prod(means) ** (1 / 3)], abs=1e-4)
    task = Scrolls("gov_report")
    each = [task.score(said, Question("", (right,))) for said, right in pairs]
    assert 100 * np.mean(each) <= found["score"] + 1e-4


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_right_answers_score_all(name, folder, tmp_path):
    """From an answer file, and in the harness's own score."""
    examples = load_examples(name, folder)
    answers = {e.id: e.answers[-1] for e in examples}
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(answers), encoding="utf-8")
    right = {e.id: e.answers for e in examples}
    assert set(evaluate_predictions(name, load_predictions(path), right).values()) == {100.0}
    nothing = evaluate_predictions(name, dict.fromkeys(answers, ""), right)
    assert set(nothing.values()) == {0.0}
    for example in examples:
        question = Question("", example.answers, name)
        assert Scrolls(name).score(f" {example.answers[0]}", question) == 1.0
        assert Scrolls(name).score("nothing", question) == 0.0


@pytest.mark.parametrize(
    ("predictions", "says"),
    [
        ({"1": "x"}, r"1 of 2 examples of qmsum have no answer, the first is '2'; answer all"),
        ({}, r"2 of 2 examples of qmsum have no answer, the first is '1'"),
        ({"1": "x", "2": "y", "3": "z"}, r"1 of 3 answers are of no example of qmsum, .*'3'; take"),
        (
            {"7": "x", "8": "y", "9": "z"},
            r"of another data set or split than qmsum's: .* is '7'; expected '1' and so on",
        ),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_told(predictions, says):
    with pytest.raises(ValueError, match=says):
        evaluate_predictions("qmsum", predictions, {"1": ["a"], "2": ["b", "c"]})


def test_right_answers_that_are_missing_are_told(folder):
    examples = load_examples("qasper", folder, "test")
    says = r"right answers to 0 of 2 examples of qasper; .*the split test are not public"
    with pytest.raises(ValueError, match=says):
        evaluate_predictions(
            "qasper", {e.id: "No" for e in examples}, {e.id: e.answers for e in examples}
        )
    with pytest.raises(ValueError, match=r"right answers to 0 of 0 examples of qasper"):
        evaluate_predictions("qasper", {}, {})
    with pytest.raises(ValueError, match=r"dataset is 'squad'; expected"):
        evaluate_predictions("squad", {"1": "a"}, {"1": ["a"]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"1": 5}', r"answers\.json: the answer to '1' is 5; expected text"),
        ('["a"]', r"answers\.json holds a list; expected a JSON object"),
        ('{"1": ', r"answers\.json is not JSON"),
    ],
)
def test_what_is_no_answer_file_is_told(text, says, tmp_path):
    path = tmp_path / "answers.json"
    with pytest.raises(FileNotFoundError):
        load_predictions(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        load_predictions(path)


@given(st.lists(st.floats(0, 100), min_size=7, max_size=7))
def test_the_score_of_scrolls_is_the_mean_of_seven(values):
    scores = dict(zip(DATASETS, values, strict=True))
    assert aggregate(scores) == pytest.approx(np.mean(values))


def test_scores_that_are_not_of_all_seven_are_told():
    scores = dict.fromkeys(DATASETS, 50.0)
    with pytest.raises(ValueError, match=r"a data set is 'quality_hard'; expected 'gov_report'"):
        aggregate(scores | {"quality_hard": 1.0})
    del scores["qmsum"], scores["quality"]
    with pytest.raises(ValueError, match=r"no score of qmsum, quality; measure all seven first"):
        aggregate(scores)


class Knowing(Oracle):
    """A model that knows the right answers, and checks that a text begins with what is asked."""

    def __init__(self, name, wrong=lambda prompt: False):
        super().__init__(wrong)
        self.examples, self.prompt = expected(name), DATASETS[name].prompt

    def generate(self, ids, state, max_new_tokens, stop_ids, *, lengths):
        assert max_new_tokens in {kind.answer_tokens for kind in DATASETS.values()}
        said = []
        for row, n, text in zip(ids.tolist(), lengths, state.texts, strict=True):
            prompt = bytes(row[:n]).decode()
            known = [
                example.answers[0]
                for example in self.examples
                if self.prompt.format(query=example.query) == prompt
                and text.startswith(example.query or example.document[: len(text)])
            ]
            said.append(list(f" {'' if self.wrong(prompt) else known[0]}\nmore".encode()))
        return SimpleNamespace(ids=said)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_who_knows_all_is_right_in_all(name, folder, tmp_path):
    """In the harness, whose answers are kept."""
    length = 20 if DATASETS[name].prompt == "\nSummary:" else 130 if name == "quality" else 45
    setting = Setting("scrolls", "knowing", lengths=(length,), samples=5, batch_size=2)
    task = Scrolls(name, str(folder))
    scored = evaluate(task, setting, Knowing(name), ByteText(), tmp_path / "answers.jsonl")
    assert len(scored) == 5
    assert all(one.score == 1.0 and one.kind == name for one in scored)
    assert load_answers(tmp_path / "answers.jsonl") == (setting, scored)
    silent = evaluate(task, setting, Knowing(name, lambda prompt: True), ByteText())
    assert all(one.score == 0.0 for one in silent)
