"""Whether programs are right: `prove`, and a player of programs in random orders."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from playing import computes_the_gradient, slots_of
from program_edits import edits_of_program
from tally import Tallies, Tally

from pipeproof.sched import Action, BufferKind, Program, prove
from pipeproof.sched.instructions import StreamKind

RUNS = 12
"""Random orders in which a program has to be right."""
MORE_RUNS = 30
"""As many, and as many more twice, before a refuted program is called right."""

Event = tuple[str, int]


class Stubborn:
    """Dice that fix what goes first, and so reach orders that even odds seldom do.

    Args:
        seed: of the order.
        late: an event that goes only when nothing else can, and one that goes last
            of all: a use of a buffer that is put off until just before another one.
    """

    def __init__(self, seed: int, late: tuple[Event, ...] = ()) -> None:
        self._dice = random.Random(seed)
        self._first = {event: -1 - place for place, event in enumerate(late)}
        self.random = self._dice.random

    def choice(self, events: list[Any]) -> Any:
        """Of events (what, instruction) the one that goes first."""

        def rank(event: Any) -> float:
            key = event[0].__name__, event[1]
            return self._first.setdefault(key, self._dice.random())

        return max(events, key=rank)


def plays_right(program: Program, runs: int) -> bool:
    """Whether a program is of the right form, and right in many orders.

    In `runs` random ones; and then as many as two uses of one slot on two streams
    can be put off for each other, but no more than twice `runs`.
    """
    if not well_formed(program):
        return False
    dice = random.Random(0)
    late = list(put_off(program))
    dice.shuffle(late)
    orders: list[Any] = [random.Random(seed) for seed in range(runs // 2)]
    orders += [Stubborn(seed) for seed in range(runs // 2)]
    orders += [Stubborn(seed, pair) for seed, pair in enumerate(late[: 2 * runs])]
    for order in orders:
        try:
            if not computes_the_gradient(program, order):
                return False
        except (KeyError, AssertionError, IndexError, ValueError):
            return False  # what has no meaning is not right either
    return True


def put_off(program: Program) -> Iterator[tuple[Event, Event]]:
    """Ends and starts of two instructions that use a slot, on different streams."""
    users: dict[int, set[int]] = defaultdict(set)
    slot = slots_of(program)
    for it in program:
        for buffer in (*it.reads, *it.writes, *it.frees):
            users[slot[buffer.index]].add(it.index)
    for several in users.values():
        for one in several:
            for other in several:
                if program.stream[one] != program.stream[other]:
                    yield ("end", one), ("start", other)
                    yield ("end", one), ("end", other)


def well_formed(program: Program) -> bool:
    """Whether each instruction says what is the case: device, stream and message.

    The player takes a tensor to wherever the k-th receive of its link wants it, and
    any buffer from anywhere. A device has its own only, and the executor takes the
    message at its name.
    """
    try:
        slots_of(program)
    except ValueError:
        return False
    for it in program:
        stream, message = it.stream, it.message
        for buffer in (*it.reads, *it.writes, *it.frees):
            if buffer.device != stream.device and buffer.kind != BufferKind.OFFLOADED:
                return False
            ends = program.buffers[[buffer.index, buffer.takes_over]]
            sums = np.isin(ends[:, 0], (BufferKind.GRADIENT, BufferKind.TIED))
            if buffer.takes_over >= 0 and sums.any():
                return False
        moves = stream.kind in (StreamKind.SEND, StreamKind.RECV)
        if moves != (message is not None) or (
            (it.action in (Action.COMPUTE, Action.LOCAL))
            != (stream.kind == StreamKind.COMPUTE)
        ):
            return False
        if message is not None:
            sends = it.action == Action.SEND
            own = message.send if sends else message.recv
            if stream.link != (message.source, message.target) or own != it.index:
                return False
    return True


def of_programs(programs: list[Program], most: int) -> Tallies:
    """The tallies of at most so many random edits of each kind of each program."""
    tallies: Tallies = defaultdict(Tally)
    dice = random.Random(0)
    for program in programs:
        assert prove(program).ok
        assert plays_right(program, RUNS)
        of_kind: dict[str, list[tuple[str, Program]]] = defaultdict(list)
        for name, what, mutant in edits_of_program(program):
            of_kind[name].append((what, mutant))
        for name, mutants in of_kind.items():
            for what, mutant in dice.sample(mutants, min(most, len(mutants))):
                ours = prove(mutant).ok
                theirs = plays_right(mutant, RUNS if ours else MORE_RUNS)
                words = f"{program.schedule.summary}: {name}: {what}"
                tallies[name].add(ours, theirs, words)
        print(program.schedule.summary, file=sys.stderr, flush=True)
    return tallies
