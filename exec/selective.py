"""Units of a stage that an R runs again, while the others keep their activations.

Where an R runs all of a stage again, its F makes no graph. Where it runs only some
units, F makes the graph of them all; but what autograd saves in these units is let go
of, and in its place stands a slot, which R fills::

    F    unit a ──saves──▶ tensors      unit b ──saves──▶ empty slots
    R                                   unit b again ───▶ the slots are filled
    B    one graph, as if all had been kept

So B, or I and W, do what they would do without an R: gradients are added up in the
same order, and a unit runs again once for each micro-batch, however often its slots
are read. Of units one behind the other only the first one's input is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pipeproof.exec import tensors
from pipeproof.exec.buffers import Buffers
from pipeproof.exec.errors import ModelError
from pipeproof.exec.rng import key, seed
from pipeproof.exec.skips import gives_of, parted
from pipeproof.exec.slot import Slot

Calls = Sequence[Callable[..., Any]]
"""Of each unit of a stage, what is called in its place."""


class Selection:
    """The units of a stage that an R runs again.

    Args:
        number: of the stage.
        units: all of it.
        first_unit: number of its first unit in the whole model.
        generators: that its units draw from.
        places: of the chosen units.
    """

    def __init__(
        self,
        number: int,
        units: Sequence[nn.Module],
        first_unit: int,
        generators: Sequence[torch.Generator],
        places: Collection[int],
    ) -> None:
        self.number, self.units = number, units
        self.first_unit, self.generators = first_unit, generators
        self.buffers = {
            place: Buffers(number, list(units[place].modules()))
            for place in sorted(places)
        }

    def begin(self) -> None:
        """Get ready for a step."""
        for buffers in self.buffers.values():
            buffers.begin()

    def recording(self, of: Hashable) -> Recording:
        """For one forward; `of` says which."""
        return Recording(self, of)


@dataclass(slots=True)
class _Call:
    """How a unit was called.

    Attributes:
        place: of the unit.
        inputs: its input, None where the unit before runs again too; its carry, if it
            takes one; its keyword inputs.
        versions: of these.
        slots: for what it saves.
    """

    place: int
    inputs: tuple[Any, tuple[Any, ...], dict[str, Any]]
    versions: Any
    slots: list[Slot] = field(default_factory=list)


class Recording:
    """What is kept of one forward, to run the chosen units again.

    Attributes:
        calls: what the forward calls in the place of each unit.
    """

    def __init__(self, selection: Selection, of: Hashable) -> None:
        self._of, self._selection = of, selection
        self._calls: list[_Call] = []
        self._roots: Any = None
        self.calls: Calls = [
            partial(self._call, place) if place in selection.buffers else unit
            for place, unit in enumerate(selection.units)
        ]

    def _call(self, place: int, value: Any, *carry: Any, **given: Any) -> Any:
        of = self._selection
        follows = place - 1 in of.buffers
        inputs = None if follows else value, carry, given
        call = _Call(place, inputs, tensors.versions(inputs))
        with of.buffers[place].noting_changes(self._of), _saving(call.slots):
            output = of.units[place](value, *carry, **given)
        self._unchanged(call)
        self._calls.append(call)
        return output

    def end(self, roots: Any) -> None:
        """The forward has run, and its backward will start at these."""
        self._roots = roots
        # They hold this, and a graph must not wait for the garbage collector.
        self.calls = ()

    def run_again(self, step_seed: int, micro_batch: int, part: int) -> Any:
        """R: fill the slots.

        Args:
            step_seed: as the forward had it.
            micro_batch: likewise.
            part: likewise.

        Returns:
            Where the backward starts.

        Raises:
            ModelError: an input was changed in place, or a unit saves other tensors
                than before.
        """
        of = self._selection
        value: Any = None
        for call in self._calls:
            self._unchanged(call)
            unit = of.units[call.place]
            first, carry, given = call.inputs
            if call.place - 1 not in of.buffers:
                value = first
            number = of.first_unit + call.place
            seed(of.generators, key(step_seed, number, micro_batch, part))
            found: list[Slot] = []
            with of.buffers[call.place].rewound(self._of), _finding(found):
                value = unit(value, *carry, **given)
            if carry:
                value, _ = value
            if names := gives_of(unit):
                value, _ = parted(unit, value, names)
            self._fill(call, found)
        self._calls.clear()
        return self._roots

    def _fill(self, call: _Call, found: Sequence[Slot]) -> None:
        was = [(slot.shape, slot.dtype) for slot in call.slots]
        now = [(slot.shape, slot.dtype) for slot in found]
        if was != now:
            raise ModelError(
                f"stage {self._selection.number}: "
                f"{type(self._selection.units[call.place]).__name__} saves "
                f"{len(now)} tensors for its backward when it is recomputed, which are "
                f"not the {len(was)} that it saved before: have its forward do the "
                "same each time, or do not recompute it"
            )
        for slot, full in zip(call.slots, found):
            slot.tensor, slot.version = full.tensor, full.version

    def _unchanged(self, call: _Call) -> None:
        if tensors.versions(call.inputs) != call.versions:
            name = type(self._selection.units[call.place]).__name__
            raise ModelError(
                f"stage {self._selection.number} changes the input of its {name} in "
                "place, from which that is recomputed: work out of place there, or "
                "recompute the units before it too"
            )


def _saving(slots: list[Slot]) -> saved_tensors_hooks:
    """A context in which a slot is kept of each tensor that autograd saves."""

    def pack(tensor: Tensor) -> Slot:
        slots.append(Slot(tensor.shape, tensor.dtype))
        return slots[-1]

    return saved_tensors_hooks(pack, Slot.read)


def _finding(found: list[Slot]) -> saved_tensors_hooks:
    """A context that collects what autograd saves, in slots."""

    def pack(tensor: Tensor) -> Slot:
        slot = Slot(tensor.shape, tensor.dtype)
        # Without its graph, which holds what is packed. An ActivationMeter is not to
        # see this: the node is still being made.
        with torch._C.DisableTorchFunction():
            slot.tensor, slot.version = tensor.detach(), tensor._version
        found.append(slot)
        return slot

    return saved_tensors_hooks(pack, Slot.read)
