"""Schedule → Program: messages, streams, buffers and waits.

The lowering walks one canonical order that knows no costs: ops by the tick at
which each could run if every op took one tick and links were free, devices in
turn within a tick. At each step of it, a message's SEND and RECV are appended
together, so in the resulting list every instruction comes after all it can ever
wait for, a rendezvous with the other side included. No cycle of waits can
exist, whatever the transport buffers: the program cannot deadlock.

Where a step lies for a message is the policy:

* `receives="early"`: right behind the op that produces it. The receive is posted
  as soon as its buffer is free, long before the data is needed.
* `receives="late"`: right before the op that consumes it, or one that consumes
  a later message of the same link, since links are first in, first out. The
  receive also waits for the device's compute so far.
* `transfers="blocking"`: the sender's next op waits until the message is sent,
  as Megatron does without overlap; the step then lies no later than that op.
* `messages="grouped"`: where two devices exchange messages between the same two ops
  of each, both do so in one group; see `exchange`.
"""

from __future__ import annotations

from typing import Literal, get_args

from pipeproof.sched.buffers import how_of
from pipeproof.sched.conditions import conditions
from pipeproof.sched.errors import ParameterError, UnsupportedError
from pipeproof.sched.exchange import exchanges, groups_of
from pipeproof.sched.hops import Hops, handed_on
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.layout import BEFORE, BEHIND, lay_out
from pipeproof.sched.lists import Lists
from pipeproof.sched.nodes import Nodes, Streams
from pipeproof.sched.program import Program
from pipeproof.sched.storage import LoweredStorage
from pipeproof.sched.tying import with_sums, without_them

Transfers = Literal["overlapped", "blocking"]
Receives = Literal["early", "late"]
Messages = Literal["single", "grouped"]

POLICIES: dict[str, tuple[str, ...]] = {
    "transfers": get_args(Transfers),
    "receives": get_args(Receives),
    "messages": get_args(Messages),
}
"""The policies of lowering and their values, the default one first."""


def lower(
    schedule: Schedule,
    *,
    transfers: Transfers = "overlapped",
    receives: Receives = "early",
    messages: Messages = "single",
) -> Program:
    """What each device does on each of its streams.

    Args:
        schedule: one that `check` finds clean.
        transfers: beside the compute stream, or blocking the sender's.
        receives: posted as early as their buffers allow, or just in time.
        messages: each posted by itself, or what two devices exchange between two
            ops in one group, as torch's `batch_isend_irecv` does.

    Raises:
        ScheduleError: `check` has findings.
        ParameterError: an unknown policy.
        UnsupportedError: ops that are not lowered yet.
    """
    asked = {"transfers": transfers, "receives": receives, "messages": messages}
    for name, value in asked.items():
        if value not in POLICIES[name]:
            known = " or ".join(map(repr, POLICIES[name]))
            raise ParameterError(f"{name} must be {known}, got {value!r}")
    schedule.report.raise_if_bad()
    _supported(schedule)
    if not schedule.ties:
        return _lowered(schedule, transfers, receives, messages)
    program = _lowered(without_them(schedule), transfers, receives, messages)
    return with_sums(program, schedule, blocking=transfers == "blocking")


def _lowered(
    schedule: Schedule, transfers: Transfers, receives: Receives, messages: Messages
) -> Program:
    """The program of a clean schedule without the sums of its ties."""
    table = schedule.table
    nodes = Nodes.of(schedule)
    streams = Streams.of(schedule)
    hops = Hops.of(schedule, table, nodes, streams)
    blocking, late = transfers == "blocking", receives == "late"
    together = exchanges(nodes, hops) if messages == "grouped" else None
    handed = handed_on(hops, nodes, blocking, late, together)
    phase = BEFORE if late else BEHIND
    layout = lay_out(schedule, nodes, hops, handed, streams, phase)
    waits, took = conditions(
        schedule,
        table,
        nodes,
        hops,
        layout,
        how_of(table),
        blocking=blocking,
        late=late,
    )
    return Program(
        schedule,
        streams.streams,
        layout.stream,
        layout.action,
        layout.first_op,
        layout.op_count,
        layout.message,
        waits,
        LoweredStorage(schedule, hops, layout, took),
        Lists.of([]) if together is None else groups_of(together, layout),
    )


def _supported(schedule: Schedule) -> None:
    both = schedule.table
    if (both.has(Kind.R) & both.has(Kind.OFFLOAD)).any():
        raise UnsupportedError(
            f"{schedule.summary}: activations that are both offloaded and recomputed "
            "are not lowered; do one of the two for each micro-batch"
        )
    if schedule.steps > 1:
        raise UnsupportedError(
            f"{schedule.summary}: a schedule of several steps can be written and "
            "checked, but not lowered to a program yet; give it one step"
        )
