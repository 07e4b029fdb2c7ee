"""How near is equal: the one tolerance table, and assertions that say where two things part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from array_api_compat import is_array_api_obj, is_cupy_array
from torch import Tensor

from fast import CoMeTState
from fast.arrays import dtype_name, to_host
from fast.parameters import to_arrays
from reference.config import CoMeTConfig
from reference.stream import StreamState

TOLERANCE = 2e-12
"""float64: largest error, relative to max(1, largest magnitude of the expected tensor)."""

YARDSTICK = 4.0
"""float32, against the float64 reference: over a whole text the largest error may be at most
4 (own + 8 epsilons), own being that of the reference run in float32; of one layer, the typical
error at most 4 (own + 1 epsilon). float64, over streams of a dozen chunks: at most 4 times what a
rounding of the weights does to the reference, where that is more than `TOLERANCE`."""

HALF_TYPES = (torch.bfloat16, torch.float16)
"""Types narrower than float32. The reference is not run in them: they err from its float64."""

ROUNDINGS = {
    "linear": (0.6, 0.3),
    "adapter": (1.4, 0.5),
    "swiglu": (2.1, 1.0),
    "rms_norm": (1.1, 0.5),
    "rotate": (0.55, 0.24),
    "attention": (0.9, 0.5),
    "decoder_layer": (2.0, 1.0),
    "keys_values": (1.8, 0.9),
    "gate": (1.1, 0.9),
    "update_global": (2.5, 1.0),
    "queue_entries": (1.6, 0.75),
    "published_text": (2.7, 1.2),
    "silu_product": (1.2, 0.68),
}
"""bfloat16 and float16: by operation, the most that `relative_error` and `typical_error` may be, in
machine epsilons of the type. Inputs are rounded before the reference gets them, so only the
operation errs, and both types count alike. At most 1.35 times the largest of 2,000 draws or more in
each; of the published text, which is one, 1.3 times."""

FLOAT32_ROUNDINGS = {
    "adapter": (1.0, 0.52),
    "attention": (11.0, 5.8),
    "rms_norm": (1.8, 1.1),
    "rotate": (1.1, 0.45),
    "silu_product": (1.9, 1.1),
    "update_global": (13.0, 3.0),
}
"""The CUDA kernels in float32: the same. Attention's outputs are averages, smaller than what they
average, and a gate errs by as much as its logit is large."""

HALF_YARDSTICK = 2.0
"""bfloat16 and float16, over a whole text: `relative_error` and `typical_error` may be at most
2 (own + 8 epsilons), own being what a rounding of the weights does to the float64 reference. In
16,000 texts a factor of 1.7 was needed: the smallest models have few numbers for errors to cancel
in. `HALF_MEDIAN` is the sharper limit."""

HALF_SHARE, HALF_MEDIAN = 0.95, 0.6
"""The same where rows have hundreds of slots: `typical_error` as a share of own, with no epsilons
more; in any text, and at the median of the texts. 0.75 and 0.5 were measured."""

GRADIENT_TOLERANCE = 1e-12
"""Largest error of a directional derivative, float64, relative to max(1, sum of the magnitudes that
it adds up): terms that cancel leave their rounding."""

REFERENCE_GOLDEN, FAST_GOLDEN, ENGINE_GOLDEN = 1e-11, 1e-10, 1e-10
"""Largest error against the recorded numbers of the published implementation, relative to max(1,
largest recorded magnitude of the tensor)."""

ON_GPU = {"float64": 4.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
"""What PyTorch, CuPy or a kernel computed on a GPU may err by so many times the limits above, by
its dtype. These are reckoned; an H200 needed less than half of them. NVIDIA allows exp, sin and cos
two units in the last place where libm errs by less than one, and a sum may be one chain of additions
where a CPU keeps several: 2 x 2, with products in float32 itself (no TF32). Half types compute in
float32 inside, far below their own epsilons, but may round once more, as a bias is added: 2."""


@dataclass
class Notes:
    """What the summary after a run tells of a test; `conftest.py` clears and reads them."""

    cases: int = 0
    """Examples that ran to their end."""

    nearest: tuple[float, float] | None = None
    """The error and the limit of the comparison whose error is the largest share of its limit."""

    placed: bool = False
    """Whether a tensor was made on the device of `--device`."""


NOTES = Notes()
"""Notes of the running test."""


def record(error: float, limit: float) -> None:
    """Note a comparison, if none so far came nearer to its limit."""
    if NOTES.nearest is None or error * NOTES.nearest[1] > NOTES.nearest[0] * limit:
        NOTES.nearest = float(error), float(limit)


def allowed(limit: float, like: Any) -> float:
    """A limit for what was computed where `like` is: as it stands, but on a GPU."""
    on_gpu = (isinstance(like, Tensor) and like.is_cuda) or is_cupy_array(like)
    return limit * ON_GPU[dtype_name(like)] if on_gpu else limit


def assert_at_most(error: float, limit: float, what: str, like: Any = None) -> None:
    """An error within its limit; not a number is not. `like` is what has the error."""
    limit = allowed(limit, like)
    record(error, limit)
    assert error <= limit, f"{what}: error {error:.3e}, allowed {limit:.1e}"


def array(x: Any) -> np.ndarray:
    """An array of any library, or numbers, as NumPy's; bfloat16 as float32."""
    x = to_host(x) if is_array_api_obj(x) else np.asarray(x)
    return x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x


