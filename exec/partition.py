"""Layers → stages.

Where to cut is decided in `pipeproof.sched.partition`, from numbers::

    profile = profile_layers(layers, inputs)      # of one micro-batch
    cuts = partition(profile, schedule, memory=16e9)
    stages = split_at(layers, cuts.sizes)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import nn

from pipeproof.exec.errors import ModelError
from pipeproof.sched.errors import at_least_one


def split_at(
    layers: nn.Sequential | Sequence[nn.Module], sizes: Sequence[int]
) -> list[nn.Sequential]:
    """Cut layers into stages of these lengths.

    The stages share the layers' parameters, so that an optimizer of the whole
    model goes on working.

    Args:
        layers: in order.
        sizes: layers in each stage, none of them empty.

    Raises:
        ParameterError: a size below one.
        ModelError: sizes that are not those of as many layers.
    """
    at_least_one(**{f"size of stage {n}": size for n, size in enumerate(sizes)})
    layers = list(layers)
    if sum(sizes) != len(layers):
        raise ModelError(
            f"stages of {', '.join(map(str, sizes))} layers take {sum(sizes)}, found a "
            f"model of {len(layers)}: each layer goes to one stage"
        )
    cuts = np.cumsum([0, *sizes]).tolist()
    return [nn.Sequential(*layers[first:last]) for first, last in pairwise(cuts)]


def split_evenly(
    layers: nn.Sequential | Sequence[nn.Module], stages: int
) -> list[nn.Sequential]:
    """Cut layers into stages of equal length, the longer ones first.

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
    return split_at(layers, [size + (number < longer) for number in range(stages)])
