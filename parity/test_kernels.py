"""The CUDA kernels, on a CPU: what they compute, that no order of threads shows, and that NVIDIA's
compiler takes them.

g++ compiles the very sources that a GPU would run; see `emulation/emulation.h`.
"""

import sys
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast.cupy_engine import kernels
from reference.config import MemoryConfig

from . import nvrtc
from .emulation import build, watch
from .kernel_cases import (
    Numbers,
    attentions,
    emulated,
    hold,
    hold_in_both_orders,
    norms,
    on_gpu,
    rotations,
    silu_products,
    updates,
)
from .strategies import seeds

pytestmark = pytest.mark.host

ROWS = np.ones((3, 8), np.float32)


launch = kernels.run
"""What the emulation stands in for."""


@pytest.fixture(scope="module", autouse=True)
def emulation(request):
    """Kernels run on the CPU, or with --engine cupy on a GPU."""
    with on_gpu() if request.config.getoption("engine") == "cupy" else emulated():
        yield


engine = pytest.mark.engine
"""Laws that a GPU keeps too."""


@engine
@given(norms())
def test_rms_norm(case):
    hold(case)


@engine
@given(rotations())
def test_rotate(case):
    hold(case)


@engine
@given(silu_products())
def test_silu_product(case):
    hold(case)


@engine
@given(attentions())
def test_attention(case):
    hold(case)


@engine
@given(updates("scalar"))
def test_update_global_and_what_is_read_of_it(case):
    hold(case)


@engine
@given(updates("vector"))
def test_update_global_with_a_vector_gate(case):
    hold(case)


@given(
    st.one_of(
        norms(),
        rotations(),
        silu_products(),
        attentions(),
        updates("scalar"),
        updates("vector"),
    )
)
def test_no_order_of_lanes_warps_and_blocks_shows(case):
    hold_in_both_orders(case)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_emulated_half_types_round_as_numpy_s_do(dtype):
    """All finite numbers of the type, turned by angles whose sine is 0: each is widened, scaled in
    float32 and rounded."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        x = every[np.isfinite(every)].reshape(1, 1, -1, 2)
    scale = np.random.default_rng(0).uniform(0.25, 1.75, (1, x.shape[2], 1)).astype(np.float32)
    found = kernels.rotate(x, (scale, 0 * scale))
    with np.errstate(over="ignore"):
        assert np.array_equal(found, (x.astype(np.float32) * scale).astype(dtype))


def test_run_hands_cupy_the_sources_once_and_every_launch_as_it_is(monkeypatch):
    made, launched = [], []

    class RawModule:
        def __init__(self, **options):
            made.append(options)

        def get_function(self, name):
            return lambda *args, **options: launched.append((name, args, options))

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=RawModule))
    kernels._module.cache_clear()
    args = (ROWS, ROWS[0], ROWS, np.int32(8), np.float32(0))
    for _ in range(2):
        launch("rms_norm<float>", (3,), (32,), args, 4)
    kernels._module.cache_clear()
    options = {"code": kernels.source(), "name_expressions": kernels.NAMES}
    assert made == [options | {"options": ("-std=c++17",)}]
    assert launched == [("rms_norm<float>", ((3,), (32,), args), {"shared_mem": 4})] * 2


@given(st.one_of(norms(), updates("scalar")))
def test_on_a_gpu_a_kernel_takes_copies_and_its_outputs_come_back(case):
    """CuPy here is a library that copies, and the GPU is the emulation."""
    copies = SimpleNamespace(asarray=np.array, asnumpy=np.asarray)
    with patch.dict(sys.modules, cupy=copies), on_gpu():
        hold(case)


ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

MOST_REGISTERS = {"attention": 80}
"""32-bit registers a thread; 40 for the others. A multiprocessor has 65,536: enough for six blocks
at once."""

SHARED_BYTES = {"rms_norm": 128, "update_global": 512, "blend_global": 256}
"""Static shared memory a block, in bytes; 0 for the others."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_for_a_gpu_and_spills_no_register(architecture):
    usages = nvrtc.compile_kernels(kernels.source(), kernels.NAMES, architecture)
    assert set(usages) == set(kernels.NAMES)
    for name, usage in usages.items():
        kernel = name.partition("<")[0]
        assert 0 < usage.registers <= MOST_REGISTERS.get(kernel, 40), f"{name}: {usage}"
        assert usage.shared == SHARED_BYTES.get(kernel, 0), f"{name}: {usage}"
        assert (usage.stack, usage.spilled) == (0, 0), f"{name}: {usage}"


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_sanitizer_finds_nothing(sanitizer):
    """Outside an array, undefined, or two threads at one place with no barrier between."""
    names = tuple(name for name in kernels.NAMES if "__half" not in name)
    watched = watch(build(kernels.source(), names, sanitizer), names, sanitizer)
    assert (watched.returncode, watched.stderr) == (0, "")


