"""Nothing in the stream asks the device for a value, or mixes devices; `--device` moves the suite.

On the meta device a tensor has a shape and no numbers: what would need one, on the host or beside a
tensor of another device, raises. So it does on a GPU under `FakeTensorMode`, which needs none. What
passes here can be queued on a GPU without a stop. On the
device of `pretend_device.py` there are numbers too, and the suite runs as it would on a GPU.
"""

import ctypes
import os
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import bias
from torch.nn.attention.bias import causal_lower_right

from fast.model import IGNORE, predict, sum_of_losses
from fast.parameters import ParameterTree
from fast.stream import close_chunk, new_state, read
from reference.parameters import map_parameters, shapes

from . import device
from .emulation import compiler
from .strategies import configs, corner_lengths, random_model
from .test_faults import ROOT, place, run, write_wrong

pytestmark = pytest.mark.host

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@contextmanager
def on_the_device():
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        raise AssertionError(f"a value was asked for, or devices were mixed: {error}") from error


WITHOUT_NUMBERS = {"meta": nullcontext, "cuda": FakeTensorMode}
"""Devices whose tensors have no numbers, and under what. A GPU that is not there gets a GPU's operations,
such as its attention."""

GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""
"""What a PyTorch without CUDA lacks to index a GPU's tensor that has no numbers: a way to choose the
GPU, here one that does nothing."""


@pytest.fixture(scope="module")
def cuda_guard(tmp_path_factory):
    if torch.version.cuda is None and torch.version.hip is None:
        library, home = tmp_path_factory.mktemp("guard") / "guard.so", Path(torch.__file__).parent
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{home}/include", f"-L{home}/lib", "-lc10"]
        command = [compiler(), "-x", "c++", "-", *options, "-o", str(library)]
        subprocess.run(command, input=GUARD, text=True, check=True)
        ctypes.CDLL(str(library))

    def make_bias(*sizes):  # which holds two sizes, and cannot be made as a fake tensor
        with unset_fake_temporarily():
            return causal_lower_right(*sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bias, "causal_lower_right", make_bias)
        yield


fewer = settings(max_examples=max(5, settings.default.max_examples * 2 // 5))  # each takes long
places = pytest.mark.parametrize("place", WITHOUT_NUMBERS)


def empty_weights(config, dtype, place):
    """Weights without numbers."""
    tree = map_parameters(
        lambda _, shape: torch.empty(shape, dtype=dtype, device=place), shapes(config)
    )
    return ParameterTree(tree)


@st.composite
def empty_cases(draw):
    config, dtype = draw(configs()), draw(DTYPES)
    lengths = np.array(draw(st.lists(corner_lengths(config), min_size=1, max_size=3)))
    return config, dtype, lengths


def ids_of(lengths, place):
    return torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64, device=place)


def assert_on(place, tensors, dtype, what):
    for tensor in tensors:
        assert tensor.device.type == place, f"{what} on {tensor.device}"
        assert tensor.dtype == dtype, f"{what} is {tensor.dtype}"


@places
@fewer
@given(case=empty_cases(), alike=st.booleans())
def test_reading_and_decoding_stay_on_the_device(cuda_guard, place, case, alike):
    config, dtype, lengths = case
    with WITHOUT_NUMBERS[place](), torch.no_grad(), on_the_device():
        ids, params = ids_of(lengths, place), empty_weights(config, dtype, place)
        state = new_state(config, dtype, len(ids), place)
        for part in read(
            ids, state, params, config, lengths=None if alike else lengths, outputs="last"
        ):
            state = part.state
        for _ in range(config.memory.chunk_size + 1):  # into the next chunk
            for part in read(ids[:, :1], state, params, config, outputs="last"):
                state = part.state
            logits = predict(part.last(None), params, config)
        state = close_chunk(state, params, config)
    assert_on(place, [logits], dtype, "logits")
    assert_on(place, (*state.global_state, *state.temporary_memory), dtype, "memories")


@places
@fewer
@given(case=empty_cases())
def test_a_training_step_stays_on_the_device(cuda_guard, place, case):
    config, dtype, lengths = case
    with WITHOUT_NUMBERS[place](), on_the_device():
        ids, params = ids_of(lengths, place), empty_weights(config, dtype, place)
        state, loss = new_state(config, dtype, len(ids), place), torch.zeros((), device=place)
        for part in read(ids, state, params, config, lengths=lengths):
            targets = torch.full(part.hidden.shape[:2], IGNORE, device=place)
            loss = loss + sum_of_losses(predict(part.hidden, params, config), targets)
        assert loss.device.type == place
        if place == "cuda":  # whose backward pass needs the GPU's streams, also without numbers
            assert loss.requires_grad
            return
        loss.backward()
    found = [p.grad for p in params.parameters() if p.grad is not None]
    assert len(found) > 10
    assert_on(place, found, dtype, "gradient")


def test_a_continuation_that_waits_for_nothing_asks_for_its_tokens_once(make_config, monkeypatch):
    model, asked, tolist = random_model(make_config(), 0), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: asked.append(x.shape) or tolist(x))
    ids, said = torch.arange(12).reshape(2, 6) % 11, []
    found = model.generate(ids, max_new_tokens=9)
    assert asked == [(9, 2)]
    waited = model.generate(ids, max_new_tokens=9, on_token=said.append)
    assert len(asked) == 10
    assert found.ids == waited.ids == [list(row) for row in zip(*said, strict=True)]
    with torch.no_grad():
        model.weights["norm"][0] = torch.nan
    with pytest.raises(FloatingPointError, match="left the range"):
        model.generate(ids, max_new_tokens=9)


