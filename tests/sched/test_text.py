import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import whole_language, writable

from pipeproof.sched import F, Kind, ParseError, Placement, Schedule, op, overlap

TWO = """\
name: by hand
devices: 2
placement: linear
micro-batches: 1
slices: 1
steps: 1

device 0 | 0F0 0B0
device 1 | 1F0 1B0
"""

EVERYTHING = """\
name: all of it
devices: 2
placement: bidirectional
micro-batches: 3
slices: 2
steps: 2
pipes: 0-2 5 | 3-4
offload-to: 1 host

device 0 | 0F0 0F0.1 (0F1&1B0.1&1W7) 0R2 0OFFLOAD1 0RELOAD1.1 0I0 0REDUCE 0STEP1
device 1 |
"""


def test_says_everything() -> None:
    schedule = Schedule.parse(EVERYTHING)

    assert schedule.format() == EVERYTHING
    assert schedule.placement == Placement.bidirectional(2)
    assert schedule.pipe_of.tolist() == [0, 0, 0, 1, 1, 0]
    assert schedule.offload_to == (1, None)
    assert (schedule.micro_batches, schedule.slices, schedule.steps) == (3, 2, 2)
    assert list(schedule.row(0)) == [
        *(F(0, 0), F(0, 0, 1)),
        *(F(0, 1), op(Kind.B, 1, 0, 1), op(Kind.W, 1, 7)),
        *(op(Kind.R, 0, 2), op(Kind.OFFLOAD, 0, 1), op(Kind.RELOAD, 0, 1, 1)),
        *(op(Kind.I, 0, 0), op(Kind.REDUCE, 0), op(Kind.STEP, 0, 1)),
    ]
    assert schedule.row(0).joined.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert len(schedule.row(1)) == 0


@given(schedule=writable())
def test_reads_back_what_it_writes_to_the_letter(schedule: Schedule) -> None:
    text = schedule.format()
    again = Schedule.parse(text)

    assert again == schedule
    assert again.name == schedule.name
    assert again.format() == text


def test_offloads_go_to_the_host_unless_it_is_said() -> None:
    said = TWO.replace("steps: 1", "steps: 1\noffload-to: host host")

    assert Schedule.parse(TWO).offload_to == (None, None)
    assert Schedule.parse(said).format() == TWO


def test_comments_blank_lines_and_windows_line_ends_are_skipped() -> None:
    text = "# by hand\n\n" + TWO.replace("\n", "\r\n") + "   \n# done"

    assert Schedule.parse(text) == Schedule.parse(TWO)


def test_an_unused_device_keeps_its_row() -> None:
    schedule = Schedule.of(
        [[F(0, 0), op(Kind.B, 0, 0)], []], placement=Placement.linear(1)
    )

    assert "placement: [0]\n" in schedule.format()
    assert Schedule.parse(schedule.format()) == schedule


def test_a_wrong_op_is_shown_where_it_stands() -> None:
    with pytest.raises(ParseError) as caught:
        Schedule.parse(TWO.replace("1F0 1B0", "1F0 (1I0&2X0)"))

    assert str(caught.value).splitlines() == [
        "line 9, column 21: expected a kind of F, B, I, W, R, OFFLOAD, RELOAD, "
        "REDUCE, STEP, found '2X0'",
        "    device 1 | 1F0 (1I0&2X0)",
        "                        ^^^",
    ]


