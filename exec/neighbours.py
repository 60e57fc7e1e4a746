"""Processes of one host that connect two ranks by memory that both see.

    source                        the store                      target
    listens on a local socket ──▶ "at": its clock, a name ─────▶ connects, if it can
    accepts, and hands over ◀──── "met": whether it could ◀───── takes what it is given
    the ring's descriptors

Who is on another host, in another network or time namespace, or on a system that has
none of it, is no neighbour; so is nobody where `PIPEPROOF_LINKS` is "gloo".
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from contextlib import suppress

from torch._C._distributed_c10d import Store

from pipeproof.exec.errors import RankError
from pipeproof.exec.host import host_clock
from pipeproof.exec.rings import RingIn, RingOut, Shared
from pipeproof.exec.wires import POLL_S, Check
from pipeproof.sched.errors import ParameterError

VARIABLE = "PIPEPROOF_LINKS"
AT, MET = "at", "met"
SHORT_S = 1e-3
"""From the first look at what the other end says to the next."""


class Meeting:
    """Where the two ends of one wire find each other.

    Args:
        store: theirs alone.
        peer: the rank at the other end.
        check: raises if a rank has failed; called ten times a second.
        deadline_s: for the other end to speak.

    Attributes:
        peer, deadline_s: as given.
        say: something under a key.
    """

    def __init__(
        self, store: Store, peer: int, check: Check, deadline_s: float
    ) -> None:
        self.peer, self.deadline_s = peer, deadline_s
        self.say = store.set
        self._store, self._check = store, check

    def hear(self, key: str) -> str:
        """What the other end says under a key; a later meeting here does not hear it.

        Raises:
            RankError: it does not, or a rank has failed.
        """
        pause, until = SHORT_S, time.monotonic() + self.deadline_s
        while not self._store.check([key]):
            if time.monotonic() > until:
                raise RankError(
                    f"rank {self.peer} has not come to its link with this one within "
                    f"{self.deadline_s:g} s: make the same pipelines, in the same "
                    "order, on all ranks"
                )
            time.sleep(pause)
            pause *= 2
            if pause >= POLL_S:
                pause = POLL_S
                self._check()
        said = self._store.get(key).decode()
        self._store.delete_key(key)
        return said


def ring_to(meeting: Meeting) -> RingOut | None:
    """The sending end of a ring, if its target is a neighbour.

    Args:
        meeting: with it.

    Raises:
        RankError: it does not come.
        ParameterError: the variable has no value that is known.
    """
    if not _may():
        meeting.say(AT, "")
        return None
    name = f"pipeproof-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX) as ear:
        ear.bind(f"\0{name}")  # in no folder: nobody need clean up
        ear.listen()
        ear.settimeout(meeting.deadline_s)
        meeting.say(AT, f"{name} {host_clock()}")
        if meeting.hear(MET) != "yes":
            return None
        while True:
            line, _ = ear.accept()
            if _is_ours(line):
                break
            line.close()
    return RingOut(Shared.new(line), meeting.peer)


def ring_from(meeting: Meeting) -> RingIn | None:
    """The receiving end, if its source is a neighbour; as `ring_to`."""
    name, _, clock = meeting.hear(AT).partition(" ")
    line = None
    if name and _may() and clock == host_clock():
        line = _reached(name, meeting.deadline_s)
    meeting.say(MET, "no" if line is None else "yes")
    return None if line is None else RingIn(Shared.receive(line), meeting.peer)


def _reached(name: str, deadline_s: float) -> socket.socket | None:
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(deadline_s)
    with suppress(OSError):
        line.connect(f"\0{name}")
        if _is_ours(line):
            return line
    line.close()
    return None


def _may() -> bool:
    """Whether this process can have neighbours.

    Raises:
        ParameterError: the variable has no value that is known.
    """
    links = os.environ.get(VARIABLE, "")
    if links not in ("", "gloo"):
        raise ParameterError(
            f'{VARIABLE} is "gloo", for links that go by gloo also between processes '
            f"of one host, or is not set; got {links!r}"
        )
    able = hasattr(os, "memfd_create") and hasattr(os, "eventfd")
    return able and not links and host_clock() != ""


def _is_ours(line: socket.socket) -> bool:
    """Whether a process of the same user is at the other end."""
    size = struct.calcsize("3i")
    said = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = struct.unpack("3i", said)
    return bool(user == os.getuid())
