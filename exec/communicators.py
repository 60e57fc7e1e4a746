"""torch's communicators as wires: gloo between CPUs, NCCL between GPUs.

gloo's waits can be neither polled nor given up, but for this: a communicator on which
any wait runs out of time closes its links, and all its waits fail. So who needs a
tensor waits for it in gloo itself, which costs no change of threads, and the thread
that beats ends such a wait when a rank has failed. What nobody waits for, or not yet,
is followed by a thread of the wire, if it matters when it is done.

NCCL's waits only order the device's stream and return.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Backend, ProcessGroupGloo, Store

from pipeproof.exec.wires import CPU, POLL_S, Check

NEVER = timedelta(days=365)
"""Deadlines are the ranks', who know why they wait; a communicator has none."""
AT_ONCE = timedelta(milliseconds=1)
NO_TAG = 99
"""Of messages that never come."""


def gloo(store: Store, rank: int, size: int, timeout: timedelta) -> Backend:
    """A gloo communicator.

    All of a process share one thread that serves their sockets: see `_devices`. With
    one for each, as torch makes them, these would compete for the op's core.

    Args:
        store: where its ranks meet, theirs alone.
        rank: this one's place.
        size: how many.
        timeout: for them to come, and of collectives.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = _devices(os.environ.get("GLOO_SOCKET_IFNAME", ""))
    options._threads, options._timeout = 2, timeout
    made: Backend = ProcessGroupGloo(store, rank, size, options)
    return made


@cache
def _devices(interfaces: str) -> list[Any]:
    """Of gloo, as torch chooses them.

    A device's thread spins while another thread holds the lock of a link that has news
    for it, and one that sends holds it. The kernel likes to let the thread that it
    wakes by that run in the sender's place, at once and on its core: then the threads
    of two ranks may each spin for as long as they are let, for locks that are held by
    senders which they keep from running. So they are made not to run in anybody's
    place; `_letting_run` is when they have their turn instead. A process that is bound
    to one core has them as they are: there, what is under way would wait for the op
    that runs.
    """
    with _patient():
        named = [
            ProcessGroupGloo.create_device(interface=x)
            for x in interfaces.split(",")
            if x
        ]
        return named or [ProcessGroupGloo.create_default_device()]


@contextmanager
def _patient() -> Iterator[None]:
    """Threads started meanwhile run in no other's place when they wake (Linux)."""
    # They inherit it. It is no lower priority: only what they preempt is different.
    usual = (
        sys.platform == "linux"
        and os.sched_getscheduler(0) == os.SCHED_OTHER
        and len(os.sched_getaffinity(0)) > 1
    )
    try:
        if usual:
            _scheduled_as(os.SCHED_BATCH)
        yield
    finally:
        if usual:
            _scheduled_as(os.SCHED_OTHER)


def _scheduled_as(policy: int) -> None:
    """This thread, from now on."""
    with suppress(PermissionError):  # a sandbox may forbid it
        os.sched_setscheduler(0, policy, os.sched_param(0))


def _letting_run(start: Callable[..., Any]) -> Callable[..., Any]:
    """One of torch's functions, around which threads run that wait for this core.

    A thread that is due for the core of one that computes gets it when that next enters
    the kernel: if this is to send, with a link's lock held, gloo's thread spins for its
    whole turn, milliseconds. So it has its turn before, when nothing is held; and
    after, when the send may have put on this core what it woke up at the other end.
    """
    if not hasattr(os, "sched_yield"):
        return start
    let_run = os.sched_yield

    def started(*arguments: Any) -> Any:
        let_run()
        work = start(*arguments)
        let_run()
        return work

    return started


