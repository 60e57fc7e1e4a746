"""What each layer of a model takes: seconds, bytes, and which memory it shares.

What a layer saved for its backward is found by hooks on saved tensors; what of that I
leaves for W, by running I and looking which storages are still alive. Memory gets a
number where it crosses from one layer to the next, so that a tensor that both keep
counts once in a stage that has both.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from pipeproof.exec import tensors
from pipeproof.exec.batch import LossFn
from pipeproof.exec.graph import Graph, node_of
from pipeproof.exec.losses import Loss
from pipeproof.exec.measure import saved_by
from pipeproof.exec.skips import gives_of, parted
from pipeproof.exec.split import Root, Splitter
from pipeproof.exec.split_plan import LET_GO_FROM
from pipeproof.exec.units import takes_of
from pipeproof.sched import Layer, Memory, ParameterError
from pipeproof.sched.errors import at_least_one

Sizes = dict[int, int]
"""Bytes of storages, by address."""


def profile_layers(
    layers: nn.Sequential | Sequence[nn.Module],
    inputs: Any,
    *,
    loss_fn: LossFn | None = None,
    targets: Any = None,
    repeats: int = 5,
    optimizer: float = 0.0,
) -> list[Layer]:
    """Run each layer forward and backward where it is, and measure.

    Leaves gradients, buffers and torch's generators as they were.

    Args:
        layers: in order, on the device that is to be measured.
        inputs: of the first, on that device; one micro-batch.
        loss_fn: as for `Pipeline`; it counts as part of the last layer's stage.
        targets: of the micro-batch, for the loss.
        repeats: runs of each layer, of which the fastest counts, after one that does
            not count.
        optimizer: bytes of the optimizer's state for each byte of a parameter that
            learns: 2 for Adam.

    Returns:
        Of each layer its times in seconds and its bytes. `weights` are those of
        parameters, gradients and the optimizer's state; a parameter of several
        layers counts in each. In `activations` a layer that returns a view of its
        input counts as keeping it.

    Raises:
        ParameterError: no run is to count.
        ModelError: a layer returns what cannot cross to the next stage.
    """
    at_least_one(repeats=repeats)
    if optimizer < 0:
        raise ParameterError(f"optimizer must be at least 0, got {optimizer}")
    profiler = _Profiler(repeats, optimizer)
    value = tensors.handed_on(inputs)
    result: list[Layer] = []
    for number, layer in enumerate(layers):
        one, value = profiler.layer(number, layer, value)
        result.append(one)
    if loss_fn is not None and result:
        loss, _ = profiler.layer(len(result), _Loss(loss_fn, targets), value)
        result[-1] = replace(result[-1], loss=loss)
    return result


class _Loss(nn.Module):
    """As a layer."""

    def __init__(self, loss_fn: LossFn, targets: Any) -> None:
        super().__init__()
        self._loss, self._targets = Loss.of(loss_fn), targets

    def forward(self, output: Any) -> Any:
        """→ scalar."""
        return self._loss.call(output, self._targets)


class _Profiler:
    """Goes from layer to layer.

    Args:
        repeats: as for `profile_layers`.
        optimizer: likewise.
    """

    def __init__(self, repeats: int, optimizer: float) -> None:
        self._repeats, self._optimizer = repeats, optimizer
        self._named: dict[str, tuple[int, Any]] = {}
        self._kept: set[int] = set()
        self._fresh = count(1)
        self._numbers: dict[int, int] = {}
        """Of memory that crosses from layer to layer, by address."""

    def layer(self, number: int, layer: nn.Module, value: Any) -> tuple[Layer, Any]:
        """One, and what it hands to the next."""
        takes = [(own, n) for own, n in takes_of(layer).items() if n in self._named]
        given = {own: self._named[name][1] for own, name in takes}
        with torch.enable_grad(), _left_alone(layer, value):
            saved, output = _saved(layer, value, given)
            times = [_timed(layer, value, given) for _ in range(1 + self._repeats)][1:]
            left = _left_for_w(layer, value, given)
        made: dict[str, Any] = {}
        if names := gives_of(layer):
            output, made = parted(layer, output, names)
        tensors.check(output, f"layer {number}")
        entry = _sizes(value)
        memory = self._memory(value, given, (output, made), saved, left)
        beside = [(self._named[name][0], self._named[name][1]) for _, name in takes]
        # Whoever keeps a view of its input keeps that.
        saved = saved | {at: entry[at] for at in _sizes(output).keys() & entry.keys()}
        new = {
            at: size
            for at, size in saved.items()
            if at not in entry.keys() & self._kept
        }
        found = Layer(
            forward=min(forward for forward, _ in times),
            backward=min(backward for _, backward in times),
            weights=self._weights(layer),
            activations=sum(new.values()),
            input=sum(entry.values()),
            keeps_input=entry.keys() <= new.keys(),
            output=sum(_sizes(output).values()),
            takes=tuple((at, sum(_sizes(what).values())) for at, what in beside),
            memory=memory,
        )
        self._named |= {
            name: (number, tensors.handed_on(what)) for name, what in made.items()
        }
        self._kept = set(saved)
        return found, tensors.handed_on(output)

    def _weights(self, layer: nn.Module) -> float:
        of_parameters = sum(
            p.nbytes * (2 + self._optimizer if p.requires_grad else 1)
            for p in layer.parameters()
        )
        return of_parameters + sum(b.nbytes for b in layer.buffers())

    def _memory(
        self,
        value: Any,
        given: dict[str, Any],
        output: Any,
        saved: Sizes,
        left: tuple[int, set[int], set[int]],
    ) -> Memory:
        """By number; what does not leave the layer has one number together."""
        came, gone = _sizes((value, given)), _sizes(output)
        numbers = self._numbers
        for at in (*came, *gone):
            if at not in numbers:
                numbers[at] = next(self._fresh)
        crossing = came | gone
        inside = sum(size for at, size in saved.items() if at not in crossing)
        inner = next(self._fresh)
        kept = [(numbers[at], size) for at, size in saved.items() if at in crossing]
        left_inside, left_in, left_out = left
        places = list(_sizes((value, given)).items()), list(gone.items())
        remaining = dict[int, int]()
        for pieces, there in zip(places, (left_in, left_out)):
            remaining |= {
                numbers[at]: size
                for place, (at, size) in enumerate(pieces)
                if place in there and at in saved
            }
        found = Memory(
            input=tuple((numbers[at], size) for at, size in _sizes(value).items()),
            kept=((inner, inside), *kept),
            left=((inner, min(left_inside, inside)), *remaining.items()),
            beside=tuple(
                tuple((numbers[at], size) for at, size in _sizes(what).items())
                for what in given.values()
            ),
        )
        # Other memory may come to lie where that of this layer was.
        alive = _sizes([what for _, what in self._named.values()]).keys()
        self._numbers = {at: numbers[at] for at in (*gone, *alive)}
        return found


def _saved(layer: nn.Module, value: Any, given: dict[str, Any]) -> tuple[Sizes, Any]:
    """The memory that a layer keeps for its backward, and its output."""
    own = _own(layer)
    found: Sizes = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() and _address(tensor) not in own:
            found[_address(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no other takes its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        return found, layer(value, **given)


def _left_for_w(
    layer: nn.Module, value: Any, given: dict[str, Any]
) -> tuple[int, set[int], set[int]]:
    """What is alive after I: bytes within, and which of the inputs and outputs.

    These by their place among the different memory of each.
    """
    leaves = tensors.handed_on((value, given))
    # Not the leaves themselves, which are alive in any case.
    copies = tensors.mapped(_copy, leaves)
    output = layer(copies[0], **copies[1])
    roots = [t for t in _tensors(output) if t.requires_grad]
    if not roots:
        return 0, set(), set()
    watched = _watched(roots, _own(layer))
    came, gone = list(_sizes(copies)), list(_sizes(output))
    ones = [torch.ones_like(root) for root in roots]
    edges: list[Root] = [get_gradient_edge(root) for root in roots]
    wanted = tensors.learning(leaves)
    del copies, output, roots
    _, rest = Splitter(list(layer.modules())).input_grads(edges, ones, wanted)
    del edges
    # What is small I lets go of only with its node, which others in a stage may hold.
    alive = {
        at: size
        for at, (of, size) in watched.items()
        if of() is not None or size < LET_GO_FROM
    }
    del rest
    inside = sum(s for at, s in alive.items() if at not in came and at not in gone)
    return (
        inside,
        {place for place, at in enumerate(came) if at in alive},
        {place for place, at in enumerate(gone) if at in alive},
    )


def _watched(
    roots: Sequence[Tensor], own: set[int]
) -> dict[int, tuple[weakref.ref[Any], int]]:
    """The storages that a graph saved, by address, with their bytes."""
    found = {}
    for node in Graph([node_of(root) for root in roots]).order:
        for tensor in saved_by(node):
            if _address(tensor) not in own:
                storage = tensor.untyped_storage()
                found[_address(tensor)] = weakref.ref(storage), storage.nbytes()
    return found


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


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


def _sizes(value: Any) -> Sizes:
    """Of the different memory of its tensors."""
    return {_address(t): t.untyped_storage().nbytes() for t in _tensors(value)}


def _own(layer: nn.Module) -> set[int]:
    return {_address(t) for t in (*layer.parameters(), *layer.buffers())}


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
