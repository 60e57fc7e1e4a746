"""Every edit of one instruction of a program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from programs import Part, assembled, parts_of

from pipeproof.sched import Action, Program


def edits_of_program(program: Program) -> Iterator[tuple[str, str, Program]]:
    """(kind of edit, in words, program) of every edit of one instruction."""
    size, buffers = len(program), program.buffers
    kinds = buffers[:, 0].tolist()
    alike: dict[int, list[int]] = defaultdict(list)
    for number, kind in enumerate(kinds):
        alike[kind].append(number)

    def made(edit: Any) -> Program:
        parts = parts_of(program)
        edit(parts)
        return assembled(program, parts)

    for i in range(size):
        part, label = parts_of(program)[i], f"{program.label(i)} ({i})"
        yield "drop", label, made(lambda parts, i=i: parts.pop(i))
        for to in range(i + 1, size + 1, 3):

            def doubled(parts: list[Part], i: int = i, to: int = to) -> None:
                parts.insert(to, replace(parts[i], key=-1))

            yield "double", f"{label} to {to}", made(doubled)
        for j in range(i):
            if program.stream[i] == program.stream[j]:

                def swapped(parts: list[Part], i: int = i, j: int = j) -> None:
                    parts[i], parts[j] = parts[j], parts[i]

                yield "swap on its stream", f"{label} with {j}", made(swapped)
        for verb in ("reads", "writes", "frees"):
            for place, buffer in enumerate(getattr(part, verb)):
                for other in alike[kinds[buffer]]:
                    if other != buffer:

                        def retargeted(
                            parts: list[Part],
                            i: int = i,
                            verb: str = verb,
                            place: int = place,
                            other: int = other,
                        ) -> None:
                            getattr(parts[i], verb)[place] = other

                        words = f"{label} {verb} {program.buffer_at(other)}"
                        yield f"{verb} another buffer", words, made(retargeted)
        if part.op_count == 1:
            ops = program.schedule.ops
            for other, kind in enumerate(ops.kind.tolist()):
                if other != part.first_op and kind == ops.kind[part.first_op]:

                    def renamed(
                        parts: list[Part], i: int = i, other: int = other
                    ) -> None:
                        parts[i].first_op = other

                    words = f"{label} as {ops[other]}"
                    yield "op of another stage or micro-batch", words, made(renamed)
        if part.message >= 0:
            for other in range(len(program.messages)):
                if other != part.message:

                    def carrying(
                        parts: list[Part], i: int = i, other: int = other
                    ) -> None:
                        parts[i].message = other

                    words = f"{label} for {program.message_at(other)}"
                    yield "another message", words, made(carrying)
        for stream in range(len(program.streams)):
            if stream != part.stream:

                def on_another(
                    parts: list[Part], i: int = i, stream: int = stream
                ) -> None:
                    parts[i].stream = stream

                words = f"{label} on {program.streams[stream]}"
                yield "another device or channel", words, made(on_another)
        for place in range(len(part.waits)):
            yield (
                "drop a wait",
                f"{label}, wait {part.waits[place]}",
                made(lambda parts, i=i, place=place: parts[i].waits.pop(place)),
            )
        for place, buffer in enumerate(part.frees):
            for to in range(size):
                if to != i and program.device[to] == program.device[i]:

                    def freed(
                        parts: list[Part],
                        i: int = i,
                        place: int = place,
                        to: int = to,
                    ) -> None:
                        parts[to].frees.append(parts[i].frees.pop(place))

                    words = f"{program.buffer_at(buffer)} by {to} and not {i}"
                    yield "freed elsewhere", words, made(freed)
        if part.action == Action.REDUCE:
            for to in range(i):

                def early(parts: list[Part], i: int = i, to: int = to) -> None:
                    moved = parts.pop(i)
                    moved.waits = []
                    parts.insert(to, moved)

                yield "early REDUCE", f"{label} to {to}", made(early)
    for buffer in range(len(buffers)):
        for other in range(len(buffers)):
            if other != buffer and buffers[other, 1] == buffers[buffer, 1]:
                if buffers[buffer, 5] == other:
                    continue
                words = f"{program.buffer_at(buffer)} in {program.buffer_at(other)}"
                parts = parts_of(program)
                yield (
                    "another's slot",
                    words,
                    assembled(program, parts, {buffer: other}),
                )
