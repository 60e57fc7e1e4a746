"""Ours against torch.distributed.pipelining: two ranks, one schedule each row.

Both run in the same two processes, a step of one and a step of the other in turn,
with the same stages, micro-batches, schedule and batch; their gradients are
compared first. Each schedule in both directions: ours, as CSV in torch's runtime; and
torch's own class, whose order of actions ours reads. torch's messages go by gloo; ours
through memory that both ranks see, or by gloo too.

    python experiments/executor/against_torch.py
        writes experiments/results/against_torch.md
    python experiments/executor/against_torch.py --over-gloo
        writes experiments/results/against_torch_over_gloo.md
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

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as theirs
from torch.nn import functional

from pipeproof.exec import ActivationMeter, Pipeline
from pipeproof.exec.examples import Block
from pipeproof.exec.group import Ranks
from pipeproof.exec.launch import launch
from pipeproof.exec.neighbours import VARIABLE
from pipeproof.sched import Action, Schedule, catalog, lower
from pipeproof.sched.interop.torch_csv import parse_torch_csv
from pipeproof.sched.interop.torch_writer import format_torch_csv

RESULTS = Path(__file__).parent.parent / "results"
RANKS, MICRO_BATCHES = 2, 8
WARM = 3

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


Model = tuple[Callable[[int, int], list[nn.Module]], tuple[int, ...], int]
MODELS: dict[str, Model] = {
    "tiny MLP, 4 rows of width 8": (mlp, (4, 8), 4),
    "MLP, 32 rows of width 512": (mlp, (32, 512), 1),
    "tiny transformer, 1 × 8 of width 16": (transformer, (1, 8, 16), 2),
    "transformer, 2 × 64 of width 128": (transformer, (2, 64, 128), 1),
}
"""Name → its stages, the shape of a micro-batch, and how many times the rounds."""

SCHEDULES: dict[str, tuple[str | None, str | None, int]] = {
    "GPipe": ("gpipe", "ScheduleGPipe", 1),
    "1F1B": ("1f1b", "Schedule1F1B", 1),
    "ZB-H1": ("zb-h1", None, 1),
    "interleaved 1F1B": ("interleaved", "ScheduleInterleaved1F1B", 2),
    "interleaved zero-bubble": (None, "ScheduleInterleavedZeroBubble", 2),
    "ZB-V": ("zb-v", "ScheduleZBVZeroBubble", 2),
    "DualPipeV": ("dualpipe-v", "ScheduleDualPipeV", 2),
}
"""Name → our row, torch's class, stages on each rank."""


def cases() -> list[tuple[str, bool]]:
    """Each schedule, and whether it is ours that torch's runtime reads."""
    return [
        (name, exported)
        for name, (row, kind, _) in SCHEDULES.items()
        for exported in (True, False)
        if (row if exported else kind) is not None
    ]


def scheduled(name: str, exported: bool) -> Schedule:
    """What ours runs: our row, or what torch's class made."""
    row, kind, chunks = SCHEDULES[name]
    if exported or chunks == 1:  # torch's GPipe and 1F1B are ours, op by op
        return catalog.make(str(row), devices=RANKS, micro_batches=MICRO_BATCHES)
    stages = [
        PipelineStage(nn.Identity(), s, RANKS * chunks, torch.device("cpu"))
        for s in range(dist.get_rank(), RANKS * chunks, RANKS)
    ]
    made = getattr(theirs, str(kind))(stages, MICRO_BATCHES)
    rows = (made.pipeline_order[rank] for rank in range(RANKS))
    text = "\n".join(",".join("" if a is None else str(a) for a in r) for r in rows)
    return parse_torch_csv(text)


def torch_step(
    name: str, exported: bool, stages: list[nn.Module], schedule: Schedule
) -> Step:
    """A step of torch's runtime on this rank."""
    _, kind, chunks = SCHEDULES[name]
    home = schedule.placement.pipes[0]
    mine = [s for s, rank in enumerate(home) if rank == dist.get_rank()]
    parts = [
        PipelineStage(stages[s], s, len(stages), torch.device("cpu")) for s in mine
    ]
    loss = functional.mse_loss
    runtime: Any
    if exported:
        runtime = theirs._PipelineScheduleRuntime(
            parts, schedule.micro_batches, loss_fn=loss
        )
        with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
            file.write(format_torch_csv(schedule))
            file.flush()
            runtime._load_csv(file.name, format="compute_only")
    else:
        given = parts if chunks > 1 else parts[0]
        runtime = getattr(theirs, str(kind))(
            given, schedule.micro_batches, loss_fn=loss
        )
    first, last = 0 in mine, len(stages) - 1 in mine

    def step(x: Tensor, y: Tensor) -> None:
        runtime.step(*([x] if first else []), **({"target": y} if last else {}))

    return step