OF_AN_OP = "expected an op such as 2F0, 2F0.1 or 2REDUCE, found "


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("0G0", "column 12: expected a kind of F, B"),
        ("0f0", OF_AN_OP + "'0f0'"),
        ("F0", OF_AN_OP + "'F0'"),
        ("0GATHER", "a kind in use (this one is reserved), found '0GATHER'"),
        ("0RELEASE1", "a kind in use (this one is reserved), found '0RELEASE1'"),
        ("0F", "expected F with its micro-batch, found '0F'"),
        ("0REDUCE0.1", "expected REDUCE without a slice, found '0REDUCE0.1'"),
        ("0F2;", OF_AN_OP + "'0F2;'"),
        ("0F1e9", OF_AN_OP + "'0F1e9'"),
        ("0F-1", OF_AN_OP + "'0F-1'"),
        ("0F01", OF_AN_OP + "'0F01'"),
        ("00F1", OF_AN_OP + "'00F1'"),
        ("٣F0", OF_AN_OP + "'٣F0'"),
        ("0F٣", OF_AN_OP + "'0F٣'"),
        ("0F²", OF_AN_OP + "'0F²'"),
        ("0F99999999999", OF_AN_OP + "'0F99999999999'"),
        ("0F2147483648", "expected numbers up to 2147483647, found '0F2147483648'"),
        ("0F0\t0B0", OF_AN_OP),
        ("0F0\x0b0B0", OF_AN_OP),
        ("(0F0", "expected a group as (0F1&3B0), found '(0F0'"),
        ("(0F0)", "expected a group as (0F1&3B0), found '(0F0)'"),
        ("(0F0&)", OF_AN_OP + "''"),
        ("0F0&0B0", OF_AN_OP + "'0F0&0B0'"),
    ],
)
def test_refuses_an_op(word: str, message: str) -> None:
    with pytest.raises(ParseError, match=f"^line 8, .*{re.escape(message)}"):
        Schedule.parse(TWO.replace("0F0 0B0", word))


def test_refuses_to_run_anything() -> None:
    with pytest.raises(ParseError, match=re.escape(OF_AN_OP + "'0F2;'")):
        Schedule.parse(TWO.replace("0F0 0B0", "0F2; import os"))


