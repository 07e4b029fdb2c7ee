"""Logs of a shop and of a terminal: what is asked of them is told by their text alone, and once."""

import re
import time
from collections import Counter
from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast.pretrained.text import ByteText, TokenText
from fast.tasks.events import Events
from fast.tasks.harness import Setting, evaluate, load_answers, summarize
from fast.tasks.logs import fit_log
from fast.tasks.samples import Question
from fast.tasks.traces import Traces

from . import test_evaluation
from .test_evaluation import Oracle, WordText, told
from .test_reading import KINDS, wrapped

pytestmark = pytest.mark.host

FEW = settings(max_examples=max(4, settings.default.max_examples // 16))

seeds = st.integers(0, 2**16)

EVENT = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d)(?P<who> [A-Z][a-z]+)? (?P<verb>[a-z]+) the "
    r"(?P<item>[a-z]+ [a-z]+) \((?P<category>[a-z]+), (?P<price>\d+\.\d\d)\)"
    r"(?P<rest>| into the cart| with [1-5] of 5 stars)\n"
)


def solve(text, prompt):
    """All answers to a question of either task, from its text alone."""
    return solve_trace(text, prompt) if re.search(r"^\$ ", text, re.M) else solve_log(text, prompt)


def solve_log(text, prompt):
    """All answers to a question about a shop's log."""
    rows = [match.groupdict(default="") for match in EVENT.finditer(text)]
    asked = prompt.partition("?")[0].strip()
    if who := re.search(r" by ([A-Z][a-z]+)", asked):
        rows = [row for row in rows if row["who"].strip() == who[1]]
    if when := re.search(r" (before|since|in) (\d{4}-\d\d[-\d]*)$", asked):
        day = when[2]
        inside = {
            "before": lambda at: at[:10] < day,
            "since": lambda at: at[:10] >= day,
            "in": lambda at: at[:7] == day,
        }[when[1]]
        rows = [row for row in rows if inside(row["time"])]
    asked = re.sub(r" by [A-Z][a-z]+| (before|since|in) [-\d]+$", "", asked)
    bought = [row for row in rows if row["verb"] == "bought"]

    def done(verb, item=None):
        verb = verb.split()[0]
        return [r for r in rows if r["verb"] == verb and item in (None, r["item"])]

    if found := re.fullmatch(r"How many times was the (\w+ \w+) (.+)", asked):
        return {str(len(done(found[2], found[1])))}
    if found := re.fullmatch(r"When was the (\w+ \w+) (first|last) (.+)", asked):
        pick = min if found[2] == "first" else max
        return {pick(row["time"] for row in done(found[3], found[1]))}
    if found := re.fullmatch(r"What was first bought after the (\w+ \w+) was last (.+)", asked):
        start = max(row["time"] for row in done(found[2], found[1]))
        return {min((r["time"], r["item"]) for r in bought if r["time"] > start)[1]}
    if found := re.fullmatch(r"What was (first|last) (.+)", asked):
        pick = min if found[1] == "first" else max
        return {pick((row["time"], row["item"]) for row in done(found[2]))[1]}
    if found := re.fullmatch(r"What did the (\w+ \w+) cost when it was (first|last) bought", asked):
        pick = min if found[2] == "first" else max
        return {pick((r["time"], r["price"]) for r in bought if r["item"] == found[1])[1]}
    if found := re.fullmatch(r".* in all for the things of the category (\w+) bought", asked):
        cents = [int(r["price"].replace(".", "")) for r in bought if r["category"] == found[1]]
        assert 2 <= len(cents) <= 12
        return {f"{sum(cents) // 100}.{sum(cents) % 100:02}"}
    assert asked == "Things of which category were most often bought"
    counts = Counter(row["category"] for row in bought)
    return {name for name, number in counts.items() if number == max(counts.values())}


