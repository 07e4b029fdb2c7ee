"""The published implementation's recorded numbers, reproduced by both trees.

`pytest parity/test_golden.py --golden FOLDER` runs any other folder of the same form: a
manifest.json that lists cases, one .npz each, and optionally a checkpoint with its logits.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fast import BackboneConfig, CoMeTConfig, CoMeTModel, MemoryConfig
from fast.cupy_engine import CoMeTEngine
from fast.global_memory import read_global as fast_read
from fast.parameters import to_arrays
from fast.pretrained import PublishedIds, load_published, published_name, save_published
from reference import model as spec
from reference import stream
from reference.global_memory import read_global
from reference.parameters import map_parameters, named_parameters, shapes

from .assertions import ENGINE_GOLDEN, FAST_GOLDEN, REFERENCE_GOLDEN, allowed, array, assert_near
from .device import DEVICE, tensor, tensors
from .homes import NUMPY, STRICT
from .test_gradients import STEP

RECORDED = {
    "test_logits_of_the_engine": "/logits_text_f64",
    "test_logits": "/logits_text_f64",
    "test_memories_after_every_chunk": "/mem_f64/",
    "test_loss_and_every_gradient": "/loss_f64",
    "test_decoding": "dec_textphase/fed_ids",
}
"""What a test compares with; it runs on the cases that have it recorded, and in those layouts.
gen: a chunk's last group has no compression token, as the published inference lays it out."""


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--golden")
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    recorded = RECORDED[metafunc.function.__name__]
    found = []
    for entry in cases:
        for layout in ("gen", "train"):
            prefix = layout if recorded.startswith("/") else ""
            wanted = recorded.startswith("/") or layout == "gen"
            if wanted and any(key.startswith(prefix + recorded) for key in entry["arrays"]):
                found.append((entry["name"], layout))
    if not found and folder == Path(__file__).parent / "golden":
        raise ValueError(
            f"{folder} has no case for {metafunc.function.__name__}; nothing is tested."
        )
    metafunc.parametrize(("case", "layout"), found)


@pytest.fixture
def golden(request):
    return request.config.getoption("--golden")


@cache
def load(folder: Path, name: str):
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(c for c in manifest["cases"] if c["name"] == name)
    with np.load(folder / entry["file"]) as file:
        return entry["config"], {key: file[key] for key in file.files}


def config_of(c, layout):
    return CoMeTConfig(
        BackboneConfig(
            **{
                name: c[name]
                for name in (
                    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
                    *("num_attention_heads", "num_key_value_heads", "head_dim"),
                    *("rms_norm_eps", "rope_theta", "tie_word_embeddings"),
                )
            },
            qk_norm=True,
        ),
        MemoryConfig(
            chunk_size=c["chunk_size"],
            global_memory_size=len(c["global_beacon_ids"]),
            temporary_memory_size=c["temp_mem_budget"],
            compression_stride=max(c["temp_beacon_stride"], 0),
            trailing_compression=layout == "train",
        ),
    )


def params_of(c, data, config):
    table = data["w/model.embed_tokens.weight"].astype(np.float64)

    def fetch(name, _):
        if name == "compression_embedding":
            return table[c["temp_beacon_id"]]
        if name == "readout_embeddings":
            return table[c["global_beacon_ids"]]
        return data[f"w/{published_name(name)}"].astype(np.float64)

    return map_parameters(fetch, shapes(config))


def setting(folder, name, layout):
    c, data = load(folder, name)
    config = config_of(c, layout)
    params = params_of(c, data, config)
    model = CoMeTModel(config, tensors(params, torch.float64))
    return c, data, config, params, model


def test_logits(golden, case, layout):
    _, data, config, params, model = setting(golden, case, layout)
    key = f"{layout}/logits_text_f64"
    ids, sizes = data["text_ids"], data["text_chunk_sizes"].tolist()
    logits, _ = spec.forward(ids, stream.new_state(config), params, config, chunk_sizes=sizes)
    assert_near(logits, data[key], f"{case}, reference logits", REFERENCE_GOLDEN)
    out = model(tensor(ids)[None].long(), chunk_sizes=sizes)
    assert_near(out.logits[0], data[key], f"{case}, fast logits", FAST_GOLDEN)


@pytest.mark.host
@pytest.mark.engine(NUMPY, STRICT)
def test_logits_of_the_engine(home, golden, case, layout):
    _, data, config, params, _ = setting(golden, case, layout)
    ids = home.array(data["text_ids"][None].astype(np.int64))
    out = home.engine(config, params)(ids, chunk_sizes=data["text_chunk_sizes"].tolist())
    assert_near(out.logits, data[f"{layout}/logits_text_f64"][None], case, ENGINE_GOLDEN)


