"""An agent's session at a terminal, and questions about what its commands printed long before.

It stands in for the agents at a terminal that the paper (arXiv 2602.01766) evaluates on and whose
sessions it does not publish. The commands are run on a simulated project, so that outputs agree with one
another: a file holds what was last written into it, and a program that failed fails again until it is
edited. Programs, settings, numbers and versions are drawn anew for each text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..inputs import check_count
from .logs import NUMBER, Log
from .samples import Question, Words

__all__ = ["Step", "Traces"]

FIRSTS = (
    "archive", "batch", "cache", "cluster", "config", "cursor", "event", "feature", "graph", "header",
    "index", "journal", "kernel", "label", "matrix", "metric", "packet", "pixel", "query", "record",
    "region", "report", "schema", "sensor", "signal", "socket", "stream", "table", "tensor", "token",
)  # fmt: skip
SECONDS = (
    "builder", "checker", "cleaner", "copier", "counter", "differ", "encoder", "filter", "finder", "folder",
    "indexer", "joiner", "linker", "loader", "mapper", "marker", "merger", "mover", "packer", "parser",
    "planner", "printer", "reader", "router", "sampler", "sender", "sorter", "splitter", "watcher", "writer",
)  # fmt: skip
SETTINGS = (
    "backlog", "block_size", "buffer_size", "depth", "interval", "max_age", "max_rows", "port", "retries",
    "seed", "threshold", "timeout", "window", "workers",
)  # fmt: skip
VERBS = (
    "accepts",
    "closes",
    "counts",
    "drops",
    "keeps",
    "opens",
    "reads",
    "rejects",
    "sorts",
    "writes",
)
OBJECTS = ("blanks", "dates", "files", "keys", "lines", "links", "names", "pages", "rows", "units")
TESTS = [f"test_{verb}_{what}" for verb in VERBS for what in OBJECTS]
SOURCES = ("arena", "buffer", "codec", "hash", "lexer", "queue", "state", "tree")
FUNCTIONS = ("advance", "collect", "flush", "handle", "load_rows", "main", "prepare", "resolve")
ERRORS = (
    "IndexError: list index out of range", "KeyError: 'offset'", "RuntimeError: the queue is closed",
    "TypeError: expected a string", "ValueError: the row is empty", "ZeroDivisionError: division by zero",
)  # fmt: skip
COMPLAINTS = (
    "'cursor' undeclared", "expected ';' before 'return'", "too few arguments to function 'push'",
    "unknown type name 'slot_t'",
)  # fmt: skip


class Fact(NamedTuple):
    """What a step shows that can be asked for."""

    kind: str
    subject: str
    """What it is told of."""

    values: tuple[str, ...]
    """Several where a question asks for all of them, or for one by its place."""


class Step(NamedTuple):
    """A command with its output."""

    command: str
    output: tuple[str, ...] = ()
    """Lines."""

    facts: tuple[Fact, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"$ {self.command}", *self.output, ""])


def _some(things: Sequence[Any], rng: np.random.Generator) -> Any:
    return things[int(rng.integers(len(things)))]


def _several(things: Sequence[str], number: int, rng: np.random.Generator) -> list[str]:
    """So many different ones."""
    return [things[i] for i in rng.choice(len(things), number, replace=False)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


class _Repository:
    """What all programs share: the commits, and what has changed since the last one."""

    def __init__(self) -> None:
        self.patches = 0
        self.commits: list[str] = []
        self.changed: dict[str, tuple[int, int]] = {}  # lines more and lines less, by path

    def change(self, path: str, more: int, less: int) -> None:
        old = self.changed.get(path, (0, 0))
        self.changed[path] = (old[0] + more, old[1] + less)

    def status(self) -> Step:
        return Step("git status --short", tuple(f" M {path}" for path in sorted(self.changed)))

    def log(self) -> Step:
        return Step("git log --oneline -3", tuple(self.commits[:-4:-1]))

    def commit(self, message: str, rng: np.random.Generator) -> Step:
        name = f"{int(rng.integers(16**6, 16**7)):x}"
        more, less = (sum(lines) for lines in zip(*self.changed.values(), strict=True))
        told = f"{_count(len(self.changed), 'file')} changed, {_count(more, 'insertion')}(+)"
        self.commits.append(f"{name} {message}")
        self.changed.clear()
        return Step(
            f'git commit -am "{message}"',
            (f"[main {name}] {message}", f" {told}, {_count(less, 'deletion')}(-)"),
        )


class _Program:
    """A folder of the repository: a program with its settings, tests and C sources, and its output."""

    def __init__(self, name: str, repository: _Repository, rng: np.random.Generator) -> None:
        self.name, self.repository, self.rng = name, repository, rng
        self.package = f"{name.replace('_', '-')}-kit"
        self.installed = ""
        self.settings = {key: int(rng.integers(10, 10000)) for key in _several(SETTINGS, 4, rng)}
        self.tests = _several(TESTS, 6, rng)
        self.sources = sorted(f"{source}.c" for source in _several(SOURCES, 2, rng))
        self.objects: set[str] = set()
        self.lines = {file: int(rng.integers(80, 900)) for file in ("main.py", *self.sources)}
        self.out: set[str] = set()
        for _ in range(int(rng.integers(2, 5))):
            self._write()
        self._break()

    def _write(self) -> str:
        """A new file of output."""
        file = f"part_{int(self.rng.integers(100, 10000))}.csv"
        self.out.add(file)
        return file

    def _break(self) -> None:
        """What is wrong from now on: with the tests, the C sources and the program."""
        rng = self.rng
        self.failing = {test for test in self.tests if rng.random() < 0.4}
        source = _some(self.sources, rng)
        line = int(rng.integers(2, self.lines[source]))
        self.mistake = (source, line, _some(COMPLAINTS, rng)) if rng.random() < 0.7 else None
        self.end = _some(("crash", "stop", "stop", "well"), rng)
        self.line = int(rng.integers(2, self.lines["main.py"]))
        self.error, self.function = _some(ERRORS, rng), _some(FUNCTIONS, rng)
        self.record = int(rng.integers(1000, 10000))
        self.code = {"crash": 1, "stop": int(rng.integers(3, 126)), "well": 0}[self.end]

    def look(self) -> Step:
        files = ["Makefile", "settings.cfg", "test_main.py", *self.lines, *self.objects]
        return Step(f"ls {self.name}", tuple(sorted([*files, *["out"] * bool(self.out)])))

    def show(self) -> Step:
        file = f"{self.name}/settings.cfg"
        facts = [Fact("value", f"{k} in {file}", (str(v),)) for k, v in self.settings.items()]
        lines = [f"{key} = {value}" for key, value in self.settings.items()]
        return Step(f"cat {file}", (f"# {self.name}", *lines), tuple(facts))

    def find(self) -> Step:
        number, (key, value) = _some([*enumerate(self.settings.items(), 2)], self.rng)
        return Step(f"grep -n {key} {self.name}/settings.cfg", (f"{number}:{key} = {value}",))

    def assign(self, key: str) -> Step:
        file = f"{self.name}/settings.cfg"
        value = int(self.rng.integers(10, 9999))
        value += value >= self.settings[key]  # another one than before
        self.settings[key] = value
        self.repository.change(file, 1, 1)
        fact = Fact("setting", f"{key} in {file}", (str(value),))
        return Step(f"sed -i 's/^{key} = .*/{key} = {value}/' {file}", (), (fact,))

    def edit(self) -> Step:
        """Apply a patch to all that can be broken."""
        self.repository.patches += 1
        output = []
        for file in self.lines:
            more, less, at = self.rng.integers([2, 1, 5], [20, 6, 70]).tolist()
            self.lines[file] += more - less
            self.repository.change(f"{self.name}/{file}", more, less)
            output += [f"patching file {self.name}/{file}", f"Hunk #1 succeeded at {at}."]
        self._break()
        return Step(f"patch -p0 -i fixes/{self.repository.patches:04}.patch", tuple(output))

    def measure(self) -> Step:
        file = _some([*self.lines], self.rng)
        return Step(f"wc -l {self.name}/{file}", (f"{self.lines[file]} {self.name}/{file}",))

    def test(self) -> Step:
        command = f"pytest -v {self.name}/test_main.py"
        failed = [test for test in self.tests if test in self.failing]
        output = [
            f"{self.name}/test_main.py::{test} {'FAILED' if test in failed else 'PASSED'}"
            for test in self.tests
        ]
        told = f"{len(failed)} failed, {len(self.tests) - len(failed)} passed"
        output += [f"{told} in {self.rng.uniform(0.1, 9):.2f}s", f"[exit {int(bool(failed))}]"]
        return Step(command, tuple(output), (Fact("test", command, tuple(failed)),))

    def run(self) -> Step:
        file = f"{self.name}/main.py"
        command = f"python {file}"
        facts = [Fact("exit", command, (str(self.code),))]
        if self.end == "well":
            output = [f"read {self.record} records", f"wrote {self.name}/out/{self._write()}"]
        elif self.end == "stop":
            output = [f"{file}: stopped at record {self.record}"]
        else:
            where = f'  File "{file}", line {self.line}, in {self.function}'
            output = ["Traceback (most recent call last):", where, self.error]
            facts.append(Fact("line", command, (str(self.line),)))
        return Step(command, (*output, f"[exit {self.code}]"), tuple(facts))

    def build(self) -> Step:
        command = f"make -B -C {self.name}"
        output = []
        for source in self.sources:
            built = f"{source.removesuffix('.c')}.o"
            output.append(f"cc -c {source}")
            if self.mistake is not None and self.mistake[0] == source:
                _, line, complaint = self.mistake
                output += [f"{source}:{line}: error: {complaint}", f"make: *** [{built}] Error 1"]
                fact = Fact("line", command, (str(line),))
                return Step(command, (*output, "[exit 2]"), (fact,))
            self.objects.add(built)
        return Step(command, (*output, "[exit 0]"))

    def delete(self) -> Iterator[Step]:
        """Show the output, delete it and look again."""
        folder = f"{self.name}/out"
        held, self.out = tuple(sorted(self.out)), set()
        yield Step(f"ls {folder}", held)
        yield Step(f"rm -r {folder}", (), (Fact("held", folder, held),))
        yield Step(
            f"ls {folder}", (f"ls: cannot access '{folder}': No such file or directory", "[exit 2]")
        )

    def install(self) -> Step:
        old = self.installed
        while self.installed == old:
            self.installed = ".".join(map(str, self.rng.integers(0, 30, 3)))
        output = [f"Collecting {self.package}=={self.installed}"]
        if old:
            output.append(f"Uninstalling {self.package}-{old}")
        output.append(f"Successfully installed {self.package}-{self.installed}")
        fact = Fact("version", self.package, (self.installed,))
        return Step(f"pip install {self.package}=={self.installed}", tuple(output), (fact,))


FILE = re.compile(r"(?<!\w)part_\d+\.csv(?!\w)")
"""A file of a program's output."""