def commands(text):
    """Each command of a session with the lines that it printed."""
    found = re.split(r"^\$ ", text, flags=re.M)[1:]
    return [(c.partition("\n")[0], c.partition("\n")[2].splitlines()) for c in found]


def solve_trace(text, prompt):
    """All answers to a question about a session."""
    steps = commands(text)
    asked = prompt.partition("?")[0].strip()
    end = 0 if re.search("cat first|was first|the first error", asked) else -1
    if found := re.fullmatch(r"What was (\w+) in (\S+) when cat (?:first|last) showed it", asked):
        shown = ["\n".join(out) for command, out in steps if command == f"cat {found[2]}"]
        return {*re.findall(rf"^{found[1]} = (\d+)$", shown[end], re.M)}
    if found := re.fullmatch(r"What was (\w+) in (\S+) set to by its last change", asked):
        edit = rf"sed -i 's/\^{found[1]} = \.\*/{found[1]} = (\d+)/' {re.escape(found[2])}"
        values = [m[1] for command, _ in steps if (m := re.fullmatch(edit, command))]
        assert len(values) > 1
        return {values[-1]}
    if found := re.fullmatch(r"Which test failed (first|last) when `(.+)` was \w+ run", asked):
        out = [out for command, out in steps if command == found[2]][end]
        failed = [m[1] for line in out if (m := re.search(r"::(\w+) FAILED$", line))]
        return {failed[0 if found[1] == "first" else -1]}
    if found := re.fullmatch(r"What was the exit code of `(.+)` when it was \w+ run", asked):
        out = [out for command, out in steps if command == found[1]][end]
        return {re.fullmatch(r"\[exit (\d+)\]", out[-1])[1]}
    if found := re.fullmatch(r"In which line was the \w+ error that `(.+)` reported", asked):
        out = ["\n".join(out) for command, out in steps if command == found[1]]
        lines = [re.findall(r'File ".+", line (\d+)|\.c:(\d+): error', one) for one in out]
        return {"".join(one) for one in [pairs for pairs in lines if pairs][end]}
    if found := re.fullmatch(r"Which files were in (\S+) when it was \w+ deleted", asked):
        at = [i for i, (command, _) in enumerate(steps) if command == f"rm -r {found[1]}"][end]
        return {*[out for command, out in steps[:at] if command == f"ls {found[1]}"][-1]}
    package = re.fullmatch(r"Which version of (\S+) was \w+ installed", asked)[1]
    return {re.findall(rf"^Successfully installed {package}-([\d.]+)$", text, re.M)[end]}


@st.composite
def tasks(draw):
    """Either task with any options, and a length, as a multiple of the least that it takes."""
    options = {"questions": draw(st.integers(1, 8))}
    if draw(st.booleans()):
        kinds = draw(st.lists(st.sampled_from(Events.known), max_size=3))
        task = Events(
            **options,
            kinds=", ".join(kinds) or "all",
            items=draw(st.integers(10, 100)),
            customers=draw(st.integers(1, 4)),
            views=draw(st.integers(0, 4)),
        )
    else:
        kinds = draw(st.lists(st.sampled_from(Traces.known), max_size=3))
        task = Traces(
            **options,
            kinds=",".join(kinds) or "all",
            edits=draw(st.integers(2, 5)),
            again=draw(st.floats(0, 0.9)),
        )
    return task, draw(st.floats(1, 2))


