"""REDUCE between ranks: a stage's gradient is summed while the pipeline drains.

    rank 0   g = B0 + B2 + …   ── all to all ─▶  slice 0 of every g, summed ──┐
    rank 2   g = B1 + B3 + …                     slice 1 of every g, summed ──┤
                                                              ◀── all gather ─┘
    .grad += slice 0, slice 1

Each of the ranks that hold a stage sums one slice of its gradient, in the order of the
ranks, and all gather the slices. So the sum is one bit by bit, the same on all ranks
and that of one process, for any number of them; and each sends 2 (k-1)/k gradients,
as little as any all-reduce does.

A thread does it, in the order in which the program says REDUCE, which is one on all
ranks; the step goes on meanwhile, and waits before it returns.

A gradient that one of the ranks does not have (its micro-batches' losses do not
count) is a negative zero there: adding it changes no bit, as +0 would that of -0.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Backend

from pipeproof.exec.communicators import NEVER
from pipeproof.exec.group import Ranks
from pipeproof.exec.replicas import Accumulate, Owner, Sums, accumulate

Gradients = list[Tensor | None]


class Reducer:
    """One rank's part in the reductions of one pipeline.

    Args:
        groups: of each stage (or tie) whose gradient is summed, the communicator of
            the ranks that hold it, in ascending order.
        device: where this rank's tensors lie.
        ranks: that share it.

    Attributes:
        stages: whose gradients are summed.
    """

    def __init__(
        self,
        groups: Mapping[int, Backend],
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self._groups, self._device, self._ranks = groups, device, ranks
        self._begun: list[_Reduction] = []
        self._done: list[tuple[int, float, float]] = []
        self._queue: SimpleQueue[_Reduction | None] = SimpleQueue()

    @property
    def stages(self) -> frozenset[int]:
        """Whose gradients are summed."""
        return frozenset(self._groups)

    def begin(
        self, index: int, stage: int, sums: Sums, add: Accumulate = accumulate
    ) -> None:
        """Start to sum.

        Args:
            index: of the instruction.
            stage: (or tie) whose gradient.
            sums: of this rank; taken over.
            add: adds the total to what the parameters have.
        """
        reduction = _Reduction(index, stage, sums, self._groups[stage], add)
        if self._device.type == "cuda":
            reduction.event = torch.cuda.current_stream(self._device).record_event()
        if not self._begun:
            self._queue = SimpleQueue()
            arguments = self._queue, self._device
            threading.Thread(target=_serve, args=arguments, daemon=True).start()
        self._begun.append(reduction)
        self._queue.put(reduction)

    def complete(self, stage: int) -> None:
        """Wait for the sum of a stage (or tie) that was begun, and add it.

        Raises:
            RankError: as `Ranks.wait`.
        """
        for one in self._begun:
            if one.number == stage:
                self._add(one)

    def finish(self) -> None:
        """Wait for all sums, and add each.

        Raises:
            RankError: as `Ranks.wait`.
        """
        if not self._begun:
            return
        self._queue.put(None)
        for one in self._begun:
            self._add(one)
        self._done = [(one.index, one.began, one.ended) for one in self._begun]
        self._begun.clear()

    def _add(self, one: _Reduction) -> None:
        if one.added:
            return
        what = f"the gradients of stage {one.stage.number}"
        self._ranks.wait_for(one.done, what)
        if one.error is not None:
            self._ranks.broken(one.error, what)
        if one.event is not None:
            compute = torch.cuda.current_stream(self._device)
            compute.wait_event(one.event)
            for grad in one.grads:
                if grad is not None:
                    grad.record_stream(compute)
        one.add(one.stage.parameters, one.grads)
        one.added = True

    def forget(self) -> None:
        """Let go of the sums of a step that broke off."""
        self._queue.put(None)
        self._begun.clear()

    def times(self) -> list[tuple[int, float, float]]:
        """When the last step's reductions began and ended, by `perf_counter`."""
        return self._done


