"""A model's layers as numbers, and what of their memory a stage of some keeps.

What a layer keeps for its backward, others may keep as well: an output that its own
layer reads again is the next one's input. So memory has numbers, and a stage keeps each
number once::

    layer      conv     relu     conv
    reads      0        1        1           three layers keep 0 and 1
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count

from pipeproof.sched.errors import ParameterError

Pieces = tuple[tuple[int, float], ...]
"""Pieces of memory: their numbers and bytes."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Which memory a layer uses, beyond how much; for one micro-batch.

    Attributes:
        input: what it is called with.
        kept: what its backward reads.
        left: what W reads of that, once I has run.
        beside: what skip connections bring it.
    """

    input: Pieces
    kept: Pieces
    left: Pieces
    beside: Pieces = ()


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, for one micro-batch.

    Attributes:
        forward: time; recomputing takes the same.
        backward: time of the whole backward, or of its two halves together.
        weights: bytes that are always there: parameters, gradients, optimizer.
        activations: bytes that it keeps for its backward, and that no layer before
            it kept; its input's if it `keeps_input`.
        input: bytes of what it is called with.
        keeps_input: whether these are among the `activations`. A stage's first
            layer has its input in memory in any case.
        output: bytes of what it returns.
        takes: earlier layers of the model from which a skip connection comes, by
            number, each with its bytes.
        memory: which memory that is; default as the numbers above say, all of it
            left for W.
        loss: what follows the last layer, and is neither cut off nor chosen for
            recomputation by itself: as a layer.
    """

    forward: float
    backward: float
    weights: float = 0
    activations: float = 0
    input: float = 0
    keeps_input: bool = True
    output: float = 0
    takes: tuple[tuple[int, float], ...] = ()
    memory: Memory | None = None
    loss: Layer | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of a stage, for one micro-batch.

    Attributes:
        full: of all activations, the stage's input included.
        stored: what a forward keeps of them where an R will run some layers again.
        rebuilt: what that R adds.
        left: what W reads of all activations, beside the stage's input.
        input: the stage's input.
        skips: what skip connections bring from other stages.
    """

    full: float
    stored: float
    rebuilt: float
    left: float
    input: float
    skips: float


def with_memory(layers: Sequence[Layer]) -> list[Memory]:
    """The memory of each layer; of one that does not say, memory of its own.

    Raises:
        ParameterError: one that keeps its input and less than that.
    """
    fresh = count(-1, -1)
    result = []
    for number, layer in enumerate(layers):
        if layer.memory is not None:
            result.append(layer.memory)
            continue
        entry = ((next(fresh), layer.input),)
        kept: Pieces = ((next(fresh), layer.activations),)
        if layer.keeps_input:
            if layer.activations < layer.input:
                raise ParameterError(
                    f"layer {number} of its stage keeps its input of {layer.input:,} "
                    f"bytes, and activations of {layer.activations:,} in all: these "
                    "include it (or keeps_input=False)"
                )
            kept = ((kept[0][0], layer.activations - layer.input), *entry)
        beside = tuple((next(fresh), size) for _, size in layer.takes)
        result.append(Memory(entry, kept, kept, beside))
    return result


def brought(layers: Sequence[Layer], start: int) -> dict[int, float]:
    """What comes to a stage of these layers: its input, and skips of other stages.

    Args:
        layers: of the stage.
        start: number of the first in the whole model.
    """
    memories = with_memory(layers)
    came = dict(memories[0].input)
    for layer, memory in zip(layers, memories):
        for (source, _), piece in zip(layer.takes, memory.beside):
            if source < start:
                came |= (piece,)
    return came


def kept(layers: Sequence[Layer], again: Collection[int], start: int = 0) -> Kept:
    """What a stage of these layers keeps.

    Args:
        layers: of the stage.
        again: those that its R runs again, by place; all for a whole stage's.
        start: number of the first in the whole model.
    """
    memories = with_memory(layers)
    chosen = [place in again for place in range(len(layers))]
    if (loss := layers[-1].loss) is not None:
        memories += with_memory([loss])
        chosen.append(all(chosen))
    came, entry = brought(layers, start), dict(memories[0].input)
    full, left, stored = dict(came), dict[int, float](), dict(came)
    rebuilt, region = 0.0, dict[int, float]()
    before = False
    for memory, yes in zip(memories, chosen):
        full |= memory.kept
        left |= memory.left
        if not yes:
            stored |= memory.kept
        else:
            if not before:
                stored |= memory.input
                region = dict(memory.input)
            stored |= memory.beside
            region |= memory.beside
            rebuilt += sum(size for at, size in memory.kept if at not in region)
            region |= memory.kept
        before = yes
    return Kept(
        full=sum(full.values()),
        stored=sum(stored.values()),
        rebuilt=rebuilt,
        left=sum(size for at, size in left.items() if at not in came),
        input=sum(entry.values()),
        skips=sum(came.values()) - sum(entry.values()),
    )


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Of each stage, the number of its first layer."""
    return [0, *accumulate(sizes)][:-1]


def stages_of(layers: Sequence[Layer], sizes: Sequence[int]) -> Iterator[list[Layer]]:
    """The layers of each stage."""
    start = 0
    for size in sizes:
        yield list(layers[start : start + size])
        start += size
