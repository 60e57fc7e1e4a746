"""A pipeline whose devices are processes: what they agree on, and when.

    before the first step   schedule, versions, shapes of parameters
    at the start of each    the seed of rank 0, rows, whether shapes are new
    at the end of each      the losses of the micro-batches, so that all know the sum

Whatever is found wrong there, all ranks find, with the same message.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from pipeproof.exec.batch import (
    LossScale,
    Value,
    factors,
    positions_of,
    rows_of,
    split,
)
from pipeproof.exec.bind import holders
from pipeproof.exec.errors import BatchError, ModelError, RankError
from pipeproof.exec.forms import DTYPES
from pipeproof.exec.group import Ranks
from pipeproof.exec.lending import LENDING, Borrower, Lender
from pipeproof.exec.reducing import Reducer
from pipeproof.exec.runtime import Runtime
from pipeproof.exec.stage import Stage, StageModule, units_of
from pipeproof.exec.step import Step
from pipeproof.exec.tensors import copied, flat
from pipeproof.exec.timetable import Array, merged
from pipeproof.exec.transport import Across
from pipeproof.exec.wires import Wire
from pipeproof.sched import Kind, ParameterError, Program
from pipeproof.sched.program import StreamKind


class Ranked:
    """One rank's side of a pipeline.

    Args:
        ranks: one for each device of the schedule.
        program: what they run together.
        stages: those of this rank; others may be None, or are left as they are.
        devices: the torch device of each rank.
        loss_scale: as for `Pipeline`.

    Attributes:
        ranks: as given.
        homes: the stages that this rank runs, as for `Runtime`.
        transport: likewise.
        reducer: likewise, its `reduce`.
        borrower: likewise, its `loan`; None where this rank offloads to no other.

    Raises:
        ParameterError: another number of ranks than of devices.
        ModelError: a stage of this rank is None, or shares a parameter with one of
            another.
        RankError: the ranks differ in what they run.
    """

    def __init__(
        self,
        ranks: Ranks,
        program: Program,
        stages: Sequence[StageModule | None],
        devices: Sequence[torch.device],
        loss_scale: LossScale,
    ) -> None:
        self.ranks, self._program = ranks, program
        self._loss_scale = loss_scale
        self._schedule = schedule = program.schedule
        if ranks.size != schedule.devices:
            raise ParameterError(
                f"{schedule.summary} runs on {schedule.devices} ranks, one for each "
                f"device, got {ranks.size}"
            )
        self._device = device = devices[ranks.rank]
        self._mine = [
            number
            for number in range(schedule.stages)
            if ranks.rank in holders(schedule, number)
        ]
        self._check_given(stages)
        first_unit = self._agree(stages)
        self.homes: dict[tuple[int, int], Stage] = {}
        for number in self._mine:
            module = stages[number]
            assert module is not None
            stage = Stage(number, module, first_unit[number], device)
            self.homes[number, ranks.rank] = stage
        self._first, self._last = (
            number in self._mine for number in (0, schedule.stages - 1)
        )
        self._signatures: list[str] = []
        self._decides: tuple[list[Any], str] = [], ""
        backend = "nccl" if device.type == "cuda" else "gloo"
        self.transport = self._connected(backend)
        self.reducer = self._reducing(backend)
        self.borrower: Borrower | None = None
        self._lenders: list[Lender] = []
        self._lend(backend)

    def _check_given(self, stages: Sequence[StageModule | None]) -> None:
        owner: dict[int, int] = {}
        for number in self._mine:
            module = stages[number]
            if module is None:
                raise ModelError(
                    f"rank {self.ranks.rank} runs stage {number} and was given None "
                    "for it"
                )
            owner |= {id(p): number for p in _parameters(module)}
        for number, module in enumerate(stages):
            if module is None or number in self._mine:
                continue
            for parameter in _parameters(module):
                if (first := owner.get(id(parameter))) is not None:
                    raise ModelError(
                        f"stages {first} and {number} share a parameter of shape "
                        f"{tuple(parameter.shape)} across ranks: put both on one "
                        "device, or untie them"
                    )

    def _agree(self, stages: Sequence[StageModule | None]) -> list[int]:
        """Compare what the ranks run; the number of each stage's first unit."""
        schedule, scale = self._schedule, self._loss_scale
        same = {
            "schedule": f"{schedule.summary} ({schedule.digest})",
            "loss_scale": "a callable" if callable(scale) else scale,
            "kind of device": self._device.type,
            "torch": torch.__version__,
            "pipeproof": version("pipeproof"),
        }
        shapes = {
            str(number): _shapes(module)
            for number, module in enumerate(stages)
            if module is not None
        }
        values = {
            str(number): _checksum(stages[number])
            for number in self._mine
            if len(holders(schedule, number)) > 1
        }
        said = self.ranks.exchange(
            [same, shapes, values], "what the other ranks are to run"
        )
        found = _differences(
            [
                {**same, **{f"stage {n}": text for n, text in shapes.items()}}
                | {f"values of stage {n}": text for n, text in values.items()}
                for same, shapes, values in said
            ]
        )
        if found:
            raise RankError("ranks differ; give all the same:\n" + "\n".join(found))
        known = {int(n): text for _, shapes, _ in said for n, text in shapes.items()}
        units = [int(known[n].partition(" ")[0]) for n in range(schedule.stages)]
        return [sum(units[:number]) for number in range(schedule.stages)]

    def _connected(self, backend: str) -> Across:
        links = [s.link for s in self._program.streams if s.kind == StreamKind.SEND]
        out, into = self._wires([link for link in links if link], backend)
        ranks = self.ranks
        return Across(self._program, out, into, ranks.headers, self._device, ranks.wait)

    def _lend(self, backend: str) -> None:
        """Borrow another rank's memory, and lend this one's, as the schedule says."""
        schedule, ranks = self._schedule, self.ranks
        for full, target in enumerate(schedule.offload_to):
            kinds = [op.kind for op in schedule.row(full)]
            orders = kinds.count(Kind.OFFLOAD) + kinds.count(Kind.RELOAD)
            if target is None or not orders or ranks.rank not in (full, target):
                continue
            there = ranks.wire(full, target, backend, LENDING)
            back = ranks.wire(target, full, backend, LENDING)
            if ranks.rank == full:
                texts = ranks.loans[target]
                self.borrower = Borrower(there, back, texts, self._device, ranks.wait)
            else:
                wait, texts = ranks.wait_beside, ranks.loans[full]
                lender = Lender(there, back, texts, orders, self._device, wait)
                self._lenders.append(lender)

    def _reducing(self, backend: str) -> Reducer:
        held_by = [holders(self._schedule, n) for n in range(self._schedule.stages)]
        pairs = [(a, b) for held in held_by for a in held for b in held if a != b]
        out, into = self._wires(pairs, backend, "reductions")
        ranks = self.ranks
        return Reducer(ranks.rank, out, into, ranks.reductions, ranks.wait)

    def _wires(
        self, pairs: Sequence[tuple[int, int]], backend: str, of: str = ""
    ) -> tuple[dict[int, Wire], dict[int, Wire]]:
        """This rank's communicators among these, made in one order on all ranks."""
        me = self.ranks.rank
        out: dict[int, Wire] = {}
        into: dict[int, Wire] = {}
        for source, target in pairs:
            if me not in (source, target):
                continue
            wire = self.ranks.wire(source, target, backend, of)
            if source == me:
                out[target] = wire
            else:
                into[source] = wire
        return out, into

    def step(
        self,
        runtime: Runtime,
        seed: int,
        inputs: Value | None,
        targets: Value | None,
    ) -> Step:
        """One step of all ranks.

        Args:
            runtime: of this one.
            seed: as drawn here; that of rank 0 counts.
            inputs: the batch, where a first stage is; ignored elsewhere.
            targets: likewise, with a last stage.

        Returns:
            The step, with the losses of all ranks.
        """
        step = Step(seed, *self._split(inputs, targets))
        self._open(step, inputs, targets)
        runtime.run(step)
        self._close(step)
        return step

    def timed_step(
        self,
        runtime: Runtime,
        seed: int,
        inputs: Value | None,
        targets: Value | None,
    ) -> tuple[Step, Array, Array]:
        """As `step`; and when all ranks' instructions started and ended."""
        step = Step(seed, *self._split(inputs, targets))
        self._open(step, inputs, targets)
        offset = self.ranks.clock_offset()
        self.transport.recorded = True
        try:
            start, end = runtime.run_timed(step)
        finally:
            self.transport.recorded = False
        self._close(step)
        zero = runtime.clock.origin + offset
        times = {
            index: (index, zero + began, zero + ended)
            for index, began, ended in zip(runtime.here, start, end)
        }
        for index, began, ended in self.transport.times():
            times[index] = index, began + offset, ended + offset
        said = self.ranks.exchange(list(times.values()), "the other ranks' times")
        return step, *merged(self._program, said)

    def _split(
        self, inputs: Value | None, targets: Value | None
    ) -> tuple[list[list[Value]], list[list[Value]], list[list[float | None]]]:
        sizes = self._schedule.micro_batches, self._schedule.slices
        batch: list[list[Value]] = []
        labels: list[list[Value]] = []
        scale: list[list[float | None]] = [[None] * sizes[1] for _ in range(sizes[0])]
        if self._first:
            batch = split("inputs", self._there(inputs, "inputs"), *sizes)
        if self._last:
            labels = split("targets", self._there(targets, "targets"), *sizes)
            # Rows and positions are those of the inputs; that is made sure of.
            scale = factors(labels, labels, self._loss_scale)
        return self._moved(batch), self._moved(labels), scale

    def _there(self, value: Value | None, name: str) -> Value:
        if value is None:
            rank = self.ranks.rank
            raise BatchError(
                f"rank {rank} got no {name}, and one of its stages needs them"
            )
        return value

    def _moved(self, parts: list[list[Value]]) -> list[list[Value]]:
        device = self._device
        return [
            [
                tuple(copied(tensor, device) for tensor in value)
                if isinstance(value, tuple)
                else copied(value, device)
                for value in slices
            ]
            for slices in parts
        ]

    def _open(self, step: Step, inputs: Value | None, targets: Value | None) -> None:
        """Agree on the seed, on the batch's rows, and on whether shapes are new."""
        sizes = {}
        if self._first:
            sizes["inputs"] = self._size("inputs", self._there(inputs, "inputs"))
        if self._last:
            sizes["targets"] = self._size("targets", self._there(targets, "targets"))
        said = self.ranks.exchange(
            [step.seed, sizes, self._signature(step)], "the other ranks' next step"
        )
        wanted = said[holders(self._schedule, 0)[0]][1]["inputs"]
        for rank, (_, sizes, _) in enumerate(said):
            for name, found in sizes.items():
                if found != wanted:
                    raise BatchError(
                        f"the {name} of rank {rank} have {found}, and the inputs "
                        f"{wanted}: all ranks' parts must be of one batch"
                    )
        step.seed = said[0][0]
        signatures = [signature for _, _, signature in said]
        self.transport.begin(announced=signatures == self._signatures)
        self._signatures = signatures
        for lender in self._lenders:
            lender.begin()

    def _size(self, name: str, value: Value) -> str:
        rows = f"{rows_of(name, value)} rows"
        if self._schedule.slices == 1:
            return rows
        return f"{rows} of {positions_of(name, value)} positions"

    def _signature(self, step: Step) -> str:
        """All on this rank that may decide what tensors cross to other ranks."""
        parts: list[Any] = [
            [(t.shape, t.dtype, t.requires_grad) for t in flat(value)]
            for slices in step.inputs
            for value in slices
        ]
        parts.append([factor == 0 for slices in step.factors for factor in slices])
        for stage in self.homes.values():
            parts.append([p.requires_grad for p in stage.parameters])
            parts.append([m.training for m in stage.modules])
        if torch.is_autocast_enabled(kind := self._device.type):
            parts.append(torch.get_autocast_dtype(kind))
        if parts != self._decides[0]:
            self._decides = parts, hashlib.sha256(repr(parts).encode()).hexdigest()
        return self._decides[1]

    def _close(self, step: Step) -> None:
        """Tell each other the losses; when all have, all is received."""
        ours = [
            (number, part, loss.item(), str(loss.dtype))
            for number, slices in enumerate(step.losses)
            for part, loss in enumerate(slices)
            if loss is not None
        ]
        for lender in self._lenders:
            lender.end()
        for theirs in self.ranks.exchange(ours, "the other ranks' losses"):
            for number, part, value, dtype in theirs:
                if step.losses[number][part] is None:
                    loss = torch.tensor(value, dtype=DTYPES[dtype], device=self._device)
                    step.losses[number][part] = loss
        self.transport.end()


def _parameters(module: StageModule) -> list[nn.Parameter]:
    return [p for unit in units_of(module) for p in unit.parameters()]


def _shapes(module: StageModule) -> str:
    """Its units and its parameters, in words."""
    shapes = [f"{list(p.shape)} {p.dtype}" for p in _parameters(module)]
    return f"{len(units_of(module))} units; {', '.join(shapes) or 'no parameters'}"


def _checksum(module: StageModule | None) -> str:
    """Of the values that replicas must start with alike."""
    assert module is not None
    total = 0
    for parameter in _parameters(module):
        data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        total = zlib.crc32(data.numpy().tobytes(), total)
    return f"{total:08x}"


def _differences(said: Sequence[Mapping[str, str]]) -> list[str]:
    """Where ranks say different things of the same, in words."""
    found = []
    for name in dict.fromkeys(name for of_rank in said for name in of_rank):
        by_text: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(said):
            if name in of_rank:
                by_text.setdefault(of_rank[name], []).append(rank)
        if len(by_text) > 1:
            lines = [
                f"    ranks {', '.join(map(str, ranks))}: {text}"
                for text, ranks in by_text.items()
            ]
            found.append("\n".join([f"  {name}:", *lines]))
    return found
