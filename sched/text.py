"""The text form of a schedule, both ways.

    name: 1f1b
    devices: 2
    placement: linear
    micro-batches: 3
    slices: 1
    steps: 1

    device 0 | 0F0 0F1 0B0 0F2 0B1 0B2
    device 1 | 1F0 1B0 1F1 1B1 1F2 1B2

An op is stage, kind, micro-batch and, after a point, a slice other than 0:
`2F0`, `2F0.1`. `2REDUCE` and `2STEP` have no micro-batch, but the number of a
step other than 0. Each op stands once; `2REDUCE` and `2STEP` once on each device.
`(0F1&3B0)` is an overlap group. With more than one pipe a
line `pipes: 0-3 | 4-7` says which micro-batches travel which. Where OFFLOADs go to
another device's memory, `offload-to: 1 host` says for each device to which. Where
stages hand tensors straight to later ones, `skips: 0>3 1>3` says which; where they
share parameters, `ties: 0=3`. Blank lines and lines that open with `#` are skipped;
`slices` and `steps` default to 1, `offload-to` to the host for all, `skips` and `ties`
to none.

Reading never runs code, accepts ASCII only (but in the name), and bounds every
size before it allocates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError, ParseError
from pipeproof.sched.ir import (
    MAX_NUMBER,
    RESERVED_WORDS,
    STAGE_KINDS,
    Kind,
    Op,
    Ops,
    Schedule,
    check_name,
)
from pipeproof.sched.placement import Placement
from pipeproof.sched.skips import format_skips, parse_skips
from pipeproof.sched.ties import format_ties, parse_ties

HOST = "host"
MAX_TEXT_BYTES = 1 << 26
MAX_MICRO_BATCHES = 1 << 22

_WORDS = {kind.name: kind for kind in Kind}
_NUMBER = "0|[1-9][0-9]{0,9}"
_OP = re.compile(rf"({_NUMBER})([A-Z]+)(?:({_NUMBER})(?:\.({_NUMBER}))?)?", re.ASCII)
_DEVICE = re.compile(rf"device ({_NUMBER}) \|(.*)", re.ASCII)
_HEADER = re.compile(r"([a-z][a-z-]*):(.*)", re.ASCII)
_KEYS = (
    "name",
    "devices",
    "placement",
    "micro-batches",
    "slices",
    "steps",
    "pipes",
    "offload-to",
    "skips",
    "ties",
)


def format_schedule(schedule: Schedule) -> str:
    """The text form, ending in a newline."""
    head = [
        f"name: {schedule.name}",
        f"devices: {schedule.devices}",
        f"placement: {schedule.placement.format(schedule.devices)}",
        f"micro-batches: {schedule.micro_batches}",
        f"slices: {schedule.slices}",
        f"steps: {schedule.steps}",
    ]
    if len(schedule.placement.pipes) > 1:
        head.append(f"pipes: {_format_pipes(schedule)}")
    if schedule.offloads_to_devices:
        words = [HOST if d is None else str(d) for d in schedule.offload_to]
        head.append(f"offload-to: {' '.join(words)}")
    if schedule.skips:
        head.append(f"skips: {format_skips(schedule.skips)}")
    if schedule.ties:
        head.append(f"ties: {format_ties(schedule.ties)}")
    rows = [
        " ".join([f"device {device} |", *words_of(schedule.row(device))])
        for device in range(schedule.devices)
    ]
    return "\n".join([*head, "", *rows]) + "\n"


def words_of(row: Ops, *, short: bool = False) -> list[str]:
    """Each op of a row as written, an overlap group as one word.

    Args:
        row: ops in order.
        short: without stages, `F0` for `2F0`.
    """
    groups: list[list[str]] = []
    for op, inside in zip(row, row.joined.tolist()):
        word = op.short if short else str(op)
        if inside:
            groups[-1].append(word)
        else:
            groups.append([word])
    return [g[0] if len(g) == 1 else f"({'&'.join(g)})" for g in groups]


def _format_pipes(schedule: Schedule) -> str:
    groups = []
    for pipe in range(len(schedule.placement.pipes)):
        members = np.flatnonzero(schedule.pipe_of == pipe)
        runs = np.split(members, np.flatnonzero(np.diff(members) != 1) + 1)
        groups.append(
            " ".join(
                str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
                for run in runs
                if len(run)
            )
        )
    return " | ".join(groups)


def parse_schedule(text: str) -> Schedule:
    """Read the text form.

    Raises:
        ParseError: with line and column, what was expected and found.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise ParseError(
            f"a text form of {len(text):,} characters exceeds {MAX_TEXT_BYTES:,}: "
            "generate so long a schedule instead of reading it"
        )
    header: dict[str, tuple[int, str]] = {}
    rows: list[Ops] = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip(" ") or line.startswith("#"):
            continue
        if match := _DEVICE.fullmatch(line):
            if int(match[1]) != len(rows):
                raise _wrong(number, line, 7, f"device {len(rows)}", match[1])
            rows.append(parse_row(number, line, match.start(2)))
        elif (match := _HEADER.fullmatch(line)) and not rows:
            if match[1] not in _KEYS:
                raise _wrong(number, line, 0, f"one of {', '.join(_KEYS)}", match[1])
            if match[1] in header:
                raise _wrong(number, line, 0, "each header once", match[1])
            header[match[1]] = number, match[2].strip(" ")
        else:
            expected = "`device N | ops`" if rows else "`key: value` or `device N | …`"
            raise _wrong(number, line, 0, expected, line)
    return _assemble(header, rows)


