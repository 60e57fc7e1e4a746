"""One rank for each device: the same gradients, bit by bit."""

from __future__ import annotations

import os
import sys

import psutil
import pytest
import torch
from jobs import (
    Job,
    Result,
    all_wait,
    alone,
    frozen_start,
    listening,
    little_held,
    mixed,
    nobody_waits,
    offsets,
    over_gloo,
    part,
    policies,
    run,
    same_values,
    timed,
)
from pool import Do

from pipeproof.exec import reference
from pipeproof.sched import CATALOG, POLICIES, Kind
from pipeproof.sched.groups import needs
from pipeproof.sched.row import Case

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_equal(results: list[Result], expected: Result) -> None:
    found: dict[int, str] = {}
    for rank, result in enumerate(results):
        assert result.losses == expected.losses, f"the losses of rank {rank}"
        for stage, grads in result.grads.items():
            assert grads == expected.grads[stage], f"stage {stage} of rank {rank}"
        found |= result.grads
    assert found.keys() == expected.grads.keys()
    assert results[0].drawn == expected.drawn, "rank 0's generator goes on the same"


def unpipelined(job: Job) -> Result:
    stages = job.stages()

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return reference(
            stages, job.schedule, same_values, inputs, targets, **job.options
        )

    return run(job, step, stages, range(len(stages)))


@pytest.mark.parametrize("name", CATALOG)
def test_every_row_equals_one_process_and_the_reference(name: str, do: Do) -> None:
    job = Job(name, 4, 8)

    results, expected = do(part, job), alone(job)

    assert_equal(results, expected)
    assert_equal(results, unpipelined(job))
    assert_equal(do(over_gloo, (part, job)), expected)


@pytest.mark.parametrize("name", ["gpipe", "interleaved", "zb-v", "chimera"])
def test_two_ranks(name: str, do: Do) -> None:
    job = Job(name, 2, 4, own_only=True, dtype=torch.float32)

    assert_equal(do(part, job, 2), alone(job))


def test_shapes_may_change_from_step_to_step(do: Do) -> None:
    job = Job("1f1b", 4, 5, shapes=((5, 6), (5, 6), (13, 2), (5, 6), (13, 2), (13, 3)))

    assert_equal(do(part, job), alone(job))


def test_tuples_views_and_integers_cross(do: Do) -> None:
    job = Job("interleaved", 4, 8, stage=mixed, shapes=((9, 3), (9, 3), (12, 1)))

    assert_equal(do(part, job), alone(job))


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_that_there_are_not(weighted: bool, do: Do) -> None:
    job = Job("1f1b", 4, 6, stage=frozen_start, shapes=((7, 2),) * 4, weighted=weighted)

    assert_equal(do(part, job), alone(job))


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "dualpipe"])
def test_messages_in_groups(name: str, do: Do) -> None:
    """In the first step of a shape they have headers, and in the second none."""
    job = Job(name, 4, 8, shapes=((11, 6), (11, 6)), messages="grouped")

    assert_equal(do(part, job), alone(job))
    assert_equal(do(part, job), unpipelined(job))


def test_what_waits_for_a_group_waits_for_all_of_it(do: Do) -> None:
    trace = do(timed, Job("1f1b", 4, 8, messages="grouped"))[0]
    waits = needs(trace.program)

    assert len(trace.program.groups) == 2 * (7 + 6 + 5)
    assert (trace.end[waits.values] <= trace.start[waits.owner]).all()


def test_threads_wait_for_what_is_sent_where_it_is_much(do: Do) -> None:
    job = Job("1f1b", 4, 6, shapes=((7, 2),) * 3)

    assert_equal(do(over_gloo, (little_held, job)), alone(job))


def test_one_micro_batch(do: Do) -> None:
    job = Job("gpipe", 4, 1, own_only=True)

    assert_equal(do(part, job), alone(job))


def test_one_trace_of_all_ranks(do: Do) -> None:
    traces = do(timed, Job("zb-h1", 4, 8))

    for trace in traces:
        assert trace.source == "measured"
        assert trace.start.tolist() == traces[0].start.tolist()
        assert trace.end.tolist() == traces[0].end.tolist()
    trace, program = traces[0], traces[0].program
    assert trace.start.min() == 0
    assert (trace.start <= trace.end).all()
    waits = program.waits_for
    assert (trace.end[waits.values] <= trace.start[waits.owner]).all()
    for stream in program.by_stream:
        assert (trace.end[stream[:-1]] <= trace.start[stream[1:]]).all()
    assert (trace.end[program.recv_of] >= trace.start[program.send_of]).all()
    assert 0 < trace.bubble_fraction < 1


def test_an_op_that_waits_sees_itself_when_its_message_comes(do: Do) -> None:
    """A traced step had a thread wait for each, and the op for that thread."""
    job = Job("zb-h1", 4, 8)

    pairs = zip(do(over_gloo, (nobody_waits, job)), do(over_gloo, (all_wait, job)))

    for rank, ((_, all_of_them), (trace, fewer)) in enumerate(pairs):
        program = trace.program
        received = program.recv_of[program.device[program.recv_of] == rank]
        assert all_of_them - fewer == len(received)
        assert (trace.end[program.send_of] <= trace.end[program.recv_of]).all()
        assert (trace.end[received] > trace.start[received]).any()


@pytest.mark.skipif(sys.platform != "linux", reason="others have other policies")
def test_gloo_takes_no_core_from_an_op(do: Do) -> None:
    """Its threads spun for locks of senders in whose place they ran."""
    more_than_one_core = len(os.sched_getaffinity(0)) > 1

    for main, *others in do(over_gloo, (policies, Job("1f1b", 4, 4))):
        assert main == os.SCHED_OTHER
        assert others.count(os.SCHED_BATCH) == more_than_one_core


def test_clocks_of_other_hosts_are_set_by_those_of_the_first(do: Do) -> None:
    for rank, (here, far) in enumerate(do(offsets, Job("gpipe", 4, 4))):
        assert here == 0
        assert round(far / 1000) == -rank


def test_ranks_of_one_host_listen_on_loopback_only(do: Do) -> None:
    """torch's TCPStore would listen on every interface."""
    found = do(listening, Job("1f1b", 4, 4))
    launcher = psutil.Process().net_connections(kind="inet")
    found.append([c.laddr.ip for c in launcher if c.status == psutil.CONN_LISTEN])

    assert any(found), "ranks have sockets for each other"
    assert {ip for of_rank in found for ip in of_rank} <= {"127.0.0.1", "::1"}


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("micro_batches", [4, 8, 16])
@pytest.mark.parametrize("name", CATALOG)
def test_every_row_in_more_sizes(
    name: str, micro_batches: int, policy: str, do: Do
) -> None:
    for devices in (2, 4):
        if not CATALOG[name].allows(Case(devices, micro_batches)):
            continue
        job = Job(
            name, devices, micro_batches, policy, shapes=((19, 7),), dtype=torch.float32
        )
        if policy != "never" and job.schedule.has(Kind.OFFLOAD):
            continue
        assert_equal(do(part, job, devices), alone(job))
