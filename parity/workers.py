"""Processes on this machine that share training steps, by gloo: made once, for many examples."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

FORK = multiprocessing.get_context("fork")
"""So that a process starts at once, with the modules that are loaded, a seeded fault among them."""


def join(rank: int, size: int, store: Path, timeout: float) -> None:
    """Meet the other processes, by a file: no port is needed."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=timeout)
    place = f"file://{store}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size, timeout=limit)


def mesh_of(shape: tuple[int, int]) -> DeviceMesh:
    """A mesh: workers of a text, and groups of them. All processes make it, at the same time."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("pipeline", "data"))


def _serve(rank: int, size: int, store: Path, jobs: Connection) -> None:
    """Do jobs until there are no more, or the parent has gone."""
    parent = os.getppid()
    join(rank, size, store, 60.0)
    meshes: dict[tuple[int, int], DeviceMesh] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):
        while os.getppid() == parent:
            if not jobs.poll(0.5):
                continue
            function, shape, arguments = jobs.recv()
            try:
                if shape not in meshes:
                    meshes[shape] = mesh_of(shape)
                jobs.send((True, function(meshes[shape], *arguments)))
            except Exception as error:
                jobs.send((False, error))
    os._exit(0)


class Workers:
    """For each number of processes, so many that do jobs together, once there is one for them."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def run(
        self, function: Callable[..., Any], shape: tuple[int, int], *arguments: Any
    ) -> list[Any]:
        """What `function(mesh, *arguments)` returns in every process of a mesh, by rank.

        Args:
            function: of a module that was loaded before the processes were started.
            shape: of the mesh.
            arguments: the same for all, but for those that are `Dealt`.
        """
        size = shape[0] * shape[1]
        if size not in self._pools:
            self._pools[size] = _Pool(size)
        try:
            return self._pools[size].run(function, shape, arguments)
        except AssertionError:  # those that are left cannot go on
            self._pools.pop(size).close()
            raise

    def close(self) -> None:
        """End them."""
        for pool in self._pools.values():
            pool.close()


class _Pool:
    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], shape: tuple[int, int], arguments: Sequence[Any]
    ) -> list[Any]:
        for rank, pipe in enumerate(self._pipes):
            own = [x.of(rank) if isinstance(x, Dealt) else x for x in arguments]
            pipe.send((function, shape, own))
        found: dict[int, Any] = {}
        patience, failed = 60.0, None
        while len(found) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            ready = wait(list(waiting), patience)
            if not ready:
                break
            for pipe in ready:
                done, answer = pipe.recv()
                found[waiting[pipe]] = answer
                if not done and failed is None:  # the others may wait for this one
                    failed, patience = waiting[pipe], 1.0
        if failed is not None:
            raise AssertionError(f"process {failed}: {found[failed]!r}") from found[failed]
        assert len(found) == len(self._pipes), f"only {sorted(found)} answered: the others hang"
        return [found[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


class Dealt:
    """An argument of which every process gets its own."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    def of(self, rank: int) -> Any:
        """That of a process."""
        return self._parts[rank]


class Group:
    """Processes that are started for one thing, which some of them may not live to see."""

    def __init__(
        self, size: int, function: Callable[..., Any], timeout: float, *arguments: Any
    ) -> None:
        """Start them.

        Args:
            size: how many.
            function: called with the rank, something to say a word by, and the arguments, once the
                processes have met. What it returns or raises is their answer.
            timeout: of the process group, seconds.
        """
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = FORK.Pipe()
            arguments_of = (rank, size, store, timeout, theirs, function, arguments)
            process = FORK.Process(target=_do, args=arguments_of, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def answers(self, seconds: float, ranks: list[int]) -> dict[int, tuple[Any, float]]:
        """What processes answer, and after how many seconds, until so many have passed. Words said
        meanwhile are passed over.
        """
        start, found = time.monotonic(), {}
        open_pipes = {self.pipes[rank]: rank for rank in ranks}
        while open_pipes and (left := start + seconds - time.monotonic()) > 0:
            for pipe in wait(list(open_pipes), left):
                rank = open_pipes[pipe]
                try:
                    kind, answer = pipe.recv()
                except EOFError:
                    kind, answer = "answer", None
                if kind == "answer":
                    found[rank] = answer, time.monotonic() - start
                    del open_pipes[pipe]
        return found

    def close(self) -> None:
        """End those that are left."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _do(
    rank: int,
    size: int,
    store: Path,
    timeout: float,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    try:
        join(rank, size, store, timeout)
        answer = function(rank, lambda word: pipe.send(("word", word)), *arguments)
    except Exception as error:
        answer = error
    pipe.send(("answer", answer))
    os._exit(0)
