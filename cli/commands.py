# ruff: noqa: D301  (click reads the \\b: what follows it keeps its lines)
"""Every command's interface: its options, its help, and which module does it.

What a command does is in a module of its own, imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pipeproof.cli.options import (
    UNITS,
    Conditions,
    Features,
    Function,
    Wanted,
    as_json,
    number,
    sizes,
    takes_conditions,
    takes_features,
    takes_schedule,
)

unit = click.option(
    "--unit",
    type=click.Choice(UNITS),
    default="ms",
    show_default=True,
    help="What a unit of time is, in a Chrome trace.",
)


@click.command("list")
@as_json
def list_(*, as_json: bool) -> None:
    """The catalogue: names, formulas, options, sources.

    \b
    Example:
      pipeproof list
    """
    from pipeproof.cli.listing import show_catalogue

    show_catalogue(as_json=as_json)


@click.command()
@takes_schedule
@takes_conditions
@click.option("--tick", type=number, metavar="X", help="Time that a column stands for.")
@as_json
def show(*, wanted: Wanted, conditions: Conditions, tick: Any, as_json: bool) -> None:
    """Draw a schedule in text: a line a device, a column a tick.

    NAME is one of the catalogue (`pipeproof list`); without -p and -m it is drawn
    as in its paper's figure. FILE is a path to the text or JSON form or torch CSV,
    or - for standard input. Times default to one tick each for F, I and W, with
    free links. A terminal gets colours, a pipe with FORCE_COLOR=1.

    \b
    Example:
      pipeproof show dualpipe
      pipeproof show 1f1b -p 4 -m 8
      pipeproof show gpipe -p 2 -m 4 --remat always --backward 1
    """
    from pipeproof.cli.showing import show_grid

    show_grid(wanted, conditions, tick, as_json=as_json)


@click.command()
@takes_schedule
@as_json
def check(*, wanted: Wanted, as_json: bool) -> None:
    """Judge a schedule, and print what breaks a rule.

    The rules: complete, well placed, in order, free of cycles. Exits with 1
    if there are findings, and prints all of them.

    \b
    Example:
      pipeproof check 1f1b -p 4 -m 8
      pipeproof check mine.txt
    """
    from pipeproof.cli.checking import judge

    judge(wanted, as_json=as_json)


@click.command()
@takes_schedule
@takes_conditions
@click.option("--trace", "trace_path", metavar="PATH", help="Write a Chrome trace.")
@unit
@as_json
def simulate(
    *,
    wanted: Wanted,
    conditions: Conditions,
    trace_path: str | None,
    unit: str,
    as_json: bool,
) -> None:
    """Predict step time, bubbles and memory.

    Times are in any one unit, and come out in it. A number is for a device's
    whole share of the model; X,X,… is one per stage. Ints and fractions such as
    1/3 are computed with exactly. Given any bytes, those not given are 0.

    \b
    Example:
      pipeproof simulate gpipe -p 4 -m 8
      pipeproof simulate 1f1b -p 8 -m 24 --forward 18.5 --input-grad 18.1 \\
          --weight-grad 9.3 --link-latency .6 --trace 1f1b.json
    """
    from pipeproof.cli.simulating import predict_and_tell

    predict_and_tell(wanted, conditions, trace_path, unit, as_json=as_json)


@click.command()
@click.argument("names", metavar="NAME[,NAME…]")
@click.option(
    "-p", "--devices", type=sizes, metavar="SIZES", required=True, help="Devices."
)
@click.option(
    "-m",
    "--micro-batches",
    type=sizes,
    metavar="SIZES",
    required=True,
    help="Micro-batches a step.",
)
@takes_features
@takes_conditions
@as_json
def sweep(
    *,
    names: str,
    devices: tuple[int, ...],
    micro_batches: tuple[int, ...],
    features: Features,
    conditions: Conditions,
    as_json: bool,
) -> None:
    """Bubble and peak memory of schedules across sizes.

    SIZES are a list 2,4,8; or 2:64, doubling: 2,4,8,16,32,64; or 2:16:2, in steps
    of 2. What a schedule refuses is a row with the reason. Exits with 2 if there
    is nothing but refusals.

    \b
    Example:
      pipeproof sweep gpipe,1f1b -p 2:64 -m 8,16,32
    """
    from pipeproof.cli.sweeping import tabulate

    tabulate(
        names.split(","), devices, micro_batches, features, conditions, as_json=as_json
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
@click.option(
    "--trace", "trace_path", metavar="PATH", help="Write the last step's Chrome trace."
)
@as_json
def run(*, wanted: Wanted, as_json: bool, **rest: Any) -> None:
    """Train a model with a schedule, in this process, and measure it.

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
@_dtype("float64")
@as_json
def verify(*, wanted: Wanted, as_json: bool, **rest: Any) -> None:
    """Compare gradients with those of unpipelined training.

    Needs torch. Gradients must equal, bit for bit, those of a plain loop over the
    micro-batches. In float64 they must also equal those of one step over the
    whole batch, within 1e-12 of their size, unless the model has dropout or batch
    statistics, whose results depend on how the batch is cut. Exits with 1 if they
    do not. See `run` for MODULE:FUNCTION.

    \b
    Example:
      pipeproof verify 1f1b -p 4 -m 8 --model gpt --remat always
    """
    from pipeproof.cli.model import require_torch

    require_torch()
    from pipeproof.cli.verifying import compare

    compare(wanted, as_json=as_json, **rest)


@click.command()
@takes_schedule
@takes_conditions
@click.option(
    "--to",
    "form",
    type=click.Choice(
        ["json", "text", "torch-csv", "torch-csv-comms", "chrome", "svg", "html"]
    ),
    required=True,
    help="The schedule as json, text, or torch's CSV (compute_only, or with "
    "communication: compute_comms); its prediction as chrome, svg or html.",
)
@click.option(
    "-o", "--output", metavar="PATH", default="-", help="Default: standard output."
)
@unit
@as_json
def export(
    *,
    wanted: Wanted,
    conditions: Conditions,
    form: str,
    output: str,
    unit: str,
    as_json: bool,
) -> None:
    """Write a schedule, or what is predicted of it, in another form.

    A file of that name is replaced, and only once the new one is complete.

    \b
    Example:
      pipeproof export 1f1b -p 4 -m 8 --to json -o 1f1b.json
      pipeproof export mine.txt --to html --link-latency .5 -o mine.html
    """
    from pipeproof.cli.exporting import write

    write(wanted, conditions, form, output, unit, as_json=as_json)


ALL = (list_, show, check, simulate, sweep, run, verify, export)
