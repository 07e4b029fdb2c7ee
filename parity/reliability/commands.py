"""Command lines of right and wrong words."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st

from fast.__main__ import main
from fast.pretrained.text import ByteText

from ..strategies import random_model
from . import REFUSED, SENTENCE, WORKED, small


class StartedError(Exception):
    """A command has checked what it was given, and would begin its work."""


NUMBERS_IN_WORDS = (
    *("-1", "0", "1", "1.5", "nan", "1e3", "x", "", "9" * 30, "9" * 5000, "300", "99999"),
)
PATHS_IN_WORDS = (
    *("", "file", "file/in", ".", "folder", "missing/deep", "/proc/no/such", "pipe", "state"),
    *("\0", "\ud800", "loop", "page.md", "model", "broken"),
)
QUESTIONS = ("Why?", "", "\udcff")
SETTINGS_IN_WORDS = (
    *(
        "batch_size=4",
        "batch_size=0",
        "clip=nan",
        "phases=[]",
        "phases.0.steps=x",
        "x",
        "=",
        "x.y=3",
    ),
    *(
        "phases.7.steps=1",
        "options.chunks=-1",
        "config={}",
        "config.memory.chunk_size=0",
        "seed.x=1",
    ),
    *("text=file", "memory={}", "betas=[2, 2]", "model=model", "", "task=poem", "\ud800=1"),
)
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "demo": {
        "--out": PATHS_IN_WORDS,
        "--lengths": NUMBERS_IN_WORDS,
        "--processes": NUMBERS_IN_WORDS,
    },
    "eval": {"": ("no task", "")},
    "eval memories": {
        "--backbone": PATHS_IN_WORDS,
        "--memories": PATHS_IN_WORDS,
        "--text": PATHS_IN_WORDS,
        "--lengths": NUMBERS_IN_WORDS,
        "--keys": NUMBERS_IN_WORDS,
        "--windows": NUMBERS_IN_WORDS,
        "--out": PATHS_IN_WORDS,
    },
    "eval starts": {
        "--backbone": PATHS_IN_WORDS,
        "--text": PATHS_IN_WORDS,
        "--windows": NUMBERS_IN_WORDS,
    },
    "eval passkey": {
        "--variant": ("published", "prose", "poem", ""),
        "--lengths": NUMBERS_IN_WORDS,
        "--keys": NUMBERS_IN_WORDS,
        "--tails": (),
        "--diagnose": (),
        "--seed": NUMBERS_IN_WORDS,
        "--model": PATHS_IN_WORDS,
        "--engine": ("numpy", "jax", ""),
        "--haystack": PATHS_IN_WORDS,
        "--out": PATHS_IN_WORDS,
        "--processes": NUMBERS_IN_WORDS,
    },
    "bench": {
        "--out": PATHS_IN_WORDS,
        "--device": ("cpu", "cuda", "tpu"),
        "--quick": (),
        "--page": PATHS_IN_WORDS,
    },
    "train": {"": ("no task", "")},
    "train memories": {
        "--settings": PATHS_IN_WORDS,
        "--set": SETTINGS_IN_WORDS,
        "--backbone": PATHS_IN_WORDS,
        "--model": PATHS_IN_WORDS,
        "--text": PATHS_IN_WORDS,
        "--out": PATHS_IN_WORDS,
    },
    "train passkey": {
        "--settings": PATHS_IN_WORDS,
        "--set": SETTINGS_IN_WORDS,
        "--out": PATHS_IN_WORDS,
        "--seed": NUMBERS_IN_WORDS,
        "--threads": NUMBERS_IN_WORDS,
    },
    "train keeping": {
        "--settings": PATHS_IN_WORDS,
        "--set": SETTINGS_IN_WORDS,
        "--model": PATHS_IN_WORDS,
        "--out": PATHS_IN_WORDS,
    },
    "train text": {
        "--settings": PATHS_IN_WORDS,
        "--set": SETTINGS_IN_WORDS,
        "--text": PATHS_IN_WORDS,
        "--chat": PATHS_IN_WORDS,
        "--model": PATHS_IN_WORDS,
        "--backbone": PATHS_IN_WORDS,
        "--out": PATHS_IN_WORDS,
        "--seed": NUMBERS_IN_WORDS,
    },
    "watch": {
        "": tuple(path for path in PATHS_IN_WORDS if path != "pipe"),  # which is waited for
        "--model": PATHS_IN_WORDS,
        "--chunks": NUMBERS_IN_WORDS,
        "--answer": NUMBERS_IN_WORDS,
        "--highlight": ("[", "(", "*", "a", "\ud800", ""),
        "--port": ("0", "-1", "99999", "x"),
        "--html": PATHS_IN_WORDS,
    },
    "read": {
        "": PATHS_IN_WORDS,
        "--model": PATHS_IN_WORDS,
        "--backbone": PATHS_IN_WORDS,
        "--save": PATHS_IN_WORDS,
        "--chunk-size": NUMBERS_IN_WORDS,
        "--seed": NUMBERS_IN_WORDS,
        "--dtype": ("float32", "int8", ""),
        "--loss": (),
        "--report": PATHS_IN_WORDS,
    },
    "ask": {
        "": PATHS_IN_WORDS,
        "--model": PATHS_IN_WORDS,
        "--backbone": PATHS_IN_WORDS,
        "--save": PATHS_IN_WORDS,
        "--max-new-tokens": NUMBERS_IN_WORDS,
        "--temperature": NUMBERS_IN_WORDS,
        "--seed": NUMBERS_IN_WORDS,
    },
    "no command": {"": ("x",)},
}
"""The options of each command, and what they are given; "" is what stands without one."""


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its options, wrong ones among them, or one that no command has."""
    name = draw(st.sampled_from(sorted(OPTIONS)))
    words = name.split()
    if "" in OPTIONS[name]:
        words += draw(st.lists(st.sampled_from(OPTIONS[name][""]), min_size=1, max_size=1))
    if name == "ask":
        words.append(draw(st.sampled_from(QUESTIONS)))
    needed = {"eval memories": ("backbone", "memories", "text")}
    needed |= dict.fromkeys(("eval starts", "train memories"), ("backbone", "text"))
    for option in needed.get(name, ()) if draw(st.booleans()) else ():
        words += [f"--{option}", "model" if option == "backbone" else "file"]
    if name in ("read", "ask"):  # mostly whole, so that more than a missing option is told
        words += draw(
            st.sampled_from(([], ["--model", "model", *["--save", "new"] * (name == "read")]))
        )
    options = sorted({*OPTIONS[name], "--unknown"} - {""})
    for option in draw(st.lists(st.sampled_from(options), max_size=3, unique=True)):
        values = OPTIONS[name].get(option, ())
        words += [option, *([draw(st.sampled_from(values))] if values else [])]
    return words


