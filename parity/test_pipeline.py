"""A step that workers share is the step of one process: the same loss, gradients and weights."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fast import IGNORE, CoMeTModel
from fast.parallel import Pipeline, WorkerLostError, init_pipeline_mesh
from fast.parallel.ring import Ring
from fast.parallel.schedule import deal, plan_chunks
from reference.parameters import named_parameters

from .assertions import assert_at_most, assert_near
from .strategies import VOCAB, configs, corner_lengths, random_model, seeds, splits
from .test_windows import Saved
from .workers import Dealt, Group, Workers, mesh_of

pytestmark = pytest.mark.host

GRADIENTS = 1e-10
"""Of sums that are added in another order."""

SETTLE = 5.0
"""Seconds in which all processes have ended once one is lost: those that the page promises."""


@pytest.fixture(scope="module")
def workers():
    found = Workers()
    yield found
    found.close()


@st.composite
def steps(draw):
    """Workers, a model, and what a step takes: chunks fewer than workers and many more, in blocks,
    ragged or cut by hand, labels with holes."""
    shape = draw(st.sampled_from([(2, 1), (3, 1), (4, 1), (2, 2), (2, 2)]))
    config, seed, by_hand = draw(configs()), draw(seeds), draw(st.booleans())
    b, times = shape[1] * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    lengths = [times * draw(corner_lengths(config)) for _ in range(1 if by_hand else b)]
    lengths = [max(2, n) for n in (lengths * b if by_hand else lengths)]
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (b, max(lengths)))
    labels = np.where(rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.5])), IGNORE, ids)
    labels[0, 1] = 3  # there is one at least
    sizes = draw(splits(lengths[0])) if by_hand else None
    how = {"block": draw(st.integers(1, 3)), "recompute": draw(st.sampled_from(["none", "cells"]))}
    return shape, config, seed, (ids, labels, lengths, sizes), how


def as_tensors(ids, labels, lengths, sizes):
    return {
        "ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "lengths": lengths,
        "chunk_sizes": sizes,
    }  # fmt: skip


def whole(x):
    """A tensor's numbers, put together from shards."""
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).numpy().copy()


def numbers(model, of=lambda p: p):
    found = named_parameters(model.weights.to_dict())
    return {name: None if of(p) is None else whole(of(p)) for name, p in found.items()}


