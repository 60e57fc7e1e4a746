"""Ties: stages that share parameters, and the sums of their gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from programs import Part, assembled, parts_of
from strategies import policies, schedules, whole_language

from pipeproof.sched import (
    Action,
    Certificate,
    Kind,
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
    retime,
    with_micro_batches,
    with_steps,
)
from pipeproof.sched.interop.json_form import format_json, parse_json
from pipeproof.sched.interop.torch_writer import format_torch_csv
from pipeproof.sched.lower import POLICIES
from pipeproof.sched.matching import meetings
from pipeproof.sched.transforms.step import steps_behind_sums
from pipeproof.sim import Cost, simulate


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


def stepping() -> Schedule:
    return with_steps(three_devices(1).with_ties([(0, 2)]))


def test_a_step_waits_for_the_sum() -> None:
    """That of the stage between does not; and none of them holds a sum up."""
    program = lower(stepping())

    assert [line for line in program.describe().splitlines() if "STEP" in line] == [
        "   17 0STEP after 15; reads gradient 0, tied 0=2",
        "   14 1STEP; reads gradient 1",
        "   18 2STEP after 16; reads gradient 2, tied 0=2",
    ]
    assert ties_of(program) == [
        "15 tie 0=2 after 13; reads gradient 0; writes tied 0=2",
        "16 tie 0=2 after 7; reads gradient 2; writes tied 0=2",
    ]
    assert "and each STEP updates by it" in str(prove(program))
    cost = Cost(forward=1, backward=1, step=2)
    assert simulate(program, cost).grid().splitlines() == [
        "device 0 | F0   .... .... .... .... B0   STEP ----",
        "device 1 | .... F0   .... .... B0   STEP ---- ....",
        "device 2 | .... .... F0   B0   .... .... STEP ----",
    ]


def test_steps_of_other_stages_run_while_ties_sum() -> None:
    """Two of interleaved's four stages share: those of the others come before."""
    schedule = catalog.make("interleaved", devices=2, micro_batches=2)
    stepped = with_steps(schedule.with_ties([(0, 3)]))

    ends = [" ".join(map(str, list(stepped.row(d))[-6:])) for d in range(2)]
    assert ends == ["2B0 2B1 2STEP 0B0 0B1 0STEP", "3F1 3B1 1B0 1B1 1STEP 3STEP"]


def test_replicas_sum_before_and_add_once() -> None:
    """The first device of each stage; where all have all, each for itself."""
    chimera = catalog.make("chimera", devices=4, micro_batches=4)
    apart = lower(with_steps(chimera.with_ties([(0, 1)])))
    both = lower(with_steps(chimera.with_ties([(0, 3)])))

    def read(program: Program) -> list[str]:
        return [line.partition("; ")[2] for line in sorted(ties_of(program))]

    assert read(apart) == [
        "reads gradient 0; writes tied 0=1",
        "reads gradient 1; writes tied 0=1",
        "writes tied 0=1",
        "writes tied 0=1",
    ]
    assert read(both) == ["reads gradient 0, gradient 3; writes tied 0=3"] * 2
    assert sorted(map(len, meetings(apart)))[-1] == 4
    sums = [m for m in meetings(both) if both.action[m[0]] == Action.TIE]
    assert list(map(len, sums)) == [1, 1]
    for program, words in (
        (apart, "stage 0 of device 0 + stage 1 of device 1"),
        (both, "(stage 0 + stage 3) of device 0"),
    ):
        assert words in str(prove(program))


@pytest.mark.parametrize("name", ["interleaved", "zb-v", "chimera", "dualpipe"])
def test_transforms_keep_steps_where_they_can_wait(name: str) -> None:
    schedule = catalog.make(name, devices=4, micro_batches=8)
    tied = with_steps(schedule.with_ties([(0, schedule.stages - 1), (1, 2)]))
    times = {Kind.F: 2, Kind.I: 3, Kind.W: 1, Kind.STEP: 5}
    for changed in (retime(tied, times), with_micro_batches(tied, 4)):
        assert changed.ties == tied.ties
        assert prove(changed).ok


@given(schedule=whole_language(), policy=policies)
def test_steps_that_were_there_before_the_ties_are_moved(
    schedule: Schedule, policy: dict
) -> None:
    early = with_steps(schedule.with_ties([])).with_ties(schedule.ties)
    moved = steps_behind_sums(early)

    assert prove(lower(moved, **policy)).ok
    assert steps_behind_sums(moved) is moved
    assert sorted(moved.ops) == sorted(early.ops)
    if early == moved:
        assert prove(early).ok


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


@pytest.mark.parametrize(
    ("tie", "early", "late"), [((0, 2), "0B0", "0B1"), ((1, 3), "1B0", "1B1")]
)
def test_a_sum_that_comes_too_early_is_refuted(
    tie: tuple[int, int], early: str, late: str
) -> None:
    """As a race, or, where the backward behind it waits, for what it lacks."""
    schedule = catalog.make("interleaved", devices=2, micro_batches=2)
    program = lower(schedule.with_ties([tie]))
    parts = parts_of(program)
    labels = [program.label(i) for i in range(len(program))]
    first, last = labels.index(early), labels.index(late)
    device = int(program.device[first])
    here = [part for part in parts if part.action == Action.TIE]
    moved = next(part for part in here if program.device[part.key] == device)
    parts.remove(moved)
    moved.waits = [first]
    parts.insert(first + 1, moved)
    assert prove(assembled(program, parts)).findings[0].rule == "race"

    next(part for part in parts if part.key == last).waits.append(moved.key)
    refuted = str(prove(assembled(program, parts)))
    named = "=".join(map(str, tie))
    assert f"the sum of tie {named} has that of stage {tie[0]} before it is" in refuted