def _assemble(header: dict[str, tuple[int, str]], rows: list[Ops]) -> Schedule:
    def size(key: str, default: int | None = None) -> int:
        if key not in header:
            if default is not None:
                return default
            raise ParseError(f"the header lacks `{key}: …`: add it above the devices")
        line, value = header[key]
        if not re.fullmatch(_NUMBER, value, re.ASCII) or not int(value) > 0:
            raise ParseError(f"line {line}: {key}: expected a size, found {value!r}")
        if int(value) > MAX_MICRO_BATCHES:
            raise ParseError(
                f"line {line}: {key}: {value} exceeds {MAX_MICRO_BATCHES:,}"
            )
        return int(value)

    devices = size("devices")
    if len(rows) != devices:
        raise ParseError(
            f"the header says {devices} devices, found {len(rows)} device lines: "
            "give each device a line, if an empty one"
        )
    if "placement" not in header:
        raise ParseError("the header lacks `placement: …`: add it above the devices")
    micro_batches, steps = size("micro-batches"), size("steps", 1)
    if micro_batches * steps > MAX_MICRO_BATCHES:
        raise ParseError(
            f"{steps} steps of {micro_batches} micro-batches exceed "
            f"{MAX_MICRO_BATCHES:,}"
        )
    slices = size("slices", 1)
    line, name = header.get("name", (0, "schedule"))
    with _at_line(line):
        check_name(name)
    line, value = header["placement"]
    with _at_line(line):
        placement = Placement.parse(value, devices)
    pipe_of = _parse_pipes(header, len(placement.pipes), micro_batches * steps)
    offload_to = _parse_offload_to(header, devices)
    number, value = header.get("skips", (0, ""))
    skips = parse_skips(value, f"line {number}: skips")
    number, value = header.get("ties", (0, ""))
    ties = parse_ties(value, f"line {number}: ties")
    with _at_line(line):
        return Schedule.of(
            rows,
            name=name,
            placement=placement,
            micro_batches=micro_batches,
            slices=slices,
            steps=steps,
            pipe_of=pipe_of,
            offload_to=offload_to,
            skips=skips,
            ties=ties,
        )


@contextmanager
def _at_line(number: int) -> Iterator[None]:
    """Say on which line a header breaks a rule of what it describes."""
    try:
        yield
    except (ParseError, ParameterError) as error:
        raise ParseError(f"line {number}: {error}") from None


