"""One-way links between two ranks, whatever they are made of, and texts over them.

communicators.py   torch's: gloo and NCCL
rings.py           memory that two processes of one host share
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

CPU = torch.device("cpu")
POLL_S = 0.1
"""From one look for a failure to the next, while something is waited for."""
FIRST_BYTES, LENGTH_BYTES = 1024, 8
"""Of a text's first tensor, and of its length there; the rest of a longer one comes
in a second."""
Check = Callable[[], None]
"""Raises if a rank has failed."""


class Wire(Protocol):
    """One direction between two ranks: first in, first out.

    Attributes:
        peer: the rank at the other end.
        blocks: whether waits hold up the host; NCCL's only order a device's stream.
    """

    peer: int
    blocks: bool

    def interrupt(self) -> None:
        """End a wait here that does not call its `check`."""

    def close(self, timeout_s: float) -> None:
        """Let go of it, once all is done that is followed, or after so long."""


class Outgoing(Wire, Protocol):
    """The end that sends."""

    def send(self, tensor: Tensor, *, followed: bool = True) -> Pending:
        """Start to send a dense tensor.

        Args:
            tensor: whose memory is read until it is sent.
            followed: hold it until then, and note when that was; otherwise hold what
                is returned.
        """


class Incoming(Wire, Protocol):
    """The end that receives."""

    def receive(self, tensor: Tensor, *, followed: bool = False) -> Pending:
        """Start to fill a dense tensor.

        Args:
            tensor: to be filled.
            followed: note when it is, even if nobody waits for it then.
        """


class Pending(Protocol):
    """A tensor under way.

    Attributes:
        tensor: it, as long as its memory is read or written.
        wire: that it goes by.
        ended: when it was sent or was there, by `perf_counter`, if somebody saw it.
        error: why it never will be.
    """

    tensor: Tensor | None
    ended: float
    error: Exception | None

    @property
    def wire(self) -> Wire:
        """That it goes by."""

    def wait(self, check: Check) -> None:
        """Return once it is done, or has an error.

        Args:
            check: called ten times a second, where a wait can be left for that.
        """

    def follow(self) -> None:
        """Have it noted when it is done, and its memory held until then."""

    def entrust(self) -> bool:
        """As `follow`, if it can be; whether nobody else need hold it any more."""

    def let_go(self) -> None:
        """Nobody need wait for it: it is known to have gone."""


Wait = Callable[[Pending, object], None]
"""Returns once it is done; raises if it never will be. The object says for what."""


class TextWire:
    """Short texts over two wires, one for each direction.

    Args:
        out, into: the wires.
        wait: as `Ranks.wait`.
    """

    def __init__(self, out: Outgoing, into: Incoming, wait: Wait) -> None:
        self._out, self._into, self._wait = out, into, wait
        self._ahead: Pending | None = None
        self._first = torch.empty(FIRST_BYTES, dtype=torch.uint8, device=CPU)
        self._bytes = self._first.numpy().data

    def send(self, text: str, *, followed: bool = True) -> list[Pending]:
        """Start to send, as `Outgoing.send`."""
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
