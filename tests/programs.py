"""Programs edited by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from pipeproof.sched import Action, Program
from pipeproof.sched.lists import Lists
from pipeproof.sched.program import Stored


@dataclass
class Part:
    """One instruction, to be edited. `key` is its number in the first program."""

    key: int
    stream: int
    action: int
    first_op: int
    op_count: int
    message: int
    waits: list[int]
    reads: list[int]
    writes: list[int]
    frees: list[int]
    group: int = -1


def parts_of(program: Program) -> list[Part]:
    """Every instruction."""
    return [
        Part(
            i,
            int(program.stream[i]),
            int(program.action[i]),
            int(program.first_op[i]),
            int(program.op_count[i]),
            int(program.message[i]),
            program.waits_for[i],
            program.reads[i],
            program.writes[i],
            program.frees[i],
            int(program.group[i]),
        )
        for i in range(len(program))
    ]


def assembled(
    program: Program,
    parts: list[Part],
    takes_over: dict[int, int] | None = None,
) -> Program:
    """The program of these instructions, in this order.

    Waits for instructions that are gone are gone, and so are these from their
    groups; messages name the first instruction that sends and receives them, or -1.
    """
    place: dict[int, int] = {}
    for i, part in enumerate(parts):
        place.setdefault(part.key, i)
    messages, buffers = program.messages.copy(), program.buffers.copy()
    messages[:, 8:] = -1
    for i, part in reversed(list(enumerate(parts))):
        if part.message >= 0:
            messages[part.message, 8 + (part.action == Action.RECV)] = i
    for buffer, other in (takes_over or {}).items():
        buffers[buffer, 5] = other
    waits = [[place[key] for key in part.waits if key in place] for part in parts]

    def column(name: str) -> np.ndarray:
        return np.array(
            [getattr(part, name) for part in parts], dtype=getattr(program, name).dtype
        )

    return replace(
        program,
        stream=column("stream"),
        action=column("action"),
        first_op=column("first_op"),
        op_count=column("op_count"),
        message=column("message"),
        waits_for=Lists.of(waits),
        storage=Stored(
            messages,
            buffers,
            Lists.of([part.reads for part in parts]),
            Lists.of([part.writes for part in parts]),
            Lists.of([part.frees for part in parts]),
            program.buffer_skips,
        ),
        groups=Lists.of(
            [
                [i for i, part in enumerate(parts) if part.group == number]
                for number in sorted({part.group for part in parts} - {-1})
            ]
        ),
    )


def mutant(program: Program, dice: random.Random) -> tuple[str, Program]:
    """The program after one edit, and the edit's name; a few change nothing."""
    parts, takes_over = parts_of(program), {}
    at = dice.randrange(len(parts))
    part = parts[at]
    edits = ["drop", "double", "swap", "read", "write", "free", "message", "op"]
    edits += ["wait", "wait", "early reduce", "early free", "slot", "slot", "group"]
    edit = dice.choice(edits)
    match edit:
        case "drop":
            del parts[at]
        case "double":
            parts.insert(dice.randrange(at, len(parts)) + 1, replace(part, key=-1))
        case "swap":
            same = [i for i, p in enumerate(parts) if p.stream == part.stream]
            to = dice.choice(same)
            parts[at], parts[to] = parts[to], parts[at]
        case "read" | "write" | "free":
            lists = {"read": "reads", "write": "writes", "free": "frees"}
            part = dice.choice([p for p in parts if getattr(p, lists[edit])])
            buffers = getattr(part, lists[edit])
            place = dice.randrange(len(buffers))
            kind = program.buffers[buffers[place], 0]
            alike = np.flatnonzero(program.buffers[:, 0] == kind).tolist()
            buffers[place] = dice.choice(alike)
        case "message":
            speak = [p for p in parts if p.message >= 0]
            if speak:
                dice.choice(speak).message = dice.randrange(len(program.messages))
        case "op":
            part = dice.choice([p for p in parts if p.op_count])
            kind = program.schedule.ops.kind[part.first_op]
            alike = np.flatnonzero(program.schedule.ops.kind == kind).tolist()
            part.first_op = dice.choice(alike)
        case "wait":
            waiting = [p for p in parts if p.waits]
            if waiting:
                part = dice.choice(waiting)
                del part.waits[dice.randrange(len(part.waits))]
        case "early reduce":
            summing = (Action.REDUCE, Action.TIE)
            reducing = [i for i, p in enumerate(parts) if p.action in summing]
            if reducing:
                part = parts.pop(dice.choice(reducing))
                part.waits = part.waits[1:] if dice.random() < 0.5 else []
                parts.insert(0, part)
        case "early free":
            part = dice.choice([p for p in parts if p.frees])
            device = program.device[part.key]
            others = [p for p in parts if program.device[p.key] == device]
            dice.choice(others).frees.append(part.frees.pop())
        case "group":
            speak = [p for p in parts if p.message >= 0]
            if speak:
                here = program.device[dice.choice(speak).key]
                mine = [p for p in speak if program.device[p.key] == here]
                for part in dice.sample(mine, min(len(mine), 2)):
                    part.group = len(parts) + at
        case "slot":
            buffer, other = (dice.randrange(len(program.buffers)) for _ in range(2))
            if program.buffers[buffer, 1] == program.buffers[other, 1]:
                takes_over[buffer] = other
    return edit, assembled(program, parts, takes_over)
