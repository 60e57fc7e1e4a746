"""Options that several commands share.

Each bundle of options is collected into one frozen object, so that commands
hand on a `Wanted` or `Conditions` instead of twenty arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from typing import Any

import click

from pipeproof.cli.values import Number, buffering, number, per_stage, sizes

Function = Callable[..., None]

# Spelled out again here, since to import them would slow down every --help; a
# test holds them to the originals.
POLICIES = ("never", "always", "except-last", "adaptive")
UNITS = ("s", "ms", "us", "ns")
STREAM_MODELS = ("dir", "pair", "one", "sync")
LOWERING = {
    "transfers": ("overlapped", "blocking"),
    "receives": ("early", "late"),
    "messages": ("single", "grouped"),
}
"""The policies of lowering and their values, the default one first."""


def flag(name: str) -> str:
    """The option that sets an attribute of `Conditions` or `Features`."""
    return f"--{name.replace('_', '-')}"


FLAGS = {
    "chunks": "-v",
    "slices": "--slices",
    "waves": "--waves",
    "group": "--group",
    "offload": "--offload",
    "backward": "--backward-order",
    "times": "--times",
}
"""How the command line calls the generators' options."""


@dataclass(frozen=True, slots=True)
class Features:
    """What a catalogue's schedule may have beside its two sizes.

    Attributes:
        chunks, slices, waves, group, offload, backward_order, times: as their
            options say; None leaves the schedule its default.
        remat: policy of `recompute`, or None for the schedule as it is.
    """

    chunks: int | None
    slices: int | None
    waves: int | None
    group: int | None
    offload: int | None
    backward_order: str | None
    times: Any
    remat: str | None

    def of_generator(self) -> dict[str, Any]:
        """As `catalog.make` takes them; those not given are None."""
        return {
            "chunks": self.chunks,
            "slices": self.slices,
            "waves": self.waves,
            "group": self.group,
            "offload": self.offload,
            "backward": self.backward_order,
            "times": self.times,
        }


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which schedule a command is about.

    Attributes:
        source: a name in the catalogue, a path, or `-`.
        devices, micro_batches: of a name.
        features: likewise, but `remat`.
        steps: whether to add STEPs.
    """

    source: str
    devices: int | None
    micro_batches: int | None
    features: Features
    steps: bool = False


@dataclass(frozen=True, slots=True)
class Conditions:
    """What simulating assumes; None is the default of `Cost` or `Cluster`."""

    forward: Any
    input_grad: Any
    weight_grad: Any
    backward: Any
    recompute: Any
    step: Any
    overlap: Any
    weight_grad_memory: Number | None
    weight_bytes: Any
    gradient_bytes: Any
    optimizer_bytes: Any
    activation_bytes: Any
    boundary_bytes: Any
    input_bytes: Any
    skip_bytes: Any
    tied_bytes: Any
    link_latency: Number | None
    link_bandwidth: Number | None
    host_bandwidth: Number | None
    cluster: str | None
    cost: str | None
    buffering: Any
    streams: str | None
    transfers: str = "overlapped"
    receives: str = "early"
    messages: str = "single"
    unit: str = "ms"

    @property
    def given(self) -> list[str]:
        """What differs from the defaults, by the name of the option that says it."""
        return [
            spec.metadata.get("said_by", spec.name)
            for spec in fields(self)
            if getattr(self, spec.name)
            != (None if spec.default is MISSING else spec.default)
        ]


_SIZES = [
    click.option("-p", "--devices", type=int, metavar="P", help="Devices."),
    click.option(
        "-m", "--micro-batches", type=int, metavar="M", help="Micro-batches a step."
    ),
]
_STEPS = click.option(
    "--with-steps",
    is_flag=True,
    help="Give each stage a STEP of its optimizer behind its gradient: with_steps().",
)
_FEATURES = [
    click.option("-v", "--chunks", type=int, metavar="V", help="Chunks per device."),
    click.option("--slices", type=int, metavar="Q", help="Slices of a micro-batch."),
    click.option("--waves", type=int, metavar="W", help="Waves of the placement."),
    click.option(
        "--group", type=int, metavar="N", help="Micro-batches that go together."
    ),
    click.option(
        "--offload",
        type=int,
        metavar="K",
        help="Chunks whose activations go to the host.",
    ),
    click.option(
        "--backward-order",
        type=click.Choice(["lifo", "fifo"]),
        help="Order of gpipe's backwards; lifo as published.",
    ),
    click.option(
        "--times",
        type=per_stage,
        metavar="F,I,W",
        help="Times that v-half and v-min are built for; as published if left out.",
    ),
    click.option(
        "--remat",
        type=click.Choice(POLICIES),
        help="Re-materialise activations: the policy of recompute().",
    ),
]


def _amount(flag: str, text: str) -> Any:
    return click.option(flag, type=per_stage, metavar="X[,X…]", help=text)


def _number(flag: str, text: str) -> Any:
    return click.option(flag, type=number, metavar="X", help=text)


def _policy(name: str, text: str) -> Any:
    values = LOWERING[name]
    return click.option(
        f"--{name}",
        type=click.Choice(values),
        default=values[0],
        show_default=True,
        help=text,
    )


MESSAGES: Callable[[Function], Function] = _policy(
    "messages", "Posted one by one, or what two devices exchange in a group."
)
POLICY_OPTIONS = [
    _policy("transfers", "Sends beside the sender's compute, or in its way."),
    _policy("receives", "When receives are posted."),
    MESSAGES,
]
"""How a schedule is lowered."""

_CONDITIONS = [
    _amount("--forward", "Time of F; default 1."),
    _amount("--input-grad", "Time of I; default 1."),
    _amount("--weight-grad", "Time of W; default 1."),
    _amount("--backward", "Time of B; default I + W."),
    _amount("--recompute", "Time of R; default F."),
    _amount("--step", "Time of STEP; default 0."),
    _amount("--overlap", "Joint time of F&B; default F + B."),
    _number(
        "--weight-grad-memory",
        "Part of the activations that I leaves for W; default 1.",
    ),
    _amount("--weight-bytes", "Weights."),
    _amount("--gradient-bytes", "Their gradients."),
    _amount("--optimizer-bytes", "Optimizer state."),
    _amount("--activation-bytes", "What a forward keeps, its input included."),
    _amount("--boundary-bytes", "A stage's output, as it is sent."),
    _amount("--input-bytes", "A stage's input; default the boundary before it."),
    _amount("--skip-bytes", "What goes over a skip connection, or each of them."),
    _amount("--tied-bytes", "Gradient of what a tie's stages share, or each tie's."),
    _number("--link-latency", "Of every link; default 0."),
    _number("--link-bandwidth", "Bytes per unit of time; default unlimited."),
    _number("--host-bandwidth", "Of OFFLOAD and RELOAD; default unlimited."),
    click.option(
        "--cluster",
        metavar="NAME|FILE",
        help="Links and limits of `pipeproof list --clusters`, or of a TOML file in "
        "bytes and seconds, in place of the three before; see --unit.",
    ),
    click.option(
        "--cost",
        metavar="FILE",
        help="Times, bytes and links of stages that `pipeproof profile` measured; what "
        "is given beside it counts instead. See --unit.",
    ),
    click.option(
        "--buffering",
        "--buffer",
        type=buffering,
        metavar="eager|rendezvous|K",
        help="What a send waits for: nothing (default), its receive, or the K-th "
        "receive before.",
    ),
    click.option(
        "--streams",
        type=click.Choice(STREAM_MODELS),
        help="Which streams of a device are one: none (dir, default); sends and "
        "receives of one pair of devices; all of them (one); with compute (sync).",
    ),
    *POLICY_OPTIONS,
    click.option(
        "--unit",
        type=click.Choice(UNITS),
        default="ms",
        show_default=True,
        help="What a unit of time is, for --cluster, --cost and in a Chrome trace.",
    ),
]

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def takes_schedule(function: Function) -> Function:
    """Give a command NAME|FILE and its sizes, collected as `wanted`."""

    @_with([click.argument("source", metavar="NAME|FILE"), *_SIZES, _STEPS])
    @takes_features
    @wraps(function)
    def collected(
        *,
        source: str,
        devices: int | None,
        micro_batches: int | None,
        with_steps: bool,
        features: Features,
        **rest: Any,
    ) -> None:
        wanted = Wanted(source, devices, micro_batches, features, with_steps)
        function(wanted=wanted, **rest)

    return collected


def takes_features(function: Function) -> Function:
    """Give a command the options of `Features`, collected as `features`."""
    return collect(function, Features, "features", _FEATURES)


def takes_policies(function: Function) -> Function:
    """Give a command the options of lowering, collected as `policies`."""

    @_with(POLICY_OPTIONS)
    @wraps(function)
    def collected(**given: Any) -> None:
        policies = {name: given.pop(name) for name in LOWERING}
        function(**given, policies=policies)

    return collected


def takes_conditions(function: Function) -> Function:
    """Give a command the options of `Conditions`, collected as `conditions`."""
    return collect(function, Conditions, "conditions", _CONDITIONS)


def takes_axes(function: Function) -> Function:
    """Give a command both bundles' options with several values each, as `axes`.

    `axes` has a tuple of values for each option that was given, by its name in
    `Features` or `Conditions`.
    """
    members = [spec.name for spec in (*fields(Features), *fields(Conditions))]

    @_with([_several(option) for option in (*_FEATURES, *_CONDITIONS)])
    @wraps(function)
    def collected(**given: Any) -> None:
        values = {member: given.pop(member) for member in members}
        axes = {member: several for member, several in values.items() if several}
        function(**given, axes=axes)

    return collected


def _several(option: Any) -> Any:
    """The same option for several values: sizes in a list, others repeatedly."""

    def holder() -> None: ...

    (one,) = option(holder).__click_params__
    names = (*one.opts, one.name)
    if one.type is click.INT:
        return click.option(*names, type=sizes, metavar="SIZES", help=one.help)
    return click.option(
        *names, type=one.type, metavar=one.metavar, multiple=True, help=one.help
    )


def collect(
    function: Function, bundle: type[Any], name: str, options: list[Any]
) -> Function:
    """Give a command these options, collected in an object under this name."""
    members = [spec.name for spec in fields(bundle)]

    @_with(options)
    @wraps(function)
    def collected(**given: Any) -> None:
        bundled = bundle(**{member: given.pop(member) for member in members})
        function(**given, **{name: bundled})

    return collected


def _with(options: list[Any]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
