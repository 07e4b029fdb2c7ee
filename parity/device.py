"""Where PyTorch's part of the suite runs: one device, named by `pytest --device`.

Tests make their tensors and models here and in `strategies.py`, and `fast` is left to itself: no
default device is set, so that a tensor which `fast` leaves on the host meets one on the device, and
PyTorch refuses to mix them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fast.parameters import to_tensors
from reference.parameters import map_parameters

from .assertions import NOTES

DEVICE = torch.device("cpu")
"""Set by `choose`, before any test is imported."""


def choose(name: str) -> None:
    """Run on a device, in the precision that the tolerances are for.

    Raises:
        ValueError: there is no such device, or it has no numbers or no float64.
    """
    global DEVICE
    try:
        one = torch.ones(1, dtype=torch.float64, device=name)
        assert (one + one).item() == 2.0
    except Exception as error:  # each backend has exceptions of its own
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"--device {name}: PyTorch {torch.__version__} cannot compute in float64 there "
            f"({reason or type(error).__name__}); name a device that it has, or leave the option "
            "out for the CPU; cuda needs a GPU, its driver and a CUDA build of PyTorch."
        ) from error
    DEVICE = one.device
    # float32 is float32: no TF32 in products. The one call for it that old and new versions share.
    torch.set_float32_matmul_precision("highest")
    # Sums of half types are kept in float32, between the parts of a product too.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def is_host() -> bool:
    """Whether that device is the CPU."""
    return DEVICE.type == "cpu"


def tensor(x: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, or an array, as a tensor on the device."""
    NOTES.placed = True
    return torch.as_tensor(x, dtype=dtype).to(DEVICE)


def tensors(tree: Any, dtype: torch.dtype) -> Any:
    """`to_tensors`, on the device."""
    return map_parameters(lambda _, x: tensor(x), to_tensors(tree, dtype))


def generator(seed: int) -> torch.Generator:
    """A source of samples on the device."""
    return torch.Generator(DEVICE).manual_seed(seed)
