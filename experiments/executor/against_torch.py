"""Ours against torch.distributed.pipelining: two ranks, gloo, one schedule each row.

Both run in the same two processes, a step of one and a step of the other in turn,
with the same stages, micro-batches, schedule and batch; their gradients are
compared first. Torch runs its own schedule where it has one, and ours as CSV
where it has none (ZB-H1); its interleaved zero-bubble schedule is read into ours.

    python experiments/executor/against_torch.py
        writes experiments/results/against_torch.md
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as theirs
from torch.nn import functional

from pipeproof.exec import Pipeline
from pipeproof.exec.examples import Block
from pipeproof.exec.group import Ranks
from pipeproof.exec.launch import launch
from pipeproof.sched import Schedule, catalog
from pipeproof.sched.interop.torch_csv import format_torch_csv, parse_torch_csv

RESULT = Path(__file__).parent.parent / "results" / "against_torch.md"
RANKS, MICRO_BATCHES = 2, 8

Step = Callable[[Tensor, Tensor], Any]


def mlp(stages: int, width: int) -> list[nn.Module]:
    """Four layers on all stages together."""
    return [
        nn.Sequential(
            *(
                layer
                for _ in range(4 // stages)
                for layer in (nn.Linear(width, width), nn.Tanh())
            )
        )
        for _ in range(stages)
    ]


def transformer(stages: int, width: int) -> list[nn.Module]:
    """Four blocks on all stages together."""
    return [
        nn.Sequential(*(Block(width, 4, dropout=0.0) for _ in range(4 // stages)))
        for _ in range(stages)
    ]


MODELS: dict[str, tuple[Callable[[int, int], list[nn.Module]], tuple[int, ...]]] = {
    "tiny MLP, 4 rows of width 8": (mlp, (4, 8)),
    "MLP, 32 rows of width 512": (mlp, (32, 512)),
    "tiny transformer, 1 × 8 of width 16": (transformer, (1, 8, 16)),
    "transformer, 2 × 64 of width 128": (transformer, (2, 64, 128)),
}
"""Name → its stages, and the shape of a micro-batch."""

SCHEDULES: dict[str, tuple[str | None, str | None, int]] = {
    "GPipe": ("gpipe", "ScheduleGPipe", 1),
    "1F1B": ("1f1b", "Schedule1F1B", 1),
    "ZB-H1, ours as CSV": ("zb-h1", None, 1),
    "interleaved 1F1B": ("interleaved", "ScheduleInterleaved1F1B", 2),
    "interleaved zero-bubble, theirs": (None, "ScheduleInterleavedZeroBubble", 2),
    "ZB-V": ("zb-v", "ScheduleZBVZeroBubble", 2),
    "DualPipeV": ("dualpipe-v", "ScheduleDualPipeV", 2),
}
"""Name → our row, torch's class, stages on each rank."""


def scheduled(name: str) -> Schedule:
    """What ours runs; for torch's interleaved zero-bubble, what torch made."""
    row, kind, chunks = SCHEDULES[name]
    if row is not None:
        return catalog.make(row, devices=RANKS, micro_batches=MICRO_BATCHES)
    stages = [
        PipelineStage(nn.Identity(), s, RANKS * chunks, torch.device("cpu"))
        for s in range(dist.get_rank(), RANKS * chunks, RANKS)
    ]
    made = getattr(theirs, str(kind))(stages, MICRO_BATCHES)
    rows = (made.pipeline_order[rank] for rank in range(RANKS))
    text = "\n".join(",".join("" if a is None else str(a) for a in r) for r in rows)
    return parse_torch_csv(text)


def torch_step(name: str, stages: list[nn.Module], schedule: Schedule) -> Step:
    """A step of torch's runtime on this rank."""
    _, kind, chunks = SCHEDULES[name]
    home = schedule.placement.pipes[0]
    mine = [s for s, rank in enumerate(home) if rank == dist.get_rank()]
    parts = [
        PipelineStage(stages[s], s, len(stages), torch.device("cpu")) for s in mine
    ]
    loss = functional.mse_loss
    runtime: Any
    if kind is None:
        runtime = theirs._PipelineScheduleRuntime(parts, MICRO_BATCHES, loss_fn=loss)
        with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
            file.write(format_torch_csv(schedule))
            file.flush()
            runtime._load_csv(file.name, format="compute_only")
    else:
        given = parts if chunks > 1 else parts[0]
        runtime = getattr(theirs, kind)(given, MICRO_BATCHES, loss_fn=loss)
    first, last = 0 in mine, len(stages) - 1 in mine

    def step(x: Tensor, y: Tensor) -> None:
        runtime.step(*([x] if first else []), **({"target": y} if last else {}))

    return step


