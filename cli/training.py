# ruff: noqa: D301  (click reads the \\b: what follows it keeps its lines)
"""The interface of the commands that train: `run`, `profile`, `verify`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pipeproof.cli.options import (
    MESSAGES,
    Function,
    Wanted,
    as_json,
    takes_schedule,
)


def _takes_model(function: Function) -> Function:
    for option in reversed(
        [
            click.option(
                "--model",
                default="mlp",
                show_default=True,
                metavar="mlp|gpt|MODULE:FUNCTION",
                help="The stages to train.",
            ),
            click.option(
                "--batch",
                type=int,
                metavar="N",
                help="Rows of the batch; default 4 a micro-batch.",
            ),
            click.option(
                "--device",
                default="cpu",
                show_default=True,
                metavar="D[,D…]",
                help="One for all, or one for each device of the schedule.",
            ),
            click.option("--seed", type=int, default=0, show_default=True),
        ]
    ):
        function = option(function)
    return function


def _dtype(default: str) -> Callable[[Function], Function]:
    return click.option(
        "--dtype",
        type=click.Choice(["float32", "float64", "bfloat16"]),
        default=default,
        show_default=True,
        help="Of parameters and inputs.",
    )


@click.command()
@takes_schedule
@_takes_model
@_dtype("float32")
@click.option("--steps", type=int, metavar="K", default=5, show_default=True)
@click.option(
    "--lr",
    type=float,
    metavar="X",
    default=0.01,
    show_default=True,
    help="Learning rate of SGD.",
)
@MESSAGES
@click.option(
    "--ranks",
    type=int,
    metavar="P",
    help="Start a process for each device of the schedule, on this host.",
)
@click.option(
    "--data-parallel",
    type=int,
    metavar="R",
    default=1,
    show_default=True,
    help="Pipelines side by side, each with its part of the batch; P × R ranks.",
)
@click.option(
    "--trace",
    "trace_path",
    metavar="PATH",
    help="Write the last step's Chrome trace, and beside it what is predicted.",
)
@click.option(
    "--cost",
    "cost_path",
    metavar="FILE",
    help="Predict with what `pipeproof profile` measured, not with this step's times.",
)
@as_json
def run(*, wanted: Wanted, as_json: bool, **rest: Any) -> None:
    """Train a model with a schedule, and measure it.

    In this process, in one for each device (--ranks), or as one of torchrun's:
    torchrun --nproc-per-node=P -m pipeproof.exec, with these arguments.

    Needs torch. MODULE:FUNCTION is your own code (MODULE a dotted name or a path
    that ends in .py): it is called with stages=, batch=, dtype=, seed= and
    returns stages, inputs, targets, loss_fn.

    \b
    Example:
      pipeproof run 1f1b -p 4 -m 8 --model gpt --steps 10 --trace step.json
    """
    from pipeproof.cli.model import require_torch

    require_torch()
    from pipeproof.cli.running import train

    train(wanted, as_json=as_json, **rest)


@click.command()
@takes_schedule
@_takes_model
@_dtype("float32")
@click.option(
    "--rounds",
    type=int,
    metavar="K",
    default=5,
    show_default=True,
    help="Measured steps of each kind.",
)
@click.option(
    "--ranks",
    type=int,
    metavar="P",
    help="Start a process for each device of the schedule, on this host.",
)
@click.option("-o", "--output", metavar="PATH", help="Write a cost file.")
@as_json
def profile(*, wanted: Wanted, as_json: bool, **rest: Any) -> None:
    """Measure what stages and links take, and hold a prediction against a fresh run.

    The stages run with backwards whole, in halves (I and W) and with recomputation,
    whichever of them the schedule itself has: what is measured does for every
    schedule of the same stages on the same devices. `simulate --cost` and
    `run --cost` read the file; it is in seconds. Where the schedule has STEPs, those of
    SGD are measured too.

    Needs torch. In this process, in ranks, or under torchrun, as `run`.

    \b
    Example:
      pipeproof profile 1f1b -p 2 -m 8 --model gpt --ranks 2 -o cost.json
      pipeproof simulate zb-h1 -p 2 -m 16 --cost cost.json
    """
    from pipeproof.cli.model import require_torch

    require_torch()
    from pipeproof.cli.profiling import measure

    measure(wanted, as_json=as_json, **rest)


@click.command()
@takes_schedule
@_takes_model
@_dtype("float64")
@as_json
def verify(*, wanted: Wanted, as_json: bool, **rest: Any) -> None:
    """Compare gradients with those of unpipelined training.

    Needs torch. Gradients must equal, bit for bit, those of a plain loop over the
    micro-batches. In float64 they must also equal those of one step over the
    whole batch, within 1e-12 of their size, unless the model has dropout or batch
    statistics, whose results depend on how the batch is cut. Exits with 1 if they
    do not. STEPs, which would use the gradients up, are left out. See `run` for
    MODULE:FUNCTION.

    \b
    Example:
      pipeproof verify 1f1b -p 4 -m 8 --model gpt --remat always
    """
    from pipeproof.cli.model import require_torch

    require_torch()
    from pipeproof.cli.verifying import compare

    compare(wanted, as_json=as_json, **rest)