def test_memories_after_every_chunk(golden, case, layout):
    """S, G and T of every layer. The last chunk is still open: it has its queue entries alone."""
    c, data, config, params, model = setting(golden, case, layout)
    prefix = f"{layout}/mem_f64/"
    ids, sizes = data["text_ids"], data["text_chunk_sizes"].tolist()
    cut = np.cumsum([0, *sizes])
    state, fast_state = stream.new_state(config), model.new_state()
    for t, (a, b) in enumerate(zip(cut[:-1], cut[1:], strict=True)):
        _, state = stream.read(ids[a:b], state, params, config, roll=False)
        piece = tensor(ids[a:b])[None].long()
        fast_state = model(piece, state=fast_state, logits="none", chunk_sizes=[int(b - a)]).state
        is_last = t == len(sizes) - 1
        if not is_last:
            state = stream.close_chunk(state, params, config)
            fast_state = model.close_chunk(fast_state)
        for layer in range(c["num_hidden_layers"]):
            what = f"{case}, chunk {t}, layer {layer}"
            weights, tensors = params["layers"][layer], model.weights["layers"][layer]
            key = f"{prefix}chunk{t}/layer{layer}/"
            found = {}
            if key + "temp_memory" in data and config.memory.has_temporary:
                found["temp_memory"] = (
                    state.temporary_memory[layer],
                    fast_state.temporary_memory[layer][0],
                )
            if key + "global_state" in data and config.memory.has_global:
                s, f = state.global_state[layer], fast_state.global_state[layer]
                found["global_state"] = (s, f[0])
                found["global_memory"] = (
                    read_global(s, weights["global_memory"]),
                    fast_read(f, tensors["global_memory"])[0],
                )
            for name, (own, twin) in found.items():
                assert_near(own, data[key + name], f"{what}, {name}", REFERENCE_GOLDEN)
                assert_near(twin, data[key + name], f"{what}, {name}", FAST_GOLDEN)


def test_loss_and_every_gradient(golden, case, layout):
    c, data, config, params, model = setting(golden, case, layout)
    ids, sizes = data["text_ids"], data["text_chunk_sizes"].tolist()
    labels = data["labels_text_unshifted"]
    logits, _ = spec.forward(ids, stream.new_state(config), params, config, chunk_sizes=sizes)
    loss = spec.language_loss(logits, labels)
    assert_near(loss, data["train/loss_f64"], f"{case}, reference loss", REFERENCE_GOLDEN)
    out = model(
        tensor(ids)[None].long(),
        labels=tensor(labels)[None].long(),
        chunk_sizes=sizes,
        logits="none",
    )
    assert_near(out.loss, data["train/loss_f64"], f"{case}, fast loss", FAST_GOLDEN)
    out.loss.backward()

    weights = named_parameters(model.weights.to_dict())
    grads = {name: array(p.grad) for name, p in weights.items()}
    table = grads.pop("embed_tokens").copy()
    # There the special tokens are rows of the table.
    if "compression_embedding" in grads:
        table[c["temp_beacon_id"]] += grads.pop("compression_embedding")
    if "readout_embeddings" in grads:
        table[c["global_beacon_ids"]] += grads.pop("readout_embeddings")
    found = {"model.embed_tokens.weight": table} | {published_name(n): g for n, g in grads.items()}
    recorded = {
        k.removeprefix("grad_f64/"): g for k, g in data.items() if k.startswith("grad_f64/")
    }
    assert set(found) == set(recorded)
    limit = allowed(FAST_GOLDEN, out.loss)
    for name, expected in recorded.items():
        assert_near(found[name], expected, f"{case}, gradient of {name}", limit)

    # The reference's own derivative, by a complex step along one direction of all parameters.
    rng = np.random.default_rng(0)
    moved, expected = {}, 0.0
    for name, p in named_parameters(params).items():
        direction = rng.normal(size=p.shape)
        moved[name] = p + 1j * STEP * direction
        if name == "compression_embedding":
            expected += np.sum(
                recorded["model.embed_tokens.weight"][c["temp_beacon_id"]] * direction
            )
        elif name == "readout_embeddings":
            rows = recorded["model.embed_tokens.weight"][c["global_beacon_ids"]]
            expected += np.sum(rows * direction)
        else:
            g = recorded[published_name(name)].copy()
            if name == "embed_tokens" and not config.backbone.tie_word_embeddings:
                g[[c["temp_beacon_id"], *c["global_beacon_ids"]]] = 0  # those rows are moved above
            expected += np.sum(g * direction)
    if config.backbone.tie_word_embeddings:
        return  # a special row's gradient there joins what is two weights here
    tree = map_parameters(lambda name, _: moved[name], params)
    logits, _ = spec.forward(ids, stream.new_state(config), tree, config, chunk_sizes=sizes)
    derivative = spec.language_loss(logits, labels).imag / STEP
    assert_near(derivative, expected, f"{case}, reference derivative", REFERENCE_GOLDEN)


