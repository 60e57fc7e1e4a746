from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from strategies import near_valid, runs_through, schedules, whole_language

from pipeproof.sched import (
    B,
    F,
    I,
    Kind,
    Op,
    Placement,
    R,
    Schedule,
    ScheduleError,
    W,
    catalog,
    check,
    op,
    overlap,
)

REDUCE, STEP = op(Kind.REDUCE, 0), op(Kind.STEP, 0)
ON_ONE = Placement.looped(1, 2)


def test_a_backward_ahead_of_its_forward() -> None:
    schedule = Schedule.of(
        [
            [F(0, 0), F(0, 1), B(0, 0), F(0, 2), B(0, 1), B(0, 2)],
            [B(1, 0), F(1, 0), F(1, 1), B(1, 1), F(1, 2), B(1, 2)],
        ],
        name="one_f_one_b",
    )
    with pytest.raises(ScheduleError) as caught:
        check(schedule).raise_if_bad()

    assert str(caught.value).splitlines() == [
        "one_f_one_b(devices=2, micro_batches=3) breaks 1 rule:",
        "  device 1, step 0: B0 runs before its own F0",
        "    device 1 | B0 F0 F1 B1 F2 B2",
        "               ^^",
        "    expected: F0 first, at step 1 now",
        "    Move F0 ahead of B0, or drop both.",
    ]


def test_a_good_one() -> None:
    report = check(catalog.make("1f1b", devices=2, micro_batches=3))

    assert report.ok
    assert report.findings == ()
    assert str(report) == (
        "1f1b(devices=2, micro_batches=3): complete, ordered and free of cycles"
    )
    report.raise_if_bad()


def test_marks_a_group_as_a_whole_and_cuts_a_long_row() -> None:
    forwards = [F(0, m) for m in range(12)]
    rows = [[*forwards, *(B(0, m) for m in range(8)), B(0, 9), B(0, 8), B(0, 11)]]
    rows[0] += overlap(B(0, 10), F(0, 12)), B(0, 12), B(0, 12)
    (finding,) = check(Schedule.of(rows)).findings

    assert finding.where == "device 0, step 26"
    lines = str(check(Schedule.of(rows))).splitlines()
    assert lines[2:4] == [
        "    device 0 | … B8 B11 (B10&F12) B12 B12",
        "                                      ^^^",
    ]


def test_shows_the_whole_of_a_group_at_the_edge() -> None:
    row = [B(0, 0), *(F(0, m) for m in range(4)), overlap(F(0, 4), B(0, 1))]
    row += [F(0, 5), *(B(0, m) for m in range(2, 6))]

    lines = str(check(Schedule.of([row]))).splitlines()
    assert lines[2:4] == [
        "    device 0 | B0 F0 F1 F2 F3 (F4&B1) …",
        "               ^^",
    ]
    row = [F(0, 0), F(0, 1), overlap(B(0, 0), F(0, 2)), *(F(0, m) for m in range(3, 7))]
    row += [B(0, 7), F(0, 7), *(B(0, m) for m in range(1, 7))]

    lines = str(check(Schedule.of([row]))).splitlines()
    assert lines[2:4] == [
        "    device 0 | … (B0&F2) F3 F4 F5 F6 B7 F7 B1 B2 B3 B4 …",
        "                                     ^^",
    ]


def bad(
    *rows: Sequence[object],
    placement: Placement | None = None,
    micro_batches: int = 1,
    slices: int = 1,
    steps: int = 1,
    pipe_of: list[int] | None = None,
) -> list[str]:
    """Every finding in a line."""
    schedule = Schedule.of(
        rows,  # type: ignore[arg-type]
        placement=placement,
        micro_batches=micro_batches,
        slices=slices,
        steps=steps,
        pipe_of=pipe_of,
    )
    return [str(finding) for finding in check(schedule).findings]


