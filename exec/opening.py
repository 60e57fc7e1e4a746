"""What ranks tell each other at the start of a step, and find in what they are told.

Each has a line: what it got of the batch, and all that decides what crosses between
ranks. Mostly it is the line of the step before, and if all are, so is all that was
found in them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeproof.exec.batch import Batch, Weights, no_unit_takes, total_of, unmarked
from pipeproof.exec.errors import BatchError
from pipeproof.exec.grid import Grid
from pipeproof.exec.homes import holders
from pipeproof.exec.stage import Stage
from pipeproof.exec.tensors import flat
from pipeproof.sched import Schedule


class Line(NamedTuple):
    """What a rank says.

    Attributes:
        sizes: rows and positions of its parts of the batch, by their names.
        weight: of its losses; None where it knows none.
        given, taken: keyword inputs that it got, and those that its units take.
        accumulates: whether STEPs are left out.
        signature: of all that may decide what tensors it sends.
    """

    sizes: Mapping[str, list[int]]
    weight: float | None
    given: list[str]
    taken: list[str]
    accumulates: bool
    signature: str


class Opening:
    """One rank's part in it.

    Args:
        grid: of all ranks.
        schedule: that they run.
        stages: of this one.
        device: of these.

    Attributes:
        size: rows and positions of this replica's batch.
        weight: of all replicas' losses together.
    """

    def __init__(
        self,
        grid: Grid,
        schedule: Schedule,
        stages: Iterable[Stage],
        device: torch.device,
    ) -> None:
        self._grid, self._stages, self._device = grid, list(stages), device
        self._first = holders(schedule, 0)[0]
        self._last = holders(schedule, schedule.stages - 1)[0]
        self._sliced = schedule.slices > 1
        self._decides: list[Any] = []
        self._line = ""
        self._heard: list[str] = []
        self._signatures: list[str] = []
        self.size = 0, 0
        self.weight = 0.0

    def line(
        self,
        kind: str,
        batch: Batch,
        sizes: Mapping[str, list[int]],
        counts: Weights | None,
        takes: Collection[str],
    ) -> str:
        """What this rank says.

        Args:
            kind: of step: with backwards, or without.
            batch: as it was given here.
            sizes: of what was needed of it.
            counts: the weights of the losses, where they are known.
            takes: keyword inputs that units here take.
        """
        weight = None if counts is None else total_of(counts)
        given = unmarked(batch.inputs) if "inputs" in sizes else None
        leaves = [given]
        if not isinstance(given, Tensor) or batch.keywords:
            leaves = flat((given, unmarked(dict(batch.keywords))))
        decides: list[Any] = [
            (leaf.shape, leaf.dtype, leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else leaf
            for leaf in leaves
        ]
        for stage in self._stages:
            decides.append([p.requires_grad for p in stage.parameters])
            decides.append([m.training for m in stage.modules])
        decides += kind, [w == 0 for of_slices in counts or [] for w in of_slices]
        if torch.is_autocast_enabled(device := self._device.type):
            decides.append(torch.get_autocast_dtype(device))
        said = [sizes, weight, sorted(batch.keywords), sorted(takes), batch.accumulate]
        if (all_of_it := [decides, said]) != self._decides:
            signature = hashlib.sha256(repr(decides).encode()).hexdigest()
            self._decides, self._line = all_of_it, json.dumps([*said, signature])
        return self._line

    def heard(self, lines: list[str]) -> bool:
        """Take in what all ranks say.

        Returns:
            Whether all that crosses between this replica's ranks has the form that it
            had in the step before.

        Raises:
            BatchError: it is no batch, or the ranks are not of one mind.
        """
        if lines == self._heard:
            return True
        self._heard = []  # until they are found to be right
        said = [Line(*json.loads(line)) for line in lines]
        rows = [self._rows(said, row) for row in self._grid.rows]
        self._check_keywords(said)
        for rank, line in enumerate(said):
            if line.accumulates != said[0].accumulates:
                raise BatchError(
                    f"rank {rank} was called with accumulate={line.accumulates}, and "
                    f"rank 0 with accumulate={said[0].accumulates}: give all the same"
                )
        self.size = rows[self._grid.replica]
        # Without targets, rows and positions are what a batch's losses weigh.
        weights = [said[row[self._last]].weight for row in self._grid.rows]
        told = (math.prod(n) if w is None else w for n, w in zip(rows, weights))
        self.weight = math.fsum(told)
        before = self._signatures
        self._signatures = [said[rank].signature for rank in self._grid.row]
        self._heard = lines
        return before == self._signatures

    def _rows(self, said: Sequence[Line], row: Sequence[int]) -> tuple[int, int]:
        """Rows and positions of a replica's batch."""
        wanted = said[row[self._first]].sizes["inputs"]
        for rank in row:
            for name, found in said[rank].sizes.items():
                if found != wanted:
                    raise BatchError(
                        f"the {name} of rank {rank} have {self._words(found)}, and "
                        f"the inputs {self._words(wanted)}: all ranks' parts must "
                        "be of one batch"
                    )
        return wanted[0], wanted[1]

    def _words(self, size: Sequence[int]) -> str:
        return f"{size[0]} rows" + (f" of {size[1]} positions" if self._sliced else "")

    def _check_keywords(self, said: Sequence[Line]) -> None:
        """Refuse keywords that no unit takes, or that a rank should have got."""
        given = sorted({name for line in said for name in line.given})
        taken = {name for line in said for name in line.taken}
        if unknown := [name for name in given if name not in taken]:
            raise BatchError(no_unit_takes(unknown, taken))
        for name in given:
            for rank, line in enumerate(said):
                if name in line.taken and name not in line.given:
                    raise BatchError(
                        f"rank {rank} got no keyword input {name!r}, which a unit of "
                        "its stages takes, and another rank did: give it to both"
                    )
