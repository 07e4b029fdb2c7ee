"""Every kernel over a few fixed shapes, in both orders, for a sanitizer to watch.

Arguments: the library, and the names of the kernels in it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from . import Emulator

PATH = Path(__file__).parents[2] / "fast" / "cupy_engine" / "kernels" / "__init__.py"


def load_kernels():
    """The kernels' module by itself: `fast` would bring PyTorch."""
    spec = importlib.util.spec_from_file_location("kernels", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)
    return module


def run_all(kernels, names, dtype):
    """Each kernel of the names, in a storage type: shapes that fill blocks, warps and tiles, and
    shapes that leave some of each over."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    def has(kernel):
        return any(name.startswith(f"{kernel}<") for name in names)

    for d in (1, 33, 256, 300):
        if has("rms_norm"):
            kernels.rms_norm(normal(3, d), normal(d), 1e-6)
        if has("silu_product"):
            kernels.silu_product(normal(2, d), normal(2, d))
        for gate, rows in (("scalar", 1), ("vector", d)):
            if not has("update_global" if gate == "scalar" else "blend_global"):
                continue
            weights = {"norm": normal(d), "gate": normal(rows, 2 * d), "gate_bias": normal(rows)}
            weights |= {"adapter_down": normal(5, d), "adapter_up": normal(d, 5)}
            config = SimpleNamespace(gate=gate, gate_saturation=0.5, global_norm_eps=None)
            flags = np.array([[1], [0]])
            kernels.update_global(normal(2, 2, d), normal(2, 2, d), weights, config, flags)
    for e, n, past in ((2, 1, 0), (34, 5, 70), (128, 9, 23)):
        table = rng.normal(size=(2, 2, n, e // 2)).astype(np.float32)
        if has("rotate"):
            kernels.rotate(normal(2, 3, n, e), tuple(table))
        if has("attention"):
            row = normal(2, 2, 2, past + n, e)
            at = past + np.arange(n) - np.array([[0], [past // 2]])
            kernels.attention(normal(2, 6, n, e), *row, at)


if __name__ == "__main__":
    kernels = load_kernels()
    library, *names = sys.argv[1:]
    for backwards in (False, True):
        kernels.run = Emulator(kernels, Path(library), names, backwards)
        for dtype in (np.float32, ml_dtypes.bfloat16):
            kind = kernels.TYPES[np.dtype(dtype).name]
            run_all(kernels, [name for name in names if f"<{kind}>" in name], dtype)
