"""Layers → stages: what each layer takes, and the cuts.

Where to cut is decided in `pipeproof.sched.partition`, from numbers::

    profile = profile_layers(layers, inputs)      # of one micro-batch
    cuts = partition(profile, schedule, memory=16e9)
    stages = split_at(layers, cuts.sizes)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pipeproof.exec import tensors
from pipeproof.exec.errors import ModelError
from pipeproof.exec.skips import gives_of, parted
from pipeproof.exec.stage import takes_of
from pipeproof.sched import Layer, ParameterError
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


def profile_layers(
    layers: nn.Sequential | Sequence[nn.Module],
    inputs: Any,
    *,
    repeats: int = 5,
    optimizer: float = 0.0,
) -> list[Layer]:
    """Run each layer forward and backward where it is, and measure.

    Leaves gradients, buffers and torch's generators as they were.

    Args:
        layers: in order, on the device that is to be measured.
        inputs: of the first, on that device; one micro-batch.
        repeats: runs of each layer, of which the fastest counts, after one that does
            not count.
        optimizer: bytes of the optimizer's state for each byte of a parameter that
            learns: 2 for Adam.

    Returns:
        Of each layer its times in seconds and its bytes. `weights` are those of
        parameters, gradients and the optimizer's state; a parameter of several
        layers counts in each. A layer that returns a view of its input counts as
        keeping it. What skips weigh on their way counts nowhere.

    Raises:
        ParameterError: no run is to count.
        ModelError: a layer returns what cannot cross to the next stage.
    """
    at_least_one(repeats=repeats)
    if optimizer < 0:
        raise ParameterError(f"optimizer must be at least 0, got {optimizer}")
    result: list[Layer] = []
    kept: set[int] = set()
    value, named = tensors.handed_on(inputs), dict[str, Any]()
    for number, layer in enumerate(layers):
        takes = takes_of(layer).items()
        given = {own: named[name] for own, name in takes if name in named}
        with torch.enable_grad(), _left_alone(layer, value):
            saved, output = _saved(layer, value, given)
            times = [_timed(layer, value, given) for _ in range(1 + repeats)][1:]
        if names := gives_of(layer):
            output, made = parted(layer, output, names)
            named |= tensors.handed_on(made)
        tensors.check(output, f"layer {number}")
        entry = {_address(t): t.untyped_storage().nbytes() for t in _tensors(value)}
        # Whoever keeps a view of its input keeps that.
        passed = {_address(t) for t in _tensors(output)} & entry.keys()
        saved |= {at: entry[at] for at in passed}
        new = {at: size for at, size in saved.items() if at not in entry.keys() & kept}
        weights = sum(
            p.nbytes * (2 + optimizer if p.requires_grad else 1)
            for p in layer.parameters()
        )
        result.append(
            Layer(
                forward=min(forward for forward, _ in times),
                backward=min(backward for _, backward in times),
                weights=weights + sum(b.nbytes for b in layer.buffers()),
                activations=sum(new.values()),
                input=sum(entry.values()),
                keeps_input=entry.keys() <= new.keys(),
            )
        )
        value, kept = tensors.handed_on(output), set(saved)
    return result


def _saved(
    layer: nn.Module, value: Any, given: dict[str, Any]
) -> tuple[dict[int, int], Any]:
    """The memory that a layer keeps for its backward, and its output."""
    own = {_address(t) for t in (*layer.parameters(), *layer.buffers())}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() and _address(tensor) not in own:
            found[_address(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no other takes its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        return found, layer(value, **given)


def _timed(layer: nn.Module, value: Any, given: dict[str, Any]) -> tuple[float, float]:
    """Seconds of one forward and of one backward."""
    start = perf_counter()
    output = layer(value, **given)
    _wait_for(output)
    middle = perf_counter()
    roots = [t for t in _tensors(output) if t.requires_grad]
    leaves = (*_tensors((value, given)), *layer.parameters())
    ends = [t for t in leaves if t.requires_grad]
    gradients = [torch.ones_like(root) for root in roots]
    _wait_for(gradients)
    begun = perf_counter()
    if roots and ends:
        torch.autograd.grad(roots, ends, gradients, allow_unused=True)
        _wait_for(output)
    return middle - start, perf_counter() - begun


def _wait_for(value: Any) -> None:
    """For all that its devices have been given to do."""
    for device in {tensor.device for tensor in _tensors(value) if tensor.is_cuda}:
        torch.cuda.synchronize(device)


@contextmanager
def _left_alone(layer: nn.Module, value: Any) -> Iterator[None]:
    """Buffers and generators afterwards are as before."""
    used = (*layer.parameters(), *_tensors(value))
    devices = sorted({t.device.index for t in used if t.is_cuda})
    buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    with torch.random.fork_rng(devices=devices):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tensors.flat(value) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
