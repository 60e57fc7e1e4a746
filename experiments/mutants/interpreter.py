"""An interpreter of schedules: a second opinion that shares no code with `check`."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

from terms import of_loss, reference, term

from pipeproof.sched import Kind, Op, Schedule

Rows = list[list[list[Op]]]
"""For each device its ops in order, those of an overlap group together."""


NO_SKIPS: list[str] = []
"""What comes from, or goes to, stages further away: in these schedules nothing."""


class Interpreter:
    """Devices that go through their rows and take tensors from named mailboxes.

    A device waits at an op until what it takes is there. What nobody takes away is a
    fault, as a send without its receive is.
    """

    def __init__(self, schedule: Schedule, rows: Rows) -> None:
        self.schedule = schedule
        self.rows = [deque(row) for row in rows]
        self.again = {
            (op.stage, op.micro_batch, op.slice)
            for row in rows
            for group in row
            for op in group
            if op.kind == Kind.R
        }
        self.mail: dict[tuple[Any, ...], deque[str]] = defaultdict(deque)
        self.kept: dict[tuple[Any, ...], str] = {}
        self.sums: dict[tuple[int, int], list[str]] = defaultdict(list)
        self.waiting: dict[int, dict[int, list[str]]] = defaultdict(dict)

    def right(self) -> bool:
        """Whether all run to their end, and leave the right gradients and no mail."""
        moved = True
        while moved:
            moved = False
            for device, row in enumerate(self.rows):
                while row and self.ready(device, row[0]):
                    for op in row.popleft():
                        if not self.run(device, op):
                            return False
                    moved = True
        if any(self.rows) or any(self.mail.values()):
            return False
        homes = self.homes
        if any(set(met) != homes[stage] for stage, met in self.waiting.items()):
            return False
        replicas = {s for s, home in enumerate(homes) if len(home) > 1}
        if replicas - set(self.waiting):
            return False
        return all(
            sorted(self.sums[stage, device]) == wanted
            for stage, wanted in enumerate(reference(self.schedule))
            for device in homes[stage]
        )

    @property
    def homes(self) -> list[set[int]]:
        """The devices of each stage."""
        return [set(pipe) for pipe in zip(*self.schedule.placement.pipes)]

    def home(self, op: Op, stage: int) -> int:
        """Where a stage of the op's micro-batch is."""
        pipe = self.schedule.pipe_of[op.micro_batch]
        return self.schedule.placement.pipes[pipe][stage]

    def ready(self, device: int, group: list[Op]) -> bool:
        """Whether what it takes from others is there, ahead of the whole group."""
        for kind, s, m, q in group:
            if kind == Kind.F and s > 0 and not self.mail[device, "x", s, m, q]:
                return False
            last = s == self.schedule.stages - 1
            waits = kind in (Kind.B, Kind.I) and not last
            if waits and not self.mail[device, "g", s, m, q]:
                return False
        return True

    def take(self, *key: Any) -> str | None:
        """Out of a mailbox."""
        return self.mail[key].popleft() if self.mail[key] else None

    def run(self, device: int, op: Op) -> bool:
        """One op; whether it found all that it needs."""
        kind, s, m, q = op
        if s >= self.schedule.stages or device not in self.homes[s]:
            return False
        if kind == Kind.REDUCE:
            return self.reduce(device, s)
        of, kept = (device, s, m, q), self.kept
        if kind in (Kind.F, Kind.R):
            if kind == Kind.R:
                x = kept.get(("x", *of))
            else:
                x = term("batch", m, q) if s == 0 else self.take(device, "x", s, m, q)
            if x is None:
                return False
            earlier = kept.get(("kv", device, s, m, q - 1))
            act = term("act", s, m, q, x, earlier, NO_SKIPS)
            kept["x", *of], kept["kv", *of] = x, act
            kept["loss", *of] = of_loss(m, q, act)
            if kind == Kind.R or (s, m, q) not in self.again:
                kept["act", *of] = act
            if kind == Kind.F and s + 1 < self.schedule.stages:
                there = self.home(op, s + 1)
                self.mail[there, "x", s + 1, m, q].append(term("out", act))
            return True
        if kind == Kind.W:
            stash, x = kept.pop(("stash", *of), None), kept.pop(("x", *of), None)
            if stash is None or x is None:
                return False
            self.sums[s, device].append(term("grad", s, stash, x, NO_SKIPS))
            return True
        if kind in (Kind.OFFLOAD, Kind.RELOAD):
            way = ("act", "away") if kind == Kind.OFFLOAD else ("away", "act")
            act = kept.pop((way[0], *of), None)
            if act is None:
                return False
            kept[way[1], *of] = act
            return True
        act = kept.pop(("act", *of), None)
        last = s == self.schedule.stages - 1
        g = kept.get(("loss", *of)) if last else self.take(device, "g", s, m, q)
        if act is None or g is None:
            return False
        later = kept.get(("dkv", device, s, m, q + 1))
        dx = term("dx", s, act, g, later, NO_SKIPS)
        stash = term("stash", act, act, g, later, NO_SKIPS)
        kept["dkv", *of] = dx
        if s > 0:
            self.mail[self.home(op, s - 1), "g", s - 1, m, q].append(dx)
        if kind == Kind.I:
            kept["stash", *of] = stash
            return True
        x = kept.pop(("x", *of), None)
        if x is None:
            return False
        self.sums[s, device].append(term("grad", s, stash, x, NO_SKIPS))
        return True

    def reduce(self, device: int, stage: int) -> bool:
        """The last one to come adds up what each of them brought."""
        met = self.waiting[stage]
        if device in met:
            return False
        met[device] = list(self.sums[stage, device])
        if set(met) == self.homes[stage]:
            for there in met:
                self.sums[stage, there] = [t for part in met.values() for t in part]
        return True
