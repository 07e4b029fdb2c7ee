"""The kernels' tests are tested: a fault put into a kernel must make its law fail, by an assertion,
and what a sanitizer alone can see must make the sanitizer speak.

A fault whose line has been rewritten fails too, so that it is renewed.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fast.cupy_engine import kernels

from .emulation import build, watch
from .kernel_cases import (
    attentions,
    emulated,
    hold,
    hold_in_both_orders,
    norms,
    rotations,
    silu_products,
    updates,
)

pytestmark = pytest.mark.host

CASES = {
    "attention": attentions(),
    "blend_global": updates("vector"),
    "rms_norm": norms(),
    "rotate": rotations(),
    "silu_product": silu_products(),
    "update_global": updates("scalar"),
}
"""Random calls of each kernel."""

BARRIER = "        parts[warp] = x;\n    }\n    __syncthreads();\n"
"""Where a block sums."""

FAULTS = {
    "the epsilon outside the mean": (
        "rms_norm",
        "sqrtf(block_sum(sum, parts) / d + eps)",
        "sqrtf(block_sum(sum, parts) / d) + eps",
        hold,
    ),
    "a channel left out of the statistic": (
        "rms_norm",
        "for (int c = threadIdx.x; c < d; c += blockDim.x) {\n        const float x",
        "for (int c = threadIdx.x; c < d - 1; c += blockDim.x) {\n        const float x",
        hold,
    ),
    "the half type's squares in the half type": (
        "rms_norm",
        "sum += x * x;",
        "sum += rounded<T>(x * x);",
        hold,
    ),
    "threads that leave before a shuffle": (
        "rms_norm",
        "    const float root = root_mean_square(x + first, d, eps, parts);",
        "    if (threadIdx.x >= d) return;\n"
        "    const float root = root_mean_square(x + first, d, eps, parts);",
        hold,
    ),
    "the other sequence's angles": (
        "rotate",
        "(sequence * n + row % n) * half + j",
        "(row % n) * half + j",
        hold,
    ),
    "turned the other way": (
        "rotate",
        "b * cos[angle] + a * sin[angle]",
        "b * cos[angle] - a * sin[angle]",
        hold,
    ),
    "gate and up swapped": (
        "silu_product",
        "rounded<T>(y * sigmoid(y)) * widen(up[i])",
        "rounded<T>(widen(up[i]) * sigmoid(widen(up[i]))) * y",
        hold,
    ),
    "a slot that does not see itself": (
        "attention",
        "start + lane <= position[r]",
        "start + lane < position[r]",
        hold,
    ),
    "a slot that sees the one after it": (
        "attention",
        "start + lane <= position[r]",
        "start + lane <= position[r] + 1",
        hold,
    ),
    "heads grouped wrong": (
        "attention",
        "keys += head * l * e;",
        "keys += (head / gridDim.y * gridDim.y + head % group % gridDim.y) * l * e;",
        hold,
    ),
    "scores of the wrong scale": ("attention", "1.0f / sqrtf(e)", "1.0f / e", hold),
    "older sums under a lower maximum": (
        "attention",
        "sum[r][c] *= fade;",
        "sum[r][c] *= 1.0f;",
        hold,
    ),
    "a tile of keys read before it is whole": (
        "attention",
        "        }\n        __syncthreads();\n",
        "        }\n",
        hold_in_both_orders,
    ),
    "a tile of keys overwritten while it is read": (
        "attention",
        "        __syncthreads();  // the tile before has been read\n",
        "",
        hold_in_both_orders,
    ),
    "the bias left out": (
        "update_global",
        "(has_bias ? widen(bias[0]) : 0.0f)",
        "0.0f",
        hold,
    ),
    "the gate saturated before the sigmoid": (
        "update_global",
        "sigmoid(logit) / saturation",
        "sigmoid(logit / saturation)",
        hold,
    ),
    "the blend's shares swapped": (
        "update_global",
        "closing ? g * old + (1.0f - g) * candidate : old",
        "closing ? (1.0f - g) * old + g * candidate : old",
        hold,
    ),
    "a state on the first chunk": (
        "update_global",
        "const float g = keeps ? share_kept(logit, saturation) : 0.0f;\n"
        "    for (int c = threadIdx.x; c < d; c += blockDim.x) {\n"
        "        const float old = keeps || !closing ?",
        "const float g = share_kept(logit, saturation);\n"
        "    for (int c = threadIdx.x; c < d; c += blockDim.x) {\n"
        "        const float old = true ?",
        hold,
    ),
    "a bias where there is none": (
        "blend_global",
        "(has_bias ? widen(bias[c]) : 0.0f)",
        "(has_bias ? widen(bias[c]) : 1.0f)",
        hold,
    ),
    "a state that changes in an open chunk": (
        "blend_global",
        "closing ? blend : old",
        "blend",
        hold,
    ),
    "the adapter without what it is added to": (
        "update_global",
        "narrow<T>(widen(state[c]) + sum)",
        "narrow<T>(sum)",
        hold,
    ),
    "a state read before it is written": (
        "update_global",
        "    __syncthreads();  // a warp reads channels that other warps have written\n",
        "",
        hold_in_both_orders,
    ),
    "a low rank read before it is summed": (
        "update_global",
        "    __syncthreads();  // and a channel needs the sums of all warps\n",
        "",
        hold_in_both_orders,
    ),
    "a block's sum read before it is whole": (
        "rms_norm",
        BARRIER,
        BARRIER.replace("    __syncthreads();\n", ""),
        hold_in_both_orders,
    ),
}
"""What is wrong: (kernel, the right text, the wrong text, the law that notices)."""

SEEN_BY_SANITIZERS = {
    "a number after the last one": (
        "address",
        "silu_product",
        "if (i < count) {",
        "if (i <= count) {",
        "heap-buffer-overflow",
    ),
    "a place after the last one in shared memory": (
        "address",
        "rms_norm",
        BARRIER,
        BARRIER.replace("[warp]", "[warp + WARP]"),
        "use-after-poison",
    ),
    "a channel more than a thread has": (
        "address",
        "attention",
        "for (int c = 0; c < CHANNELS; ++c) {\n                sum[r][c] *= fade;",
        "for (int c = 0; c <= CHANNELS; ++c) {\n                sum[r][c] *= fade;",
        "runtime error: index 4 out of bounds",
    ),
    "a barrier left out": (
        "thread",
        "rms_norm",
        BARRIER,
        BARRIER.replace("    __syncthreads();\n", ""),
        "data race",
    ),
}
"""What is wrong: (sanitizer, kernel, the right text, the wrong text, what the sanitizer says)."""


def broken(right: str, wrong: str) -> str:
    """The kernels' source with one line written wrong."""
    source = kernels.source()
    assert source.count(right) == 1, (
        f"the kernels have {source.count(right)} times {right!r}: the code was rewritten, so write "
        "this fault anew"
    )
    return source.replace(right, wrong)


def demand(law, cases) -> None:
    """Hold a law, over random calls that are the same in every run."""
    settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(cases)(law))()


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_in_a_kernel_makes_its_law_fail(fault):
    kernel, right, wrong, law = FAULTS[fault]
    with emulated(broken(right, wrong)), pytest.raises(AssertionError):
        demand(law, CASES[kernel])


@pytest.mark.parametrize("kernel", list(CASES))
def test_the_same_calls_pass_without_a_fault(kernel):
    with emulated():
        for law in (hold, hold_in_both_orders):
            demand(law, CASES[kernel])


@pytest.mark.parametrize("fault", list(SEEN_BY_SANITIZERS))
def test_a_sanitizer_tells_of_a_fault(fault):
    sanitizer, kernel, right, wrong, words = SEEN_BY_SANITIZERS[fault]
    names = (f"{kernel}<float>",)
    watched = watch(build(broken(right, wrong), names, sanitizer), names, sanitizer)
    assert watched.returncode != 0, f"{fault} went unnoticed"
    assert words in watched.stderr, watched.stderr
