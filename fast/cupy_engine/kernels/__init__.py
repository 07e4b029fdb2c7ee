"""Fused CUDA kernels, and the functions that launch them: twins of those in `fast/layers.py` and
`fast/global_memory.py`.

Letters of shapes are as there. Arrays are on one device, and float32, float16 or bfloat16; what is
not contiguous is copied first. Arithmetic is in float32. Each ``.cu`` file opens with its kernel's
contract. `fast/cupy_engine/operations.py` says when they run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "NAMES",
    "TYPES",
    "attention",
    "check",
    "parameters",
    "rms_norm",
    "rotate",
    "run",
    "silu_product",
    "source",
    "update_global",
]

Array = Any
"""An array of CuPy, or of NumPy where something else than a GPU runs the kernels."""

TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
"""Storage types in CUDA, by the name of the array's dtype."""

KERNELS = ("attention", "blend_global", "rms_norm", "rotate", "silu_product", "update_global")

NAMES = tuple(f"{kernel}<{kind}>" for kernel in KERNELS for kind in TYPES.values())
"""Name expressions: every kernel in every storage type."""

FILES = (
    "common.cuh",
    "rms_norm.cu",  # before `update_global.cu`, which norms too
    "attention.cu",
    "rotate.cu",
    "silu_product.cu",
    "update_global.cu",
)

WARP, THREADS = 32, 256
"""Threads of a warp, and the most of a block, as in `common.cuh`."""

ATTENTION_THREADS, TILE_ROWS = 128, 16
"""Threads of a block of `attention`, and the rows of queries that it takes."""

MAX_HEAD_DIM, MAX_RANK = 128, 64
"""The widest head that `attention` takes, and the largest rank of `update_global`'s adapter."""

ARRAY_FORM = "Let arrays compute it: fast.cupy_engine.operations.KERNELS.pop({!r})."
"""What to do where a kernel cannot."""

SCALARS = {"int": np.int32, "long long": np.int64, "float": np.float32}
"""NumPy's scalars of C's types."""


class Parameter(NamedTuple):
    """One parameter of a kernel."""

    name: str
    """As in the source."""

    kind: str
    """C's type, without const and pointer: "T" is the storage type."""

    is_pointer: bool
    """Whether it takes an array."""

    is_output: bool
    """Whether it takes an array that is written to."""


