"""`pipeproof run`."""

from __future__ import annotations

import math
from statistics import median
from time import perf_counter
from typing import Any

import click
import torch

from pipeproof.cli.model import load_example
from pipeproof.cli.options import Wanted
from pipeproof.cli.output import emit_json, write_file
from pipeproof.cli.predict import figures
from pipeproof.cli.simulating import tell
from pipeproof.cli.source import load
from pipeproof.exec import Pipeline
from pipeproof.sched import ParameterError
from pipeproof.sched.interop.chrome import write_chrome


def train(
    wanted: Wanted,
    *,
    model: str,
    batch: int | None,
    device: str,
    seed: int,
    dtype: str,
    steps: int,
    lr: float,
    trace_path: str | None,
    as_json: bool,
) -> None:
    """Train some steps with SGD, and print losses, times and the last trace."""
    if steps < 1:
        raise ParameterError(f"steps must be at least 1, got {steps}")
    if not 0 <= lr < math.inf:
        raise ParameterError(f"lr must be a finite number of at least 0, got {lr}")
    schedule = load(wanted)
    example = load_example(model, schedule, batch, dtype, seed)
    devices = devices_of(device)
    pipeline = Pipeline(example.stages, schedule, example.loss_fn, devices=devices)
    parameters = [p for stage in example.stages for p in stage.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    torch.manual_seed(seed)
    losses, seconds = [], []
    for step in range(steps):
        started = perf_counter()
        loss = pipeline.step(example.inputs, example.targets, record=step == steps - 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        _settle(devices)
        seconds.append(perf_counter() - started)
        if not as_json:
            took = f"{seconds[-1] * 1e3:,.1f} ms"
            click.echo(f"step {step + 1}/{steps}: loss {losses[-1]:.6f}, {took}")
    trace = pipeline.trace
    if trace_path is not None:
        write_file(trace_path, lambda file: write_chrome(trace, file))
    if as_json:
        emit_json(
            {
                **figures(trace),
                "losses": [x if math.isfinite(x) else None for x in losses],
                "step_seconds": seconds,
                "median_step_seconds": median(seconds),
            }
        )
        return
    click.echo(f"median step time: {median(seconds) * 1e3:,.1f} ms")
    click.echo("The last step, in seconds:")
    tell(trace)


def devices_of(names: str) -> list[torch.device]:
    """The devices of `--device D[,D…]`.

    Raises:
        ParameterError: torch knows no such device, or it is not there.
    """
    devices = []
    for name in names.split(","):
        try:
            devices.append(torch.device(name))
            torch.empty(0, device=devices[-1])
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise ParameterError(f"device {name!r} cannot be used: {reason}") from None
    return devices


def _settle(devices: list[Any]) -> None:
    """Wait until queued work is done, so that its time is measured too."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