class Transfer:
    """A tensor under way, by one of torch's functions for it: a `Pending`.

    Args:
        tensor: held as long as its memory is read or written.
        wire: that it goes by.
        function: of torch's.

    Attributes:
        tensor, wire, ended, error: as of a `Pending`.
    """

    __slots__ = ("_followed", "_work", "ended", "error", "tensor", "wire")

    def __init__(self, tensor: Tensor, wire: TorchWire, function: Any) -> None:
        self.tensor: Tensor | None = tensor
        self.wire = wire
        self.ended = 0.0
        self.error: Exception | None = None
        self._work: Any = None
        self._followed: threading.Event | None = None
        try:
            self._work = function([tensor], wire.place, wire.tag)
        except RuntimeError as error:  # the link is broken already
            self.error = error

    def wait(self, check: Check) -> None:
        """As `Pending.wait`; in gloo itself, unless a thread does so."""
        if self._followed is not None:
            while not self._followed.wait(POLL_S):
                check()
            return
        self.finish()
        if self.wire.blocks:
            self.ended = perf_counter()

    def finish(self) -> None:
        """Wait for it, without a deadline."""
        work, self._work = self._work, None
        if work is None:
            return
        try:
            # NCCL's waits hold up the host if they are given a deadline.
            work.wait(NEVER) if self.wire.blocks else work.wait()
        except RuntimeError as error:
            self.error = error

    def follow(self) -> None:
        """As `Pending.follow`: by a thread of the wire, where waits block."""
        if self.wire.blocks and self.error is None and self._followed is None:
            self._followed = threading.Event()
            self.wire.serve(self)

    def done(self) -> None:
        """It is, and whoever follows it knows."""
        assert self._followed is not None
        self.ended = perf_counter()
        self._followed.set()

    def entrust(self) -> bool:
        """As `Pending.entrust`.

        NCCL's waits order the stream of the thread that calls them, and not one
        beside; but it can be asked.
        """
        if self.wire.blocks:
            self.follow()
        elif self._work is None or self._work.is_completed():
            self.finish()
        else:
            return False
        return True

    def let_go(self) -> None:
        """As `Pending.let_go`."""
        if self.wire.blocks:
            self._work = None
        else:  # NCCL's wait has the device's stream know, too
            self.finish()


class TorchWire:
    """One direction of one communicator: an `Outgoing` or an `Incoming`.

    Args:
        group: the communicator.
        place: of the other end in it.
        peer: its rank.
        blocks: whether waits block, as gloo's do.
        tag: tells wires of one communicator apart, which only gloo can do.

    Attributes:
        place, peer, blocks, tag: as given.
    """

    def __init__(
        self, group: Backend, place: int, peer: int, blocks: bool, tag: int = 0
    ) -> None:
        self.place, self.tag = place, tag
        self.peer, self.blocks = peer, blocks
        send, recv = group.send, group.recv  # type: ignore[attr-defined]
        self._send = _letting_run(send) if blocks else send
        self._recv = _letting_run(recv) if blocks else recv
        self._queue: SimpleQueue[Transfer | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, tensor: Tensor, *, followed: bool = True) -> Transfer:
        """As `Outgoing.send`."""
        return self._started(tensor, self._send, followed)

    def receive(self, tensor: Tensor, *, followed: bool = False) -> Transfer:
        """As `Incoming.receive`."""
        return self._started(tensor, self._recv, followed)

    def _started(self, tensor: Tensor, function: Any, followed: bool) -> Transfer:
        transfer = Transfer(tensor, self, function)
        if followed:
            transfer.follow()
        return transfer

    def serve(self, transfer: Transfer) -> None:
        """Have this wire's thread wait for it, and let go of it then."""
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._queue,))
            self._thread.daemon = True
            self._thread.start()
        self._queue.put(transfer)

    def interrupt(self) -> None:
        """Have all waits on the communicator fail, now and ever after."""
        if self.blocks:
            with suppress(RuntimeError):
                never = self._recv([torch.empty(1, device=CPU)], self.place, NO_TAG)
                never.wait(AT_ONCE)

    def close(self, timeout_s: float) -> None:
        """As `Wire.close`."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)


def _serve(queue: SimpleQueue[Transfer | None]) -> None:
    while (transfer := queue.get()) is not None:
        transfer.finish()
        transfer.done()
        del transfer
