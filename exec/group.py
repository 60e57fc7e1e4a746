"""The processes that run one schedule together, and how they end together.

A rank that fails leaves a record in the store that all share: who, where, why.
Whoever waits looks for one ten times a second, so a failure anywhere ends all. A
thread of each rank beats in the store, and looks for the beats of the others; a
rank that was killed or stopped is found by its silence. It counts its own looks
and not the time, so that a job that is stopped as a whole goes on as a whole.

    rank 0        rank 1        rank 2         the store
    wait ◀──────────── raises ──────────────▶  failure: "rank 1, 1F3, ValueError …"
    beat ───────────── beat ─────── (stopped)  beat 0, beat 1, beat 2
"""

from __future__ import annotations

import atexit
import json
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count
from typing import Any, ClassVar

import torch.distributed as dist
from torch._C._distributed_c10d import Backend, PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from pipeproof.exec.errors import RankError
from pipeproof.exec.timetable import host_clock
from pipeproof.exec.transport import Pending, TextWire, Wire
from pipeproof.sched.errors import ParameterError

LOST_S = 6.0
LOOKS, LOOKS_A_BEAT = 12, 4
"""In the time after which a silent rank is lost, and from one beat to the next."""
CONNECT_S = 30.0
"""For a rank to come to a communicator that its peer is making."""
POLL_S = 0.1
LEAVING_S = 1.0
TIMEOUT_S = 30.0
BETWEEN_STEPS = "between two steps"
LEFT = " left"
TAGS = ("control", "headers", "reductions")
"""Of the communicator that all ranks share."""


@dataclass(frozen=True)
class Failure:
    """Why all ranks end.

    Attributes:
        rank: whose fault it was; -1 for nobody's in particular.
        reason: what happened there: the op, the stage, the micro-batch.
        trace: the traceback, where there is one.
    """

    rank: int
    reason: str
    trace: str = ""

    def __str__(self) -> str:
        who = "" if self.rank < 0 else f"rank {self.rank} "
        return f"{who}{self.reason}" + (f"\n{self.trace}" if self.trace else "")


class Record:
    """The first failure of any rank, in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found: Failure | None = None

    def write(self, failure: Failure) -> None:
        """Keep this one, unless there is another already."""
        if self._store.add("failures", 1) == 1:
            self._store.set("failure", json.dumps(asdict(failure)))

    def read(self) -> Failure | None:
        """The failure, if there is one."""
        if self._found is None and self._store.check(["failure"]):
            self._found = Failure(**json.loads(self._store.get("failure")))
        return self._found


class Silence:
    """Who has not beaten for how long, by looks of one's own.

    Args:
        store: of the beats.
        ranks: whose.

    Attributes:
        said: the last beat of each.
    """

    def __init__(self, store: Store, ranks: Iterable[int]) -> None:
        ranks = list(ranks)
        self._store = store
        self.said: dict[int, bytes] = dict.fromkeys(ranks, b"")
        self._looks = dict.fromkeys(ranks, 0)

    def look(self) -> None:
        """To be called `LOOKS` times in the time after which a rank is lost."""
        for rank, before in self.said.items():
            if self._store.check([beat_of(rank)]):
                said = self._store.get(beat_of(rank))
                self._looks[rank] = 0 if said != before else self._looks[rank] + 1
                self.said[rank] = said

    def lost(self) -> int | None:
        """A rank that beat once and has been silent for too long."""
        for rank, looks in self._looks.items():
            if looks >= LOOKS and LEFT not in self.said[rank].decode():
                return rank
        return None


def beat_of(rank: int) -> str:
    """The key of a rank's beats."""
    return f"beat {rank}"


def silent(rank: int, seconds: float) -> Failure:
    """The failure of a rank that does not beat any more."""
    return Failure(
        rank, f"has not been heard of for {seconds:g} s: it was killed or stopped"
    )


