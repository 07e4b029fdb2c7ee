"""What others make for PyTorch's modules works on the layers of a model: hooks, adapters of PEFT,
quantisers, parametrisations, and the files of safetensors."""

import copy
import warnings
from contextlib import nullcontext

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from fast import CoMeTModel
from fast.parameters import PLAIN, Layer

from .assertions import array, assert_near
from .device import tensor
from .strategies import VOCAB, cases, random_model, seeds

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MEMORIES = ("global_memory", "temporary_memory", "compression_embedding", "readout_embeddings")
NEAR = 1e-9
"""Of products that are taken apart otherwise, relative to the logits."""


@pytest.fixture
def model(make_config):
    """With biases in it, tied, in float64."""
    return random_model(make_config({"attention_bias": True, "tie_word_embeddings": True}), 3)


@pytest.fixture
def ids(model):
    """Two texts of several chunks."""
    size = 3 * model.config.memory.chunk_size + 2
    return tensor(np.random.default_rng(5).integers(0, VOCAB, (2, size)))


def moved(model, seed):
    """A model of PEFT's whose trainable weights are somewhere else than where they start."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += tensor(rng.normal(0, 0.3, tuple(p.shape))).to(p)
    return model


@st.composite
def adapted(draw):
    """A case, and a config of PEFT's: some projections get LoRA, some memories are trained whole."""
    config, seed, text = draw(cases())
    targets = draw(st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True))
    there = [
        name
        for name in MEMORIES
        if (config.memory.has_global if name[0] in "gr" else config.memory.has_temporary)
    ]
    whole = draw(st.lists(st.sampled_from(there), unique=True)) if there else []
    lora = peft.LoraConfig(
        r=draw(st.sampled_from([1, 2])),
        target_modules=targets,
        modules_to_save=whole or None,
        use_dora=draw(st.booleans()),
    )
    return config, seed, text, lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapter")


@pytest.mark.host  # the pretend device has no deep copies
@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(adapted(), seeds)
def test_peft_adapts_the_projections_and_trains_the_memories(folder, case, seed):
    """It changes nothing at its start, what it trains gets a gradient, what it saves comes back,
    and merged it is a plain model again."""
    config, weights, text, lora = case
    text = tensor([text * 2])
    base = random_model(config, weights)
    before = base(text).logits
    model = peft.get_peft_model(base, lora)
    assert_near(model(text).logits, before, "at its start", NEAR)
    model(text, labels=text).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in trained)
    for name, grad in trained.items():
        reached = grad is not None and grad.isfinite().all()
        assert reached or any(part in name for part in MEMORIES), f"{name} gets no gradient"
    after = moved(model, seed)(text).logits.detach()
    with model.disable_adapter():
        assert_near(model(text).logits, before, "without the adapter", NEAR)
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(random_model(config, weights), folder)
    assert_near(again(text).logits, after, "loaded", NEAR)
    with pytest.raises(ValueError, match="is a peft.*not one tensor; merge it or take it out"):
        model.base_model.model.save_pretrained(folder)
    merged = model.merge_and_unload()
    assert type(merged) is CoMeTModel
    assert_near(merged(text).logits, after, "merged", NEAR)
    merged.save_pretrained(folder)
    loaded = CoMeTModel.from_pretrained(folder, device=merged.device)
    assert torch.equal(loaded(text).logits, merged(text).logits)


def test_every_matrix_is_a_module(model):
    """And every weight is where the names say, once."""
    leaves = [m for m in model.modules() if type(m) in PLAIN]
    inside = {id(p) for m in leaves for p in m.parameters()}
    outside = {n for n, p in model.named_parameters() if id(p) not in inside}
    assert all(name.endswith("norm") for name in outside)
    names = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    assert {name.rpartition(".")[2] for name in names} == {
        *PROJECTIONS, "gate", "adapter_down", "adapter_up",
    }  # fmt: skip


