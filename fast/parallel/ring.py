"""Messages between workers, on `torch.distributed`, and what is said when a worker is lost.

The workers of a text stand in a ring. Each has four wires: memories come from the worker before it
and go to the one after it, gradients go the other way. A wire is a process group of its own with two
members and one direction, so messages on it arrive in the order in which they were sent, whatever
the backend, and none waits for one of another wire.
"""

from __future__ import annotations

import atexit
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..inputs import check_choice, check_count, check_kind

__all__ = ["GRADIENTS", "MEMORIES", "Ring", "WorkerLostError", "init_pipeline_mesh"]

MEMORIES, GRADIENTS = "memories", "gradients"
"""What a wire carries."""

DIMENSIONS = ("pipeline", "data")
"""Names of a mesh's dimensions."""

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""What carries messages between devices of a type."""

BUCKET = 2**20
"""Numbers that are added up over workers at a time."""

IN_FLIGHT = 3
"""Such sums that are under way at a time: while one goes over the wire, the next is copied together.
Copies of all gradients at once would take as much memory as they."""

GRACE = 2.0
"""Seconds at most to find out who was lost first, once something is."""

PROBE = 1
"""Tag of a message that nobody sends; others have 0, and do not meet it."""

KEY = "fast.parallel/lost"
"""Of the process that was lost first, in the store of the process group."""


class WorkerLostError(RuntimeError):
    """A worker has ended, or did not answer in time. The process can do no more steps: end it, and
    start all of them again.
    """


def init_pipeline_mesh(
    pipeline: int, data: int = 1, *, device: str = "cpu", timeout: float = 600.0
) -> DeviceMesh:
    """Meet the other processes, as `torchrun` has started them, and lay them out.

    Args:
        pipeline: workers that share a text.
        data: groups of such workers, each with texts of its own.
        device: "cpu" (messages by gloo) or "cuda" (by NCCL; each process takes the GPU of its
            `LOCAL_RANK`).
        timeout: seconds that a process waits for the others, here and in collectives. For one that
            has gone again, gloo waits up to five times as long.

    Returns:
        A mesh of pipeline x data processes, with these names.

    Raises:
        ConnectionError: the others were not met in time, or the port is not to be had.
        ValueError: an argument does not fit, the number of processes is another, or `torchrun`'s
            variables are not there.
    """
    check_count("pipeline", pipeline, 1)
    check_count("data", data, 1)
    check_choice("device", device, tuple(BACKENDS))
    _check_timeout(timeout)
    if not dist.is_initialized():
        missing = [
            name
            for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            if name not in os.environ
        ]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} not set in the environment; start the program by "
                f"torchrun --nproc-per-node {pipeline * data} PROGRAM."
            )
        _check_world(int(os.environ["WORLD_SIZE"]), pipeline, data)
        _meet(device, timeout)
    _check_world(dist.get_world_size(), pipeline, data)
    return init_device_mesh(device, (pipeline, data), mesh_dim_names=DIMENSIONS)


def _check_timeout(timeout: float) -> None:
    """Raise ValueError unless it is a number of seconds."""
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout <= 10**7:
        raise ValueError(f"timeout is {timeout!r}; expected seconds, more than 0.")


def _check_world(size: int, pipeline: int, data: int) -> None:
    """Raise ValueError unless there are as many processes as the mesh takes."""
    if size != pipeline * data:
        raise ValueError(
            f"there are {size} processes, but pipeline={pipeline} x data={data} takes "
            f"{pipeline * data}; start as many: torchrun --nproc-per-node {pipeline * data} PROGRAM."
        )


def _meet(device: str, timeout: float) -> None:
    """Make the process group of all, or raise ConnectionError."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    start = time.monotonic()
    try:
        _knock(timeout)
        dist.init_process_group(BACKENDS[device], timeout=timedelta(seconds=timeout))
    except (OSError, RuntimeError, ValueError) as error:
        reason = _reason(error)
        raise ConnectionError(
            f"process {rank} of {size} did not meet the others at {place}: given up after "
            f"{time.monotonic() - start:.1f} s, timeout {timeout:g} s ({reason}). Are all started, "
            "with the same address, port and number of processes, and is the port free?"
        ) from error


