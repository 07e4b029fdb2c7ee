"""The loop around a task: optimizer, learning rates, checkpoints, metrics.

A run is known by its settings and by three numbers: the step of the optimizer, the number of the
batch of texts, and the seed. What a batch is, and what is drawn while it is read, follows from the
seed and its number alone. So a run that was killed goes on from its newest checkpoint to the same
weights, to the bit, as one that was not, on one machine with one number of threads.

Started by `torchrun`, every process holds the model, draws the same batch, and reads its own texts of
it; gradients are added up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from reference.config import CoMeTConfig, MemoryConfig
from reference.parameters import named_parameters

from ..arrays import shown
from ..baselines import Baseline, BaselineConfig, is_baseline
from ..checkpoints import of_file, read_training, write_training
from ..files import atomic_write
from ..model import CoMeTModel
from ..pretrained.memories import memory_names
from ..pretrained.text import TokenText
from .settings import Settings, fit

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Processes", "Task", "Trainer", "build_model", "trained_weights"]

FREE = ("save_every", "keep", "evaluate_every", "recompute")
"""Settings with which a run may go on otherwise than it began: they change no weight."""


@dataclass(frozen=True)
class Processes:
    """Who shares the work."""

    rank: int = 0
    """This process's number. The first one writes the files."""

    group: int = 0
    """Its group's number. A group has texts of its own."""

    number: int = 1
    """How many groups there are."""

    mesh: DeviceMesh | None = None
    """Of groups of several processes, which share each text; None: a group is one process."""

    @classmethod
    @contextlib.contextmanager
    def joined(cls, settings: Settings) -> Iterator[Processes]:
        """Those that `torchrun` has started, joined as long as the block lasts; else one alone.

        Raises:
            ConnectionError: the others were not met, or one was lost.
            ValueError: they are too few, or cannot be put into groups of `settings.pipeline`.
        """
        if not dist.is_torchelastic_launched():
            if settings.pipeline > 1:
                raise ValueError(
                    f"pipeline is {settings.pipeline}, and this is one process; start as many by "
                    f"torchrun --nproc-per-node {settings.pipeline} -m fast train ..."
                )
            yield cls()
            return
        from ..parallel import WorkerLostError, init_pipeline_mesh  # which take half a second

        on_gpu = settings.device is None and torch.cuda.is_available()
        size = int(os.environ["WORLD_SIZE"])
        mesh = init_pipeline_mesh(
            settings.pipeline,
            max(size // settings.pipeline, 1),
            device="cuda" if on_gpu else (settings.device or "cpu").partition(":")[0],
        )
        group = mesh.get_local_rank("data")
        try:
            share = mesh if settings.pipeline > 1 else None
            yield cls(dist.get_rank(), group, size // settings.pipeline, share)
        except WorkerLostError as error:
            raise ConnectionError(str(error)) from error
        finally:
            dist.destroy_process_group()

    def rows(self, batch_size: int) -> slice:
        """This group's texts of a batch."""
        return slice(self.group, batch_size, self.number)


class Task:
    """What a model is trained on: a class of this one has a `read` of its own.

    Args:
        settings: of the run.
        model: that is trained.
        processes: who shares the texts of a batch.
    """

    options_class: ClassVar[type]
    """A dataclass of the task's options."""

    shares_texts: ClassVar[bool] = False
    """Whether several processes may share a text, by a `Pipeline`."""

    def __init__(self, settings: Settings, model: CoMeTModel, processes: Processes) -> None:
        if settings.batch_size < processes.number:
            raise ValueError(
                f"batch_size is {settings.batch_size}; {processes.number} processes need a text each."
            )
        if processes.mesh is not None and not self.shares_texts:
            raise ValueError(
                f"pipeline is {settings.pipeline}; the task {settings.task} cannot share a text among "
                "processes. Set it to 1, and each reads texts of its own."
            )
        self.settings, self.model, self.processes = settings, model, processes
        self.told: dict[str, float] = {}  # of the newest step, beside its loss
        self.words: Any = None  # what makes tokens, see `open_text`, where the task reads text
        steps = np.cumsum([0, *(phase.steps for phase in settings.phases[:-1])])
        self.phases = [self.options_at(int(step)) for step in steps]  # before anything is computed

    def options_at(self, step: int) -> Any:
        """The options at a step of the run."""
        return fit(self.options_class, self.settings.options_at(step), "options")

    def start(self) -> None:
        """Change a fresh model's weights before its first step, as the task wants them."""

    def read(
        self, number: int, rng: np.random.Generator, options: Any
    ) -> Iterator[Iterable[Tensor]]:
        """Read a batch of texts: one item for each step of the optimizer, after which the weights
        have moved.

        An item is losses, scalars; they add up to the step's over all processes, and so do their
        gradients. The gradient of each is taken before the next one is asked for; one without a
        graph has left its gradients already, those of all processes.

        Args:
            number: of the batch.
            rng: source of all that is drawn for it, PyTorch's own excepted, which has been seeded.
            options: the task's own, at this step.
        """
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Numbers on what is held out; empty where nothing is."""
        return {}


def build_model(settings: Settings) -> Any:
    """The model that a run starts from, a `CoMeTModel` or a `Baseline`.

    Raises:
        ValueError: nothing is said of it, or a file does not fit.
    """
    device = settings.device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if settings.model is not None:
        if is_baseline(settings.model):
            return Baseline.from_pretrained(settings.model).to(device)
        return CoMeTModel.from_pretrained(settings.model, device=device)
    if settings.backbone is not None:
        memory = fit(MemoryConfig, settings.memory, "memory")
        return CoMeTModel.from_backbone(
            settings.backbone, memory, device=device, seed=settings.seed
        )
    if settings.config is None:
        raise ValueError(
            "the settings name no model; give a checkpoint (model), a pretrained model (backbone), or "
            "the sizes of a fresh one (config)."
        )
    config = CoMeTConfig.from_dict(settings.config)
    if settings.baseline is not None:
        sizes = {"backbone": config.backbone, "chunk_size": config.memory.chunk_size}
        own = fit(BaselineConfig, settings.baseline | sizes, "baseline")
        return Baseline(own, seed=settings.seed).to(device)
    return CoMeTModel(config, seed=settings.seed, device=device)


def trained_weights(model: Any, settings: Settings) -> dict[str, Tensor]:
    """The weights that move, by the reference's names; the others are told to take no gradient."""
    weights: dict[str, Tensor] = named_parameters(model.weights.to_dict())
    own = set(memory_names(model.config)) if settings.train == "memories" else set(weights)
    model.requires_grad_(False)
    trained = {name: p for name, p in weights.items() if name in own}
    for p in trained.values():
        p.requires_grad_(True)
    return trained


class Trainer:
    """Trains a model on a task; `run` goes on from the folder's newest checkpoint, if it has one.

    Args:
        task: with its model and settings.
        folder: of the run.

    Raises:
        ValueError: a checkpoint in the folder is of another run, or is not readable.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.settings, self.model, self.processes = task.settings, task.model, task.processes
        self.trained = trained_weights(self.model, self.settings)
        self.step = self.texts = 0
        self.board: Any = None  # of TensorBoard, while a run goes
        self._new_optimizer()
        if not self._load() and self.settings.config is not None:
            task.start()

    @property
    def metrics(self) -> Path:
        """The file of the metrics: one line of JSON a step."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoints that are kept, the newest last."""
        return sorted(self.folder.glob("step-*.safetensors"))

    @property
    def result(self) -> Path:
        """Where the trained weights are written: a model's folder, or a file of memories."""
        only_memories = self.settings.train == "memories"
        return self.folder / ("memories.safetensors" if only_memories else "model")

    def _new_optimizer(self) -> None:
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, p in self.trained.items():
            groups.setdefault(("memory" in name, p.dim() > 1), []).append(p)
        settings = self.settings
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "weight_decay": settings.weight_decay if is_matrix else 0.0,
                    "times": settings.memory_rate if of_memory else 1.0,
                }
                for (of_memory, is_matrix), parameters in groups.items()
            ],
            lr=0.0,
            betas=settings.betas,
        )

    def _own(self) -> dict[str, Any]:
        """What a run is known by, fit for JSON."""
        settings = dataclasses.asdict(self.settings)
        settings = {name: value for name, value in settings.items() if name not in FREE}
        known = {"config": self.model.config.to_dict(), "settings": settings}
        return json.loads(json.dumps(known))

    def _load(self) -> bool:
        """Go on from the newest checkpoint; whether there is one."""
        if not self.checkpoints:
            return False
        path = self.checkpoints[-1]
        run, tensors = read_training(path)
        if not {"config", "settings", "step", "texts"} <= set(run):
            raise ValueError(f"{path} is not of a trainer's run; give another folder.")
        with of_file(path):  # it may be from before a field of the config came
            run["config"] = type(self.model.config).from_dict(run["config"]).to_dict()
        for name in FREE:
            run["settings"].pop(name, None)
        for name, value in self._own().items():
            if run[name] != value:
                found = run[name]
                other = [key for key in value if found.get(key) != value[key]]
                raise ValueError(
                    f"{path} is of a run of other {name} ({', '.join(other)}: "
                    f"{shown(found.get(other[0]))}); give an empty folder, or what it was started "
                    "with."
                )
        state = self.optimizer.state_dict()
        expected = {f"weights.{name}": tuple(p.shape) for name, p in self.trained.items()}
        found = {name: tuple(x.shape) for name, x in tensors.items() if name.startswith("weights.")}
        if found != expected:
            raise ValueError(f"{path} holds other weights than the model; give another folder.")
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(tensors[f"weights.{name}"])
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                number, _, key = rest.partition(".")
                state["state"].setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict(state)
        self.step, self.texts = run["step"], run["texts"]
        return True

    def save(self) -> None:
        """Write the weights as they are, and a checkpoint; drop the oldest beyond `keep`. At the end of
        the run what is written are the weights that it ends with.
        """
        if self.processes.rank:
            return
        tensors = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        if self.settings.start_share and self.step == self.settings.steps:
            tensors = {name: p.clone() for name, p in tensors.items()}
            self._mix_start()
        if self.settings.train == "memories":
            self.model.save_memories(self.result)
        else:
            self.model.save_pretrained(self.result)
            if isinstance(self.task.words, TokenText):  # so that `read` takes the folder as it is
                self.task.words.tokenizer.save_pretrained(self.result)
        for number, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": x for key, x in entries.items()}
        run = {**self._own(), "step": self.step, "texts": self.texts}
        write_training(self.folder / f"step-{self.step:09d}.safetensors", tensors, run)
        for old in self.checkpoints[: -self.settings.keep]:
            old.unlink()

    @torch.no_grad()
    def _mix_start(self) -> None:
        """Put the share of the weights that the run started from into the model."""
        start: dict[str, Tensor] = named_parameters(build_model(self.settings).weights.to_dict())
        for name, p in self.trained.items():
            p.lerp_(start[name], self.settings.start_share)

    def run(self) -> None:
        """Train to the end of the settings.

        Raises:
            FloatingPointError: a loss is not a finite number.
            OSError: a file cannot be written.
        """
        from tqdm import tqdm  # of the extra `commands`

        steps, saved = self.settings.steps, self.step
        if not self.processes.rank:
            self._cut_metrics()
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1)
        bar = tqdm(
            total=steps,
            initial=self.step,
            unit="step",
            smoothing=0.05,
            disable=self.processes.rank > 0,
        )
        with bar:
            while self.step < steps:
                for told in self._read_texts():
                    bar.update(1)
                    bar.set_postfix(loss=f"{told['loss']:.3f}")
                    if self.step == steps:
                        break
                self.texts += 1
                if self.step - saved >= self.settings.save_every or self.step == steps:
                    self.save()
                    saved = self.step
        if self.board is not None:
            self.board.close()

    def _read_texts(self) -> Iterator[dict[str, float]]:
        """One batch of texts; yields what each step of the optimizer is told by."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, self.texts])
        torch.manual_seed(int(rng.integers(2**31)))
        options = self.task.options_at(self.step)
        autocast = torch.autocast(self.model.device.type, torch.bfloat16, enabled=settings.autocast)
        with autocast:
            begun = time.perf_counter()
            for losses in self.task.read(self.texts, rng, options):
                total = 0.0
                for loss in losses:
                    if loss.requires_grad:
                        loss.backward()
                    total += loss.item()
                found = {"step": self.step + 1, **self._move(total), **self.task.told}
                found["seconds"] = time.perf_counter() - begun
                self._tell(found)
                yield found
                begun = time.perf_counter()

    def _move(self, loss: float) -> dict[str, float]:
        """Move the weights by the gradients that have added up.

        Returns:
            The loss, the learning rate, and the norm of the gradient before it was scaled down.
        """
        if self.processes.number > 1 and self.processes.mesh is None:
            loss = self._add_up(loss)
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.step + 1} is {loss}; go on from a checkpoint with a lower "
                "learning rate, or in float32."
            )
        phase, step = self.settings.phase_at(self.step)
        if step == 0 and phase.fresh_optimizer:
            self._new_optimizer()
        rate = phase.rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.settings.clip)
        if norm.isfinite():  # else the step is left out
            self.optimizer.step()
        self.optimizer.zero_grad()
        torch.clear_autocast_cache()
        self.step += 1
        return {"loss": loss, "learning_rate": rate, "gradient_norm": norm.item()}

    def _add_up(self, loss: float) -> float:
        """Add up gradients and the loss over the processes."""
        for p in self.trained.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)
        total = torch.tensor(loss, device=self.model.device)
        dist.all_reduce(total)
        return total.item()

    def _tell(self, found: dict[str, float]) -> None:
        every = self.settings.evaluate_every
        if every and self.step % every == 0:
            found |= {f"held_out_{name}": value for name, value in self.task.evaluate().items()}
        if not self.processes.rank:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            if self.board is not None:
                for name in set(found) - {"step"}:
                    self.board.add_scalar(name, found[name], self.step)

    def read_metrics(self) -> list[dict[str, float]]:
        """What the metrics tell of every step so far; a line that was not finished is left out."""
        if not self.metrics.exists():
            return []
        found = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def _cut_metrics(self) -> None:
        """Take out what was told after the checkpoint that the run goes on from."""
        kept = [json.dumps(told) for told in self.read_metrics() if told["step"] <= self.step]
        atomic_write(self.metrics, "".join(f"{line}\n" for line in kept))
