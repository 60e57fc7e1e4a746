"""What would make a step shorter: what 1 % less of each thing buys.

With the order of everything given, and no links shared, the makespan is the longest
of all paths through the program, and so a convex function of its durations. Taking
the part x off the time of some instructions therefore shortens it by no more than x
times what the critical path spends in them, and by less where another path then
becomes the longest. The first is read off one simulation; the second, the truth,
needs another simulation for each group of instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Program, Schedule, Trace, lower
from pipeproof.sched.causes import Causes
from pipeproof.sched.errors import ParameterError, UnsupportedError
from pipeproof.sched.exact import Number, is_number, plain
from pipeproof.sched.parts import Index, name_of, totals
from pipeproof.sim.cluster import Cluster
from pipeproof.sim.cost import Cost
from pipeproof.sim.engine import play
from pipeproof.sim.predict import simulate
from pipeproof.sim.replay import all_waits, replay
from pipeproof.sim.timing import LONGEST, Timing
from pipeproof.sim.topology import contended
from pipeproof.sim.waits import turns

By = Literal["stage", "device"]


@dataclass(frozen=True, slots=True)
class Gain:
    """What less time for some of the instructions buys.

    Attributes:
        name: what they do: `stage 1 F`, `device 1`, `link 0→1 transfer`.
        time: of all of them together.
        critical: what the critical path spends in them.
        most: what the gain would be if the critical path stayed the longest; no
            gain is larger, but where links are shared.
        gain: by how much the makespan gets shorter.
    """

    name: str
    time: Number
    critical: Number
    most: Number
    gain: Number


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What each group of instructions would buy.

    Attributes:
        makespan: as it is.
        less: the part that was taken off the time of each group.
        gains: the largest gain first.
    """

    makespan: Number
    less: Number
    gains: tuple[Gain, ...]


def sensitivity(
    schedule: Schedule | Program,
    cost: Cost | None = None,
    cluster: Cluster | None = None,
    *,
    less: Number = Fraction(1, 100),
    by: By = "stage",
) -> Sensitivity:
    """How much sooner a step ends if one thing takes less time.

    The groups are, of ops, each stage's F, B, I, W, … or each device's; of each
    link its transfers and its latency; the copies of each device to and from its
    host; the reductions of each stage. Those that take no time are left out. A part
    x less time for transfers is what 1 / (1 - x) times the bandwidth comes to.

    Args:
        schedule: lowered with the default policies; a Program where others are
            wanted.
        cost: as in `simulate`.
        cluster: likewise.
        less: the part that is taken off a group's time, above 0 and at most 1.
        by: how ops are grouped.

    Raises:
        ParameterError: `less` out of range or an unknown grouping; else as
            `simulate`.
    """
    if not is_number(less) or not 0 < less <= 1:
        raise ParameterError(
            f"less must be a part of the time, above 0 and at most 1, got {less!r}"
        )
    if by not in get_args(By):
        raise ParameterError(f"by must be 'stage' or 'device', got {by!r}")
    cost, cluster = cost or Cost(), cluster or Cluster()
    program = schedule if isinstance(schedule, Program) else lower(schedule)
    trace = simulate(program, cost, cluster)
    names, group = _groups(trace, by)
    turn = turns(program, cluster)
    parts = Causes(trace, (turn, all_waits(program, turn, cluster))).critical
    spent = totals(group[parts.instruction], parts.duration)
    timing = Timing.of(program, cost, cluster, trace.sizes)
    own = _own_time(program, timing)
    shared = contended(program, cluster)
    gains = []
    for number, time in totals(group, own).items():
        if not time:
            continue
        critical = spent.get(number, 0)
        gain: Any = 0
        # Beside the critical path nothing is gained, unless transfers share links:
        # then less of one thing changes how long others take.
        if critical or shared:
            shorter = _shortened(program, timing, group == number, less)
            gain = trace.makespan - _makespan(program, shorter, cluster)
        gains.append(
            Gain(
                names[number],
                _unscaled(time, timing.scale),
                critical,
                plain(critical * less),
                plain(gain),
            )
        )
    gains.sort(key=lambda one: (-one.gain, -one.critical, one.name))
    return Sensitivity(trace.makespan, less, tuple(gains))


def _groups(trace: Trace, by: By) -> tuple[list[str], Index]:
    """The groups' names, and the group of each instruction."""
    program = trace.program
    names, group = name_of(trace, np.arange(len(program)), kinds=True)
    if by == "stage":
        return names, group
    computes = program.computes
    group = group.copy()
    group[computes] = len(names) + program.device[computes]
    devices = range(program.schedule.devices)
    return [*names, *(f"device {device}" for device in devices)], group


def _own_time(program: Program, timing: Timing) -> NDArray[Any]:
    """How long each takes by itself; of a RECV, how long its message is under way."""
    own = timing.durations.copy()
    own[program.recv_of] = timing.latencies
    return own


def _unscaled(time: Any, scale: int | None) -> Number:
    return plain(time if scale is None else Fraction(time, scale))


def _shortened(
    program: Program, timing: Timing, which: NDArray[np.bool_], less: Number
) -> Timing:
    """The timing with the part `less` taken off some instructions' time."""
    of_message = which[program.recv_of]
    durations, latencies = timing.durations, timing.latencies
    if timing.scale is None or isinstance(less, float):
        scale = timing.scale or 1
        durations, latencies = durations / scale, latencies / scale
        stays = 1 - float(less)
        return Timing.each(
            np.where(which, durations * stays, durations),
            np.where(of_message, latencies * stays, latencies),
            None,
        )
    below = Fraction(less).denominator
    longest = below * (sum(durations.tolist()) + sum(latencies.tolist()))
    if longest >= LONGEST:
        durations, latencies = durations.astype(object), latencies.astype(object)
    stays = below - Fraction(less).numerator
    return Timing.each(
        durations * np.where(which, stays, below),
        latencies * np.where(of_message, stays, below),
        timing.scale * below,
    )


def _makespan(program: Program, timing: Timing, cluster: Cluster) -> Number:
    try:
        _, end = replay(program, timing, cluster)
    except UnsupportedError:
        _, end = play(program, timing, cluster)
    latest = max(end.tolist(), default=0)
    return plain(latest if timing.scale is None else Fraction(latest) / timing.scale)
