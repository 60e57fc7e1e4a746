"""Who is alive: a thread of each rank beats in the store, and looks for the others.

It counts its own looks and not the time, so that a job that is stopped as a whole
goes on as a whole.

    rank 0        rank 1        rank 2         the store
    beat ───────────── beat ─────── (stopped)  beat 0, beat 1, beat 2
    look ◀──────────── look ◀────────────────  2 is silent: a failure of rank 2
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count

from torch._C._distributed_c10d import Store

from pipeproof.exec.failure import Failure, Record
from pipeproof.exec.host import process_here, runs
from pipeproof.exec.interrupts import interrupts
from pipeproof.exec.wires import Wire

LOST_S = 6.0
LOOKS, LOOKS_A_BEAT = 12, 4
"""In the time after which a silent rank is lost, and from one beat to the next."""
PATIENCE = 5
BETWEEN_STEPS = "between two steps"
LEFT = " left"


class Silence:
    """Who has not beaten for how long, by looks of one's own.

    A process on this host that is seen to run may be starved of its processor, or
    hold the interpreter in a long call: it gets `PATIENCE` times as long.

    Args:
        store: of the beats.
        ranks: whose.
        lost_s: a rank that is silent for so long is lost.

    Attributes:
        said: the last beat of each.
    """

    def __init__(self, store: Store, ranks: Iterable[int], lost_s: float) -> None:
        ranks = list(ranks)
        self._store, self._lost_s = store, lost_s
        self.said: dict[int, bytes] = dict.fromkeys(ranks, b"")
        self._looks = dict.fromkeys(ranks, 0)

    def look(self) -> None:
        """To be called `LOOKS` times in the time after which a rank is lost."""
        for rank, before in self.said.items():
            if self._store.check([beat_of(rank)]):
                said = self._store.get(beat_of(rank))
                self._looks[rank] = 0 if said != before else self._looks[rank] + 1
                self.said[rank] = said

    def lost(self) -> Failure | None:
        """Of a rank that beat once and has been silent for too long."""
        for rank, looks in self._looks.items():
            if looks < LOOKS or LEFT in self.said[rank].decode():
                continue
            known = process_of(rank)
            process = self._store.get(known) if self._store.check([known]) else b""
            if not runs(process.decode()):
                why = f"for {self._lost_s:g} s: it was killed or stopped"
            elif looks >= LOOKS * PATIENCE:
                why = f"for {self._lost_s * PATIENCE:g} s, though its process runs"
            else:
                continue
            return Failure(rank, f"has not been heard of {why}")
        return None


def beat_of(rank: int) -> str:
    """The key of a rank's beats."""
    return f"beat {rank}"


def nowhere() -> str:
    """Of what has no parts."""
    return ""


def process_of(rank: int) -> str:
    """The key of what a rank's process is called."""
    return f"process {rank}"


class Beats:
    """The thread that beats, and listens.

    Args:
        store: of the beats.
        record: of what is found to be wrong.
        rank: this one's number.
        size: how many ranks there are.
        timeout_s, lost_s: as for `Ranks`.

    Attributes:
        at: what its rank is doing.
        where: says where in that it is.
        moves: counts what it has waited for.
        waits: for what it waits meanwhile, and on which wire if it does so there.
        aborts: end what is under way between devices, of which no wait is in Python.
        interrupts: of this process.
        interrupted: how many there had been when its rank began what it is doing.
    """

    def __init__(
        self,
        store: Store,
        record: Record,
        rank: int,
        size: int,
        timeout_s: float,
        lost_s: float,
    ) -> None:
        self._rank, self._store, self._record = rank, store, record
        self._timeout_s, self._lost_s = timeout_s, lost_s
        others = [other for other in range(size) if other != rank]
        self._silence = Silence(store, others, lost_s)
        self.at, self.where = BETWEEN_STEPS, nowhere
        self.moves = 0
        self.waits: tuple[object, Wire | None] | None = None
        self.aborts: list[Callable[[], None]] = []
        self.interrupts = interrupts()
        self.interrupted = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._store.set(process_of(self._rank), process_here())
        # At once: one that is stopped before the thread gets to it must be missed.
        self._store.set(beat_of(self._rank), f"0 {self._now()}")
        self._thread.start()

    def stop(self) -> None:
        """Beat a last time, and say that it is the last."""
        self._over.set()
        self._thread.join()
        with suppress(RuntimeError):
            self._store.set(beat_of(self._rank), f"0 0{LEFT}")

    def has_left(self, peer: int) -> bool:
        """Whether a rank said that it is leaving."""
        return LEFT in self._silence.said[peer].decode()

    def _run(self) -> None:
        # The store goes away when the process that holds it ends; those that need
        # it in a step learn it there.
        with suppress(RuntimeError):
            self._look_and_beat()
        while not self._over.is_set():
            self._end_wait()
            self._over.wait(self._lost_s / LOOKS)

    def _end_wait(self) -> None:
        """Who waits for a rank that may never speak again is told to look.

        And who was interrupted meanwhile: back in Python, it finds that out.
        """
        if (waits := self.waits) is not None and waits[1] is not None:
            waits[1].interrupt()

    def _abort(self) -> None:
        """Each once: a device waits for one that failed as long as it is let."""
        while self.aborts:
            with suppress(RuntimeError):
                self.aborts.pop()()

    def _look_and_beat(self) -> None:
        look_s = self._lost_s / LOOKS
        still, before = 0, ""
        for look in count():
            if not look % LOOKS_A_BEAT:
                self._store.set(beat_of(self._rank), f"{look} {self._now()}")
            self._silence.look()
            if (lost := self._silence.lost()) is not None:
                self._record.write(lost)
            now = self._everyone()
            still = 0 if now != before or BETWEEN_STEPS in now else still + 1
            before = now
            if still * look_s >= self._timeout_s:
                reason = f"no rank has moved for {self._timeout_s:g} s:\n{now}"
                self._record.write(Failure(-1, reason))
            failed = self._record.read() is not None
            if failed:
                self._abort()
            if failed or self.interrupts.count() > self.interrupted:
                self._end_wait()
            if self._over.wait(look_s):
                return

    def _now(self) -> str:
        where = f", in {where}" if (where := self.where()) else ""
        waits = "" if (waits := self.waits) is None else f", waiting for {waits[0]}"
        return f"{self.moves} {self.at}{where}{waits}"

    def _everyone(self) -> str:
        """Where all ranks are, a line each."""
        said = {rank: self._told(rank) for rank in self._silence.said}
        said[self._rank] = self._now()
        return "\n".join(f"  rank {rank}: {said[rank]}" for rank in sorted(said))

    def _told(self, rank: int) -> str:
        return self._silence.said[rank].decode().partition(" ")[2]
