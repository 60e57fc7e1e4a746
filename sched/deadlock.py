"""Whether a program can hang: what waits for what, and the cycle if there is one.

An instruction that communicates is two nodes, its start and its end; a message is
a third, its transfer. A rendezvous, where a send ends when its receive is posted::

    send   start ------+            +--> end
                       +-> transfer-+
    recv   start ------+            +--> end

A group of messages is two nodes more: what waits for one of it waits for the end of
all, and what one waits for holds up the start of all::

    group  start --+--> send start -- … -- send end --+--> end
                   +--> recv start -- … -- recv end --+

A buffer of k messages on a link lets a send end before, if the receive of k
messages earlier has ended; an eager one always. Messages are matched without
wildcards, so there is one graph and no choice in it: a program runs through if
and only if the graph has no cycle, and what runs through under rendezvous runs
through under any buffering. Kahn's algorithm (Communications of the ACM 5, 1962,
p. 558) says so in linear time, and what it leaves has the cycle in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.cycles import drawn
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.findings import Finding
from pipeproof.sched.instructions import Action
from pipeproof.sched.kernels import levels
from pipeproof.sched.matching import meetings
from pipeproof.sched.program import Program
from pipeproof.sched.streams import STREAM_MODELS, Buffering, StreamModel, in_turn

Nodes = NDArray[np.int64]

TWO_ENDED = (Action.SEND, Action.RECV, Action.REDUCE, Action.TIE)
"""Actions whose start others may wait for: their end is a node of its own."""


@dataclass(frozen=True)
class Waiting:
    """The graph of what waits for what.

    Attributes:
        nodes: how many. Node i < instructions is the start of instruction i.
        done: int64 per instruction, the node of its end; of most, its start.
        before, after: the edges.
        about: int64 per node, the instruction that it is about; a transfer is
            about its SEND, a meeting about the first instruction in it, and the start
            and end of a group about none: -1.
    """

    nodes: int
    done: Nodes
    before: Nodes
    after: Nodes
    about: Nodes

    @classmethod
    def of(
        cls,
        program: Program,
        streams: StreamModel = "dir",
        buffering: Buffering | None = "rendezvous",
    ) -> Waiting:
        """The graph of a program in which all messages are matched.

        Args:
            program: whose.
            streams: which of a device's streams are one.
            buffering: what a send waits for. None: only what holds under every
                buffering, so that what this graph orders is in order anyhow.
        """
        size = len(program)
        two_ended = np.flatnonzero(np.isin(program.action, TWO_ENDED))
        done = np.arange(size)
        done[two_ended] = size + np.arange(len(two_ended))
        transfer = size + len(two_ended)
        meeting = transfer + len(program.messages)
        edges = [(two_ended, done[two_ended])]
        edges += _transfers(program, done, transfer, buffering)
        met = meetings(program)
        for number, reduces in enumerate(met):
            middle = np.full(len(reduces), meeting + number)
            edges += [(reduces, middle), (middle, done[reduces])]
        # What stands around an instruction meets its group, if it has one.
        first, last = np.arange(size), done.copy()
        posted, group = program.groups.values, program.groups.owner
        issue = meeting + len(met)
        over = issue + len(program.groups)
        first[posted], last[posted] = issue + group, over + group
        edges += [(first[posted], posted), (done[posted], last[posted])]
        for row in in_turn(program, streams):
            before, after = row[:-1], row[1:]
            turns = (first[before] != first[after]) | (first[before] < size)
            edges.append((last[before[turns]], first[after[turns]]))
        waits = program.waits_for
        edges.append((last[waits.values], first[waits.owner]))
        firsts = np.array([reduces[0] for reduces in met], dtype=np.int64)
        send_of = program.send_of.astype(np.int64)
        nobody = np.full(2 * len(program.groups), -1)
        return cls(
            over + len(program.groups),
            done,
            np.concatenate([before for before, _ in edges]),
            np.concatenate([after for _, after in edges]),
            np.concatenate([np.arange(size), two_ended, send_of, firsts, nobody]),
        )

    def cycle(self, level: Nodes) -> list[int]:
        """The instructions along one cycle, each waiting for the next.

        Args:
            level: of each node; -1 on a cycle or behind one.
        """
        left = (level[self.before] < 0) & (level[self.after] < 0)
        # Each node that is left waits for one that is left: follow these back.
        back = dict(zip(self.after[left].tolist(), self.before[left].tolist()))
        place: dict[int, int] = {}
        node = min(back)
        while node not in place:
            place[node] = len(place)
            node = back[node]
        nodes = list(place)[place[node] :]
        ring = [self.about[n] for n in nodes if self.about[n] >= 0]
        # Nodes of one instruction stand together, but for the turn of the ring.
        result = [int(i) for n, i in enumerate(ring) if i != ring[n - 1]]
        return result or [int(ring[0])]


def _transfers(
    program: Program, done: Nodes, transfer: int, buffering: Buffering | None
) -> Iterator[tuple[Nodes, Nodes]]:
    send, recv = program.send_of.astype(np.int64), program.recv_of.astype(np.int64)
    under_way = transfer + np.arange(len(send))
    yield under_way, done[recv]
    if buffering is None or buffering == "rendezvous":
        yield send, under_way
        yield recv, under_way
    else:
        yield done[send], under_way
    if buffering == "rendezvous":
        yield under_way, done[send]
    elif isinstance(buffering, int):
        for members in program.by_stream:
            if len(members) and program.action[members[0]] == Action.SEND:
                late = members[buffering:]
                early = program.message[members[: len(late)]]
                yield done[recv[early]], done[late]


def deadlocks(
    program: Program,
    streams: StreamModel = "dir",
    buffering: Buffering = "rendezvous",
) -> tuple[Finding, ...]:
    """The cycle of waits, if there is one; takes linear time.

    Args:
        program: one whose messages `matching.mismatches` finds all matched.
        streams: which of a device's streams are one.
        buffering: what a send waits for.

    Raises:
        ParameterError: an unknown stream model or buffering.
    """
    known(streams, buffering)
    waiting = Waiting.of(program, streams, buffering)
    level = levels(waiting.nodes, waiting.before, waiting.after)
    stuck = level[waiting.done] < 0
    if not stuck.any():
        return ()
    ring = waiting.cycle(level)
    device = int(program.device[ring[0]])
    words = " waits for ".join(named(program, i) for i in [*ring, ring[0]])
    return (
        Finding(
            "deadlock",
            device,
            None,
            None,
            expected=f"a program that runs through with streams {streams!r} and "
            f"buffering {buffering!r}",
            found=f"a cycle of waits, and {int(stuck.sum()):,} instructions that never "
            f"end: {words}",
            remedy="Have both devices of a link come to its messages in one order, "
            "with no wait between them that the other side needs, or give the "
            "directions streams of their own",
            picture=drawn(program, ring),
        ),
    )


def known(streams: StreamModel, buffering: Buffering) -> None:
    """Refuse models that there are not.

    Raises:
        ParameterError: naming the argument.
    """
    if streams not in STREAM_MODELS:
        raise ParameterError(
            f"streams must be one of {', '.join(STREAM_MODELS)}, got {streams!r}"
        )
    if buffering in ("eager", "rendezvous"):
        return
    if not isinstance(buffering, int) or isinstance(buffering, bool) or buffering < 1:
        raise ParameterError(
            "buffering must be 'eager', 'rendezvous' or a number of messages of at "
            f"least 1, got {buffering!r}"
        )


def named(program: Program, index: int) -> str:
    """An instruction in words, with its device, its stream, and its group."""
    stream = program.streams[program.stream[index]]
    where = f"{index}, device {stream.device}, {stream}"
    if others := program.posted_with(index):
        where += f", posted with {', '.join(map(str, others))}"
    return f"{program.label(index)} ({where})"
