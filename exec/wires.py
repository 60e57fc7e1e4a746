"""One-way links between two ranks, and what is under way on them.

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

CPU = torch.device("cpu")
NEVER = timedelta(days=365)
"""Deadlines are the ranks', who know why they wait; a communicator has none."""
AT_ONCE = timedelta(milliseconds=1)
NO_TAG = 99
"""Of messages that never come."""
FIRST_BYTES, LENGTH_BYTES = 1024, 8
"""Of a text's first tensor, and of its length there; the rest of a longer one comes
in a second."""


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


class Pending:
    """A tensor under way, by one of torch's functions for it.

    Attributes:
        tensor: it; held as long as its memory is read or written.
        wire: that it goes by.
        work: torch's, until somebody has waited for it.
        followed: what a thread that waits for it sets when it is done; None where
            who needs it waits.
        ended: when it was sent or was there, by `perf_counter`, if somebody saw it.
        error: why it never will be.
    """

    __slots__ = ("ended", "error", "followed", "tensor", "wire", "work")

    def __init__(self, tensor: Tensor, wire: Wire, function: Any) -> None:
        self.tensor: Tensor | None = tensor
        self.wire = wire
        self.work: Any = None
        self.followed: threading.Event | None = None
        self.ended = 0.0
        self.error: Exception | None = None
        try:
            self.work = function([tensor], wire.place, wire.tag)
        except RuntimeError as error:  # the link is broken already
            self.error = error

    def finish(self) -> None:
        """Wait for it, without a deadline."""
        work, self.work = self.work, None
        if work is None:
            return
        try:
            # NCCL's waits hold up the host if they are given a deadline.
            work.wait(NEVER) if self.wire.blocks else work.wait()
        except RuntimeError as error:
            self.error = error

    @property
    def gone(self) -> bool:
        """Whether it is known to have, where that can be asked: of NCCL."""
        return self.work is None or bool(self.work.is_completed())

    def let_go(self) -> None:
        """Nobody need wait for it: it is known to have gone."""
        if self.wire.blocks:
            self.work = None
        else:  # NCCL's wait has the device's stream know, too
            self.finish()


class Wire:
    """One direction of one communicator: first in, first out.

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
        self._queue: SimpleQueue[Pending | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, tensor: Tensor, *, followed: bool = True) -> Pending:
        """Start to send a contiguous tensor.

        Args:
            tensor: whose memory is read until it is sent.
            followed: hold it until then; otherwise hold what is returned.
        """
        pending = Pending(tensor, self, self._send)
        if followed:
            self.follow(pending)
        return pending

    def receive(self, tensor: Tensor, *, followed: bool = False) -> Pending:
        """Start to fill a contiguous tensor.

        Args:
            tensor: to be filled.
            followed: have a thread note when it is.
        """
        pending = Pending(tensor, self, self._recv)
        if followed:
            self.follow(pending)
        return pending

    def follow(self, pending: Pending) -> None:
        """Have a thread wait for it, note when it is done, and let go of it then."""
        if not self.blocks or pending.error is not None:
            return
        pending.followed = threading.Event()
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._queue,))
            self._thread.daemon = True
            self._thread.start()
        self._queue.put(pending)

    def interrupt(self) -> None:
        """Have all waits on the communicator fail, now and ever after."""
        if self.blocks:
            with suppress(RuntimeError):
                never = self._recv([torch.empty(1, device=CPU)], self.place, NO_TAG)
                never.wait(AT_ONCE)

    def close(self, timeout_s: float) -> None:
        """Have the thread end, once all is done that it follows."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)


def _serve(queue: SimpleQueue[Pending | None]) -> None:
    while (pending := queue.get()) is not None:
        pending.finish()
        pending.ended = perf_counter()
        assert pending.followed is not None
        pending.followed.set()
        del pending


Wait = Callable[[Pending, object], None]
"""Returns once it is done; raises if it never will be. The object says for what."""


class TextWire:
    """Short texts over two wires, one for each direction.

    Args:
        out, into: the wires.
        wait: as `Ranks.wait`.
    """

    def __init__(self, out: Wire, into: Wire, wait: Wait) -> None:
        self._out, self._into, self._wait = out, into, wait
        self._ahead: Pending | None = None
        self._first = torch.empty(FIRST_BYTES, dtype=torch.uint8, device=CPU)
        self._bytes = self._first.numpy().data

    def send(self, text: str, *, followed: bool = True) -> list[Pending]:
        """Start to send, as `Wire.send`."""
        data = text.encode()
        first, fits = bytearray(FIRST_BYTES), FIRST_BYTES - LENGTH_BYTES
        first[:LENGTH_BYTES] = len(data).to_bytes(LENGTH_BYTES, "little")
        first[LENGTH_BYTES : LENGTH_BYTES + len(data)] = data[:fits]
        parts = [first] if len(data) <= fits else [first, bytearray(data[fits:])]
        rows = (torch.frombuffer(part, dtype=torch.uint8) for part in parts)
        return [self._out.send(row, followed=followed) for row in rows]

    def expect(self) -> None:
        """Get ready for the next one, so that it need not wait for `receive`."""
        if self._ahead is None:
            self._ahead = self._into.receive(self._first)

    def receive(self, what: str) -> str:
        """Wait for the next one."""
        self.expect()
        assert self._ahead is not None
        first, self._ahead = self._ahead, None
        self._wait(first, what)
        length = int.from_bytes(self._bytes[:LENGTH_BYTES], "little")
        data = self._bytes[LENGTH_BYTES : LENGTH_BYTES + length].tobytes()
        if length > len(data):
            rest = torch.empty(length - len(data), dtype=torch.uint8, device=CPU)
            self._wait(self._into.receive(rest), what)
            data += rest.numpy().tobytes()
        return data.decode()