def test_a_missing_compiler_is_told(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(AssertionError, match="run apt-get install g\\+\\+"):
        build(kernels.source(), kernels.NAMES)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((ROWS, ROWS[0], ROWS, 8, np.float32(0)), "d is a int; pass a NumPy scalar of type int32"),
        ((ROWS, ROWS[0], ROWS, np.int32(8), 0.1), "eps is a float; pass a NumPy scalar of type"),
        ((ROWS, ROWS[0].astype(np.float16), ROWS, np.int32(8), np.float32(0)), "weight is float16"),
        ((ROWS.T, ROWS[0], ROWS, np.int32(8), np.float32(0)), "x is not contiguous"),
        ((ROWS, ROWS[0], ROWS), "got 3 arguments; it takes 5"),
        ((ROWS, None, ROWS, np.int32(8), np.float32(0)), "weight is NoneType"),
    ],
)
def test_arguments_of_other_types_than_the_signature_s_are_refused(args, words):
    with pytest.raises(ValueError, match=words):
        kernels.check("rms_norm<float>", args)


def test_what_the_kernels_cannot_take_is_refused():
    config, wide = MemoryConfig(), np.ones((1, 1, 1, 130), np.float32)
    with pytest.raises(ValueError, match="float64; the kernels store float32, float16, bfloat16"):
        kernels.rms_norm(np.ones((2, 3)), np.ones(3), None)
    with pytest.raises(ValueError, match="heads of width 130; its kernel takes at most 128"):
        kernels.attention(wide, wide, wide, np.zeros((1, 1), np.int64))
    with pytest.raises(ValueError, match="rank 65; its kernel takes at most 64"):
        kernels.update_global(None, wide[0], {"adapter_down": np.ones((65, 130))}, config)


@engine
@given(seeds)
def test_no_state_is_a_first_chunk_and_no_flags_are_ones(seed):
    numbers, config = Numbers(seed, "float32"), MemoryConfig()
    state, readout = numbers.normal(2, 3, 5), numbers.normal(2, 3, 5)
    weights = {"norm": numbers.uniform(5), "gate": numbers.normal(1, 10)}
    weights |= {"adapter_down": numbers.normal(2, 5), "adapter_up": numbers.normal(5, 2)}
    one = np.ones((1, 1), np.int32)
    for short, full in (
        ((None, readout, weights, config), (state, readout, weights, config, 0 * one, one)),
        ((state, readout, weights, config), (state, readout, weights, config, one, one)),
        ((state, readout, weights, config, one), (state, readout, weights, config, one[[0, 0]])),
    ):
        for found, expected in zip(
            *(kernels.update_global(*a) for a in (short, full)), strict=True
        ):
            assert np.array_equal(found, expected)


@engine
@pytest.mark.parametrize("dtype", kernels.TYPES)
def test_nothing_gives_nothing(dtype):
    """No slots, no sequences: there is no empty launch."""
    none = np.ones((2, 2, 0, 4), dtype)
    table = np.ones((1, 0, 2), np.float32)
    for found in (
        kernels.rms_norm(none, none[0, 0], None),
        kernels.rotate(none, (table, table)),
        kernels.silu_product(none, none),
        kernels.attention(none, none, none, np.ones((1, 0), np.int64)),
        *kernels.update_global(none[0], none[0], {"adapter_down": none[0, 0]}, MemoryConfig()),
    ):
        assert found.size == 0
        assert found.dtype == none.dtype
