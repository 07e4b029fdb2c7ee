"""Random calls of the CUDA kernels' launchers, with what the reference says of them.

Inputs are rounded to the storage type first, and the float64 reference gets those same numbers, so
that only the kernel errs. Shapes fill warps, blocks and tiles, or leave some of each over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st

from fast.cupy_engine import kernels
from reference import global_memory, layers
from reference.config import MemoryConfig

from .assertions import ON_GPU, assert_rounded
from .emulation import Emulator, build
from .strategies import seeds

DTYPES = tuple(kernels.TYPES)

EPSILON = float(np.finfo(np.float32).eps)

EPSILONS = st.sampled_from([None, 1e-12, 1e-2])


@dataclass(frozen=True)
class Case:
    """One call."""

    call: Callable[[], Any]
    """Launches, and returns an array or several."""

    compare: Callable[..., list[tuple[str, Any, np.ndarray]]]
    """Takes those arrays, and returns operations as `ROUNDINGS` names them, what was found and
    what is expected."""

    def found(self) -> tuple[np.ndarray, ...]:
        """What the launcher returns."""
        found = self.call()
        return found if isinstance(found, tuple) else (found,)


def hold(case: Case) -> None:
    """The law of every kernel: it errs from the reference by roundings."""
    found = case.found()
    for operation, x, expected in case.compare(*found):
        times = ON_GPU[x.dtype.name] if getattr(kernels.run, "is_on_gpu", False) else 1.0
        assert_rounded(tensor(x), expected, operation, getattr(torch, x.dtype.name), times)


def hold_in_both_orders(case: Case) -> None:
    """Another: lanes, warps and blocks run in any order, and the result is the same bits."""
    forwards = case.found()
    kernels.run.backwards = True
    try:
        backwards = case.found()
    finally:
        kernels.run.backwards = False
    for f, b in zip(forwards, backwards, strict=True):
        assert f.tobytes() == b.tobytes(), "the order of lanes, warps or blocks shows"


@contextmanager
def emulated(source: str | None = None) -> Iterator[None]:
    """Kernels run on the CPU: the project's own, or those of another source."""
    library, run = build(source or kernels.source(), kernels.NAMES), kernels.run
    kernels.run = Emulator(kernels, library, kernels.NAMES)
    try:
        yield
    finally:
        kernels.run = run


@contextmanager
def on_gpu() -> Iterator[None]:
    """Kernels run on a GPU, by CuPy, on copies of NumPy's arrays."""
    import cupy

    launch = kernels.run

    def run(name: str, grid: tuple, block: tuple, args: tuple, shared_mem: int = 0) -> None:
        there = tuple(cupy.asarray(x) if isinstance(x, np.ndarray) else x for x in args)
        launch(name, grid, block, there, shared_mem)
        parameters = kernels.parameters()[name.partition("<")[0]]
        for parameter, x, copy in zip(parameters, args, there, strict=True):
            if parameter.is_output:
                x[...] = cupy.asnumpy(copy)

    run.is_on_gpu = True  # type: ignore[attr-defined]
    kernels.run = run
    try:
        yield
    finally:
        kernels.run = launch


def tensor(x: np.ndarray) -> torch.Tensor:
    """An array as a tensor; NumPy itself has no bfloat16."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def wide(x: Any) -> Any:
    """The same numbers for the reference."""
    if isinstance(x, dict):
        return {name: wide(part) for name, part in x.items()}
    return x.astype(np.float64)


class Numbers:
    """Random arrays of a storage type."""

    def __init__(self, seed: int, dtype: str) -> None:
        self.rng, self.dtype = np.random.default_rng(seed), np.dtype(dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self.rng.normal(0.0, scale, shape).astype(self.dtype)

    def uniform(self, *shape: int) -> np.ndarray:
        return self.rng.uniform(0.5, 1.5, shape).astype(self.dtype)

    def positions(self, sequences: int, most: int, n: int) -> np.ndarray:
        """[sequences, n] int64: n slots in a row, from a place up to `most`."""
        return self.rng.integers(0, most + 1, (sequences, 1)) + np.arange(n)


@st.composite
def widths(draw: st.DrawFn) -> int:
    """Channels: fewer than a warp, a block's threads, and more."""
    return draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 300, 520])))


