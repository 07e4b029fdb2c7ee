"""Random mutants of `fast/`: how many small mistakes in its code does the suite notice?

    python -m parity.mutants --seed 1 --number 200

A mutant is the project with one small change of syntax in the core of `fast/`: an operator, a
constant, a condition, the bound of a slice, an argument or a statement. The seed shuffles all
places that can be changed, so a larger number only adds mutants. Each is tried in a copy of the
project: first on the test files that are near its module, with few examples a property, then, if it
survives, on all files, with more. It is killed by any test that fails. Those that compute the same thing as the code are listed, with
reasons, in `parity/mutants.toml`.

Results are kept in `runs/mutants/seed-SEED.json`, for as long as the code of `fast/` is the same:
a later call tries only what is new and what survived. Without the file, all are tried.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from fast.files import atomic_write

ROOT = Path(__file__).parent.parent

NEAR = {
    "cells": "stream batches splitting",
    "checkpoints": "checkpoints state errors published reliability engine",
    "chunking": "chunking stream splitting batches",
    "global_memory": "global_memory stream",
    "inputs": "errors model decoding",
    "layers": "layers stream splitting half_types",
    "model": "model decoding batches errors",
    "parameters": "parameters errors checkpoints published",
    "recorder": "recorder",
    "rows": "rows stream splitting recorder",
    "sampling": "decoding errors",
    "state": "state errors reliability batches",
    "stream": "stream splitting batches gradients",
    "temporary_memory": "temporary_memory stream",
    "cupy_engine/cells": "engine",
    "cupy_engine/engine": "engine errors recorder state",
    "cupy_engine/global_memory": "engine",
    "cupy_engine/layers": "engine",
    "cupy_engine/libraries": "errors imports engine",
    "cupy_engine/operations": "kernels engine",
    "cupy_engine/sampling": "engine",
    "cupy_engine/stream": "engine",
    "cupy_engine/temporary_memory": "engine",
}
"""Modules of `fast/` that are mutated, with the test files that are likely to notice, in order."""

LEFT_OUT = {f"test_{name}" for name in ("bench", "docs", "faults", "notebooks", "watch")}
LEFT_OUT |= {"faults", "mutants", "test_kernel_faults", "test_mutants"}
"""Files of `parity/` that say nothing of the core, or put faults of their own into it."""

SLOW = ("test_compile", "test_devices")
"""Test files that are tried last."""

PATIENCE = 10
"""All tests together get this many times the limit of those that are near."""

OPERATORS = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.FloorDiv],
    ast.Pow: [ast.Mult],
    ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}

NAMES = {"min": "max", "minimum": "maximum", "any": "all", "argmin": "argmax"}
NAMES |= {other: name for name, other in NAMES.items()}
"""Functions that are called in each other's place."""

Change = tuple[ast.AST, str]
"""A node, and the text that is written in its place."""


@dataclass(frozen=True)
class Mutant:
    """One small change of a file."""

    file: str
    """In `fast/`."""

    line: int
    function: str
    old: str
    """The statement, or the head of the block, in one line."""

    new: str
    source: str
    """The whole file, changed."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What stays the same when lines move."""
        return self.file, self.function, self.old, self.new


def changed(node: ast.AST, **fields: object) -> str:
    """A node's text with other fields; in brackets, where an operator beside it could grip it."""
    other = copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    text = ast.unparse(other)
    operators = (ast.BinOp, ast.BoolOp, ast.Compare)
    return f"({text})" if isinstance(node, operators) else text