class Ranks:
    """This process among those that run one schedule, one for each device.

    Rank r runs device r of the schedule. One serves any number of pipelines, one
    step at a time. `Pipeline(…, ranks=True)` makes it from torch.distributed's
    processes, `launch` from those it starts. After a failure they are done for:
    whatever is begun raises it again.

    Args:
        store: where the ranks meet, theirs alone.
        rank: this one's number.
        size: how many there are.
        timeout_s: a step breaks off if no rank moves for so long.
        lost_s: a rank that is silent for so long is lost.

    Attributes:
        rank, size: as given.
        store: as given.
        record: of the first failure.
        headers: texts to and from each other rank, of what messages hold.
        reductions: likewise, of what reductions sum.
    """

    _of: ClassVar[dict[Any, Ranks]] = {}

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        timeout_s: float = TIMEOUT_S,
        lost_s: float = LOST_S,
    ) -> None:
        self.rank, self.size = rank, size
        self.store, self._timeout_s, self._lost_s = store, timeout_s, lost_s
        self.record = Record(store)
        self._beats = _Beats(self, store)
        self._wires: dict[tuple[int, int, str], Wire] = {}
        self._made: list[Wire] = []
        others = [other for other in range(size) if other != rank]
        all_of_us = self._communicator(list(range(size)), "gloo", "all")
        self._texts, self.headers, self.reductions = (
            {peer: self._text(all_of_us, peer, tag) for peer in others} for tag in TAGS
        )
        self._beats.start()
        atexit.register(self.leave)

    @classmethod
    def of(cls, ranks: Ranks | dist.ProcessGroup | bool) -> Ranks:
        """What a pipeline was given as its ranks; True stands for all processes.

        Raises:
            ParameterError: torch.distributed is not initialised, or this process is
                not in the group.
        """
        if isinstance(ranks, Ranks):
            return ranks
        if not dist.is_initialized():
            raise ParameterError(
                "ranks need torch.distributed: call init_process_group first, or "
                "start the ranks with pipeproof.exec.launch"
            )
        group = dist.group.WORLD if isinstance(ranks, bool) else ranks
        members, me = dist.get_process_group_ranks(group), dist.get_rank()
        if me not in members:
            raise ParameterError(f"rank {me} is not in the group {members}")
        if group not in cls._of:
            prefix = f"pipeproof/{','.join(map(str, members))}"
            # A client of its own: a beat must not wait for another's blocking call.
            store = PrefixStore(prefix, _get_default_store().clone())  # type: ignore[attr-defined]
            cls._of[group] = cls(store, members.index(me), len(members))
        return cls._of[group]

    def wire(self, source: int, target: int, backend: str, of: str = "") -> Wire:
        """This rank's end of a communicator; both ends must ask, in one order.

        Args:
            source: a rank.
            target: another; this one is one of them.
            backend: gloo or nccl.
            of: tells wires of the same two ranks apart.
        """
        key = source, target, backend + of
        if key not in self._wires:
            pair = [source, target]
            made = self._communicator(pair, backend, f"{source}-{target} {of}")
            peer = target if source == self.rank else source
            wire = Wire(made, pair.index(peer), peer, backend == "gloo")
            self._wires[key] = wire
            self._made.append(wire)
        return self._wires[key]

    def _communicator(self, members: list[int], backend: str, name: str) -> Backend:
        # Not by new_group, in which all processes must take part, also those that
        # run other pipelines.
        kinds: dict[str, Any] = {"gloo": dist.ProcessGroupGloo}
        if dist.is_nccl_available():
            kinds["nccl"] = dist.ProcessGroupNCCL
        made: Backend = kinds[backend](
            PrefixStore(f"{backend} {name}", self.store),
            members.index(self.rank),
            len(members),
            timeout=timedelta(seconds=CONNECT_S),
        )
        return made

    def _text(self, group: Backend, peer: int, tag: str) -> TextWire:
        number = TAGS.index(tag)
        out, into = (Wire(group, peer, peer, True, number) for _ in range(2))
        self._made += [out, into]
        return TextWire(out, into, self.wait)

    def exchange(self, value: Any, what: str) -> list[Any]:
        """What each rank has to say, by rank, on all of them; by way of rank 0.

        Args:
            value: anything that JSON can hold.
            what: it is, for messages.
        """
        if self.rank:
            self._texts[0].send(json.dumps(value))
            found: list[Any] = json.loads(self._texts[0].receive(what))
            return found
        peers = sorted(self._texts)
        said = [value] + [json.loads(self._texts[p].receive(what)) for p in peers]
        text = json.dumps(said)
        for peer in peers:
            self._texts[peer].send(text)
        return said

    def clock_offset(self, rounds: int = 8) -> float:
        """What to add to this rank's `perf_counter` to have rank 0's.

        On rank 0's host that is nothing. Elsewhere the round trip that takes least
        time tells most.
        """
        what, best, offset = "the clocks", float("inf"), 0.0
        clocks = self.exchange(host_clock(), what)
        far = [r for r, clock in enumerate(clocks) if r and clock != clocks[0]]
        if not clocks[0]:
            far = list(range(1, self.size))
        if self.rank and self.rank not in far:
            return 0.0
        for peer in [0] if self.rank else far:
            for _ in range(rounds):
                if not self.rank:
                    self._texts[peer].receive(what)
                    self._texts[peer].send(repr(time.perf_counter()))
                    continue
                asked = time.perf_counter()
                self._texts[0].send("")
                theirs = float(self._texts[0].receive(what))
                took = time.perf_counter() - asked
                if took < best:
                    best, offset = took, theirs - asked - took / 2
        return offset

    def wait(self, pending: Pending, what: str) -> None:
        """Return once it is done.

        Raises:
            RankError: another rank failed or is lost, or none has moved for
                `timeout_s`.
        """
        if not pending.threaded and pending.work is not None:
            pending.finish()
        elif not pending.done.is_set():
            with self._beats.waiting(what):
                while not pending.done.wait(POLL_S):
                    self.check()
        self._beats.moved()
        if pending.error is not None:
            self._broken(pending, what)

    def _broken(self, pending: Pending, what: str) -> None:
        """A link broke: because its other end did, if we wait a little to hear it."""
        peer = pending.peer
        for _ in range(int(2 * self._lost_s / POLL_S)):
            self.check()
            if self._beats.has_left(peer):
                break
            time.sleep(POLL_S)
        error = f"{type(pending.error).__name__}: {pending.error}"
        self.record.write(
            Failure(
                self.rank, f"lost its link to rank {peer}, waiting for {what}: {error}"
            )
        )
        self.check()

    def check(self) -> None:
        """Go on, unless a rank has failed.

        Raises:
            RankError: one has; it names it and the reason.
        """
        failure = self.record.read()
        if failure is not None:
            raise RankError(f"rank {self.rank} ends: {failure}")

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Do something in which a failure here is one of all ranks.

        Args:
            what: as in "failed in the step".
        """
        self.check()
        self._beats.at = what
        try:
            yield
        except BaseException as error:
            if not isinstance(error, RankError) or self.record.read() is None:
                self.record.write(failure_of(error, self.rank, what))
            raise
        finally:
            self._beats.at = BETWEEN_STEPS

    def leave(self) -> None:
        """End the threads, and be missed by no rank any more.

        A process does so by itself when it ends.
        """
        self._beats.stop()
        # A thread that waits for a rank which waits for nobody ends with that rank.
        for wire in self._made:
            wire.close(LEAVING_S / len(self._made))
        for group, ranks in list(self._of.items()):
            if ranks is self:
                del self._of[group]
        atexit.unregister(self.leave)


def failure_of(error: BaseException, rank: int, what: str) -> Failure:
    """What a rank has to say of an exception, wherever it was."""
    cause = error.__cause__ or error
    lines = "".join(traceback.format_exception(cause))
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Failure(rank, f"failed in {what}: {text}", lines.rstrip())


class _Beats:
    """The thread that beats, and listens.

    Attributes:
        at: what its rank is doing.
    """

    def __init__(self, ranks: Ranks, store: Store) -> None:
        self._rank, self._store, self._record = ranks.rank, store, ranks.record
        self._timeout_s, self._lost_s = ranks._timeout_s, ranks._lost_s
        others = [rank for rank in range(ranks.size) if rank != ranks.rank]
        self._silence = Silence(store, others)
        self.at = BETWEEN_STEPS
        self._moves = 0
        self._waits = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to beat."""
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

    def moved(self) -> None:
        """Something has been done."""
        self._moves += 1

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Meanwhile, this rank waits for something."""
        self._waits = what
        try:
            yield
        finally:
            self._waits = ""

    def _run(self) -> None:
        # The store goes away when the process that holds it ends; those that need
        # it in a step learn it there.
        with suppress(RuntimeError):
            self._look_and_beat()

    def _look_and_beat(self) -> None:
        look_s = self._lost_s / LOOKS
        still, before = 0, ""
        for look in count():
            if not look % LOOKS_A_BEAT:
                self._store.set(beat_of(self._rank), f"{look} {self._now()}")
            self._silence.look()
            if (lost := self._silence.lost()) is not None:
                self._record.write(silent(lost, self._lost_s))
            now = self._everyone()
            still = 0 if now != before or BETWEEN_STEPS in now else still + 1
            before = now
            if still * look_s >= self._timeout_s:
                reason = f"no rank has moved for {self._timeout_s:g} s:\n{now}"
                self._record.write(Failure(-1, reason))
            if self._over.wait(look_s):
                return

    def _now(self) -> str:
        waits = f", waiting for {waits}" if (waits := self._waits) else ""
        return f"{self._moves} {self.at}{waits}"

    def _everyone(self) -> str:
        """Where all ranks are, a line each."""
        said = {rank: self._told(rank) for rank in self._silence.said}
        said[self._rank] = self._now()
        return "\n".join(f"  rank {rank}: {said[rank]}" for rank in sorted(said))

    def _told(self, rank: int) -> str:
        return self._silence.said[rank].decode().partition(" ")[2]
