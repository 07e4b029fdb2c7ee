"""The suite is tested: a fault put into `fast/`, one at a time, must make it fail.

Each fault is a line of `fast/` written wrong, and the test that is expected to notice: by an
assertion, since code that merely breaks proves nothing about the suite. A fault whose line has been
rewritten fails too, so that it is renewed.

A fault lives in a child of this process, which imports the project anew with that line, so that
nothing else has to be imported again.
"""

import importlib.machinery
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

from .faults import FAULTS

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent


def write_wrong(file: str, right: str, wrong: str) -> tuple[Path, str]:
    """A file of `fast/`, and its text with one line written wrong."""
    path = ROOT / "fast" / file
    source = path.read_text()
    assert source.count(right) == 1, (
        f"fast/{file} has {source.count(right)} times {right!r}: the code was rewritten, so write "
        "this fault anew"
    )
    return path, source.replace(right, wrong)


def run(
    arguments: list[str], profile: str, changed: tuple[Path, str] | None = None
) -> tuple[int, str]:
    """Run pytest in a child, where the project is imported anew, with a file of another text.

    Args:
        arguments: of pytest: the tests, under `parity/`, and options.
        profile: of Hypothesis.
        changed: the file, and its text.

    Returns:
        pytest's exit status, and what it printed.
    """
    with tempfile.TemporaryFile("w+") as printed:
        child = os.fork()
        if not child:
            status = 3  # pytest's own, for an internal error
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                status = run_here(arguments, profile, changed)
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0)
        return status, printed.read()


def run_here(arguments: list[str], profile: str, changed: tuple[Path, str] | None) -> int:
    """What the child does."""
    os.environ["HYPOTHESIS_PROFILE"] = profile
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    for name in list(sys.modules):
        if name.partition(".")[0] in ("fast", "parity", "reference"):
            del sys.modules[name]
    right = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader, name):
        if changed and Path(loader.path) == changed[0]:
            return compile(changed[1], loader.path, "exec")
        return right(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
    status = int(pytest.main([*options, *arguments]))
    sys.stdout.flush()
    return status


def place(test: str) -> str:
    """A test as pytest names it."""
    return f"{ROOT}/parity/{test.replace('::', '.py::')}"


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_makes_the_suite_fail(fault):
    file, right, wrong, test = FAULTS[fault]
    status, printed = run([place(test)], "faults", write_wrong(file, right, wrong))
    assert status == 1, f"{fault} went unnoticed:\n{printed}"
    asserted = re.search(r"^\S+\.py:\d+: (AssertionError|assert )", printed, re.MULTILINE)
    assert asserted, f"{fault}: no assertion noticed it, the code broke:\n{printed}"


def test_the_same_tests_pass_without_a_fault():
    """Here; that they do with more examples, they show themselves."""
    status, printed = run(sorted({place(fault[3]) for fault in FAULTS.values()}), "few")
    assert status == 0, printed
