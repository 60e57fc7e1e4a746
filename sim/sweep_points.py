"""What a sweep asks: points, grids of them, and keys that tell them apart."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np

from pipeproof.sched import CATALOG, Schedule, catalog
from pipeproof.sched import recompute as rematerialise
from pipeproof.sched.errors import ParameterError, PipeproofError
from pipeproof.sched.ir import check_name
from pipeproof.sched.lower import POLICIES, Messages, Receives, Transfers
from pipeproof.sched.transforms import Policy
from pipeproof.sim.cluster import Cluster
from pipeproof.sim.cost import Cost

Maker = Callable[..., Schedule]
"""(devices, micro_batches, options…) → Schedule."""

Pricing = Cost | Callable[[Schedule], Cost]
"""A Cost, or what makes one for a schedule: a model's share shrinks with p."""


@dataclass(frozen=True, slots=True)
class Point:
    """One question of a sweep.

    Attributes:
        schedule: a name in the catalogue, or a generator of your own.
        devices, micro_batches: its sizes.
        options: what the generator takes beside them.
        recompute: policy of `recompute`; None for the schedule as it is.
        transfers, receives, messages: how it is lowered, see `lower`.
        cost: as `simulate` takes it, or a function of the schedule that makes it.
        cluster: as `simulate` takes it.
        cost_name, cluster_name: what the results call those.
    """

    schedule: str | Maker
    devices: int
    micro_batches: int
    options: Mapping[str, Any] = field(default_factory=dict)
    recompute: Policy | None = None
    transfers: Transfers = "overlapped"
    receives: Receives = "early"
    messages: Messages = "single"
    cost: Pricing = field(default_factory=Cost)
    cost_name: str = "default"
    cluster: Cluster = field(default_factory=Cluster)
    cluster_name: str = "default"

    @property
    def name(self) -> str:
        """What the results call the schedule."""
        if isinstance(self.schedule, str):
            return self.schedule
        return getattr(self.schedule, "__name__", type(self.schedule).__name__)

    @property
    def size(self) -> int:
        """About how many ops a kind there are: what is large is begun first."""
        cuts = (self.options.get(name) for name in ("chunks", "slices", "waves"))
        times = (max(cut, 1) for cut in cuts if isinstance(cut, int))
        return self.devices * self.micro_batches * math.prod(times)

    def described(self) -> dict[str, str | int]:
        """What it is, for a row of a table."""
        return {
            "schedule": self.name,
            "devices": self.devices,
            "micro_batches": self.micro_batches,
            "options": " ".join(f"{key}={self.options[key]}" for key in self.options),
            "recompute": self.recompute or "",
            "transfers": self.transfers,
            "receives": self.receives,
            "messages": self.messages,
            "cost": self.cost_name,
            "cluster": self.cluster_name,
        }

    def make(self) -> Schedule:
        """The schedule.

        Raises:
            ParameterError: as `catalog.make` and `recompute`.
        """
        if isinstance(self.schedule, str):
            schedule = catalog.make(
                self.schedule,
                devices=self.devices,
                micro_batches=self.micro_batches,
                **self.options,
            )
        else:
            schedule = self.schedule(self.devices, self.micro_batches, **self.options)
        if self.recompute is None:
            return schedule
        return rematerialise(schedule, self.recompute)

    def cost_of(self, schedule: Schedule) -> Cost:
        """The cost of its schedule."""
        return self.cost if isinstance(self.cost, Cost) else self.cost(schedule)


def grid(
    schedules: Iterable[str | Maker],
    devices: Iterable[int],
    micro_batches: Iterable[int],
    *,
    costs: Mapping[str, Pricing] | None = None,
    clusters: Mapping[str, Cluster] | None = None,
    recompute: Iterable[Policy | None] = (None,),
    transfers: Iterable[Transfers] = ("overlapped",),
    receives: Iterable[Receives] = ("early",),
    messages: Iterable[Messages] = ("single",),
    **options: Iterable[Any],
) -> list[Point]:
    """Every combination, the first arguments varying slowest.

    Grids can be added: `grid(["1f1b"], p, m) + grid(["interleaved"], p, m,
    chunks=[2, 4])`.

    Args:
        schedules: names in the catalogue, or generators.
        devices: p.
        micro_batches: m, per step.
        costs: name → Cost, or a function that makes it from the schedule; default
            `Cost()`.
        clusters: name → Cluster; default `Cluster()`.
        recompute: policies; None is the schedule as it is.
        transfers: beside the compute stream, or blocking; see `lower`.
        receives: posted early or late; likewise.
        messages: single or grouped; likewise.
        options: of the generators (`chunks=[2, 4]`); None is a generator's
            default. One goes to the schedules that have it: beside `chunks`,
            1F1B appears once.

    Raises:
        ParameterError: an unknown schedule, an option that none of them has, or
            one value where several are expected.
    """
    axes = {
        "schedules": schedules,
        "devices": devices,
        "micro_batches": micro_batches,
        "recompute": recompute,
        "transfers": transfers,
        "receives": receives,
        "messages": messages,
        **options,
    }
    values = {name: _several(name, axis) for name, axis in axes.items()}
    takers = {source: _options_of(source) for source in values["schedules"]}
    for name in options:
        if not any(takes is None or name in takes for takes in takers.values()):
            raise ParameterError(
                f"{name}: none of these schedules takes it: leave it out"
            )
    around: list[dict[str, Any]] = [
        {
            "recompute": policy,
            "transfers": sending,
            "receives": receiving,
            "messages": posting,
            "cost": cost,
            "cost_name": cost_name,
            "cluster": cluster,
            "cluster_name": cluster_name,
        }
        for (
            policy,
            sending,
            receiving,
            posting,
            (cost_name, cost),
            (cluster_name, cluster),
        ) in product(
            values["recompute"],
            *(values[name] for name in POLICIES),
            (costs or {"default": Cost()}).items(),
            (clusters or {"default": Cluster()}).items(),
        )
    ]
    of_options = {name: values[name] for name in options}
    return [
        Point(source, p, m, chosen, **how)
        for source, takes in takers.items()
        for p, m in product(values["devices"], values["micro_batches"])
        for chosen in _choices(of_options, takes)
        for how in around
    ]


