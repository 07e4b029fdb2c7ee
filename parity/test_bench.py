"""The bench counts, fits and fills in what it says it does."""

import dataclasses
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fast import MemoryConfig
from fast.__main__ import main
from fast.bench import devices, pipeline, pretrained, report, speed
from fast.bench.speed import MEMORIES, Case, Timed, chunk_work, literal_work, take_turns
from fast.cupy_engine import CoMeTEngine
from fast.cupy_engine import engine as engine_module
from fast.parallel import Span
from fast.parallel.simulator import Costs

from .test_backbones import small

pytestmark = pytest.mark.host


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
    row, whole = slots + len(kinds), 0
    for place in range(row):
        whole += key_value + 2 * (2 * d * b.num_attention_heads * e + 3 * d * f)
        whole += 2 * 2 * (place + 1) * b.num_attention_heads * e
    assert literal_work(config) == pytest.approx(whole * b.num_hidden_layers, rel=1e-12)


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
        report.Job("compiled", case, (2, "reading")),
        report.Job("diagonal", case, (2, "reading")),
        report.Job("others", case, ([30], 2)),
        report.Job("types", case, (1, 2)),
        report.Job("memory", case, (300,)),
    ]
    results = report.run(tmp_path, jobs)
    assert json.loads((tmp_path / "bench.json").read_text())["results"] == results
    parts = report.tables(results)
    assert [*parts] == [job.section for job in jobs]
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


@pytest.mark.parametrize(
    ("name", "jobs"),
    [("performance.md", report.JOBS), ("gpu-performance.md", report.DEVICE_JOBS)],
)
def test_a_page_has_the_places_of_its_bench(name, jobs):
    page = (report.Path(__file__).parent.parent / "docs" / name).read_text()
    sections = {job.section for job in jobs}
    for section in report.MEASURES:
        assert page.count(f"<!-- {section} -->") == (section in sections)
    assert page.count("<!-- machine -->") == 1
    assert {job.case.memory for job in jobs} <= set(MEMORIES)


def device_job(dtype, length):
    return report.Job(
        "device", Case("small", "128/8/16", threads=1, rounds=2, dtype=dtype), ([length], 2, True)
    )


@pytest.fixture
def in_this_process(monkeypatch):
    """Contestants of one layer each, since tracing takes its time, in no process of their own."""
    one_layer = dataclasses.replace(speed.BACKBONES["small"], num_hidden_layers=1)
    monkeypatch.setitem(speed.BACKBONES, "small", one_layer)
    monkeypatch.setattr(speed, "in_its_own_process", lambda run, case, *more: run(case, *more))
    limit = torch._dynamo.config.cache_size_limit
    yield
    torch._dynamo.config.cache_size_limit = limit
    torch._dynamo.reset()


def test_the_engine_runs_beside_pytorch_without_a_gpu(
    in_this_process, tmp_path, monkeypatch, capsys
):
    """All contestants, over a closed chunk; then a dtype that the engine may refuse."""
    monkeypatch.setattr(
        report, "DEVICE_QUICK", (device_job("float32", 130), device_job("bfloat16", 8))
    )
    main(["bench", "--device", "cpu", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "cpu" / "bench.json").read_text())["results"]
    single, half = results[0]["result"]["130"], results[1]["result"]["8"]
    names = set(devices.CONTESTANTS)
    assert single["refused"] == single["memory"] == half["memory"] == {}
    for kind in ("reading", "decoding"):
        assert set(single[kind]) == names
        assert all(len(turns) == 2 and min(turns) > 0 for turns in single[kind].values())
        assert set(half[kind]) == names - set(half["refused"])
    assert set(half["refused"]) <= {"engine"}

    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| small")]
    assert len(rows) == 4, "a row for each dtype, read and decoded"
    assert {row.count("|") for row in rows} == {9}
    assert all(why in printed for why in half["refused"].values())
    assert not any(word in printed for word in ("Memory", "GPU", "CUDA", "driver"))

    page = tmp_path / "page.md"
    page.write_text("<!-- machine -->\nold\n<!-- end -->\n<!-- device -->\nold\n<!-- end -->\n")
    report.fill(page, results)
    assert "old" not in page.read_text()
    assert report.tables(results)["device"] in page.read_text()


