"""Skip connections of a model: who gives what to whom, by name.

A unit says with an attribute which names it gives, and returns their values beside
its output. A later unit takes one by having a parameter of that name, behind its
first, or one that it says takes it::

    class Down(nn.Module):                    class Up(nn.Module):
        gives_skips = ("fine",)                   takes_skips = {"skip": "fine"}

        def forward(self, x):                     def forward(self, x, skip):
            y = self.body(x)                          x = torch.cat([x, skip], 1)
            return self.pool(y), {"fine": y}          return self.body(x)

It does not matter where the model is cut. Within a stage a value stays there; to the
next stage it goes beside the output; further on it goes straight there, in one
message for all that one stage gives to another.

Each stage that takes a value has a node of its own in the graph of who gives it. A
backward so adds up their gradients in one order, from the last stage to the first,
wherever the graph is cut.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pipeproof.exec import tensors
from pipeproof.exec.errors import ModelError
from pipeproof.sched import Schedule
from pipeproof.sched.skips import Skip, format_skips

Values = dict[str, Any]
"""By name."""

Offer = tuple[Sequence[str], Collection[str], Collection[str]]
"""Of a unit: the names that it gives, those that it would take, and of these the ones
that it says it takes."""


@dataclass(frozen=True)
class Routes:
    """Where each name goes.

    Attributes:
        sources: of each name the stage that gives it.
        targets: the stages that take it, ascending.
        skips: pairs of stages that are not neighbours, in order.
        beside: stages to which the one before gives some.
    """

    sources: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    skips: tuple[Skip, ...] = ()
    beside: frozenset[int] = frozenset()

    @classmethod
    def of(cls, stages: Sequence[Sequence[Offer]]) -> Routes:
        """What units offer, stage by stage.

        Raises:
            ModelError: a name that is given twice, taken before it is given, or never
                taken.
        """
        units = [
            (stage, *offer) for stage, offers in enumerate(stages) for offer in offers
        ]
        giver: dict[str, int] = {}
        for number, (_, gives, *_) in enumerate(units):
            for name in gives:
                first = giver.setdefault(name, number)
                if first != number or list(gives).count(name) > 1:
                    raise ModelError(
                        f"units {first} and {number} give the skip {name!r}: give each "
                        "a name of its own"
                    )
        targets: dict[str, list[int]] = {name: [] for name in giver}
        for number, (stage, _, takes, needs) in enumerate(units):
            for name in sorted(set(needs) - giver.keys()):
                raise ModelError(
                    f"unit {number} takes the skip {name!r}, which no unit gives: "
                    f"found {', '.join(map(repr, sorted(giver))) or 'none'}"
                )
            for name in sorted(giver.keys() & set(takes)):
                if number <= giver[name]:
                    raise ModelError(
                        f"unit {number} takes the skip {name!r}, which unit "
                        f"{giver[name]} gives: a skip leads forward"
                    )
                if stage not in targets[name]:
                    targets[name].append(stage)
        for name, takers in targets.items():
            if not takers:
                raise ModelError(
                    f"unit {giver[name]} gives the skip {name!r}, and no later unit "
                    "takes it: give a parameter of its forward that name, behind its "
                    "first, or do not give it"
                )
        sources = {name: units[number][0] for name, number in giver.items()}
        pairs = {
            (sources[name], target) for name in targets for target in targets[name]
        }
        far = sorted((a, b) for a, b in pairs if b > a + 1)
        near = frozenset(b for a, b in pairs if b == a + 1)
        takers_of = {name: tuple(takers) for name, takers in targets.items()}
        return cls(sources, takers_of, tuple(far), near)

    def parameters(self, takes: Mapping[str, str]) -> dict[str, str]:
        """Of a unit's parameters those that take a skip, and which."""
        return {own: name for own, name in takes.items() if name in self.targets}

    def onto(self, schedule: Schedule) -> Schedule:
        """The schedule, of a model with these skips.

        Raises:
            ModelError: it says others.
        """
        if schedule.skips and schedule.skips != self.skips:
            raise ModelError(
                f"the schedule has the skips {format_skips(schedule.skips)}, and the "
                f"stages {format_skips(self.skips) or 'none'}: leave them out of the "
                "schedule, and it gets the stages'"
            )
        return schedule.with_skips(self.skips) if self.skips else schedule


NO_ROUTES = Routes()


def gives_of(unit: nn.Module) -> tuple[str, ...]:
    """The names that a unit gives.

    Raises:
        ModelError: something else than names, or a module within the unit that gives.
    """
    unit = getattr(unit, "_orig_mod", unit)  # of torch.compile's wrapper
    given = getattr(unit, "gives_skips", ())
    if not isinstance(given, (tuple, list)) or not all(type(n) is str for n in given):
        raise ModelError(
            f"{type(unit).__name__} has gives_skips = {given!r}: expected a tuple of "
            "names"
        )
    for part in unit.modules():
        if part is not unit and hasattr(part, "gives_skips") and not given:
            raise ModelError(
                f"{type(unit).__name__} holds {type(part).__name__}, which gives "
                "skips: a unit that does must stand in the stage's sequence itself, or "
                "be part of one that hands them on and says so itself"
            )
    return tuple(given)


def said_to_take(unit: nn.Module) -> dict[str, str]:
    """By parameter, the skips that a unit says it takes.

    Raises:
        ModelError: something else than names by names.
    """
    unit = getattr(unit, "_orig_mod", unit)
    said = getattr(unit, "takes_skips", {})
    if type(said) is not dict or not all(
        type(name) is str for pair in said.items() for name in pair
    ):
        raise ModelError(
            f"{type(unit).__name__} has takes_skips = {said!r}: expected a dict from "
            "parameters of its forward to names"
        )
    return said


def parted(unit: nn.Module, found: Any, names: Sequence[str]) -> tuple[Any, Values]:
    """What a unit returned → its output, and what it gives.

    Raises:
        ModelError: something else than an output and a dict of all these names.
    """
    if isinstance(found, tuple) and len(found) == 2:
        output, given = found
        if type(given) is dict and sorted(given) == sorted(names):
            return output, given
    raise ModelError(
        f"{type(unit).__name__} gives the skips {', '.join(map(repr, names))}: it must "
        f"return (output, {{name: value}}) with these names, returned "
        f"{type(found).__name__}"
    )


def handed_over(value: Any) -> Any:
    """A value for one of those that take it, with a node of its own in the graph."""
    return tensors.mapped(
        lambda x: x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x,
        value,
    )
