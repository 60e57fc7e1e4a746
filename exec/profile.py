"""What a schedule's stages take: traces of steps with each kind of op, and bytes.

The stages run `variants` of the schedule, in turn and on the same batch;
`pipeproof.sim.profile` makes costs of the traces.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pipeproof.exec import tensors
from pipeproof.exec.bandwidth import Rates
from pipeproof.exec.batch import LossFn, LossScale, Value, split
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders, torch_devices
from pipeproof.exec.losses import Loss
from pipeproof.exec.measure import ActivationMeter
from pipeproof.exec.pipeline import Pipeline
from pipeproof.exec.skips import Routes, Values, gives_of, handed_over, parted
from pipeproof.exec.split import Splitter
from pipeproof.exec.units import StageModule, takes_carry, takes_of, units_of
from pipeproof.exec.updating import Optimizers, check_optimizers
from pipeproof.exec.variants import variants
from pipeproof.sched import Kind, ParameterError, Schedule, Trace

WARM_UP = 2
"""Steps of each variant before those that count."""


@dataclass(frozen=True)
class StageBytes:
    """What one micro-batch, the first, leaves of a stage.

    Of a micro-batch in slices, what its first slice leaves, times the slices.

    Attributes:
        activations: all that F keeps, the stage's input included, and what skip
            connections bring.
        left: of it, beside these, what I leaves for W.
        input, output: the boundary tensors; no input of the first stage's.
        returned: what of the output is among the activations.
        weights, gradients: held all the time.
        skips: stages further on, with what goes there over a skip connection.
    """

    activations: int
    left: int
    input: int
    output: int
    returned: int
    weights: int
    gradients: int
    skips: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Profile:
    """Measurements of one schedule's stages.

    Attributes:
        traces: of steps of the variants.
        stages: bytes.
        outside_s: of a step, what its instructions do not account for: the ranks'
            agreement, the cutting of the batch; median seconds.
        link_rates: bytes per second from device to device, between ranks.
    """

    traces: tuple[Trace, ...]
    stages: tuple[StageBytes, ...]
    outside_s: float
    link_rates: Rates


def profile(
    stages: Sequence[StageModule | None] | nn.Sequential,
    schedule: Schedule,
    loss_fn: LossFn | None,
    inputs: Value,
    targets: Value | None,
    *,
    devices: str | torch.device | Sequence[str | torch.device] = "cpu",
    loss_scale: LossScale = "rows",
    ranks: Ranks | None = None,
    rounds: int = 5,
    optimizers: Optimizers | None = None,
) -> Profile:
    """Measure what a schedule's stages take; all ranks call it, and get the same.

    Gradients, weights and what optimizers keep are left as they were; running
    statistics see the batch.

    Args:
        stages: as for `Pipeline`, as are the others.
        schedule: likewise.
        loss_fn: likewise.
        inputs: a batch, on all ranks.
        targets: likewise.
        devices: likewise.
        loss_scale: likewise.
        ranks: likewise.
        rounds: measured steps of each variant.
        optimizers: as for `Pipeline`, to measure the schedule's STEPs too; without,
            they are left out.

    Raises:
        ParameterError: fewer than one round, optimizers for a schedule without STEPs,
            or as `variants`.
    """
    if rounds < 1:
        raise ParameterError(f"rounds must be at least 1, got {rounds}")
    steps = optimizers is not None
    if steps:
        check_optimizers(optimizers, schedule)
    pipelines = [
        Pipeline(
            stages,
            variant,
            loss_fn,
            devices,
            loss_scale=loss_scale,
            ranks=ranks or False,
            optimizers=optimizers if variant.has(Kind.STEP) else None,
        )
        for variant in variants(schedule, steps=steps).values()
    ]
    mine = [
        number
        for number in range(schedule.stages)
        if ranks is None or ranks.rank in holders(schedule, number)
    ]
    parameters = [
        p
        for n in mine
        for unit in units_of(_there(stages[n]))
        for p in unit.parameters()
    ]
    seen, routes = {n: _Seen() for n in mine}, pipelines[0].routes
    hooks = [hook for n in mine for hook in seen[n].hooks(_there(stages[n]), n, routes)]
    labels = None
    if targets is not None:
        parts = schedule.micro_batches, schedule.slices
        named = [devices] if isinstance(devices, (str, torch.device)) else devices
        home = holders(schedule, schedule.stages - 1)[0]
        device = torch_devices(named, schedule)[home]
        labels = tensors.placed(split("targets", targets, *parts)[0][0], device)
    traces, outside = [], []
    own = [optimizers[n] for n in mine] if optimizers is not None else []
    with ExitStack() as hooked, _as_they_were(parameters, own):
        for hook in hooks:
            hooked.callback(hook.remove)
        pipelines[0].step(inputs, targets)
        hooked.close()
        for round_ in range(-WARM_UP, rounds):
            for pipeline in pipelines:
                began = perf_counter()
                pipeline.step(inputs, targets)
                took = perf_counter() - began
                pipeline.step(inputs, targets, record=True)
                if round_ >= 0:
                    traces.append(pipeline.trace)
                    outside.append(took - pipeline.instructions_s)
        found = {
            n: _Weighed(_there(stages[n]), n, seen[n], schedule, routes).bytes(
                Loss.of(loss_fn).call, labels
            )
            for n in mine
        }
        rates = pipelines[0].link_rates()
    return _agreed(ranks, schedule, traces, found, median(outside), rates)


@contextmanager
def _as_they_were(
    parameters: Sequence[nn.Parameter], optimizers: Iterable[Optimizer | None]
) -> Iterator[None]:
    """Without gradients meanwhile; what steps change is put back in the end.

    Args:
        parameters: each with its gradient.
        optimizers: that step, with their state and these parameters' values.
    """
    stepping = [optimizer for optimizer in optimizers if optimizer is not None]
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in stepping]
    values = [p.detach().clone() for p in parameters] if stepping else []
    grads = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, grads):
            parameter.grad = grad
        with torch.no_grad():
            for parameter, value in zip(parameters, values):
                parameter.copy_(value)
        for optimizer, state in zip(stepping, states):
            optimizer.load_state_dict(state)


def _agreed(
    ranks: Ranks | None,
    schedule: Schedule,
    traces: list[Trace],
    found: dict[int, list[Any]],
    outside_s: float,
    rates: Rates,
) -> Profile:
    if ranks is not None:
        ours = [list(found.items()), outside_s]
        said = ranks.exchange(ours, "the other ranks' bytes")
        found = {number: sizes for of_rank, _ in said for number, sizes in of_rank}
        outside_s = max(seconds for _, seconds in said)
    for sizes in found.values():
        sizes[-1] = tuple(map(tuple, sizes[-1]))  # JSON has lists
    of_stages = tuple(StageBytes(*found[n]) for n in range(schedule.stages))
    return Profile(tuple(traces), of_stages, outside_s, rates)


def _there(stage: StageModule | None) -> StageModule:
    assert stage is not None
    return stage


class _Seen:
    """What a stage was first called with.

    Attributes:
        value: its input.
        brought: by name, what skip connections brought.
    """

    def __init__(self) -> None:
        self.value: Value = None
        self.brought: Values = {}

    def hooks(
        self, stage: StageModule, number: int, routes: Routes
    ) -> Iterator[RemovableHandle]:
        """On its units, so that they tell."""
        for place, unit in enumerate(units_of(stage)):
            taken = {
                own: name
                for own, name in routes.parameters(takes_of(unit)).items()
                if routes.sources[name] < number
            }
            see = self._seeing(taken, first=place == 0)
            yield unit.register_forward_pre_hook(see, with_kwargs=True)

    def _seeing(self, taken: dict[str, str], *, first: bool) -> Any:
        def see(_: nn.Module, arguments: tuple[Any, ...], keywords: Values) -> None:
            if first and self.value is None:
                self.value = arguments[0]
            for own, name in taken.items():
                self.brought.setdefault(name, keywords[own])

        return see


class _Weighed:
    """A stage that is run by itself on one micro-batch.

    Args:
        stage: as given.
        number: of it.
        seen: what it is called with.
        schedule: which it is a stage of.
        routes: of skip connections.
    """

    def __init__(
        self,
        stage: StageModule,
        number: int,
        seen: _Seen,
        schedule: Schedule,
        routes: Routes,
    ) -> None:
        self._stage, self._number, self._routes = stage, number, routes
        self._value, self._schedule = tensors.mapped(_leaf, seen.value), schedule
        self._brought = tensors.mapped(_leaf, seen.brought)

    def bytes(
        self, loss_fn: Callable[[Any, Any], Any], targets: Value | None
    ) -> list[Any]:
        """As in `StageBytes`."""
        units, number = units_of(self._stage), self._number
        leaves = _tensors((self._value, self._brought))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        meter = ActivationMeter([self._stage])
        meter.ignore(*leaves, *_tensors(targets))
        gpus = sorted({leaf.device.index for leaf in leaves if leaf.is_cuda})
        with torch.random.fork_rng(devices=gpus), torch.enable_grad(), meter:
            output, gone = self._run(units)
            last = number == self._schedule.stages - 1
            near = _tensors(gone.pop(number + 1, []))
            roots = [loss_fn(output, targets)] if last else _tensors(output) + near
            handed_on = 0 if last else _bytes(roots)
            handed = [] if last else [weakref.ref(x.untyped_storage()) for x in roots]
            over = [(to, _bytes(_tensors(values))) for to, values in gone.items()]
            roots += _tensors(gone)
            roots = [root for root in roots if root.requires_grad]
            ones = [torch.ones_like(root) for root in roots]
            # What is handed on is no longer the stage's; its place in the graph is.
            edges: list[Any] = [get_gradient_edge(root) for root in roots]
            del output, gone, near, roots
            kept = meter.live
            returned = _alive(handed)
            _, rest = Splitter(units).input_grads(edges, ones, wanted)
            del edges
            left = meter.live
            del rest
        parameters = {id(p): p for unit in units for p in unit.parameters()}.values()
        trained = [p for p in parameters if p.requires_grad]
        beside = [n for n in self._brought if self._routes.sources[n] == number - 1]
        came = [self._brought[name] for name in beside]
        # The first stage's input is a view of the batch.
        of_input = _bytes(_tensors((self._value, came))) if number else 0
        arrived = _bytes(leaves) if number else 0
        slices = self._schedule.slices
        return [
            slices * (kept + arrived),
            slices * left,
            slices * of_input,
            slices * handed_on,
            slices * min(handed_on, returned),
            _bytes(parameters),
            _bytes(trained),
            [(to, slices * size) for to, size in sorted(over)],
        ]

    def _run(self, units: Sequence[nn.Module]) -> tuple[Value, dict[int, list[Value]]]:
        """Its output, and what it gives to other stages."""
        output, here = self._value, dict(self._brought)
        gone: dict[int, list[Value]] = {}
        for unit in units:
            takes = self._routes.parameters(takes_of(unit))
            given = {own: here[name] for own, name in takes.items()}
            if self._schedule.slices > 1 and takes_carry(unit):
                output, _ = unit(output, (), **given)
            else:
                output = unit(output, **given)
            if not (names := gives_of(unit)):
                continue
            output, made = parted(unit, output, names)
            for name in names:
                for target in self._routes.targets[name]:
                    value = handed_over(made[name])
                    if target == self._number:
                        here[name] = value
                    else:
                        gone.setdefault(target, []).append(value)
        return output, gone


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tensors.flat(value) if isinstance(leaf, Tensor)]


def _leaf(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _alive(storages: Iterable[weakref.ref[Any]]) -> int:
    """Bytes of those that still are."""
    found = {id(of): of for storage in storages if (of := storage()) is not None}
    return sum(of.nbytes() for of in found.values())


def _bytes(found: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in found)