def test_a_sum_before_anything_is_added_lacks_it() -> None:
    schedule = catalog.make("interleaved", devices=2, micro_batches=2)
    program = lower(schedule.with_ties([(0, 2)]))
    parts = parts_of(program)
    labels = [program.label(i) for i in range(len(program))]
    first = labels.index("2B0")
    tie = parts.pop()
    tie.waits = []
    parts.insert(first, tie)
    next(part for part in parts if part.key == first).waits.append(tie.key)
    (found,) = prove(assembled(program, parts)).findings

    lacks = "lacks that of stage 0, lacks that of stage 2"
    assert found.found == f"the sum of tie 0=2 {lacks}"


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


@pytest.mark.parametrize(("tie", "other"), [((0, 3), 2), ((1, 2), 0)])
def test_another_stages_gradient_is_refuted(tie: tuple[int, int], other: int) -> None:
    """That of the other stage of a device."""
    schedule = catalog.make("interleaved", devices=2, micro_batches=2)
    program = lower(schedule.with_ties([tie]))
    parts = parts_of(program)
    gradients = {str(program.buffer_at(n)): n for n in range(len(program.buffers))}
    own = gradients[f"gradient {(other + 2) % 4}"]
    reader = next(part for part in parts[-2:] if own in part.reads)
    reader.reads = [gradients[f"gradient {other}"]]
    refuted = str(prove(assembled(program, parts)))

    lacked = (other + 2) % 4
    assert f"lacks that of stage {lacked}, has that of stage {other}" in refuted


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


@pytest.mark.parametrize(
    ("over", "lost"),
    [
        ([(1, "0=1", "gradient 1")], ["0=1"]),
        ([(1, "0=1", "gradient 1"), (1, "2=3", "gradient 2")], ["0=1", "2=3"]),
        ([(1, "0=1", "tied 2=3"), (0, "0=1", "tied 2=3")], ["0=1"]),
    ],
)
def test_what_is_written_over_a_sum_is_refuted(
    over: list[tuple[int, str, str]], lost: list[str]
) -> None:
    """By a hand-over behind the sums: on one device, of both ties, on both devices."""
    schedule = catalog.make("zb-v", devices=2, micro_batches=2)
    program = lower(schedule.with_ties([(0, 1), (2, 3)]))
    parts = parts_of(program)
    local = next(part for part in parts if part.action == Action.LOCAL)
    buffers = {
        (program.buffer_at(n).device, str(program.buffer_at(n))): n
        for n in range(len(program.buffers))
    }
    for device, tie, by in over:
        behind = [
            part.key
            for part in parts
            if part.action == Action.TIE and program.device[part.key] == device
        ]
        moves = {
            "reads": [buffers[device, by]],
            "writes": [buffers[device, f"tied {tie}"]],
            "frees": [],
        }
        parts.append(
            dataclasses.replace(local, key=-1, stream=device, waits=behind, **moves)
        )
    refuted = prove(assembled(program, parts))

    assert [finding.found for finding in refuted.findings] == [
        f"what lies there in the end is not what tie {tie} summed" for tie in lost
    ]


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
        "    expected: ties of stages of 0 … 2",
        "    Name stages of the schedule, or drop it.",
    ]


def test_says_where_a_step_cannot_wait() -> None:
    """Behind it, device 1 has a backward that the sum needs on device 0."""
    schedule = catalog.make("interleaved", devices=2, micro_batches=2)
    early = with_steps(schedule).with_ties([(0, 3)])

    (finding,) = check(early).findings
    assert str(finding).splitlines()[0] == (
        "device 1, step 6: 3STEP runs before 1B1; expected 3STEP behind all but STEPs "
        "of its device: it waits for the sum of 0=3, and so for other devices. Move "
        "it behind step 8 (with_steps puts it there, if the schedule has its ties "
        "before)."
    )


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (
            lambda tie, step: step.reads.pop(),
            ["0STEP does not read the sum of tie 0=2"],
        ),
        (
            lambda tie, step: step.waits.remove(tie.key),
            ["tied 0=2"],
        ),
        (
            lambda tie, step: (step.waits.remove(tie.key), tie.waits.append(step.key)),
            ["0STEP reads tied 0=2, which nothing has written yet"],
        ),
        (
            lambda tie, step: tie.reads.clear(),
            ["the sum of tie 0=2 lacks that of stage 0"],
        ),
    ],
    ids=["not read", "not waited for", "before", "of another sum"],
)
def test_a_step_without_its_sum_is_refuted(
    edit: Callable[[Part, Part], object], found: list[str]
) -> None:
    program = lower(stepping())
    parts = parts_of(program)
    tie, step = parts[-4], parts[-2]
    edit(tie, step)
    if step.key in tie.waits:
        parts[-4], parts[-2] = step, tie
    said = prove(assembled(program, parts))

    assert isinstance(said, Refutation)
    for words in found:
        assert words in str(said)


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