def our_step(stages: list[nn.Module], schedule: Schedule, ranks: Ranks) -> Step:
    """A step of ours on this rank."""
    home = schedule.placement.pipes[0]
    mine = [s for s, rank in enumerate(home) if rank == ranks.rank]
    pipeline = Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)
    first, last = 0 in mine, len(stages) - 1 in mine

    def step(x: Tensor, y: Tensor) -> None:
        pipeline.step(x if first else None, y if last else None)

    return step


def bare_step(stages: list[nn.Module], schedule: Schedule, rank: int) -> Step:
    """What a rank computes, and nothing else: no messages, gradients of ones."""
    home = schedule.placement.pipes[0]
    mine = [s for s, device in enumerate(home) if device == rank]

    def step(x: Tensor, y: Tensor) -> None:
        inputs, targets = x.tensor_split(MICRO_BATCHES), y.tensor_split(MICRO_BATCHES)
        for number in mine:
            last = number == len(stages) - 1
            for value, target in zip(inputs, targets):
                output = stages[number](value.detach().requires_grad_(number > 0))
                if last:
                    loss = functional.mse_loss(output, target) / MICRO_BATCHES
                    loss.backward()
                else:
                    torch.autograd.backward(output, torch.ones_like(output))

    return step


def acted(schedule: Schedule, rank: int) -> int:
    """How many actions a rank has, as torch's runtime counts them: messages too."""
    program = lower(schedule)
    counted = np.isin(program.action, (Action.COMPUTE, Action.SEND, Action.RECV))
    ops: int = program.op_count[counted & (program.device == rank)].clip(1).sum()
    return ops


def agree(stages: list[nn.Module], twins: list[nn.Module]) -> None:
    """Compare the gradients."""
    for stage, twin in zip(stages, twins):
        for ours, other in zip(stage.parameters(), twin.parameters()):
            if ours.grad is not None or other.grad is not None:
                torch.testing.assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-5)


Row = list[float]
"""Ours and theirs in ms, the ratio, that of the fastest steps; CPU µs for an action, of
each and of the bare ops; peak KiB of each."""


def compared(ranks: Ranks, model: str, name: str, exported: bool, rounds: int) -> Row:
    """One case, in turn; times of the slower rank, processor time of this one."""
    make, shape, factor = MODELS[model]
    torch.manual_seed(0)
    schedule = scheduled(name, exported)
    stages = make(schedule.stages, shape[-1])
    twins = copy.deepcopy(stages)
    x, y = torch.randn(2, MICRO_BATCHES * shape[0], *shape[1:])
    ways: dict[str, Step] = {
        "ours": our_step(stages, schedule, ranks),
        "theirs": torch_step(name, exported, twins, schedule),
        "bare": bare_step(copy.deepcopy(stages), schedule, ranks.rank),
    }
    walls: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(-WARM, rounds * factor):
        for way, step in ways.items():
            dist.barrier()
            wall, spent = time.perf_counter(), time.process_time()
            step(x, y)
            took = time.perf_counter() - wall, time.process_time() - spent
            if round_ >= 0:
                walls[way].append(took[0])
                cpu[way].append(took[1])
        if round_ == -WARM:
            agree(stages, twins)
    pairs = torch.tensor([walls["ours"], walls["theirs"]])
    dist.all_reduce(pairs, dist.ReduceOp.MAX)
    actions = acted(schedule, ranks.rank)
    row = [*(pairs.median(1).values * 1e3).tolist()]
    row.append((pairs[0] / pairs[1]).median().item())
    row.append((pairs[0].min() / pairs[1].min()).item())
    row += [min(cpu[way]) / actions * 1e6 for way in ways]
    for way, modules in (("ours", stages), ("theirs", twins)):
        dist.barrier()
        with ActivationMeter(modules) as meter:
            ways[way](x, y)
        row.append(meter.peak / 1024)
    return row