def test_contestants_that_disagree_are_not_timed(in_this_process, monkeypatch):
    predict = engine_module.predict
    monkeypatch.setattr(engine_module, "predict", lambda *args: predict(*args) + 1e-4)
    job = device_job("float32", 8)
    with pytest.raises(AssertionError, match="logits of engine and PyTorch are 0.0001 apart"):
        devices.measure_device(job.case, *job.more)


def test_one_that_fails_costs_the_others_nothing(in_this_process, monkeypatch):
    def generate(*args):
        raise MemoryError("no memory\nfor this")

    monkeypatch.setattr(CoMeTEngine, "generate", generate)
    job = device_job("float32", 8)
    found = devices.measure_device(job.case, *job.more)[8]
    assert found["refused"] == {"engine": "MemoryError: no memory"}
    assert set(found["reading"]) == set(found["decoding"]) == set(devices.CONTESTANTS[1:])


class MemoryHook:
    """CuPy's, as far as the bench uses it."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def fake_gpu(monkeypatch):
    """What the bench asks PyTorch and CuPy of a GPU."""
    cuda = SimpleNamespace(
        MemoryHook=MemoryHook,
        runtime=SimpleNamespace(runtimeGetVersion=lambda: 12090, driverGetVersion=lambda: 0),
    )
    monkeypatch.setitem(
        sys.modules, "cupy", SimpleNamespace(__version__="14.2.0", __spec__=None, cuda=cuda)
    )
    for name, answer in {
        "is_available": True,
        "get_device_name": "A GPU",
        "reset_peak_memory_stats": None,
        "memory_allocated": 100,
        "max_memory_allocated": 103,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    return cuda


def test_the_peak_is_what_both_libraries_hold_at_most(fake_gpu, monkeypatch):
    hooks = []
    monkeypatch.setattr(MemoryHook, "__enter__", lambda self: hooks.append(self) or self)

    def run():
        for size in (5, 7, -5, 1, -8):
            change = hooks[0].malloc_postprocess if size > 0 else hooks[0].free_postprocess
            change(device_id=0, mem_size=abs(size), mem_ptr=1, pmem_id=1)
        return "out"

    assert devices._with_peak(run, "cuda") == ("out", 3 + 12)
    assert devices._with_peak(lambda: "out", "cpu") == ("out", None)


def test_the_gpu_is_told_with_its_versions(fake_gpu, monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert devices.gpu().startswith("A GPU, driver unknown, CuPy 14.2.0 with CUDA 12.9, torch with")


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("gpu", "needs an NVIDIA GPU, and PyTorch .* finds none; check the driver"),
        ("cupy", "CuPy is not installed .*; install the one for your CUDA"),
        ("driver", "CuPy 14.2.0 finds no NVIDIA driver"),
    ],
)
def test_without_a_gpu_the_command_says_what_to_do(lacks, says, fake_gpu, monkeypatch, capsys):
    if lacks == "gpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif lacks == "cupy":
        monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--device", "cuda", "--quick"])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(says, err), err


def test_a_run_on_a_cpu_fills_no_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- device -->\nold\n<!-- end -->\n")
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--device", "cpu", "--page", str(page)])
    assert stop.value.code == 2
    assert "--page needs --device cuda" in capsys.readouterr().err
    assert "old" in page.read_text()


def test_memory_is_kept_by_who_asks_for_it():
    """Then large tensors made over and over bring page faults no more; a model does not ask."""
    script = """
import resource, sys, torch
from fast import CoMeTModel, keep_memory
from fast.bench.speed import Case

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        x = torch.ones(10_000_000)
        x = x + x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

CoMeTModel(Case("small", "128/8/16").config)
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


