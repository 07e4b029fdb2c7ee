"""The bench: every measurement of `speed` and `devices`, as JSON, and as the tables and pictures of
a page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..drawing import COLOURS, save_figure, style
from ..files import atomic_write, check_regular, check_writable, put_parts
from ..machine import machine
from . import devices, others, speed
from .speed import Case, Timed

__all__ = [
    "CPU_SECTIONS",
    "DEVICE_JOBS",
    "DEVICE_QUICK",
    "JOBS",
    "QUICK",
    "Job",
    "check",
    "choose",
    "draw",
    "fill",
    "fit",
    "footer",
    "run",
    "tables",
]


@dataclass(frozen=True)
class Job:
    """One measurement, in a process of its own."""

    section: str
    """Part of the page, one of `MEASURES`."""

    case: Case
    """What is measured."""

    more: tuple[Any, ...]
    """Further arguments of the section's function in `MEASURES`."""


MEASURES: dict[str, Callable[..., Any]] = {
    "prefill": speed.measure_prefill,
    "length": speed.measure_lengths,
    "decoding": speed.measure_decoding,
    "training": speed.measure_training,
    "compiled": speed.measure_compiled,
    "diagonal": speed.measure_diagonal,
    "others": others.measure_others,
    "types": speed.measure_types,
    "attention": speed.measure_attention,
    "graph": speed.measure_graph,
    "memory": speed.measure_memory,
    "device": devices.measure_device,
}

CPU_SECTIONS = tuple(name for name in MEASURES if name != "device")
"""Those of PyTorch alone."""

ATTENTION = (128, 256, 384, 512, 768, 1024, 2560)
"""Slots of which attention is measured."""

JOBS = (
    *(
        Job("prefill", Case(backbone, memory, kept=kept, rounds=rounds), (chunks,))
        for backbone, memory, chunks, rounds in (
            ("small", "128/8/16", 64, 9),
            ("5M", "256/32/128", 16, 7),
            ("5M", "128/8/16", 32, 7),
            ("5M", "2048/512/2048", 2, 5),
            ("135M", "128/8/16", 4, 5),
            ("135M", "512/64/256", 1, 5),
        )
        for kept in (True, False)
    ),
    Job("prefill", Case("135M", "2048/512/2048", rounds=1), (1,)),  # minutes a turn
    Job("prefill", Case("small", "128/8/16", batch_size=6, rounds=9), (16,)),
    Job("length", Case("small", "128/8/16", rounds=3), ([2**i for i in range(10, 15)],)),
    Job("length", Case("5M", "256/32/128", rounds=3), ([2**i for i in range(10, 15)],)),
    Job("length", Case("135M", "512/64/256", rounds=2), ([512, 1024, 2048, 4096],)),
    Job("decoding", Case("small", "128/8/16", rounds=5), ([1024, 4096, 16384], 64)),
    Job("decoding", Case("135M", "512/64/256", rounds=3), ([1024, 4096], 16)),
    *(
        Job("attention", Case(backbone, "2048/512/2048", rounds=15), (ATTENTION,))
        for backbone in ("small", "135M")
    ),
    Job("training", Case("small", "128/8/16", batch_size=8), (4,)),
    Job("training", Case("5M", "256/32/128"), (4,)),
    Job("compiled", Case("small", "128/8/16", rounds=9), (64, "reading")),
    Job("compiled", Case("5M", "256/32/128", rounds=7), (16, "reading")),
    Job("compiled", Case("5M", "2048/512/2048"), (2, "reading")),
    Job("compiled", Case("5M", "256/32/128"), (4, "training")),
    *(
        Job("diagonal", Case(backbone, memory, threads=threads, batch_size=texts), (chunks, what))
        for backbone, memory, threads, texts, chunks, what in (
            ("small", "128/8/16", 1, 1, 64, "reading"),
            ("small", "128/8/16", 2, 1, 64, "reading"),
            ("small", "128/8/16", 2, 2, 64, "reading"),
            ("small", "128/8/16", 2, 6, 32, "reading"),
            ("small", "128/8/16", 2, 1, 32, "training"),
            ("5M", "128/8/16", 2, 1, 32, "reading"),
            ("5M", "256/32/128", 2, 1, 16, "reading"),
            ("135M", "128/8/16", 2, 1, 16, "reading"),
        )
    ),
    Job("others", Case("small", "128/8/16", rounds=3), ([1024, 4096, 16384], 64)),
    Job("others", Case("5M", "256/32/128", rounds=3), ([1024, 4096, 16384], 64)),
    Job("others", Case("135M", "512/64/256", rounds=2), ([1024, 4096], 16)),
    Job("types", Case("small", "128/8/16"), (16, 32)),
    Job("types", Case("5M", "256/32/128"), (4, 32)),
    Job("types", Case("135M", "512/64/256", rounds=2), (1, 8)),
    *(
        Job("graph", Case("5M", "256/32/128"), (chunks, kept))
        for kept in speed.KEPT
        for chunks in (8, 16, 32, 64)
    ),
    *(
        Job("memory", Case("small", "128/8/16"), (length,))
        for length in (10_000, 100_000, 1_000_000)
    ),
)
"""The whole bench."""

