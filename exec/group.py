"""The processes that run one schedule together, and how they end together.

A rank that fails leaves a record in the store that all share: who, where, why.
Whoever waits looks for one ten times a second, so a failure anywhere ends all. A
rank that was killed or stopped is found by its silence (`beats.py`).

    rank 0        rank 1        rank 2         the store
    wait ◀──────────── raises ──────────────▶  failure: "rank 1, 1F3, ValueError …"
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend, PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from pipeproof.exec.beats import BETWEEN_STEPS, LOST_S, Beats, nowhere
from pipeproof.exec.communicators import NEVER, TorchWire, gloo
from pipeproof.exec.errors import RankError
from pipeproof.exec.failure import Failure, Record, failure_of
from pipeproof.exec.host import host_clock
from pipeproof.exec.neighbours import Meeting, ring_from, ring_to
from pipeproof.exec.processes import Along, processes_of
from pipeproof.exec.stores import another
from pipeproof.exec.wires import (
    CPU,
    POLL_S,
    Incoming,
    Outgoing,
    Pending,
    TextWire,
    Wire,
)
from pipeproof.sched.errors import ParameterError

CONNECT_S = 30.0
"""For a rank to come to a communicator that its peer is making."""
LEAVING_S = 1.0
TIMEOUT_S = 30.0
P2P_WARNING = "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"
TAGS = ("control", "headers", "loans")
"""Of the communicator that all ranks share."""
OF = "\t"
"""Between what a text is of, and the text."""


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
        timeout_s: a step breaks off if no rank moves for so long: none begins an op,
            or gets what it waits for.
        lost_s: a rank that is silent for so long is lost; see `Silence`.

    Attributes:
        rank, size: as given.
        store: as given.
        record: of the first failure.
        headers: texts to and from each other rank, of what messages hold.
        loans: likewise, of what is kept in another's memory.
    """

    _of: ClassVar[dict[tuple[int, ...], Ranks]] = {}

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
        self.store, self._lost_s = store, lost_s
        self.record = Record(store)
        self._beats = Beats(store, self.record, rank, size, timeout_s, lost_s)
        self._wires: dict[tuple[int, int, str], Any] = {}
        self._collectives: dict[tuple[tuple[int, ...], str], Backend] = {}
        self._made: list[Wire] = []
        self._said: list[Pending] = []
        self._far: list[int] | None = None  # ranks that read another clock than rank 0
        others = [other for other in range(size) if other != rank]
        all_of_us = self._communicator(list(range(size)), CPU, "all")
        self._texts, self.headers, self.loans = (
            {peer: self._text(all_of_us, peer, tag) for peer in others} for tag in TAGS
        )
        self._beats.start()
        atexit.register(self.leave)

    @classmethod
    def of(cls, ranks: Ranks | Along | bool) -> Ranks:
        """What a pipeline was given as its ranks; True stands for all processes.

        Raises:
            ParameterError: torch.distributed is not initialised, this process is not
                among them, or a mesh has several dimensions.
        """
        return ranks if isinstance(ranks, Ranks) else cls.among(processes_of(ranks))

    @classmethod
    def among(cls, processes: Sequence[int]) -> Ranks:
        """The company of these processes of torch.distributed, one for all time.

        Raises:
            ParameterError: this process is not among them.
        """
        key, me = tuple(processes), dist.get_rank()
        if me not in key:
            raise ParameterError(f"rank {me} is not in the group {list(key)}")
        if key not in cls._of:
            prefix = f"pipeproof/{','.join(map(str, key))}"
            # A client of its own: a beat must not wait for another's blocking call.
            store = PrefixStore(prefix, another(_get_default_store()))
            cls._of[key] = cls(store, key.index(me), len(key))
        return cls._of[key]

    def outgoing(self, target: int, device: torch.device, of: str = "") -> Outgoing:
        """The sending end of a wire; both ends must ask, in one order of all wires.

        Args:
            target: the rank at the other end.
            device: where this rank's tensors lie. GPUs are served by NCCL, CPUs of
                one host by memory that both see, others by gloo.
            of: tells wires of the same two ranks apart.

        Raises:
            RankError: the other end does not come.
        """
        wire: Outgoing = self._wire((self.rank, target), device, of)
        return wire

    def incoming(self, source: int, device: torch.device, of: str = "") -> Incoming:
        """The receiving end; as `outgoing`."""
        wire: Incoming = self._wire((source, self.rank), device, of)
        return wire

    def _wire(self, ends: tuple[int, int], device: torch.device, of: str) -> Any:
        key = *ends, f"{device} {of}"
        if key not in self._wires:
            name = f"{ends[0]}-{ends[1]} {of}"
            made = self._ring(ends, name) if device.type == "cpu" else None
            if made is None:
                group = self._communicator(list(ends), device, name)
                place = 1 - ends.index(self.rank)
                made = TorchWire(group, place, ends[place], device.type != "cuda")
            self._wires[key] = made
            self._made.append(made)
        return self._wires[key]

    def _ring(self, ends: tuple[int, int], name: str) -> Wire | None:
        store = PrefixStore(f"ring {name}", self.store)
        if ends[0] == self.rank:
            return ring_to(Meeting(store, ends[1], self.check, CONNECT_S))
        try:
            return ring_from(Meeting(store, ends[0], self.check, CONNECT_S))
        except (ConnectionError, TimeoutError) as error:
            self.broken(error, "its end of their link", ends[0])
            raise

    def collective(self, members: Sequence[int], device: torch.device) -> Backend:
        """A communicator of several ranks; all must ask, in one order.

        Args:
            members: ranks in ascending order; this one is one of them.
            device: as for `wire`.
        """
        key = tuple(members), str(device)
        if key not in self._collectives:
            name = f"of {','.join(map(str, members))}"
            made = self._communicator(list(members), device, name)
            self._collectives[key] = made
        return self._collectives[key]

    def _communicator(
        self, members: list[int], device: torch.device, name: str
    ) -> Backend:
        # Not by new_group, in which all processes must take part, also those that
        # run other pipelines.
        on_gpu = device.type == "cuda"
        store = PrefixStore(f"{'nccl' if on_gpu else 'gloo'} {name}", self.store)
        place = members.index(self.rank), len(members)
        if not on_gpu:
            return gloo(store, *place, timedelta(seconds=CONNECT_S))
        # It warns that the messages of one communicator are in order: as they must be.
        os.environ.setdefault(P2P_WARNING, "false")
        nccl: Any = dist.ProcessGroupNCCL
        # A deadline of its own would end the process where a stage takes long.
        made: Backend = nccl(store, *place, timeout=NEVER)
        # Or its first message would make it, in whatever order these come.
        made.eager_connect_single_device(device)
        if hasattr(made, "abort"):  # newer torch
            self._beats.aborts.append(made.abort)
        return made

    def _text(self, group: Backend, peer: int, tag: str) -> TextWire:
        number = TAGS.index(tag)
        out, into = (TorchWire(group, peer, peer, True, number) for _ in range(2))
        self._made += [out, into]
        return TextWire(out, into, self.wait_beside if tag == "loans" else self.wait)

    def exchange(self, value: Any, what: str) -> list[Any]:
        """What each rank has to say, by rank, on all of them.

        Args:
            value: anything that JSON can hold.
            what: it is, for messages.

        Raises:
            RankError: another rank says something of something else.
        """
        texts = self.ask(json.dumps(value), what)()
        return [
            value if rank == self.rank else json.loads(text)
            for rank, text in enumerate(texts)
        ]

    def ask(self, text: str, what: str) -> Callable[[], list[str]]:
        """Begin an exchange of one line of each rank; what is returned ends it.

        In each round a rank tells all it knows to one further away: those of twice
        as many ranks. It takes the logarithm of their number of rounds.

        Source:
            Bruck et al. 1997, IEEE TPDS 8(11), the concatenation.
        """
        # Of this rank, of the one before it, and so on.
        said = [f"{what}{OF}{text}"]
        sent = self._pass_on(said, 1)

        def answers() -> list[str]:
            distance = 1
            while distance < self.size:
                if distance > 1:
                    sent.extend(self._pass_on(said, distance))
                source = self._texts[(self.rank - distance) % self.size]
                said.extend(source.receive(what).split("\n"))
                source.expect()
                distance *= 2
            # All who say something now have had what was said the time before.
            for pending in self._said:
                pending.let_go()
            self._said = sent
            return [
                self._about(what, rank, said[(self.rank - rank) % self.size])
                for rank in range(self.size)
            ]

        return answers

    def _about(self, what: str, rank: int, text: str) -> str:
        """What a rank said, if it is what was asked for.

        Raises:
            RankError: that rank is at something else.
        """
        of, _, rest = text.partition(OF)
        if of != what:
            raise RankError(
                f"rank {rank} is at {of!r}, and rank {self.rank} at {what!r}: call the "
                "same on all ranks, in the same order"
            )
        return rest

    def _pass_on(self, said: list[str], distance: int) -> list[Pending]:
        """A round: as much as is new to the rank so far away."""
        if self.size == 1:
            return []
        target = self._texts[(self.rank + distance) % self.size]
        return target.send("\n".join(said[: self.size - len(said)]), followed=False)

    def told(self, value: Any, speaker: int, what: str) -> Any:
        """What one rank has to say, on all of them; it waits for none of them.

        Args:
            value: as for `exchange`, on the speaker.
            speaker: its number.
            what: it is, for messages.
        """
        if self.rank != speaker:
            source = self._texts[speaker]
            heard = source.receive(what)
            source.expect()
            return json.loads(self._about(what, speaker, heard))
        text = f"{what}{OF}{json.dumps(value)}"
        for target in self._texts.values():
            self._said += target.send(text, followed=False)
        return value

    def clock_offset(self, rounds: int = 8) -> float:
        """What to add to this rank's `perf_counter` to have rank 0's.

        On rank 0's host that is nothing. Elsewhere the round trip that takes least
        time tells most.
        """
        what, best, offset = "the clocks", float("inf"), 0.0
        if self._far is None:
            clocks = self.exchange(host_clock(), what)
            self._far = [
                r for r, c in enumerate(clocks) if r and (not c or c != clocks[0])
            ]
        far = self._far
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

    def wait(self, pending: Pending, what: object) -> None:
        """Return once it is done.

        Args:
            pending: what is under way.
            what: it is, for messages.

        Raises:
            RankError: another rank failed or is lost, or none has moved for
                `timeout_s`.
        """
        beats = self._beats
        beats.waits = what, pending.wire
        pending.wait(self.check)
        beats.waits = None
        beats.moves += 1
        if pending.error is not None:
            self.broken(pending.error, what, pending.wire.peer)
        if not pending.wire.blocks:  # it only orders a stream, and sees no failure
            self.end_if_failed()

    def wait_beside(self, pending: Pending, what: object) -> None:
        """As `wait`, for a thread beside the step, which is no sign of life.

        Raises:
            RankError: as `wait`.
        """
        pending.follow()
        pending.wait(self.check)
        if pending.error is not None:
            self.broken(pending.error, what, pending.wire.peer)

    def wait_for(self, done: threading.Event, what: str) -> None:
        """As `wait`, for what a thread does."""
        beats = self._beats
        beats.waits = what, None
        while not done.wait(POLL_S):
            self.check()
        beats.waits = None
        beats.moves += 1

    def broken(self, error: Exception, what: object, peer: int | None = None) -> None:
        """A link broke: because its other end did, if we wait a little to hear it.

        Args:
            error: that says so.
            what: was waited for.
            peer: at the other end, if there is but one.

        Raises:
            RankError: always.
        """
        for _ in range(int(2 * self._lost_s / POLL_S)):
            self.check()
            if peer is not None and self._beats.has_left(peer):
                break
            time.sleep(POLL_S)
        if peer is not None and self._beats.has_left(peer):
            text = f"has left, and rank {self.rank} waits for {what}"
            self.record.write(Failure(peer, text))
        whom = "another rank" if peer is None else f"rank {peer}"
        text = f"lost its link to {whom}, waiting for {what}: "
        text += f"{type(error).__name__}: {error}"
        self.record.write(Failure(self.rank, text))
        self.check()

    def end_if_failed(self) -> None:
        """As `check`, of failures that are known here.

        Without a look into the store, which is slow: the thread that beats looks there.

        Raises:
            RankError: as `check`.
        """
        self._end_with(self.record.known)

    def check(self) -> None:
        """Go on, unless a rank has failed.

        Raises:
            RankError: one has; it names it and the reason.
        """
        self._end_with(self.record.read())

    def _end_with(self, failure: Failure | None) -> None:
        if failure is not None:
            raise RankError(f"rank {self.rank} ends: {failure}")

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Do something in which a failure here is one of all ranks.

        Args:
            what: as in "failed in the step".
        """
        # A rank that knows of no failure yet learns of it when it waits.
        self.end_if_failed()
        self._beats.at = what
        self._beats.interrupted = self._beats.interrupts.seen()
        try:
            yield
        except BaseException as error:
            if not isinstance(error, RankError) or self.record.read() is None:
                self.record.write(failure_of(error, self.rank, what))
            raise
        finally:
            self._beats.at, self._beats.where = BETWEEN_STEPS, nowhere

    def within(self, where: Callable[[], str]) -> None:
        """Have others know where in what it does together this rank is.

        Args:
            where: says so, in another thread; going on there is a move.
        """
        self._beats.where = where

    def leave(self) -> None:
        """End the threads, and be missed by no rank any more.

        A process does so by itself when it ends.
        """
        self._beats.stop()
        for pending in self._said:
            pending.follow()
        # A thread that waits for a rank which waits for nobody ends with that rank.
        for wire in self._made:
            wire.close(LEAVING_S / len(self._made))
        for processes, ranks in list(self._of.items()):
            if ranks is self:
                del self._of[processes]
        atexit.unregister(self.leave)
