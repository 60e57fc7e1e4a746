"""Every edit of one instruction of a program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from programs import Part, assembled, parts_of

from pipeproof.sched import Action, Kind, Program

Edit = tuple[str, str, Program]
"""Kind of edit, in words, and what comes of it."""

SUMS = (Action.REDUCE, Action.TIE)


def edits_of_program(program: Program) -> Iterator[Edit]:
    """Every edit of one instruction."""
    for i in range(len(program)):
        part, label = parts_of(program)[i], f"{program.label(i)} ({i})"
        yield from _of_order(program, i, part, label)
        yield from _retargeted(program, i, part, label)
        yield from _of_buffers(program, i, part, label)
    yield from _of_slots(program)


def made(program: Program, edit: Callable[[list[Part]], Any]) -> Program:
    """The program after an edit of its parts, which is done at once."""
    parts = parts_of(program)
    edit(parts)
    return assembled(program, parts)


def changed(program: Program, i: int, **fields: Any) -> Program:
    """With other fields of one instruction."""
    parts = parts_of(program)
    parts[i] = replace(parts[i], **fields)
    return assembled(program, parts)


def _ends(program: Program, part: Part) -> str:
    """The name of what comes at the end of a step: sums, and STEPs behind them."""
    if part.action in SUMS:
        return Action(part.action).name
    stepping = part.op_count and program.schedule.ops.kind[part.first_op] == Kind.STEP
    return Kind.STEP.name if stepping else ""


def _kind(program: Program, part: Part) -> str:
    """What an edit is about, where the table tells it apart."""
    if name := _ends(program, part):
        return f" of a {name}"
    if part.message >= 0:
        message = program.message_at(part.message)
        if abs(message.source_stage - message.target_stage) > 1:
            return " of a skip"
    return ""


def _of_order(program: Program, i: int, part: Part, label: str) -> Iterator[Edit]:
    """It is missing, comes twice, at another time, or waits for less."""
    size, kind = len(program), _kind(program, part)
    yield f"drop{kind}", label, made(program, lambda parts: parts.pop(i))
    for to in range(i + 1, size + 1, 3):
        parts = parts_of(program)
        parts.insert(to, replace(part, key=-1))
        yield f"double{kind}", f"{label} to {to}", assembled(program, parts)
    for j in range(i):
        if program.stream[i] == program.stream[j]:
            parts = parts_of(program)
            parts[i], parts[j] = parts[j], parts[i]
            yield "swap on its stream", f"{label} with {j}", assembled(program, parts)
    for place, wait in enumerate(part.waits):
        fewer = [*part.waits[:place], *part.waits[place + 1 :]]
        words = f"{label}, wait {wait}"
        yield "drop a wait", words, changed(program, i, waits=fewer)
    for to in range(i if _ends(program, part) else 0):
        parts = parts_of(program)
        parts.insert(to, replace(parts.pop(i), waits=[]))
        name = f"early {_ends(program, part)}"
        yield name, f"{label} to {to}", assembled(program, parts)


def _retargeted(program: Program, i: int, part: Part, label: str) -> Iterator[Edit]:
    """It is for something else, or on another stream."""
    ops = program.schedule.ops
    of_kind = [n for n, k in enumerate(ops.kind) if k == ops.kind[part.first_op]]
    others: list[tuple[str, str, Any, Callable[[int], Any]]] = [
        ("another device or channel", "stream", range(len(program.streams)), str)
    ]
    if part.op_count == 1:
        name = "op of another stage or micro-batch"
        others.append((name, "first_op", of_kind, lambda n: ops[n]))
    if part.message >= 0:
        name = f"another message{_kind(program, part)}"
        every = range(len(program.messages))
        others.append((name, "message", every, program.message_at))
    for name, field, values, words in others:
        for value in values:
            if value != getattr(part, field):
                edited = changed(program, i, **{field: value})
                yield name, f"{label}: {field} {words(value)}", edited


def _of_buffers(program: Program, i: int, part: Part, label: str) -> Iterator[Edit]:
    """It touches another buffer of the same kind, or another one frees its own."""
    alike: dict[int, list[int]] = defaultdict(list)
    kinds = program.buffers[:, 0].tolist()
    for number, kind in enumerate(kinds):
        alike[kind].append(number)
    of = _kind(program, part) if _ends(program, part) in ("TIE", "STEP") else ""
    for verb in ("reads", "writes", "frees"):
        touched = getattr(part, verb)
        for place, buffer in enumerate(touched):
            for other in alike[kinds[buffer]]:
                if other != buffer:
                    new = [*touched[:place], other, *touched[place + 1 :]]
                    words = f"{label} {verb} {program.buffer_at(other)}"
                    edited = changed(program, i, **{verb: new})
                    yield f"{verb} another buffer{of}", words, edited
    for place, buffer in enumerate(part.frees):
        for to in range(len(program)):
            if to != i and program.device[to] == program.device[i]:
                parts = parts_of(program)
                parts[to].frees.append(parts[i].frees.pop(place))
                words = f"{program.buffer_at(buffer)} by {to} and not {i}"
                yield "freed elsewhere", words, assembled(program, parts)


def _of_slots(program: Program) -> Iterator[Edit]:
    """A buffer takes over the slot of another one of its device."""
    buffers = program.buffers
    for buffer in range(len(buffers)):
        for other in range(len(buffers)):
            alone = other != buffer and buffers[buffer, 5] != other
            if alone and buffers[other, 1] == buffers[buffer, 1]:
                words = f"{program.buffer_at(buffer)} in {program.buffer_at(other)}"
                edited = assembled(program, parts_of(program), {buffer: other})
                yield "another's slot", words, edited