class _Reduction:
    """One stage's, under way.

    Args:
        index: of the instruction.
        number: of the stage, or tie.
        sums: of this rank; taken over.
        group: of the ranks that hold it.
        add: adds the total to what the parameters have.

    Attributes:
        stage: whose parameters.
        grads: of this rank, and in the end the sums.
        event: on a GPU, when the gradients, and in the end the sums, are there.
        done: set at the end.
        added: whether they are.
        error: why there are no sums.
    """

    def __init__(
        self, index: int, number: int, sums: Sums, group: Any, add: Accumulate
    ) -> None:
        self.index, self.number, self.group, self.add = index, number, group, add
        self.stage: Owner = sums.stage
        self.grads: Gradients = sums.taken()
        self.event: torch.cuda.Event | None = None
        self.done = threading.Event()
        self.error: Exception | None = None
        self.added = False
        self.began = self.ended = perf_counter()

    def run(self, device: torch.device) -> None:
        """All of it, in a thread that may wait."""
        if not self.grads:
            return
        size = self.group.size()
        there = torch.tensor([grad is not None for grad in self.grads], device=device)
        said = torch.empty(size * len(there), dtype=torch.bool, device=device)
        self._finish(self.group._allgather_base(_bytes(said), _bytes(there)))
        known = said.view(size, -1).any(0).tolist()
        by_dtype: dict[torch.dtype, list[int]] = {}
        for number, parameter in enumerate(self.stage.parameters):
            if known[number]:
                # Gradients of halves may be summed in float32: `grad_dtype`.
                dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
                by_dtype.setdefault(dtype, []).append(number)
        for dtype, numbers in by_dtype.items():
            self._sum(dtype, numbers, device)

    def _sum(
        self, dtype: torch.dtype, numbers: Sequence[int], device: torch.device
    ) -> None:
        """The gradients of these parameters, which are of one type."""
        parameters = [self.stage.parameters[number] for number in numbers]
        size, count = self.group.size(), sum(p.numel() for p in parameters)
        part = -(-count // size)
        nothing = complex(-0.0, -0.0) if dtype.is_complex else -0.0
        whole = torch.full((part * size,), nothing, dtype=dtype, device=device)
        places = []
        first = 0
        for number, parameter in zip(numbers, parameters):
            place = _laid_out_as(parameter, whole, first)
            places.append(place)
            first += parameter.numel()
            if (grad := self.grads[number]) is not None:
                place.copy_(grad.to_dense() if grad.is_sparse else grad)
                self.grads[number] = None
        if count:
            self._add_up(whole, part)
        for number, place in zip(numbers, places):
            self.grads[number] = place

    def _add_up(self, whole: Tensor, part: int) -> None:
        """A row of numbers of each rank → their sum on all, in place."""
        slices = torch.empty_like(whole)
        self._finish(self.group.alltoall_base(_bytes(slices), _bytes(whole), [], []))
        total, *others = slices.view(-1, part)
        for other in others:
            total += other
        self._finish(self.group._allgather_base(_bytes(whole), _bytes(total)))

    def _finish(self, work: Any) -> None:
        # NCCL's waits hold up the host if they are given a deadline.
        work.wait() if self.group.name() == "nccl" else work.wait(NEVER)


def _laid_out_as(parameter: Tensor, whole: Tensor, first: int) -> Tensor:
    """A part of a row of numbers, as a gradient of this parameter."""
    strides = torch.empty_like(parameter, device="meta").stride()
    return whole.as_strided(parameter.shape, strides, first)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _serve(queue: SimpleQueue[_Reduction | None], device: torch.device) -> None:
    # On a GPU, waits order a stream: not the one that computes.
    stream: Any = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    while (one := queue.get()) is not None:
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                if one.event is not None:
                    stream.wait_event(one.event)
                    for grad in one.grads:
                        if grad is not None:
                            grad.record_stream(stream)
                one.run(device)
                if one.event is not None:
                    one.event = stream.record_event()
        except Exception as error:
            one.error = error
        one.ended = perf_counter()
        one.done.set()
        del one