def read(task, text):
    """The banner's rest before a log, and its lines; they are lines of the task, and whole."""
    start = re.search(r"^\$ |^\d{4}-\d\d-\d\d ", text, re.M).start()
    front, body = text[:start], text[start:]
    assert (task.banner * (len(front) // len(task.banner) + 2)).endswith(front)
    assert text.endswith("\n")
    if isinstance(task, Events):
        assert EVENT.sub("", body) == ""
    return front, body


@given(tasks(), seeds, st.booleans())
def test_answers_are_what_the_text_says(case, seed, is_bytes):
    """And the text has as many tokens as were asked for, whatever a token is."""
    task, times = case
    words = ByteText() if is_bytes else WordText()
    length = int(times * task.least(words))
    sample = task.draw(length, np.random.default_rng(seed), words)
    assert sample.ids.shape == (length,)
    assert sample.ids.dtype == np.int64
    text = told(words, sample.ids.tolist())
    read(task, text)
    assert len({question.prompt for question in sample.questions}) == task.questions
    for question in sample.questions:
        assert question.kind in task.asked
        assert solve(text, question.prompt) == set(question.answers)
        assert not any(
            re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", question.prompt)
            for answer in question.answers
        )
        right = ", ".join(question.answers)
        assert len(f" {right}.") <= task.answer_tokens
        assert task.score(f" {right}.", question) == 1.0
        assert task.score("", question) == task.score("nothing", question) == 0.0


@given(tasks(), seeds)
def test_a_text_depends_on_its_seed_alone(case, seed):
    task, times = case

    def draw(number):
        return task.draw(
            int(times * task.least(ByteText())), np.random.default_rng(number), ByteText()
        )

    one, same, other = draw(seed), draw(seed), draw(seed + 1)
    assert (one.ids == same.ids).all()
    assert one.questions == same.questions
    assert (one.ids != other.ids).any()
    assert one.questions != other.questions


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(seeds, st.floats(1, 2))
def test_real_tokenizers_read_the_same_lines(kind, seed, times):
    """A piece that is encoded by itself begins as if it stood after the one before."""
    words = TokenText(wrapped(kind))
    for task in (Events(), Traces()):
        length = int(times * task.least(words))
        sample = task.draw(length, np.random.default_rng(seed), words)
        assert sample.ids.shape == (length,)
        text = words.tokenizer.decode(sample.ids)
        front, body = read(task, text)
        assert words.encode(body)[-200:] == sample.ids[-200:].tolist()
        for question in sample.questions:
            assert solve(body, question.prompt) == set(question.answers)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 3000), st.booleans())
def test_as_many_entries_are_kept_as_there_is_room_for(sizes, length, is_bytes):
    words = ByteText() if is_bytes else WordText()

    def entries():
        return (f"{'x ' * size}{i}\n" for i, size in enumerate(cycle(sizes)))

    ids, kept = fit_log(length, entries(), "A banner of words.\n", words)
    assert ids.shape == (length,)
    *first, after = islice(entries(), len(kept) + 1)
    assert kept == first
    text = told(words, ids.tolist())
    body = "".join(kept)
    assert text.endswith(body)
    front = text.removesuffix(body)
    assert ("A banner of words.\n" * length).endswith(front)
    assert len(words.encode(front)) <= len(words.encode(after))


@given(seeds, st.integers(1, 5), st.integers(10, 60))
def test_a_shop_s_log_makes_sense(seed, customers, items):
    """Time passes; what is bought lies in the cart, and what is returned or rated was bought for that."""
    task = Events(customers=customers, items=items)
    text = told(ByteText(), task.draw(9000, np.random.default_rng(seed), ByteText()).ids.tolist())
    rows = [match.groupdict() for match in EVENT.finditer(text)]
    times = [row["time"] for row in rows]
    assert times == sorted(set(times))
    assert len({(row["item"], row["category"]) for row in rows}) <= items
    assert len({row["item"] for row in rows}) == len({(r["item"], r["category"]) for r in rows})
    assert len({row["who"] for row in rows}) <= customers
    owned = Counter()
    for before, row in zip([None, *rows], rows, strict=False):
        thing = row["who"], row["item"], row["price"]
        if row["verb"] in ("put", "bought"):
            assert thing == (before["who"], before["item"], before["price"])
            assert before["verb"] == ("viewed" if row["verb"] == "put" else "put")
            owned[thing] += row["verb"] == "bought"
        elif row["verb"] != "viewed":
            assert owned[thing] > 0
            owned[thing] -= row["verb"] == "returned"


