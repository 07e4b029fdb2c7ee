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

ROOT = Path(__file__).parent.parent

FAULTS = {
    "gate operands swapped": (
        "global_memory.py",
        "torch.cat([candidate, state], dim=-1)",
        "torch.cat([state, candidate], dim=-1)",
        "test_global_memory::test_update_global",
    ),
    "g and 1 - g swapped": (
        "global_memory.py",
        "g * state + (1 - g) * candidate",
        "(1 - g) * state + g * candidate",
        "test_global_memory::test_update_global",
    ),
    "the candidate's norm left out": (
        "global_memory.py",
        'return rms_norm(readout, weights["norm"], eps)',
        "return readout",
        "test_global_memory::test_update_global",
    ),
    "the global memory read without its adapter": (
        "global_memory.py",
        "return adapter(state, weights)",
        "return state",
        "test_global_memory::test_propose_gate_and_read",
    ),
    "saturation ignored": (
        "global_memory.py",
        "return g if saturation == 1.0 else torch.clamp(g / saturation, max=1.0)",
        "return g",
        "test_global_memory::test_update_global",
    ),
    "the default epsilon wrong": (
        "layers.py",
        "eps = torch.finfo(wide.dtype).eps",
        "eps = 1e-6",
        "test_global_memory::test_the_default_epsilon_is_the_dtypes_own",
    ),
    "the default epsilon the half type's own": (
        "layers.py",
        "eps = torch.finfo(wide.dtype).eps",
        "eps = torch.finfo(x.dtype).eps",
        "test_half_types::test_rms_norm_takes_its_statistic_and_its_epsilon_in_float32",
    ),
    "rotary tables rounded to the half type": (
        "layers.py",
        "cos, sin = (part[:, None] for part in rotation)",
        "cos, sin = (part[:, None].to(x.dtype) for part in rotation)",
        "test_half_types::test_a_rotation_is_rounded_once",
    ),
    "rotary tables made in the half type": (
        "stream.py",
        "dtype = torch.promote_types(table.dtype, torch.float32)",
        "dtype = table.dtype",
        "test_half_types::test_heads_are_turned_by_tables_of_float32",
    ),
    "the queue's epsilon wrong": (
        "temporary_memory.py",
        "weights, config.temporary_norm_eps)",
        "weights, 1e-6)",
        "test_temporary_memory::test_the_norms_epsilon_is_its_own",
    ),
    "queue entries not normed": (
        "temporary_memory.py",
        'adapter(rms_norm(compression, weights["norm"], eps), weights)',
        "adapter(compression, weights)",
        "test_temporary_memory::test_queue_entries",
    ),
    "oldest entries kept in place of the newest": (
        "temporary_memory.py",
        "return joined[:, joined.shape[1] - size :]",
        "return joined[:, :size]",
        "test_temporary_memory::test_update_temporary",
    ),
    "the queue one entry short": (
        "temporary_memory.py",
        "size = min(config.temporary_memory_size, joined.shape[1])",
        "size = min(config.temporary_memory_size - 1, joined.shape[1])",
        "test_temporary_memory::test_update_temporary",
    ),
    "a ragged queue one off": (
        "temporary_memory.py",
        "torch.where(source < old,",
        "torch.where(source <= old,",
        "test_temporary_memory::test_update_temporary_of_a_ragged_batch_is_each_sequence_alone",
    ),
    "the adapter's residual dropped": (
        "layers.py",
        "return x + linear(linear(x,",
        "return linear(linear(x,",
        "test_layers::test_adapter_linear_sigmoid",
    ),
    "rotary tables one off": (
        "layers.py",
        "positions[..., None].to(torch.float64)",
        "(positions[..., None] + 1).to(torch.float64)",
        "test_layers::test_rotary_table_and_frequencies",
    ),
    "rotary pairs interleaved": (
        "layers.py",
        "first, second = widen(x).chunk(2, dim=-1)",
        "first, second = widen(x)[..., ::2], widen(x)[..., 1::2]",
        "test_layers::test_rotate_and_heads",
    ),
    "a slot sees the one after it": (
        "layers.py",
        "> positions[:, None, :, None]",
        "> positions[:, None, :, None] + 1",
        "test_layers::test_attention",
    ),
    "the first chunk not causal": (
        "layers.py",
        "is_causal=mask is None",
        "is_causal=False",
        "test_layers::test_attention",
    ),
    "keys not normed per head": (
        "layers.py",
        "heads = rms_norm(heads, weights[norm], config.rms_norm_eps)",
        "pass",
        "test_layers::test_decoder_layer",
    ),
    "projections without their biases": (
        "layers.py",
        "if config.attention_bias else None",
        "if False else None",
        "test_layers::test_decoder_layer",
    ),
    "a mask that hides nothing": (
        "layers.py",
        ".masked_fill_(unseen, -torch.inf)",
        "",
        "test_layers::test_attention",
    ),
    "a mask of all slots for the few asked for": (
        "layers.py",
        "rotation, mask = (cos, sin), None",
        "rotation, mask = (cos, sin), None if mask is None else mask[..., : queried.shape[1], :]",
        "test_splitting::test_asking_for_fewer_outputs_changes_nothing_else",
    ),
    "the row's indices left on the host": (
        "stream.py",
        "torch.from_numpy(x).to(device)",
        "torch.from_numpy(x)",
        "test_devices::test_reading_and_decoding_stay_on_the_device",
    ),
    "a value asked of the device": (
        "layers.py",
        "if mask is None:\n",
        "if mask is None or bool((queries > 1e9).any()):\n",
        "test_devices::test_reading_and_decoding_stay_on_the_device",
    ),
    "another activation": (
        "layers.py",
        "F.silu(",
        "F.gelu(",
        "test_layers::test_swiglu_and_keys_values",
    ),
    "positions not restarted in a chunk": (
        "rows.py",
        "positions=row_length +",
        "positions=state.tokens[: len(take), None] +",
        "test_stream::test_every_call_leaves_the_reference_s_state",
    ),
    "positions not counting memory slots": (
        "rows.py",
        "positions=row_length +",
        "positions=old +",
        "test_stream::test_every_call_leaves_the_reference_s_state",
    ),
    "memory slots at positions of their own": (
        "stream.py",
        "_rotation(np.arange(slots)[None]",
        "_rotation(np.zeros((1, slots), dtype=np.int64)",
        "test_stream::test_open_chunk",
    ),
    "the output before the last one given for the last": (
        "rows.py",
        "last = np.maximum(take - 1, 0)",
        "last = np.maximum(take - 2, 0)",
        "test_splitting::test_asking_for_fewer_outputs_changes_nothing_else",
    ),
    "the slots asked for keep the first one's rotation": (
        "layers.py",
        "rotation, mask = (cos, sin), None",
        "rotation, mask = (cos[..., :1, :], sin[..., :1, :]), None",
        "test_splitting::test_asking_for_fewer_outputs_changes_nothing_else",
    ),
    "no rotation in half types": (
        "layers.py",
        "return torch.cat(turned, dim=-1).to(x.dtype)",
        "return torch.cat(turned, dim=-1).to(x.dtype) if x.element_size() > 2 else x",
        "test_half_types::test_half_types_err_as_a_rounding_of_the_weights_does",
    ),
    "no queue in half types": (
        "stream.py",
        "parts.append(state.temporary_memory[i])",
        "parts.append(state.temporary_memory[i] * (state.temporary_memory[i].element_size() > 2))",
        "test_half_types::test_half_types_err_as_a_rounding_of_the_weights_does",
    ),
    "every layer sees the first one's global memory": (
        "stream.py",
        'read_global(state.global_state[i], weights["global_memory"])',
        'read_global(state.global_state[0], weights["global_memory"])',
        "test_stream::test_open_chunk",
    ),
    "temporary memory before global memory": (
        "stream.py",
        "joined = torch.cat(parts, dim=1)[:, :slots]",
        "joined = torch.cat(parts[::-1], dim=1)[:, :slots]",
        "test_stream::test_open_chunk",
    ),
    "the first chunk gated": (
        "global_memory.py",
        "g = g * has_state[..., None]",
        "g = g * 1",
        "test_stream::test_every_call_leaves_the_reference_s_state",
    ),
    "the last partial group's compression token forgotten": (
        "rows.py",
        "trailing = closes *",
        "trailing = closes * (tokens % stride == 0) *",
        "test_rows::test_a_row_is_what_a_scan_over_its_tokens_lays",
    ),
    "readout order reversed": (
        "rows.py",
        "np.arange(m if closes.any() else 0)",
        "np.arange(m if closes.any() else 0)[::-1]",
        "test_stream::test_every_call_leaves_the_reference_s_state",
    ),
    "a chunk closed as soon as it is full": (
        "chunking.py",
        "close = start + take < lengths",
        "close = (start + take < lengths) | (open_tokens + take >= (chunk_size or 2**60))",
        "test_stream::test_every_call_leaves_the_reference_s_state",
    ),
    "a compression token one text token early": (
        "rows.py",
        "np.where(rest == stride,",
        "np.where(rest == stride - 1,",
        "test_rows::test_a_row_is_what_a_scan_over_its_tokens_lays",
    ),
    "ragged padding leaking into the queue": (
        "cells.py",
        "(row.queue_length, row.entries)",
        "(row.queue_length, 0 * row.entries + row.compression.shape[1])",
        "test_batches::test_a_ragged_batch_is_each_sequence_alone",
    ),
    "ragged rows at the first one's positions": (
        "rows.py",
        "positions=row_length +",
        "positions=row_length[0] + 0 * row_length +",
        "test_batches::test_a_ragged_batch_is_each_sequence_alone",
    ),
    "padding written over the first column": (
        "rows.py",
        "np.where(is_text, start + j, num_columns)",
        "np.where(is_text, start + j, 0)",
        "test_batches::test_a_ragged_batch_is_each_sequence_alone",
    ),
    "a sequence that goes on gets another's closing": (
        "cells.py",
        "torch.where(row.closes[..., None] > 0, new, global_state)",
        "new",
        "test_batches::test_a_ragged_batch_is_each_sequence_alone",
    ),
    "the last label of a sequence not counted": (
        "model.py",
        "lengths[:, None] - 1",
        "lengths[:, None] - 2",
        "test_batches::test_the_loss_of_a_ragged_batch_counts_its_own_tokens_alone",
    ),
    "labels not shifted": (
        "model.py",
        "F.pad(labels[:, 1:], (0, 1), value=IGNORE)",
        "labels",
        "test_model::test_loss",
    ),
    "backpropagation not cut": (
        "stream.py",
        "_where_rows(rows, t.detach(), t)",
        "_where_rows(rows, t, t)",
        "test_gradients::test_gradients_along_random_directions",
    ),
    "no gradient into the old state": (
        "global_memory.py",
        "g * state + (1 - g) * candidate",
        "g * state.detach() + (1 - g) * candidate",
        "test_gradients::test_gradients_along_random_directions",
    ),
    "decoding that never opens a chunk": (
        "model.py",
        "roll=roll,",
        "roll=False,",
        "test_decoding::test_greedy_decoding_is_the_reference_s",
    ),
    "the last token not read": (
        "model.py",
        "take = running.astype(np.int64)",
        "take = (running & (np.array([len(r) + 1 for r in new]) < max_new_tokens)).astype(np.int64)",
        "test_decoding::test_greedy_decoding_is_the_reference_s",
    ),
    "a loaded state that forgets its queue": (
        "checkpoints.py",
        'found.pop(f"{name}.{i}") for i in layers',
        'found.pop(f"{name}.{i}") * (name != "temporary_memory") for i in layers',
        "test_state::test_save_and_load_change_nothing",
    ),
    "a fork that shares its neighbour's text": (
        "state.py",
        "t.repeat_interleave(copies, dim=0)",
        "t.repeat(copies, *[1] * (t.dim() - 1))",
        "test_batches::test_select_and_fork_rearrange_a_batch",
    ),
}
"""What is wrong: (file of fast/, the right text, the wrong text, the test that notices)."""


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
