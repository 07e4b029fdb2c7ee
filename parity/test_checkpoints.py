"""Checkpoints: what goes out comes in again, and nothing else comes in."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fast import CoMeTModel
from fast.arrays import FLOATS, all_finite
from fast.checkpoints import load_arrays, read_tensors, save_checkpoint
from fast.files import atomic_save
from reference import model as spec
from reference import stream
from reference.config import LATER
from reference.parameters import named_parameters

from .assertions import arrays_of, assert_near
from .device import DEVICE, tensor, tensors
from .strategies import cases, random_model, random_weights, seeds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@given(case=cases())
def test_save_and_load_change_nothing(folder, case):
    config, seed, ids = case
    model = random_model(config, seed)
    model.save_pretrained(folder)
    again = CoMeTModel.from_pretrained(folder).to(DEVICE)
    assert again.config == config
    assert again.dtype == torch.float64
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    logits, _ = spec.forward(ids, stream.new_state(config), arrays_of(model), config)
    assert_near(again(tensor([ids])).logits[0], logits, "logits")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    _, arrays = load_arrays(folder)
    expected = named_parameters(arrays_of(model))
    assert all(np.array_equal(a, expected[n]) for n, a in named_parameters(arrays).items())


def test_the_reference_runs_a_bfloat16_checkpoint(tmp_path, make_config):
    model = random_model(make_config(), 0).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config, arrays = load_arrays(tmp_path)
    assert arrays["norm"].dtype == np.float32
    logits, _ = spec.forward([1, 2, 3], stream.new_state(config, np.float32), arrays, config)
    assert np.isfinite(logits).all()


def saved(tmp_path, make_config):
    config = make_config()
    model = random_model(config, 0)
    model.save_pretrained(tmp_path)
    return config, model, tmp_path / "config.json", tmp_path / "model.safetensors"


def without(data, names):
    """A config's dict that does not know some fields."""
    return {
        part: {name: value for name, value in fields.items() if name not in names}
        for part, fields in data.items()
    }


def test_a_checkpoint_from_before_a_field_came_is_read(tmp_path, make_config):
    """Whether its weights tell of their config, as ours do, or not."""
    config, _, path, weights = saved(tmp_path, make_config)
    old = without(config.to_dict(), LATER)
    path.write_text(json.dumps(old))
    assert CoMeTModel.from_pretrained(tmp_path).config == config
    atomic_save(weights, load_file(weights), {"config": old})
    assert CoMeTModel.from_pretrained(tmp_path).config == config
    path.unlink()
    assert CoMeTModel.from_pretrained(tmp_path).config == config
    path.write_text(json.dumps(old))
    save_file(load_file(weights), weights)
    assert CoMeTModel.from_pretrained(tmp_path).config == config
    path.write_text(json.dumps(without(config.to_dict(), {"gate"})))
    refused(tmp_path, "lacks memory.gate; give every field")


def refused(folder, match):
    with pytest.raises(ValueError, match=match):
        CoMeTModel.from_pretrained(folder)


def test_a_damaged_checkpoint_is_refused(tmp_path, make_config):
    _, _, config, weights = saved(tmp_path, make_config)
    whole, text = weights.read_bytes(), config.read_text()
    for cut in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        refused(tmp_path, "cut short")
    weights.write_bytes(whole)
    config.write_text(text[: len(text) // 2])
    refused(tmp_path, "not JSON")
    config.write_text('{"model_type": "llama"}')
    refused(tmp_path, "neither a CoMeT config")
    config.write_text("[1]")
    refused(tmp_path, "holds a list")
    weights.unlink()
    config.write_text(text)
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        CoMeTModel.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError):
        CoMeTModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path, make_config):
    _, _, _, path = saved(tmp_path, make_config)
    whole = load_file(path)

    def with_changes(changes, match):
        save_file({k: v for k, v in (whole | changes).items() if v is not None}, path)
        refused(tmp_path, match)

    with_changes({"norm": None}, "lacks the tensor norm")
    with_changes({"stranger": torch.zeros(1)}, "stranger")
    with_changes({"norm": torch.ones(7, dtype=torch.float64)}, r"norm has shape \(7,\)")
    with_changes({"norm": torch.ones(6, dtype=torch.float32)}, "float")
    bad = whole["layers.1.q_proj"].clone()
    bad[0, 0] = float("nan")
    with_changes({"layers.1.q_proj": bad}, "layers.1.q_proj holds NaN")


@pytest.mark.host
@pytest.mark.parametrize("dtype", FLOATS)
@given(seed=seeds, bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_one_number_that_is_not_finite_is_seen(dtype, seed, bad):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 40, rng.integers(0, 3)))
    x = np.asarray(rng.normal(size=shape)).astype(getattr(ml_dtypes, dtype, dtype))
    broken = x.copy()
    broken[tuple(rng.integers(0, shape))] = bad
    for make in (
        np.asarray,
        lambda a: torch.tensor(a.astype(np.float64)).to(getattr(torch, dtype)),
    ):
        assert all_finite(make(x))
        assert all_finite(make(x[..., None][..., :0]))
        assert not all_finite(make(broken))


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(
    tmp_path, make_config, monkeypatch
):
    """By an atomic save, as ours are: no reader sees a part of each."""
    config, model, _, weights = saved(tmp_path, make_config)
    other, opened = random_model(config, 1), []

    def replacing(*args, **options):
        opened.append(args)
        if len(opened) == 9:
            save_checkpoint(tmp_path, config, other.weights)
        return safe_open(*args, **options)

    monkeypatch.setattr("fast.checkpoints.safe_open", replacing)
    found = read_tensors(tmp_path)
    assert len(opened) == 1 + len(found)
    for name, x in named_parameters(model.weights.to_dict()).items():
        assert torch.equal(found[name].to(DEVICE), x), name
    for name, x in named_parameters(other.weights.to_dict()).items():
        assert torch.equal(read_tensors(tmp_path)[name].to(DEVICE), x), name


def test_weights_given_as_a_dict_are_checked(make_config):
    config = make_config()
    weights = tensors(random_weights(config, 0), torch.float32)
    CoMeTModel(config, weights)
    weights["norm"][0] = float("inf")
    with pytest.raises(ValueError, match="norm holds NaN or infinity"):
        CoMeTModel(config, weights)
    del weights["norm"]
    with pytest.raises(ValueError, match=r"lack \['norm'\]"):
        CoMeTModel(config, weights)


def test_nothing_is_ever_unpickled(tmp_path, make_config):
    _, _, _, path = saved(tmp_path, make_config)

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path.write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "not a readable safetensors file")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, make_config, monkeypatch):
    config, model, path, weights = saved(tmp_path, make_config)
    before = path.read_bytes(), weights.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, config, model.weights)
    assert (path.read_bytes(), weights.read_bytes()) == before
    assert sorted(tmp_path.iterdir()) == [path, weights]
