"""Training on the harness's tasks, CoMeT and baselines alike, from settings to an evaluation."""

import dataclasses

import numpy as np
import pytest
import torch

from fast import BackboneConfig, CoMeTConfig, CoMeTModel, MemoryConfig
from fast.__main__ import main
from fast.baselines import Baseline
from fast.pretrained.text import ByteText
from fast.tasks.questions import Options, Questions, answer_text
from fast.tasks.synthetic import Associations
from fast.train import Phase, Processes, Settings, Trainer, build_model

from .test_train import run_to_a_checkpoint

pytestmark = pytest.mark.host

CONFIG = CoMeTConfig(BackboneConfig(256, 16, 24, 2, 2, 2, 8), MemoryConfig(32, 2, 4, 8)).to_dict()
BASELINES = {
    "CoMeT": None,
    "transformer-xl": {"kind": "transformer-xl", "slots": 6},
    "rmt": {"kind": "rmt", "slots": 3},
    "armt": {"kind": "armt", "slots": 2, "key_size": 4},
}


def settings(**changes):
    given = {
        "task": "questions",
        "config": CONFIG,
        "batch_size": 4,
        "phases": (Phase(6, 3e-3, decay="none"),),
        "options": {"of_evaluation": {"pairs": 2, "questions": 3}, "fewest": 1, "chunks": 3},
    }
    return Settings(**{**given, **changes})


def task(given):
    return Questions(given, build_model(given), Processes())


def test_losses_are_those_of_each_question_by_itself():
    given = settings()
    trained, evaluation = task(given), Associations(pairs=2, questions=3)
    rng, words = np.random.default_rng(0), ByteText()
    samples = [evaluation.draw(70, rng, words) for _ in range(2)]
    text, answers, right = trained.losses(samples)
    texts, nats, hits = [], [], []
    for sample in samples:
        ids = torch.from_numpy(sample.ids)[None]
        out = trained.model(ids, labels=ids)
        texts.append(out.loss)
        for question in sample.questions:
            told = words.encode(answer_text(question.answers))
            asked = torch.tensor([words.encode(question.prompt) + told])
            logits = trained.model(asked, state=out.state).logits[0, -len(told) - 1 : -1]
            nats.append(-torch.log_softmax(logits, -1)[range(len(told)), told])
            hits.append(logits.argmax(-1) == torch.tensor(told))
    torch.testing.assert_close(text, torch.stack(texts).mean())
    torch.testing.assert_close(answers, torch.cat(nats).mean())
    torch.testing.assert_close(right, torch.cat(hits).float().mean())


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_each_learns_and_goes_on_and_is_evaluated(name, tmp_path, capsys):
    """A run that was stopped ends at the weights of one that was not."""
    phases = (Phase(30, 1e-2, decay="none"),)
    given = settings(baseline=BASELINES[name], phases=phases, save_every=10)
    whole = Trainer(task(given), tmp_path / "whole")
    whole.run()
    told = [step["answers"] for step in whole.read_metrics()]
    assert np.mean(told[-5:]) < 0.75 * np.mean(told[:2])
    cut = Trainer(task(given), tmp_path / "cut")
    run_to_a_checkpoint(cut)
    assert 0 < cut.step < whole.step
    rest = Trainer(task(given), tmp_path / "cut")
    assert rest.step == cut.step
    rest.run()
    kind = CoMeTModel if BASELINES[name] is None else Baseline
    weights = [kind.from_pretrained(run.result).state_dict() for run in (whole, rest)]
    assert all(torch.equal(p, weights[1][key]) for key, p in weights[0].items())
    words = ["eval", "associations", "--model", str(whole.result), "--lengths", "40", "100"]
    main([*words, "--samples", "2", "--batch-size", "2", "--set", "pairs=2"])
    assert "| 100 |" in capsys.readouterr().out


def test_held_out_texts_are_none_of_the_training_s():
    trained = task(settings())
    found = trained.evaluate()
    assert set(found) == {"answers", "right"}
    assert found == trained.evaluate()
    assert 0 <= found["right"] <= 1


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="evaluation is 'pairs'; expected"):
        task(settings(options={"evaluation": "pairs"}))
    with pytest.raises(ValueError, match="of_evaluation: Associations has no keys; known are"):
        task(settings(options={"of_evaluation": {"keys": 3}}))
    with pytest.raises(
        ValueError, match="fewest is 4 and chunks 2; expected 1 <= fewest <= chunks"
    ):
        Options(fewest=4, chunks=2)
    with pytest.raises(ValueError, match="baseline is given without a config"):
        dataclasses.replace(settings(), config=None, model="x", baseline={"kind": "rmt"})
    with pytest.raises(ValueError, match="kind is 'lstm'; expected"):
        build_model(settings(baseline={"kind": "lstm", "slots": 3}))
    with pytest.raises(ValueError, match="baseline: BaselineConfig lacks slots"):
        build_model(settings(baseline={"kind": "rmt"}))
