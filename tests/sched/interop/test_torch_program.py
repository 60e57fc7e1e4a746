"""The order of sends and receives that a CSV of torch's says, under proof."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import schedules

from pipeproof.sched import (
    Certificate,
    ParameterError,
    ParseError,
    Schedule,
    ScheduleError,
    UnsupportedError,
    catalog,
    prove,
    recompute,
)
from pipeproof.sched.interop.torch_csv import read_torch_csv
from pipeproof.sched.interop.torch_program import torch_program
from pipeproof.sched.interop.torch_writer import format_torch_csv


def program_of(text: str):  # noqa: ANN201
    return torch_program(read_torch_csv(text, agreeing=False))


def found_in(text: str) -> list[str]:
    return [finding.found for finding in prove(program_of(text)).findings]


RIGHT = """\
0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1
1RECV_F0,1F0,1RECV_F1,1F1,1B0,1SEND_B0,1B1,1SEND_B1
"""


def test_the_program_in_a_picture() -> None:
    program = program_of(RIGHT)

    assert (
        program.describe().splitlines()[:7]
        == [
            "device 0, compute:",
            "  0 0F0; writes activation 0:0, input 0:0, output 0:0",
            "  2 0F1; writes activation 0:1, input 0:1, output 0:1",
            " 12 0B0 after 11; reads activation 0:0, input 0:0, output_grad 0:0; "
            "writes gradient 0; frees activation 0:0, input 0:0, output_grad 0:0",
            " 14 0B1 after 13; reads activation 0:1, input 0:1, output_grad 0:1; "
            "writes gradient 0; frees activation 0:1, input 0:1, output_grad 0:1",
            "device 1, compute:",
            "  5 1F0 after 4; reads input 1:0; writes activation 1:0, output 1:0",
        ]
        or program.describe()
    )
    prove(program).raise_if_bad()


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (
            "1RECV_F0,1F0,1RECV_F1,1F1",
            "1RECV_F1,1RECV_F0,1F0,1F1",
            "activation 0→1:1 is received where activation 0→1:0 was sent",
        ),
        ("0SEND_F1,", "", "0 of them"),
        ("1RECV_F1,", "", "0 of them"),
        (
            "0F0,0SEND_F0",
            "0SEND_F0,0F0",
            "nothing orders 0F0, which writes output 0:0, behind send activation 0→1:0",
        ),
        (
            "1RECV_F0,1F0",
            "1F0,1RECV_F0",
            "1F0 (8, device 1, compute) waits for recv activation 0→1:0",
        ),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, found: str) -> None:
    assert old in RIGHT
    said = found_in(RIGHT.replace(old, new))

    assert found in said[0]


@settings(max_examples=40)
@given(
    schedule=schedules(slices=1),
    dice=st.randoms(use_true_random=False),
    edit=st.sampled_from(["none", "swap", "drop"]),
)
def test_an_edited_file_is_proved_where_its_transfers_pair_up(
    schedule: Schedule, dice: random.Random, edit: str
) -> None:
    """Two opinions: the reader's rules for CSV, and the proof."""
    try:
        text = format_torch_csv(recompute(schedule, "never"), communication=True)
    except UnsupportedError:
        return
    rows = [line.split(",") for line in text.splitlines()]
    row = dice.choice(rows)
    moves = [at for at, cell in enumerate(row) if "SEND" in cell or "RECV" in cell]
    if edit != "none" and moves:
        at = dice.choice(moves)
        if edit == "drop":
            del row[at]
        else:
            to = dice.randrange(len(row))
            row[at], row[to] = row[to], row[at]
    edited = "".join(",".join(row) + "\n" for row in rows)
    try:
        csv = read_torch_csv(edited, agreeing=False)
    except ParseError:  # sharding out of turn
        return
    try:
        read_torch_csv(edited)
        agreed = True
    except ParseError:
        agreed = False
    if csv.schedule.report.ok and csv.has_communication:
        verdict = prove(torch_program(csv))
        assert verdict.ok == agreed, str(verdict)


def test_torch_s_deferred_receives_are_refuted() -> None:
    """`defer_pp_recv=True` in torch 2.13 gave silently wrong gradients.

    For interleaved zero-bubble on 2 ranks with 2 chunks and 4 micro-batches, rank 1
    takes the gradient that stage 2 sends for stage 1's output.
    """
    pytest.importorskip("torch.distributed.pipelining")
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining import schedules as theirs

    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.num_stages = 0, 2, 4
    stage.submod = None

    def lowered(deferred: bool) -> str:
        made = theirs.ScheduleInterleavedZeroBubble(
            [stage] * 2, 4, defer_pp_recv=deferred
        )
        made._prepare_schedule_with_comms(made.pipeline_order)
        rows = made.pipeline_order_with_comms
        return "".join(",".join(map(str, rows[r])) + "\n" for r in sorted(rows))

    assert isinstance(prove(program_of(lowered(False))), Certificate)
    (finding,) = prove(program_of(lowered(True))).findings
    assert (finding.rule, finding.device) == ("fifo", 0)
    assert finding.found == (
        "activation 0→1:2 is received where gradient 2→1:0 was sent"
    )


def test_files_that_say_no_program_are_refused() -> None:
    plain = format_torch_csv(catalog.make("1f1b", devices=2, micro_batches=2))

    with pytest.raises(ParameterError, match="takes a CSV with communication"):
        program_of(plain)
    with pytest.raises(ScheduleError, match="B0 runs before its own F0"):
        program_of(RIGHT.replace("1F0,1RECV_F1,1F1,1B0", "1RECV_F1,1F1,1B0,1F0"))
    with pytest.raises(
        ParseError,
        match="row 2, column 6: expected a transfer of micro-batch 0 … 1, found "
        "'1SEND_B3'",
    ):
        program_of(RIGHT.replace("1SEND_B0", "1SEND_B3"))
    with pytest.raises(ParseError, match="there is no stage 2"):
        program_of(RIGHT.replace("1F0,", "1F0,1SEND_F0,"))
