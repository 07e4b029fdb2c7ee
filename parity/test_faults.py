"""The suite is tested: a fault put into `fast/`, one at a time, must make it fail.

Each fault is a line of `fast/` written wrong, in a copy of the project, and the test that is
expected to notice: by an assertion, since code that merely breaks proves nothing about the suite.
A fault whose line has been rewritten fails too, so that it is renewed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .faults import FAULTS

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent


def run(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    names = [f"parity/{test.replace('::', '.py::')}" for test in tests]
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *names],
        cwd=folder,
        env=os.environ | {"HYPOTHESIS_PROFILE": "faults", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path):
    for name in ("fast", "reference", "parity", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "golden", "*_model", ".hypothesis")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def break_line(folder: Path, file: str, right: str, wrong: str) -> None:
    path = folder / "fast" / file
    source = path.read_text()
    assert source.count(right) == 1, (
        f"fast/{file} has {source.count(right)} times {right!r}: the code was rewritten, so write "
        "this fault anew"
    )
    path.write_text(source.replace(right, wrong))


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_makes_the_suite_fail(copy, fault):
    file, right, wrong, test = FAULTS[fault]
    break_line(copy, file, right, wrong)
    result = run(copy, [test])
    assert result.returncode == 1, f"{fault} went unnoticed:\n{result.stdout}{result.stderr}"
    asserted = re.search(r"^\S+\.py:\d+: (AssertionError|assert )", result.stdout, re.MULTILINE)
    assert asserted, f"{fault}: no assertion noticed it, the code broke:\n{result.stdout}"


def test_the_same_tests_pass_without_a_fault(copy):
    result = run(copy, sorted({fault[3] for fault in FAULTS.values()}))
    assert result.returncode == 0, result.stdout + result.stderr
