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
from math import fsum

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
        beside: what skip connections bring it, for each that the layer takes.
    """

    input: Pieces
    kept: Pieces
    left: Pieces
    beside: tuple[Pieces, ...] = ()

    @property
    def skips(self) -> Pieces:
        """All that skip connections bring it."""
        return tuple(piece for of in self.beside for piece in of)


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
        own: of all activations, beside what comes to the stage.
        left: what W reads of these.
        input: the stage's input.
        skips: what skip connections bring from other stages.
    """

    full: float
    stored: float
    rebuilt: float
    own: float
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
        beside = tuple(((next(fresh), size),) for _, size in layer.takes)
        result.append(Memory(entry, kept, kept, beside))
    return result


def with_loss(layers: Sequence[Layer]) -> list[Layer]:
    """Layers, and behind the last the loss, where it has one."""
    loss = layers[-1].loss
    return [*layers] if loss is None else [*layers, loss]


def brought(
    memories: Sequence[Memory], layers: Sequence[Layer], start: int
) -> dict[int, float]:
    """What comes to a stage of these layers: its input, and skips of other stages.

    Args:
        memories: of the layers.
        layers: of the stage.
        start: number of the first in the whole model.
    """
    came = dict(memories[0].input)
    for layer, memory in zip(layers, memories):
        for (source, _), pieces in zip(layer.takes, memory.beside):
            if source < start:
                came |= pieces
    return came


def kept(layers: Sequence[Layer], again: Collection[int], start: int = 0) -> Kept:
    """What a stage of these layers keeps.

    Args:
        layers: of the stage.
        again: those that its R runs again, by place; all for a whole stage's.
        start: number of the first in the whole model.
    """
    memories = with_memory(with_loss(layers))
    chosen = [place in again for place in range(len(layers))]
    whole = all(chosen)
    chosen += [whole] * (len(memories) - len(layers))
    came, entry = brought(memories, layers, start), dict(memories[0].input)
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
            stored |= memory.skips
            region |= memory.skips
            rebuilt += sum(size for at, size in memory.kept if at not in region)
            region |= memory.kept
        before = yes
    # Exactly rounded, so that a part never is more than the whole.
    own, left_own = (
        fsum(size for at, size in of.items() if at not in came) for of in (full, left)
    )
    if whole:  # whose forward makes no graph, and stores what has come
        stored, rebuilt = came, own
    return Kept(
        full=sum(full.values()),
        stored=sum(stored.values()),
        rebuilt=rebuilt,
        own=own,
        left=left_own,
        input=sum(entry.values()),
        skips=sum(came.values()) - sum(entry.values()),
    )


def over_skips(
    layers: Sequence[Layer], sizes: Sequence[int]
) -> dict[tuple[int, int], float]:
    """Of each pair of stages that skips lead from and to, the bytes that go there.

    What goes to the next stage goes there beside the output.

    Args:
        layers: of the whole model.
        sizes: layers in each stage.
    """
    stage_of = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    found: dict[tuple[int, int], dict[tuple[int, float], float]] = {}
    for number, layer in enumerate(layers):
        for source, size in layer.takes:
            pair = stage_of[source], stage_of[number]
            if pair[0] < pair[1]:
                found.setdefault(pair, {})[source, size] = size
    return {pair: sum(found[pair].values()) for pair in sorted(found)}


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Of each stage, the number of its first layer."""
    return [0, *accumulate(sizes)][:-1]


def stages_of(layers: Sequence[Layer], sizes: Sequence[int]) -> Iterator[list[Layer]]:
    """The layers of each stage."""
    start = 0
    for size in sizes:
        yield list(layers[start : start + size])
        start += size
