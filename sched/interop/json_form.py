"""The JSON form of a schedule, both ways.

    {
      "format": "pipeproof-schedule",
      "version": 1,
      "name": "1f1b",
      "devices": 2,
      "placement": "linear",
      "micro_batches": 3,
      "slices": 1,
      "steps": 1,
      "rows": [
        ["0F0", "0F1", "0B0", "0F2", "0B1", "0B2"],
        ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"]
      ]
    }

Ops and the placement are written as in the text form, whose parsers read them
here too. With more than one pipe, `pipes` names the pipe of each micro-batch. Where
OFFLOADs go to another device's memory, `offload_to` names that device for each
device, or null for the host; it may be left out, for the host everywhere. Where
stages hand tensors straight to later ones, `skips` lists these pairs, `[[0, 3]]`;
where they share parameters, `ties` lists these groups, `[[0, 3]]`. `name`, `slices`
and `steps` may be left out, as in the text form.

Reading is strict: what is not said above is refused, with its place as a path
such as `$.rows[0][3]`. It never runs code, and sizes are bounded before anything
of that size is built.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from pipeproof.sched.errors import ParameterError, ParseError
from pipeproof.sched.ir import MAX_NUMBER, Ops, Schedule, check_name
from pipeproof.sched.placement import Placement
from pipeproof.sched.skips import listed as listed_skips
from pipeproof.sched.text import (
    MAX_MICRO_BATCHES,
    MAX_TEXT_BYTES,
    parse_row,
    words_of,
)
from pipeproof.sched.ties import listed as listed_ties

FORMAT = "pipeproof-schedule"
VERSION = 1

_REQUIRED = ("format", "version", "devices", "placement", "micro_batches", "rows")
_OPTIONAL = ("name", "slices", "steps", "pipes", "offload_to", "skips", "ties")
_LONGEST_NUMBER = 20


def format_json(schedule: Schedule) -> str:
    """The JSON form, a device a line, ending in a newline."""
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "name": schedule.name,
        "devices": schedule.devices,
        "placement": schedule.placement.format(schedule.devices),
        "micro_batches": schedule.micro_batches,
        "slices": schedule.slices,
        "steps": schedule.steps,
    }
    if len(schedule.placement.pipes) > 1:
        head["pipes"] = schedule.pipe_of.tolist()
    if schedule.offloads_to_devices:
        head["offload_to"] = schedule.offload_to
    if schedule.skips:
        head["skips"] = schedule.skips
    if schedule.ties:
        head["ties"] = schedule.ties
    lines = [f"  {json.dumps(key)}: {json.dumps(head[key])}," for key in head]
    rows = [
        f"    {json.dumps(words_of(schedule.row(device)))}"
        for device in range(schedule.devices)
    ]
    return "\n".join(["{", *lines, '  "rows": [', ",\n".join(rows), "  ]", "}"]) + "\n"


def parse_json(text: str) -> Schedule:
    """Read the JSON form.

    Raises:
        ParseError: with the path of the value, what was expected and found.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise ParseError(
            f"JSON of {len(text):,} characters exceeds {MAX_TEXT_BYTES:,}: generate "
            "so long a schedule instead of reading it"
        )
    form = _object(_decode(text))
    if form["format"] != FORMAT:
        raise _wrong("$.format", json.dumps(FORMAT), form["format"])
    if form["version"] != VERSION or isinstance(form["version"], bool):
        raise _wrong("$.version", f"{VERSION}, all this release reads", form["version"])
    devices = _size(form, "devices")
    micro_batches, slices = _size(form, "micro_batches"), _size(form, "slices", 1)
    steps = _size(form, "steps", 1)
    if micro_batches * steps > MAX_MICRO_BATCHES:
        raise ParseError(
            f"$.steps: {steps} steps of {micro_batches} micro-batches exceed "
            f"{MAX_MICRO_BATCHES:,}"
        )
    rows = _rows(form["rows"], devices)
    name = _name(form.get("name", "schedule"))
    placement = _placement(form["placement"], devices)
    pipe_of = _pipes(form.get("pipes"), placement, micro_batches * steps)
    offload_to = _offload_to(form.get("offload_to", [None] * devices), devices)
    skips = _stages(form, "skips", "pair of stages", listed_skips)
    ties = _stages(form, "ties", "group of stages", listed_ties)
    try:
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
    except ParameterError as error:
        raise ParseError(f"$: {error}") from None


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that keys given twice are seen."""


def _decode(text: str) -> Any:
    def constant(word: str) -> NoReturn:
        raise ParseError(f"expected JSON, found {word}, which JSON does not have")

    def whole(digits: str) -> int:
        if len(digits) > _LONGEST_NUMBER:
            raise ParseError(
                f"expected numbers of at most {_LONGEST_NUMBER} digits, found one "
                f"of {len(digits):,}"
            )
        return int(digits)

    try:
        return json.loads(
            text, object_pairs_hook=_Object, parse_constant=constant, parse_int=whole
        )
    except json.JSONDecodeError as error:
        found = text[error.pos : error.pos + 20]
        raise ParseError(
            f"line {error.lineno}, column {error.colno}: expected JSON "
            f"({error.msg}), found {found or 'the end'!r}"
        ) from None
    except RecursionError:
        raise ParseError(
            "expected rows of op words, found values nested far deeper"
        ) from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, _Object):
        raise _wrong("$", "an object", value)
    form: dict[str, Any] = {}
    for key, member in value:
        if key not in _REQUIRED + _OPTIONAL:
            known = ", ".join(_REQUIRED + _OPTIONAL)
            raise ParseError(f"$: expected keys of {known}; found {key[:40]!r}")
        if key in form:
            raise ParseError(f"$.{key}: expected each key once, found it again")
        form[key] = member
    if missing := [key for key in _REQUIRED if key not in form]:
        raise ParseError(f"$: expected the key {missing[0]!r}, found none")
    return form


def _size(form: dict[str, Any], key: str, default: int = 0) -> int:
    value = form.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(f"$.{key}", "a whole number", value)
    if not 1 <= value <= MAX_MICRO_BATCHES:
        raise _wrong(f"$.{key}", f"1 … {MAX_MICRO_BATCHES:,}", value)
    return value


def _string(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(path, "a string", value)
    return value


def _name(value: Any) -> str:
    name = _string("$.name", value)
    try:
        check_name(name)
    except ParameterError as error:
        raise ParseError(f"$.name: {error}") from None
    return name


def _placement(value: Any, devices: int) -> Placement:
    text = _string("$.placement", value)
    try:
        return Placement.parse(text, devices)
    except (ParseError, ParameterError) as error:
        message = str(error).removeprefix("placement: ")
        raise ParseError(f"$.placement: {message}") from None


def _pipes(value: Any, placement: Placement, micro_batches: int) -> list[int] | None:
    pipes = len(placement.pipes)
    if value is None:
        if pipes == 1:
            return None
        raise ParseError(
            f"$: expected the key 'pipes', the pipe of each micro-batch, since the "
            f"placement has {pipes} pipes; found none"
        )
    if type(value) is not list:
        raise _wrong("$.pipes", "a list", value)
    if len(value) != micro_batches:
        raise _wrong("$.pipes", f"{micro_batches} numbers", f"{len(value)} of them")
    for index, pipe in enumerate(value):
        if type(pipe) is not int or not 0 <= pipe < pipes:
            raise _wrong(f"$.pipes[{index}]", f"a pipe of 0 … {pipes - 1}", pipe)
    return value


def _offload_to(value: Any, devices: int) -> list[int | None]:
    if type(value) is not list:
        raise _wrong("$.offload_to", "a list", value)
    if len(value) != devices:
        raise _wrong(
            "$.offload_to", f"{devices} values, one a device", f"{len(value)} of them"
        )
    for index, target in enumerate(value):
        if target is not None and (
            type(target) is not int or not 0 <= target <= MAX_NUMBER
        ):
            raise _wrong(
                f"$.offload_to[{index}]", "a device, or null for the host", target
            )
    return value


def _stages(form: dict[str, Any], name: str, what: str, listed: Any) -> Any:
    """Lists of stages, which `listed` judges."""
    value = form.get(name, [])
    if type(value) is not list:
        raise _wrong(f"$.{name}", f"a list of {what.replace(' ', 's ', 1)}", value)
    for index, stages in enumerate(value):
        if type(stages) is not list:
            raise _wrong(f"$.{name}[{index}]", f"a {what}, as [0, 3]", stages)
    try:
        return listed(value, f"$.{name}")
    except ParameterError as error:
        raise ParseError(str(error)) from None


def _rows(value: Any, devices: int) -> list[list[Ops]]:
    if type(value) is not list:
        raise _wrong("$.rows", "a list of rows", value)
    if len(value) != devices:
        raise _wrong("$.rows", f"{devices} rows, one a device", f"{len(value)} rows")
    return [[_row(f"$.rows[{device}]", row)] for device, row in enumerate(value)]


def _row(path: str, value: Any) -> Ops:
    if type(value) is not list:
        raise _wrong(path, "a list of op words", value)
    for index, word in enumerate(value):
        if not isinstance(word, str) or not word or " " in word:
            raise _wrong(f"{path}[{index}]", "an op word such as 2F0", word)
    try:
        return parse_row(0, " ".join(value), 0)
    except ParseError:
        # Which word it was, the line's own message does not say.
        for index, word in enumerate(value):
            try:
                parse_row(0, word, 0)
            except ParseError as error:
                said = str(error).partition(": ")[2].partition("\n")[0]
                raise ParseError(f"{path}[{index}]: {said}") from None
        raise


def _wrong(path: str, expected: str, found: Any) -> ParseError:
    if isinstance(found, _Object):
        shown = "an object"
    elif isinstance(found, list):
        shown = "a list"
    elif found is None or isinstance(found, bool):
        shown = json.dumps(found)
    else:
        shown = repr(found)[:60]
    return ParseError(f"{path}: expected {expected}, found {shown}")