def start(ranks: Ranks) -> None:
    """Have torch's default group meet as ours did."""
    torch.set_num_threads(1)
    store = PrefixStore("torch", ranks.store)
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=RANKS)


def everything(ranks: Ranks, rounds: int) -> dict[str, dict[str, Row]]:
    """All rows of all tables, by model."""
    start(ranks)
    found: dict[str, dict[str, Row]] = {}
    for model in MODELS:
        found[model] = {}
        for name, exported in cases():
            title = f"{name}, {'ours' if exported else 'theirs'}"
            if ranks.rank == 0:
                print(model, title, file=sys.stderr)
            found[model][title] = compared(ranks, model, name, exported, rounds)
    dist.destroy_process_group()
    return found


def main() -> None:
    """Measure all rows and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of each way")
    parser.add_argument("--over-gloo", action="store_true", help="ours too")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.over_gloo:
        os.environ[VARIABLE] = "gloo"  # the ranks inherit it
    name = "against_torch" + arguments.over_gloo * "_over_gloo"
    output = arguments.output or RESULTS / f"{name}.md"
    links = (
        "the messages of both by gloo"
        if arguments.over_gloo
        else "torch's messages by gloo, ours through memory that both ranks see"
    )
    before = os.getloadavg()[1]
    # A busy machine may not let a rank's thread beat for long.
    tables = launch(everything, RANKS, arguments.rounds, lost_s=120)[0]
    flat = [row for rows in tables.values() for row in rows.values()]
    summaries = {
        "Ratio": [row[2] for row in flat],
        "Of the fastest": [row[3] for row in flat],
        "Of processor time": [row[4] / row[5] for row in flat],
    }
    tiny = [row[4] for row in tables[next(iter(MODELS))].values()]
    text = [
        "# Ours against torch.distributed.pipelining",
        "",
        f"{RANKS} ranks on one shared x86-64 machine of {os.cpu_count()} cores, one "
        f"thread each, {MICRO_BATCHES} micro-batches, torch {torch.__version__}, "
        f"float32; {links}. Load average over five minutes before and "
        f"after: {before:.1f}, {os.getloadavg()[1]:.1f}; one alone would make it 2.",
        "",
        "A step of ours, a step of theirs and the bare ops in turn in the same "
        f"processes, {arguments.rounds} rounds and more for tiny models; gradients "
        "agree. `ours`: our schedule, as CSV in torch's runtime. `theirs`: torch's own "
        "class, its order read by ours. ms: medians, a step is as long as its slower "
        "rank's. Ratio: the median over rounds of ours / theirs; `fastest`: ours of "
        "its fastest step / theirs, where what else runs here disturbs least.",
        "CPU: µs of rank 0's processor time, all threads, for each of its actions (F, "
        "B, I, W, SEND, RECV, as torch's runtime has them), the least of all rounds; "
        "`bare` is what a loop takes that computes the ops as F and B, without "
        "messages, over as many. KiB: peak of activations on rank 0, counted from "
        "outside.",
        "",
        *(
            f"{name}: median {statistics.median(found):.2f}, from {min(found):.2f} to "
            f"{max(found):.2f}; at most 0.95 in {sum(r <= 0.95 for r in found)} of "
            f"{len(found)}."
            for name, found in summaries.items()
        ),
        f"CPU of the tiny MLP: from {min(tiny):.0f} to {max(tiny):.0f} µs an action; "
        f"at most 75 in {sum(c <= 75 for c in tiny)} of {len(tiny)}.",
    ]
    for model, rows in tables.items():
        text += [
            "",
            f"## {model}",
            "",
            "| schedule | ours, ms | theirs, ms | ratio | fastest | CPU: ours | theirs "
            "| bare | KiB: ours | theirs |",
            "|-|-|-|-|-|-|-|-|-|-|",
        ]
        for title, row in rows.items():
            cells = [*(f"{v:.2f}" for v in row[:4]), *(f"{v:.0f}" for v in row[4:])]
            text.append(f"| {title} | " + " | ".join(cells) + " |")
    output.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
