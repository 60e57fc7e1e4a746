"""A profile of layers → what the stages of a schedule cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipeproof.sched import Layer
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.layers import stages_of
from pipeproof.sched.stage_bytes import stage_bytes
from pipeproof.sim.cost import Cost


def cost_of_layers(
    layers: Sequence[Layer],
    sizes: Sequence[int],
    recomputed: Sequence[Collection[int]] | None = None,
) -> Cost:
    """Times and bytes of each stage, in the layers' units.

    I and W are taken to be as long as each other. The input of the first stage is a
    view of the batch, and weighs nothing.

    Args:
        layers: as `profile_layers` measures them.
        sizes: layers in each stage.
        recomputed: of each stage, the places of the layers that an R runs again, as
            `fit_selective` chooses them; default all.

    Raises:
        ParameterError: sizes that are not those of the layers, or recomputed layers of
            another number of stages.
    """
    if sum(sizes) != len(layers) or min(sizes, default=0) < 1:
        raise ParameterError(
            f"sizes must be numbers of at least 1 that sum to {len(layers)} layers, "
            f"got {list(sizes)}"
        )
    again = [range(size) for size in sizes] if recomputed is None else list(recomputed)
    if len(again) != len(sizes):
        raise ParameterError(
            f"recomputed must have the layers of each of {len(sizes)} stages, got "
            f"{len(again)}"
        )
    stages = list(stages_of(layers, sizes))
    found, over = stage_bytes(layers, sizes, again)
    came = [sum(x for (_, to), x in over.items() if to == n) for n in range(len(sizes))]
    backward = [_time(of, "backward") for of in stages]
    return Cost(
        forward=[_time(of, "forward") for of in stages],
        input_grad=[time / 2 for time in backward],
        weight_grad=[time / 2 for time in backward],
        recompute=[_again(*of) for of in zip(stages, again)],
        weight_grad_memory=[of.left_part for of in found],
        weight_bytes=[sum(layer.weights for layer in of) for of in stages],
        activation_bytes=[of.kept + of.input + x for of, x in zip(found, came)],
        stored_bytes=[of.stored + x for of, x in zip(found, came)],
        rebuilt_bytes=[of.again for of in found],
        input_bytes=[of.input for of in found],
        boundary_bytes=[of.output for of in found],
        skip_bytes=[over[pair] for pair in sorted(over)] or None,
    )


def _time(stage: Sequence[Layer], name: str) -> float:
    loss = stage[-1].loss
    own: float = sum(getattr(layer, name) for layer in stage)
    return own + (getattr(loss, name) if loss is not None else 0)


def _again(stage: Sequence[Layer], places: Collection[int]) -> float:
    if len(set(places)) == len(stage):
        return _time(stage, "forward")
    return sum(stage[place].forward for place in places)
