"""The engine beside PyTorch, on one device: on a GPU with CuPy, on a CPU with NumPy.

Engine and model share their weights: both compute from the same memory. A turn is timed from an
idle device to an idle device. Where a contestant cannot run, the reason stands in place of its
figures, and the others go on.
"""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from array_api_compat import array_namespace, device

from reference.config import CoMeTConfig

from .. import cells
from ..arrays import to_host
from ..cupy_engine import CoMeTEngine
from ..cupy_engine.libraries import check_cupy
from ..model import CoMeTModel
from .speed import Case, take_turns

__all__ = ["CONTESTANTS", "DTYPES", "check_device", "gpu", "measure_device"]

CONTESTANTS = ("engine", "PyTorch", "compiled", "full attention")
"""All but the last compute the same."""

DTYPES = ("float32", "float16", "bfloat16")
"""Of the weights, and of all that is computed from them."""

AGREEMENT = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}
"""How far apart the logits of those that compute the same may be, as a share of the largest logit.
Rounding took at most 8e-7, 2e-3 and 1.4e-2 of it on a CPU. TF32 would not pass for float32."""


@dataclass(frozen=True)
class Contestant:
    """A model or an engine, and how it runs."""

    model: Any
    """A `CoMeTModel` or a `CoMeTEngine`."""

    layer: Callable[..., Any] = cells.run_layer
    """What takes a round through one layer in PyTorch."""

    def place(self, ids: np.ndarray) -> Any:
        """Ids as the model takes them."""
        like = self.model.weights["norm"]
        return array_namespace(like).asarray(ids, device=device(like))

    def read(self, ids: Any) -> Any:
        """Read a text from its start, up to the logits of its last token."""
        with torch.no_grad(), _layer(self.layer):
            return self.model(ids, logits="last")

    def generate(self, ids: Any, state: Any, tokens: int) -> Any:
        """Decode so many tokens, the likeliest each time."""
        with _layer(self.layer):
            return self.model.generate(ids, state, tokens)


@contextmanager
def _layer(run: Callable[..., Any]) -> Iterator[None]:
    """Let PyTorch's stream take its rounds through each layer by `run`."""
    original, cells.run_layer = cells.run_layer, run
    try:
        yield
    finally:
        cells.run_layer = original


