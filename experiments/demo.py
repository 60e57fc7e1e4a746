"""The whole road on real input: write, check, predict and run, then compare.

A byte-level GPT of a few million parameters learns the Python standard library's
own source files, in 4 stages and 8 micro-batches: with gpipe and with 1f1b, with
and without recomputation, and without a pipeline. Every gradient of every step
is compared, bit by bit, with the unpipelined one.

    make demo
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from pipeproof.exec import ActivationMeter, Pipeline, reference, split_evenly
from pipeproof.exec.examples import gpt_layers, token_loss
from pipeproof.sched import Schedule, Trace, catalog, check, recompute
from pipeproof.sched.interop import chrome
from pipeproof.sim import Cluster, Cost, simulate

STAGES, MICRO_BATCHES = 4, 8
ROWS, TOKENS, WIDTH, LAYERS, HEADS = 16, 64, 192, 6, 6
SEED = 1811_06965


def corpus() -> Tensor:
    """The standard library's top-level modules, as bytes: shape (bytes,)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def batches(text: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Bytes and the bytes that follow them, each (ROWS, TOKENS)."""
    source = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        first = torch.randint(len(text) - TOKENS - 1, (ROWS,), generator=source)
        rows = torch.stack([text[i : i + TOKENS + 1] for i in first.tolist()])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def model() -> list[nn.Sequential]:
    """The GPT in four stages; the same weights at every call."""
    torch.manual_seed(SEED)
    layers = gpt_layers(tokens=TOKENS, width=WIDTH, layers=LAYERS, heads=HEADS)
    return split_evenly(layers, STAGES)


def profile(stages: list[nn.Sequential], batch: tuple[Tensor, Tensor]) -> Cost:
    """Seconds and bytes of each stage, from a few micro-batches one by one.

    Nothing of the executor is used: stages are called, and backward is called.
    """
    rows = ROWS // MICRO_BATCHES
    value, targets = (part[:rows].clone() for part in batch)
    forward, backward, kept, boundary = [], [], [], []
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        times = []
        for _ in range(5):
            leaf = value.detach()
            if leaf.is_floating_point():
                leaf.requires_grad_()
            with ActivationMeter([stage]) as meter:
                meter.ignore(targets)  # these are views of the batch, which
                if number == 0:  # lives all the time
                    meter.ignore(leaf)
                start = time.perf_counter()
                output = stage(leaf)
                result = token_loss(output, targets) if last else output
                middle = time.perf_counter()
                result.backward(torch.ones_like(result))
                times.append((middle - start, time.perf_counter() - middle))
        forward.append(sorted(t for t, _ in times)[2])
        backward.append(sorted(t for _, t in times)[2])
        kept.append(meter.peak)
        boundary.append(output.untyped_storage().nbytes())
        value = output.detach()
        stage.zero_grad()
    return Cost(
        forward=forward,
        backward=backward,
        activation_bytes=kept,
        boundary_bytes=boundary,
    )