def _several(name: str, axis: Iterable[Any]) -> list[Any]:
    if isinstance(axis, str) or not isinstance(axis, Iterable):
        raise ParameterError(f"{name} takes several values: [{axis!r}], got {axis!r}")
    return list(dict.fromkeys(axis))


def _options_of(source: str | Maker) -> tuple[str, ...] | None:
    """What a generator takes beside its sizes; None for anything."""
    if isinstance(source, str):
        if source not in CATALOG:
            raise ParameterError(
                f"no schedule is called {source!r}: the catalogue has "
                f"{', '.join(CATALOG)}"
            )
        return CATALOG[source].options
    parameters = inspect.signature(source).parameters
    if any(spec.kind == spec.VAR_KEYWORD for spec in parameters.values()):
        return None
    return tuple(parameters)[2:]


def _choices(
    options: Mapping[str, list[Any]], takes: tuple[str, ...] | None
) -> list[dict[str, Any]]:
    names = [name for name in options if takes is None or name in takes]
    return [
        {name: value for name, value in zip(names, values) if value is not None}
        for values in product(*(options[name] for name in names))
    ]


@contextmanager
def noted(point: Point) -> Iterator[None]:
    """Say at which point it was that something failed unforeseen."""
    try:
        yield
    except Exception as error:
        error.add_note(f"The sweep was at {point.described()}")
        raise


def one_meaning_each(points: Iterable[Point]) -> None:
    """Refuse one name for two things, and what does not fit a line of a file."""
    meanings: dict[tuple[str, str], Any] = {}
    for point in points:
        for what, name, value in (
            ("schedule", point.name, point.schedule),
            ("cost", point.cost_name, point.cost),
            ("cluster", point.cluster_name, point.cluster),
            ("option", point.described()["options"] or "none", None),
        ):
            if (what, name) not in meanings:
                check_name(str(name))
            known = meanings.setdefault((what, str(name)), value)
            if known is not value and known != value:
                raise ParameterError(
                    f"two of the sweep's {what}s are called {name!r}: the results "
                    "could not be told apart"
                )


def keyed(points: list[Point]) -> tuple[dict[str, Point], dict[str, str]]:
    """Digest of all that decides a result → point, and → digest of its program.

    A name in the catalogue stands for its generator, in this version. Of a
    caller's functions, schedules and costs, what they return counts: their code may
    have changed.
    """
    asked, programs = {}, {}
    from importlib.metadata import version  # not needed to simulate

    release = version("pipeproof")
    seen: dict[int, str] = {}  # one sweep has few costs and many points

    def same(value: Cost | Cluster) -> str:
        if id(value) not in seen:
            seen[id(value)] = _canonical(value)
        return seen[id(value)]

    for point in points:
        sizes = (point.devices, point.micro_batches, point.options)
        how = (point.recompute, *(getattr(point, name) for name in POLICIES))
        program = _digest(
            release,
            *map(_canonical, (*sizes, *how)),
            point.name if isinstance(point.schedule, str) else _made(point, _content),
        )
        names = (point.name, point.cost_name, point.cluster_name)
        if isinstance(point.cost, Cost):
            price = same(point.cost)
        else:
            price = _made(point, _price)
        key = _digest(program, *names, price, same(point.cluster))
        asked[key], programs[key] = point, program
    return asked, programs


def _made(point: Point, tell: Callable[[Point], str]) -> str:
    """What a caller's function returns, or why it does not."""
    try:
        with noted(point):
            return tell(point)
    except PipeproofError as error:
        return str(error)


def _content(point: Point) -> str:
    return point.make().digest


def _price(point: Point) -> str:
    return _canonical(point.cost_of(point.make()))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _canonical(value: Any) -> str:
    """A text that equal values share and others do not."""
    if is_dataclass(value):
        inside = (
            f"{spec.name}={_canonical(getattr(value, spec.name))}"
            for spec in fields(value)
        )
        return f"{type(value).__name__}({', '.join(inside)})"
    if isinstance(value, Mapping):
        pairs = (f"{_canonical(k)}: {_canonical(v)}" for k, v in value.items())
        return f"{{{', '.join(sorted(pairs))}}}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_canonical, value))}]"
    if isinstance(value, np.generic):
        return _canonical(value.item())
    if value is None or isinstance(value, (bool, int, float, Fraction, str)):
        return repr(value)
    raise ParameterError(
        f"a sweep cannot tell {value!r} from other values: give numbers or text"
    )
