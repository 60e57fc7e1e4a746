# ruff: noqa: D301  (click reads the \\b: what follows it keeps its lines)
"""Every command's interface: its options, its help, and which module does it.

Those of the commands that train are in `training.py`.

What a command does is in a module of its own, imported when it runs.
"""

from __future__ import annotations

from typing import Any

import click

from pipeproof.cli.options import (
    Conditions,
    Wanted,
    as_json,
    takes_axes,
    takes_policies,
    takes_schedule,
)
from pipeproof.cli.shape import Shape, takes_conditions, takes_shape
from pipeproof.cli.training import profile, run, verify
from pipeproof.cli.values import memory_size, number, sizes


@click.command("list")
@click.option("--clusters", is_flag=True, help="The clusters that --cluster knows.")
@as_json
def list_(*, clusters: bool, as_json: bool) -> None:
    """The catalogue: names, formulas, options, sources.

    \b
    Example:
      pipeproof list
    """
    from pipeproof.cli.listing import show_catalogue, show_clusters

    if clusters:
        show_clusters(as_json=as_json)
    else:
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
@click.option(
    "--memory",
    type=memory_size,
    metavar="BYTES",
    help="What each device has: 80GB, 24GiB, …; default the --cluster's.",
)
@click.option(
    "--max-activations",
    "activations",
    type=number,
    metavar="X",
    help="The most peak_activations of a device, in micro-batches of its share.",
)
@takes_conditions
@as_json
def check(
    *, wanted: Wanted, conditions: Conditions, as_json: bool, **caps: Any
) -> None:
    """Judge a schedule, and print what breaks a rule.

    The rules: complete, well placed, in order, free of cycles; with a cap, it also
    fits: then it is simulated, with costs as for `simulate`. With --streams,
    --buffer (here rendezvous where not given) or a policy of lowering, its
    program does not deadlock under them. Exits with 1 if there are findings, and
    prints all of them.

    \b
    Example:
      pipeproof check 1f1b -p 4 -m 8
      pipeproof check mine.txt --max-activations 4
      pipeproof check mine.txt --streams pair --buffer rendezvous
      pipeproof check 1f1b -p 8 -m 64 --model gpt-175b --memory 80GB
    """
    from pipeproof.cli.checking import judge

    judge(wanted, conditions, as_json=as_json, **caps)


@click.command()
@takes_schedule
@takes_policies
@as_json
def prove(*, wanted: Wanted, policies: dict[str, str], as_json: bool) -> None:
    """Prove that a schedule computes the gradient of unpipelined training.

    Its program is run on terms in place of tensors, so the proof holds for every
    model that the certificate's assumptions hold for. Prints the certificate, or
    what refutes the program, and then exits with 1. A torch CSV with communication
    is judged as it stands: its own order of sends and receives, matched in order.

    \b
    Example:
      pipeproof prove zb-h1 -p 4 -m 8
      pipeproof prove lowered-by-torch.csv
      pipeproof prove mine.txt --receives late
    """
    from pipeproof.cli.proving import certify

    certify(wanted, policies, as_json=as_json)


