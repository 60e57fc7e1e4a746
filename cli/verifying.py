"""`pipeproof verify`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor, nn

from pipeproof.cli.model import load_example
from pipeproof.cli.options import Wanted
from pipeproof.cli.output import emit_json, emit_table
from pipeproof.cli.predict import sizes
from pipeproof.cli.running import devices_of, optimizers_of
from pipeproof.cli.source import load
from pipeproof.exec import Example, Pipeline, reference

TOLERANCE = 1e-12

Gradients = list[list[Tensor | None]]
"""Of each stage, of each parameter."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the gradients of one stage compare.

    Attributes:
        stage: which.
        parameters: numbers in its parameters.
        equal: whether all equal the reference's, bit for bit.
        difference: the largest to the reference.
        relative: the largest to one full-batch step, by that step's largest
            gradient of the stage; None where that is not comparable.
    """

    stage: int
    parameters: int
    equal: bool
    difference: float
    relative: float | None

    @property
    def good(self) -> bool:
        """Whether it is as it must be."""
        return self.equal and (self.relative is None or self.relative <= TOLERANCE)


def compare(
    wanted: Wanted,
    *,
    model: str,
    batch: int | None,
    device: str,
    seed: int,
    dtype: str,
    as_json: bool,
) -> None:
    """Run a step three ways, print how gradients compare; exit 1 if badly."""
    schedule = load(wanted)
    example = load_example(model, schedule, batch, dtype, seed)
    devices = devices_of(device)

    def pipelined(stages: list[nn.Module], inputs: Any, targets: Any) -> Tensor:
        pipeline = Pipeline(
            stages,
            schedule,
            example.loss_fn,
            devices=devices,
            optimizers=optimizers_of(stages, schedule, lr=0.0),
        )
        # Any STEP is left out: it would use the gradients that are compared.
        return pipeline.step(inputs, targets, accumulate=True)

    def looped(stages: list[nn.Module], inputs: Any, targets: Any) -> Tensor:
        return reference(stages, schedule, example.loss_fn, inputs, targets)

    def at_once(stages: list[nn.Module], inputs: Any, targets: Any) -> Tensor:
        for stage in stages:
            inputs = stage(inputs)
        loss: Tensor = example.loss_fn(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    home = devices[0]
    loss, ours = _gradients(pipelined, example, home, seed)
    loss_of_loop, theirs = _gradients(looped, example, home, seed)
    obstacle = _obstacle(example, dtype)
    whole: Gradients | None = None
    if obstacle is None:
        _, whole = _gradients(at_once, example, home, seed)
        _, again = _gradients(at_once, example, home, seed + 1)
        if not all(map(_same, _flat(whole), _flat(again))):
            obstacle, whole = "the model is random (dropout?)", None
    verdicts = [
        _judge(
            stage,
            ours[stage],
            theirs[stage],
            None if whole is None else whole[stage],
        )
        for stage in range(schedule.stages)
    ]
    good = loss == loss_of_loop and all(verdict.good for verdict in verdicts)
    if as_json:
        emit_json(
            {
                **sizes(schedule),
                "ok": good,
                "loss_equal": loss == loss_of_loop,
                "full_batch_compared": obstacle is None,
                "full_batch_obstacle": obstacle,
                "tolerance": TOLERANCE,
                "verdicts": list(map(_spelled_out, verdicts)),
            }
        )
    else:
        _tell(schedule.summary, dtype, verdicts, obstacle, loss == loss_of_loop)
    if not good:
        raise click.exceptions.Exit(1)


def _gradients(
    step: Callable[..., Tensor], example: Example, home: torch.device, seed: int
) -> tuple[float, Gradients]:
    """Loss and gradients of a step, on a copy of the model, from the same seed."""
    stages = [copy.deepcopy(stage).to(home) for stage in example.stages]
    torch.manual_seed(seed)
    loss = step(stages, _to(example.inputs, home), _to(example.targets, home))
    grads = [
        [None if p.grad is None else p.grad.detach().cpu() for p in stage.parameters()]
        for stage in stages
    ]
    return loss.item(), grads


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(part.to(device) for part in value)
    return value.to(device)


def _obstacle(example: Example, dtype: str) -> str | None:
    """Why one full-batch step is no measure here, as far as one can tell."""
    if dtype != "float64":
        return f"1e-12 needs float64, this is {dtype}"
    norm = nn.modules.batchnorm._BatchNorm
    for number, stage in enumerate(example.stages):
        for module in stage.modules():
            if isinstance(module, norm) and module.training:
                return (
                    f"stage {number} has {type(module).__name__}, which depends on "
                    "how the batch is cut"
                )
    return None


def _judge(
    number: int,
    ours: Sequence[Tensor | None],
    theirs: Sequence[Tensor | None],
    whole: Sequence[Tensor | None] | None,
) -> Verdict:
    relative = None
    if whole is not None:
        largest = max((_largest(grad) for grad in whole), default=0.0)
        worst = max((_apart(a, b) for a, b in zip(ours, whole)), default=0.0)
        relative = worst / largest if largest else worst
    return Verdict(
        number,
        sum(grad.numel() for grad in ours if grad is not None),
        all(map(_same, ours, theirs)),
        max((_apart(a, b) for a, b in zip(ours, theirs)), default=0.0),
        relative,
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _apart(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return _largest(a - b)


def _largest(grad: Tensor | None) -> float:
    return 0.0 if grad is None or not grad.numel() else float(grad.abs().max())


def _flat(grads: Gradients) -> list[Tensor | None]:
    return [grad for stage in grads for grad in stage]


def _spelled_out(verdict: Verdict) -> dict[str, Any]:
    finite = verdict.difference < float("inf")
    return {
        "stage": verdict.stage,
        "parameters": verdict.parameters,
        "bitwise_equal": verdict.equal,
        "largest_difference": verdict.difference if finite else None,
        "full_batch_relative": verdict.relative,
        "ok": verdict.good,
    }


def _tell(
    summary: str,
    dtype: str,
    verdicts: Sequence[Verdict],
    obstacle: str | None,
    loss_equal: bool,
) -> None:
    emit_table(
        f"{summary}: gradients of one step in {dtype}",
        ("stage", "parameters", "as the loop", "difference", "full batch", "verdict"),
        (
            (
                str(v.stage),
                f"{v.parameters:,}",
                "bitwise" if v.equal else "no",
                f"{v.difference:.3g}",
                "-" if v.relative is None else f"{v.relative:.2g}",
                "good" if v.good else "WRONG",
            )
            for v in verdicts
        ),
        right=("stage", "parameters", "difference", "full batch"),
    )
    loss = "equal" if loss_equal else "NOT equal"
    click.echo(
        f"Compared bit for bit with a plain loop over the micro-batches; losses {loss}."
    )
    if obstacle is None:
        click.echo(
            f"Compared with one step over the whole batch: within {TOLERANCE:g} of "
            "each stage's largest gradient."
            if all(v.relative is not None and v.relative <= TOLERANCE for v in verdicts)
            else f"One step over the whole batch differs by more than {TOLERANCE:g} "
            "of a stage's largest gradient."
        )
    else:
        click.echo(f"Not compared with one step over the whole batch: {obstacle}.")
