"""Count live activations from outside the executor.

The meter never looks at what the executor keeps. It learns of a storage when a
tensor enters a stage, or from the nodes of the graph that the functions of torch
make, which tell what they saved for backward (or in which slot an R has put it); and
sees it die through a weak reference to the storage itself: a storage counts once
however many tensors share it, and for as long as anything at all holds it.

It does not go by saved-tensor hooks: a tensor saved under hooks is out of reach
of whoever would let go of it, so that measuring would change what is measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pipeproof.exec import slot
from pipeproof.exec.skips import gives_of
from pipeproof.exec.slot import tensor_of
from pipeproof.exec.units import StageModule, takes_of, units_of
from pipeproof.sched.errors import UnsupportedError


class ActivationMeter:
    """Live bytes while it is entered, of all stages and of each.

    Counts what is saved for backward, the inputs of stages, stored ones included, and
    those of units that outlive the forward, for an R of these; neither parameters, nor
    buffers, nor gradients, nor what a forward uses only meanwhile, nor what hooks on
    saved tensors keep in its place, unless an R of some units has filled it. That is
    what the simulator's activation, input and stored input bytes predict.

    Args:
        stages: as given to `Pipeline`; all run in this thread.

    Raises, at the first op:
        UnsupportedError: this torch does not tell what its graph holds; 2.6 does not.

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
        self._walked: set[int] = set()
        self._handles: list[RemovableHandle] = []
        self._entered: list[weakref.ref[Any]] = []
        self._left: list[weakref.ref[Any]] = []
        self._watch = _Watch(self._made)

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
            self._handles += self._where_skips_end(units)
            for unit in units[1:]:
                hook = unit.register_forward_pre_hook(self._between, prepend=True)
                self._handles.append(hook)
            self._handles.append(units[-1].register_forward_hook(self._leaving))
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watch.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._walked.clear()
        self._entered.clear()
        self._left.clear()

    def _entering(self, number: int) -> Any:
        def enter(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._stage = number
            for tensor in _tensors(arguments):
                self._see(tensor, saved=False)

        return enter

    def _between(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        found = _tensors(arguments)
        self._entered += [weakref.ref(tensor.untyped_storage()) for tensor in found]

    def _leaving(self, *_: Any) -> None:
        self._left += self._entered
        self._entered.clear()

    def _where_skips_end(self, units: list[nn.Module]) -> list[RemovableHandle]:
        """Hooks that see what comes from other stages over skip connections."""
        given = {name for of in self._units for unit in of for name in gives_of(unit)}
        given -= {name for unit in units for name in gives_of(unit)}

        def entering(parameters: set[str]) -> Any:
            def enter(_: nn.Module, __: Any, keywords: dict[str, Any]) -> None:
                for name in parameters & keywords.keys():
                    for tensor in _tensors(keywords[name]):
                        self._see(tensor, saved=False)

            return enter

        taken = [{p for p, n in takes_of(unit).items() if n in given} for unit in units]
        return [
            unit.register_forward_pre_hook(
                entering(parameters), prepend=True, with_kwargs=True
            )
            for unit, parameters in zip(units, taken)
            if parameters
        ]

    def _made(self, tensors: list[Tensor]) -> None:
        """Look at the nodes behind these that are new."""
        while self._left:  # of a forward that has come to its end by now
            if (storage := self._left.pop()()) is not None:
                self._see_storage(storage, saved=False)
        waiting = [tensor.grad_fn for tensor in tensors]
        while waiting:
            node = waiting.pop()
            # A node's number in the order of creation; of leaves' nodes, all ones.
            if node is None or (number := node._sequence_nr()) in self._walked:
                continue
            self._walked.add(number)
            for tensor in saved_by(node):
                self._see(tensor, saved=True)
            waiting += [child for child, _ in node.next_functions]

    def _see(self, tensor: Tensor, *, saved: bool) -> None:
        self._see_storage(tensor.untyped_storage(), saved=saved)

    def _see_storage(self, storage: Any, *, saved: bool) -> None:
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


class _Watch(TorchFunctionMode):
    """Shows what each function of torch was given, and what it made."""

    def __init__(self, show: Callable[[list[Tensor]], None]) -> None:
        super().__init__()
        self._show = show

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A custom autograd.Function is none of torch's; what uses its result is.
        self._show(_tensors(args) + _tensors(result))
        return result


def saved_by(node: Node) -> Iterator[Tensor]:
    """The tensors that a node saved; what hooks of others made of one is not seen.

    Raises:
        UnsupportedError: this torch does not tell.
    """
    if not slot.TELLS:
        raise UnsupportedError(
            f"torch {torch.__version__} does not tell what its graph holds, and so "
            "bytes of activations cannot be counted; newer ones do"
        )
    for name in _attributes(type(node)):
        saved = getattr(node, name)
        for one in saved if isinstance(saved, (tuple, list)) else (saved,):
            tensor = tensor_of(one)
            if tensor is not None and tensor.dim():  # a factor is no activation
                yield tensor


@cache
def _attributes(kind: type) -> list[str]:
    """Under which nodes of a kind have what they saved: torch's SavedTensor."""
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