@contextlib.contextmanager
def nothing_measured(folder: Path) -> Iterator[None]:
    """Commands start their work by `StartedError`, in a folder with the files that `OPTIONS` name."""

    def start(*_args: Any, **_options: Any) -> None:
        raise StartedError

    places = ("passkey_report.collect", "passkey_diagnosis.diagnose", "bench.report.run")
    places += ("bench.starts.read_backbone", "memories_report.load_memories")
    with contextlib.ExitStack() as stack:
        for place in places:
            module, _, function = place.rpartition(".")
            package = "fast." if module.startswith("bench") else "fast.tasks."
            stack.enter_context(patch(f"{package}{module}.{function}", start))
        begun = ("watch.read", "reading._Reading.step", "model.CoMeTModel.generate")
        for place in (*begun, "train.trainer.Trainer.run"):
            stack.enter_context(patch(f"fast.{place}", start))
        stack.enter_context(patch("fast.reading.open_text", lambda *_: ByteText()))
        stack.enter_context(patch("torch.set_num_threads"))
        stack.enter_context(patch("fast.__main__.keep_memory"))
        stack.enter_context(patch("fast.reading.keep_memory"))
        stack.enter_context(contextlib.chdir(folder))
        yield


def make_places(folder: Path) -> None:
    """The files that `OPTIONS` name."""
    (folder / "file").write_text("a text of thirty bytes or so\n")
    (folder / "folder").mkdir()
    (folder / "page.md").write_text("<!-- machine -->\n<!-- end -->\n")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"backbone": ')
    random_model(small(), 0).save_pretrained(folder / "model")
    random_model(small(), 0).new_state().save(folder / "state")


def attempt_command(folder: Path, words: list[str]) -> str:
    """It begins its work, or tells a sentence and exits with status 2, without a traceback."""
    errors, printed = io.StringIO(), io.StringIO()
    with (
        nothing_measured(folder),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(printed),
    ):
        try:
            main(words)
        except StartedError:
            return WORKED
        except SystemExit as end:
            status = end.code
        else:
            raise AssertionError(f"{words} began nothing, and told nothing")
    lines = errors.getvalue().strip().splitlines()
    assert status == 2, (words, status, lines)
    assert lines, words
    assert "Traceback" not in errors.getvalue(), lines
    is_usage = lines[0].startswith("usage: ")
    assert is_usage or len(lines) == 1, lines
    assert len(lines[-1]) < SENTENCE + sum(map(len, words)), lines
    return REFUSED
