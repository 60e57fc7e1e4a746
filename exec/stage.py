"""One stage: its units, and their randomness."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeproof.exec import tensors
from pipeproof.exec.batch import NO_KEYWORDS, Value
from pipeproof.exec.batch_norm import deferred
from pipeproof.exec.buffers import Buffers
from pipeproof.exec.errors import ModelError
from pipeproof.exec.rng import generators, key, seed
from pipeproof.exec.selective import Calls, Recording, Selection
from pipeproof.exec.skips import (
    NO_ROUTES,
    Offer,
    Routes,
    Values,
    gives_of,
    handed_over,
    parted,
    said_to_take,
)
from pipeproof.exec.split import Splitter
from pipeproof.exec.stash import addresses

StageModule = nn.Module | list[nn.Module] | tuple[nn.Module, ...]


def units_of(stage: StageModule) -> list[nn.Module]:
    """The smallest pieces that a partition may cut between.

    A sequence of modules and an `nn.Sequential` are taken apart, all the way
    down. A Sequential with a forward or hooks of its own is one unit: only
    calling it whole runs them.
    """
    if isinstance(stage, nn.Module) and not is_plain(stage):
        return [stage]
    return [unit for part in parts_of(stage) for unit in units_of(part)]


def parts_of(stage: StageModule) -> list[nn.Module]:
    """What a stage is a sequence of; of one that is none, itself."""
    if not isinstance(stage, nn.Module):
        return list(stage)
    if not is_plain(stage):
        return [stage]
    # Not children(), which has a module that is called twice once.
    return [part for part in stage._modules.values() if part is not None]


def modules_of(number: int, stage: StageModule | None) -> list[nn.Module]:
    """The modules that a stage was given as.

    Raises:
        ModelError: None, or something that is no module.
    """
    if stage is None:
        raise ModelError(f"stage {number} is None: only other ranks' may be")
    modules = list(stage) if isinstance(stage, (list, tuple)) else [stage]
    for part in modules:
        if not isinstance(part, nn.Module):
            raise ModelError(
                f"stage {number} must be a module or a sequence of modules, found "
                f"{type(part).__name__}"
            )
    return modules


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a sequence of others, and calling it does nothing else."""
    if isinstance(module, nn.ModuleList):
        return True
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def takes_carry(unit: nn.Module) -> bool:
    """Whether a unit needs what the earlier slices of a micro-batch computed.

    One says so with an attribute `takes_carry = True`. Where micro-batches are cut
    into slices it is called with its input and a carry, `()` for the first slice,
    and returns its output and the carry for the next: a tensor, or a tuple of
    tensors, nested if it likes. Where they are whole it is called as any other.
    """
    return bool(getattr(unit, "takes_carry", False))


def check_sliced(units: Sequence[nn.Module]) -> None:
    """Refuse units that would see a slice and take it for the whole sequence.

    Raises:
        ModelError: one that takes a carry inside one that does not, or one that is
            known to mix positions.
    """
    mixing = nn.MultiheadAttention, nn.RNNBase, nn.modules.batchnorm._BatchNorm
    for number, unit in enumerate(units):
        if takes_carry(unit):
            continue
        for part in unit.modules():
            if takes_carry(part):
                raise ModelError(
                    f"unit {number}, {type(unit).__name__}, holds "
                    f"{type(part).__name__}, which takes a carry: a unit that does "
                    "must stand in the stage's sequence itself, or be given its carry "
                    "by one that takes it"
                )
            if isinstance(part, mixing):
                raise ModelError(
                    f"unit {number}, {type(unit).__name__}, has {type(part).__name__}, "
                    "which mixes positions, and a slice holds only some: give it a "
                    "carry (takes_carry = True), or use a schedule without slices"
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


def keywords_of(unit: nn.Module) -> frozenset[str]:
    """The keyword inputs that a unit takes: parameters of its forward, by name.

    Not the first one, which is its input, nor the carry, nor what `**kwargs` would
    take without a name.
    """
    # torch.compile's wrapper takes anything, and hands it on.
    forward = getattr(unit, "_orig_mod", unit).forward
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):  # a forward written in C
        return frozenset()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    positional = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    own = {p.name for p in positional[: 2 if takes_carry(unit) else 1]}
    return frozenset(p.name for p in parameters if p.kind in named) - own


def takes_of(unit: nn.Module) -> dict[str, str]:
    """The skip that each of a unit's keyword parameters takes, if any gives it.

    That of its own name, unless the unit says another in its `takes_skips`, a dict.

    Raises:
        ModelError: it says so of what is no parameter of its forward.
    """
    names, said = sorted(keywords_of(unit)), said_to_take(unit)
    for name in said:
        if name not in names:
            raise ModelError(
                f"{type(unit).__name__} has takes_skips with {name!r}: expected "
                "parameters of its forward behind its first, found "
                f"{', '.join(map(repr, names)) or 'none'}"
            )
    return {name: said.get(name, name) for name in names}


def offers_of(stage: StageModule) -> list[Offer]:
    """Of each unit, the skips that it gives, takes if they are given, and needs.

    Raises:
        ModelError: as `gives_of` and `takes_of`.
    """
    return [
        (gives_of(unit), [*takes_of(unit).values()], [*said_to_take(unit).values()])
        for unit in units_of(stage)
    ]


def carried_on(
    unit: nn.Module,
    call: Callable[..., Any],
    value: Value,
    carry: Any,
    keywords: Mapping[str, Any],
) -> tuple[Value, Any]:
    """A unit on a slice, with the carry that it takes and the one that it leaves.

    Args:
        unit: to be called.
        call: what is called in its place.
        value: its input.
        carry: what it left of the slice before.
        keywords: its keyword inputs.

    Raises:
        ModelError: it returns something else than an output and a carry.
    """
    found = call(value, carry, **keywords)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ModelError(
            f"{type(unit).__name__} takes a carry: called with (input, carry) it must "
            f"return (output, carry), returned {type(found).__name__}"
        )
    output, left = found
    _check_carry(unit, left)
    return output, tensors.aside(left)


def _check_carry(unit: nn.Module, left: Any) -> None:
    if type(left) is tuple:
        for part in left:
            _check_carry(unit, part)
    elif not isinstance(left, Tensor):
        raise ModelError(
            f"{type(unit).__name__} leaves a {type(left).__name__} in its carry: a "
            "carry is a tensor, or a tuple of tensors, nested or not"
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
        self.units = units_of(module)
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
        self._generators = generators(device)
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
        """Get ready for a step."""
        self._staying = None
        for norm in self._deferred:
            norm.forget()
        self.buffers.begin()
        if self.selection is not None:
            self.selection.begin()
        self._plan = [
            (-1 if _draws_nothing(unit) else number, unit, names)
            for number, (unit, names) in enumerate(
                zip(self.units, self._keywords), start=self.first_unit
            )
        ]

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