def test_decoding(golden, case, layout):
    """Greedy decoding in the open chunk, with the phase counted in text tokens."""
    _, data, config, params, model = setting(golden, case, layout)
    ids = data["text_ids"]
    text = data["dec_textphase/output_ids_stripped"].tolist()
    new, _ = spec.generate(ids, stream.new_state(config), params, config, len(text), roll=False)
    assert new == text
    out = model.generate(tensor(ids)[None].long(), max_new_tokens=len(text), roll=False)
    assert out.ids == [text]
    # Logits of every step that read text, the prompt's last first.
    is_text = np.concatenate([[True], data["dec_textphase/fed_is_beacon"] == 0])
    recorded = data["dec_textphase/step_logits_f64"][is_text]
    fed = data["dec_textphase/fed_ids"][data["dec_textphase/fed_is_beacon"] == 0]
    logits, state = spec.forward(ids, stream.new_state(config), params, config)
    more, _ = spec.forward(fed, state, params, config, roll=False)
    found = np.concatenate([logits[-1:], more])
    assert_near(found, recorded, f"{case}, step logits", REFERENCE_GOLDEN)


def test_the_published_checkpoint(golden, tmp_path):
    """Read, run, written back: the same tensors under the same names."""
    folder = golden / "checkpoint"
    config, weights, ids = load_published(folder)
    expected = json.loads((golden / "checkpoint_params.json").read_text())["tensors"]
    with np.load(golden / "checkpoint_golden.npz") as file:
        data = {key: file[key] for key in file.files}
    sizes = data["text_chunk_sizes"].tolist()

    memory = dataclasses.replace(config.memory, trailing_compression=False)  # its gen layout
    model = CoMeTModel(dataclasses.replace(config, memory=memory), weights).to(DEVICE).double()
    out = model(tensor(data["text_ids"])[None].long(), chunk_sizes=sizes)
    assert_near(out.logits[0], data["gen/logits_text_f64"], "fast", FAST_GOLDEN)
    arrays = to_arrays(model.weights)
    logits, _ = spec.forward(
        data["text_ids"], stream.new_state(model.config), arrays, model.config, chunk_sizes=sizes
    )
    assert_near(logits, data["gen/logits_text_f64"], "reference", REFERENCE_GOLDEN)
    assert isinstance(CoMeTModel.from_pretrained(folder), CoMeTModel)

    assert save_published(tmp_path, config, weights, ids) == ids
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert {name: list(t.shape) for name, t in after.items()} == expected
    assert all(torch.equal(after[name], t) for name, t in before.items())
    there = json.loads((folder / "config.json").read_text())
    back = json.loads((tmp_path / "config.json").read_text())
    assert all(there[key] == value for key, value in back.items())


@pytest.mark.host
def test_another_folder_of_the_same_form(golden, tmp_path, request):
    """The option takes any folder: one with a single case, and a wrong number in it, fails."""
    if golden != Path(__file__).parent / "golden":
        pytest.skip("a folder was given")
    name = "prefill_short_one_chunk"
    manifest = json.loads((golden / "manifest.json").read_text())
    manifest["cases"] = [c for c in manifest["cases"] if c["name"] == name]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(golden / "checkpoint", tmp_path / "checkpoint")
    for file in ("checkpoint_golden.npz", "checkpoint_params.json"):
        shutil.copy(golden / file, tmp_path / file)
    _, data = load(golden, name)
    for change, status in ((0.0, 0), (1e-9, 1)):
        key = "gen/logits_text_f64"
        np.savez(tmp_path / f"{name}.npz", **(data | {key: data[key] + change}))
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
            + ["--golden", str(tmp_path)],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == status, run.stdout


@pytest.mark.host
def test_ids_of_special_tokens_are_kept(golden):
    _, _, ids = load_published(golden / "checkpoint")
    assert ids == PublishedIds(63, (58, 59, 60, 61), 62)


@pytest.mark.host
def test_the_engine_reads_an_official_checkpoint(golden):
    path = golden / "checkpoint"
    engine = CoMeTEngine.from_pretrained(path, dtype="float64", library="numpy")
    model, ids = CoMeTModel.from_pretrained(path).double(), np.arange(40)[None] % 20
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits
    assert_near(engine(ids).logits, array(expected), "official checkpoint", 1e-11)
