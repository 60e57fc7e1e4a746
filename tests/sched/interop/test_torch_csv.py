"""torch's CSV, read and written."""

import random
import re

import pytest
from hypothesis import given, settings
from strategies import schedules
from torch_shapes import OVERLAPPED, V_SHAPE

from pipeproof.sched import (
    B,
    F,
    Kind,
    ParameterError,
    ParseError,
    Placement,
    Schedule,
    ScheduleError,
    UnsupportedError,
    catalog,
    check,
    op,
    overlap,
    recompute,
)
from pipeproof.sched.interop import torch_csv
from pipeproof.sched.interop.torch_csv import parse_torch_csv, read_torch_csv
from pipeproof.sched.interop.torch_writer import format_torch_csv


def test_compute_only_in_pictures() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)

    assert format_torch_csv(schedule).splitlines() == [
        "0F0,0F1,0B0,0F2,0B1,0B2",
        "1F0,1B0,1F1,1B1,1F2,1B2",
    ]
    assert format_torch_csv(schedule, idle=True).splitlines() == [
        "0F0,0F1,,0B0,0F2,0B1,,0B2",
        ",1F0,1B0,1F1,1B1,1F2,1B2,",
    ]
    assert format_torch_csv(OVERLAPPED) == "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n"


def test_with_communication_in_pictures() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)

    assert format_torch_csv(schedule, communication=True).splitlines() == [
        "0UNSHARD,0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,"
        "0REDUCE_GRAD,0RESHARD",
        "1RECV_F0,1RECV_F1,1UNSHARD,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1,"
        "1REDUCE_GRAD,1RESHARD",
    ]
    there = format_torch_csv(V_SHAPE, communication=True)
    assert "SEND_F1" in there
    assert not re.search("2RECV_F|1RECV_B", there)  # the turn stays on its rank


def test_all_of_a_file_comes_back() -> None:
    """Idle cells and torch's own place for communication are kept too."""
    for text in (
        "0F0,0F1,,0B0\n,1F0\n",
        "0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n1RECV_F0,1F0,1B0,1SEND_B0,1REDUCE_GRAD\n",
    ):
        read = read_torch_csv(text, name="mine")

        assert read.format() == text
        assert read.schedule.name == "mine"
        assert read.has_communication == ("SEND" in text)
        assert parse_torch_csv(text.replace("\n", "\r\n")) == read.schedule
        assert parse_torch_csv(text.replace(",", ", ")) == read.schedule


@settings(max_examples=60)
@given(schedule=schedules(slices=1))
def test_any_schedule_comes_back_from_both_forms(schedule: Schedule) -> None:
    plain = recompute(schedule, "never").with_skips([]).with_ties([])
    if any(not len(plain.row(device)) for device in range(plain.devices)):
        with pytest.raises(UnsupportedError, match="has no ops"):
            format_torch_csv(plain)
        return

    texts = [
        format_torch_csv(plain),
        format_torch_csv(plain, idle=True),
        format_torch_csv(plain, communication=True),
    ]
    for text in texts:
        again = parse_torch_csv(text)
        assert again == plain
        assert again.placement == plain.placement
        assert read_torch_csv(text).format() == text


@pytest.mark.parametrize(
    "schedule",
    [
        V_SHAPE,
        OVERLAPPED,
        Schedule.of(
            [[F(0, 0), F(1, 0), B(1, 0), B(0, 0)]], placement=Placement(((0, 0),))
        ),
    ],
)
def test_placements_and_groups_come_back(schedule: Schedule) -> None:
    for communication in (False, True):
        text = format_torch_csv(schedule, communication=communication)
        assert parse_torch_csv(text) == schedule