class Replay:
    """Checks each command of a session, a method for each program, against those before."""

    def __init__(self):
        self.values, self.listed, self.written, self.outcomes, self.versions = {}, {}, {}, {}, {}
        self.changed, self.commits = set(), []

    def cat(self, command, out):
        file = command.split()[-1]
        assert out[0] == f"# {file.partition('/')[0]}"
        for line in out[1:]:
            key, value = line.split(" = ")
            assert self.values.setdefault((file, key), value) == value
        assert {key for name, key in self.values if name == file} == {
            line.split()[0] for line in out[1:]
        }

    def grep(self, command, out):
        _, _, asked, file = command.split()
        (line,) = out
        number, key, value = re.fullmatch(r"(\d+):(\w+) = (\d+)", line).groups()
        assert key == asked
        assert 2 <= int(number) <= 5
        assert self.values.setdefault((file, key), value) == value

    def sed(self, command, out):
        key, value, file = re.search(r"/(\w+) = (\d+)/' (.+)", command).groups()
        assert out == []
        assert self.values.get((file, key)) != value
        self.values[file, key] = value
        self.changed.add(file)

    def ls(self, command, out):
        folder = command.split()[-1]
        if not folder.endswith("/out"):
            assert {"Makefile", "main.py", "settings.cfg", "test_main.py"} < set(out)
            assert ("out" in out) == bool(self.listed.get(f"{folder}/out", True))
            return
        files = set() if out[-1] == "[exit 2]" else set(out)
        assert self.listed.get(folder, files) == files
        assert self.written.pop(folder, set()) <= files
        self.listed[folder] = files

    def rm(self, command, out):
        folder = command.split()[-1]
        assert self.listed[folder]
        self.listed[folder] = set()

    def patch(self, command, out):
        files = [line.split()[-1] for line in out if line.startswith("patching")]
        self.changed |= set(files)
        edited = files[0].partition("/")[0]
        self.outcomes = {c: o for c, o in self.outcomes.items() if edited not in c}

    def wc(self, command, out):
        """What is not edited comes to the same again, but for times and the names of new files."""
        same = [re.sub(r" in \d.*s$|part_\d+", "", line) for line in out]
        assert self.outcomes.setdefault(command, same) == same

    def make(self, command, out):
        self.wc(command, out)
        code = int(re.fullmatch(r"\[exit (\d+)\]", out[-1])[1])
        assert (code > 0) == bool(re.search("FAILED|rror|stopped", "".join(out)))

    def pytest(self, command, out):
        self.make(command, out)
        ends = [line.split()[-1] for line in out[:-2]]
        failed, passed = ends.count("FAILED"), ends.count("PASSED")
        assert out[-2].startswith(f"{failed} failed, {passed} passed in ")

    def python(self, command, out):
        self.make(command, out)
        for line in out:
            if line.startswith("wrote "):
                folder, _, file = line.removeprefix("wrote ").rpartition("/")
                known = self.listed if folder in self.listed else self.written
                known.setdefault(folder, set()).add(file)

    def pip(self, command, out):
        name, _, version = command.split()[-1].partition("==")
        old = self.versions.get(name)
        gone = [f"Uninstalling {name}-{old}"] if old else []
        assert out[1:] == [*gone, f"Successfully installed {name}-{version}"]
        assert old != version
        self.versions[name] = version

    def git(self, command, out):
        if command.startswith("git status"):
            assert out == [f" M {path}" for path in sorted(self.changed)]
        elif command.startswith("git log"):
            assert out == self.commits[:-4:-1]
        else:
            name, message = re.fullmatch(r"\[main (\w{7})\] (.+)", out[0]).groups()
            assert re.match(rf" {len(self.changed)} files? changed, ", out[1])
            self.commits.append(f"{name} {message}")
            self.changed.clear()


