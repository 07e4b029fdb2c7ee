"""Profiles and options of the parity suite."""

from __future__ import annotations

import os
from collections import defaultdict
from functools import wraps
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from fast import BackboneConfig, CoMeTConfig, MemoryConfig
from fast.cupy_engine.libraries import check_cupy

from . import device
from .assertions import NOTES
from .homes import homes_of

COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("default", max_examples=100, **COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, database=None, **COMMON)
# One failure is enough there, told as what it is, not as a group of several, and as it was found:
# nobody reads its smallest form.
settings.register_profile(
    "faults",
    max_examples=60,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate],
    **COMMON,
)
# Enough to meet every operation on another device, where each takes long.
settings.register_profile(
    "few",
    max_examples=5,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    **COMMON,
)
# Enough to see a law hold, while one waits.
settings.register_profile("quick", max_examples=20, derandomize=True, database=None, **COMMON)
settings.register_profile("thorough", max_examples=3000, **COMMON)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)

torch.set_num_threads(1)  # the models are tiny: a second thread only costs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of recorded cases, with a manifest.json (default: parity/golden)",
    )
    parser.addoption(
        "--device",
        default="cpu",
        help="where PyTorch's part runs, such as cuda or cuda:1; laws marked host are left out "
        "there (default: cpu, and all laws)",
    )
    parser.addoption(
        "--engine",
        choices=["numpy", "cupy"],
        default="numpy",
        help="cupy: run the laws of the engine and its kernels, and no others, on a GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        device.choose(config.getoption("--device"))
        if config.getoption("engine") == "cupy":
            os.environ["CUPY_TF32"] = "0"  # float32 is float32
            check_cupy()
    except (ImportError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header() -> str:
    left_out = "" if device.is_host() else "; laws marked host are left out"
    return f"PyTorch's part runs on {device.DEVICE}{left_out}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where a device or CuPy is asked for, keep the laws that run there."""
    on_cupy = config.getoption("engine") == "cupy"
    if device.is_host() and not on_cupy:
        return

    def runs(item: pytest.Item) -> bool:
        if item.get_closest_marker("engine"):
            return on_cupy
        return not device.is_host() and not item.get_closest_marker("host")

    left_out = [item for item in items if not runs(item)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "home" in metafunc.fixturenames:
        metafunc.parametrize("home", homes_of(metafunc), ids=lambda home: home.name)


def pytest_runtest_setup() -> None:
    NOTES.placed = False


def counted(test):
    """A test's function that notes each of its examples that ran."""

    @wraps(test)
    def run(*args, **kwargs):
        result = test(*args, **kwargs)
        NOTES.cases += 1
        return result

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Keep a test's notes as its properties, which a worker process sends with its report.

    A law that is not marked host must have made a tensor where `--device` says, on the CPU too.
    """
    is_host = item.get_closest_marker("host") is not None
    NOTES.cases, NOTES.nearest = 0, None
    hypothesis = getattr(getattr(item, "obj", None), "hypothesis", None)
    if hypothesis:
        inner = hypothesis.inner_test
        hypothesis.inner_test = counted(inner)
    try:
        result = yield
        if not (is_host or NOTES.placed):
            pytest.fail("no tensor was made by parity.device; make one, or mark the law host")
        return result
    finally:
        if hypothesis:
            hypothesis.inner_test = inner
        notes = {"cases": NOTES.cases or 1, "nearest": NOTES.nearest, "is_host": is_host}
        item.user_properties += notes.items()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line a law: its cases, and the comparison of all of them that came nearest to its limit."""
    cases, nearest, placed = defaultdict(int), defaultdict(list), set()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        notes = dict(getattr(report, "user_properties", ()))
        if "cases" in notes and report.when == "call" and not report.skipped:
            law = report.nodeid.split("[")[0].rpartition("/")[2].replace(".py", "")
            cases[law] += notes["cases"]
            nearest[law] += [notes["nearest"]] if notes["nearest"] else []
            placed |= set() if notes["is_host"] else {law}
    if not cases:
        return
    width = max(map(len, cases))
    terminalreporter.section("laws")
    terminalreporter.line(f"{'law':{width}}  {'cases':>6}  {'worst':>8}  {'allowed':>8}")
    for law, count in sorted(cases.items()):
        line = f"{law:{width}}  {count:6}"
        if nearest[law]:
            error, limit = max(nearest[law], key=lambda pair: pair[0] / pair[1])
            line += f"  {error:8.1e}  {limit:8.1e}"
        terminalreporter.line(line)
    rest = "those marked host are left out"
    if device.is_host():
        rest = f"{len(cases) - len(placed)} need no device"
    terminalreporter.line(f"laws that ran on {device.DEVICE}: {len(placed)}; {rest}")


@pytest.fixture
def make_config():
    """A small config with both memories, and fields changed by name."""

    def make(backbone: dict | None = None, memory: dict | None = None) -> CoMeTConfig:
        return CoMeTConfig(
            BackboneConfig(
                **{
                    "vocab_size": 11,
                    "hidden_size": 6,
                    "intermediate_size": 8,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 4,
                    "qk_norm": True,
                    **(backbone or {}),
                }
            ),
            MemoryConfig(
                **{
                    "chunk_size": 4,
                    "global_memory_size": 2,
                    "temporary_memory_size": 3,
                    "compression_stride": 2,
                    **(memory or {}),
                }
            ),
        )

    return make
