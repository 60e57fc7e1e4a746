import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import sizes_of

from pipeproof.sched import (
    CATALOG,
    POLICIES,
    B,
    F,
    I,
    ParseError,
    Placement,
    Schedule,
    W,
    catalog,
    overlap,
    recompute,
)
from pipeproof.sched.interop.json_form import format_json, parse_json
from pipeproof.sched.ir import Kind, op
from pipeproof.sched.text import MAX_MICRO_BATCHES as MOST

TWO_BY_THREE = """\
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
"""


def everything() -> Schedule:
    """Groups, slices, steps, kinds of a stage, an empty row, and two pipes."""
    return Schedule.of(
        [
            [F(0, 0), F(0, 1, 1), overlap(F(1, 2), I(0, 0)), W(0, 0)],
            [],
            [op(Kind.OFFLOAD, 2, 1), op(Kind.RELOAD, 2, 1), op(Kind.REDUCE, 2, 1)],
        ],
        name='"a" <b> ü',
        placement=Placement(((0, 1, 2, 0), (2, 1, 0, 0))),
        micro_batches=2,
        slices=2,
        steps=2,
        pipe_of=[0, 1, 1, 0],
        offload_to=[None, None, 1],
    )


def test_looks_like_this() -> None:
    assert format_json(catalog.make("1f1b", devices=2, micro_batches=3)) == TWO_BY_THREE


@pytest.mark.parametrize("name", CATALOG)
@given(data=st.data(), policy=st.sampled_from(POLICIES))
def test_round_trip(name: str, data: st.DataObject, policy: Any) -> None:
    p, m = data.draw(sizes_of(name))
    schedule = recompute(catalog.make(name, devices=p, micro_batches=m), policy)

    back = parse_json(format_json(schedule))

    assert (back.digest, back.name) == (schedule.digest, schedule.name)


def test_round_trip_of_all_there_is_to_say() -> None:
    schedule = everything()

    back = parse_json(format_json(schedule))

    assert (back.digest, back.name) == (schedule.digest, schedule.name)
    assert back.ops.joined.sum() == 1
    assert back.offload_to == (None, None, 1)
    assert '"offload_to": [null, null, 1],' in format_json(schedule)
    assert format_json(back) == format_json(schedule)


def test_name_slices_and_steps_may_be_left_out() -> None:
    form = json.loads(TWO_BY_THREE)
    del form["name"], form["slices"], form["steps"]

    schedule = parse_json(json.dumps(form))

    assert schedule == parse_json(TWO_BY_THREE)
    assert schedule.name == "schedule"


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(TWO_BY_THREE) | changes)


ROWS = json.loads(TWO_BY_THREE)["rows"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"\$: expected an object, found a list"),
        ("{", r"line 1, column 2: expected JSON .*, found 'the end'"),
        (TWO_BY_THREE + "x", r"line 15, column 1: expected JSON .*Extra data"),
        ("[" * 200_000, "found values nested far deeper"),
        ("9" * 5000, "at most 20 digits, found one of 5,000"),
        (changed(devices=float("nan")), "expected JSON, found NaN"),
        (changed(steps=float("inf")), "expected JSON, found Infinity"),
        (changed(colour="red"), r"\$: expected keys of .*; found 'colour'"),
        ('{"name": "a", "name": "b"}', r"\$\.name: expected each key once"),
        ('{"name": "a"}', r"\$: expected the key 'format', found none"),
        (changed(format="x"), r"\$\.format: expected \"pipeproof-schedule\", found"),
        (changed(version=2), r"\$\.version: expected 1, .*, found 2"),
        (changed(version=True), r"\$\.version: expected 1, .*, found true"),
        (changed(devices=True), r"\$\.devices: expected a whole number, found true"),
        (changed(devices=2.0), r"\$\.devices: expected a whole number, found 2\.0"),
        (changed(steps=0), rf"\$\.steps: expected 1 … {MOST:,}, found 0"),
        (changed(micro_batches=10**9), rf"\$\.micro_batches: expected 1 … {MOST:,}"),
        (changed(micro_batches=MOST, steps=2), rf"\$\.steps: 2 steps of {MOST}"),
        (changed(name=3), r"\$\.name: expected a string, found 3"),
        (changed(name="a\nb"), r"\$\.name: .*name must be printable"),
        (changed(placement="liear"), r"\$\.placement: expected linear, .*'liear'"),
        (changed(placement=None), r"\$\.placement: expected a string, found null"),
        (changed(placement="looped 9999999"), r"\$\.placement: .*exceed"),
        (changed(placement="[0 2]"), r"\$: the placement uses 3 devices"),
        (changed(pipes=[0, 0]), r"\$\.pipes: expected 3 numbers, found '2 of them'"),
        (changed(pipes=[0, 0, 1]), r"\$\.pipes\[2\]: expected a pipe of 0 … 0"),
        (changed(pipes={}), r"\$\.pipes: expected a list, found an object"),
        (changed(placement="bidirectional"), r"\$: expected the key 'pipes'"),
        (changed(offload_to=1), r"\$\.offload_to: expected a list, found 1"),
        (changed(offload_to=[1]), r"\$\.offload_to: expected 2 values, one a device"),
        (
            changed(offload_to=[1, True]),
            r"\$\.offload_to\[1\]: expected a device, or null for the host, found true",
        ),
        (changed(offload_to=[-1, None]), r"\$\.offload_to\[0\]: .*, found -1"),
        (changed(rows="0F0"), r"\$\.rows: expected a list of rows, found '0F0'"),
        (changed(rows=[[]]), r"\$\.rows: expected 2 rows, one a device, found"),
        (changed(rows=[[], "0F0"]), r"\$\.rows\[1\]: expected a list of op words"),
        (changed(rows=[["0F0", 1], []]), r"\$\.rows\[0\]\[1\]: expected an op word"),
        (changed(rows=[[""], []]), r"\$\.rows\[0\]\[0\]: expected an op word"),
        (changed(rows=[["0F0 0F1"], []]), r"\$\.rows\[0\]\[0\]: expected an op word"),
        (
            changed(rows=[ROWS[0], ["1F0", "1Q0"]]),
            r"\$\.rows\[1\]\[1\]: expected a kind of F, B, .*, found '1Q0'",
        ),
        (changed(rows=[["(0F0"], []]), r"\$\.rows\[0\]\[0\]: expected a group as"),
        (changed(rows=[["0GATHER"], []]), r"\$\.rows\[0\]\[0\]: .*reserved"),
        (changed(rows=[["0F9999999999"], []]), r"rows\[0\]\[0\]: expected numbers up"),
    ],
)
def test_says_where_and_what(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse_json(text)


def test_refuses_what_is_too_long_before_reading_it() -> None:
    with pytest.raises(ParseError, match="exceeds 67,108,864"):
        parse_json(" " * (2**26 + 1))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(list(json.loads(TWO_BY_THREE))), inner)
        ),
    )
)
def test_whatever_comes_is_read_or_refused(value: Any) -> None:
    form = json.loads(TWO_BY_THREE)
    if isinstance(value, dict):
        value = form | value
    with suppress(ParseError):
        parse_json(json.dumps(value))


def test_groups_keep_together() -> None:
    rows = [[overlap(F(0, 1), B(0, 0))]]
    schedule = Schedule.of(rows, micro_batches=2)

    assert '["(0F1&0B0)"]' in format_json(schedule)