def enough(count: int, numbers: int = 160) -> int:
    """How many rows of `count` numbers to take, so that a typical error is typical."""
    return -(-numbers // count)


@st.composite
def norms(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> Case:
    """Small numbers are far below the half types' epsilons; squares of large ones beyond
    float16."""
    d, eps = draw(widths()), draw(EPSILONS)
    scale = draw(st.sampled_from([1e-3, 1.0, 300.0]))
    numbers = Numbers(draw(seeds), draw(st.sampled_from(dtypes)))
    rows = draw(st.integers(1, 3)) * enough(d)
    x, weight = numbers.normal(2, rows, d, scale=scale), numbers.uniform(d)
    expected = layers.rms_norm(wide(x), wide(weight), EPSILON if eps is None else eps)
    return Case(
        lambda: kernels.rms_norm(x, weight, eps), lambda found: [("rms_norm", found, expected)]
    )


@st.composite
def rotations(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> Case:
    """Sequences that are alike, and sequences that stand at different places."""
    b, heads, n = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    half = draw(st.sampled_from([1, 2, 5, 32, 64]))
    numbers = Numbers(draw(seeds), draw(st.sampled_from(dtypes)))
    n *= enough(n * half, 1500)
    r = draw(st.sampled_from([1, b]))
    at = numbers.positions(r, 5000, n)
    angles = at[..., None] * 100.0 ** -(np.arange(half) / half)
    table = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    x = numbers.normal(b, heads, n, 2 * half)
    rows = [wide(np.broadcast_to(part, (b, n, half))) for part in table]
    turned = [layers.rotate(wide(x[i]), (rows[0][i], rows[1][i])) for i in range(b)]
    expected = np.stack(turned)
    return Case(lambda: kernels.rotate(x, table), lambda found: [("rotate", found, expected)])


@st.composite
def silu_products(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> Case:
    """Gates of both signs, small and large."""
    f, scale = draw(widths()), draw(st.sampled_from([0.1, 1.0, 10.0]))
    numbers = Numbers(draw(seeds), draw(st.sampled_from(dtypes)))
    gate = numbers.normal(enough(f), f, scale=scale)
    up = numbers.normal(enough(f), f)
    expected = wide(gate) * layers.sigmoid(wide(gate)) * wide(up)
    return Case(
        lambda: kernels.silu_product(gate, up),
        lambda found: [("silu_product", found, expected)],
    )


@st.composite
def attentions(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> Case:
    """Grouped heads, rows of one tile of keys and of several, full and not, padding after a row's
    own slots, and any slots of a row in any order, such as those that a top layer is asked for."""
    b, k, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n, past = draw(st.integers(1, 20)), draw(st.sampled_from([0, 1, 13, 31, 32, 33, 100]))
    e = draw(st.sampled_from([2, 8, 32, 40, 64, 128]))
    numbers = Numbers(draw(seeds), draw(st.sampled_from(dtypes)))
    b *= enough(k * group * n * e)
    r = draw(st.sampled_from([1, b]))
    at = numbers.positions(r, past, n) if r > 1 else past + np.arange(n)[None]
    if draw(st.booleans()):
        at = numbers.rng.integers(0, past + n, (r, n))
    queries = numbers.normal(b, k * group, n, e)
    keys, values = numbers.normal(b, k, past + n, e), numbers.normal(b, k, past + n, e)
    each = np.broadcast_to(at, (b, n))
    rows = zip(wide(queries), wide(keys), wide(values), each, strict=True)
    expected = np.stack([layers.attention(*row) for row in rows])
    return Case(
        lambda: kernels.attention(queries, keys, values, at),
        lambda found: [("attention", found, expected)],
    )


@st.composite
def updates(draw: st.DrawFn, gate: str, dtypes: tuple[str, ...] = DTYPES) -> Case:
    """A gate, saturated or not, with and without a bias; first chunks, whose state holds nothing,
    and chunks that do not close."""
    b, d, rank = draw(st.integers(1, 3)), draw(widths()), draw(st.sampled_from([1, 2, 8, 64]))
    m = draw(st.integers(1, 3)) * enough(d)
    config = MemoryConfig(
        gate=gate,
        gate_saturation=draw(st.sampled_from([1.0, 0.5])),
        global_norm_eps=draw(EPSILONS),
    )
    numbers = Numbers(draw(seeds), draw(st.sampled_from(dtypes)))
    rows, even = 1 if gate == "scalar" else d, (2 * d) ** -0.5
    weights = {
        "norm": numbers.uniform(d),
        "gate": numbers.normal(rows, 2 * d, scale=even),
        "adapter_down": numbers.normal(rank, d, scale=0.3 * d**-0.5),
        "adapter_up": numbers.normal(d, rank, scale=0.3 * rank**-0.5),
    }
    if numbers.rng.random() < 0.5:
        weights["gate_bias"] = numbers.normal(rows)
    if numbers.rng.random() < 0.5:
        weights["sink"] = numbers.normal(d)
    scale = draw(st.sampled_from([1e-3, 1.0]))
    readout, state = numbers.normal(b, m, d, scale=scale), numbers.normal(b, m, d)
    r = draw(st.sampled_from([1, b]))
    # Most chunks close over a state: only there the gate counts.
    has_state, closes = (numbers.rng.random((2, r, 1)) < 0.8).astype(np.int64)
    eps = EPSILON if config.global_norm_eps is None else config.global_norm_eps
    config64, weights64 = replace(config, global_norm_eps=eps), wide(weights)
    new = []
    for i in range(b):
        has, closing = has_state[i % r, 0], closes[i % r, 0]
        if closing and not has:
            state[i] = np.nan
        old = wide(state[i]) if has else None
        updated = global_memory.update_global(old, wide(readout[i]), weights64, config64)
        new.append(updated if closing else wide(state[i]))

    def compare(found, memory):
        expected = np.stack([global_memory.read_global(s, weights64) for s in wide(found)])
        return [("update_global", found, np.stack(new)), ("adapter", memory, expected)]

    return Case(
        lambda: kernels.update_global(state, readout, weights, config, has_state, closes), compare
    )