def train(model, text, number, step):
    """Steps of AdamW: losses, the first one's gradients, the last one's weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, gradients = [], {}
    for _ in range(number):
        optimizer.zero_grad()
        losses.append(step(as_tensors(*text)))
        gradients = gradients or numbers(model, lambda p: p.grad)
        if number > 1:
            optimizer.step()
    return losses, gradients, numbers(model)


def train_alone(config, seed, text, number=1):
    model = random_model(config, seed)

    def step(text):
        loss = model(logits="none", **text).loss
        loss.backward()
        return loss.item()

    return train(model, text, number, step)


def train_together(mesh, config, seed, text, how, number=1, shard=False):
    """What a worker does: on its rows of the batch, where the mesh has a dimension for data."""
    model = random_model(config, seed)
    pipeline = Pipeline(sharded(model, mesh) if shard else model, mesh, **how)
    part, parts = mesh.get_local_rank("data"), mesh.size(1)
    ids, labels, lengths, sizes = text
    own = ids[part::parts], labels[part::parts], lengths[part::parts], sizes
    own = own[0][:, : max(own[2])], own[1][:, : max(own[2])], *own[2:]
    return train(model, own, number, lambda text: pipeline.step(**text).item())


def assert_same(found, expected):
    """Losses, gradients and weights of every worker are those of one process."""
    for worker, (losses, gradients, weights) in enumerate(found):
        for i, (loss, wanted) in enumerate(zip(losses, expected[0], strict=True)):
            assert_near(loss, wanted, f"worker {worker}: loss of step {i}", GRADIENTS)
        for name, wanted in expected[1].items():
            what = f"worker {worker}: gradient of {name}"
            assert (gradients[name] is None) == (wanted is None), f"{what}: only one is None"
            if wanted is not None:
                assert_near(gradients[name], wanted, what, GRADIENTS)
        for name, wanted in expected[2].items():
            assert_near(weights[name], wanted, f"worker {worker}: {name}", 1e-8)


@settings(max_examples=settings.default.max_examples // 2)
@given(case=steps())
def test_a_shared_step_is_the_step_of_one_process(workers, case):
    shape, config, seed, text, how = case
    found = workers.run(train_together, shape, config, seed, text, how)
    assert_same(found, train_alone(config, seed, text))


def long_text(config, b=2, chunks=9, seed=0):
    """A ragged batch whose longest text has so many chunks, the last one cut short."""
    rng, n = np.random.default_rng(seed), chunks * config.memory.chunk_size - 1
    ids = rng.integers(0, VOCAB, (b, n))
    return ids, ids, [max(2, n * (b - i) // b) for i in range(b)], None


@pytest.mark.parametrize(("shape", "how"), [
    ((1, 1), {}),
    ((2, 1), {"recompute": "cells"}),
    ((3, 1), {}),
    ((4, 1), {"block": 3}),
    ((2, 2), {"block": 2, "recompute": "cells"}),
])  # fmt: skip
def test_weights_stay_those_of_one_process_over_steps(workers, make_config, shape, how):
    config = make_config()
    text = long_text(config)
    found = workers.run(train_together, shape, config, 0, text, how, 3)
    assert_same(found, train_alone(config, 0, text, 3))


@pytest.mark.parametrize("tied", [False, True])
def test_shards_are_those_of_the_whole(workers, make_config, tied):
    """`fully_shard` over the data: weights, gradients and what AdamW keeps are cut."""
    config = make_config({"tie_word_embeddings": tied})
    text = long_text(config)
    found = workers.run(train_together, (2, 2), config, 0, text, {}, 3, True)
    assert_same(found, train_alone(config, 0, text, 3))


def nothing_to_predict(mesh, config):
    ids = torch.zeros((1, 9), dtype=torch.int64)
    return Pipeline(random_model(config, 0), mesh).step(ids, torch.full_like(ids, IGNORE)).item()


def test_without_labels_the_loss_is_nan(workers, make_config):
    assert np.isnan(workers.run(nothing_to_predict, (2, 1), make_config())).all()


def accumulate(mesh, config, text):
    """Two steps, the second with half the model frozen; an evaluation between them."""
    model = random_model(config, 0)
    pipeline = Pipeline(model, mesh)
    loss = pipeline.step(**as_tensors(*text))
    before = numbers(model, lambda p: p.grad)
    evaluated = pipeline.evaluate(**as_tensors(*text))
    for name, p in named_parameters(model.weights.to_dict()).items():
        assert np.array_equal(before[name], p.grad.numpy()), "an evaluation leaves gradients alone"
        p.requires_grad_("memory" in name)
    pipeline.step(**as_tensors(*text))
    return loss.item(), evaluated.item(), before, numbers(model, lambda p: p.grad)


def test_gradients_add_up_and_frozen_weights_get_none(workers, make_config):
    text = long_text(make_config())
    expected = train_alone(make_config(), 0, text)
    for loss, evaluated, once, twice in workers.run(accumulate, (2, 1), make_config(), text):
        assert_near(loss, expected[0][0], "loss", GRADIENTS)
        assert_near(evaluated, loss, "evaluation", GRADIENTS)
        for name, gradient in once.items():
            factor = 1 + ("memory" in name)
            assert_near(twice[name], factor * gradient, f"gradient of {name}", GRADIENTS)


def bytes_saved(mesh, config):
    """Most that autograd keeps at a time, for texts of several lengths, with and without."""
    found = []
    for recompute in ("none", "cells"):
        pipeline = Pipeline(random_model(config, 0), mesh, recompute=recompute)
        for chunks in (8, 32):
            saved, text = Saved(), long_text(config, 1, chunks)
            with saved.hooks():
                pipeline.step(**as_tensors(*text))
            assert saved.now == 0, "kept after the step"
            found.append(saved.peak)
    return found


def test_cells_that_are_computed_again_keep_nothing_inside(workers, make_config):
    ((short, long, again_short, again_long),) = workers.run(bytes_saved, (1, 1), make_config())
    assert long > 3 * short
    assert again_short < short / 4
    # What embeddings keep is indices, a few bytes a slot.
    assert again_long < 1.5 * again_short


class Scaled(torch.nn.Module):
    """Something in a projection's place, with a weight of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = torch.nn.Parameter(torch.full((inner.out_features,), 0.5).double())

    def forward(self, x):
        return self.inner(x) * self.scale


