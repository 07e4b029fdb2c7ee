"""The two trees say the same under the same names, and the reference says it in NumPy alone."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from fast import CoMeTModel
from fast.cupy_engine import CoMeTEngine

pytestmark = pytest.mark.host

TWINS = ("chunking", "layers", "temporary_memory", "global_memory", "parameters", "stream", "model")

ELSEWHERE = {
    "layers.softmax": "inside torch's fused attention",
    "stream.detach": "CoMeTState.detach",
    "stream.StreamState": "CoMeTState, batched",
    "stream.read_compression": "joined into run_row, so that no layer's output outlives the layer",
    "stream.read_token": "a round at a time: see chunking.plan_rounds and rows.lay_out",
    "stream.run_row": "takes ids and the round's plan, since it lays the row out too",
    "parameters.map_parameters": "used as it is",
    "parameters.named_parameters": "used as it is",
    "parameters.shapes": "used as it is",
}
"""Reference names without a twin of the same form in `fast`, and why."""

ENGINE = ("layers", "temporary_memory", "global_memory", "stream", "engine")
"""Modules of the third tree; the rest it shares with `fast`."""

ENGINE_ELSEWHERE = {
    "layers.rotary_frequencies": "the reference's own, on the host",
    "stream.new_state": "takes an array of the model in place of a dtype",
    "stream.read": "for inference: nothing to cut derivatives by",
    "model.language_loss": "for training",
    "model.forward": "CoMeTEngine.__call__",
    "model.generate": "CoMeTEngine.generate",
}
"""Names without a twin of the same form in `fast.cupy_engine`, beside those of `ELSEWHERE`."""


def names():
    for module in TWINS:
        for name in importlib.import_module(f"reference.{module}").__all__:
            if name.isupper() or f"{module}.{name}" in ELSEWHERE:
                continue
            yield module, name


@pytest.mark.parametrize(("module", "name"), list(names()))
def test_every_reference_function_has_a_twin_with_the_same_arguments(module, name):
    spec = getattr(importlib.import_module(f"reference.{module}"), name)
    fast = importlib.import_module(f"fast.{module}")
    if module == "model" and name in ("forward", "generate"):
        # Faces of the class: ids and state first there too, params and config are the model's own.
        shared = {"ids", "state", "chunk_sizes", "backprop_chunks", "stop_ids", "max_new_tokens"}
        wanted = shared & set(inspect.signature(spec).parameters)
        assert wanted <= set(inspect.signature(getattr(CoMeTModel, name)).parameters)
        return
    assert hasattr(fast, name), f"fast/{module}.py has no {name}"
    wanted = list(inspect.signature(spec).parameters)
    found = list(inspect.signature(getattr(fast, name)).parameters)
    assert found[: len(wanted)] == wanted, f"{module}.{name}: {found}, expected {wanted} first"


@pytest.mark.parametrize(("module", "name"), list(names()))
def test_the_engine_has_a_twin_with_the_same_arguments(module, name):
    home = {"model": "engine"}.get(module, module)
    if home not in ENGINE or f"{module}.{name}" in ENGINE_ELSEWHERE:
        return
    spec = getattr(importlib.import_module(f"reference.{module}"), name)
    engine = importlib.import_module(f"fast.cupy_engine.{home}")
    assert hasattr(engine, name), f"fast/cupy_engine/{home}.py has no {name}"
    wanted = list(inspect.signature(spec).parameters)
    found = list(inspect.signature(getattr(engine, name)).parameters)
    assert found[: len(wanted)] == wanted, f"{module}.{name}: {found}, expected {wanted} first"


def test_the_engine_s_face_is_the_model_s():
    for model, engine in (("forward", "__call__"), ("generate", "generate")):
        wanted = set(inspect.signature(getattr(CoMeTModel, model)).parameters)
        found = set(inspect.signature(getattr(CoMeTEngine, engine)).parameters)
        assert found <= wanted
        own = {"labels", "backprop_chunks", "recompute"} | {"diagonal"}  # of training; of PyTorch
        assert wanted - found <= own, model


@pytest.mark.parametrize("module", TWINS)
def test_all_lists_every_public_function(module):
    trees = ["reference", "fast"] + ["fast.cupy_engine"] * (module in ENGINE)
    for tree in trees:
        loaded = importlib.import_module(f"{tree}.{module}")
        own = {
            name
            for name, thing in vars(loaded).items()
            if inspect.isfunction(thing)
            and thing.__module__ == loaded.__name__
            and not name.startswith("_")
        }
        assert own <= set(loaded.__all__), f"{tree}/{module}.py: {own - set(loaded.__all__)}"
        assert all(hasattr(loaded, name) for name in loaded.__all__)


@pytest.mark.parametrize("tree", ["reference", "fast"])
def test_every_public_function_has_a_docstring(tree):
    root = Path(importlib.import_module(tree).__file__).parent
    for path in root.rglob("*.py"):
        relative = path.relative_to(root.parent).with_suffix("")
        if relative.name == "__main__":
            continue
        loaded = importlib.import_module(".".join(relative.parts).removesuffix(".__init__"))
        assert loaded.__doc__, f"{relative} has no docstring"
        for name, thing in vars(loaded).items():
            if name.startswith("_") or getattr(thing, "__module__", "") != loaded.__name__:
                continue
            if inspect.isfunction(thing) or inspect.isclass(thing):
                assert inspect.getdoc(thing), f"{relative}: {name} has no docstring"


def test_the_reference_imports_nothing_but_numpy_and_the_standard_library():
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {"numpy", "reference"}:
            raise ImportError("not allowed: " + name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from reference import *
from reference import chunking, model, parameters, stream
config = CoMeTConfig(BackboneConfig(7, 4, 3, 1, 1, 1, 2), MemoryConfig(3, 1, 2, 2))
params = parameters.initialize(config, np.random.default_rng(0))
new, state = model.generate([1, 2, 3, 4], stream.new_state(config), params, config, 5)
assert state.tokens == 9 and state.chunks == 2
assert "torch" not in sys.modules
"""
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
