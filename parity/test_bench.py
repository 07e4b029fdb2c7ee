"""The bench counts, fits and fills in what it says it does."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from fast.bench import report
from fast.bench.speed import MEMORIES, Case, Timed, chunk_work, take_turns


def test_contestants_take_turns():
    order = []
    contestants = {name: lambda name=name: order.append(name) for name in "abc"}
    timed = take_turns(contestants, 3)
    assert "".join(order) == "abc" * 4
    assert all(len(seconds) == 3 for seconds in timed.seconds.values())


def test_a_turn_is_timed_from_idle_to_idle():
    order = []
    take_turns({"a": lambda: order.append("a")}, 1, lambda: order.append("idle"))
    assert order == ["idle", "a", "idle"] * 2


def test_medians_and_spreads():
    timed = Timed({"a": [1.0, 2.0, 3.0, 4.0, 100.0], "b": [7.0]})
    assert timed.median("a") == 3.0
    assert timed.spread("a") == pytest.approx(1 / 3)
    assert timed.spread("b") == 0.0


@pytest.mark.parametrize("memory", ["128/8/16", "2048/512/2048"])
def test_the_work_of_a_chunk_is_counted_slot_by_slot(memory):
    config = Case("135M", memory).config
    b, m = config.backbone, config.memory
    d, e, f = b.hidden_size, b.head_dim, b.intermediate_size
    kinds = ["text"] * m.chunk_size + ["kept"] * (m.chunk_size // 8 + m.global_memory_size)
    slots, total = m.global_memory_size + m.temporary_memory_size, 0
    key_value = 2 * 2 * d * b.num_key_value_heads * e
    for layer in range(b.num_hidden_layers):
        top = layer == b.num_hidden_layers - 1
        total += slots * key_value
        for place, _ in enumerate(kinds):
            total += key_value
            if not top:
                pairs = slots + place + 1
                total += 2 * (2 * d * b.num_attention_heads * e + 3 * d * f)
                total += 2 * 2 * pairs * b.num_attention_heads * e
        if top:  # the kept slots are taken to see the whole row
            for _ in range(kinds.count("kept")):
                total += 2 * (2 * d * b.num_attention_heads * e + 3 * d * f)
                total += 2 * 2 * (slots + len(kinds)) * b.num_attention_heads * e
    assert chunk_work(config) == pytest.approx(total, rel=1e-12)


def test_a_fit_finds_the_law():
    n = np.array([1024.0, 2048, 4096, 8192])
    assert report.fit(n, 3e-5 * n + 2e-9 * n**2, [1, 2]) == pytest.approx([3e-5, 2e-9])
    assert report.fit(n, 3e-5 * n - 1e-10 * n**2, [1, 2])[1] == 0.0
    assert report.fit(n, 5e-4 * n, [1]) == pytest.approx([5e-4])


def test_the_bench_runs_and_fills_its_page(tmp_path):
    """Every section, the smallest of each."""
    case = Case("small", "128/8/16", threads=1, rounds=1)
    jobs = [
        report.Job("prefill", dataclasses.replace(case, kept=False), (1,)),
        report.Job("length", case, ([64, 128, 256, 512],)),
        report.Job("decoding", case, ([64], 2)),
        report.Job("training", case, (1,)),
        report.Job("memory", case, (300,)),
    ]
    results = report.run(tmp_path, jobs)
    assert json.loads((tmp_path / "bench.json").read_text())["results"] == results
    parts = report.tables(results)
    assert list(parts) == ["prefill", "length", "decoding", "training", "memory"]
    for part in parts.values():
        assert len({line.count("|") for line in part.splitlines()}) == 1, part
    assert "131,072 (fitted)" in parts["length"]
    assert results[-1]["result"]["state"] == 3 * (8 + 16) * 64 * 4
    (tmp_path / "images").mkdir()
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {n} -->\nold\n<!-- end -->\n" for n in (*parts, "machine")))
    report.fill(page, results)
    assert "old" not in page.read_text()
    assert all(part in page.read_text() for part in parts.values())
    assert (tmp_path / "images" / "lengths.svg").exists()
    page.write_text("")
    with pytest.raises(ValueError, match="needs <!-- prefill -->"):
        report.fill(page, results)


def test_the_page_has_the_places_of_the_bench():
    page = (report.Path(__file__).parent.parent / "docs" / "performance.md").read_text()
    for section in (*report.MEASURES, "machine"):
        assert page.count(f"<!-- {section} -->") == 1
    assert {job.case.memory for job in report.JOBS} <= set(MEMORIES)


def test_memory_is_kept_by_who_asks_for_it():
    """Then large tensors made over and over bring page faults no more; a model does not ask."""
    script = """
import resource, sys, torch
from fast import CoMeTModel, keep_memory
from fast.tasks.passkey_recipe import small_config

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        x = torch.ones(10_000_000)
        x = x + x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

CoMeTModel(small_config())
kept = sys.argv[1] == "asked" and keep_memory()
faults()
print(kept, faults())
"""
    found = {}
    for who in ("nobody", "asked"):
        run = subprocess.run(
            [sys.executable, "-c", script, who], capture_output=True, text=True, check=True
        )
        kept, faults = run.stdout.split()
        found[who] = kept == "True", int(faults)
    if found["asked"][0]:  # glibc
        assert found["asked"][1] < 0.1 * found["nobody"][1]