def largest_error(found: Any, expected: Any) -> float:
    """max |found - expected| / max(1, max |expected|); 0 for empty tensors."""
    found, expected = array(found), array(expected)
    if expected.size == 0:
        return 0.0
    return float(np.max(np.abs(found - expected)) / max(1.0, np.max(np.abs(expected))))


def relative_error(found: Any, expected: Any) -> float:
    """max |found - expected| / max |expected|."""
    found, expected = array(found), array(expected)
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def typical_error(found: Any, expected: Any) -> float:
    """Root mean square of found - expected, relative to that of expected."""
    found, expected = array(found), array(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_near(found: Any, expected: Any, what: str, tolerance: float | None = None) -> None:
    """Same shape, and every element within the tolerance of float64.

    A failure names the tensor, the place of its first difference, both values, and the error.
    """
    f, e = array(found), array(expected)
    assert f.shape == e.shape, f"{what}: shape {f.shape}, expected {e.shape}"
    tolerance = allowed(TOLERANCE if tolerance is None else tolerance, found)
    record(largest_error(f, e), tolerance)
    limit = tolerance * max(1.0, float(np.max(np.abs(e), initial=0.0)))
    wrong = ~(np.abs(f - e) <= limit)  # NaN is wrong too
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: first difference at {place}: {f[place]!r}, expected {e[place]!r}; "
            f"{int(wrong.sum())} of {wrong.size} differ, largest error "
            f"{np.nanmax(np.abs(f - e)):.3e}, allowed {limit:.1e}"
        )


def assert_rounded(
    found: Tensor, expected: np.ndarray, operation: str, dtype: torch.dtype, times: float = 1.0
) -> None:
    """A result in a half type: its dtype, its shape, and errors within `ROUNDINGS`; in float32,
    within `FLOAT32_ROUNDINGS`; or within so many times those."""
    roundings = FLOAT32_ROUNDINGS if dtype == torch.float32 else ROUNDINGS
    assert found.dtype == dtype, f"{operation}: dtype {found.dtype}, expected {dtype}"
    assert found.shape == expected.shape, (
        f"{operation}: shape {tuple(found.shape)}, expected {expected.shape}"
    )
    wide = found.double()
    for error, epsilons in zip((relative_error, typical_error), roundings[operation], strict=True):
        limit = times * epsilons * torch.finfo(dtype).eps
        assert_at_most(error(wide, expected), limit, f"{operation}, {error.__name__}", found)


def assert_twin(found: Tensor, expected: np.ndarray, what: str, like: Tensor) -> None:
    """A twin's result: dtype and device of its input, then shape and values."""
    assert found.dtype == like.dtype, f"{what}: dtype {found.dtype}, expected {like.dtype}"
    assert found.device == like.device, f"{what}: on {found.device}, expected {like.device}"
    assert_near(found, expected, what)