def our_step(
    stages: list[nn.Module], schedule: Schedule, ranks: Ranks
) -> tuple[Step, int]:
    """A step of ours on this rank, and how many ops it computes."""
    home = schedule.placement.pipes[0]
    mine = [s for s, rank in enumerate(home) if rank == ranks.rank]
    pipeline = Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)
    first, last = 0 in mine, len(stages) - 1 in mine

    def step(x: Tensor, y: Tensor) -> None:
        pipeline.step(x if first else None, y if last else None)

    return step, len(list(schedule.row(ranks.rank)))


Times = dict[str, list[tuple[float, float]]]
"""Way → (seconds of the slower rank, CPU seconds of this rank) of each step."""


def compared(ranks: Ranks, name: str, model: str, rounds: int) -> list[float]:
    """On each rank: ours and theirs, in ms a step and CPU µs an op."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        store = PrefixStore("torch", ranks.store)
        dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=RANKS)
    make, shape = MODELS[model]
    torch.manual_seed(0)
    schedule = scheduled(name)
    stages = make(schedule.stages, shape[-1])
    twins = copy.deepcopy(stages)
    x, y = torch.randn(2, MICRO_BATCHES * shape[0], *shape[1:])
    ours, ops = our_step(stages, schedule, ranks)
    ways: dict[str, Step] = {"ours": ours, "theirs": torch_step(name, twins, schedule)}
    times: Times = {way: [] for way in ways}
    for round_ in range(-3, rounds):
        for way, step in ways.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            step(x, y)
            took = [time.perf_counter() - wall, time.process_time() - cpu]
            if round_ >= 0:
                times[way].append((took[0], took[1]))
        if round_ == -3:
            _agree(stages, twins)
    result = []
    for way in ways:
        walls = torch.tensor([wall for wall, _ in times[way]])
        dist.all_reduce(walls, dist.ReduceOp.MAX)
        cpu = statistics.median(cpu for _, cpu in times[way])
        result += [walls.median().item() * 1e3, cpu / ops * 1e6]
    return result


def _agree(stages: list[nn.Module], twins: list[nn.Module]) -> None:
    for stage, twin in zip(stages, twins):
        for ours, other in zip(stage.parameters(), twin.parameters()):
            if ours.grad is not None or other.grad is not None:
                torch.testing.assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-5)


def main() -> None:
    """Measure all rows and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="of each way")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    text = [
        "# Ours against torch.distributed.pipelining",
        "",
        f"{RANKS} ranks with gloo on one shared x86-64 machine of {os.cpu_count()} "
        f"cores, one thread each, {MICRO_BATCHES} micro-batches, torch "
        f"{torch.__version__}, float32.",
        f"Medians over {arguments.rounds} rounds, a step of ours and a step of theirs "
        "in turn in the same processes; gradients agree. A step is as long as its "
        "slower rank's.",
        "CPU: processor time of rank 0 for each op that it computes, waiting included "
        "where a wait is busy.",
    ]
    for model in MODELS:
        text += ["", f"## {model}", ""]
        text += ["| schedule | ours, ms | theirs, ms | ratio | ours, CPU µs | theirs |"]
        text += ["|-|-|-|-|-|-|"]
        for name in SCHEDULES:
            print(model, name, file=sys.stderr)
            a, a_cpu, b, b_cpu = launch(compared, RANKS, name, model, arguments.rounds)[
                0
            ]
            text.append(
                f"| {name} | {a:.2f} | {b:.2f} | {a / b:.2f} | {a_cpu:.0f} | "
                f"{b_cpu:.0f} |"
            )
            print(text[-1], flush=True)
    arguments.output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
