"""Make all attempts, many of each, and fill the table of a page with what came of them."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fast.files import atomic_write, put_parts
from fast.machine import machine

from . import AS_BEFORE, REFUSED, WORKED, Subject
from .calls import attempt_call, bad_calls
from .commands import attempt_command, command_lines, make_places
from .files import (
    attempt_config,
    attempt_counts,
    attempt_damage,
    attempt_header,
    config_changes,
    count_changes,
    damages,
    header_changes,
)
from .kills import kill_writers


@dataclass(frozen=True)
class Trial:
    """What is tried many times."""

    what: str
    """In words."""

    cases: st.SearchStrategy[Any]
    attempt: Callable[[Any, Any], str]
    times: int


TRIALS = (
    Trial("one byte of a file changed", damages(("flip",)), attempt_damage, 1000),
    Trial("a file cut short", damages(("cut",)), attempt_damage, 1000),
    Trial("bytes put into a file", damages(("grow",)), attempt_damage, 1000),
    Trial("an entry of a header dropped, renamed or replaced", header_changes, attempt_header, 1000),
    Trial("a count of a state changed, the digest right", count_changes, attempt_counts, 1000),
    Trial("a config's field replaced, beside weights that tell no config", config_changes,
          attempt_config, 1000),
    Trial("a call with one or two arguments of any kind", bad_calls(), attempt_call, 1000),
)  # fmt: skip
COMMANDS = Trial("a command line of right and wrong words", command_lines(), attempt_command, 1000)
KILLS = 100


def tally(trial: Trial, subject: Any) -> Counter:
    """Make a trial's attempts; those that fail are counted as wrong, and the first is printed."""
    found: Counter = Counter()

    @seed(0)
    @settings(
        max_examples=trial.times,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(trial.cases)
    def run(case: Any) -> None:
        try:
            found[trial.attempt(subject, case)] += 1
        except Exception as error:
            found["wrong"] += 1
            if found["wrong"] == 1:
                print(f"{trial.what}: {error!r}")

    run()
    return found


def table() -> tuple[str, int]:
    """Make all trials: a Markdown table, and how many attempts went wrong."""
    rows, wrong = [], 0

    def add(what: str, found: Counter) -> None:
        good = found[AS_BEFORE] + found[WORKED]
        total = found[REFUSED] + good + found["wrong"]
        rows.append(f"| {what} | {total:,} | {found[REFUSED]:,} | {good:,} | {found['wrong']:,} |")
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("subject", "places", "same", "other")}
        for place in places.values():
            place.mkdir()
        subject = Subject.make(places["subject"])
        make_places(places["places"])
        for trial in (*TRIALS, COMMANDS):
            found = tally(trial, places["places"] if trial is COMMANDS else subject)
            wrong += found["wrong"]
            add(trial.what, found)
        unfinished = 0
        for name, same in (("same", True), ("other", False)):
            found = kill_writers(places[name], KILLS // 2, 0, same)
            what = "one config" if same else "two configs"
            outcomes = {AS_BEFORE: found["whole"], REFUSED: found["of two saves, refused"]}
            add(f"a file after {KILLS // 2} kills, saves of {what} in turn", Counter(outcomes))
            unfinished += found["left unfinished"]
    head = "| what was tried | times | refused in a sentence | held what it held, or did well | wrong |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: |", *rows, ""]
    lines.append(
        f"Of {KILLS} kills {unfinished} came in the middle of a file; the next save removed what "
        "was left of it."
    )
    return "\n".join(lines), wrong


def fill() -> None:
    """Make all trials, and put the table into a page where one is named."""
    parser = argparse.ArgumentParser(prog="python -m parity.reliability", description=__doc__)
    parser.add_argument("--page", type=Path, help="a Markdown page to put the table into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text, wrong = table()
    parts = {"machine": machine("1 thread"), "tries": text}
    if args.page is not None:
        page = args.page.read_text(encoding="utf-8")
        atomic_write(args.page, put_parts(page, parts, args.page))
    print(f"\n{text}\n\n{parts['machine']}")
    if wrong:
        parser.exit(1, f"{wrong} attempts went wrong\n")


if __name__ == "__main__":
    fill()
