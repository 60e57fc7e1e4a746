"""Wires between two processes of one host, through memory that both of them see.

A sender copies a tensor into the ring and goes on; the receiver copies it out when it
needs it. No thread has to run in between, which gloo's must for either end, on a core
that computes.

    sender                       the ring                     receiver
    send ── copies, rings ──▶ ║ h ▒▒▒▒ │ h ▒▒▒▒ │      ║ ──▶ wait: copies, frees

The bell and what is freed are counters of the kernel (eventfd): they can be waited for,
and make what was written before visible. The header of a message, h, has its number,
its bytes, and when it was there.

A ring is as large as what was ever under way at once needs. If a message does not fit,
the rest of the stream goes to a larger one behind it in the same file. The receiver
gives back the memory of the old one, and of large rings that of what it has copied out.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import socket
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns

from torch import Tensor

from pipeproof.exec.wires import POLL_S, Check

LINE = 64
"""Bytes: a message's header, and what all places are multiples of."""
WORD = 8
FIRST_SIZE = 1 << 16
NUMBER, SIZE, WHEN = range(3)
"""Words of a header."""
SKIP, MOVE = -1, -2
"""In place of a size: on at the ring's start, or in the ring of which the next words
are where it starts and its size."""
KEPT, LARGE = 1 << 25, 1 << 16
"""Bytes: up to how large a ring keeps its memory; of larger ones, from what size on a
message's is given back when it has been copied out."""
GONE = "the process at the other end has ended"
SPIN_S = 5e-5
"""For so long a receiver looks by itself whether something has come: to be woken up
takes about as long."""


@dataclass
class Shared:
    """What both ends of a wire hold, as long as one of them is there.

    Attributes:
        memory: descriptor of the file that the ring is in.
        bell: counts messages that are there.
        freed: counts messages that have been copied out.
        line: of a socket to the process at the other end; it breaks when that ends.
    """

    memory: int
    bell: int
    freed: int
    line: int

    @classmethod
    def new(cls, line: socket.socket) -> Shared:
        """Of a new wire, handed over to the process at the other end."""
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        memory = os.memfd_create("pipeproof")
        os.ftruncate(memory, FIRST_SIZE)
        bell, freed = os.eventfd(0, flags), os.eventfd(0, flags)
        socket.send_fds(line, [b"."], [memory, bell, freed])
        return cls(memory, bell, freed, line.detach())

    @classmethod
    def receive(cls, line: socket.socket) -> Shared:
        """What the process at the other end hands over.

        Raises:
            ConnectionError: it ends instead.
            OSError: this process has as many files open as it may.
        """
        with line:
            said, descriptors, _, _ = socket.recv_fds(line, 1, 3)
            if not said:
                raise ConnectionError(GONE)
            if len(descriptors) < 3:  # the kernel gives those that fit
                for descriptor in descriptors:
                    os.close(descriptor)
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            memory, bell, freed = descriptors
            return cls(memory, bell, freed, line.detach())

    def hang_up(self) -> None:
        """Who waits at either end learns that nothing comes any more."""
        line = socket.socket(fileno=os.dup(self.line))
        with line, suppress(OSError):  # the other end was first
            line.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        # Not before, as a thread may still wait on them.
        for descriptor in (self.memory, self.bell, self.freed, self.line):
            os.close(descriptor)


class Passing:
    """A tensor on its way through a ring: a `Pending`.

    Args:
        wire: that it goes by.
        tensor: to be filled; None for one that was sent, and so is in the ring.

    Attributes:
        wire, tensor, ended, error: as of a `Pending`.
    """

    __slots__ = ("ended", "error", "tensor", "wire")

    def __init__(self, wire: RingOut | RingIn, tensor: Tensor | None = None) -> None:
        self.wire, self.tensor = wire, tensor
        self.ended = 0.0
        self.error: Exception | None = None

    def wait(self, check: Check) -> None:
        """As `Pending.wait`."""
        if not self.ended and self.error is None:
            assert isinstance(self.wire, RingIn)
            self.wire.take_until(self, check)

    def follow(self) -> None:
        """As `Pending.follow`: the sender notes when it is there."""

    def entrust(self) -> bool:
        """As `Pending.entrust`."""
        return self.ended > 0

    def let_go(self) -> None:
        """As `Pending.let_go`."""


