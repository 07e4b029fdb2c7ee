"""The mutants are what they are said to be: drawn by a seed, small, and judged by the tests."""

import ast
import difflib
import json
import re

import pytest

from . import mutants

pytestmark = pytest.mark.host

FOUND = mutants.all_mutants(mutants.core())

CHANGES = {
    "x = a + b": {"x = (a - b)"},
    "x = a < b": {"x = (a <= b)", "x = (a >= b)"},
    "x = a and not b": {"x = (a or not b)", "x = a and (b)"},
    "x = 3": {"x = 4", "x = 2"},
    "x = True": {"x = False"},
    "x = min(a, b)": {"x = max(a, b)"},
    "x = np.maximum(a, b).T": {"x = np.minimum(a, b).T"},
    "x = a[b:]": {"x = a[:]", "x = a[b + 1:]"},
    "x = f(a, b=b)": {"x = f(a)"},
    "x = a if b else c": {"x = a if (not (b)) else c"},
    "x = [a for a in b if a]": {"x = [a for a in b if (not (a))]"},
    "x += a": {"pass"},
    "f(a)": {"pass"},
    "x.a = a": {"pass"},
    "x: Final[2] = a": set(),
    "def f(a: Final[2] = b) -> Final[2]:\n    '''Two.'''": set(),
    "raise ValueError(f'{a + b}' + 'c')": {"pass"},
    "x = f'{a + b}'": set(),
    "if TYPE_CHECKING:\n    x = 2": set(),
    "def f(a=2):\n    return a": {"def f(a=3):", "def f(a=1):"},
    "@dataclass(frozen=True)\nclass A:\n    pass": {
        "dataclass(frozen=False) class A:",
        "dataclass() class A:",
    },
}
"""Code, and the statements that become of it."""


@pytest.mark.parametrize("code", CHANGES)
def test_code_is_changed_in_these_ways_and_no_others(code):
    found = [m for place in mutants.mutants("a.py", code) for m in place]
    assert {mutant.new for mutant in found} == CHANGES[code]


def test_a_seed_draws_the_same_mutants_and_a_smaller_number_the_first_of_them():
    drawn = mutants.draw(FOUND, 1, 100)
    assert drawn == mutants.draw(FOUND, 1, 100)
    assert drawn[:30] == mutants.draw(FOUND, 1, 30)
    assert drawn != mutants.draw(FOUND, 2, 100)
    assert len({(m.file, m.line, m.source) for m in drawn}) == 100


def test_every_mutant_parses_and_differs_in_one_statement():
    for mutant in mutants.draw(FOUND, 1, 100):
        right = (mutants.ROOT / "fast" / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(right)), mutant.key
        before, after = right.splitlines(), mutant.source.splitlines()
        changes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
        assert sum(tag != "equal" for tag, *_ in changes) == 1, mutant.key
        assert mutant.old != mutant.new


def test_every_equivalent_mutant_is_one_of_today_s_code():
    keys = {mutant.key for place in FOUND for mutant in place}
    gone = [key for key in mutants.equivalents() if key not in keys]
    assert not gone, f"the code was rewritten, so take these out of mutants.toml: {gone}"


def test_the_tests_near_a_module_exist():
    names = {path.stem for path in (mutants.ROOT / "parity").glob("test_*.py")}
    near = {f"test_{test}" for tests in mutants.NEAR.values() for test in tests.split()}
    left_out = {name for name in mutants.LEFT_OUT if name.startswith("test_")}
    assert near | left_out | set(mutants.SLOW) <= names


PROJECT = {
    "fast/__init__.py": "",
    "fast/scale.py": "def half(x):\n    return x // 2\n\n\ndef double(x):\n    return 2 * x\n",
    "parity/test_half.py": "from fast.scale import half\n\n\ndef test_half():\n    assert half(4) == 2\n",
    "parity/test_double.py": (
        "from fast.scale import double\n\n\ndef test_double():\n    assert double(0) == 0\n"
    ),
    "parity/mutants.toml": "equivalent = []\n",
}
"""Two functions, the first with a test near it, the second with a far one that a factor passes."""


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "NEAR", {"scale": "half"})
    return tmp_path


def counts(said: str) -> dict[str, int]:
    return {line[:10].strip(): int(line[10:]) for line in said.splitlines()[-4:]}


def test_mutants_are_killed_or_survive_and_results_are_kept(project, monkeypatch, capsys):
    assert mutants.main(["--number", "9"]) == 1
    said = capsys.readouterr().out
    assert counts(said) == {"killed": 3, "timed out": 0, "survived": 1, "equivalent": 0}
    assert said.count("parity/test_half.py::test_half") == 2
    assert said.count("parity/test_double.py::test_double") == 1
    survivor = re.search(
        r"^    -    return 2 \* x\n    \+    (return [13] \* x)$", said, re.MULTILINE
    )
    assert survivor, said
    for name, text in PROJECT.items():
        assert (project / name).read_text() == text, "the project itself was changed"

    entry = {"file": "scale.py", "function": "double", "old": "return 2 * x", "new": survivor[1]}
    lines = [f"{name} = {json.dumps(value)}" for name, value in (entry | {"reason": "so"}).items()]
    (project / "parity" / "mutants.toml").write_text("\n".join(["[[equivalent]]", *lines]))
    monkeypatch.delattr(mutants, "run_tests")  # nothing is left to run
    assert mutants.main(["--number", "9"]) == 0
    kept = capsys.readouterr().out
    assert counts(kept) == {"killed": 3, "timed out": 0, "survived": 0, "equivalent": 1}


def test_a_suite_that_fails_by_itself_judges_nothing(project, capsys):
    (project / "fast" / "scale.py").write_text(PROJECT["fast/scale.py"].replace("// 2", "// 3"))
    assert mutants.main(["--number", "9"]) == 2
    assert "test_half" in capsys.readouterr().out


def test_a_mutant_that_does_not_end_is_told_apart(project):
    endless = mutants.Mutant("scale.py", 1, "half", "", "", "while True:\n    pass\n")
    verdict = mutants.judge(project, endless, ["test_half"], "few", seconds=3)
    assert verdict == ("timed out", "3 s")
    assert (project / "fast" / "scale.py").read_text() == PROJECT["fast/scale.py"]