def _knock(timeout: float) -> None:
    """Raise unless a store answers at the port, or this process is to keep it. PyTorch would wait
    without end for something else that takes connections there and says nothing.
    """
    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    found: list[Exception | None] = []

    def knock() -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            limit = timedelta(seconds=timeout)
            dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
            found.append(None)
        except (OSError, RuntimeError, ValueError) as error:
            found.append(error)

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(timeout + GRACE)
    if not found:
        raise TimeoutError("what listens there does not answer as a store")
    if found[0] is not None:
        raise found[0]


def _reason(error: BaseException) -> str:
    """The first sentence of an error, without the place in PyTorch's source that some begin with."""
    line = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip()).partition("\n")[0]
    return line.partition(". ")[0].rstrip(".")


class Ring:
    """This process's place among the workers of its text, and its wires."""

    def __init__(self, mesh: DeviceMesh, timeout: float) -> None:
        """Make the wires. All processes call this, at the same time.

        Args:
            mesh: of all processes, its dimensions "pipeline" and "data", or "pipeline" alone.
            timeout: seconds that a message or a sum is waited for.

        Raises:
            ValueError: an argument does not fit.
            WorkerLostError: a process did not come.
        """
        check_kind("mesh", mesh, DeviceMesh, "a DeviceMesh, such as init_pipeline_mesh makes")
        _check_timeout(timeout)
        if mesh.mesh_dim_names not in (DIMENSIONS, DIMENSIONS[:1]):
            raise ValueError(
                f"mesh has dimensions {mesh.mesh_dim_names}; expected {DIMENSIONS}, or 'pipeline' "
                "alone."
            )
        if mesh.size() != dist.get_world_size():
            raise ValueError(
                f"mesh has {mesh.size()} processes, though {dist.get_world_size()} were started; "
                "expected one that has all."
            )
        self.timeout, self._device_type = timeout, mesh.device_type
        ranks = mesh.mesh.view(mesh.size(0), -1)  # [pipeline, data]
        self.worker, column = (ranks == dist.get_rank()).nonzero()[0].tolist()
        self.workers, self._replicas = ranks[:, column].tolist(), ranks[self.worker].tolist()
        self._wires: dict[tuple[str, int, int], Any] = {}
        self._probes: list[Any] = []
        # Not the mesh's own groups, which wait for half an hour, whatever it was made with. All
        # processes make all groups, in one order, which is how PyTorch tells groups apart.
        self._pipeline, self._data = self._groups(ranks.T.tolist()), self._groups(ranks.tolist())
        size = len(self.workers)
        for here in range(size if size > 1 else 0):
            there = (here + 1) % size
            pairs = ranks[[here, there]].T.tolist()
            for kind, way in ((MEMORIES, (here, there)), (GRADIENTS, (there, here))):
                wire = self._groups(pairs)
                if wire is not None:
                    self._wires[kind, *way] = wire
        self._sent: deque[list[tuple[Any, Tensor, int]]] = deque([[]])
        self._own: dict[str, deque[Tensor]] = {MEMORIES: deque(), GRADIENTS: deque()}
        atexit.register(self._leave)

    def _leave(self) -> None:
        """End the process group and the wires, whose threads end with them. A thread that lets go of
        a tensor when the interpreter is already ending aborts the process.
        """
        if dist.is_initialized():
            dist.destroy_process_group()
        self._pipeline = self._data = None
        self._wires.clear()
        self._sent.clear()

    def _groups(self, many: list[list[int]]) -> Any:
        """Make process groups; this process's own, or None where it is alone or in none."""
        own = None
        for ranks in many if len(many[0]) > 1 else ():
            with self.watch(None, "a meeting with"):
                group = dist.new_group(ranks, timeout=timedelta(seconds=self.timeout))
            own = group if dist.get_rank() in ranks else own
        return own

    def _neighbour(self, kind: str, step: int) -> int:
        """The worker a step down the way that a kind of message goes; -1 is where it comes from."""
        return (self.worker + (step if kind == MEMORIES else -step)) % len(self.workers)

    def send(self, kind: str, message: Tensor) -> None:
        """Send to the worker that follows (memories) or comes before (gradients), without waiting.

        Args:
            kind: `MEMORIES` or `GRADIENTS`.
            message: [n], which nobody writes to from now on.
        """
        there = self._neighbour(kind, 1)
        if there == self.worker:
            self._own[kind].append(message)
            return
        with self.watch(there, f"{kind} for"):
            wire = self._wires[kind, self.worker, there]
            work = dist.isend(message, self.workers[there], group=wire)
        self._sent[-1].append((work, message, there))

    def receive(self, kind: str, message: Tensor) -> Callable[[], Tensor]:
        """Begin to receive what the worker on the other side sends.

        Args:
            kind: as in `send`.
            message: [n] to write to.

        Returns:
            A function that waits, and returns the message.
        """
        here = self._neighbour(kind, -1)
        if here == self.worker:
            return self._own[kind].popleft
        with self.watch(here, f"{kind} of"):
            wire = self._wires[kind, here, self.worker]
            work: Any = dist.irecv(message, self.workers[here], group=wire)

        def wait() -> Tensor:
            with self.watch(here, f"{kind} of"):
                work.wait()
            return message

        return wait

    def settle(self, blocks: int) -> None:
        """Wait until what was sent has gone, and let go of it, but for the last so many blocks.

        Called once a block: a message of the block before the last has been received by then, or
        the ring has stopped.
        """
        self._sent.append([])
        while len(self._sent) > blocks + 1:
            for work, _, there in self._sent.popleft():
                with self.watch(there, "a message for"):
                    work.wait()

    def gather(self, numbers: Sequence[int]) -> Tensor:
        """Everybody's numbers, [data, pipeline, n] int64 on the host: who agrees with whom.

        Args:
            numbers: n of this process.
        """
        own = torch.tensor(numbers, dtype=torch.int64, device=self._device())
        line = self._all(self._pipeline, len(self.workers), own)
        return self._all(self._data, len(self._replicas), line).cpu()

    def _device(self) -> str:
        """Where numbers have to be for a message."""
        on_gpu = self._device_type == "cuda"
        return f"cuda:{torch.cuda.current_device()}" if on_gpu else self._device_type

    def _all(self, group: Any, size: int, x: Tensor) -> Tensor:
        """[size, ...], everybody's x."""
        if group is None:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(size)]
        with self.watch(None, "a sum with"):
            dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    def add(self, tensors: Sequence[Tensor], *, data: bool = True) -> None:
        """Replace tensors by their sums over the workers, in place.

        Args:
            tensors: contiguous ones of the same shapes in every process.
            data: whether sums are over "data" too.
        """
        for group in (self._pipeline, self._data if data else None):
            under_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()
            for bucket in _buckets(tensors) if group is not None else ():
                if len(under_way) == IN_FLIGHT:
                    self._finish(*under_way.popleft())
                whole = torch.cat([x.detach().reshape(-1) for x in bucket])
                with self.watch(None, "a sum with"):
                    work = dist.all_reduce(whole, group=group, async_op=True)
                under_way.append((bucket, whole, work))
            while under_way:
                self._finish(*under_way.popleft())

    def _finish(self, bucket: list[Tensor], whole: Tensor, work: Any) -> None:
        """Wait for a sum, and write it where it belongs."""
        with self.watch(None, "a sum with"):
            work.wait()
        for x, part in zip(bucket, whole.split([x.numel() for x in bucket]), strict=True):
            x.detach().copy_(part.view_as(x))

    @contextmanager
    def watch(self, worker: int | None, what: str) -> Iterator[None]:
        """Turn what `torch.distributed` raises into an error that says who was lost.

        Args:
            worker: at the other end; None is any of them.
            what: was waited for, in words that a worker follows.
        """
        start = time.monotonic()
        try:
            yield
        except (RuntimeError, ValueError) as error:
            told = self._tell(worker, what, time.monotonic() - start, _reason(error))
            raise WorkerLostError(told) from error

    def _tell(self, worker: int | None, what: str, seconds: float, reason: str) -> str:
        """What has happened, in a sentence, once it is asked for who was lost first."""
        rank = None if worker is None else self.workers[worker]
        is_late = re.search("timed? ?out", reason, re.IGNORECASE) is not None
        first, has_ended = self._first_lost(rank, is_late)
        if first:
            names = ", ".join(map(str, first))
            lost = f"process {names} {'was lost' if has_ended else 'did not answer'}"
        elif rank is not None:
            lost = f"process {rank} was lost, or the one that keeps the store (it does not answer)"
        else:
            lost = "a process was lost, or the one that keeps the store (it does not answer)"
        who = "the others" if rank is None else f"worker {worker}"
        return (
            f"{lost}: worker {self.worker} (process {dist.get_rank()}) waited for {what} {who} for "
            f"{seconds:.1f} s of at most {self.timeout:g} s ({reason}). This process can do no more "
            "steps: end all, and start them again from the last checkpoint."
        )

    def _first_lost(self, rank: int | None, is_late: bool) -> tuple[list[int], bool]:
        """The process that was lost first, or those that may be; from now on the store knows.

        Where a worker ends because it lost another, those beside it lose it in turn: the first one
        to say so is right. A sum fails without a name: who stands beside the lost one says it. And
        what does not come in time may be waited for itself. Then, if none has ended, it is one that
        does not say that it is here.

        Args:
            rank: the process that this one takes for lost, or None.
            is_late: it may be there, and did not answer in time.

        Returns:
            The processes; whether they have ended, as far as is known.
        """
        found: list[tuple[list[int], bool]] = []
        end = time.monotonic() + GRACE / 2

        def agree(store: Any, ranks: list[int], has_ended: bool) -> None:
            """Tell the others, unless one of them was first: then it is right."""
            words = ["lost" if has_ended else "late", *map(str, ranks)]
            first, *names = store.compare_set(KEY, "", " ".join(words)).decode().split()
            found.append(([int(name) for name in names], first == "lost"))

        def ask() -> None:
            store, known = dist.distributed_c10d._get_default_store(), None if is_late else rank
            store.set(f"{KEY}/{dist.get_rank()}", "is here")
            while not found and time.monotonic() < end:
                known = self._broken(but=rank) if known is None else known
                if known is not None or store.check([KEY]):
                    agree(store, [] if known is None else [known], True)
                time.sleep(0.02)
            if not found:
                others = range(dist.get_world_size())
                silent = [r for r in others if not store.check([f"{KEY}/{r}"])]
                if not silent and rank is not None:
                    silent = [rank]
                if silent:
                    agree(store, silent, not is_late)

        def try_to() -> None:
            try:
                ask()
            except (RuntimeError, ValueError):  # the process that kept the store is gone too
                known = self._broken(but=rank) if is_late or rank is None else None
                found.extend([] if known is None else [([known], True)])

        # Beside this thread, since a store whose keeper has stopped would be waited for without end.
        asking = threading.Thread(target=try_to, daemon=True)
        asking.start()
        asking.join(GRACE)
        return found[0] if found else ([], True)

    def _broken(self, but: int | None) -> int | None:
        """The process at the other end of a wire that is broken, if one is: gloo knows, and says so
        when a message is asked for, here one that nobody sends. It breaks wires itself on which
        something was waited for too long, as those of `but` may have been.
        """
        for (_, here, there), wire in self._wires.items():
            if there == self.worker and self.workers[here] != but:
                nothing = torch.empty(1, device=self._device())
                try:
                    probe = dist.irecv(nothing, self.workers[here], group=wire, tag=PROBE)
                    self._probes.append((nothing, probe))
                except RuntimeError:
                    return self.workers[here]
        return None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype each, of `BUCKET` numbers together, or one larger tensor."""
    bucket: list[Tensor] = []
    for x in tensors:
        full = sum(y.numel() for y in bucket) + x.numel() > BUCKET
        if bucket and (full or x.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(x)
    if bucket:
        yield bucket