BIDIRECTIONAL = "bidirectional\npipes: "


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("devices: 2\n", "", "the header lacks `devices: …`: add it above the devices"),
        ("placement: linear\n", "", "the header lacks `placement: …`"),
        ("micro-batches: 1\n", "", "the header lacks `micro-batches: …`"),
        (
            "steps: 1",
            "steps: 1\nsteps: 1",
            "line 7, column 1: expected each header once",
        ),
        (
            "steps",
            "stepz",
            "line 6, column 1: expected one of name, devices, placement",
        ),
        ("slices: 1", "slices: 0", "line 5: slices: expected a size, found '0'"),
        ("slices: 1", "slices: 01", "line 5: slices: expected a size, found '01'"),
        ("slices: 1", "slices: 1.5", "line 5: slices: expected a size, found '1.5'"),
        ("slices: 1", "slices: ١", "line 5: slices: expected a size, found '١'"),
        ("slices: 1", "slices 1", "line 5, column 1: expected `key: value` or"),
        ("devices: 2", "devices: 3", "the header says 3 devices, found 2 device lines"),
        ("device 1", "device 2", "line 9, column 8: expected device 1, found '2'"),
        ("device 0", "device 1", "line 8, column 8: expected device 0, found '1'"),
        ("device 1 |", "device 1:", "line 9, column 1: expected `device N | ops`"),
        ("device 1", "slices: 1\ndevice 1", "line 9, column 1: expected `device N"),
        ("by hand", "", "line 1: name must be printable and on one line: ''"),
        ("by hand", "a\x07b", "line 1: name must be printable and on one line"),
        ("by hand", "a\x0bdevices: 9", "line 1: name must be printable"),
        ("by hand", "a\u202eb", "line 1: name must be printable and on one line"),
        ("linear", "zigzag", "line 3: placement: expected linear, looped V, v, wave"),
        ("linear", "looped 02", "line 3: placement: expected linear, looped V"),
        ("linear", "[]", "line 3: placement: a placement needs at least one pipe"),
        ("linear", "[0 1 | 0]", "line 3: placement: pipe 1 places 1 stages, pipe 0"),
        ("linear", "[0 01]", "line 3: placement: expected a device, found '01'"),
        ("linear", "[0 5]", "line 3: the placement uses 6 devices, found 2 rows"),
        ("linear", "bidirectional", "line 3: the placement has 2 pipes: say with"),
        ("linear", BIDIRECTIONAL + "0", "line 4: pipes: expected 2 groups, found 1"),
        (
            "linear",
            BIDIRECTIONAL + "0|x",
            "line 4: pipes: expected N or N-N, found 'x'",
        ),
        ("linear", BIDIRECTIONAL + "0|0", "line 4: pipes: 0 names a micro-batch twice"),
        ("linear", BIDIRECTIONAL + "0|1", "line 4: pipes: 1 lies outside 0-0"),
        ("linear", BIDIRECTIONAL + "|", "line 4: pipes: micro-batch 0 has no pipe"),
        (
            "steps: 1",
            "offload-to: 1",
            "line 6: offload-to: expected 2 words, one a device, found 1",
        ),
        (
            "steps: 1",
            "offload-to: 1 disk",
            "line 6: offload-to: expected a device or 'host', found 'disk'",
        ),
        (
            "steps: 1",
            "offload-to: 2147483648 host",
            "line 6: offload-to: expected a device or 'host', found '2147483648'",
        ),
    ],
)
def test_refuses_a_header(old: str, new: str, message: str) -> None:
    with pytest.raises(ParseError, match=re.escape(message)):
        Schedule.parse(TWO.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("micro-batches: 1", "micro-batches: 99999999999", "expected a size, found"),
        (
            "micro-batches: 1",
            "micro-batches: 9999999999",
            "9999999999 exceeds 4,194,304",
        ),
        ("steps: 1", "steps: 4194304", "4194304 steps of 2 micro-batches exceed"),
        ("linear", "looped 9999999", "exceed the 1,048,576 stages"),
        ("linear", "wave 600000", "exceed the 1,048,576 stages"),
        ("linear", "[0 9999999]", "the placement uses 10000000 devices, found 2 rows"),
        ("linear", "[0 99999999]", "expected a device, found '99999999'"),
    ],
)
def test_refuses_a_size_before_it_allocates(old: str, new: str, message: str) -> None:
    text = TWO.replace("micro-batches: 1", "micro-batches: 2").replace(
        old.replace("batches: 1", "batches: 2"), new
    )
    tracemalloc.start()
    with pytest.raises(ParseError, match=message):
        Schedule.parse(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 1 << 20


def test_refuses_a_text_too_long_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeproof.sched.text.MAX_TEXT_BYTES", 100)
    with pytest.raises(ParseError, match="118 characters exceeds 100"):
        Schedule.parse(TWO)


def test_a_line_of_spaces_takes_no_longer_than_others() -> None:
    """A lazy match between greedy ones once took a step for each pair of spaces."""
    spaces = " " * 200_000

    assert Schedule.parse(TWO.replace("by hand", f"by{spaces}hand")).name[:2] == "by"
    with pytest.raises(ParseError, match="expected a device, found '1111"):
        Schedule.parse(TWO.replace("linear", f"[{'1' * 200_000}]"))


@given(text=st.text() | st.text("device01: |F0B(&).[]\nlinear"))
def test_raises_only_parse_errors(text: str) -> None:
    for made in (text, TWO + text, TWO.replace("linear", text)):
        only_parse_errors(made)


@given(
    schedule=writable() | whole_language(),
    at=st.integers(0, 400),
    length=st.integers(0, 9),
    put=st.text(max_size=6) | st.text("0123456789FBIWR.&()|[]: \n", max_size=6),
)
def test_raises_only_parse_errors_near_valid_text(
    schedule: Schedule, at: int, length: int, put: str
) -> None:
    text = schedule.format()
    at %= len(text)

    only_parse_errors(text[:at] + put + text[at + length :])


def only_parse_errors(text: str) -> None:
    try:
        schedule = Schedule.parse(text)
    except ParseError:
        return
    assert Schedule.parse(schedule.format()) == schedule


def test_writes_a_group_as_one_word() -> None:
    schedule = Schedule.of(
        [[overlap(F(0, range(2)), op(Kind.B, 1, range(2)))]],
        placement=Placement.looped(1, 2),
    )

    assert schedule.format().endswith("device 0 | (0F0&1B0) (0F1&1B1)\n")