@given(seeds, st.floats(0, 0.9))
def test_a_session_agrees_with_itself(seed, again):
    """Files hold what was written into them, and what was not edited does again what it did before."""
    sample = Traces(again=again).draw(16000, np.random.default_rng(seed), ByteText())
    replay = Replay()
    for command, out in commands(told(ByteText(), sample.ids.tolist())):
        getattr(replay, command.split()[0])(command, out)


def test_edits_change_what_programs_do():
    sample = Traces().draw(60000, np.random.default_rng(1), ByteText())
    ends = {}
    for command, out in commands(told(ByteText(), sample.ids.tolist())):
        ends.setdefault(command, set()).add(out[-1] if out else "")
    runs = {command: lines for command, lines in ends.items() if command.startswith("python")}
    assert sum(len(lines) > 1 for lines in runs.values()) > 2


@pytest.mark.parametrize("task", [Events(questions=14, customers=3), Traces(questions=14)])
def test_kinds_take_turns(task):
    sample = task.draw(60000, np.random.default_rng(1), ByteText())
    counts = Counter(question.kind for question in sample.questions)
    assert counts == dict.fromkeys(task.known, 2)
    one = replace(task, questions=1)
    firsts = (one.draw(4000, np.random.default_rng(i), ByteText()).questions[0] for i in range(60))
    assert {question.kind for question in firsts} == {*task.known}


@pytest.mark.parametrize("task", [Events(questions=20), Traces(questions=20)])
def test_a_million_bytes_are_drawn_in_seconds(task):
    start = time.process_time()
    sample = task.draw(10**6, np.random.default_rng(1), ByteText())
    assert time.process_time() - start < 20
    text = bytes(sample.ids.tolist()).decode()
    assert len(text) == 10**6
    for question in sample.questions:
        assert solve(text, question.prompt) == set(question.answers)


@pytest.mark.parametrize("task", [Events(questions=7), Traces(questions=7)])
def test_who_remembers_all_is_right_in_all(task, tmp_path, monkeypatch):
    """And a run that was kept goes on."""
    monkeypatch.setattr(test_evaluation, "solve", solve)
    path = tmp_path / "answers.jsonl"
    options = {"questions": 7, "kinds": "all"}
    setting = Setting("logs", "oracle", options, lengths=(6000, 9000), samples=3, batch_size=2)
    scored = evaluate(task, setting, Oracle(), ByteText(), path)
    assert {one.kind for one in scored} == set(task.known)
    assert all(one.score == 1.0 for one in scored)
    assert load_answers(path) == (setting, scored)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:12]))
    assert evaluate(task, setting, Oracle(), ByteText(), path) == scored
    wrong = evaluate(task, setting, Oracle(lambda prompt: True), ByteText())
    assert summarize(wrong)[6000, "all"][0] == 0.0


@pytest.mark.parametrize(
    ("task", "right", "said", "score"),
    [
        (Events(), "7", " 7.", 1),
        (Events(), "7", " 07 times", 1),
        (Events(), "7", " seven", 0),
        (Events(), "7", " 5, 6, 7", 0),
        (Events(), "7", " 17", 0),
        (Events(), "7", " 7.5", 0),
        (Events(), "7", " -7", 0),
        (Events(), "24.90", " 24.9 in all", 1),
        (Events(), "24.90", " 24", 0),
        (Events(), "1234.50", " 1,234.50.", 1),
        (Events(), "2031-04-02 18:07", " 2031-04-02 18:07.", 1),
        (Events(), "2031-04-02 18:07", " 2031-04-02 18:08, or 2031-04-02 18:07", 0),
        (Events(), "green kettle", " Green kettle, I think", 1),
        (Events(), "green kettle", " red kettle and green kettle", 0),
        (Events(), "green kettle", " evergreen kettle", 0),
        (Events(), "green kettle", " kettle", 0),
        (Events(), "tools", " tools.", 1),
        (Events(), "tools", " toys or tools", 0),
        (Traces(), "8080", " 8,080", 1),
        (Traces(), "8080", " 80, 8080", 0),
        (Traces(), "1.4.2", " 1.4.2.", 1),
        (Traces(), "1.4.2", " 1.4.2.1", 0),
        (Traces(), "1.4.2", " 1.4.1 and 1.4.2", 0),
        (Traces(), "test_sorts_keys", " a/test_main.py::test_sorts_keys", 1),
        (Traces(), "test_sorts_keys", " test_sorts_keys_twice", 0),
        (Traces(), "test_sorts_keys", " test_keeps_keys, test_sorts_keys", 0),
    ],
)  # fmt: skip
def test_the_first_thing_said_is_what_counts(task, right, said, score):
    assert task.score(said, Question("\n?", (right,), "count")) == score


