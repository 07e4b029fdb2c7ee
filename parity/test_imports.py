"""What an import brings with it, and what a command says when a package is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent

BLOCKED = """
import sys
sys.modules |= dict.fromkeys(("matplotlib", "tqdm"))  # None: an import of it fails
"""


def run_python(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300
    )


def test_the_model_needs_no_package_of_the_commands():
    """Nor does it bring the rooms above it: tasks, bench, published checkpoints, transformers."""
    script = f"""{BLOCKED}
import fast
fast.CoMeTModel, fast.CoMeTState, fast.keep_memory
above = ("fast.tasks", "fast.bench", "fast.pretrained", "fast.huggingface", "transformers")
print([name for name in sys.modules if name.startswith(above)])
"""
    run = run_python(script)
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr


def test_the_model_brings_no_compiler():
    """It takes seconds to import, and is there once something is compiled."""
    script = """
import sys, torch, fast
model = fast.CoMeTModel.from_pretrained(sys.argv[1])
with torch.no_grad():
    model.generate(torch.arange(300)[None] % 256, max_new_tokens=2)
print([name for name in sys.modules if name.startswith("torch._dynamo")])
"""
    model = Path(__file__).parent.parent / "fast" / "tasks" / "passkey_model"
    run = run_python(script, str(model))
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr


def test_the_engine_needs_no_pytorch(tmp_path):
    """It reads, decodes, saves and loads; nothing that it imports asks for PyTorch."""
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("not allowed: " + name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from fast import CoMeTState
from fast.cupy_engine import CoMeTEngine
engine = CoMeTEngine.from_pretrained(sys.argv[1], library="numpy")
out = engine(np.arange(300)[None] % 256, logits="last")
out.state.save(sys.argv[2])
state = CoMeTState.load(sys.argv[2], engine)
ids = engine.generate(np.array([[32]]), state, 5).ids
assert ids == engine.generate(np.array([[32]]), out.state, 5).ids
print(len(ids[0]), "torch" in sys.modules)
"""
    model = Path(__file__).parent.parent / "fast" / "tasks" / "passkey_model"
    run = run_python(script, str(model), str(tmp_path / "state"))
    assert (run.returncode, run.stdout) == (0, "5 False\n"), run.stderr


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["demo"], "tqdm and matplotlib"),
        (["eval", "passkey"], "tqdm"),
        (["eval", "passkey", "--out", "FOLDER"], "tqdm and matplotlib"),
        (["bench"], "tqdm"),
        (["bench", "--page", "FOLDER/page.md"], "tqdm and matplotlib"),
        (["train", "passkey"], "tqdm and matplotlib"),
    ],
)
def test_a_command_says_what_to_install(words, missing, tmp_path):
    """Before it does anything else."""
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    run = run_python(f"{BLOCKED}\nfrom fast.__main__ import main\nmain()", *words)
    expected = f'This command needs {missing}; run pip install "comet-memory[commands]" first.\n'
    assert (run.returncode, run.stdout, run.stderr) == (2, "", expected)
    assert list(tmp_path.iterdir()) == []


def test_watching_needs_no_package_of_the_commands(tmp_path):
    (tmp_path / "text").write_text("The pass key is 7.")
    words = ["watch", str(tmp_path / "text"), "--html", str(tmp_path / "page.html")]
    run = run_python(f"{BLOCKED}\nfrom fast.__main__ import main\nmain()", *words)
    assert (run.returncode, run.stdout) == (0, f"wrote {words[-1]}\n"), run.stderr


def test_help_needs_no_package_of_the_commands():
    run = run_python(f"{BLOCKED}\nfrom fast.__main__ import main\nmain()", "--help")
    assert run.returncode == 0, run.stderr
    assert "demo" in run.stdout


def run_beside(tmp_path, files):
    """A script that imports the model, beside files of its user's."""
    for name, text in {**files, "script.py": "from fast import CoMeTModel"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("named", "files"),
    [
        ("reference.py", {"reference.py": "MINE = 1"}),
        ("reference", {"reference/__init__.py": "", "reference/config.py": "MINE = 1"}),
    ],
)
def test_a_file_of_the_same_name_as_a_package_is_named(tmp_path, named, files):
    run = run_beside(tmp_path, files)
    assert run.returncode == 1
    told = f"ImportError: {tmp_path / named} was imported in place of CoMeT's own package"
    assert run.stderr.splitlines()[-1].startswith(f"{told} `reference`; rename it, or start")


def test_a_file_in_place_of_fast_is_named_by_python(tmp_path):
    """No line of ours runs there, but Python's own sentence names the file."""
    run = run_beside(tmp_path, {"fast.py": "MINE = 1"})
    assert run.returncode == 1
    told = rf"ImportError: cannot import name 'CoMeTModel' from 'fast' \({tmp_path / 'fast.py'}\)"
    assert re.match(told, run.stderr.splitlines()[-1])
