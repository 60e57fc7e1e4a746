"""What each stage of a schedule has of a transformer, and so its Cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.exact import Number, is_number, plain
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sim.cost import Cost
from pipeproof.sim.transformer import PRECISIONS, Transformer


class _Work(NamedTuple):
    """FLOPs of a stage's ops, of the t devices together."""

    forward: int
    input_grad: int
    weight_grad: int
    recompute: int


class _Kept(NamedTuple):
    """What a stage keeps of a micro-batch on one device, as in `Cost`."""

    activations: Number
    stored: Number
    rebuilt: Number
    weight_grad_memory: Number


def even(layers: int, stages: int) -> list[int]:
    """Layers of each stage: the first ones take one more where they do not divide.

    Raises:
        ParameterError: fewer layers than stages.
    """
    if stages > layers:
        raise ParameterError(
            f"{layers} layers do not fill {stages} stages: take fewer "
            "devices or chunks, or a deeper model"
        )
    least, more = divmod(layers, stages)
    return [least + (stage < more) for stage in range(stages)]


def cost_of(
    model: Transformer,
    schedule: Schedule,
    flops_per_s: Number | None,
    efficiency: Number,
    split: Sequence[int] | None,
) -> Cost:
    """See `Transformer.cost`."""
    shares = _Shares(model, tuple(_checked(model, split, schedule)))
    _agree(model, schedule, shares.split)
    rate = _rate(flops_per_s, efficiency)
    last = schedule.stages - 1
    copy = any(pipe[0] != pipe[last] for pipe in schedule.placement.pipes)
    stages = range(schedule.stages)
    work = [shares.work(stage) for stage in stages]
    kept = [shares.kept(stage) for stage in stages]
    held = [shares.parameters(stage, copy=copy) for stage in stages]
    size = PRECISIONS[model.precision]
    full = model.recompute == "full"

    def times(flops: Iterable[int]) -> list[Number]:
        t = model.tensor_parallel
        return [plain(Fraction(number, t) / rate) for number in flops]

    return Cost(
        forward=times(row.forward for row in work),
        input_grad=times(row.input_grad for row in work),
        weight_grad=times(row.weight_grad for row in work),
        recompute=times(row.recompute for row in work) if full else None,
        weight_grad_memory=[row.weight_grad_memory for row in kept],
        weight_bytes=[plain(n * size.weight) for n in held],
        gradient_bytes=[plain(n * size.gradient) for n in held],
        optimizer_bytes=[plain(n * size.optimizer) for n in held],
        activation_bytes=[row.activations for row in kept],
        boundary_bytes=[model.boundary_bytes] * last + [0],
        stored_bytes=[row.stored for row in kept] if full else None,
        rebuilt_bytes=[row.rebuilt for row in kept] if full else None,
        workspace_bytes=model.core_bytes if model.recompute == "selective" else None,
    )


@dataclass(frozen=True, slots=True)
class _Shares:
    """A model cut into stages.

    Attributes:
        model: which.
        split: layers of each stage.
    """

    model: Transformer
    split: tuple[int, ...]

    def parameters(self, stage: int, *, copy: bool) -> Number:
        """On one device; with a copy of the tied embedding in the last stage."""
        model = self.model
        words = model.vocabulary * model.hidden // model.tensor_parallel
        result: Any = self.split[stage] * model.layer_parameters
        if stage == 0:
            result += words + model.sequence * model.hidden
        if stage == len(self.split) - 1:
            result += 2 * model.hidden + (words if copy or not model.tied else 0)
        return plain(result)

    def work(self, stage: int) -> _Work:
        """Of each of its ops."""
        model = self.model
        linear = self.split[stage] * model.linear_flops
        attention = self.split[stage] * model.attention_flops
        again = attention if model.recompute == "selective" else 0
        head = model.head_flops if stage == len(self.split) - 1 else 0
        return _Work(
            forward=linear + attention + head,
            input_grad=linear + 2 * attention + again + head,
            weight_grad=linear + head,
            recompute=linear + attention,
        )

    def kept(self, stage: int) -> _Kept:
        """Of one micro-batch."""
        model = self.model
        layers, one_input = self.split[stage], model.boundary_bytes
        together = min(layers, model.recompute_layers)
        beside: Any = model.embedding_bytes if stage == 0 else 0
        head: Any = model.head_bytes if stage == len(self.split) - 1 else 0
        core = model.recompute != "selective"
        activations = layers * model.whole_layer_bytes(core=core) + beside + head
        rebuilt = together * model.whole_layer_bytes(core=True) - one_input
        # Until W is done a stage's input stays, though W has no use for it: it
        # takes the place of so much of what W needs. The head's W needs the output
        # layer's input, and the logits' gradient, which takes the logits' place.
        if model.recompute == "full":
            needed: Any = together * model.weight_grad_bytes - one_input
            part = Fraction(needed) / rebuilt
        else:
            entry = one_input if stage else 0
            needed = layers * model.weight_grad_bytes - entry
            needed += head - one_input if head else 0
            part = Fraction(needed) / (activations - entry)
        return _Kept(
            activations=plain(activations),
            stored=plain(-(-layers // together) * one_input + beside + head),
            rebuilt=plain(rebuilt),
            weight_grad_memory=plain(part),
        )


def _checked(
    model: Transformer, split: Sequence[int] | None, schedule: Schedule
) -> list[int]:
    if split is None:
        return even(model.layers, schedule.stages)
    given = list(split)
    for number in given:
        at_least_one(split=number)
    if len(given) != schedule.stages or sum(given) != model.layers:
        raise ParameterError(
            f"split must give {schedule.stages} stages {model.layers} layers in "
            f"all, got {len(given)} stages and {sum(given)} layers"
        )
    return given


def _agree(model: Transformer, schedule: Schedule, split: Sequence[int]) -> None:
    """Refuse a schedule whose R contradict what the model rebuilds."""
    kinds = set(schedule.ops.kind.tolist()) & {Kind.R, Kind.W}
    if model.recompute == "full" and Kind.R not in kinds:
        raise ParameterError(
            f"recompute='full' rebuilds layers in ops R, and {schedule.summary} "
            "has none: give it some with recompute(schedule, 'always'), or take "
            "'selective' or 'none'"
        )
    if model.recompute != "full" and Kind.R in kinds:
        raise ParameterError(
            f"{schedule.summary} rebuilds layers in ops R, but the model has "
            f"recompute={model.recompute!r}: take recompute='full', or take the R "
            "out with recompute(schedule, 'never')"
        )
    if len(kinds) == 2 and model.recompute_layers < max(split):
        raise ParameterError(
            f"W needs what R rebuilt of all {max(split)} layers of a stage, but "
            f"recompute_layers={model.recompute_layers} are there at a time: raise "
            "it to that, or take a schedule with whole backwards"
        )


def _rate(flops_per_s: Number | None, efficiency: Number) -> Any:
    for name, number in (("flops_per_s", flops_per_s), ("efficiency", efficiency)):
        if number is None:
            continue
        if not is_number(number) or not 0 < number < float("inf"):
            raise ParameterError(f"{name} must be a number above 0, got {number!r}")
    if efficiency > 1:
        raise ParameterError(
            f"efficiency is the part of flops_per_s that is achieved, at most 1, got "
            f"{efficiency}"
        )
    if flops_per_s is None:
        if efficiency != 1:
            raise ParameterError(
                f"efficiency={efficiency} is a part of flops_per_s: give that too"
            )
        return 1
    return flops_per_s * efficiency