def test_a_value_asked_for_would_be_noticed(cuda_guard):
    for where, mode in WITHOUT_NUMBERS.items():
        with mode(), pytest.raises((NotImplementedError, RuntimeError)):
            bool(torch.zeros((), device=where) > 0)
        with mode(), pytest.raises(RuntimeError):
            torch.zeros(2, device=where) + torch.zeros(2)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_default_device_changes_nothing(make_config, gradient):
    """What a program sets for its own tensors: every tensor of `fast` says where it is."""
    model, ids = random_model(make_config(), 0), torch.arange(22).reshape(2, 11) % 11
    with torch.set_grad_enabled(gradient):
        expected = model(ids, labels=ids, lengths=[11, 7])
        with torch.device("meta"), on_the_device():
            found = model(ids, labels=ids, lengths=[11, 7])
            state = model.close_chunk(found.state.fork(2).select([0, 3]))
            model.generate(ids, state, 5, temperature=1.0, top_k=3, top_p=0.9)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


ELSEWHERE = ["-p", "parity.pretend_device", "--device", "elsewhere"]
"""Options of a run on the pretend device."""


def test_the_suite_runs_on_a_device_that_refuses_tensors_of_the_host():
    """All that is not marked host, but for what takes longest."""
    longest = "published_memory or long_rows or Walk or Changes"
    # In a process of its own: PyTorch counts the devices of a process at its first gradient.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ELSEWHERE]
    result = subprocess.run(
        [*command, "parity/", "-k", f"not ({longest})"],
        cwd=ROOT,
        env=os.environ | {"HYPOTHESIS_PROFILE": "few"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    laws = re.search(r"laws that ran on elsewhere:0: (\d+); those marked host are", result.stdout)
    assert laws, result.stdout
    assert int(laws[1]) > 85


LEFT_BEHIND = {
    "a mask": (
        "layers.py",
        "torch.arange(length, device=positions.device)",
        "torch.arange(length)",
        "test_layers::test_attention",
    ),
    "the flags of ragged rows": (
        "stream.py",
        "torch.from_numpy(flags).to(yes.device)",
        "torch.from_numpy(flags)",
        "test_batches::test_a_ragged_batch_is_each_sequence_alone",
    ),
    "the targets' padding": (
        "model.py",
        "torch.from_numpy(is_last).to(labels.device)",
        "torch.from_numpy(is_last)",
        "test_model::test_loss",
    ),
}


@pytest.mark.parametrize("fault", LEFT_BEHIND)
def test_a_tensor_left_on_the_host_is_noticed(fault):
    file, right, wrong, law = LEFT_BEHIND[fault]
    status, printed = run([*ELSEWHERE, place(law)], "few", write_wrong(file, right, wrong))
    assert status == 1, printed
    assert "arguments are on elsewhere:0 and on cpu" in printed


@pytest.mark.parametrize("name", ["cuda:99", "meta", "nowhere"])
def test_a_device_that_is_not_there_stops_the_run(name):
    """Before any test, in one sentence; nothing falls back to the CPU."""
    with pytest.raises(ValueError, match=f"--device {name}: PyTorch .* name a device that it has"):
        device.choose(name)
    assert device.is_host()
    command = [sys.executable, "-m", "pytest", "--device", name, "parity/test_layers.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (pytest.ExitCode.USAGE_ERROR, "")
    assert run.stderr.startswith(f"ERROR: --device {name}: ")
    assert len(run.stderr.strip().splitlines()) == 1


def test_a_run_has_the_precision_that_its_tolerances_are_for():
    """Whatever was set before: no TF32, and no sums in half types."""
    matmul = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    matmul.allow_fp16_reduced_precision_reduction = True
    matmul.allow_bf16_reduced_precision_reduction = True
    device.choose("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not matmul.allow_tf32
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert not matmul.allow_bf16_reduced_precision_reduction