def test_what_is_incomplete_is_for_check_to_say() -> None:
    report = check(parse_torch_csv("0F0,0B0,0F1\n"))

    assert [finding.rule for finding in report.findings] == ["complete"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0F2; import os\n", "row 1, column 2: expected an action .* import os"),
        ("0F1e9\n", "row 1, column 1: expected an action"),
        ("0F0,0B0\n1F0,1B٠\n", r"row 2, column 2: expected an action .*\\u0660"),
        ("0F0,\u0660F0", "row 1, column 2"),
        ("0F00,0B0", "row 1, column 1"),
        ("00F0,0B0", "row 1, column 1"),
        ("0F,0B0", "row 1, column 1"),
        ("-1F0", "row 1, column 1"),
        ("0UNSHARD3,0F0", "row 1, column 1"),
        ('"0F0",0B0', "row 1, column 1"),
        ("0F0\t,0B0", "row 1, column 1"),
        ("0F0,0STEP", "row 1, column 2"),
        ("0F0,0B0,99999999F0", "row 1, column 3: expected an action"),
        ("0F0,0B0,9999999F0", "row 1, column 3: expected a stage below 1,048,576"),
        ("0F0,0B9999999", "row 1, column 2: expected a micro-batch below 4,194,304"),
        ("0F0,0B0,3F0", "row 1, column 3: expected stages 0 … 1, .* stage 1"),
        ("0F0,0B0,0F7", "row 1, column 3: expected micro-batches 0 … 1, .* 1"),
        ("0F0,0B0,0F0", "row 1, column 3: .*once, and 0F0 stands in row 1, column 1"),
        ("0F0,0B0\n0F1,0B1", "row 2, column 1: expected stage 0 on rank 0 only"),
        ("0F0,0B0\n\n1F0,1B0", "row 2: expected what a rank computes, found nothing"),
        ("0F0,0B0\n,,", "row 2: expected what a rank computes"),
        ("0F0,0B0\n1F0,1B0\n\n", "row 3: expected what a rank computes"),
        ("", "found an empty file"),
        ("(0F0;0B1)OVERLAP", "row 1, column 1: expected a group as"),
        ("(0F0;0F1)OVERLAP_F_B", "expected a forward and a backward"),
        ("(0F0;0SEND_F1)OVERLAP_F_B", "expected a forward and a backward"),
        ("(0F0;x)OVERLAP_F_B", "row 1, column 1: expected an action"),
        ("(0F0;(0B1;0F1)OVERLAP_F_B)OVERLAP_F_B", "expected a group as"),
    ],
)
def test_hostile_and_malformed_cells(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse_torch_csv(text)


TWO = (
    "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD\n"
    "1RECV_F0,1RECV_F1,1UNSHARD,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1,1REDUCE_GRAD,1RESHARD\n"
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0SEND_F1,", "", "row 1, column 3: expected 0SEND_F1 behind 0F1"),
        ("1RECV_F1,", "", "row 2, column 6: expected 1RECV_F1 ahead of 1F1"),
        (
            "1RECV_F0,1RECV_F1",
            "1RECV_F1,1RECV_F0",
            "row 2, column 1: expected the receive of 0SEND_F0 .row 1, column 2., "
            "number 1 that rank 0 sends to rank 1",
        ),
        ("0F0,0SEND_F0", "0SEND_F0,0F0", "row 1, column 1: expected a send behind"),
        ("0RECV_B0,0B0", "0B0,0RECV_B0", "row 1, column 5: expected 0RECV_B0 ahead"),
        ("0SEND_F0", "0SEND_F0,0SEND_F0", "column 3: expected each action once"),
        ("0SEND_F0", "0SEND_F0,0SEND_B0", "column 3: .* there is no stage -1"),
        ("0SEND_F0", "0SEND_F0,1UNSHARD", "expected an action on a stage of rank 0"),
        ("0SEND_F0", "0SEND_F0,7UNSHARD", "expected a stage of 0 … 1, those comp"),
        ("0F0,", "0F0,,", "row 1, column 2: expected no idle cells"),
        ("1UNSHARD,1F0", "1F0,1UNSHARD", "expected 1UNSHARD ahead of 1F0"),
        ("1UNSHARD", "1UNSHARD,1UNSHARD", "expected a RESHARD since row 2, column 3"),
        (",1RESHARD", "", "row 2, column 3: expected a RESHARD behind it"),
        ("0F0", "0RESHARD,0F0", "expected an UNSHARD ahead of it"),
        ("0RECV_B1", "0REDUCE_GRAD,0RECV_B1", "expected each action once"),
        (
            "1B1,1SEND_B1,1REDUCE_GRAD",
            "1REDUCE_GRAD,1B1,1SEND_B1",
            "expected 1REDUCE_GRAD behind all its backwards, found '1B1'",
        ),
        (
            ",1REDUCE_GRAD",
            "",
            "row 2, column 8: expected 1REDUCE_GRAD behind it, as other stages have",
        ),
    ],
)
def test_communication_that_the_ops_do_not_imply(
    old: str, new: str, message: str
) -> None:
    assert parse_torch_csv(TWO) == parse_torch_csv("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    with pytest.raises(ParseError, match=message):
        parse_torch_csv(TWO.replace(old, new, 1))


def test_too_large_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_csv, "MAX_TEXT_BYTES", 10)
    monkeypatch.setattr(torch_csv, "MAX_RANKS", 2)
    with pytest.raises(ParseError, match="11 characters exceeds 10"):
        parse_torch_csv("0F0,0F1,0B0")
    with pytest.raises(ParseError, match="3 rows exceed 2 ranks"):
        parse_torch_csv("a\nb\nc\n")


def test_says_what_torch_has_no_word_for() -> None:
    made = catalog.make("gpipe", devices=2, micro_batches=2)
    for schedule, message in (
        (recompute(made, "always"), "no R, only F, B, I and W; recompute"),
        (
            catalog.make("bpipe", devices=4, micro_batches=4),
            r"^bpipe\(.*has no OFFLOAD, RELOAD, only F, B, I and W$",
        ),
        (
            Schedule.of([[F(0, 0), B(0, 0), op(Kind.STEP, 0)]]),
            "no STEP, .* steps in the training loop",
        ),
        (
            Schedule.of([[F(0, 0), F(0, 0, 1), B(0, 0, 1), B(0, 0)]]),
            "has no slices, found 2",
        ),
        (
            Schedule.of([[F(0, 0), F(0, 1), overlap(B(0, 0), B(0, 1))]]),
            r"device 0, step 2: torch overlaps one forward .*found \(0B0&0B1\)",
        ),
    ):
        with pytest.raises(UnsupportedError, match=message):
            format_torch_csv(schedule)
    with pytest.raises(ScheduleError, match="B0 is missing"):
        format_torch_csv(Schedule.of([[F(0, 0)]]))
    with pytest.raises(ParameterError, match="idle cells only without communication"):
        format_torch_csv(made, communication=True, idle=True)


def test_random_garbage_is_refused_and_nothing_else_happens() -> None:
    dice = random.Random(0)
    letters = "0123456789FBIWSENDRCV_UHA;(),,\n \r\x00é"
    for _ in range(500):
        text = "".join(dice.choice(letters) for _ in range(dice.randint(1, 30)))
        try:
            schedule = parse_torch_csv(text)
        except ParseError:
            continue
        assert read_torch_csv(text).schedule == schedule