def changes(node: ast.AST) -> Iterator[list[Change]]:
    """The ways to change a node itself: a list for each place that it offers."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield [(node, changed(node, op=new())) for new in OPERATORS[type(op)]]
        case ast.Compare(ops=[op]):
            yield [(node, changed(node, ops=[new()])) for new in OPERATORS[type(op)]]
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield [(node, f"({ast.unparse(operand)})")]
        case ast.Constant(value=bool(value)):
            yield [(node, str(not value))]
        case ast.Constant(value=int(value)):
            yield [(node, str(value + 1)), (node, str(value - 1) if value else "(-1)")]
        case ast.Constant(value=float(value)):
            yield [(node, str(value + 1))]
        case ast.Slice(lower=lower, upper=upper):
            for name, bound in (("lower", lower), ("upper", upper)):
                if bound is not None:
                    shifted = ast.BinOp(bound, ast.Add(), ast.Constant(1))
                    yield [(node, changed(node, **{name: new})) for new in (None, shifted)]
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield [(node, "pass")]
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield [(node, "pass")]
    # A comparison's and a not's opposite are among their own changes.
    for test in [getattr(node, "test", None), *getattr(node, "ifs", [])]:
        if test is not None and not isinstance(test, ast.Compare | ast.UnaryOp):
            yield [(test, f"(not ({ast.unparse(test)}))")]
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        if name in NAMES:
            field = "attr" if isinstance(node.func, ast.Attribute) else "id"
            yield [(node.func, changed(node.func, **{field: NAMES[name]}))]
        for keyword in node.keywords:
            if keyword.arg and keyword.arg != "strict":  # zip's check of the program, not a result
                rest = [other for other in node.keywords if other is not keyword]
                yield [(node, changed(node, keywords=rest))]


def places(
    node: ast.AST, function: str = "", statement: ast.stmt | None = None
) -> Iterator[tuple[str, ast.stmt, list[Change]]]:
    """Every place of a tree that can be changed: (function, statement, its changes).

    Annotations, docstrings and the words of errors are none, nor is what only type checkers read.
    """
    if isinstance(node, ast.JoinedStr):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
    statement = node if isinstance(node, ast.stmt) else statement
    for change in changes(node):
        yield function, statement, change
    for name, field in ast.iter_fields(node):
        if name in ("annotation", "returns") or isinstance(node, ast.Raise):
            continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                yield from places(child, function, statement)


def mutants(file: str, source: str) -> list[list[Mutant]]:
    """All mutants of a file of `fast/`, a list for each place."""
    lines = source.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    text = source.encode()

    def span(node: ast.AST) -> tuple[int, int]:
        return (
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def head(statement: ast.stmt) -> tuple[int, int]:
        """A statement's place without the block under it, but with its decorators."""
        first, last = span(statement)
        for decorator in getattr(statement, "decorator_list", []):
            first = min(first, span(decorator)[0])
        if body := getattr(statement, "body", None):
            last = span(body[0])[0]
        return first, last

    def mutate(function: str, statement: ast.stmt, change: Change) -> Mutant:
        (first, last), (start, end) = head(statement), span(change[0])
        before, after, new = text[first:start], text[end:last], change[1].encode()
        old, written = before + text[start:end] + after, before + new + after
        return Mutant(
            file,
            change[0].lineno,
            function,
            *(" ".join(part.decode().split()) for part in (old, written)),
            (text[:start] + new + text[end:]).decode(),
        )

    return [
        [mutate(function, statement, change) for change in found]
        for function, statement, found in places(ast.parse(source))
    ]


def core(root: Path = ROOT) -> dict[str, str]:
    """The sources that are mutated, by their files' names in `fast/`."""
    return {f"{name}.py": (root / "fast" / f"{name}.py").read_text() for name in NEAR}


def all_mutants(sources: dict[str, str]) -> list[list[Mutant]]:
    """All mutants of some files of `fast/`, a list for each place."""
    return [place for file, source in sources.items() for place in mutants(file, source)]


def draw(found: list[list[Mutant]], seed: int, number: int) -> list[Mutant]:
    """Mutants at so many places, uniformly at random: the first of an order that the seed fixes."""
    randomly = random.Random(seed)
    order = randomly.sample(found, len(found))
    return [randomly.choice(place) for place in order[:number]]


def equivalents() -> dict[tuple[str, str, str, str], str]:
    """The reasons in `parity/mutants.toml`, by the mutants' keys."""
    entries = tomllib.loads((ROOT / "parity" / "mutants.toml").read_text())["equivalent"]
    return {
        tuple(entry[name] for name in ("file", "function", "old", "new")): entry["reason"]
        for entry in entries
    }


