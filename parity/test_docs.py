"""The pages: their code runs and prints what they say, their commands exist, their links lead on."""

import dataclasses
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fast.__main__ import _parser
from fast.tasks import memories_report, passkey_diagnosis, passkey_report

from .behaviours import FAULTS as WRONG_BEHAVIOURS
from .faults import FAULTS
from .test_kernel_faults import FAULTS as KERNEL_FAULTS
from .test_kernel_faults import SEEN_BY_SANITIZERS

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
    if not path.is_relative_to(DOCS / "notebooks")
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def blocks(page, *languages):
    return [body for language, body in BLOCK.findall(PAGES[page]) if language in languages]


def without_blocks(page):
    return BLOCK.sub("", PAGES[page])


def headings(file):
    """As a link to one is written; of a page that includes another, that one's."""
    text = file.read_text(encoding="utf-8")
    included = re.match(r"```\{include\} (\S+)", text)
    if included:
        return headings(file.parent / included[1])
    found = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found]


MARK = "---- a block ends ----"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, tmp_path):
    """From top to bottom, in a folder of its own; a ```text block is what the code before it prints."""
    (tmp_path / "fast").symlink_to(ROOT / "fast")  # pages run in the project's folder
    code, expected = [], []
    for language, body in BLOCK.findall(PAGES[page]):
        if language == "python":
            code.append(f"{body}\nprint({MARK!r})\n")
            expected.append(None)
        elif language == "text":
            expected[-1] = body
    run = subprocess.run(
        [sys.executable, "-c", "".join(code)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, f"{page}: {run.stderr}"
    printed = run.stdout.split(f"{MARK}\n")
    for said, found in zip(expected, printed, strict=False):
        assert said is None or said == found, f"{page} says\n{said}\nbut its code prints\n{found}"


def targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(page):
    """The commands of a page's shell blocks, in words, without what is not the project's own."""
    for body in blocks(page, "bash", "console"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # HYPOTHESIS_PROFILE=thorough
                words.pop(0)
            if words[:1] == ["torchrun"]:  # which runs a module as Python does
                words = ["python", *words[words.index("-m") :]]
            if words:
                yield words


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash", "console")])
def test_the_commands_of_a_page_exist(page):
    for words in commands(page):
        line = " ".join(words)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets(), line
        elif words[:3] == ["python", "-m", "fast.tasks.lm_harness"]:
            assert (ROOT / "fast/tasks/lm_harness.py").exists(), line  # lm_eval's words follow
        elif words[:3] == ["python", "-m", "fast"]:
            _parser().parse_args(words[3:])  # exits where it cannot
        elif words[0] == "pytest":
            files = [word.partition("::")[0] for word in words[1:] if not word.startswith("-")]
            assert files, line
            assert all((ROOT / file).exists() for file in files), line
        elif words[:2] == ["pip", "install"]:
            text = (ROOT / "pyproject.toml").read_text()
            extras = re.findall(r"\.\[(\w+)\]", line)
            assert all(f"\n{extra} = [" in text for extra in extras), line
        else:
            assert words[0] in ("jupyter",), f"{page}: is this a command? {line}"


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    """Within the project; a picture says in words what it shows."""
    home = (ROOT / page).parent
    for picture, text, target in LINK.findall(without_blocks(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, place = target.partition("#")
        file = home / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if place:
            assert place in headings(file), f"{page}: {target} is none of {headings(file)}"
        if picture:
            assert len(text) > 30, f"{page}: {target} has the words {text!r}; say what it shows"


def test_each_picture_is_shown_and_is_drawn_by_the_one_command():
    shown = set(re.findall(r"images/(\w+\.\w+)", "".join(PAGES.values())))
    assert shown == {path.name for path in (DOCS / "images").iterdir()}
    drawing = (DOCS / "pictures.py").read_text()
    for name in shown:
        stem = re.sub(r"_(published|prose)(_cost)?$", "", name.partition(".")[0])
        assert f'"{stem}' in drawing, f"{name} is not drawn by docs/pictures.py"


def test_the_table_of_trained_memories_is_what_its_picture_shows(tmp_path):
    results, setting = memories_report.load(DOCS / "results" / "memories_whole.json")
    table = re.search(r"\| whole: the backbone.*?\n\n", PAGES["docs/pretrained.md"], re.DOTALL)[0]
    for result, row in zip(results, table.strip().splitlines(), strict=True):
        nats = np.array(result.nats)
        keys = [
            f"{n}; {np.mean(x):.2f}"
            for n, x in zip(result.keys_found, result.key_nats, strict=True)
        ]
        cells = [f"{nats[:, 0].mean():.3f}", f"{nats[:, 1:].mean():.3f}", *keys]
        assert [cell.strip(" *") for cell in row.strip("|").split("|")[1:]] == cells
        assert result.name in row
    memories_report.save(results, setting, tmp_path / "again.json")
    assert memories_report.load(tmp_path / "again.json") == (results, setting)


@pytest.mark.parametrize("variant", ["published", "prose"])
def test_the_tables_of_the_pass_key_are_the_results_that_its_pictures_show(variant, tmp_path):
    path = DOCS / "results" / f"{variant}.json"
    results, setting = passkey_report.load(path)
    rows = passkey_report.table(results, variant).splitlines()[2:]
    assert len(rows) == 6
    assert all(row in PAGES["docs/passkey.md"] for row in rows)
    for row in PAGES["README.md"].splitlines():  # a part of them, under other words
        cells = row.split("|")
        if row.count("|") == 7 and variant in cells[1]:
            assert any(part.endswith("|".join(cells[2:])) for part in rows), row
    assert setting.variant == variant
    again = tmp_path / "again.json"
    passkey_report.save(results, setting, again)
    assert passkey_report.load(again) == (results, setting)


def test_the_table_of_writes_is_what_was_diagnosed():
    found = [
        passkey_diagnosis.load(DOCS / "results" / f"diagnosis{name}.json")
        for name in ("_four_stages", "")
    ]
    rows = re.findall(r"^\| (?:chunks|late) .*", PAGES["docs/passkey.md"], re.MULTILINE)
    counts = [
        [f"{Counter(w.kind for w in one.writes)[kind]} of {one.chunks[kind]:,}" for one in found]
        for kind in passkey_diagnosis.KINDS
    ]
    counts.append([f"{one.taken_up[-1]} of {one.setting.keys}" for one in found])
    assert [[c.strip() for c in row.split("|")[2:4]] for row in rows] == counts


def test_the_faults_of_the_parity_page_are_as_many_as_there_are():
    numbers = re.findall(r"\| +(\d+) \| +(\d+) \|", PAGES["docs/parity.md"])
    lists = FAULTS, WRONG_BEHAVIOURS, KERNEL_FAULTS, SEEN_BY_SANITIZERS
    counts = list(map(len, lists))
    assert numbers == [(str(n), str(n)) for n in counts]


def test_the_changes_of_the_variants_page_still_fit():
    """What a diff takes away or leaves is in the file that was named last."""
    page, file = PAGES["docs/variants.md"], None
    for part in re.split(r"(^```diff\n.*?^```$)", page, flags=re.DOTALL | re.MULTILINE):
        if not part.startswith("```diff"):
            files = [name for name in re.findall(r"`([\w/]+\.py)`", part) if (ROOT / name).exists()]
            file = files[-1] if files else file
            continue
        old = [line[1:] for line in part.splitlines()[1:-1] if line[0] != "+"]
        assert file is not None
        source = (ROOT / file).read_text()
        assert "\n".join(old) in source, f"{file} has not\n" + "\n".join(old)


def test_the_reference_of_the_site_has_every_module():
    """Of the model; those under the commands are listed by who adds them."""
    listed = set(re.findall(r"automodule:: ([\w.]+)", "".join(PAGES.values())))
    for name in ("reference", "fast", "fast.cupy_engine", "fast.huggingface", "fast.parallel"):
        package = importlib.import_module(name)
        found = {
            f"{name}.{module.name}" for module in pkgutil.iter_modules(package.__path__)
            if not module.ispkg and module.name != "__main__"
        }  # fmt: skip
        assert found <= listed, f"docs/api/ lacks {sorted(found - listed)}"


def test_the_reference_of_the_site_names_every_public_name_once():
    import fast

    page = PAGES["docs/api/index.md"]
    named = re.findall(r"(?:autoclass|autofunction|py:data):: (\w+)", page)
    assert sorted(named) == sorted(fast.__all__)
    assert all(dataclasses.is_dataclass(getattr(fast, n)) for n in named if n.endswith("Config"))