@click.command()
@takes_schedule
@takes_conditions
@click.option("--trace", "trace_path", metavar="PATH", help="Write a Chrome trace.")
@as_json
def simulate(
    *,
    wanted: Wanted,
    conditions: Conditions,
    trace_path: str | None,
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
      pipeproof simulate 1f1b -p 16 -m 64 --forward 18.5 --input-grad 18.1 \\
          --weight-grad 9.3 --boundary-bytes 25e6 --cluster dgx-a100
    """
    from pipeproof.cli.simulating import predict_and_tell

    predict_and_tell(wanted, conditions, trace_path, as_json=as_json)


@click.command()
@takes_schedule
@takes_conditions
@click.option(
    "--gaps",
    type=click.IntRange(min=0),
    metavar="N",
    default=10,
    show_default=True,
    help="How many of the longest idle times to explain.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Simulate what 1 % less time for each stage and link buys.",
)
@click.option(
    "--jitter",
    "sigma",
    type=number,
    metavar="SIGMA",
    help="Draw a factor for each op, of mean 1 and this standard deviation.",
)
@click.option(
    "--distribution",
    type=click.Choice(["lognormal", "gamma", "uniform"]),
    help="Of the factors; default lognormal.",
)
@click.option(
    "--straggler-chance", type=number, metavar="X", help="That a device is slow."
)
@click.option(
    "--straggler-slowdown",
    type=number,
    metavar="X",
    help="How many times as long its ops then take.",
)
@click.option("--runs", type=int, metavar="N", help="How many to draw; default 1000.")
@click.option("--seed", type=int, metavar="S", help="Of what is drawn; default 0.")
@as_json
def explain(
    *,
    wanted: Wanted,
    conditions: Conditions,
    gaps: int,
    sensitivity: bool,
    as_json: bool,
    **noise: Any,
) -> None:
    """Say why a step takes as long as it does, and what would shorten it.

    Prints how far the predicted makespan is above what no order of the same ops can
    beat; each device's idle time by cause, and its longest gaps in a sentence each;
    and what the critical path spends its time in. Times as in `simulate`. Links do
    not jitter.

    \b
    Example:
      pipeproof explain 1f1b -p 4 -m 8 --link-latency .5
      pipeproof explain zb-h1 -p 8 -m 24 --sensitivity --jitter .1 --runs 500
    """
    from pipeproof.cli.explaining import explain_and_tell

    given = {name: value for name, value in noise.items() if value is not None}
    if given and not {"sigma", "straggler_chance"} & set(given):
        flags = " or ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(
            f"{flags} is about runs with jitter: give --jitter or --straggler-chance"
        )
    explain_and_tell(
        wanted, conditions, gaps, what_if=sensitivity, noise=given, as_json=as_json
    )


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
@takes_axes
@takes_shape
@click.option(
    "-o",
    "--output",
    metavar="FILE.csv|.parquet",
    help="Keep the rows in a file instead of printing them.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes; default one per core, and 1 for a small sweep.",
)
@as_json
def sweep(
    *,
    names: str,
    devices: tuple[int, ...],
    micro_batches: tuple[int, ...],
    axes: dict[str, tuple[Any, ...]],
    shape: Shape,
    output: str | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Bubble and peak memory of schedules across sizes, options and costs.

    SIZES are a list 2,4,8; or 2:64, doubling: 2,4,8,16,32,64; or 2:16:2, in steps
    of 2. Times, bytes, links and policies may be given several times. Every
    combination is simulated; an option of a schedule goes to those that have it.
    What a schedule refuses is a row with the reason. A transformer's costs are
    those of each schedule's own stages; else every device's share costs the same.

    A FILE that is already there is gone on with: what is in it is not simulated
    again, so that an interrupted sweep needs only the same command. A FILE of
    another sweep is refused and left as it is.

    Exits with 1 if a schedule is broken or deadlocks, with 2 if there is nothing
    but refusals.

    \b
    Example:
      pipeproof sweep gpipe,1f1b -p 2:64 -m 8,16,32
      pipeproof sweep 1f1b,interleaved -p 8 -m 32 -v 2,4 --link-latency 0 \\
          --link-latency .5 -o latency.csv
    """
    from pipeproof.cli.sweeping import ask, tabulate

    points = ask(
        names.split(","), devices, micro_batches, axes, shape, printed=output is None
    )
    tabulate(points, output, jobs, as_json=as_json)


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
@as_json
def export(
    *,
    wanted: Wanted,
    conditions: Conditions,
    form: str,
    output: str,
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

    write(wanted, conditions, form, output, as_json=as_json)


ALL = (
    list_,
    show,
    check,
    prove,
    simulate,
    explain,
    sweep,
    run,
    profile,
    verify,
    export,
)
