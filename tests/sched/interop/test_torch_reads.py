"""torch's CSV held against torch itself: what it reads, lowers, writes and runs."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch_shapes import OVERLAPPED, V_SHAPE

from pipeproof.sched import (
    B,
    F,
    Kind,
    ParseError,
    Schedule,
    catalog,
    check,
    retime,
    split_backward,
)
from pipeproof.sched.interop.torch_csv import parse_torch_csv, read_torch_csv
from pipeproof.sched.interop.torch_writer import format_torch_csv


def in_torch() -> list[Schedule]:
    """Some that torch can run: any order of whole and split backwards."""
    one = catalog.make("1f1b", devices=3, micro_batches=5)
    apart = dict.fromkeys((Kind.F, Kind.I, Kind.W), 1)
    return [
        one,
        catalog.make("gpipe", devices=2, micro_batches=3),
        retime(split_backward(one), apart, activations=3),
        V_SHAPE,
        OVERLAPPED,
    ]


@pytest.mark.parametrize("number", range(5))
def test_torch_reads_and_lowers_what_we_write(number: int) -> None:
    pytest.importorskip("torch.distributed.pipelining")
    from torch.distributed.pipelining import schedules as theirs

    schedule = in_torch()[number]
    home = schedule.placement.pipes[0]

    def actions(text: str) -> dict[int, list[theirs._Action]]:
        rows = csv.reader(text.splitlines())
        return {
            r: [theirs._Action.from_str(c) for c in row] for r, row in enumerate(rows)
        }

    def text(rows: dict[int, list[theirs._Action]]) -> str:
        return "".join(",".join(map(str, row)) + "\n" for row in rows.values())

    plain = actions(format_torch_csv(schedule))
    found = theirs._validate_schedule(
        plain, schedule.devices, schedule.stages, schedule.micro_batches
    )
    assert [found[stage] for stage in range(schedule.stages)] == list(home)
    ours = actions(format_torch_csv(schedule, communication=True))
    assert parse_torch_csv(text(ours)) == schedule
    lowered = {
        rank: theirs._add_reduce_grad(
            theirs._add_unshard_reshard(row), schedule.micro_batches
        )
        for rank, row in plain.items()
    }
    lowered = theirs._add_send_recv(lowered, lambda s: home[s], schedule.stages)
    assert parse_torch_csv(text(lowered)) == schedule
    if schedule is not OVERLAPPED:  # torch's simulation knows no groups
        moving = {
            rank: [a for a in row if "SHARD" not in str(a) and "REDUCE" not in str(a)]
            for rank, row in ours.items()
        }
        theirs._simulate_comms_compute(moving, lambda s: home[s], schedule.stages)


def test_a_receive_that_torch_defers_too_far_is_refused() -> None:
    """`defer_pp_recv=True` in torch 2.13 gave silently wrong gradients.

    It puts each receive right ahead of the op that needs it, in another order
    than the sends, and receives pair up with sends in order.
    """
    pytest.importorskip("torch.distributed.pipelining")
    from torch.distributed.pipelining import schedules as theirs

    rows = {
        rank: [theirs._Action.from_str(word) for word in row]
        for rank, row in enumerate(
            csv.reader(format_torch_csv(SWAPPED, communication=True).splitlines())
        )
    }
    deferred = theirs._defer_recv_ops(rows, lambda stage: stage)
    text = "".join(",".join(map(str, row)) + "\n" for row in deferred.values())

    assert check(SWAPPED).ok
    with pytest.raises(ParseError, match="they pair up in order"):
        parse_torch_csv(text)


SWAPPED = Schedule.of(
    [
        [F(0, 0), F(0, 1), B(0, 0), B(0, 1)],
        [F(1, 1), F(1, 0), B(1, 0), B(1, 1)],
    ]
)


@pytest.mark.parametrize(
    ("name", "ranks", "placement", "mispaired"),
    [
        ("LoopedBFS", 4, "looped 2", False),
        ("Interleaved1F1B", 4, "looped 2", False),
        ("InterleavedZeroBubble", 2, "looped 2", True),
        ("ZBVZeroBubble", 4, "v", True),
        ("DualPipeV", 4, "v", True),
    ],
)
def test_torch_s_own_schedules(
    name: str, ranks: int, placement: str, mispaired: bool
) -> None:
    """What torch generates and lowers is read; what its deferral breaks is refused.

    In torch 2.13 `defer_pp_recv=True` gives silently wrong gradients for the last
    three: two receives of one link change places, and take each other's tensors.
    """
    pytest.importorskip("torch.distributed.pipelining")
    from torch.distributed.pipelining import schedules as theirs

    m, stages = 2 * ranks, 2 * ranks
    kind = getattr(theirs, f"Schedule{name}")
    maker = kind.__new__(kind)  # its constructor wants stages and process groups
    vars(maker).update(
        pp_group_size=ranks,
        n_local_stages=2,
        _stages=[None, None],
        num_stages=stages,
        _num_stages=stages,
        _n_microbatches=m,
        microbatches_per_round=ranks,
        number_of_rounds=2,
    )
    made = {r: maker._calculate_single_rank_operations(r) for r in range(ranks)}
    if hasattr(maker, "_add_bubbles_to_actions"):
        maker.pipeline_order = made
        made = maker._add_bubbles_to_actions(stages)

    def text(rows: dict[int, list[object]]) -> str:
        words = ((str(a) if a else "" for a in row) for row in rows.values())
        return "".join(",".join(row) + "\n" for row in words)

    read = read_torch_csv(text(made))
    assert read.format() == text(made)
    assert str(read.schedule.placement) == placement
    check(read.schedule).raise_if_bad()
    home = read.schedule.placement.pipes[0]
    lowered = {
        rank: theirs._add_reduce_grad(theirs._add_unshard_reshard(row), m)
        for rank, row in made.items()
    }
    lowered = theirs._add_send_recv(lowered, lambda s: home[s], stages)
    assert parse_torch_csv(text(lowered)) == read.schedule
    deferred = text(theirs._defer_recv_ops(lowered, lambda s: home[s]))
    if mispaired:
        with pytest.raises(ParseError, match="they pair up in order"):
            parse_torch_csv(deferred)
    else:
        assert parse_torch_csv(deferred) == read.schedule


WORKER = """
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group(
    "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2,
    timeout=timedelta(seconds=30),
)
for case in sys.argv[4:]:
    name, form, stages, micro_batches = case.split(":")
    placed = [int(r) for r in stages.split(",")]
    m = int(micro_batches)
    torch.manual_seed(0)
    layers = [
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()).double()
        for _ in placed
    ]
    whole = torch.nn.Sequential(*layers)
    inputs = torch.randn(2 * m, 4, dtype=torch.float64)
    targets = torch.randn(2 * m, 4, dtype=torch.float64)
    loss_fn = torch.nn.functional.mse_loss
    loss_fn(whole(inputs), targets).backward()
    wanted = [[p.grad.clone() for p in layer.parameters()] for layer in layers]
    whole.zero_grad()
    mine = [s for s, r in enumerate(placed) if r == rank]
    parts = [
        PipelineStage(layers[s], s, len(placed), torch.device("cpu")) for s in mine
    ]
    runtime = _PipelineScheduleRuntime(parts, m, loss_fn=loss_fn)
    runtime._load_csv(f"{folder}/{name}.csv", format=form)
    given = [inputs] if 0 in mine else []
    last = {"target": targets} if len(placed) - 1 in mine else {}
    runtime.step(*given, **last)
    for s in mine:
        for p, grad in zip(layers[s].parameters(), wanted[s]):
            torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-14)
    print(f"{case} agrees", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_torch_trains_with_what_we_write(tmp_path: Path) -> None:
    """Two ranks, one step each, against the gradients of the whole model."""
    torch = pytest.importorskip("torch")
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch.distributed or its gloo backend is not available")
    pytest.importorskip("torch.distributed.pipelining")
    one = catalog.make("1f1b", devices=2, micro_batches=4)
    apart = dict.fromkeys((Kind.F, Kind.I, Kind.W), 1)
    split = retime(split_backward(one), apart, activations=2)
    assert split.has(Kind.W)
    assert split != split_backward(one)
    cases = []
    for name, schedule in {"one": one, "split": split, "v": V_SHAPE}.items():
        for form in ("compute_only", "compute_comms"):
            path = tmp_path / f"{name}-{form}.csv"
            comms = form == "compute_comms"
            path.write_text(format_torch_csv(schedule, communication=comms))
            home = ",".join(map(str, schedule.placement.pipes[0]))
            cases.append(f"{path.stem}:{form}:{home}:{schedule.micro_batches}")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-P", str(script), str(rank)),
                *(str(tmp_path / "store"), str(tmp_path), *cases),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=60)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for worker, text in zip(workers, said):
        assert worker.returncode == 0, text
        assert [line for line in text.splitlines() if line.endswith("agrees")] == [
            f"{case} agrees" for case in cases
        ]