def with_modules(config):
    """A model with such a module, and a list that a hook on its first layer fills."""
    model, calls = random_model(config, 0), []
    layers = model.weights["layers"]
    layers[1].k_proj = Scaled(layers[1].k_proj)
    layers[0].register_forward_hook(lambda *_: calls.append(1))
    return model, calls


def step_with_modules(mesh, config, text):
    model, calls = with_modules(config)
    Pipeline(model, mesh).step(**as_tensors(*text))
    return {name: whole(p.grad) for name, p in model.named_parameters()}, len(calls)


def test_modules_in_place_of_others_and_hooks_are_called(workers, make_config):
    """As `docs/modules.md` has it: a hook on a layer fires once a chunk."""
    text = long_text(make_config())
    model, calls = with_modules(make_config())
    model(logits="none", **as_tensors(*text)).loss.backward()
    found = workers.run(step_with_modules, (2, 1), make_config(), text)
    assert [number for _, number in found] == [5, 4]
    assert len(calls) == 9
    for gradients, _ in found:
        for name, p in model.named_parameters():
            assert_near(gradients[name], whole(p.grad), f"gradient of {name}", GRADIENTS)


def under_autocast(mesh, config, text):
    found = []
    for recompute in ("none", "cells"):
        model = random_model(config, 0, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            Pipeline(model, mesh, recompute=recompute).step(**as_tensors(*text))
        found.append(numbers(model, lambda p: p.grad))
    return found


def test_under_autocast_what_is_computed_again_has_its_gradients(workers, make_config):
    """A weight's cast that is kept from the pass without gradients would have none."""
    text = long_text(make_config())
    for kept, again in workers.run(under_autocast, (2, 1), make_config(), text):
        assert any(gradient.any() for gradient in kept.values())
        for name, gradient in kept.items():
            assert again[name] is not None, f"{name} has no gradient"
            error = np.abs(again[name] - gradient).max() / np.abs(gradient).max()
            assert_at_most(error, 4 * 2**-8, f"{name}: of the largest, in four roundings")


def disagree(mesh, config, text, own):
    """A step with something of this worker's own; then one without."""
    model = random_model(config, own.get("seed", 0))
    how = {"block": own.get("block", 1)}
    ids = as_tensors(*own.get("text", text))
    try:
        Pipeline(model, mesh, **how).step(**ids)
        return None
    except ValueError as error:
        return str(error)
    finally:
        Pipeline(random_model(config, 0), mesh).step(**as_tensors(*text))


@pytest.mark.parametrize(("own", "said"), [
    ({"text": "another"}, "another text, labels, lengths or chunk_sizes"),
    ({"text": "too large"}, "refused its arguments"),
    ({"seed": 1}, "another model: its weights"),
    ({"block": 2}, "another block or recompute"),
])  # fmt: skip
def test_workers_that_do_not_agree_all_say_so_and_can_go_on(workers, make_config, own, said):
    config = make_config()
    text = long_text(config)
    ids = text[0].copy()
    ids[0, 0] = VOCAB if own.get("text") == "too large" else (ids[0, 0] + 1) % VOCAB
    if "text" in own:
        own = {"text": (ids, *text[1:])}
    found = workers.run(disagree, (3, 1), config, text, Dealt([{}, own, {}]))
    assert all(found), "a worker noticed nothing"
    wanted = [said] * 3
    if said == "refused its arguments":
        wanted[1] = "ids range from"
        assert "worker 1 refused" in found[0]
    for message, words in zip(found, wanted, strict=True):
        assert words in message


def refuse(mesh, config):
    """What is said of wrong arguments, each in every process."""
    model, found = random_model(config, 0), []
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    with torch.device("meta"):
        on_meta = CoMeTModel(config)
    ids = torch.zeros((1, 5), dtype=torch.int64)
    pipeline = Pipeline(model, mesh)
    for wrong in (
        lambda: Pipeline(model.weights, mesh),
        lambda: Pipeline(model, 2),
        lambda: Pipeline(model, other),
        lambda: Pipeline(on_meta, mesh),
        lambda: Pipeline(model, mesh, block=0),
        lambda: Pipeline(model, mesh, recompute="yes"),
        lambda: Pipeline(model, mesh, timeout=0),
        lambda: pipeline.step(ids, None),
        lambda: pipeline.step(ids, ids[:, 1:]),
        lambda: pipeline.step(ids, ids, lengths=[6]),
        lambda: pipeline.step(ids, ids, chunk_sizes=[2, 2]),
        lambda: pipeline.evaluate(ids[:, :0], ids[:, :0]),
    ):
        try:
            found.append(wrong())
        except ValueError as error:
            found.append(str(error))
    pipeline.step(ids, ids)
    return found


def test_wrong_arguments_are_refused_and_nothing_waits(workers, make_config):
    wanted = [
        "model is a ParameterTree; expected a CoMeTModel",
        "mesh is a int; expected a DeviceMesh",
        "mesh has dimensions ('data',); expected ('pipeline', 'data'), or 'pipeline' alone",
        "model is on meta, the mesh is of cpu",
        "block is 0; expected an integer of at least 1",
        "recompute is 'yes'; expected 'none' or 'cells'",
        "timeout is 0; expected seconds, more than 0",
        "labels is a NoneType; expected a tensor like ids",
        "labels has shape (1, 4)",
        "lengths is [6]; expected 1 to 5 tokens each",
        "chunk_sizes is [2, 2], 4 tokens; expected sizes that add up to the text's 5",
        "ids has shape (1, 0)",
    ]
    for found in workers.run(refuse, (2, 1), make_config()):
        for message, words in zip(found, wanted, strict=True):
            assert words in str(message)


def sharded(model, mesh):
    """The model, cut over the data."""
    for layer in model.weights["layers"]:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model


def step_forever(rank, say, config, shape, shard, timeout):
    """Steps until a worker is lost."""
    mesh, model = mesh_of(shape), random_model(config, 0)
    pipeline = Pipeline(sharded(model, mesh) if shard else model, mesh, timeout=timeout)
    ids = torch.from_numpy(long_text(config)[0])
    while True:
        pipeline.step(ids, ids)
        say("a step")


@pytest.mark.parametrize(("shape", "shard"), [((3, 1), False), ((2, 2), False), ((2, 2), True)])
@pytest.mark.parametrize("seed", range(3))
def test_when_a_worker_is_killed_the_others_end_at_once(make_config, shape, shard, seed):
    """At a random moment of a step, and each says which process it was."""
    size, rng = shape[0] * shape[1], random.Random(f"{seed} {shape} {shard}")
    group = Group(size, step_forever, 60.0, make_config(), shape, shard, 60.0)
    killed = rng.randrange(size)
    try:
        for pipe in group.pipes:
            assert pipe.poll(60)
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(group.processes[killed].pid, signal.SIGKILL)
        others = [rank for rank in range(size) if rank != killed]
        answers = group.answers(SETTLE, others)
        assert sorted(answers) == others, "a worker hangs"
        for rank, (error, _) in answers.items():
            assert isinstance(error, WorkerLostError), f"process {rank}: {error!r}"
            assert f"process {killed} was lost" in str(error), f"process {rank}: {error}"
    finally:
        group.close()


def test_a_worker_that_does_not_answer_is_given_up_in_time(make_config):
    group = Group(3, step_forever, 60.0, make_config(), (3, 1), False, 1.0)
    try:
        for pipe in group.pipes:
            assert pipe.poll(60)
        os.kill(group.processes[1].pid, signal.SIGSTOP)
        answers = group.answers(1.0 + SETTLE, [0, 2])
        assert sorted(answers) == [0, 2], "a worker hangs"
        for rank, (error, seconds) in answers.items():
            assert isinstance(error, WorkerLostError), f"process {rank}: {error!r}"
            assert "of at most 1 s" in str(error)
            assert "process 1" in str(error), f"process {rank}: {error}"
            assert seconds > 0.5
    finally:
        group.close()


def come(rank, say, config):
    mesh = mesh_of((3, 1))
    say("met")
    return rank == 1 or Pipeline(random_model(config, 0), mesh, timeout=1.0)


def test_a_worker_that_never_comes_is_given_up_in_time(make_config):
    group = Group(3, come, 60.0, make_config())
    try:
        for pipe in group.pipes:
            assert pipe.poll(60)
        answers = group.answers(1.0 + SETTLE, [0, 1, 2])
        assert sorted(answers) == [0, 1, 2], "a worker hangs"
        for rank in (0, 2):
            error = answers[rank][0]
            assert isinstance(error, WorkerLostError), f"process {rank}: {error!r}"
            assert str(error).startswith("process 1 did not answer"), str(error)
            assert "a meeting with the others" in str(error)
    finally:
        group.close()


def part(rank, say):
    ring = Ring(mesh_of((2, 1)), 60.0)
    ring.add([torch.ones(3)])
    groups = [weakref.ref(group) for group in (ring._pipeline, *ring._wires.values())]
    say(len(groups))
    ring._leave()
    return [group() for group in groups]


def test_a_program_that_ends_first_ends_its_wires():
    """Their threads would abort a process that ends while they let go of a tensor."""
    group = Group(2, part, 60.0)
    try:
        answers = group.answers(60.0, [0, 1])
        assert [found for found, _ in answers.values()] == [[None] * 5] * 2
    finally:
        group.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_are_not_met_are_told_of(monkeypatch, rank):
    """The first one finds its port taken; another finds nobody behind it who knows of stores."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = "127.0.0.1", str(taken.getsockname()[1])
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        for name, value in zip(names, (str(rank), "2", *place), strict=True):
            monkeypatch.setenv(name, value)
        start, words = time.monotonic(), f"process {rank} of 2 did not meet the others at "
        with pytest.raises(ConnectionError, match=re.escape(f"{words}{':'.join(place)}: given up")):
            init_pipeline_mesh(2, timeout=1.0)
        assert time.monotonic() - start < 1.0 + SETTLE


def test_a_port_that_refuses_is_told_of(monkeypatch):
    for name, value in {
        "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"process 1 of 2 did not meet .* 127\.0\.0\.1:1: "):
        init_pipeline_mesh(2, timeout=1.0)
    assert time.monotonic() - start < 1.0 + SETTLE


def test_a_mesh_of_another_size_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"RANK, .* not set .* torchrun --nproc-per-node 4"):
        init_pipeline_mesh(2, 2)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    with pytest.raises(ValueError, match="there are 3 processes, but pipeline=2 x data=2 takes 4"):
        init_pipeline_mesh(2, 2)
    for arguments in ({"pipeline": 0}, {"pipeline": 1, "data": 0}, {"pipeline": 1, "timeout": 0}):
        with pytest.raises(ValueError, match="expected"):
            init_pipeline_mesh(**arguments)


@given(steps())
def test_every_chunk_is_dealt_once_and_memories_fit(case):
    (size, _), config, _, (ids, _, lengths, sizes), how = case
    chunks = plan_chunks(config, np.array(lengths), ids.shape[1], sizes)
    assert sum(chunk.row.take.sum() * len(ids) // len(chunk.row.take) for chunk in chunks) == sum(
        lengths
    )
    for before, after in zip(chunks[:-1], chunks[1:], strict=True):
        assert before.queue_after == after.queue_before
    blocks = deal(chunks, how["block"])
    assert [c.number for block in blocks for c in block] == list(range(len(chunks)))
    assert all(len(block) == how["block"] for block in blocks[:-1])


ROOT = Path(__file__).parent.parent


def test_the_program_of_the_page_runs_under_torchrun(tmp_path):
    """Two processes that meet at a port, as on any machine; one of them prints its loss."""
    page = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", page, re.MULTILINE)
    program = textwrap.dedent(next(block for block in blocks if "init_pipeline_mesh(" in block))
    (tmp_path / "train.py").write_text(program)
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    run = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert 0 < float(run.stdout) < np.log(256)
