"""Ranks on this host: start them, watch them, end them together.

The processes find each other by a file, and talk through shared memory and over the
loopback interface.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FileStore, Store

from pipeproof.exec.allocator import keep_memory
from pipeproof.exec.beats import LOOKS, LOST_S, Silence
from pipeproof.exec.errors import RankError
from pipeproof.exec.failure import Failure, Record, failure_of, in_words
from pipeproof.exec.group import TIMEOUT_S, Ranks
from pipeproof.sched.errors import ParameterError, at_least_one

GRACE_S = 2.0
"""How long ranks have to end by themselves once one has failed."""
RankFunction = Callable[..., Any]


def launch(
    function: RankFunction,
    ranks: int,
    *arguments: Any,
    timeout_s: float = TIMEOUT_S,
    lost_s: float = LOST_S,
) -> list[Any]:
    """Call `function(ranks, *arguments)` in that many processes on this host.

    If one fails, is killed or stopped, all end, and none is left behind.

    Args:
        function: of a module that can be imported; its first argument is a `Ranks`.
        ranks: how many.
        arguments: for all of them; pickled.
        timeout_s: of the `Ranks`.
        lost_s: likewise.

    Returns:
        What each rank returned.

    Raises:
        RankError: naming the rank that failed first, and why.
    """
    at_least_one(ranks=ranks)
    with tempfile.TemporaryDirectory(prefix="pipeproof-") as folder:
        threads = max(1, torch.get_num_threads() // ranks)
        job = Job(str(Path(folder) / "store"), ranks, threads, timeout_s, lost_s)
        launcher = _Launcher(job, function, arguments)
        try:
            return launcher.run()
        finally:
            launcher.end()


@dataclass(frozen=True)
class Job:
    """What every rank of a launch must know.

    Attributes:
        path: of the file where they find each other.
        size: how many they are.
        threads: of each, for torch.
        timeout_s, lost_s: of the `Ranks`.
    """

    path: str
    size: int
    threads: int
    timeout_s: float
    lost_s: float

    def store(self) -> Store:
        """Where the ranks meet."""
        return FileStore(self.path)


class _Launcher:
    def __init__(
        self, job: Job, function: RankFunction, arguments: Sequence[Any]
    ) -> None:
        self._job = job
        store = job.store()
        self._record = Record(store)
        self._silence = Silence(store, range(job.size), job.lost_s)
        self._looked, self._look_s = time.monotonic(), job.lost_s / LOOKS
        self._results: dict[int, Any] = {}
        context = multiprocessing.get_context("spawn")
        self._ears: dict[int, Connection] = {}
        self._alive: dict[int, BaseProcess] = {}
        for rank in range(job.size):
            self._ears[rank], mouth = context.Pipe(duplex=False)
            self._alive[rank] = context.Process(
                target=_rank, args=(rank, job, mouth, function, arguments), daemon=True
            )
            self._alive[rank].start()
            mouth.close()

    def run(self) -> list[Any]:
        while self._alive:
            events = [process.sentinel for process in self._alive.values()]
            wait([*events, *self._ears.values()], self._look_s)
            self._hear()
            self._bury()
            self._listen()
            failure = self._record.read()
            if failure is not None:
                raise RankError(str(failure))
        return [self._results[rank] for rank in range(self._job.size)]

    def _hear(self) -> None:
        """Results, before their ranks can end: a pipe holds only so much."""
        for rank, ear in list(self._ears.items()):
            if ear.poll():
                try:
                    self._results[rank] = ear.recv()
                except EOFError:
                    ear.close()
                    del self._ears[rank]

    def _bury(self) -> None:
        """Say of the first that ended badly how it did, if it could not itself.

        Badly is also without an error and without what its function returns.
        """
        for rank, process in list(self._alive.items()):
            if not process.is_alive():
                del self._alive[rank]
                self._hear()  # what it said last
                if (status := process.exitcode) != 0 or rank not in self._results:
                    self._record.write(Failure(rank, _ended(status or 0)))

    def _listen(self) -> None:
        if time.monotonic() - self._looked < self._look_s:
            return
        self._looked = time.monotonic()
        self._silence.look()
        lost = self._silence.lost()
        if lost is not None and lost.rank in self._alive:
            self._record.write(lost)

    def end(self) -> None:
        """Leave no process behind."""
        deadline = time.monotonic() + GRACE_S
        for process in self._alive.values():
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self._alive.values():
            process.kill()
            process.join()
        for ear in self._ears.values():
            ear.close()


def _ended(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was ended by {signal.Signals(-status).name}"


def _rank(
    rank: int,
    job: Job,
    mouth: Connection,
    function: RankFunction,
    arguments: Sequence[Any],
) -> None:
    """A rank's process, from its start to its end."""
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    keep_memory()
    status = 1
    store = job.store()
    try:
        ranks = _joined(rank, job, store)
        mouth.send(function(ranks, *arguments))
        ranks.leave()
        status = 0
    except BaseException as error:
        if not isinstance(error, RankError):
            Record(store).write(failure_of(error, rank, "its own code"))
        ended = isinstance(error, RankError)  # which says of itself who it is
        said = str(error) if ended else f"rank {rank}: {in_words(error)}"
        sys.stderr.write(f"{said}\n")  # at once: others write too
    finally:
        # Threads and communicators may be waiting for ranks that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _joined(rank: int, job: Job, store: Store) -> Ranks:
    torch.set_num_threads(job.threads)
    for library in ("GLOO", "NCCL"):
        os.environ[f"{library}_SOCKET_IFNAME"] = _loopback()
    return Ranks(store, rank, job.size, timeout_s=job.timeout_s, lost_s=job.lost_s)


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if not names:
        raise ParameterError("ranks on one host need a loopback interface, lo or lo0")
    return names[0]


def _end_with_the_launcher() -> None:
    """A launcher that is killed cannot end its ranks."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(1)