def test_an_op_that_is_missing() -> None:
    assert bad([F(0, 0)], [F(1, 0), B(1, 0)]) == [
        "device 0: 0B0 is missing; expected a backward: B, or I and W, for each stage "
        "and micro-batch. Add 0B0 to device 0."
    ]
    assert bad([B(0, 0)]) == [
        "device 0: 0F0 is missing; expected a forward, for each stage and micro-batch. "
        "Add 0F0 to device 0."
    ]
    assert bad([F(0, 0), I(0, 0)]) == [
        "device 0: 0W0 is missing; expected a weight gradient beside its I, for each "
        "stage and micro-batch. Add 0W0 to device 0."
    ]
    assert bad([F(0, 0), W(0, 0)]) == [
        "device 0: 0I0 is missing; expected an input gradient beside its W, for each "
        "stage and micro-batch. Add 0I0 to device 0."
    ]
    assert bad([F(0, 0), op(Kind.OFFLOAD, 0), B(0, 0)]) == [
        "device 0: 0RELOAD0 is missing; expected a reload of what was offloaded, for "
        "each stage and micro-batch. Add 0RELOAD0 to device 0."
    ]
    assert bad([F(0, 0), op(Kind.RELOAD, 0), B(0, 0)]) == [
        "device 0: 0OFFLOAD0 is missing; expected an offload of what is reloaded, for "
        "each stage and micro-batch. Add 0OFFLOAD0 to device 0."
    ]


def test_two_forms_of_the_backward() -> None:
    assert bad([F(0, 0), B(0, 0), W(0, 0)]) == [
        "device 0, step 2: W0 stands beside the whole backward B0; expected either B, "
        "or I and W: B is both. Keep one form of the backward."
    ]


def test_an_op_twice() -> None:
    assert bad([F(0, 0), B(0, 0), F(0, 0)]) == [
        "device 0, step 2: F0 stands a second time; expected each op once; F0 stands "
        "at device 0, step 0. Drop one of the two."
    ]
    assert bad([F(0, 0), B(0, 0), STEP, STEP]) == [
        "device 0, step 3: STEP stands a second time; expected each op once; STEP "
        "stands at device 0, step 2. Drop one of the two."
    ]


def test_an_op_on_the_wrong_device() -> None:
    assert bad([F(0, 0), B(1, 0), B(0, 0)], [F(1, 0)]) == [
        "device 0, step 1: 1B0 runs on device 0; expected stage 1 on device 1, as the "
        "placement says. Move it to device 1, or change the placement."
    ]
    steps = [STEP, op(Kind.STEP, 1)]
    assert bad([F(0, 0), B(0, 0), STEP], [F(1, 0), B(1, 0), *steps]) == [
        "device 1, step 2: 0STEP runs on device 1; expected stage 0 on device 0, as "
        "the placement says. Move it to device 0, or change the placement."
    ]


def test_numbers_that_the_header_does_not_have() -> None:
    rows = [F(0, 1), F(1, 0), F(0, 0, 2), op(Kind.STEP, 0, 3)]
    assert bad(rows) == [
        "device 0, step 1: 1F0 names stage 1; expected stage 0 … 0. Drop the op, or "
        "raise the schedule's count: stage.",
        "device 0, step 0: 0F1 names micro-batch 1; expected micro-batch 0 … 0. Drop "
        "the op, or raise the schedule's count: micro-batch.",
        "device 0, step 3: 0STEP3 names step 3; expected step 0 … 0. Drop the op, or "
        "raise the schedule's count: step.",
        "device 0, step 2: 0F0.2 names slice 2; expected slice 0 … 0. Drop the op, or "
        "raise the schedule's count: slice.",
    ]


def test_far_too_few_ops_are_reported_before_anything_is_allocated() -> None:
    assert bad([F(0, 0)], micro_batches=1 << 22) == [
        "schedule: only 1 ops; expected a forward and a backward for each of 4,194,304 "
        "(stage, micro-batch, slice). Add the missing ops, or lower the sizes in the "
        "header."
    ]


