"""AmoebaNet-D, that of Real et al. 2018 (arXiv:1802.01548) as GPipe sizes it.

L normal cells and D filters, in the words of Huang et al. 2018 (arXiv:1811.06965).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.sched import ParameterError

STEM_FILTERS = 32
STACKS = 3
"""Of L normal cells together, with a reduction cell between one and the next."""

Shape = tuple[int, int]
Choice = tuple[int, str]
"""Which of a cell's states, and what is done to it."""

NORMAL: list[tuple[Choice, Choice]] = [
    ((1, "1x1"), (1, "max 3x3")),
    ((1, "none"), (0, "1x7 7x1")),
    ((0, "1x1"), (0, "1x7 7x1")),
    ((2, "max 3x3"), (2, "none")),
    ((1, "avg 3x3"), (5, "1x1")),
]
REDUCTION: list[tuple[Choice, Choice]] = [
    ((0, "max 2x2"), (0, "max 3x3")),
    ((2, "none"), (1, "3x3")),
    ((2, "1x7 7x1"), (2, "max 3x3")),
    ((3, "none"), (1, "max 2x2")),
    ((2, "avg 3x3"), (3, "1x1")),
]
"""State 0 is the last cell's output, 1 that of the one before, and each pair's sum
is the next state."""

REDUCTION_OUTPUT = (4, 5, 6)
UNUSED = (3, 4, 6)
"""The normal cell's states that no pair takes."""


def unit(
    inputs: int, outputs: int, kernel: Shape = (1, 1), stride: Shape = (1, 1)
) -> nn.Sequential:
    """ReLU, convolution without bias, batch norm: (rows, inputs, …) → outputs."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
    )


def bottleneck(kernels: list[Shape], channels: int, stride: int) -> nn.Sequential:
    """Convolutions on a quarter of the channels, between two of 1×1.

    One along a single dimension takes the stride in that dimension.
    """
    narrow = channels // 4
    along = [
        (stride if high > 1 else 1, stride if wide > 1 else 1) for high, wide in kernels
    ]
    inner = [unit(narrow, narrow, *of) for of in zip(kernels, along)]
    return nn.Sequential(unit(channels, narrow), *inner, unit(narrow, channels))


def unchanged(channels: int, stride: int) -> nn.Module:
    """Nothing, or a strided 1×1 where it must become smaller."""
    return nn.Identity() if stride == 1 else unit(channels, channels, stride=(2, 2))


OPS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": unchanged,
    "1x1": lambda channels, s: unit(channels, channels, stride=(s, s)),
    "3x3": partial(bottleneck, [(3, 3)]),
    "1x7 7x1": partial(bottleneck, [(1, 7), (7, 1)]),
    "avg 3x3": lambda _, s: nn.AvgPool2d(3, s, 1, count_include_pad=False),
    "max 3x3": lambda _, s: nn.MaxPool2d(3, s, 1),
    "max 2x2": lambda _, s: nn.MaxPool2d(2, s),
}


class Halved(nn.Module):
    """Half as wide and high: a strided 1×1 on the even pixels, one on the odd."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, inputs, h, w) → (rows, outputs, h / 2, w / 2)."""
        x = functional.relu(x)
        odd = functional.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        return self.norm(torch.cat([self.even(x), self.odd(odd)], 1))


class Cell(nn.Module):
    """(last output, the one before) → (its output, last output)."""

    def __init__(
        self, before: int, last: int, channels: int, output: tuple[int, ...]
    ) -> None:
        super().__init__()
        reduction = output == REDUCTION_OUTPUT
        self.pairs = REDUCTION if reduction else NORMAL
        self.output = output
        self.last = unit(last, channels)
        self.before: nn.Module = nn.Identity()
        if before != channels:
            self.before = unit(before, channels)
        self.ops = nn.ModuleList(
            OPS[name](channels, 2 if reduction and state < 2 else 1)
            for pair in self.pairs
            for state, name in pair
        )

    def halve(self, before: int, channels: int) -> None:
        """The one before is twice as wide and high as the last."""
        self.before = Halved(before, channels)

    def extra_repr(self) -> str:
        """What the modules do not show."""
        return f"{self.pairs}, {self.output}"

    def forward(self, states: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The states in turn, then the output's side by side."""
        last, before = states if isinstance(states, tuple) else (states, states)
        found = [self.last(last), self.before(before)]
        ops = iter(self.ops)
        for (left, _), (right, _) in self.pairs:
            found.append(next(ops)(found[left]) + next(ops)(found[right]))
        return torch.cat([found[state] for state in self.output], 1), last


class Head(nn.Module):
    """Mean over pixels, and one linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, states: tuple[Tensor, Tensor]) -> Tensor:
        """→ (rows, classes)."""
        return self.linear(functional.relu(states[0]).mean((2, 3)))


class Reading(NamedTuple):
    """What the papers leave open.

    Attributes:
        output: the states that a normal cell puts side by side.
        stem: filters of the first convolution, and of the two reduction cells behind
            it over D.
        classes: of the last layer.
    """

    output: tuple[int, ...] = (0, *UNUSED)
    stem: tuple[int | None, float, float] = (STEM_FILTERS, 1 / 4, 1 / 2)
    classes: int = 1000


PUBLISHED = Reading()
"""That of the authors' own code (tensorflow/tpu, models/official/amoeba_net)."""


def amoebanet(cells: int, filters: int, reading: Reading = PUBLISHED) -> nn.Sequential:
    """AmoebaNet-D (L, D), as layers: (rows, 3, h, w) → (rows, classes).

    Args:
        cells: L, the normal cells, in three stacks of as many.
        filters: D, of the first stack; the second has twice, the third four times
            as many. Every bottleneck is on a quarter, in the stem of a quarter.
        reading: of what the papers leave open.

    Raises:
        ParameterError: cells that make no three stacks, or filters that the stem
            cannot quarter twice.
    """
    if cells < 1 or cells % STACKS:
        raise ParameterError(
            f"cells must be a multiple of {STACKS}, for as many stacks of equal "
            f"length, got {cells}"
        )
    if filters < 1 or filters % 16:
        raise ParameterError(
            f"filters must be a multiple of 16, since bottlenecks in the stem have a "
            f"sixteenth of them, got {filters}"
        )
    first, *shares = reading.stem
    stem = filters // 4 if first is None else first
    layers: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem))
    ]
    kinds = [(int(filters * share), REDUCTION_OUTPUT) for share in shares]
    for stack in range(STACKS):
        channels = filters * 2**stack
        if stack:
            kinds.append((channels, REDUCTION_OUTPUT))
        kinds += [(channels, reading.output)] * (cells // STACKS)
    before = last = stem
    halve = False
    for channels, output in kinds:
        cell = Cell(before, last, channels, output)
        if halve:
            cell.halve(before, channels)
        layers.append(cell)
        before, last = last, channels * len(output)
        halve = output == REDUCTION_OUTPUT
    layers.append(Head(last, reading.classes))
    return nn.Sequential(*layers)
