"""Columns of integers, and lists of them for each of many instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.int32]


@dataclass(frozen=True)
class Lists:
    """For each instruction (or group of them) a short list of integers.

    Attributes:
        offsets: int32 or int64, length instructions + 1.
        values: list i is `values[offsets[i]:offsets[i + 1]]`.
    """

    offsets: NDArray[Any]
    values: NDArray[Any]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Lists:
        """The same, from Python lists."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(offsets, np.array([v for row in rows for v in row], dtype=np.int32))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> list[int]:
        low, high = self.offsets[index], self.offsets[index + 1]
        values: list[int] = self.values[low:high].tolist()
        return values

    def to_lists(self) -> list[list[int]]:
        """All of them, as Python lists."""
        values, offsets = self.values.tolist(), self.offsets.tolist()
        empty: list[int] = []  # shared: most lists are, and a million cost time
        return [
            values[low:high] if high > low else empty for low, high in pairwise(offsets)
        ]

    @cached_property
    def owner(self) -> NDArray[Any]:
        """For each of `values`, the instruction whose list it is in."""
        every = np.arange(len(self.offsets) - 1, dtype=np.int32)
        return np.repeat(every, np.diff(self.offsets))


def table(rows: int, columns: int) -> Column:
    """A table of int32, to be filled, whose columns lie one behind the other."""
    return np.empty((rows, columns), dtype=np.int32, order="F")