def test_too_few_is_less_than_a_quarter_but_for_small_ones() -> None:
    """Up to 4 times the ops and 4,096 more, each missing one is named."""
    (least,) = bad([F(0, 0)], micro_batches=4101)
    named = bad([F(0, 0)], micro_batches=4100)
    sliced = bad([F(0, 0)], micro_batches=2050, slices=2)

    assert least.startswith("schedule: only 1 ops; expected a forward and a backward")
    assert len(named) == len(sliced) == 2 * 4100 - 1
    assert named[0].startswith("device 0: 0F1 is missing")


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        (
            [F(0, 0), REDUCE, B(0, 0)],
            "step 1: REDUCE runs before B0 of its stage; expected REDUCE after all of "
            "its stage, B0 too. Move REDUCE behind step 2.",
        ),
        (
            [F(0, 0), W(0, 0), I(0, 0)],
            "step 1: W0 runs before its own I0; expected I0 first, at step 2 now. "
            "Move I0 ahead of W0, or drop both.",
        ),
        (
            [R(0, 0), F(0, 0), B(0, 0)],
            "step 0: R0 runs before its own F0; expected F0 first, at step 1 now. "
            "Move F0 ahead of R0, or drop both.",
        ),
        (
            [F(0, 0), B(0, 0), R(0, 0)],
            "step 1: B0 runs before its own R0; expected R0 first, at step 2 now. "
            "Move R0 ahead of B0, or drop both.",
        ),
        (
            [F(0, 0), op(Kind.RELOAD, 0), op(Kind.OFFLOAD, 0), B(0, 0)],
            "step 1: RELOAD0 runs before its own OFFLOAD0; expected OFFLOAD0 first, at "
            "step 2 now. Move OFFLOAD0 ahead of RELOAD0, or drop both.",
        ),
        (
            [F(0, 0), STEP, B(0, 0)],
            "step 1: STEP runs before B0 of its stage; expected STEP after all of its "
            "stage, B0 too. Move STEP behind step 2.",
        ),
        (
            [F(0, 0), B(0, 0), STEP, REDUCE],
            "step 2: STEP runs before REDUCE of its stage; expected STEP after all of "
            "its stage, REDUCE too. Move STEP behind step 3.",
        ),
    ],
)
def test_the_order_on_one_device(row: list[Op], finding: str) -> None:
    assert bad(row) == [f"device 0, {finding}"]


def test_slices_go_forward_in_order_and_backward_in_reverse() -> None:
    assert bad([F(0, 0, 1), F(0, 0), B(0, 0), B(0, 0, 1)], slices=2) == [
        "device 0, step 0: F0.1 runs before F0; expected F0 first, at step 1 now. Move "
        "F0 ahead of F0.1.",
        "device 0, step 2: B0 runs before B0.1; expected B0.1 first, at step 3 now. "
        "Move B0.1 ahead of B0.",
    ]


def test_stages_of_one_device_are_in_order_too() -> None:
    """A cycle inside one row once counted as named by the rule of order."""
    assert bad([F(1, 0), F(0, 0), B(1, 0), B(0, 0)], placement=ON_ONE) == [
        "device 0, step 0: 1F0 runs before 0F0; expected 0F0 first, at step 1 now. "
        "Move 0F0 ahead of 1F0."
    ]


def test_ops_of_a_group_are_independent() -> None:
    assert bad([F(0, 0), overlap(F(1, 0), B(1, 0)), B(0, 0)], placement=ON_ONE) == [
        "device 0, step 2: 1B0 needs 1F0 of its own group; expected ops of an overlap "
        "group to be independent of each other. Take one of them out of the group."
    ]


def test_replicas_are_reduced() -> None:
    down, up = Placement.bidirectional(2), [0, 1]
    rows = [
        [F(0, 0), F(1, 1), B(1, 1), B(0, 0), op(Kind.REDUCE, [0, 1])],
        [F(1, 0), F(0, 1), B(1, 0), B(0, 1), op(Kind.REDUCE, 0)],
    ]
    assert bad(*rows, placement=down, pipe_of=up, micro_batches=2) == [
        "device 1: 1REDUCE is missing; expected the replicas of stage 1 on devices 0, "
        "1 to sum their gradients. Add 1REDUCE to device 1, after its last backward."
    ]


def test_a_replica_that_no_micro_batch_passes_is_only_reduced() -> None:
    """Its STEP, first in its row, comes behind nothing."""
    idle = Placement(((0,), (1,)))

    found = bad([STEP], [F(0, 0), B(0, 0), STEP], placement=idle, pipe_of=[1])
    assert [line.split("; ")[0] for line in found] == [
        "device 0: 0REDUCE is missing",
        "device 1: 0REDUCE is missing",
    ]