def run_tests(folder: Path, tests: list[str], profile: str, seconds: float) -> tuple[str, str]:
    """Run test files of a copy of the project until one fails.

    Args:
        folder: the copy.
        tests: names of files in `parity/`, in the order in which they are run.
        profile: of Hypothesis, see `conftest.py`.
        seconds: the limit.

    Returns:
        "survived", "killed" or "timed out"; and the test that failed, or the end of what pytest
        said.
    """
    files = [f"parity/{test}.py" for test in tests]
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    environment = {
        "HYPOTHESIS_PROFILE": profile,
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant could be taken for the file of that second
        "PYTHONPATH": str(folder),
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=folder,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "timed out", f"{seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and the programs that tests have started
                process.wait()
        output.seek(0)
        said = output.read()
    if status == 0:
        return "survived", ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return "killed", failed[1] if failed else said[-300:]


def judge(
    folder: Path, mutant: Mutant, tests: list[str], profile: str, seconds: float
) -> tuple[str, str]:
    """Try a mutant in a copy of the project, which is left as it was; as `run_tests` returns."""
    path = folder / "fast" / mutant.file
    source = path.read_bytes()
    path.write_text(mutant.source)
    try:
        return run_tests(folder, tests, profile, seconds)
    finally:
        path.write_bytes(source)


def digests(texts: dict[str, str]) -> dict[str, str]:
    """SHA-256 of each text."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


class Record:
    """What became of the mutants of one code, in a file that grows with every trial."""

    def __init__(self, path: Path, sources: dict[str, str]) -> None:
        self.path = path
        self.found = {"code": digests(sources), "laws": {}, "seconds": 0.0, "mutants": {}}
        if path.exists():
            earlier = json.loads(path.read_text())
            self.found = earlier if earlier["code"] == self.found["code"] else self.found

    def keep(self, began: float, **news: object) -> None:
        """Add news, and the time that they took."""
        self.found |= news
        self.found["seconds"] += time.monotonic() - began
        atomic_write(self.path, json.dumps(self.found, indent=1) + "\n")

    @staticmethod
    def name(mutant: Mutant) -> str:
        """A mutant in this code."""
        return f"{mutant.line} | " + " | ".join(mutant.key)

    def verdict(self, mutant: Mutant) -> str:
        """What is known of a mutant; "survived" asks for a trial."""
        return self.found["mutants"].get(self.name(mutant), ["survived"])[0]


def suite(folder: Path) -> dict[str, str]:
    """The files of `parity/` that judge mutants, with their texts, slow tests last."""
    paths = [path for path in (folder / "parity").glob("*.py") if path.stem not in LEFT_OUT]
    paths.sort(key=lambda path: (path.stem in SLOW, path.stem))
    return {path.stem: path.read_text() for path in paths}


def try_mutants(
    folder: Path, drawn: list[Mutant], tests: list[str], record: Record, seconds: float
) -> list[str]:
    """Try those of which it is not known that they are killed, or equivalent.

    Args:
        folder: a copy of the project.
        drawn: the mutants.
        tests: all test files.
        record: of earlier trials; it gets those that are made.
        seconds: the limit for the tests near a mutant.

    Returns:
        What became of each: "killed", "timed out", "survived" or "equivalent".
    """
    known = equivalents()
    verdicts = ["equivalent" if m.key in known else record.verdict(m) for m in drawn]
    for profile in ("few", "faults"):  # what is quick for all mutants first
        for i, mutant in enumerate(drawn):
            if verdicts[i] != "survived":
                continue
            near = [f"test_{test}" for test in NEAR[mutant.file.removesuffix(".py")].split()]
            far, limit, began = [], seconds, time.monotonic()
            if profile == "faults":
                far, limit = [test for test in tests if test not in near], PATIENCE * seconds
            verdicts[i], by = judge(folder, mutant, near + far, profile, limit)
            record.found["mutants"][record.name(mutant)] = verdicts[i], by
            record.keep(began)
            place = f"fast/{mutant.file}:{mutant.line}"
            print(f"{i + 1:4} {verdicts[i]:10} {place:36} {by}", flush=True)
    return verdicts


def show(mutant: Mutant, source: str) -> str:
    """A mutant's place and its lines."""
    lines = difflib.unified_diff(source.splitlines(), mutant.source.splitlines(), n=0, lineterm="")
    place = f"fast/{mutant.file}:{mutant.line} {mutant.function}"
    return "\n".join([place, *(f"    {line}" for line in list(lines)[3:])])


def main(arguments: list[str] | None = None) -> int:
    """Try mutants and tell what became of them: 1 if any survived, 2 if the suite fails as it is."""
    parser = argparse.ArgumentParser(prog="python -m parity.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=1, help="of the draw (default: 1)")
    parser.add_argument("--number", type=int, default=200, help="of mutants (default: 200)")
    limit = f"on the tests near a mutant, {PATIENCE} times as long on all (default: 180)"
    parser.add_argument("--seconds", type=float, default=180, help=limit)
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        ignored = shutil.ignore_patterns(".git", ".venv", ".hypothesis", "runs", "build")
        shutil.copytree(ROOT, folder, ignore=ignored)
        sources, laws = core(folder), suite(folder)
        tests = [name for name in laws if name.startswith("test_")]
        record = Record(ROOT / "runs" / "mutants" / f"seed-{options.seed}.json", sources)
        # Laws that fail without a mutant would kill them all.
        new = [
            name for name, text in digests(laws).items() if record.found["laws"].get(name) != text
        ]
        if new:
            began, unproved = time.monotonic(), new if set(new) <= set(tests) else tests
            verdict, by = run_tests(folder, unproved, "faults", PATIENCE * options.seconds)
            if verdict != "survived":
                print(f"The suite fails without a mutant: {verdict}, {by}")
                return 2
            record.keep(began, laws=digests(laws))
        found = all_mutants(sources)
        drawn = draw(found, options.seed, options.number)
        verdicts = try_mutants(folder, drawn, tests, record, options.seconds)

    for mutant, verdict in zip(drawn, verdicts, strict=True):
        if verdict == "survived":
            print("\n" + show(mutant, sources[mutant.file]))
    count = Counter(verdicts)
    print(f"\nseed {options.seed}, {len(drawn)} mutants at {len(found)} places,", end=" ")
    print(f"{record.found['seconds'] / 60:.0f} minutes")
    for verdict in ("killed", "timed out", "survived", "equivalent"):
        print(f"{verdict:10} {count[verdict]:4}")
    return int(count["survived"] > 0)


if __name__ == "__main__":
    sys.exit(main())
