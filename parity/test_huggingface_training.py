"""The model of transformers on disk and in training: files, dtypes, embeddings, `Trainer`."""

import copy
import json
import subprocess
import sys

import accelerate
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Trainer

from fast import CoMeTModel, MemoryConfig
from fast.huggingface import CoMeTForCausalLM, CoMeTPretrainedConfig
from reference.parameters import named_parameters

from .assertions import assert_at_most, assert_near
from .device import DEVICE, tensor
from .strategies import configs, random_model, seeds
from .test_backbones import CONFIGS, PLAIN, random_backbone
from .test_gradients import bytes_kept

FEW = settings(max_examples=max(10, settings.default.max_examples // 4))


def wrapped(config, seed=0, dtype=torch.float32):
    return CoMeTForCausalLM.from_model(random_model(config, seed, dtype))


def weights_of(model):
    """Every weight by the reference's name, whatever a state dict calls it."""
    return named_parameters(model.model.weights.to_dict())


def assert_same_weights(found, expected, dtype=None):
    expected = weights_of(expected)
    for name, weight in weights_of(found).items():
        assert torch.equal(weight, expected[name].to(dtype or weight.dtype)), name
        assert dtype is None or weight.dtype == dtype


@pytest.mark.host
@FEW
@given(configs())
def test_a_config_comes_back_whole(tmp_path_factory, config):
    """Through files and AutoConfig; its fields are read and set as attributes."""
    folder = tmp_path_factory.mktemp("config")
    theirs = CoMeTPretrainedConfig.from_comet(config, eos_token_id=3)
    assert theirs.to_comet() == config
    theirs.save_pretrained(folder)
    found = AutoConfig.from_pretrained(folder)
    assert type(found) is CoMeTPretrainedConfig
    assert (found.to_comet(), found.eos_token_id) == (config, 3)
    assert (found.vocab_size, found.chunk_size) == (
        config.backbone.vocab_size,
        config.memory.chunk_size,
    )
    assert found.rope_scaling == config.backbone.rope_scaling
    found.vocab_size, found.gate_bias = 99, True
    changed = found.to_comet()
    assert (changed.backbone.vocab_size, changed.memory.gate_bias) == (99, True)
    assert copy.deepcopy(found).to_comet() == changed
    assert theirs.to_comet() == config


@pytest.mark.host
def test_a_bad_config_says_what_is_wrong(make_config):
    sections = make_config().to_dict()
    with pytest.raises(ValueError, match="backbone is missing; give a BackboneConfig, or make"):
        CoMeTPretrainedConfig()
    with pytest.raises(ValueError, match="MemoryConfig.chunk_size is 0; expected an integer of"):
        CoMeTPretrainedConfig(backbone=sections["backbone"], memory={"chunk_size": 0})
    with pytest.raises(ValueError, match="MemoryConfig has no field chunk; known are"):
        CoMeTPretrainedConfig(backbone=sections["backbone"], memory={"chunk": 1})
    config = CoMeTPretrainedConfig(backbone=make_config().backbone)
    assert config.to_comet().memory == MemoryConfig()
    with pytest.raises(AttributeError, match="CoMeTPretrainedConfig has no attribute 'windows'"):
        config.windows  # noqa: B018


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_whole(make_config, tmp_path, tied, shards, monkeypatch):
    """The files that push_to_hub uploads. Nothing is drawn in their place, and the dtype is the
    files' or the one asked for."""
    model = wrapped(make_config({"tie_word_embeddings": tied}))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path, max_shard_size="1KB" if shards else "1GB")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json"} <= names
    assert ("model.safetensors" in names) != shards
    assert ("model.safetensors.index.json" in names) == shards
    data = json.loads((tmp_path / "config.json").read_text())
    assert (data["model_type"], data["architectures"]) == ("comet", ["CoMeTForCausalLM"])
    monkeypatch.setattr(CoMeTForCausalLM, "_init_weights", None)
    monkeypatch.setattr("fast.model.initialize", None)
    for load in (CoMeTForCausalLM, AutoModelForCausalLM):
        for dtype in (torch.bfloat16, torch.float64, torch.float32, "auto"):
            found = load.from_pretrained(tmp_path, dtype=dtype, device_map=str(DEVICE))
            expected = torch.float32 if dtype == "auto" else dtype
            assert type(found) is CoMeTForCausalLM
            assert_same_weights(found, model, expected)
            assert {p.device for p in found.parameters()} == {DEVICE}
            assert (found.dtype, found.config.dtype) == (expected, expected)
            assert not found.training
            assert found.generation_config.max_new_tokens == 7
            ids = tensor([[1, 2, 3, 4, 5, 6, 7]])
            assert found(ids).logits.dtype == expected
    assert_near(found(ids).logits.detach(), model(ids).logits.detach(), "logits")


def test_a_model_of_ours_and_one_of_transformers_share_weights(make_config, tmp_path):
    ours = random_model(make_config(), 0, torch.float32)
    model = CoMeTForCausalLM.from_model(ours, eos_token_id=4)
    assert model.model is ours
    assert (model.config.eos_token_id, model.config.dtype) == (4, torch.float32)
    model.model.save_pretrained(tmp_path)
    ids = tensor([[1, 2, 3, 4, 5, 6]])
    again = CoMeTModel.from_pretrained(tmp_path, device=DEVICE)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(
        ValueError, match="no model_type, as that of a CoMeTModel; load the folder by"
    ):
        CoMeTForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model is a Linear; expected a CoMeTModel"):
        CoMeTForCausalLM.from_model(torch.nn.Linear(1, 1))


def test_a_fresh_model_starts_as_ours_does(make_config):
    """Norms at one, biases at zero, the rest at N(0, 0.02); by PyTorch's seed, in its dtype."""
    config = CoMeTPretrainedConfig.from_comet(
        make_config({"attention_bias": True, "hidden_size": 64}, {"gate_bias": True})
    )
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.device(DEVICE):
            models.append(AutoModelForCausalLM.from_config(config, dtype=torch.float64))
    first, same, other = map(weights_of, models)
    drawn = []
    for name, weight in first.items():
        assert weight.dtype == torch.float64
        assert torch.equal(weight, same[name])
        if name.endswith("norm"):
            assert (weight == 1).all(), name
        elif name.endswith("bias"):
            assert (weight == 0).all(), name
        else:
            assert not torch.equal(weight, other[name]), name
            drawn.append(weight.flatten())
    drawn = tensor(torch.cat(drawn))
    assert_near(drawn.std(), 0.02, "deviation", 0.001)
    assert_near(drawn.mean(), 0.0, "mean", 0.001)


@pytest.mark.host
def test_a_backbone_brings_how_it_generates(tmp_path):
    """Its end of text ends texts here too, from a folder and from a model."""
    config = CONFIGS["llama"](
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=1, eos_token_id=[2, 5], pad_token_id=0,
    )  # fmt: skip
    theirs = random_backbone(config, 0)
    theirs.generation_config = GenerationConfig(
        eos_token_id=[2, 5], pad_token_id=0, max_new_tokens=3
    )
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, theirs):
        model = CoMeTForCausalLM.from_backbone(source, PLAIN, torch.float32, seed=1)
        assert model.generation_config.eos_token_id == [2, 5]
        assert model.generation_config.max_new_tokens == 3
        assert (model.config.eos_token_id, model.config.pad_token_id) == ([2, 5], 0)
        assert model.dtype == torch.float32
    model.generation_config.eos_token_id = None
    assert theirs.generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows_and_shrinks(make_config, tied, tmp_path):
    model = wrapped(make_config({"tie_word_embeddings": tied})).eval()
    ids = tensor([[1, 2, 3, 4, 5, 6]])
    before = model(ids).logits.detach()
    model.resize_token_embeddings(14)
    for config in (model.config, model.model.config.backbone):
        assert config.vocab_size == 14
    assert len(weights_of(model)["embed_tokens"]) == 14
    after = model(tensor([[*range(1, 7), 13]])).logits.detach()
    assert after.shape == (1, 7, 14)
    assert_near(after[:, :6, :11], before, "logits", 1e-6)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    assert_same_weights(CoMeTForCausalLM.from_pretrained(tmp_path, device_map=str(DEVICE)), model)
    model.resize_token_embeddings(11)
    assert_near(model(ids).logits.detach(), before, "logits, small again", 1e-6)
    with pytest.raises(ValueError, match="ids range from 13 to 13; expected \\[0, 11\\)"):
        model(tensor([[13]]))


