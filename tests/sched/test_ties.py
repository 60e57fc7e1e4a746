"""Ties: stages that share parameters, and the sums of their gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from programs import Part, assembled, parts_of
from strategies import schedules, whole_language

from pipeproof.sched import (
    Action,
    Certificate,
    ParameterError,
    ParseError,
    Program,
    Refutation,
    Schedule,
    ScheduleError,
    UnsupportedError,
    catalog,
    check,
    lower,
    prove,
    reduce_gradients,
    with_micro_batches,
    with_steps,
)
from pipeproof.sched.interop.json_form import format_json, parse_json
from pipeproof.sched.interop.torch_writer import format_torch_csv
from pipeproof.sched.lower import POLICIES


def three_devices(micro_batches: int = 2) -> Schedule:
    return catalog.make("1f1b", devices=3, micro_batches=micro_batches)


def ties_of(program: Program) -> list[str]:
    """Its TIEs, as it describes them."""
    return [line.strip() for line in program.describe().splitlines() if " tie " in line]


def test_each_device_sums_when_it_is_done() -> None:
    program = lower(three_devices(1).with_ties([(0, 2)]))

    assert ties_of(program) == [
        "14 tie 0=2 after 13; reads gradient 0; writes tied 0=2",
        "15 tie 0=2 after 7; reads gradient 2; writes tied 0=2",
    ]
    assert [program.label(i) for i in (13, 7)] == ["0B0", "2B0"]
    plain = lower(three_devices(1))
    assert program.describe().startswith(plain.describe())


def test_stages_of_one_device_are_added_up_first() -> None:
    schedule = catalog.make("interleaved", devices=2, micro_batches=2)
    certificate = prove(schedule.with_ties([(3, 0, 2), (0, 2)]))

    assert isinstance(certificate, Certificate)
    lines = str(certificate).splitlines()
    assert lines[lines.index("and of what stages share") + 1 :][:2] == [
        "  tie 0=2: (stage 0 + stage 2) of device 0",
        "  tie 0=2=3: (stage 0 + stage 2) of device 0 + stage 3 of device 1",
    ]
    assert certificate.to_dict()["ties"] == [
        [{"device": 0, "stages": [0, 2]}],
        [{"device": 0, "stages": [0, 2]}, {"device": 1, "stages": [3]}],
    ]


def test_data_parallel_peers_sum_first() -> None:
    """A TIE reads what a REDUCE left: it stands behind it on its stream."""
    program = lower(reduce_gradients(three_devices(1).with_ties([(0, 2)])))
    assert isinstance(prove(program), Certificate)

    parts = parts_of(program)
    tie = next(part for part in parts if part.action == Action.TIE)
    reduce = next(
        p for p in parts if p.action == Action.REDUCE and p.reads == tie.reads
    )
    one, two = parts.index(tie), parts.index(reduce)
    parts[one], parts[two] = parts[two], parts[one]

    refuted = prove(assembled(program, parts))
    assert "the sum of tie 0=2 has that of stage 0 before it is done" in str(refuted)


@given(schedule=schedules() | whole_language())
def test_both_forms_keep_them(schedule: Schedule) -> None:
    for again in (Schedule.parse(schedule.format()), parse_json(format_json(schedule))):
        assert again == schedule
        assert again.ties == schedule.ties


def test_they_are_part_of_what_a_schedule_is() -> None:
    plain = three_devices()
    tied = plain.with_ties([(2, 0)])

    assert tied.ties == ((0, 2),)
    assert tied != plain == tied.with_ties([])
    assert tied != plain.with_skips([(0, 2)])
    assert "ties: 0=2\n" in tied.format()
    assert "ties" not in plain.format()
    assert tied.with_rows([tied.row(d) for d in range(3)]) == tied
    assert with_micro_batches(tied, 1).ties == tied.ties


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-v", "interleaved"])
def test_several_are_proved_under_every_policy(name: str) -> None:
    """And run through whatever streams are one."""
    schedule = catalog.make(name, devices=4, micro_batches=4)
    last = schedule.stages - 1
    tied = schedule.with_ties([(0, last), (0, 1), (1, 2, last), tuple(range(last + 1))])
    for transfers in POLICIES["transfers"]:
        for receives in POLICIES["receives"]:
            program = lower(
                tied,
                transfers=transfers,  # type: ignore[arg-type]
                receives=receives,  # type: ignore[arg-type]
            )
            assert isinstance(prove(program), Certificate)
            for streams in ("pair", "dir", "one", "sync"):
                assert check(program, streams=streams).ok  # type: ignore[arg-type]


def edited(edit: Callable[[list[Part], int, int], object]) -> Refutation:
    """1F1B with a tie after an edit, which gets the places of its two TIEs."""
    program = lower(three_devices().with_ties([(0, 2)]))
    parts = parts_of(program)
    edit(parts, len(parts) - 2, len(parts) - 1)
    refuted = prove(assembled(program, parts))
    assert isinstance(refuted, Refutation)
    return refuted


def test_a_sum_that_comes_too_early_is_refuted() -> None:
    """As a race, or, where the backward behind it waits, for what it lacks."""
    schedule = catalog.make("interleaved", devices=2, micro_batches=2)
    program = lower(schedule.with_ties([(0, 2)]))
    parts = parts_of(program)
    labels = [program.label(i) for i in range(len(program))]
    early, late = labels.index("0B0"), labels.index("0B1")
    tie = parts.pop()
    tie.waits = [early]
    parts.insert(early + 1, tie)
    assert prove(assembled(program, parts)).findings[0].rule == "race"

    next(part for part in parts if part.key == late).waits.append(tie.key)
    refuted = prove(assembled(program, parts))
    assert "the sum of tie 0=2 has that of stage 0 before it is done" in str(refuted)


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda parts, one, other: parts.pop(one), "it on 2"),
        (
            lambda parts, one, other: parts.append(parts[one]),
            "it on 0, 0, 2",
        ),
        (
            lambda parts, one, other: parts[one].reads.clear(),
            "the sum of tie 0=2 lacks that of stage 0",
        ),
        (
            lambda parts, one, other: parts[one].reads.append(parts[one].reads[0]),
            "the sum of tie 0=2 has that of stage 0 twice or more",
        ),
        (
            lambda parts, one, other: parts[one].writes.clear(),
            "writes nothing",
        ),
    ],
)
def test_a_wrong_sum_is_refuted_in_words(
    edit: Callable[[list[Part], int, int], object], found: str
) -> None:
    assert found in str(edited(edit))


def test_another_stages_gradient_is_refuted() -> None:
    schedule = catalog.make("interleaved", devices=2, micro_batches=2)
    program = lower(schedule.with_ties([(0, 3)]))
    parts = parts_of(program)
    gradients = {str(program.buffer_at(n)): n for n in range(len(program.buffers))}
    parts[-2].reads = [gradients["gradient 2"]]
    refuted = prove(assembled(program, parts))

    assert "the sum of tie 0=3 lacks that of stage 0, has that of stage 2" in str(
        refuted
    )


def test_a_sum_of_no_tie_is_refuted() -> None:
    program = lower(three_devices().with_ties([(0, 2)]))
    untied = dataclasses.replace(program, schedule=three_devices())

    assert "expected: a TIE that writes one sum, that of a tie of" in str(prove(untied))


def test_what_is_no_gradient_is_refuted() -> None:
    program = lower(three_devices().with_ties([(0, 2)]))
    parts = parts_of(program)
    buffers = {str(program.buffer_at(n)): n for n in range(len(program.buffers))}
    parts[-2].reads.append(buffers["activation 0:0"])
    refuted = prove(assembled(program, parts))

    assert "the sum of tie 0=2 has what is no stage's gradient" in str(refuted)


def test_what_is_written_over_a_sum_is_refuted() -> None:
    """By a hand-over, behind the sum."""
    schedule = catalog.make("zb-v", devices=2, micro_batches=2).with_ties([(1, 2)])
    program = lower(schedule)
    parts = parts_of(program)
    tie = parts[-1]
    local = next(part for part in parts if part.action == Action.LOCAL)
    over = {"reads": tie.reads[:1], "writes": tie.writes[:], "frees": []}
    parts.append(dataclasses.replace(local, key=-1, waits=[tie.key], **over))
    refuted = prove(assembled(program, parts))

    assert "what lies there in the end is not what tie 1=2 summed" in str(refuted)


def test_two_ties_in_different_orders_wait_for_each_other() -> None:
    schedule = three_devices().with_ties([(0, 1, 2), (0, 2)])
    program = lower(schedule)
    parts = parts_of(program)
    of_device = [i for i, p in enumerate(parts) if p.action == Action.TIE]
    mine = [i for i in of_device if program.device[i] == 2]
    parts[mine[0]], parts[mine[1]] = parts[mine[1]], parts[mine[0]]
    found = str(prove(assembled(program, parts)))

    assert "a cycle of waits" in found
    assert "tie 0=2 (" in found
    assert "tie 0=1=2 (" in found


def test_says_which_ties_cannot_be() -> None:
    with pytest.raises(ScheduleError) as caught:
        check(three_devices().with_ties([(1, 3)])).raise_if_bad()

    assert str(caught.value).splitlines() == [
        "1f1b(devices=3, micro_batches=2) breaks 1 rule:",
        "  schedule: 1=3: there is no stage 3",
        "    expected: ties of stages of 0 … 2, each on one device",
        "    Name stages of the schedule, or drop it.",
    ]
    chimera = catalog.make("chimera", devices=2, micro_batches=2)
    found = str(check(chimera.with_ties([(0, 1)])))
    assert "0=1: stage 0 has replicas on devices 0, 1" in found
    stepped = str(check(with_steps(three_devices().with_ties([(0, 2)]))))
    assert "0=2: stage 0 has a STEP, and the sum comes behind it" in stepped


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ([(0, 2), (2, 0)], "ties name 0=2 twice: all that the same stages share is"),
        ([(0, 2, 0)], "ties: 0=0=2 names a stage twice"),
        ([(0,)], r"ties: expected groups of two stages or more, as \(0, 3\), found"),
        ([(0, 2.0)], r"ties: expected groups of two stages or more"),
        ([3], r"ties: expected groups of two stages or more, as \(0, 3\), found 3"),
        ([(0, n + 2) for n in range(1025)], "ties: at most 1,024 of 65,536 stages"),
        ([range(65537)], "ties: at most 1,024 of 65,536 stages together, got more"),
    ],
)
def test_says_what_is_no_tie(ties: list, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        three_devices().with_ties(ties)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("0-2", r"line 7: ties: expected ties as 0=3, found '0-2'"),
        ("0=2 0=2", r"line 7: ties name 0=2 twice"),
        ("0=99999999999", r"line 7: ties: expected ties as 0=3"),
        ("0=9999999999", r"line 7: ties: expected groups of two stages or more"),
    ],
)
def test_says_where_the_text_is_wrong(written: str, message: str) -> None:
    text = three_devices().with_ties([(0, 2)]).format()
    with pytest.raises(ParseError, match=message):
        Schedule.parse(text.replace("0=2", written))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("3", r"\$.ties: expected a list of groups of stages, found 3"),
        ("[0, 2]", r"\$.ties\[0\]: expected a group of stages, as \[0, 3\], found 0"),
        ("[[0, true]]", r"\$.ties: expected groups of two stages or more"),
    ],
)
def test_says_where_the_json_is_wrong(written: str, message: str) -> None:
    text = format_json(three_devices().with_ties([(0, 2)]))
    with pytest.raises(ParseError, match=message):
        parse_json(text.replace("[[0, 2]]", written))


def test_torch_has_none() -> None:
    with pytest.raises(UnsupportedError, match="has no ties, found 0=2; the text form"):
        format_torch_csv(three_devices().with_ties([(0, 2)]))