@functools.cache
def source() -> str:
    """The CUDA C++ of all kernels, one text."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text() for name in FILES)


@functools.cache
def parameters() -> dict[str, tuple[Parameter, ...]]:
    """Every kernel's parameters, read from the source, by the kernel's name."""
    pattern = r"__global__ void(?: __launch_bounds__\([^)]*\))? (\w+)\(([^)]*)\)"
    return {
        kernel: tuple(_parameter(text) for text in texts.split(","))
        for kernel, texts in re.findall(pattern, source())
    }


def _parameter(text: str) -> Parameter:
    """The parameter that a declaration such as "const T* __restrict__ x" declares."""
    words = text.replace("*", " * ").replace("__restrict__", "").split()
    is_pointer, is_const = "*" in words, "const" in words
    kind = " ".join(word for word in words[:-1] if word not in ("const", "*"))
    return Parameter(words[-1], kind, is_pointer, is_pointer and not is_const)


def check(name: str, args: Sequence[Any]) -> None:
    """Raise a ValueError if a kernel's arguments are not of its signature's types.

    CUDA checks nothing: a wrong type is read as whatever its bytes say.

    Args:
        name: one of `NAMES`.
        args: arrays for pointers, NumPy scalars of the signature's types for numbers.
    """
    kernel, _, kind = name.rstrip(">").partition("<")
    expected = parameters()[kernel]
    if len(args) != len(expected):
        raise ValueError(f"{name} got {len(args)} arguments; it takes {len(expected)}.")
    dtypes = {"T": next(key for key, value in TYPES.items() if value == kind)}
    dtypes |= {key: np.dtype(scalar).name for key, scalar in SCALARS.items()}
    for parameter, value in zip(expected, args, strict=True):
        wanted = dtypes[parameter.kind]
        if not parameter.is_pointer:
            if type(value) is not SCALARS[parameter.kind]:
                raise ValueError(
                    f"{name}: {parameter.name} is a {type(value).__name__}; pass a NumPy scalar "
                    f"of type {wanted}."
                )
            continue
        found = getattr(getattr(value, "dtype", None), "name", type(value).__name__)
        if found != wanted or not hasattr(value, "flags"):
            raise ValueError(
                f"{name}: {parameter.name} is {found}; pass an array of {wanted}, for example by "
                "its astype."
            )
        if not value.flags.c_contiguous:
            raise ValueError(
                f"{name}: {parameter.name} is not contiguous; copy it with ascontiguousarray."
            )


def run(
    name: str, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_mem: int = 0
) -> None:
    """Launch a kernel on the current GPU, with CuPy.

    Args:
        name: one of `NAMES`.
        grid, block: numbers of blocks, and of threads of a block.
        args: see `check`.
        shared_mem: bytes of dynamic shared memory a block.
    """
    check(name, args)
    _module().get_function(name)(grid, block, args, shared_mem=shared_mem)


def _launch(kernel: str, x: Array, grid: tuple, block: tuple, args: tuple, shared: int = 0) -> None:
    """`run` a kernel for the dtype of an array, on contiguous arrays."""
    if x.dtype.name not in TYPES:
        raise ValueError(
            f"{kernel} got an array of {x.dtype.name}; the kernels store {', '.join(TYPES)}: cast "
            "it first."
        )
    run(f"{kernel}<{TYPES[x.dtype.name]}>", grid, block, tuple(map(_contiguous, args)), shared)


def _contiguous(x: Any) -> Any:
    """An array as its kernel takes it; a number as it is."""
    return x if x.flags.c_contiguous else x.copy(order="C")


@functools.cache
def _module() -> Any:
    """All kernels, compiled once for each device by CuPy."""
    import cupy

    return cupy.RawModule(code=source(), name_expressions=NAMES, options=("-std=c++17",))


def _threads(d: int) -> tuple[int]:
    """Whole warps for the d channels of a row, as far as a block goes."""
    return (min(THREADS, -(-d // WARP) * WARP),)


def _blocks(count: int) -> tuple[int]:
    """Blocks for a thread a number."""
    return (-(-count // THREADS),)


def _integers(x: Array) -> Array:
    """Positions or flags as the kernels take them."""
    return x.astype(np.int64, copy=False)


def _epsilon(eps: float | None) -> np.float32:
    """None is the machine epsilon of float32, in which the statistics are."""
    return np.float32(np.finfo(np.float32).eps if eps is None else eps)


def rms_norm(x: Array, weight: Array, eps: float | None) -> Array:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last axis. Twin of
    `reference.layers.rms_norm`.

    Args:
        x: [..., d].
        weight: [d] of the same dtype.
        eps: added to the mean square; None is float32's machine epsilon.

    Returns:
        [..., d].
    """
    out, d = np.empty_like(x, order="C"), x.shape[-1]
    if x.size:
        args = (x, weight, out, np.int32(d), _epsilon(eps))
        _launch("rms_norm", x, (x.size // d,), _threads(d), args)
    return out


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotary positions, half-rotation form. Twin of `reference.layers.rotate`.

    Args:
        x: [b, heads, n, e].
        rotation: (cos, sin), each [r, n, e / 2] float32.

    Returns:
        [b, heads, n, e].
    """
    out, (cos, sin) = np.empty_like(x, order="C"), rotation
    if x.size:
        _, heads, n, e = x.shape
        sizes = (np.int32(heads), np.int32(n), np.int32(e // 2), np.int32(len(cos) > 1))
        args = (x, cos, sin, out, *sizes, np.int64(x.size // 2))
        _launch("rotate", x, _blocks(x.size // 2), (THREADS,), args)
    return out


def silu_product(gate: Array, up: Array) -> Array:
    """The SwiGLU product: silu(gate) * up, elementwise.

    Args:
        gate, up: [..., f].

    Returns:
        [..., f].
    """
    out = np.empty_like(gate, order="C")
    if gate.size:
        args = (gate, up, out, np.int64(gate.size))
        _launch("silu_product", gate, _blocks(gate.size), (THREADS,), args)
    return out


def attention(queries: Array, keys: Array, values: Array, positions: Array) -> Array:
    """softmax(<Q, K> / sqrt(e)) V, a slot seeing every slot up to itself. Twin of
    `reference.layers.attention`.

    Args:
        queries: [b, h, n, e] of the new slots, rotated; e is at most `MAX_HEAD_DIM`.
        keys, values: [b, k, l, e] of the whole row; h is a multiple of k.
        positions: [r, n] integer, positions of the new slots; a key's index is its position.

    Returns:
        [b, h, n, e].

    Raises:
        ValueError: a head is too wide.
    """
    (b, h, n, e), (_, k, length, _) = queries.shape, keys.shape
    if e > MAX_HEAD_DIM:
        raise ValueError(
            f"attention got heads of width {e}; its kernel takes at most {MAX_HEAD_DIM}. "
            + ARRAY_FORM.format("attention")
        )
    out = np.empty_like(queries, order="C")
    if queries.size:
        group = h // k
        sizes = (group, n, length, e, len(positions) > 1)
        args = (queries, keys, values, _integers(positions), out, *map(np.int32, sizes))
        floats = TILE_ROWS * e + WARP * (e + 1) + WARP * e
        grid = (-(-group * n // TILE_ROWS), k, b)
        _launch("attention", queries, grid, (ATTENTION_THREADS,), args, 4 * floats)
    return out


def update_global(
    state: Array | None,
    readout: Array,
    weights: Any,
    config: Any,
    has_state: Array | None = None,
    closes: Array | None = None,
) -> tuple[Array, Array]:
    """The new state and what the next chunk sees of it. Twin of
    `reference.global_memory.update_global`, and of `read_global` after it.

    A vector gate's product is the array library's own matrix product, since a fused one would be
    slower; the rest is fused.

    Args:
        state: [b, m, d], or None on the first chunk.
        readout: [b, m, d], R'.
        weights: a layer's "global_memory"; its adapter's rank is at most `MAX_RANK`.
        config: a `MemoryConfig`.
        has_state: [r, 1] integer, 0 where this is the sequence's first chunk, else 1; None is 1
            for all, or 0 where there is no state.
        closes: [r, 1] integer, 1 where the chunk closes, else 0, where the state stays as it was;
            None is 1 for all.

    Returns:
        S' [b, m, d], and G' = adapter_g(S'), the same or, after a sink, [b, 1 + m, d].

    Raises:
        ValueError: the rank is too large.
    """
    (b, m, d), rank = readout.shape, len(weights["adapter_down"])
    if rank > MAX_RANK:
        raise ValueError(
            f"update_global got adapters of rank {rank}; its kernel takes at most {MAX_RANK}. "
            + ARRAY_FORM.format("update_global")
        )
    new, memory = np.empty_like(readout, order="C"), np.empty_like(readout, order="C")
    if not readout.size:
        return new, _after_sink(memory, weights)
    ones = np.ones_like(readout, dtype=np.int64, shape=(1, 1))
    has_state = ones * (state is not None) if has_state is None else _integers(has_state)
    closes = ones if closes is None else _integers(closes)
    state = readout if state is None else state  # not read
    rows = max(len(has_state), len(closes))
    has_state, closes = (_rows(x, rows) for x in (has_state, closes))
    gate, norm, eps = weights["gate"], weights["norm"], config.global_norm_eps
    has_bias = "gate_bias" in weights
    bias = weights["gate_bias"] if has_bias else norm  # not read
    adapters = (weights["adapter_down"], weights["adapter_up"])
    flags = (m, d, rank, has_bias, rows > 1)
    outputs = (has_state, closes, new, memory, *map(np.int32, flags))
    saturation = np.float32(config.gate_saturation)
    if config.gate == "scalar":
        kernel = "update_global"
        args = (state, readout, norm, gate, bias, *adapters, *outputs, _epsilon(eps), saturation)
    else:
        kernel, candidate = "blend_global", rms_norm(readout, norm, eps)
        joined = np.concatenate([candidate, state], axis=-1).reshape(b * m, 2 * d)
        logits = (joined @ gate.T).astype(readout.dtype, copy=False)
        args = (state, candidate, logits, bias, *adapters, *outputs, saturation)
    _launch(kernel, readout, (b * m,), _threads(d), args)
    return new, _after_sink(memory, weights)


def _after_sink(memory: Array, weights: Any) -> Array:
    """[b, m, d], after the sink where there is one."""
    if "sink" not in weights:
        return memory
    b, _, d = memory.shape
    return np.concatenate([np.broadcast_to(weights["sink"], (b, 1, d)), memory], axis=1)


def _rows(flags: Array, rows: int) -> Array:
    """[r, 1] -> [rows, 1]: one flag for all, said to each."""
    return flags if len(flags) == rows else flags.repeat(rows, axis=0)