def _contestants(case: Case, compiled: bool) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Who takes part, by name; and of an engine that does not, why."""

    def model(config: CoMeTConfig) -> CoMeTModel:
        fresh = CoMeTModel(config).requires_grad_(False)
        return fresh.to(getattr(torch, case.dtype)).to(case.device)

    ours = model(case.config)
    # A layer is compiled, not the round: layers are alike, and share what the first one compiled.
    # The first and the last chunk, a filling queue, a growing row, the top layer: more graphs than
    # the default of eight, and the ninth would raise. On a CPU they are traced, and run as traced.
    torch._dynamo.config.cache_size_limit = 64
    options: dict[str, Any] = {} if case.device == "cuda" else {"backend": "eager"}
    run_layer = torch.compile(cells.run_layer, fullgraph=True, **options)  # at its first call
    found = {
        "PyTorch": Contestant(ours),
        **({"compiled": Contestant(ours, run_layer)} if compiled else {}),
        "full attention": Contestant(model(case.plain)),
    }
    library = "cupy" if case.device == "cuda" else "numpy"
    try:
        return {"engine": Contestant(CoMeTEngine.from_model(ours, library=library)), **found}, {}
    except ValueError as error:
        return found, {"engine": _reason(error)}


def measure_device(
    case: Case, lengths: Sequence[int], tokens: int, compiled: bool = False
) -> dict[int, dict[str, Any]]:
    """Reading whole texts from their start, and decoding after them.

    Args:
        case: what to measure, and on which device.
        lengths: tokens of the texts.
        tokens: to decode in a turn.
        compiled: whether that contestant takes part; to compile takes it a minute or more.

    Returns:
        Per length, each by contestant: "reading", seconds of its turns; "decoding", seconds a token
        of its turns; "memory", bytes at most, of a GPU only; "refused", why it has no figures.

    Raises:
        AssertionError: contestants that compute the same do not agree.
    """
    contestants, refused = _contestants(case, compiled)
    generator, vocab = np.random.default_rng(0), case.config.backbone.vocab_size
    found = {}
    for length in lengths:
        _release(case.device)
        text = generator.integers(vocab, size=(case.batch_size, length))
        found[length] = _measure_text(case, contestants, text, tokens)
        found[length]["refused"] |= refused
    return found


def _measure_text(
    case: Case, contestants: dict[str, Contestant], text: np.ndarray, tokens: int
) -> dict[str, Any]:
    """The same for one text, [b, n] ids."""
    refused, memory, logits, reading, decoding = {}, {}, {}, {}, {}
    for name, contestant in contestants.items():
        ids = contestant.place(text)
        read = partial(contestant.read, ids)
        try:
            read()  # what is compiled or set up at the first call takes memory of its own
            out, peak = _with_peak(read, case.device)
            decode = partial(contestant.generate, ids[:, :1], out.state, tokens)
            decode()
        except Exception as error:  # one that fails must not cost the others their figures
            refused[name] = _reason(error)
            continue
        logits[name], reading[name], decoding[name] = to_host(out.logits), read, decode
        if peak is not None:
            memory[name] = peak
    _check_agreement(logits, AGREEMENT[case.dtype])
    settle = partial(_synchronize, case.device)
    seconds = take_turns(decoding, case.rounds, settle).seconds
    return {
        "reading": take_turns(reading, case.rounds, settle).seconds,
        "decoding": {name: [s / tokens for s in turns] for name, turns in seconds.items()},
        "memory": memory,
        "refused": refused,
    }


def _reason(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _check_agreement(logits: dict[str, np.ndarray], share: float) -> None:
    """Raise AssertionError where two that compute the same are too far apart."""
    same = [name for name in logits if name != "full attention"]
    for name in same[1:]:
        first, other = logits[same[0]], logits[name]
        error, limit = np.abs(other - first).max(), share * np.abs(first).max()
        if not error <= limit:  # as NaN is not
            raise AssertionError(
                f"the logits of {same[0]} and {name} are {error:.3g} apart; expected {limit:.3g} "
                "at most."
            )


def _synchronize(on: str) -> None:
    """Wait until the GPU has done all that it was given."""
    if on == "cuda":
        import cupy

        torch.cuda.synchronize()
        cupy.cuda.Device().synchronize()


def _release(on: str) -> None:
    """Hand back the GPU memory that the pools hold unused: neither library can take the other's.

    Between texts alone, so that in its turns each finds what its first calls were given.
    """
    if on == "cuda":
        import cupy

        gc.collect()
        torch.cuda.empty_cache()
        cupy.get_default_memory_pool().free_all_blocks()


def _with_peak(run: Callable[[], Any], on: str) -> tuple[Any, int | None]:
    """What it returns, and on a GPU how much memory its arrays took at most, in bytes.

    What is there already, weights and text, is not counted. PyTorch keeps such a mark itself. CuPy
    tells only what its pool holds now, so a hook counts what the pool gives out and takes back.
    """
    if on != "cuda":
        return run(), None
    import cupy

    class Count(cupy.cuda.MemoryHook):
        name, now, peak = "Count", 0, 0

        def malloc_postprocess(self, *, mem_size: int, **_: Any) -> None:
            self.now += mem_size
            self.peak = max(self.peak, self.now)

        def free_postprocess(self, *, mem_size: int, **_: Any) -> None:
            self.now -= mem_size

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Count() as count:
        out = run()
    return out, torch.cuda.max_memory_allocated() - before + count.peak


def check_device(on: str) -> None:
    """Raise an ImportError that says what to do unless PyTorch and CuPy both compute there.

    Args:
        on: "cuda" or "cpu".
    """
    if on != "cuda":
        return
    if not torch.cuda.is_available():
        raise ImportError(
            f"This command needs an NVIDIA GPU, and PyTorch {torch.__version__} finds none; check "
            "the driver with nvidia-smi and that PyTorch is built for its CUDA."
        )
    check_cupy()


def gpu() -> str:
    """The GPU, its driver, and the versions of CUDA and CuPy: what stands under its figures."""
    import cupy

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):  # some containers come without it
        driver = "unknown"
    cuda = cupy.cuda.runtime.runtimeGetVersion()
    return (
        f"{torch.cuda.get_device_name()}, driver {driver}, CuPy {cupy.__version__} with CUDA "
        f"{cuda // 1000}.{cuda % 1000 // 10}, torch with CUDA {torch.version.cuda}"
    )