QUICK = (
    Job("prefill", Case("small", "128/8/16"), (32,)),
    Job("prefill", Case("135M", "512/64/256", rounds=3), (1,)),
    Job("length", Case("small", "128/8/16", rounds=3), ([1024, 4096],)),
    Job("decoding", Case("small", "128/8/16", rounds=3), ([1024, 4096], 32)),
    Job("attention", Case("small", "128/8/16", rounds=3), ((128, 512),)),
    Job("training", Case("small", "128/8/16", rounds=3), (2,)),
    Job("compiled", Case("small", "128/8/16", rounds=3), (32, "reading")),
    Job("diagonal", Case("small", "128/8/16", rounds=3), (32, "reading")),
    Job("others", Case("small", "128/8/16", rounds=2), ([1024], 16)),
    Job("types", Case("small", "128/8/16", rounds=2), (4, 8)),
    *(Job("graph", Case("small", "128/8/16"), (chunks, "chunks")) for chunks in (8, 64)),
    *(Job("memory", Case("small", "128/8/16"), (length,)) for length in (10_000, 100_000)),
)
"""A few of its rows, in minutes."""

DEVICE_JOBS = tuple(
    Job("device", Case(backbone, memory, dtype=dtype, rounds=3), more)
    for backbone, memory, dtype, more in (
        ("135M", "2048/512/2048", "bfloat16", ([16384, 65536], 16, True)),
        ("135M", "2048/512/2048", "float32", ([16384], 16)),
        ("135M", "512/64/256", "bfloat16", ([16384], 16)),
        ("small", "128/8/16", "bfloat16", ([16384], 16)),
        ("135M", "512/64/256", "float32", ([16384], 16)),
    )
)
"""The engine beside PyTorch."""

DEVICE_QUICK = tuple(
    Job("device", Case("small", "128/8/16", dtype=dtype, rounds=3), ([512], 16))
    for dtype in devices.DTYPES
)
"""A row for each dtype, which a CPU can do too."""


def choose(device: str | None, quick: bool, section: str | None = None) -> list[Job]:
    """The jobs of a run.

    Args:
        section: of the page, to measure it alone.
        device: "cuda" or "cpu" puts the engine beside PyTorch there; None is PyTorch alone, on a
            CPU.
        quick: a few rows; of the engine on a CPU there are no others.
    """
    if device is None:
        jobs = QUICK if quick else JOBS
        return [job for job in jobs if section in (None, job.section)]
    jobs = DEVICE_QUICK if quick or device == "cpu" else DEVICE_JOBS
    return [replace(job, case=replace(job.case, device=device)) for job in jobs]


def check(folder: Path, page: Path | None, jobs: Sequence[Job]) -> None:
    """Raise unless the results can be written and the page has a place for each, before hours of
    measuring.

    Args:
        folder: of `run`.
        page: of `fill`, or None.
        jobs: what is to be measured.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the page lacks a place.
    """
    check_writable(folder / "bench.json")
    if page is not None:
        check_regular(page)
        text = page.read_text(encoding="utf-8")
        put_parts(text, dict.fromkeys([*(job.section for job in jobs), "machine"], ""), page)
        check_writable(page)
        if any(job.section == "length" for job in jobs):
            check_writable(page.parent / "images" / "lengths.svg")


def run(folder: Path, jobs: Sequence[Job] = JOBS) -> list[dict[str, Any]]:
    """Measure, one job after another.

    Args:
        folder: gets `bench.json`, all results so far, after each job.
        jobs: what to measure.

    Returns:
        Per job: "section", "case", "more" and "result".
    """
    from tqdm import tqdm  # of the extra `commands`

    results: list[dict[str, Any]] = []
    for job in tqdm(jobs, unit="job"):
        result = speed.in_its_own_process(MEASURES[job.section], job.case, *job.more)
        results.append(asdict(job) | {"result": result})
        data = {"machine": footer(job.case.device), "results": results}
        atomic_write(folder / "bench.json", json.dumps(data, indent=1) + "\n")
    return json.loads(json.dumps(results))  # as a reader of the file sees them


