"""What an instruction takes: the times of its ops, or that of an overlapping pair."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules, whole_language

from pipeproof.sched import Kind, Schedule, catalog, lower
from pipeproof.sim import Cost

PAIRS = [Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W]

grouped = st.sampled_from(
    [
        catalog.make("dualpipe", devices=4, micro_batches=8),
        catalog.make("dualpipe-v", devices=3, micro_batches=6),
    ]
)


@given(schedule=grouped | whole_language() | schedules(), data=st.data())
def test_groups_alike_in_time_may_overlap_otherwise(
    schedule: Schedule, data: st.DataObject
) -> None:
    """Few different times, so that groups of other stages and kinds add up alike."""
    per_stage = st.lists(
        st.integers(1, 2), min_size=schedule.stages, max_size=schedule.stages
    )
    forward, input_grad, weight_grad = (data.draw(per_stage) for _ in range(3))
    overlap = data.draw(st.none() | per_stage)
    cost = Cost(forward, input_grad, weight_grad, overlap=overlap)
    program = lower(schedule)
    expected = []
    for index in program.computes.tolist():
        ops = program[index].ops
        both = {s: a + b for s, (a, b) in enumerate(zip(input_grad, weight_grad))}
        times = {Kind.F: forward, Kind.I: input_grad, Kind.W: weight_grad}
        times |= {Kind.R: forward, Kind.B: both, Kind.STEP: [0] * schedule.stages}
        took = sum(times[op.kind][op.stage] for op in ops)
        if overlap is not None and sorted(op.kind for op in ops) in PAIRS:
            took = next(overlap[op.stage] for op in ops if op.kind == Kind.F)
        expected.append(Fraction(took, schedule.slices))

    assert cost.durations(program) == expected
