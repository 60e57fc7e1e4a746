"""A pool of ranks that wait for jobs: processes take long to start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from torch._C._distributed_c10d import PrefixStore

from pipeproof.exec.group import Ranks
from pipeproof.exec.launch import launch


def serve(
    ranks: Ranks, ears: Sequence[Connection], mouths: Sequence[Connection]
) -> None:
    """Do jobs until there is None; those for two are done by ranks 0 and 1."""
    two = (
        Ranks(PrefixStore("two", ranks.store), ranks.rank, 2)
        if ranks.rank < 2
        else None
    )
    while (task := ears[ranks.rank].recv()) is not None:
        function, job, size = task
        among = ranks if size == ranks.size else two
        done = None if among is None else function(among, job)
        mouths[ranks.rank].send(done)


Do = Callable[..., list[Any]]


@contextmanager
def pool(size: int = 4) -> Iterator[Do]:
    """Ranks that wait for jobs: processes take long to start."""
    context = get_context("spawn")
    asks, answers = (
        [context.Pipe(duplex=False) for _ in range(size)] for _ in range(2)
    )
    failures: list[BaseException] = []

    def work() -> None:
        try:
            launch(serve, size, [ear for ear, _ in asks], [say for _, say in answers])
        except BaseException as error:
            failures.append(error)
        finally:
            for _, mouth in answers:
                mouth.close()

    thread = threading.Thread(target=work)
    thread.start()

    def do(
        function: Callable[[Ranks, Any], Any], job: Any, among: int = size
    ) -> list[Any]:
        """What each of the ranks returns for a job."""
        for _, mouth in asks:
            mouth.send((function, job, among))
        try:
            return [ear.recv() for ear, _ in answers][:among]
        except EOFError:
            thread.join()
            raise failures[0] from None

    try:
        yield do
    finally:
        for _, mouth in asks:
            mouth.send(None)
        thread.join()