def footer(device: str | None = None) -> str:
    """Machine, threads and versions; where the device is "cuda", the GPU's too."""
    threads = f"{Case('small', '128/8/16').threads} threads"
    return machine(f"{threads}, {devices.gpu()}" if device == "cuda" else threads)


def fit(lengths: Sequence[float], seconds: Sequence[float], powers: Sequence[int]) -> list[float]:
    """Factors of the powers of a length that come nearest to the seconds, none below zero.

    Each length counts alike: it is the relative error whose squares are least. A factor that would
    be negative is left out, and the others are fitted again.

    Returns:
        One factor a power.
    """
    left = list(powers)
    while True:
        columns = np.array(
            [[n**p / s for p in left] for n, s in zip(lengths, seconds, strict=True)]
        )
        factors = np.linalg.lstsq(columns, np.ones(len(lengths)), rcond=None)[0]
        if (factors >= 0).all():
            found = dict(zip(left, factors.tolist(), strict=True))
            return [found.get(p, 0.0) for p in powers]
        left.pop(int(factors.argmin()))


def _name(result: dict[str, Any]) -> str:
    case = result["case"]
    batch = f", {case['batch_size']} texts" if case["batch_size"] > 1 else ""
    return f"{case['backbone']} | {case['memory']}{batch}"


def _speed(tokens: float, timed: Timed, name: str) -> str:
    spread = f" ± {timed.spread(name):.0%}" if len(timed.seconds[name]) > 1 else ", one turn"
    return f"{tokens / timed.median(name):,.0f}{spread}"


def _of(results: Sequence[dict[str, Any]], section: str) -> list[dict[str, Any]]:
    return [result for result in results if result["section"] == section]


def _table(head: str, rows: Sequence[str]) -> str:
    columns = head.count("|") + 1
    lines = [f"| {head} |", "| --- | --- |" + " ---: |" * (columns - 2)]
    return "\n".join([*lines, *(f"| {row} |" for row in rows)])


