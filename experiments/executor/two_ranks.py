"""What two ranks gain over one: 1F1B against the same model without a pipeline.

The ideal is half of the unpipelined time, and the bubble's (M + 1) / M of it. What two
stages that are not equally long, and two cores that share caches, leave of it is a
bound: the schedule simulated with each stage's own bare times, measured while both
ranks compute, and messages that take no time. Our messages go through memory that both
ranks see; what gloo's leave, by which torch's go, is a loop written by hand for two
ranks, with all receives posted before the step.

    python experiments/executor/two_ranks.py
        writes experiments/results/two_ranks.md
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from against_torch import MODELS, RANKS, WARM, agree, our_step, start, torch_step
from against_torch import transformer as blocks  # the path first

from pipeproof.exec.group import Ranks
from pipeproof.exec.launch import launch
from pipeproof.sched import Schedule, catalog
from pipeproof.sim import Cost, simulate

RESULT = Path(__file__).parent.parent / "results" / "two_ranks.md"
LARGER = {
    "MLP, 32 rows of width 512": MODELS["MLP, 32 rows of width 512"],
    "transformer, 2 × 64 of width 128": MODELS["transformer, 2 × 64 of width 128"],
    "transformer, 2 × 128 of width 256": (blocks, (2, 128, 256), 1),
}
"""Name → its stages, the shape of a micro-batch, and how many times the rounds."""
Row = list[float]
"""Milliseconds of ours, theirs, by hand, the model alone, and on both at once; ratios
to the ideal: of ours, of theirs, by hand, of our fastest, and of the bound."""


def passes(
    model: nn.Module, inputs: Tensor, targets: Tensor | None, micro_batches: int
) -> tuple[list[float], list[float]]:
    """Seconds of each forward and backward; without targets, of gradients of ones."""
    forwards, backwards = [], []
    batch = inputs.tensor_split(micro_batches)
    wanted = batch if targets is None else targets.tensor_split(micro_batches)
    for value, target in zip(batch, wanted):
        began = time.perf_counter()
        output = model(value)
        if targets is not None:
            output = functional.mse_loss(output, target) / micro_batches
        turned = time.perf_counter()
        torch.autograd.backward(output, torch.ones_like(output))
        forwards.append(turned - began)
        backwards.append(time.perf_counter() - turned)
    return forwards, backwards


def by_hand(mine: nn.Module, inputs: Tensor, targets: Tensor, count: int) -> None:
    """One step of this rank, on torch's default group; what crosses is like the input.

    Args:
        mine: its stage.
        inputs: of the whole batch.
        targets: likewise.
        count: micro-batches.
    """
    other = 1 - dist.get_rank()
    batch, wanted = inputs.tensor_split(count), targets.tensor_split(count)
    arriving = [torch.empty_like(part) for part in batch]
    receives = [dist.irecv(part, other) for part in arriving]
    outputs, sends = [], []

    def forward() -> None:
        outputs.append(mine(batch[len(outputs)]))
        sends.append(dist.isend(outputs[-1].detach(), other))

    if other:
        forward()
    for number, (part, receive) in enumerate(zip(arriving, receives)):
        if other and len(outputs) < count:
            forward()
        receive.wait()
        if other:
            torch.autograd.backward(outputs[number], part)
            continue
        part.requires_grad_()
        (functional.mse_loss(mine(part), wanted[number]) / count).backward()
        sends.append(dist.isend(part.grad, other))
    for send in sends:
        send.wait()


def compared(ranks: Ranks, name: str, micro_batches: int, rounds: int) -> Row:
    """One model in all ways, in turn."""
    make, shape, factor = LARGER[name]
    torch.manual_seed(0)
    schedule = catalog.make("1f1b", devices=RANKS, micro_batches=micro_batches)
    stages = make(RANKS, shape[-1])
    twins = copy.deepcopy(stages)
    mine, hand = (copy.deepcopy(stages[ranks.rank]) for _ in range(2))
    whole = nn.Sequential(*copy.deepcopy(stages))
    x, y = torch.randn(2, micro_batches * shape[0], *shape[1:])
    ours = our_step(stages, schedule, ranks)
    theirs = torch_step("1F1B", False, twins, schedule)
    forwards: list[float] = []
    backwards: list[float] = []
    between = x.clone().requires_grad_(ranks.rank > 0)

    def bare() -> None:
        targets = y if ranks.rank == RANKS - 1 else None
        times = passes(mine, between, targets, micro_batches)
        forwards.append(median(times[0]))
        backwards.append(median(times[1]))

    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(x, y),
        "theirs": lambda: theirs(x, y),
        "hand": lambda: by_hand(hand, x, y, micro_batches),
        "alone": lambda: passes(whole, x, y, micro_batches) if ranks.rank == 0 else 0,
        "both": lambda: passes(whole, x, y, micro_batches),
        "bare": bare,
    }
    walls: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(-WARM, rounds * factor):
        for way, run in ways.items():
            dist.barrier()
            began = time.perf_counter()
            run()
            if round_ >= 0:
                walls[way].append(time.perf_counter() - began)
        if round_ == -WARM:
            agree(stages, twins)
            agree([stages[ranks.rank]], [hand])
    slower = torch.tensor([walls[way] for way in ways])[:-1]
    dist.all_reduce(slower, dist.ReduceOp.MAX)
    share = (micro_batches + RANKS - 1) / micro_batches / RANKS
    ideal = slower[3] * share
    said = ranks.exchange([median(forwards), median(backwards)], "the others' times")
    bound = unhindered(schedule, said) / ideal.median().item()
    return [
        *(slower.median(1).values * 1e3).tolist(),
        *(slower[:3] / ideal).median(1).values.tolist(),
        (slower[0].min() / ideal.min()).item(),
        bound,
    ]


def unhindered(schedule: Schedule, times: list[list[float]]) -> float:
    """Seconds of a step, given a forward's and a backward's of each stage."""
    forward, backward = zip(*times)
    trace = simulate(schedule, Cost(forward=forward, backward=backward))
    return float(trace.makespan)


def everything(ranks: Ranks, rounds: int) -> dict[tuple[str, int], Row]:
    """All rows."""
    start(ranks)
    found = {}
    for name in LARGER:
        for micro_batches in (8, 16):
            if ranks.rank == 0:
                print(name, micro_batches, file=sys.stderr)
            found[name, micro_batches] = compared(ranks, name, micro_batches, rounds)
    dist.destroy_process_group()
    return found


def main() -> None:
    """Measure all rows and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of each way")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    before = os.getloadavg()[1]
    # A busy machine may not let a rank's thread beat for long.
    rows = launch(everything, RANKS, arguments.rounds, lost_s=120)[0]
    text = [
        "# Two ranks against one",
        "",
        f"{RANKS} ranks on one shared x86-64 machine of {os.cpu_count()} "
        f"cores, one thread each, 1F1B, torch {torch.__version__}, float32. Load "
        "average over five minutes before and after: "
        f"{before:.1f}, {os.getloadavg()[1]:.1f}; two ranks alone would make it 2.",
        "",
        f"A step of each way in turn in the same processes, {arguments.rounds} rounds; "
        "ms are medians. `ours`: messages through memory that both ranks see; "
        "`torch's`: by gloo. `by hand`: a loop of this schedule's ops and gloo's isend "
        "and irecv, with all receives posted before the step. `alone`: the whole "
        "model, micro-batch by micro-batch, on one rank while the other waits; `both`: "
        "on both at once. Ratios are to the ideal, (alone / 2) (M + 1) / M, in the "
        "median over rounds; `fastest`: of our fastest step to that of the fastest "
        "alone. `bound`: the schedule simulated with each stage's bare forward and "
        "backward, measured while both ranks compute, and free messages; no order of "
        "messages gets below it.",
        "",
        "| model | M | ours, ms | torch's | by hand | alone | both | ours / ideal | "
        "torch's | by hand | fastest | bound |",
        "|-|-|-|-|-|-|-|-|-|-|-|-|",
    ]
    for (name, micro_batches), row in rows.items():
        cells = [*(f"{v:.1f}" for v in row[:5]), *(f"{v:.2f}" for v in row[5:])]
        text.append(f"| {name} | {micro_batches} | " + " | ".join(cells) + " |")
    arguments.output.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