def test_a_backbone_is_timed_beside_itself_in_transformers(tmp_path, capsys, monkeypatch):
    """The same weights: without memories, ours chooses their tokens, or nothing is timed."""
    path = tmp_path / "backbone"
    model = small("llama")
    model.save_pretrained(path)
    memory = MemoryConfig(chunk_size=8, global_memory_size=2, temporary_memory_size=4)
    sizes = {"length": 40, "context": 12, "new": 5, "rounds": 2, "memory": memory}
    found = pretrained.measure(path, **sizes)
    assert {*found.reading.seconds} == {*found.decoding.seconds} == {"transformers", "CoMeT"}
    assert all(len(turns) == 2 for turns in found.reading.seconds.values())
    heads = model.config.num_key_value_heads * model.config.head_dim
    assert found.held["transformers"] == 2 * 2 * 4 * 40 * heads
    assert found.held["CoMeT"] < found.held["transformers"]

    timed = Timed({"transformers": [3.0], "CoMeT": [1.5]})
    told = pretrained.Measured(600, 100, 6, timed, timed, {"transformers": 20, "CoMeT": 5})
    lines = pretrained.table(told).splitlines()
    assert lines[2].startswith("| transformers | 3.0 s, 200 tokens/s | 3.0 s, 2 tokens/s | 0.0 MB")
    assert lines[4] == "| times | 2.00 | 2.00 | 4.0 |"

    measure = pretrained.measure
    monkeypatch.setattr(pretrained, "measure", lambda path, **_: measure(path, **sizes))
    monkeypatch.setattr("fast.__main__.keep_memory", lambda: None)
    main(["bench", "--backbone", str(path), "--quick"])
    assert "| reading 40 tokens |" in capsys.readouterr().out

    other = tmp_path / "other"
    random = small("llama")
    with torch.no_grad():
        random.lm_head.weight.neg_()
    random.save_pretrained(other)
    theirs = pretrained.load_theirs
    monkeypatch.setattr(pretrained, "load_theirs", lambda _, dtype: theirs(other, dtype))
    with pytest.raises(AssertionError, match="do not choose the same tokens"):
        pretrained.measure(path, **sizes)


def test_the_pipeline_s_bench_runs_and_fills_its_page(tmp_path, capsys, monkeypatch):
    """The least of everything, in two processes of its own."""
    least = pipeline.Setting("small", "128/8/16", rounds=1, chunks=(3,), blocks=(1,), picture=2)
    monkeypatch.setattr(pipeline, "QUICK", least)
    page, out = tmp_path / "page.md", tmp_path / "out"
    names = ("machine", "measured", "predicted", "scaling")
    page.write_text("".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in names))
    main(["bench", "pipeline", "--quick", "--simulate", "--out", str(out), "--page", str(page)])
    printed, filled = capsys.readouterr().out, page.read_text()
    assert "old" not in filled
    parts = re.findall(r"<!-- (?!end)\w+ -->\n(.*?)\n<!-- end -->", filled, re.DOTALL)
    assert len(parts) == len(names)
    assert all(part in printed for part in parts)
    assert len(re.findall(r"^\| 3 \| 1 \| (one process|two workers)", filled, re.MULTILINE)) == 3
    assert len(re.findall(r"^\| 16M \| [\d,]+ \|", filled, re.MULTILINE)) == len(pipeline.SIZES)
    found = json.loads((out / "pipeline.json").read_text())
    spans = found["picture"]
    for kind in ("forward", "backward"):
        cells = [(s["chunk"], s["layer"]) for s in spans if s["kind"] == kind]
        assert sorted(cells) == [(t, i) for t in range(2) for i in range(3)]
    assert all(s["worker"] == s["chunk"] % 2 for s in spans if s["chunk"] >= 0)
    assert all(0 < s["start"] < s["end"] for s in spans)
    assert len(found["costs"]["forward"]) == 2  # the first chunk's, and that of the second half


def test_costs_are_the_medians_of_recorded_steps():
    def worker(number, chunks, slower):
        """What it does: of chunk t, a cell forward t + 1 seconds, and back twice as long."""
        spans = [Span("forward", number, t, 0, 0.5, 1.5 + t + slower) for t in chunks]
        spans += [Span("backward", number, t, 0, 10.0, 12.0 + 2 * t) for t in chunks]
        spans += [Span("head", number, t, -1, 8.0, 8.25) for t in chunks]
        return [*spans, Span("add", number, -1, -1, 20.0, 21.0 + number)]

    steps = [[worker(0, (0, 2), slower), worker(1, (1, 3), slower)] for slower in (0.0, 0.0, 9.0)]
    costs = pipeline.costs_of(steps, 0.125)
    assert costs == Costs((1.0, 2.0, 4.0), (2.0, 4.0, 7.0), 0.25, 0.125, 0.5 + 1.0)


def test_simulate_is_an_option_of_the_pipeline(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--simulate"])
    assert stop.value.code == 2
    assert "--simulate is of `bench pipeline`" in capsys.readouterr().err