ASK = {
    "value": "What was {subject} when cat {which} showed it? It was",
    "setting": "What was {subject} set to by its last change? It was set to",
    "test": "Which test failed {place} when `{subject}` was {which} run? It was",
    "exit": "What was the exit code of `{subject}` when it was {which} run? It was",
    "line": "In which line was the {which} error that `{subject}` reported? It was in line",
    "held": "Which files were in {subject} when it was {which} deleted? They were",
    "version": "Which version of {subject} was {which} installed? It was",
}
"""Questions by their kind: `which` of several times, and, of what was then shown, at which `place`."""

ENDS = {"first": 0, "last": -1}

MOST_VALUES = 6
"""Files that an answer names, at most: as many as there are tokens for, of bytes too."""


@dataclass(frozen=True)
class Traces(Log):
    """An agent's session at a terminal: commands and what they printed, one program after the other.

    Kinds of questions: value (that a file had), setting (after several edits), test (that failed first or
    last), exit (code), line (of an error), held (what a folder held before it was deleted), version.
    """

    edits: int = 3
    """Changes of a setting in a row, at most."""

    again: float = 0.7
    """Share of the work that goes back to a program of before, whose older results distract."""

    answer_tokens: ClassVar[int] = 96

    known: ClassVar[tuple[str, ...]] = tuple(ASK)
    banner: ClassVar[str] = (
        "A session at a terminal. A line with a dollar sign is a command, and what follows is its "
        "output; programs tell their exit code in brackets.\n"
    )
    shapes: ClassVar[tuple[re.Pattern[str], ...]] = (
        NUMBER,
        re.compile(r"(?<![\w.])\d+\.\d+\.\d+(?!\w|\.\d)"),
        re.compile(r"(?<!\w)test_\w+(?!\w|\.py)"),
        FILE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("edits", self.edits, 2)
        if not 0 <= self.again <= 0.9:
            raise ValueError(f"again is {self.again}; expected a share from 0 to 0.9.")

    def least(self, words: Words) -> int:
        """See `Log.least`."""
        line = Step("python archive_builder/main.py", ("read 2831 records", "[exit 0]"))
        more = int((18 + 4 / (1 - self.again)) * (self.most_of_a_kind - 1))
        return len(words.encode(str(line))) * (16 + 4 * self.questions + more)

    def entries(self, rng: np.random.Generator) -> Iterator[Step]:
        """See `Log.entries`: work on a program, then on another."""
        repository = _Repository()
        programs: list[_Program] = []
        names = rng.permutation(len(FIRSTS) * len(SECONDS)).tolist()
        while True:
            if not names or (programs and rng.random() < self.again):
                program = _some(programs, rng)
            else:
                first, second = divmod(names.pop(), len(SECONDS))
                program = _Program(f"{FIRSTS[first]}_{SECONDS[second]}", repository, rng)
                programs.append(program)
            yield program.look()
            for _ in range(int(rng.integers(5, 13))):
                yield from self._work(program, repository, rng)

    def _work(
        self, program: _Program, repository: _Repository, rng: np.random.Generator
    ) -> Iterator[Step]:
        """A command, or a few that belong together."""
        tries: tuple[Callable[[], Step], ...] = (program.test, program.run, program.build)
        others = (program.show, program.find, program.measure, program.install)
        commands = (*tries, *others)
        way = int(rng.integers(len(commands) + 4))
        if way < len(commands):
            yield commands[way]()
        elif way == len(commands):
            yield program.edit()
            yield _some(tries, rng)()
        elif way == len(commands) + 1:
            key = _some([*program.settings], rng)
            for _ in range(int(rng.integers(2, self.edits + 1))):
                yield program.assign(key)
        elif way == len(commands) + 2 and program.out:
            yield from program.delete()
        else:
            yield repository.status()
            if repository.changed:
                yield repository.commit(f"Change {program.name}", rng)
                yield repository.log()

    def index(self, kept: list[Step]) -> dict[str, dict[str, list[tuple[str, ...]]]]:
        """See `Log.index`: of each kind and subject, what was shown, in order."""
        found: dict[str, dict[str, list[tuple[str, ...]]]] = {}
        for kind, subject, values in (fact for step in kept for fact in step.facts):
            found.setdefault(kind, {}).setdefault(subject, []).append(values)
        return found

    def ask(self, kind: str, indexed: Any, rng: np.random.Generator) -> Question | None:
        """See `Log.ask`."""
        if kind not in indexed:
            return None
        # Rather what has changed: else its time would hardly matter.
        changed = [name for name, shown in indexed[kind].items() if len({*shown}) > 1]
        subject = _some(changed if changed and rng.random() < 0.75 else [*indexed[kind]], rng)
        shown = indexed[kind][subject]
        which, place = _some([*ENDS], rng), _some([*ENDS], rng)
        if kind == "setting":
            which = "last"
            shown = shown[1:]  # none, if it was changed once only
        values = shown[ENDS[which]] if shown else ()
        if not 1 <= len(values) <= MOST_VALUES:
            return None
        if kind == "test":
            values = (values[ENDS[place]],)
        asked = ASK[kind].format(subject=subject, which=which, place=place)
        return Question(f"\n{asked}", values, kind)

    def score(self, said: str, question: Question) -> float:
        """1.0 where the first thing said that has the answer's shape is the answer; of a folder, where
        all its files are said and no others.
        """
        if question.kind == "held":
            return float({*FILE.findall(said)} == {*question.answers})
        return super().score(said, question)