def test_embeddings_can_be_replaced(make_config):
    model = wrapped(make_config())
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 2.0
        model.get_output_embeddings().weight[4] = 0.0
    weights = weights_of(model)
    assert (weights["embed_tokens"][3] == 2).all()
    assert (model(tensor([[1, 2]])).logits[..., 4] == 0).all()
    new = torch.nn.Embedding(11, 6, device=DEVICE)
    model.set_input_embeddings(new)
    head = torch.nn.Linear(6, 11, bias=False, device=DEVICE)
    model.set_output_embeddings(head)
    out = model(tensor([[1, 2]]), output_hidden_states=True)
    assert torch.equal(out.hidden_states[0][0], new.weight[[1, 2]])
    assert_near(out.logits.detach(), head(out.hidden_states[-1]).detach(), "logits", 1e-6)
    with pytest.raises(
        ValueError, match="weight is torch.Size\\(\\[9, 5\\]\\); expected \\[rows, 6\\]"
    ):
        model.set_input_embeddings(torch.nn.Embedding(9, 5))


@pytest.mark.host  # recomputing asks a device for its generator, and the pretend one has none
@FEW
@given(configs(), seeds)
def test_checkpointing_changes_no_gradient(config, seed):
    model = wrapped(config, seed, torch.float64).train()
    ids = tensor(np.random.default_rng(seed).integers(0, 11, (2, 3 * config.memory.chunk_size + 1)))

    def gradients():
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        return [p.grad for p in model.parameters()]

    expected = gradients()
    model.activation_checkpointing_enable()
    model = copy.deepcopy(model)
    assert model.is_activation_checkpointing
    for a, b in zip(gradients(), expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.host
def test_checkpointing_reaches_what_is_trained_through_frozen_weights(make_config):
    model = wrapped(make_config()).train()
    model.requires_grad_(False)
    readout = model.model.weights["readout_embeddings"].weight.requires_grad_()
    model.activation_checkpointing_enable()
    ids = tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    model(ids, labels=ids).loss.backward()
    assert readout.grad.any()
    assert [p for p in model.parameters() if p.grad is not None] == [readout]


@pytest.mark.host
def test_checkpointing_keeps_less(make_config):
    model = wrapped(
        make_config(
            {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4},
            {"chunk_size": 32, "temporary_memory_size": 16, "compression_stride": 8},
        )
    ).train()
    ids = tensor(torch.arange(160)[None] % 11)

    def kept():
        return bytes_kept(lambda: model(ids, labels=ids))

    whole = kept()
    model.activation_checkpointing_enable()
    assert_at_most(kept() / whole, 0.2, "bytes kept, of those without")
    model.activation_checkpointing_disable()
    assert kept() == whole
    with pytest.raises(
        ValueError, match="use_reentrant is True; expected False: no gradient would"
    ):
        model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers is 2; expected 1, every layer"):
        model.activation_checkpointing_enable(every_n_layers=2)
    assert not model.is_activation_checkpointing


def texts(number=8, length=10):
    """Texts of a pattern, of unequal lengths, padded at the right."""
    found = []
    for i in range(number):
        ids = (np.arange(length) + i) % 11
        mask = np.arange(length) < length - i % 3
        found.append(
            {
                "input_ids": np.where(mask, ids, 0),
                "attention_mask": mask.astype(int),
                "labels": np.where(mask, ids, -100),
            }
        )
    return found


def trainer_of(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, seed=1, logging_steps=1,
        **{"save_strategy": "no", "learning_rate": 0.02, **options},
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=texts(), eval_dataset=texts(4))


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.host
def test_trainer_trains(make_config, tmp_path):
    """With checkpointing and accumulation; its evaluation meets no cache."""
    model = CoMeTForCausalLM(CoMeTPretrainedConfig.from_comet(make_config()))
    trainer = trainer_of(
        model, tmp_path, max_steps=30, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, activation_checkpointing=True,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert_near(before, np.log(11), "loss at the start", 0.1)
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


@pytest.mark.host
def test_accumulated_steps_have_the_loss_and_the_gradient_of_one(make_config, tmp_path):
    """Each micro-batch's loss is its share, though rows have different numbers of labels: the mean
    over all labels."""
    found = []
    whole = transformers.default_data_collator(texts())
    loss = wrapped(make_config())(**whole).loss.item()
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        model = wrapped(make_config())
        trainer = trainer_of(
            model, tmp_path, max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, max_grad_norm=1e9, optim="sgd",
        )  # fmt: skip
        trainer.train()
        found.append([logged(trainer, "loss"), logged(trainer, "grad_norm")])
    assert_near(found[0][0][0], loss, "loss", 2e-6)
    assert_near(found[1], found[0], "loss and norm, in two", 2e-6)
    assert_near(found[2], found[0], "loss and norm, in four", 2e-6)


@pytest.mark.host
def test_training_resumes_from_a_checkpoint(make_config, tmp_path):
    def run(folder, steps, resume=None):
        torch.manual_seed(0)
        model = CoMeTForCausalLM(CoMeTPretrainedConfig.from_comet(make_config()))
        trainer = trainer_of(
            model, folder, max_steps=steps, per_device_train_batch_size=4, lr_scheduler_type="constant",
            save_strategy="steps", save_steps=3,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model

    expected = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    found = run(tmp_path / "parts", 6, str(tmp_path / "parts" / "checkpoint-3"))
    assert_same_weights(found, expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "checkpoint-6")
    assert_same_weights(loaded, expected)


@pytest.mark.host
def test_accelerate_trains(make_config):
    model = CoMeTForCausalLM(CoMeTPretrainedConfig.from_comet(make_config()))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(
        texts(), batch_size=2, collate_fn=transformers.default_data_collator
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(10):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.host
def test_without_transformers_the_package_to_install_is_named():
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import fast; fast.CoMeTModel, fast.CoMeTState\n"
        "import fast.huggingface"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    told = 'ImportError: fast.huggingface needs transformers; run pip install "comet-memory[huggingface]"'
    assert run.stderr.splitlines()[-1].startswith(told)


@pytest.mark.host
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("whole", [None, ["global_memory", "readout_embeddings"]])
def test_peft_adapts_the_model_of_transformers(make_config, tmp_path, whole):
    """Exact at its start; what it trains makes a difference, is saved, read, merged, and decodes."""
    torch.manual_seed(0)
    base = wrapped(make_config({"tie_word_embeddings": True}), 1, torch.float64).eval()
    ids = tensor(np.random.default_rng(3).integers(0, 11, (2, 25)))
    expected = base(ids).logits.detach()
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], modules_to_save=whole
    )
    model = peft.get_peft_model(base, lora)
    assert_near(model(ids).logits.detach(), expected, "at its start", 1e-9)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        activation_checkpointing=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=data).train()
    model.eval()
    after = model(ids).logits.detach()
    assert not torch.allclose(after, expected, atol=1e-2)
    model.save_pretrained(tmp_path)
    fresh = wrapped(make_config({"tie_word_embeddings": True}), 1, torch.float64).eval()
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert_near(again(ids).logits.detach(), after, "loaded", 1e-9)
    answer = model.generate(input_ids=ids, max_new_tokens=9, do_sample=False)
    merged = model.merge_and_unload()
    assert type(merged) is CoMeTForCausalLM
    assert_near(merged(ids).logits.detach(), after, "merged", 1e-9)
    assert torch.equal(merged.generate(ids, max_new_tokens=9, do_sample=False), answer)


@pytest.mark.host
def test_hooks_of_the_embeddings_and_layers_fire(make_config):
    model, seen = wrapped(make_config()).eval(), []
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.append("embeddings"))
    model.model.weights["layers"][0].register_forward_hook(lambda *_: seen.append("layer"))
    model(tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]]))
    size = model.config.chunk_size
    rounds = -(-9 // size)
    assert seen == ["embeddings", "layer"] * rounds
