"""Count live activations from outside the executor.

The meter never looks at what the executor keeps. It learns of a storage when
autograd saves a tensor for backward, or when one enters a stage, and sees it die
through a weak reference to the storage itself: a storage counts once however many
tensors share it, and for as long as anything at all holds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pipeproof.exec.stage import StageModule, units_of


class ActivationMeter:
    """Live bytes while it is entered, of all stages and of each.

    Counts what is saved for backward, and the inputs of stages, stored ones
    included; neither parameters, nor buffers, nor what a forward uses only
    meanwhile. That is what the simulator's activation, input and stored input
    bytes predict.

    Args:
        stages: as given to `Pipeline`; all run in this thread.

    Attributes:
        live: bytes now.
        peak: the most there were.
        live_of, peak_of: the same for each stage, counting only what was saved for
            backward, by the stage that saved it first.

    Example:
        with ActivationMeter(stages) as meter:
            pipeline.step(inputs, targets)
        print(meter.peak)
    """

    def __init__(self, stages: Sequence[StageModule] | nn.Sequential) -> None:
        self._units = [units_of(stage) for stage in stages]
        self.live = 0
        self.peak = 0
        self.live_of = [0] * len(self._units)
        self.peak_of = [0] * len(self._units)
        self._stage = 0
        self._seen: dict[int, list[Any]] = {}
        self._ignored: set[int] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._saved, _same)

    def ignore(self, *tensors: Tensor) -> None:
        """Leave these out: a batch that lives on anyway, say."""
        self._ignored.update(id(tensor.untyped_storage()) for tensor in tensors)

    def __enter__(self) -> ActivationMeter:
        for number, units in enumerate(self._units):
            for unit in units:
                self.ignore(*unit.parameters(), *unit.buffers())
            enter = self._entering(number)
            hook = units[0].register_forward_pre_hook(enter, prepend=True)
            self._handles.append(hook)
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _entering(self, number: int) -> Any:
        def enter(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._stage = number
            for tensor in _tensors(arguments):
                self._see(tensor, saved=False)

        return enter

    def _saved(self, tensor: Tensor) -> Tensor:
        self._see(tensor, saved=True)
        return tensor

    def _see(self, tensor: Tensor, *, saved: bool) -> None:
        storage = tensor.untyped_storage()
        identity = id(storage)
        if identity in self._ignored:
            return
        entry = self._seen.get(identity)
        if entry is None:
            size = storage.nbytes()
            finalizer = weakref.finalize(storage, self._gone, identity)
            finalizer.atexit = False
            entry = self._seen[identity] = [size, None]
            self.live += size
            self.peak = max(self.peak, self.live)
        if saved and entry[1] is None:
            stage = entry[1] = self._stage
            self.live_of[stage] += entry[0]
            self.peak_of[stage] = max(self.peak_of[stage], self.live_of[stage])

    def _gone(self, identity: int) -> None:
        size, stage = self._seen.pop(identity)
        self.live -= size
        if stage is not None:
            self.live_of[stage] -= size


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