def _prefill(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        data, timed = r["result"], Timed(r["result"]["seconds"])
        ours, literal = timed.median("ours"), timed.median("literal")
        without = (
            f"{timed.median(f'ours, {saving}') / ours:.2f}"
            for saving in ("all of the top layer", "a layout a chunk", "with a mask")
        )
        config = Case(r["case"]["backbone"], r["case"]["memory"]).config
        bound = speed.literal_work(config) / speed.chunk_work(config)
        rows.append(
            f"{_name(r)} | {'kept' if r['case']['kept'] else 'default'} | "
            f"{_speed(data['tokens'], timed, 'ours')} | "
            f"{_speed(data['tokens'], timed, 'literal')} | "
            f"**{literal / ours:.2f}** | {bound:.2f} | "
            f"{' | '.join(without)} | "
            f"{data['work'] / ours / data['peak']:.0%} of {data['peak'] / 1e9:,.0f}"
        )
    head = (
        "model | chunk/m/B | memory | ours, tokens/s | literal, tokens/s | ours is faster by | "
        "by operations | trimmed top | one layout | no mask | GFLOP/s, of the peak"
    )
    return _table(head, rows)


FAR = (131_072, 1_048_576)
"""Lengths that full attention is not measured at, but fitted."""


def _lengths(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        times = {int(n): Timed(seconds) for n, seconds in r["result"].items()}
        for n, timed in times.items():
            ours, full = timed.median("ours"), timed.median("full attention")
            rows.append(
                f"{_name(r)} | {n:,} | {n / ours:,.0f} | {n / full:,.0f} | {full / ours:.2f}"
            )
        if len(times) > 3:
            own = fit(list(times), [t.median("ours") for t in times.values()], [1])[0]
            all_full = [t.median("full attention") for t in times.values()]
            linear, square = fit(list(times), all_full, [1, 2])
            for n in FAR:
                full = linear * n + square * n * n
                rows.append(
                    f"{_name(r)} | {n:,} (fitted) | {1 / own:,.0f} | {n / full:,.0f} | "
                    f"{full / own / n:.1f}"
                )
    head = "model | chunk/m/B | tokens | ours, tokens/s | full attention, tokens/s | faster by"
    return _table(head, rows)


def _decoding(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        for n, seconds in r["result"].items():
            timed = Timed(seconds)
            ours, full = timed.median("ours"), timed.median("full attention")
            rows.append(f"{_name(r)} | {int(n):,} | {1e3 * ours:.2f} | {1e3 * full:.2f}")
    return _table("model | chunk/m/B | text read | ours, ms | full attention, ms", rows)


def _training(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        timed, (chunks,) = Timed(r["result"]), r["more"]
        chunk = speed.MEMORIES[r["case"]["memory"]].chunk_size
        tokens = r["case"]["batch_size"] * chunks * chunk
        ours, literal = timed.median("ours"), timed.median("literal")
        rows.append(
            f"{_name(r)} | {tokens / ours:,.0f} | {tokens / literal:,.0f} | {literal / ours:.2f}"
        )
    return _table("model | chunk/m/B | ours, tokens/s | literal, tokens/s | faster by", rows)


def _compiled(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        data, timed = r["result"], Timed(r["result"]["seconds"])
        ours, compiled, literal = map(timed.median, ("ours", "compiled", "literal"))
        rows.append(
            f"{_name(r)} | {r['more'][1]} | {data['tokens'] / ours:,.0f} | "
            f"{_speed(data['tokens'], timed, 'compiled')} | {ours / compiled:.2f} | "
            f"**{literal / compiled:.2f}** | {data['first']:.0f}"
        )
    head = (
        "model | chunk/m/B | what | as written, tokens/s | compiled, tokens/s | faster by | "
        "than the literal schedule | first call, s"
    )
    return _table(head, rows)


def _diagonal(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        data, timed = r["result"], Timed(r["result"]["seconds"])
        rows.append(
            f"{_name(r)} | {r['more'][1]} | {r['case']['threads']} | "
            f"{_speed(data['tokens'], timed, 'chunks')} | "
            f"{_speed(data['tokens'], timed, 'diagonals')} | "
            f"**{timed.median('chunks') / timed.median('diagonals'):.2f}**"
        )
    return _table(
        "model | chunk/m/B | what | threads | chunk after chunk, tokens/s | along diagonals, "
        "tokens/s | faster by",
        rows,
    )


def _others(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        for n, found in r["result"].items():
            for kind, show in (
                ("reading", lambda s, n=int(n): f"{n / s:,.0f} tokens/s"),
                ("decoding", lambda s: f"{1e3 * s:.2f} ms"),
            ):
                timed = Timed(found[kind])
                cells = [
                    show(timed.median(name)) if name in timed.seconds else ""
                    for name in others.CONTESTANTS
                ]
                rows.append(f"{_name(r)} | {int(n):,} | {kind} | {' | '.join(cells)}")
    return _table(f"model | chunk/m/B | tokens | what | {' | '.join(others.CONTESTANTS)}", rows)


def _types(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        for kind, tokens in r["result"]["tokens"].items():
            timed = Timed(r["result"][kind])
            cells = [
                f"{tokens / timed.median(name):,.0f}"
                + f" ({timed.median('float32') / timed.median(name):.2f})" * (name != "float32")
                for name in speed.TYPES
            ]
            rows.append(f"{_name(r)} | {kind} | {' | '.join(cells)}")
    return _table(f"model | chunk/m/B | tokens/s | {' | '.join(speed.TYPES)}", rows)


def _attention(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        for size, seconds in zip(r["more"][0], r["result"], strict=True):
            masked, joined = (Timed(seconds).median(name) for name in ("masked", "joined"))
            rows.append(
                f"{r['case']['backbone']} | {size:,} | {masked * 1e3:,.2f} | {joined * 1e3:,.2f} | "
                f"{masked / joined:.2f}"
            )
    return _table(
        "model | slots before, and new ones | with a mask, ms | in two parts, ms | faster by", rows
    )


def _graph(results: Sequence[dict[str, Any]]) -> str:
    """Each text's memory and time; beside the first as long, of which all is kept, in brackets."""
    whole = {r["more"][0]: r["result"] for r in results if r["more"][1] == "all"}
    rows = []
    for r in results:
        (chunks, kept), found = r["more"], r["result"]
        times = f" ({found['seconds'] / whole[chunks]['seconds']:.2f})" if chunks in whole else ""
        rows.append(
            f"{_name(r)} | {kept} | {chunks} | {found['peak'] / 1e6:,.0f} | {found['seconds']:.1f}"
            f"{times}"
        )
    return _table("model | chunk/m/B | kept | chunks | memory, MB | seconds", rows)


def _memory(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        data, (length, *_) = r["result"], r["more"]
        growth = data["peak"] / results[0]["result"]["peak"] - 1
        rows.append(
            f"{_name(r)} | {length:,} | {data['peak'] / 1e6:.1f} | {growth:+.2%} | "
            f"{data['state']:,.0f} | {length / data['seconds']:,.0f}"
        )
    head = (
        "model | chunk/m/B | tokens | peak memory, MB | against the first | state, bytes | tokens/s"
    )
    return _table(head, rows)


def _device(results: Sequence[dict[str, Any]]) -> str:
    """A table for each quantity, and why cells are empty."""
    parts: list[str] = []
    reasons: dict[str, None] = {}  # each once, in order
    for kind, (title, show) in QUANTITIES.items():
        rows, is_there = [], False
        for r in results:
            for n, found in r["result"].items():
                tokens = int(n) * r["case"]["batch_size"]
                cells = [
                    show(found[kind], name, tokens) if name in found[kind] else ""
                    for name in devices.CONTESTANTS
                ]
                rows.append(f"{_name(r)} | {r['case']['dtype']} | {int(n):,} | {' | '.join(cells)}")
                is_there |= any(cells)
                for name, why in found["refused"].items():
                    reasons[f"- {name}, {r['case']['dtype']}: {why}"] = None
        if is_there:
            head = f"model | chunk/m/B | dtype | tokens | {' | '.join(devices.CONTESTANTS)}"
            parts.append(f"### {title}\n\n{_table(head, rows)}")
    if reasons:
        parts.append("\n".join(["Cells are empty where a contestant did not run:", "", *reasons]))
    return "\n\n".join(parts)


def _ratio(timed: Timed, name: str) -> str:
    """How many times as fast as PyTorch, in brackets."""
    if "PyTorch" not in timed.seconds:
        return ""
    return f" ({timed.median('PyTorch') / timed.median(name):.2f})"


def _read_cell(seconds: dict[str, list[float]], name: str, tokens: int) -> str:
    timed = Timed(seconds)
    return _speed(tokens, timed, name) + _ratio(timed, name)


def _decoded_cell(seconds: dict[str, list[float]], name: str, tokens: int) -> str:
    timed = Timed(seconds)
    return f"{1e3 * timed.median(name):.2f}" + _ratio(timed, name)


QUANTITIES: dict[str, tuple[str, Callable[..., str]]] = {
    "reading": ("Reading, tokens/s", _read_cell),
    "decoding": ("Decoding, ms a token", _decoded_cell),
    "memory": ("Memory at most, MB", lambda peak, name, tokens: f"{peak[name] / 1e6:,.1f}"),
}


TABLES = {
    "prefill": _prefill,
    "length": _lengths,
    "decoding": _decoding,
    "training": _training,
    "compiled": _compiled,
    "diagonal": _diagonal,
    "others": _others,
    "types": _types,
    "attention": _attention,
    "graph": _graph,
    "memory": _memory,
    "device": _device,
}


def tables(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A Markdown table for each section that was measured."""
    return {name: make(_of(results, name)) for name, make in TABLES.items() if _of(results, name)}


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds against length: ours and full attention, a panel for each model.

    Args:
        results: of `run`; those of the section "length" are drawn.
        path: an SVG file.
    """
    found = _of(results, "length")
    with style("lengths") as plt:
        figure, panels = plt.subplots(
            1, len(found), figsize=(8, 3), layout="constrained", squeeze=False
        )
        for axes, r in zip(panels[0], found, strict=True):
            times = {int(n): Timed(seconds) for n, seconds in r["result"].items()}
            for name, line, colour in (
                ("ours", "o-", COLOURS["global memory"]),
                ("full attention", "s--", COLOURS["other"]),
            ):
                medians = [timed.median(name) for timed in times.values()]
                axes.loglog([*times], medians, line, color=colour, label=name)
            axes.set(xlabel="tokens", title=_name(r).replace(" | ", ", "))
            axes.set_xticks([*times], [f"{n // 1024}k" if n > 1000 else f"{n}" for n in times])
            axes.minorticks_off()
        panels[0][0].set_ylabel("seconds")
        panels[0][0].legend()
        save_figure(figure, path)


def fill(page: Path, results: Sequence[dict[str, Any]]) -> None:
    """Put the tables into a page, between `<!-- SECTION -->` and `<!-- end -->`, in place of what
    is there, and the picture of lengths, where they were measured, beside it, as
    `images/lengths.svg`.

    Args:
        page: a Markdown file.
        results: of `run`.

    Raises:
        ValueError: the page has no such place.
    """
    text = page.read_text(encoding="utf-8")
    below = footer(results[0]["case"]["device"])
    text = put_parts(text, {**tables(results), "machine": below}, page)
    if _of(results, "length"):
        draw(results, page.parent / "images" / "lengths.svg")
    atomic_write(page, text)
