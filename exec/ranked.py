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
from torch import Tensor, nn

from pipeproof.exec.batch import (
    Batch,
    LossScale,
    Value,
    factors,
    no_unit_takes,
    positions_of,
    rows_of,
    split,
    split_keywords,
    unmarked,
)
from pipeproof.exec.bind import holders
from pipeproof.exec.errors import BatchError, ModelError, RankError
from pipeproof.exec.group import Ranks
from pipeproof.exec.reducing import Reducer
from pipeproof.exec.runtime import Runtime
from pipeproof.exec.stage import Stage, StageModule, units_of
from pipeproof.exec.step import Step
from pipeproof.exec.tensors import flat, placed
from pipeproof.exec.timetable import Array, merged
from pipeproof.exec.transport import DTYPES, Across, Wire
from pipeproof.sched import ParameterError, Program, UnsupportedError
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

    Raises:
        ParameterError: another number of ranks than of devices.
        ModelError: a stage of this rank is None, or shares a parameter with one of
            another.
        RankError: the ranks differ in what they run.
        UnsupportedError: activations kept in another device's memory.
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
        if any(target is not None for target in schedule.offload_to):
            raise UnsupportedError(
                f"{schedule.summary} keeps activations in another device's memory, "
                "which is executed in one process only"
            )
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
        backend = "nccl" if device.type == "cuda" else "gloo"
        self.transport = self._connected(backend)
        self.reducer = self._reducing(backend)

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
        return Across(out, into, ranks.headers, self._device, ranks.wait)

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

    def step(self, runtime: Runtime, seed: int, batch: Batch) -> Step:
        """One step of all ranks.

        Args:
            runtime: of this one.
            seed: as drawn here; that of rank 0 counts.
            batch: inputs where a first stage is, targets with a last stage, keywords
                with a unit that takes them; ignored elsewhere.

        Returns:
            The step, with the losses of all ranks.
        """
        step = self._opened(runtime, seed, batch)
        runtime.run(step)
        self._close(step)
        return step

    def timed_step(
        self, runtime: Runtime, seed: int, batch: Batch
    ) -> tuple[Step, Array, Array]:
        """As `step`; and when all ranks' instructions started and ended."""
        step = self._opened(runtime, seed, batch)
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
            scale = factors(labels, self._loss_scale, *self._size("targets", targets))
        return placed(batch, self._device), placed(labels, self._device), scale

    def _there(self, value: Value | None, name: str) -> Value:
        if value is None:
            rank = self.ranks.rank
            raise BatchError(
                f"rank {rank} got no {name}, and one of its stages needs them"
            )
        return value

    def _opened(self, runtime: Runtime, seed: int, batch: Batch) -> Step:
        """Agree on the seed, on the batch's rows, and on whether shapes are new."""
        step = Step(seed, *self._split(batch.inputs, batch.targets))
        sizes = {}
        if self._first:
            sizes["inputs"] = self._size("inputs", batch.inputs)
        if self._last:
            sizes["targets"] = self._size("targets", batch.targets)
        takes = sorted(runtime.takes_keywords)
        said = self.ranks.exchange(
            [
                step.seed,
                sizes,
                self._signature(step, batch.keywords),
                sorted(batch.keywords),
                takes,
            ],
            "the other ranks' next step",
        )
        size = said[holders(self._schedule, 0)[0]][1]["inputs"]
        for rank, (_, sizes, *_) in enumerate(said):
            for name, found in sizes.items():
                if found != size:
                    raise BatchError(
                        f"the {name} of rank {rank} have {self._words(found)}, and the "
                        f"inputs {self._words(size)}: all ranks' parts must be of one "
                        "batch"
                    )
        _check_keywords([of_rank[3:] for of_rank in said])
        step.seed = said[0][0]
        signatures = [of_rank[2] for of_rank in said]
        self.transport.begin(announced=signatures == self._signatures)
        self._signatures = signatures
        parts = self._schedule.micro_batches, self._schedule.slices
        mine = {n: v for n, v in batch.keywords.items() if n in runtime.takes_keywords}
        if mine:
            further = split_keywords(mine, size[0], size[1], parts)
            step.keywords = {self._device: placed(further, self._device)}
        return step

    def _size(self, name: str, value: Value) -> list[int]:
        """Rows and positions."""
        sliced = self._schedule.slices > 1
        return [rows_of(name, value), positions_of(name, value) if sliced else 1]

    def _words(self, size: list[int]) -> str:
        sliced = self._schedule.slices > 1
        return f"{size[0]} rows" + (f" of {size[1]} positions" if sliced else "")

    def _signature(self, step: Step, keywords: Mapping[str, Any]) -> str:
        """All on this rank that may decide what tensors cross to other ranks."""
        given = [value for slices in step.inputs for value in slices]
        parts: list[Any] = [
            (leaf.shape, leaf.dtype, leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in flat((given, unmarked(dict(keywords))))
        ]
        parts.append([factor == 0 for slices in step.factors for factor in slices])
        for stage in self.homes.values():
            parts.append([p.requires_grad for p in stage.parameters])
            parts.append([m.training for unit in stage.units for m in unit.modules()])
        if torch.is_autocast_enabled(kind := self._device.type):
            parts.append(torch.get_autocast_dtype(kind))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _close(self, step: Step) -> None:
        """Tell each other the losses; when all have, all is received."""
        ours = [
            (number, part, loss.item(), str(loss.dtype))
            for number, slices in enumerate(step.losses)
            for part, loss in enumerate(slices)
            if loss is not None
        ]
        for theirs in self.ranks.exchange(ours, "the other ranks' losses"):
            for number, part, value, dtype in theirs:
                if step.losses[number][part] is None:
                    loss = torch.tensor(value, dtype=DTYPES[dtype], device=self._device)
                    step.losses[number][part] = loss


def _check_keywords(said: Sequence[Sequence[Sequence[str]]]) -> None:
    """Refuse keywords that no unit takes, or that a rank should have got.

    Args:
        said: of each rank, the names that it got and those that its units take.
    """
    given = sorted({name for got, _ in said for name in got})
    taken = {name for _, takes in said for name in takes}
    if unknown := [name for name in given if name not in taken]:
        raise BatchError(no_unit_takes(unknown, taken))
    for name in given:
        for rank, (got, takes) in enumerate(said):
            if name in takes and name not in got:
                raise BatchError(
                    f"rank {rank} got no keyword input {name!r}, which a unit of its "
                    "stages takes, and another rank did: give it to both"
                )


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
