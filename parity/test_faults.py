"""The suite is tested: a fault put into `fast/`, one at a time, must make it fail.

Each fault is a line of `fast/` written wrong, in a copy of the project, and the tests that are
expected to notice. A fault whose line has been rewritten fails too, so that it is renewed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FAULTS = {
    "gate operands swapped": (
        "global_memory.py",
        "torch.cat([candidate, state], dim=-1)",
        "torch.cat([state, candidate], dim=-1)",
        "test_global_memory",
    ),
    "g and 1 - g swapped": (
        "global_memory.py",
        "g * state + (1 - g) * new",
        "(1 - g) * state + g * new",
        "test_global_memory",
    ),
    "the candidate's norm left out": (
        "global_memory.py",
        'return rms_norm(readout, weights["norm"], eps)',
        "return readout",
        "test_global_memory",
    ),
    "the global memory read without its adapter": (
        "global_memory.py",
        "return adapter(state, weights)",
        "return state",
        "test_global_memory",
    ),
    "saturation ignored": (
        "global_memory.py",
        "return g if saturation == 1.0 else torch.clamp(g / saturation, max=1.0)",
        "return g",
        "test_global_memory",
    ),
    "the default epsilon wrong": (
        "layers.py",
        "eps = torch.finfo(wide.dtype).eps",
        "eps = 1e-6",
        "test_global_memory",
    ),
    "the queue's epsilon wrong": (
        "temporary_memory.py",
        "weights, config.temporary_norm_eps)",
        "weights, 1e-6)",
        "test_temporary_memory",
    ),
    "queue entries not normed": (
        "temporary_memory.py",
        'adapter(rms_norm(compression, weights["norm"], eps), weights)',
        "adapter(compression, weights)",
        "test_temporary_memory",
    ),
    "oldest entries kept in place of the newest": (
        "temporary_memory.py",
        "return both[:, both.shape[1] - size :]",
        "return both[:, :size]",
        "test_temporary_memory",
    ),
    "the queue one entry short": (
        "temporary_memory.py",
        "size = min(config.temporary_memory_size, both.shape[1])",
        "size = min(config.temporary_memory_size - 1, both.shape[1])",
        "test_temporary_memory",
    ),
    "a ragged queue one off": (
        "temporary_memory.py",
        "torch.where(source < old,",
        "torch.where(source <= old,",
        "test_temporary_memory",
    ),
    "the adapter's residual dropped": (
        "layers.py",
        "return x + linear(linear(x,",
        "return linear(linear(x,",
        "test_layers",
    ),
    "rotary tables one off": (
        "layers.py",
        "positions[..., None].to(torch.float64)",
        "(positions[..., None] + 1).to(torch.float64)",
        "test_layers",
    ),
    "rotary pairs interleaved": (
        "layers.py",
        "first, second = widen(x).chunk(2, dim=-1)",
        "first, second = widen(x)[..., ::2], widen(x)[..., 1::2]",
        "test_layers",
    ),
    "a slot sees the one behind it": (
        "layers.py",
        "> positions[..., None]",
        "> positions[..., None] + 1",
        "test_layers",
    ),
    "the first chunk not causal": (
        "layers.py",
        "is_causal=mask is None",
        "is_causal=False",
        "test_causality",
    ),
    "keys not normed per head": (
        "layers.py",
        "heads = rms_norm(heads, weights[norm], config.rms_norm_eps)",
        "pass",
        "test_layers",
    ),
    "a mask that hides nothing": (
        "layers.py",
        ".masked_fill_(unseen, -torch.inf)",
        "",
        "test_causality",
    ),
    "a mask of all slots for the few asked for": (
        "layers.py",
        "rotation, mask = (cos, sin), None",
        "rotation, mask = (cos, sin), None if mask is None else mask[..., : len(outputs[0]), :]",
        "test_splitting",
    ),
    "the memory slots' device forgotten": (
        "stream.py",
        "return torch.from_numpy(np.ascontiguousarray(array)).to(device)",
        "return torch.from_numpy(np.ascontiguousarray(array))",
        "test_devices",
    ),
    "a value asked of the device": (
        "layers.py",
        "if mask is None:\n",
        "if mask is None or bool((queries > 1e9).any()):\n",
        "test_devices",
    ),
    "another activation": ("layers.py", "F.silu(", "F.gelu(", "test_layers"),
    "positions not restarted in a chunk": (
        "stream.py",
        "at = np.arange(n) + (state.row_length[0]",
        "at = np.arange(n) + (state.tokens[0]",
        "test_stream",
    ),
    "positions not counting memory slots": (
        "stream.py",
        "at = np.arange(n) + (state.row_length[0]",
        "at = np.arange(n) + (state.open_tokens[0]",
        "test_stream",
    ),
    "memory slots at positions of their own": (
        "stream.py",
        "_rotation(torch.arange(slots)",
        "_rotation(torch.zeros(slots, dtype=torch.int64)",
        "test_stream",
    ),
    "the output before the last one given for the last": (
        "chunking.py",
        "np.maximum(take - 1, 0)[:, None]",
        "np.maximum(take - 2, 0)[:, None]",
        "test_splitting",
    ),
    "the slots asked for keep the first one's rotation": (
        "layers.py",
        "rotation, mask = (cos, sin), None",
        "rotation, mask = (cos[..., :1, :], sin[..., :1, :]), None",
        "test_splitting",
    ),
    "no rotation in half types": (
        "layers.py",
        "return torch.cat(turned, dim=-1).to(x.dtype)",
        "return torch.cat(turned, dim=-1).to(x.dtype) if x.element_size() > 2 else x",
        "test_model",
    ),
    "no queue in half types": (
        "stream.py",
        "parts.append(state.temporary_memory[i])",
        "parts.append(state.temporary_memory[i] * (state.temporary_memory[i].element_size() > 2))",
        "test_model",
    ),
    "every layer sees the first one's global memory": (
        "stream.py",
        'read_global(state.global_state[i], weights["global_memory"])',
        'read_global(state.global_state[0], weights["global_memory"])',
        "test_stream",
    ),
    "temporary memory before global memory": (
        "stream.py",
        "both = torch.cat(parts, dim=1)[:, :slots]",
        "both = torch.cat(parts[::-1], dim=1)[:, :slots]",
        "test_stream",
    ),
    "the first chunk gated": (
        "stream.py",
        "later = state.chunks > 0",
        "later = state.chunks >= 0",
        "test_stream",
    ),
    "the last partial group's compression token forgotten": (
        "chunking.py",
        "if stride and trailing:",
        "if stride and trailing and (open_tokens + take) % stride == 0:",
        "test_stream",
    ),
    "readout order reversed": (
        "chunking.py",
        "slots.extend(READOUT - r for r in range(readouts))",
        "slots.extend(READOUT - r for r in reversed(range(readouts)))",
        "test_stream",
    ),
    "a chunk closed as soon as it is full": (
        "chunking.py",
        "close = remaining > 0\n",
        "close = filled + take >= chunk_size\n",
        "test_stream",
    ),
    "a compression token one text token early": (
        "chunking.py",
        "before % stride == 0",
        "(before + 1) % stride == 0",
        "test_stream",
    ),
    "ragged padding leaking into the queue": (
        "stream.py",
        "_on(device, layout.compression_count)",
        "_on(device, 0 * layout.compression_count + layout.compression.shape[1])",
        "test_batches",
    ),
    "ragged rows at the first one's positions": (
        "stream.py",
        "(state.row_length[0] if alike else state.row_length[:, None])",
        "state.row_length[0]",
        "test_batches",
    ),
    "a sequence that goes on gets another's closing": (
        "stream.py",
        "old = _choose(slots.closes, new, old)",
        "old = new",
        "test_batches",
    ),
    "labels of padding counted": (
        "model.py",
        "lengths[:, None] - 1",
        "lengths[:, None]",
        "test_batches",
    ),
    "labels not shifted": (
        "model.py",
        "F.pad(labels[:, 1:], (0, 1), value=IGNORE)",
        "labels",
        "test_model",
    ),
    "backpropagation not cut": (
        "stream.py",
        "_choose(_flags(rows, t.device), t.detach(), t)",
        "_choose(_flags(rows, t.device), t, t)",
        "test_gradients",
    ),
    "no gradient into the old state": (
        "global_memory.py",
        "g * state + (1 - g) * new",
        "g * state.detach() + (1 - g) * new",
        "test_gradients",
    ),
    "decoding that never opens a chunk": (
        "model.py",
        'params, config, None, roll, None, take, "last"',
        'params, config, None, False, None, take, "last"',
        "test_decoding",
    ),
    "the last token not read": (
        "model.py",
        "return CoMeTGeneration(new, state)",
        "return CoMeTGeneration(new, before)",
        "test_decoding",
    ),
    "a loaded state that forgets its queue": (
        "state.py",
        "grouped[name] = tuple(found)",
        'grouped[name] = tuple(t * (name != "temporary_memory") for t in found)',
        "test_state",
    ),
    "a fork that shares its neighbour's text": (
        "state.py",
        "t.repeat_interleave(copies, dim=0)",
        "t.repeat(copies, *[1] * (t.dim() - 1))",
        "test_batches",
    ),
}
"""What is wrong: (file of fast/, the right text, the wrong text, the tests that notice)."""

SETUP = {
    "the last token not read": (
        "model.py",
        "step: list[int | None] = [",
        "before = state\n                step: list[int | None] = [",
    )
}
"""A second edit that a fault needs to run at all."""


def run(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    files = [f"parity/{name}.py" for name in tests]
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
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
    file, right, wrong, tests = FAULTS[fault]
    if fault in SETUP:
        break_line(copy, *SETUP[fault])
    break_line(copy, file, right, wrong)
    result = run(copy, [tests])
    assert result.returncode == 1, f"{fault} went unnoticed:\n{result.stdout}{result.stderr}"
    assert re.search(r"^FAILED|\d+ failed", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("tests", sorted({fault[3] for fault in FAULTS.values()}))
def test_the_same_tests_pass_without_a_fault(copy, tests):
    result = run(copy, [tests])
    assert result.returncode == 0, result.stdout + result.stderr