def test_the_hooks_of_every_projection_and_layer_fire(model, ids):
    """Of a layer, once a round, with the stream's slots in and out; what a hook returns counts."""
    seen = dict.fromkeys(("q_proj", "down_proj", "embed_tokens", "Layer"), 0)

    def count(name):
        return lambda module, args, out: seen.__setitem__(name, seen[name] + 1)

    for name, module in model.named_modules():
        kind = "Layer" if isinstance(module, Layer) else name.rpartition(".")[2]
        if kind in seen:
            module.register_forward_hook(count(kind))
    with torch.no_grad():
        before = model(ids).logits
    rounds, layers = seen["embed_tokens"], model.config.backbone.num_hidden_layers
    assert rounds == 4
    assert seen["Layer"] == seen["q_proj"] == seen["down_proj"] == rounds * layers

    top = model.weights["layers"][layers - 1]
    handle = top.register_forward_hook(lambda m, args, out: (2 * out[0], *out[1:]))
    with torch.no_grad():
        assert_near(model(ids).logits, before, "RMSNorm takes no notice of a factor", 1e-4)
    handle.remove()
    handle = top.register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:]))
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, before)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@pytest.fixture
def everywhere():
    """Hooks on all modules there are."""
    handles = []
    yield handles.append
    for handle in handles:
        handle.remove()


KINDS = ["parametrization", "pruning", "replaced", "forward", "hook", "hook of all"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_a_projection_s_place_is_what_counts(model, ids, everywhere, kind):
    """Never the weight that is below it."""
    layer = model.weights["layers"][0]
    expected = model(ids).logits
    if kind == "parametrization":
        parametrizations.weight_norm(layer["up_proj"])
        with torch.no_grad():
            layer["up_proj"].parametrizations.weight.original0.mul_(2)
    elif kind == "pruning":
        prune.l1_unstructured(layer["up_proj"], "weight", 0.5)
    elif kind == "replaced":
        layer.up_proj = nn.Sequential(layer.up_proj, nn.Tanh())
    elif kind == "forward":  # as accelerate replaces it
        whole = layer["up_proj"].forward
        layer["up_proj"].forward = lambda x: 2 * whole(x)
    elif kind == "hook":
        layer["up_proj"].register_forward_hook(lambda m, args, out: 2 * out)
    else:
        hook = nn.modules.module.register_module_forward_hook
        everywhere(hook(lambda m, args, out: 2 * out if type(m) is nn.Linear else None))
    found = model(ids).logits
    assert found.isfinite().all()
    assert not torch.allclose(found, expected)
    if kind in ("parametrization", "replaced"):
        with pytest.raises(ValueError, match="layers.0.up_proj is a .* not one tensor; merge it"):
            model.weights.to_dict()


@pytest.mark.host
def test_a_quantiser_finds_every_matrix(model, ids):
    """PyTorch's own, to eight bits."""
    model = model.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it moves to a package of its own
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = [type(m).__module__ for m in quantised.modules()]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert sum("quantized.dynamic" in kind for kind in kinds) == len(linear)
    with torch.no_grad():
        found, expected = quantised(ids).logits, model(ids).logits
    share = (found - expected).norm() / expected.norm()
    assert 1e-4 < share < 0.2, f"eight bits move the logits by {share:.1%}"


@pytest.mark.host  # the pretend device has no deep copies
def test_copies_and_files_of_others_are_the_model(model, ids, tmp_path):
    """`copy.deepcopy`, `state_dict` and `safetensors.torch.save_model`."""
    expected = model(ids).logits
    again = CoMeTModel(model.config, seed=1, dtype=model.dtype, device=model.device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(model, str(tmp_path / "model.safetensors"))
        load_model(again, str(tmp_path / "model.safetensors"))
    assert torch.equal(again(ids).logits, expected)
    other = CoMeTModel(model.config, seed=2, dtype=model.dtype, device=model.device)
    other.load_state_dict(model.state_dict())
    assert torch.equal(copy.deepcopy(other)(ids).logits, expected)


@pytest.mark.host  # the pretend device has no deep copies
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_a_functional_call_takes_the_weights_it_is_given(model, ids, mode):
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters() if "down_proj" in name}
    twice = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twice.named_parameters():
            p.copy_(doubled.get(name, p))
    with mode():
        found = torch.func.functional_call(model, doubled, (ids,)).logits
    assert_near(found, array(twice(ids).logits), "functional call", NEAR)


def test_a_name_that_is_no_weight_is_told(model):
    with pytest.raises(KeyError, match="k_proj_bias"):
        model.weights["layers"][0]["k_proj_bias"]
    assert model.weights["layers"][0].get("gate_bias") is None