def test_devices_that_wait_for_each_other() -> None:
    rows = [F(0, 0), B(0, 0), F(0, 1), B(0, 1)], [F(1, 0), F(1, 1), B(1, 0), B(1, 1)]
    (finding,) = bad(*rows, micro_batches=2)

    assert finding == (
        "device 1, step 2: 6 ops wait for each other: 1B0 (device 1) → 0B0 (device 0) "
        "→ 0F1 (device 0) → 1F1 (device 1) → 1B0 (device 1); expected an order in "
        "which some op can always run. Reorder the ops of one of these devices."
    )


def test_a_cycle_is_named_beside_what_is_out_of_order() -> None:
    rows = (
        [F(0, 0), B(0, 0), F(0, 1), B(0, 1), F(0, 2), W(0, 2), I(0, 2)],
        [F(1, 0), F(1, 1), B(1, 0), B(1, 1), F(1, 2), B(1, 2)],
    )
    order, cycle = bad(*rows, micro_batches=3)

    assert order.startswith("device 0, step 5: W2 runs before its own I2")
    assert cycle.startswith("device 1, step 2: 11 ops wait for each other: 1B0")


def test_a_long_cycle_is_cut_short() -> None:
    home = (*range(40), 0)
    rows = [[F(s, 0), B(s, 0)] for s in range(40)]
    rows[0] = [F(40, 0), F(0, 0), B(40, 0), B(0, 0)]
    (finding,) = check(Schedule.of(rows, placement=Placement((home,)))).findings

    assert finding.found.count("→") == 19
    assert "→ (23 more) →" in finding.found


def test_a_cycle_of_twenty_names_is_spelled_out() -> None:
    home = (*range(18), 0)
    rows = [[F(s, 0), B(s, 0)] for s in range(18)]
    rows[0] = [F(18, 0), F(0, 0), B(18, 0), B(0, 0)]
    (finding,) = check(Schedule.of(rows, placement=Placement((home,)))).findings

    assert finding.found.count("→") == 19
    assert "more" not in finding.found


def test_many_findings_are_counted() -> None:
    report = check(Schedule.of([[B(0, range(30)), F(0, range(30))]]))

    assert len(report.findings) == 30
    assert str(report).splitlines()[0].endswith("breaks 30 rules:")
    assert str(report).splitlines()[-1] == "  … and 10 more"


def test_asynchronous_steps_can_be_said() -> None:
    row = [F(0, 0), B(0, 0), F(0, 1), STEP, B(0, 1), op(Kind.STEP, 0, 1)]

    assert check(Schedule.of([row], steps=2)).ok


@given(schedule=schedules() | whole_language())
def test_any_linear_extension_is_clean(schedule: Schedule) -> None:
    assert runs_through(schedule)
    check(schedule).raise_if_bad()


@settings(max_examples=400)
@given(schedule=near_valid() | near_valid(whole_language()))
def test_one_edit_is_found_unless_it_breaks_nothing(schedule: Schedule) -> None:
    report = check(schedule)

    assert report.ok == runs_through(schedule)
    assert str(report)
    assert all(str(finding) for finding in report.findings)


@pytest.mark.slow
def test_a_million_findings_take_linear_time() -> None:
    """Naming an op once copied the row it stands in."""
    m = 500_000
    report = check(Schedule.of([[B(0, range(m)), F(0, range(m))]]))

    assert len(report.findings) == m


def test_copies_are_no_part_of_an_overlap_group() -> None:
    schedule = Schedule.parse(
        """\
devices: 1
placement: linear
micro-batches: 2

device 0 | 0F0 (0F1&0OFFLOAD0) 0B1 0RELOAD0 0B0
"""
    )
    (finding,) = check(schedule).findings

    assert finding.rule == "group"
    assert finding.found == "OFFLOAD0 runs beside the compute stream anyway"


def test_offloads_go_to_another_device() -> None:
    rows = [[F(0, 0), B(0, 0)], [F(1, 0), B(1, 0)]]

    assert [str(f) for f in check(Schedule.of(rows, offload_to=[0, 2])).findings] == [
        "device 0: its OFFLOADs go to itself; expected another device of 0 … 1, or the "
        "host. Name in offload_to the device whose memory takes them.",
        "device 1: its OFFLOADs go to device 2; expected another device of 0 … 1, or "
        "the host. Name in offload_to the device whose memory takes them.",
    ]
    assert check(Schedule.of(rows, offload_to=[1, 0])).ok
    (second,) = check(Schedule.of(rows, offload_to=[None, 1])).findings
    assert second.device == 1
