"""What stages of consecutive layers hold, by the layers at which they begin and end.

A piece of memory counts in a stage that made it, if any of its layers keeps it. Summed
over the layers that are the first to keep something, that is a prefix sum; but what
layers before the stage made has come to it, and is not its own::

    layer      2     3     4     5
    makes      p
    keeps            p                 in a stage from 3 on, p is its input
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.layers import Layer, Memory, Pieces, with_loss, with_memory

Floats = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass
class Spans:
    """One number for each stage of some layers, start inclusive, end not.

    Attributes:
        prefix: its sums over the first 0, 1, … layers.
        first: what a stage that begins at 0, 1, … layers has more.
        last: what one that ends there has more.
        across: [start, end], likewise; None for nothing.
    """

    prefix: Floats
    first: Floats
    last: Floats
    across: Floats | None = None

    @classmethod
    def none(cls, layers: int) -> Spans:
        """All 0."""
        return cls(*np.zeros((3, layers + 1)))

    def of(self, start: Index, end: Index) -> Floats:
        """The numbers of such stages."""
        result: Floats = self.prefix[end] - self.prefix[start]
        result += self.first[start] + self.last[end]
        if self.across is not None:
            result += self.across[start, end]
        return result

    def at_least(self) -> tuple[Floats, Floats]:
        """By end, and by start, what no stage's number is below the difference of."""
        begin = self.prefix - np.minimum(self.first, 0)
        if self.across is not None:
            begin -= np.minimum(self.across.min(axis=1), 0)
        return self.prefix, begin

    def add(self, starts: slice, ends: slice, number: float) -> None:
        """More for stages that begin and end there."""
        if starts.stop <= starts.start:
            return
        if self.across is None:
            size = len(self.prefix)
            self.across = np.zeros((size, size))
        self.across[starts, ends] += number


@dataclass(frozen=True)
class LayerSpans:
    """Of one micro-batch; what has come is not counted in what is kept.

    Attributes:
        kept: bytes that a forward keeps.
        left: of these, what W reads.
        input: what has come; of the batch, nothing.
        output: what is returned.
        before: what the layer before the stage returned.
        brought: what skips bring from any stage before.
        given: what goes over skips to any stage behind, to each layer that takes it.
    """

    kept: Spans
    left: Spans
    input: Spans
    output: Spans
    before: Spans
    brought: Spans
    given: Spans

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> LayerSpans:
        """Of all stages that these can be cut into."""
        memories = with_memory(with_loss(layers))
        made = _made(layers, memories)
        kept = _first(made, [memory.kept for memory in memories], len(layers))
        left = _first(made, [memory.left for memory in memories], len(layers))
        found = cls(kept, left, *(Spans.none(len(layers)) for _ in range(5)))
        found.input.first[1:-1] = [layer.input for layer in layers[1:]]
        found.output.last[1:] = [layer.output for layer in layers]
        found.before.first[1:] = found.output.last[1:]
        _over_skips(layers, found)
        return found


def _made(layers: Sequence[Layer], memories: Sequence[Memory]) -> dict[int, int]:
    """Of each piece of memory, the layer that made it; -1 for the batch."""
    made: dict[int, int] = {}
    for number, memory in enumerate(memories):
        for at, _ in memory.input:
            made.setdefault(at, number - 1)
        takes = layers[number].takes if number < len(layers) else ()
        for (source, _), pieces in zip(takes, memory.beside):
            for at, _ in pieces:
                made[at] = min(made.get(at, source), source)
        for at, _ in memory.kept:
            made.setdefault(at, number)
    return made


def _first(made: dict[int, int], pieces: Sequence[Pieces], layers: int) -> Spans:
    """Of pieces that layers keep, each where it is first kept."""
    found, seen = Spans.none(layers), set[int]()
    for number, of_layer in enumerate(pieces):
        place = min(number, layers - 1)  # the loss is part of the last
        for at, size in of_layer:
            if at in seen:
                continue
            seen.add(at)
            found.prefix[place + 1] += size
            maker = min(made.get(at, number), layers - 1)
            if maker < place:
                found.first[place] -= size
                found.add(slice(maker + 1, place), slice(place + 1, None), -size)
    found.prefix[:] = np.cumsum(found.prefix)
    return found


def _over_skips(layers: Sequence[Layer], found: LayerSpans) -> None:
    """What skips bring to stages, each once, and what goes to each layer."""
    taken: dict[tuple[int, float], int] = {}
    for number, layer in enumerate(layers):
        behind = slice(number + 1, None)
        for skip in layer.takes:
            source, size = skip
            before = taken.get(skip, source)
            found.brought.add(slice(before + 1, number + 1), behind, size)
            taken[skip] = number
            found.given.add(slice(0, source + 1), slice(source + 1, number + 1), size)
