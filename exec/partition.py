"""Layers → stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeproof.exec.errors import ModelError
from pipeproof.sched.errors import at_least_one


def split_evenly(
    layers: nn.Sequential | Sequence[nn.Module], stages: int
) -> list[nn.Sequential]:
    """Cut layers into stages of equal length, the longer ones first.

    The stages share the layers' parameters, so that an optimizer of the whole
    model goes on working.

    Args:
        layers: in order.
        stages: how many, none of them empty.

    Raises:
        ParameterError: fewer than one stage.
        ModelError: fewer layers than stages.
    """
    at_least_one(stages=stages)
    layers = list(layers)
    if len(layers) < stages:
        raise ModelError(
            f"a model of {len(layers)} layers cannot fill {stages} stages: use fewer "
            "stages, or cut the model into smaller layers"
        )
    size, longer = divmod(len(layers), stages)
    result, first = [], 0
    for number in range(stages):
        last = first + size + (number < longer)
        result.append(nn.Sequential(*layers[first:last]))
        first = last
    return result
