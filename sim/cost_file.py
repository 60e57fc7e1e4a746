"""What was measured of a model's stages, as JSON: times in seconds, and bytes.

    {"format": "pipeproof cost 1", "measured": "1f1b(…) …", "step_outside": 0.0004,
     "cost": {"forward": [0.0031, 0.0032], …, "activation_bytes": [2039808, 2170880]},
     "links": [{"source": 0, "target": 1, "latency": 0.0001}]}

Reading executes nothing and bounds the size first; what is not known is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike, fspath
from typing import Any, TextIO

from pipeproof.sched.errors import ParameterError, ParseError
from pipeproof.sched.exact import Number
from pipeproof.sched.reading import text_of
from pipeproof.sim.cluster import Cluster, Link
from pipeproof.sim.cost import Cost

FORMAT = "pipeproof cost 1"
MAX_BYTES = 1 << 24
TIMES = (
    "forward",
    "input_grad",
    "weight_grad",
    "backward",
    "recompute",
    "step",
    "overlap",
)


@dataclass(frozen=True)
class Measured:
    """A cost with all that was measured beside it, in seconds.

    Attributes:
        cost: times and bytes, one number per stage.
        links: between devices.
        step_outside: of a step, what its instructions do not account for.
        measured: where it comes from, for readers.
    """

    cost: Cost
    links: dict[tuple[int, int], Link] = field(default_factory=dict)
    step_outside: float = 0.0
    measured: str = ""

    def in_units(self, per_second: Number) -> Measured:
        """The same, in another unit of time.

        Args:
            per_second: how many of it make a second.
        """
        times: dict[str, Any] = {
            name: _times(value, per_second)
            for name in TIMES
            if (value := getattr(self.cost, name)) is not None
        }
        links = {
            ends: Link(
                link.latency * per_second,
                None if link.bandwidth is None else link.bandwidth / per_second,
            )
            for ends, link in self.links.items()
        }
        return Measured(
            replace(self.cost, **times),
            links,
            self.step_outside * float(per_second),
            self.measured,
        )

    @property
    def cluster(self) -> Cluster:
        """With the links that were measured."""
        return Cluster(links=self.links)


def _times(value: Any, factor: Number) -> Any:
    if isinstance(value, tuple):
        return tuple(number * factor for number in value)
    return value * factor


def write_cost(measured: Measured, file: TextIO) -> None:
    """Write a cost file."""
    cost = {k: v for k, v in asdict(measured.cost).items() if v is not None}
    links = [
        {"source": source, "target": target}
        | {k: v for k, v in asdict(link).items() if v is not None}
        for (source, target), link in sorted(measured.links.items())
    ]
    content = {
        "format": FORMAT,
        "measured": measured.measured,
        "step_outside": measured.step_outside,
        "cost": cost,
        "links": links,
    }
    json.dump(content, file, indent=1)
    file.write("\n")


def read_cost(path: str | PathLike[str]) -> Measured:
    """Read one.

    Raises:
        ParseError: naming the file, what was expected and found.
        OSError: the file cannot be read.
    """
    where = fspath(path)
    with open(path, "rb") as file:
        text = text_of(file, where, MAX_BYTES, "is this a cost file?")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ParseError(
            f"{where}: expected JSON as `pipeproof profile` writes it: {error}"
        ) from None
    except RecursionError:
        raise ParseError(f"{where}: expected JSON with few brackets") from None
    try:
        return _parsed(content)
    except (ParseError, ParameterError) as error:
        raise ParseError(f"{where}: {error}") from None


def _parsed(content: Any) -> Measured:
    given = content.get("format") if isinstance(content, dict) else None
    if given != FORMAT:
        raise ParseError(f"expected a file of format {FORMAT!r}, found {given!r}")
    known = {"format", "measured", "step_outside", "cost", "links"}
    _refuse_others("the file", content, known)
    cost = content.get("cost")
    _refuse_others("cost", cost, {spec.name for spec in fields(Cost)})
    links: dict[tuple[int, int], Link] = {}
    if not isinstance(joined := content.get("links", []), list):
        raise ParseError(f"links must be a list, found {joined!r}")
    for link in joined:
        _refuse_others("a link", link, {"source", "target", "latency", "bandwidth"})
        ends = link.get("source"), link.get("target")
        if not all(type(end) is int and end >= 0 for end in ends):
            raise ParseError(f"a link joins two devices, found {link!r}")
        links[ends] = Link(link.get("latency", 0), link.get("bandwidth"))
    outside = content.get("step_outside", 0.0)
    if type(outside) not in (int, float) or not outside >= 0:
        raise ParseError(f"step_outside must be seconds, found {outside!r}")
    text = content.get("measured", "")
    return Measured(Cost(**cost), links, float(outside), str(text))


def _refuse_others(what: str, given: Any, known: set[str]) -> None:
    if not isinstance(given, dict):
        raise ParseError(f"{what} must be an object, found {given!r}")
    if others := sorted(set(given) - known):
        raise ParseError(
            f"{what} has {others[0]!r}: expected {', '.join(sorted(known))}"
        )