def _parse_pipes(
    header: dict[str, tuple[int, str]], pipes: int, micro_batches: int
) -> NDArray[np.int16] | None:
    if "pipes" not in header:
        return None
    line, value = header["pipes"]
    where = f"line {line}: pipes"
    result = np.full(micro_batches, -1, dtype=np.int16)
    groups = value.split("|")
    if len(groups) != pipes:
        raise ParseError(f"{where}: expected {pipes} groups, found {len(groups)}")
    for pipe, group in enumerate(groups):
        for word in group.split():
            match = re.fullmatch(rf"({_NUMBER})(?:-({_NUMBER}))?", word, re.ASCII)
            if not match:
                raise ParseError(f"{where}: expected N or N-N, found {word[:40]!r}")
            low, high = int(match[1]), int(match[2] or match[1])
            if not low <= high < micro_batches:
                raise ParseError(
                    f"{where}: {word} lies outside 0-{micro_batches - 1}, the "
                    "micro-batches of all steps"
                )
            if (result[low : high + 1] >= 0).any():
                raise ParseError(f"{where}: {word} names a micro-batch twice")
            result[low : high + 1] = pipe
    if (result < 0).any():
        missing = int(np.flatnonzero(result < 0)[0])
        raise ParseError(f"{where}: micro-batch {missing} has no pipe")
    return result


def _parse_offload_to(
    header: dict[str, tuple[int, str]], devices: int
) -> list[int | None] | None:
    if "offload-to" not in header:
        return None
    line, value = header["offload-to"]
    where = f"line {line}: offload-to"
    words = value.split()
    if len(words) != devices:
        raise ParseError(
            f"{where}: expected {devices} words, one a device, found {len(words)}"
        )
    for word in words:
        known = word == HOST or re.fullmatch(_NUMBER, word, re.ASCII)
        if not known or (word != HOST and int(word) > MAX_NUMBER):
            raise ParseError(
                f"{where}: expected a device or {HOST!r}, found {word[:40]!r}"
            )
    return [None if word == HOST else int(word) for word in words]


def parse_row(number: int, line: str, start: int) -> Ops:
    """The ops of a line from `start` on; its number is for messages.

    Raises:
        ParseError: with line and column, what was expected and found.
    """
    ops: list[Op] = []
    joined: list[bool] = []
    for column, word in _words(line, start):
        if word.startswith("("):
            parts = word[1:-1].split("&")
            if not word.endswith(")") or len(parts) < 2:
                raise _wrong(number, line, column, "a group as (0F1&3B0)", word)
        else:
            parts = [word]
        column += len(parts) > 1  # the parenthesis
        for index, part in enumerate(parts):
            ops.append(_parse_op(number, line, column, part))
            joined.append(index > 0)
            column += len(part) + 1
    return Ops.of(ops).grouped(np.array(joined, dtype=np.bool_))


def _words(line: str, start: int) -> Iterator[tuple[int, str]]:
    for match in re.finditer(r"[^ ]+", line[start:]):
        yield start + match.start(), match[0]


def _parse_op(number: int, line: str, column: int, word: str) -> Op:
    match = _OP.fullmatch(word)
    if not match:
        raise _wrong(number, line, column, "an op such as 2F0, 2F0.1 or 2REDUCE", word)
    stage, name, micro_batch, part = match.groups()
    if name in RESERVED_WORDS:
        raise _wrong(number, line, column, "a kind in use (this one is reserved)", word)
    kind = _WORDS.get(name)
    if kind is None:
        raise _wrong(number, line, column, f"a kind of {', '.join(_WORDS)}", word)
    if kind in STAGE_KINDS and part is not None:
        raise _wrong(number, line, column, f"{name} without a slice", word)
    if kind not in STAGE_KINDS and micro_batch is None:
        raise _wrong(number, line, column, f"{name} with its micro-batch", word)
    numbers = int(stage), int(micro_batch or 0), int(part or 0)
    if max(numbers) > MAX_NUMBER:
        raise _wrong(number, line, column, f"numbers up to {MAX_NUMBER}", word)
    return Op(kind, *numbers)


def _wrong(
    number: int, line: str, column: int, expected: str, found: str
) -> ParseError:
    """Where, what was expected, what was found, and a picture of the place."""
    left = max(0, column - 30)
    excerpt = line[left : left + 72].encode("ascii", "replace").decode()
    excerpt = "".join(c if c.isprintable() else "?" for c in excerpt)
    width = max(1, min(len(found), 72 - (column - left)))
    return ParseError(
        f"line {number}, column {column + 1}: expected {expected}, found "
        f"{found[:40]!r}\n    {excerpt}\n    {' ' * (column - left)}{'^' * width}"
    )
