"""Two schedules that say what is special in torch's: a V of stages, and a group."""

from pipeproof.sched import B, F, I, Placement, Schedule, W, overlap

V_SHAPE = Schedule.of(
    [
        [
            *(F(0, 0), F(0, 1), F(3, 0), I(3, 0), F(3, 1), I(3, 1)),
            *(W(3, 0), W(3, 1), B(0, 0), B(0, 1)),
        ],
        [F(1, 0), F(2, 0), F(1, 1), F(2, 1), B(2, 0), B(1, 0), B(2, 1), B(1, 1)],
    ],
    placement=Placement.v(2),
)
OVERLAPPED = Schedule.of([[F(0, 0), overlap(F(0, 1), B(0, 0)), B(0, 1)]])