def assert_same_stream(
    fast: CoMeTState,
    row: int,
    spec: StreamState,
    config: CoMeTConfig,
    what: str = "state",
    tolerance: float | None = None,
) -> None:
    """One sequence of a fast state is the reference's state: counts, memories, the open row."""
    counts = {
        "tokens": spec.tokens,
        "chunks": spec.chunks,
        "open_tokens": spec.open_tokens,
        "row_length": spec.row_length,
        "queue_length": len(spec.temporary_memory[0]) if config.memory.has_temporary else 0,
    }
    for name, expected in counts.items():
        found = int(getattr(fast, name)[row])
        assert found == expected, f"{what}, sequence {row}: {name} {found}, expected {expected}"
    where = f"{what}, chunk {spec.chunks}"
    tolerance = allowed(TOLERANCE if tolerance is None else tolerance, fast.keys[0])
    for layer in range(config.backbone.num_hidden_layers):
        at = f"{where}, layer {layer}"
        if spec.global_state:
            assert_near(
                array(fast.global_state[layer])[row],
                spec.global_state[layer],
                f"{at}, S",
                tolerance,
            )
        if config.memory.has_temporary:
            queue = array(fast.temporary_memory[layer])[row, : counts["queue_length"]]
            assert_near(queue, spec.temporary_memory[layer], f"{at}, T", tolerance)
        if spec.row_length:
            length = counts["row_length"]
            assert_near(
                array(fast.keys[layer])[row, :, :length], spec.keys[layer], f"{at}, keys", tolerance
            )
            assert_near(
                array(fast.values[layer])[row, :, :length],
                spec.values[layer],
                f"{at}, values",
                tolerance,
            )


def assert_state_equal(found: CoMeTState, expected: CoMeTState, what: str) -> None:
    """Two states alike to the last bit, with no memory shared being asked for."""
    for name in ("tokens", "chunks", "open_tokens", "row_length", "queue_length"):
        a, b = getattr(found, name), getattr(expected, name)
        assert np.array_equal(a, b), f"{what}: {name} {a}, expected {b}"
    for name in ("global_state", "temporary_memory", "keys", "values"):
        a, b = getattr(found, name), getattr(expected, name)
        assert len(a) == len(b), f"{what}: {name} of {len(a)} layers, expected {len(b)}"
        for layer, (x, y) in enumerate(zip(a, b, strict=True)):
            assert torch.equal(x, y), f"{what}: {name} of layer {layer} differs"


def assert_same_states(
    found: CoMeTState, expected: CoMeTState, what: str, tolerance: float | None = None
) -> None:
    """Two states alike: counts equal, memories and rows within the tolerance."""
    for name in ("tokens", "chunks", "open_tokens", "row_length", "queue_length"):
        a, b = getattr(found, name), getattr(expected, name)
        assert np.array_equal(a, b), f"{what}: {name} {a}, expected {b}"
    for name in ("global_state", "temporary_memory", "keys", "values"):
        pairs = zip(getattr(found, name), getattr(expected, name), strict=True)
        for layer, (x, y) in enumerate(pairs):
            where = f"{what}: {name} of layer {layer}"
            assert_near(x.detach(), array(y.detach()), where, tolerance)


def assert_logits(
    found: Any,
    expected: np.ndarray,
    config: CoMeTConfig,
    what: str,
    tolerance: float | None = None,
) -> None:
    """Logits of one sequence; a failure also tells the chunk, where chunks are of full size."""
    f = array(found)
    assert f.shape == expected.shape, f"{what}: shape {f.shape}, expected {expected.shape}"
    limit = allowed(TOLERANCE if tolerance is None else tolerance, found)
    limit *= max(1.0, np.max(np.abs(expected)))
    wrong = ~(np.abs(f - expected) <= limit)
    if wrong.any():
        token = int(np.argwhere(wrong.any(axis=-1))[0, 0])
        chunk = token // config.memory.chunk_size
        what = f"{what}: logits part at token {token} (chunk {chunk})"
    assert_near(found, expected, what, tolerance)


def arrays_of(model: Any) -> dict[str, Any]:
    """A model's weights as the nested dict that the reference takes."""
    return to_arrays(model.weights)