class _End:
    """What both ends of a ring have.

    Args:
        shared: with the other end.
        peer: its rank.
    """

    blocks = True

    def __init__(self, shared: Shared, peer: int) -> None:
        self._shared, self.peer = shared, peer
        self._number = 1
        self._look_at(0, FIRST_SIZE)

    def _look_at(self, start: int, size: int) -> None:
        """Go on with the ring that is there in the file."""
        self._start, self._size, self._at = start, size, start
        self._map = mmap.mmap(self._shared.memory, start + size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._words = memoryview(self._map).cast("q")

    def interrupt(self) -> None:
        """As `Wire.interrupt`: waits call their `check`."""

    def close(self, timeout_s: float) -> None:
        """As `Wire.close`."""
        self._shared.hang_up()


class RingOut(_End):
    """The end that sends: an `Outgoing`."""

    def __init__(self, shared: Shared, peer: int) -> None:
        super().__init__(shared, peer)
        self._used = 0
        self._there: deque[int] = deque()  # bytes of each that is not known to be freed

    def send(self, tensor: Tensor, *, followed: bool = True) -> Passing:
        """As `Outgoing.send`; it is sent when this returns."""
        size = tensor.nbytes
        at = self._room_for(LINE + -(-size // LINE) * LINE)
        ctypes.memmove(self._address + at + LINE, tensor.data_ptr(), size)
        passing = Passing(self)
        self._write(at, size, when := perf_counter_ns())
        self._number += 1
        passing.ended = when * 1e-9
        os.eventfd_write(self._shared.bell, 1)
        return passing

    def _write(self, at: int, size: int, *rest: int) -> None:
        """A header, its number last."""
        words, word = self._words, at // WORD
        words[word + SIZE] = size
        for number, value in enumerate(rest, WHEN):
            words[word + number] = value
        words[word + NUMBER] = self._number

    def _room_for(self, need: int) -> int:
        """Where a message of so many bytes goes, with its header."""
        if (at := self._fitting(need)) is None:
            self._count_freed()
            if (at := self._fitting(need)) is None:
                self._move(need)
                at = self._fitting(need)
                assert at is not None
        return at

    def _fitting(self, need: int) -> int | None:
        """The same, if there is room: one more header always fits behind it."""
        behind = self._start + self._size - self._at
        skipped = 0 if need <= behind else behind
        if self._used + skipped + need + LINE > self._size:
            return None
        if skipped:
            self._write(self._at, SKIP)
            self._at = self._start
        at = self._at
        self._at += need
        if self._at == self._start + self._size:
            self._at = self._start
        self._used += skipped + need
        self._there.append(skipped + need)
        return at

    def _count_freed(self) -> None:
        try:
            count = os.eventfd_read(self._shared.freed)
        except BlockingIOError:
            return
        for _ in range(count):
            self._used -= self._there.popleft()

    def _move(self, need: int) -> None:
        size = 2 * self._size
        while size < 2 * need:
            size *= 2
        start = self._start + self._size
        os.ftruncate(self._shared.memory, start + size)
        self._write(self._at, MOVE, start, size)
        self._there = deque([0] * len(self._there))
        self._used = 0
        self._look_at(start, size)


class RingIn(_End):
    """The end that receives: an `Incoming`."""

    def __init__(self, shared: Shared, peer: int) -> None:
        super().__init__(shared, peer)
        self._posted: deque[Passing] = deque()
        self._there = 0
        self._events = select.poll()
        self._events.register(shared.bell, select.POLLIN)
        self._events.register(shared.line, select.POLLIN)

    def receive(self, tensor: Tensor, *, followed: bool = False) -> Passing:
        """As `Incoming.receive`. What has come for others before is copied out."""
        passing = Passing(self, tensor)
        self._posted.append(passing)
        while len(self._posted) > 1 and self._has_come():
            self._take()
        return passing

    def take_until(self, last: Passing, check: Check) -> None:
        """Wait for it, and all before it."""
        while not last.ended and last.error is None:
            if self._there or self._comes(check):
                self._take()
            else:
                last.error = ConnectionError(GONE)

    def _has_come(self) -> bool:
        """Whether a message is there, which may be unseen for a moment."""
        if not self._there and self._words[self._at // WORD] == self._number:
            self._there = self._rung()
        return self._there > 0

    def _rung(self) -> int:
        """How many messages have come since this was asked last."""
        try:
            return os.eventfd_read(self._shared.bell)
        except BlockingIOError:
            return 0

    def _comes(self, check: Check) -> bool:
        """Wait for a message; whether one will ever come."""
        words, word, number = self._words, self._at // WORD, self._number
        until = perf_counter() + SPIN_S
        while words[word] != number and perf_counter() < until:
            os.sched_yield()
        while not (count := self._rung()):
            events = self._events.poll(POLL_S * 1e3)
            if not events:
                check()
            elif all(descriptor != self._shared.bell for descriptor, _ in events):
                return False
        self._there = count
        return True

    def _take(self) -> None:
        """Copy out what is there next."""
        while (size := self._words[self._at // WORD + SIZE]) < 0:
            self._turn(size)
        words, word = self._words, self._at // WORD
        passing = self._posted.popleft()
        tensor = passing.tensor
        assert tensor is not None
        if tensor.nbytes == size:
            ctypes.memmove(tensor.data_ptr(), self._address + self._at + LINE, size)
            passing.ended = words[word + WHEN] * 1e-9
            if size >= LARGE and self._size > KEPT:
                self._give_back(self._at + LINE, size)
        else:
            passing.error = ValueError(f"{size} bytes came for {tensor.nbytes}")
        os.eventfd_write(self._shared.freed, 1)
        self._there -= 1
        self._number += 1
        self._at += LINE + -(-size // LINE) * LINE
        if self._at == self._start + self._size:
            self._at = self._start

    def _turn(self, how: int) -> None:
        """Go on at the ring's start, or in a larger one."""
        if how == SKIP:
            self._at = self._start
            return
        word = self._at // WORD + SIZE
        start, size = self._words[word + 1], self._words[word + 2]
        self._give_back(self._start, self._size)
        self._look_at(start, size)

    def _give_back(self, start: int, size: int) -> None:
        """Memory of whole pages that were read, and are not known to be free yet."""
        first, last = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
        if first < last:
            length = (last - first) * mmap.PAGESIZE
            with suppress(OSError):  # some sandboxes' kernels have no such call
                self._map.madvise(mmap.MADV_REMOVE, first * mmap.PAGESIZE, length)