def test_all_files_and_no_others_are_to_be_said():
    question = Question("\n?", ("part_12.csv", "part_345.csv"), "held")
    assert Traces().score(" part_345.csv and part_12.csv.", question) == 1.0
    for said in ("part_12.csv", "part_12.csv, part_345.csv, part_7.csv", "part_12, part_345", ""):
        assert Traces().score(said, question) == 0.0


@pytest.mark.parametrize(("number", "is_asked"), [(0, False), (1, True), (6, True), (7, False)])
def test_no_answer_is_longer_than_there_is_room_for(number, is_asked):
    files = tuple(f"part_{1000 + i}.csv" for i in range(number))
    asked = Traces().ask("held", {"held": {"a/out": [files]}}, np.random.default_rng(1))
    assert (asked is not None) == is_asked
    if is_asked:
        assert asked.answers == files
        assert len(f" {', '.join(files)}\n") <= Traces.answer_tokens


@pytest.mark.parametrize("words", [ByteText(), WordText()])
@pytest.mark.parametrize("task", [Events(), Events(questions=12, customers=5), Traces(), Traces(8)])
def test_the_length_that_is_told_is_enough(task, words):
    with pytest.raises(ValueError, match=r"the length is 50 tokens; \d+ questions of the kinds all "
                                         r"take about \d+\.") as error:  # fmt: skip
        task.draw(50, np.random.default_rng(1), words)
    least = int(re.findall(r"\d+", str(error.value))[-1])
    with pytest.raises(ValueError, match=f"the length is {least - 1} tokens"):
        task.draw(least - 1, np.random.default_rng(1), words)
    for seed in range(5):
        assert len(task.draw(least, np.random.default_rng(seed), words).ids) == least


class Unanswered(Traces):
    """None of its questions has one answer."""

    def ask(self, kind, indexed, rng):
        return None


def test_what_no_text_of_a_length_holds_is_told():
    says = "the length is 2000 tokens; 4 questions of the kinds all take about 4000"
    with pytest.raises(ValueError, match=says):
        Unanswered().draw(2000, np.random.default_rng(1), ByteText())


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (Events, {"questions": 0}, "questions is 0; expected an integer of at least 1"),
        (Events, {"kinds": "count,colour"}, "kinds is 'colour'; expected 'all', 'count', "),
        (Traces, {"kinds": ""}, "kinds is ''; expected 'all', 'value', "),
        (Traces, {"kinds": ("value",)}, "kinds is a tuple; expected names of kinds with commas"),
        (Events, {"items": 1}, "items is 1; expected an integer of at least 2"),
        (Events, {"items": 9999}, r"items is 9999; expected an integer of at most \d+"),
        (Events, {"customers": 21}, "customers is 21; expected an integer of at most 20"),
        (Events, {"views": -1}, "views is -1; expected an integer of at least 0"),
        (Traces, {"edits": 1}, "edits is 1; expected an integer of at least 2"),
        (Traces, {"again": 1.0}, "again is 1.0; expected a share from 0 to 0.9"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_told(make, options, says):
    with pytest.raises(ValueError, match=says):
        make(**options)
