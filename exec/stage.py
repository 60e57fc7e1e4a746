"""One stage: its units, and their randomness."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeproof.exec import tensors
from pipeproof.exec.batch import NO_KEYWORDS, Value
from pipeproof.exec.batch_norm import deferred
from pipeproof.exec.buffers import Buffers
from pipeproof.exec.errors import ModelError
from pipeproof.exec.rng import Draws, generators, key, seed
from pipeproof.exec.selective import Calls, Recording, Selection
from pipeproof.exec.skips import (
    NO_ROUTES,
    Routes,
    Values,
    gives_of,
    handed_over,
    parted,
)
from pipeproof.exec.split import Splitter
from pipeproof.exec.stash import addresses
from pipeproof.exec.units import (
    StageModule,
    carried_on,
    is_still,
    keywords_needed,
    keywords_of,
    modules_of,
    taken_apart,
    takes_carry,
    takes_of,
    units_of,
)

_DRAW_NOTHING = frozenset(
    {
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.Embedding,
        nn.Flatten,
        nn.GELU,
        nn.Identity,
        nn.LayerNorm,
        nn.Linear,
        nn.ReLU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Tanh,
    }
)


def _draws_nothing(unit: nn.Module) -> bool:
    """Whether a unit certainly uses no randomness, so that seeding can be spared."""
    return (
        type(unit) in _DRAW_NOTHING
        and not unit._forward_hooks
        and not unit._forward_pre_hooks
        and not unit._backward_hooks
        and not unit._backward_pre_hooks
    )


class Stage:
    """A stage on its device.

    Args:
        number: of the stage.
        module: the stage as the user gave it; moved to the device.
        first_unit: number of its first unit in the whole model.
        device: where it runs.
        routes: of the model's skip connections.

    Raises:
        ModelError: no module in it, or something that is none.
    """

    def __init__(
        self,
        number: int,
        module: StageModule,
        first_unit: int,
        device: torch.device,
        routes: Routes = NO_ROUTES,
    ) -> None:
        modules = modules_of(number, module)
        self.number = number
        self.units, self._sequences = units_of(module), taken_apart(module)
        if not self.units:
            raise ModelError(f"stage {number} is empty: give it at least one module")
        self.first_unit = first_unit
        self._plan: list[tuple[int, nn.Module, frozenset[str]]] = []
        self.routes, self._skips = routes, bool(routes.targets)
        self._takes = [routes.parameters(takes_of(unit)) for unit in self.units]
        self._keywords = [
            keywords_of(unit) - taken.keys()
            for unit, taken in zip(self.units, self._takes)
        ]
        self._gives = list(map(gives_of, self.units)) if routes.targets else []
        self.device = device
        for part in modules:
            part.to(device)
        unique = {id(unit): unit for unit in self.units}.values()
        self.parameters = list(
            {id(p): p for unit in unique for p in unit.parameters()}.values()
        )
        self.modules = list(
            {id(m): m for unit in unique for m in unit.modules()}.values()
        )
        self._deferred = deferred(self.modules)
        self.buffers = Buffers(number, self.modules)
        self.carries = sum(map(takes_carry, self.units))
        self.takes_keywords = frozenset[str]().union(*self._keywords)
        self.needs_keywords = self.takes_keywords.intersection(
            name for unit in self.units for name in keywords_needed(unit)
        )
        self._generators = generators(device)
        self.draws = Draws(number, self._generators)
        self.splitter = Splitter(self.modules)
        self._staying: frozenset[int] | None = None
        self.selection: Selection | None = None

    def recompute_only(self, places: Collection[int]) -> None:
        """Have an R run the units at these places again, and no others."""
        self.selection = Selection(
            self.number, self.units, self.first_unit, self._generators, places
        )

    @property
    def original(self) -> Stage:
        """The stage whose parameters are the user's."""
        return self

    @property
    def staying(self) -> frozenset[int]:
        """Addresses of its parameters and buffers."""
        if self._staying is None:
            buffers = (buffer for _, buffer in self.buffers)
            self._staying = addresses((*self.parameters, *buffers))
        return self._staying

    @property
    def trains(self) -> bool:
        """Whether any parameter wants a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters)

    def begin(self) -> None:
        """Get ready for a step.

        Raises:
            ModelError: its sequence is not what it was.
        """
        self._refuse_others()
        self._staying = None
        for norm in self._deferred:
            norm.forget()
        self.buffers.begin()
        self.draws.begin()
        self.splitter.begin()
        if self.selection is not None:
            self.selection.begin()
        self._plan = [
            (-1 if _draws_nothing(unit) else number, unit, names)
            for number, (unit, names) in enumerate(
                zip(self.units, self._keywords), start=self.first_unit
            )
        ]

    def _refuse_others(self) -> None:
        if not all(is_still(*of) for of in self._sequences):
            raise ModelError(
                f"stage {self.number} has other modules in its sequence than when the "
                "pipeline was made, or has got hooks since that are the sequence's: "
                "make another pipeline"
            )

    def end(self) -> None:
        """A step is over, whether or not it has come to its end."""
        self.buffers.end()

    def complete(self) -> None:
        """A step has come to its end: what waited for the whole batch is done."""
        for norm in self._deferred:
            norm.move()

    def run(
        self,
        value: Value,
        step_seed: int,
        micro_batch: int,
        part: int = 0,
        carry: tuple[Any, ...] | None = None,
        keywords: Mapping[str, Any] = NO_KEYWORDS,
        brought: Mapping[str, Any] = NO_KEYWORDS,
        recording: Recording | None = None,
    ) -> tuple[Value, tuple[Any, ...], dict[int, Values]]:
        """All units in turn.

        Args:
            value: the stage's input.
            step_seed: of all randomness in the step.
            micro_batch: whose input it is.
            part: the slice of it.
            carry: what the slice before left, for each unit that takes one; None
                where micro-batches are whole.
            keywords: keyword inputs of the slice; each unit gets those it takes.
            brought: what came over skip connections.
            recording: where an R will run only some of them again.

        Returns:
            The output; what is carried on to the next slice; and by stage, what goes
            there over a skip connection.
        """
        sources = self._generators
        if carry is None and recording is None and not (keywords or self._skips):
            # Nearly always, and half as long.
            for number, unit, _ in self._plan:
                if number >= 0:
                    seed(sources, key(step_seed, number, micro_batch, part))
                value = unit(value)
            return value, (), {}
        calls = self.units if recording is None else recording.calls
        if self._skips:
            return self._run_with_skips(
                value, step_seed, micro_batch, part, carry, keywords, brought, calls
            )
        carried: list[Any] = []
        given: Mapping[str, Any] = NO_KEYWORDS
        for (number, unit, names), call in zip(self._plan, calls):
            if number >= 0:
                seed(sources, key(step_seed, number, micro_batch, part))
            if keywords:
                given = {name: keywords[name] for name in names & keywords.keys()}
            if carry is not None and takes_carry(unit):
                value, left = carried_on(unit, call, value, carry[len(carried)], given)
                carried.append(left)
            else:
                value = call(value, **given)
        return value, tuple(carried), {}

    def _run_with_skips(
        self,
        value: Value,
        step_seed: int,
        micro_batch: int,
        part: int,
        carry: tuple[Any, ...] | None,
        keywords: Mapping[str, Any],
        brought: Mapping[str, Any],
        calls: Calls,
    ) -> tuple[Value, tuple[Any, ...], dict[int, Values]]:
        """As `run`, where the model has skip connections."""
        here = dict(brought)
        if self._comes_beside:
            value, near = value
            here |= near
        carried: list[Any] = []
        left: dict[int, Values] = {}
        for place, (number, unit, names) in enumerate(self._plan):
            if number >= 0:
                seed(self._generators, key(step_seed, number, micro_batch, part))
            given = {name: keywords[name] for name in names & keywords.keys()}
            given |= {own: here[name] for own, name in self._takes[place].items()}
            call = calls[place]
            if carry is not None and takes_carry(unit):
                value, more = carried_on(unit, call, value, carry[len(carried)], given)
                carried.append(more)
            else:
                value = call(value, **given)
            if self._gives[place]:
                value, made = parted(unit, value, self._gives[place])
                self._distribute(made, self._gives[place], here, left)
        if (beside := left.pop(self.number + 1, None)) is not None:
            value = value, beside
        for values in left.values():
            tensors.check(values, f"stage {self.number}")
        return value, tuple(carried), left

    def _distribute(
        self, made: Values, names: Sequence[str], here: Values, left: dict[int, Values]
    ) -> None:
        """What a unit gives, to units of this stage and to others."""
        for name in names:
            for target in self.routes.targets[name]:
                values = here if target == self.number else left.setdefault(target, {})
                values[name] = handed_over(made[name])

    @property
    def _comes_beside(self) -> bool:
        """Whether skips of the stage before come beside its output."""
        return self.number in self.routes.beside

    def checked(self, value: object) -> Value:
        """A stage's output, if it can cross a boundary.

        Raises:
            ModelError: it cannot.
        """
        if isinstance(value, Tensor):
            return value
        return tensors.check(value, f"stage {self.number}")