@dataclass
class Run:
    """One way of training, and what came of it."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    difference: float | None = None
    measured: int | None = None
    predicted: int | None = None
    bubble: float | None = None
    trace: Trace | None = None


Gradients = list[list[Tensor]]


def train(
    run: Run,
    stages: list[nn.Sequential],
    step: Callable[[Tensor, Tensor], Tensor],
    data: list[tuple[Tensor, Tensor]],
    tick: Callable[[], None],
    expected: Gradients | None = None,
) -> Gradients:
    """AdamW over the batches; the gradients of every step, or their difference."""
    parameters = [p for stage in stages for p in stage.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    seen: Gradients = []
    torch.manual_seed(SEED)
    for number, (inputs, targets) in enumerate(data):
        optimizer.zero_grad()
        start = time.perf_counter()
        run.losses.append(float(step(inputs, targets)))
        run.seconds += time.perf_counter() - start
        if expected is None:
            seen.append([p.grad.clone() for p in parameters if p.grad is not None])
        else:
            worst = max(
                difference(p.grad, e)
                for p, e in zip(parameters, expected[number], strict=True)
            )
            run.difference = max(run.difference or 0.0, worst)
        optimizer.step()
        tick()
    return seen


def difference(found: Tensor | None, expected: Tensor) -> float:
    """The largest difference of two gradients; infinite where one is missing."""
    if found is None or not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).abs().max())


def unpipelined(
    schedule: Schedule, name: str, data: list[tuple[Tensor, Tensor]], tick: Callable
) -> tuple[Run, Gradients]:
    """The plain loop over micro-batches, in the order in which a schedule sums."""
    stages, run = model(), Run(f"no pipeline, {name}")

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        return reference(stages, schedule, token_loss, inputs, targets)

    return run, train(run, stages, step, data, tick)


def pipelined(
    schedule: Schedule,
    name: str,
    cost: Cost,
    data: list[tuple[Tensor, Tensor]],
    tick: Callable,
    expected: Gradients,
) -> Run:
    """A schedule: predicted, then run."""
    stages, run = model(), Run(name)
    pipeline = Pipeline(stages, schedule, token_loss)
    run.bubble = float(simulate(schedule, cost).bubble_fraction)
    # All stages share this process: so does the prediction of what it holds.
    shared = simulate(pipeline.program, cost, Cluster(shared_processor=True))
    held = shared.memory().by_class
    kept = held["activations"] + held["stored_inputs"]
    run.predicted = int(max(kept.tolist()))
    run.measured = 0

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        with ActivationMeter(stages) as meter:
            meter.ignore(inputs, targets)
            loss = pipeline.step(inputs, targets, record=True)
        run.measured = max(run.measured or 0, meter.peak)
        return loss

    train(run, stages, step, data, tick, expected)
    run.trace = pipeline.trace
    return run


def table(runs: list[Run]) -> Table:
    """One row for each way of training."""
    result = Table()
    for title in (
        "training",
        "loss, first",
        "loss, last",
        "largest gradient difference",
        "peak activations, predicted",
        "measured",
        "predicted bubble on 4 devices",
        "ms a step here",
    ):
        result.add_column(title, justify="left" if title == "training" else "right")
    for run in runs:
        result.add_row(
            run.name,
            f"{run.losses[0]:.6f}",
            f"{run.losses[-1]:.6f}",
            "-" if run.difference is None else f"{run.difference:g}",
            "-" if run.predicted is None else f"{run.predicted:,} B",
            "-" if run.measured is None else f"{run.measured:,} B",
            "-" if run.bubble is None else f"{run.bubble:.1%}",
            f"{run.seconds / len(run.losses) * 1e3:.0f}",
        )
    return result


def main() -> int:
    """Run everything; 1 if any gradient differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="training steps")
    parser.add_argument("--trace", type=Path, default=Path("demo-trace.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = Console(width=None if sys.stdout.isatty() else 132)
    text = corpus()
    data = list(batches(text, arguments.steps))
    count = sum(p.numel() for stage in model() for p in stage.parameters())
    out.print(
        f"A GPT of {count / 1e6:.1f} million parameters learns {len(text) / 1e6:.1f} "
        f"MB of Python, {STAGES} stages, {MICRO_BATCHES} micro-batches.\n"
    )
    sizes = {"devices": STAGES, "micro_batches": MICRO_BATCHES}
    schedules = {name: catalog.make(name, **sizes) for name in ("gpipe", "1f1b")}
    for schedule in schedules.values():
        report = check(schedule)
        report.raise_if_bad()
        out.print(f"[bold]{report}[/bold]")
        out.print(simulate(schedule, Cost(weight_grad=0)).grid() + "\n")
    cost = profile(model(), data[0])
    runs = []
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        job = progress.add_task("training", total=6 * arguments.steps)

        def tick() -> None:
            progress.advance(job)

        for name, schedule in schedules.items():
            order = "last micro-batch first" if name == "gpipe" else "first one first"
            progress.update(job, description=f"no pipeline, {order}")
            run, expected = unpipelined(schedule, order, data, tick)
            runs.append(run)
            for policy in ("never", "always"):
                title = name if policy == "never" else f"{name}, recomputing"
                progress.update(job, description=title)
                planned = recompute(schedule, policy)
                runs.append(pipelined(planned, title, cost, data, tick, expected))
    out.print(table(runs))
    trace = runs[-1].trace
    assert trace is not None
    with arguments.trace.open("w", encoding="utf-8") as file:
        chrome.write_chrome(trace, file)
    out.print(
        f"Measured trace of the last step: {arguments.trace} (open it in "
        "ui.perfetto.dev or chrome://tracing)"
    )
    wrong = [run.name for run in runs if run.difference]
    if wrong:
        out.print(f"[bold red]Gradients differ: {', '.join(wrong)}[/bold red]")
        return 1
    out.print("Every gradient of every step equals the unpipelined one, bit by bit.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
