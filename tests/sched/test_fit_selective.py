"""The layers that run again: against every other choice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from pipeproof.sched import (
    POLICIES,
    Kind,
    Layer,
    Memory,
    ParameterError,
    Schedule,
    catalog,
    check,
    fit_recompute,
    fit_selective,
    recompute,
)
from pipeproof.sched.fit_recompute import selective_loads
from pipeproof.sched.layers import kept
from pipeproof.sched.partition import loads
from pipeproof.sim import cost_of_layers, simulate


def layer(number: int, forward: float, inside: float, *, reads: str) -> Layer:
    """A layer whose input is piece `number` of memory, of 2 bytes.

    Args:
        number: of the layer.
        forward: time; its backward takes twice as long.
        inside: bytes that only it reads.
        reads: what else: `i` for its input, `o` for its output.
    """
    pieces = [(100 + number, inside)]
    pieces += [(number, 2.0)] * ("i" in reads) + [(number + 1, 2.0)] * ("o" in reads)
    memory = Memory(((number, 2.0),), tuple(pieces), ())
    size = sum(bytes_ for _, bytes_ in pieces)
    return Layer(forward, 2 * forward, 1, size, 2, "i" in reads, 2, memory=memory)


def some_layers(draw: random.Random, count: int, *, loss: bool) -> list[Layer]:
    found = [
        layer(n, draw.randint(1, 9), draw.randint(0, 9), reads=draw.choice("-io") + "i")
        if draw.random() < 0.5
        else layer(n, draw.randint(1, 9), draw.randint(0, 9), reads=draw.choice("-o"))
        for n in range(count)
    ]
    if loss:
        behind = layer(count, 1, 3, reads="i")
        last = found[-1]
        found[-1] = Layer(
            last.forward,
            last.backward,
            last.weights,
            last.activations,
            last.input,
            last.keeps_input,
            memory=last.memory,
            loss=behind,
        )
    return found


def busy_of(
    schedule: Schedule,
    device: int,
    stages: Sequence[Sequence[Layer]],
    again: Sequence[Sequence[int]],
) -> float:
    """Time that a device computes, op by op."""
    busy = 0.0
    for op in schedule.row(device):
        layers, chosen = list(stages[op.stage]), set(again[op.stage])
        if layers[-1].loss is not None:
            if len(chosen) == len(layers):
                chosen.add(len(layers))
            layers.append(layers[-1].loss)
        if op.kind == Kind.F:
            busy += sum(x.forward for x in layers)
        if op.kind == Kind.R:
            busy += sum(layers[place].forward for place in chosen)
        if op.kind in (Kind.B, Kind.W):
            busy += sum(x.backward for x in layers)
    return busy


def bytes_of(
    schedule: Schedule,
    layers: Sequence[Layer],
    sizes: Sequence[int],
    again: Sequence[Sequence[int]],
) -> list[float]:
    """As the simulator predicts them."""
    return list(simulate(schedule, cost_of_layers(layers, sizes, again)).peak_bytes)


def all_choices(
    schedule: Schedule, sizes: Sequence[int], free: Sequence[int]
) -> Iterator[tuple[Schedule, list[tuple[int, ...]]]]:
    """Every policy and every set of layers of the stages that are free."""
    subsets: list[list[tuple[int, ...]]] = [[()] for _ in sizes]
    for stage in free:
        places = range(sizes[stage])
        subsets[stage] = [
            c for n in range(len(places) + 1) for c in itertools.combinations(places, n)
        ]
    for some in itertools.product(POLICIES, repeat=len(free)):
        policies = ["never"] * len(sizes)
        for stage, policy in zip(free, some):
            policies[stage] = policy
        again = recompute(schedule, policies)
        for chosen in itertools.product(*subsets):
            yield again, list(chosen)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-v", "chimera"])
def test_no_other_choice_fits_with_less_time(name: str) -> None:
    draw = random.Random(name)
    proven = 0
    for _ in range(3):
        schedule = catalog.make(name, devices=2, micro_batches=4)
        sizes = [1, 1, 2, 1] if name == "zb-v" else [draw.randint(1, 2), 2]
        layers = some_layers(draw, sum(sizes), loss=draw.random() < 0.5)
        cuts = list(itertools.accumulate(sizes, initial=0))
        stages = [layers[a:b] for a, b in itertools.pairwise(cuts)]
        full = bytes_of(schedule, layers, sizes, [()] * len(sizes))
        # Device 1 has room for all, unless it chooses together with device 0.
        devices = [0, 1] if name == "chimera" else [0]
        memory = [draw.uniform(0.5, 1.0) * full[0], 1000.0]
        if name == "chimera":
            memory[1] = memory[0]
        free = [s for s, d in enumerate(schedule.placement.pipes[0]) if d in devices]
        best = float("inf")
        for again, chosen in all_choices(schedule, sizes, free):
            taken = bytes_of(again, layers, sizes, chosen)
            if all(a <= b for a, b in zip(taken, memory)):
                asked = [busy_of(again, d, stages, chosen) for d in devices]
                best = min(best, max(asked))
        try:
            found = fit_selective(schedule, layers, sizes, memory)
        except ParameterError:
            assert best == float("inf")
            continue

        assert check(found.schedule).ok
        taken = bytes_of(found.schedule, layers, sizes, found.layers)
        assert list(found.bytes) == pytest.approx(taken)
        assert all(a <= b for a, b in zip(taken, memory))
        busy = [busy_of(found.schedule, d, stages, found.layers) for d in (0, 1)]
        assert list(found.busy) == busy
        assert selective_loads(layers, found.schedule, sizes, found.layers) == (
            busy,
            list(found.bytes),
        )
        proven += found.exact
        if found.exact:
            assert max(busy[d] for d in devices) == best
    assert proven


def test_the_cheap_and_large_ones_run_again() -> None:
    """As attention's core in Korthikanti et al.: most of the bytes, little time."""
    block = [
        layer(0, 10, 10, reads="i"),
        layer(1, 1, 50, reads="i"),
        layer(2, 10, 10, reads="i"),
    ]
    schedule = catalog.make("gpipe", devices=1, micro_batches=4)

    found = fit_selective(schedule, block, [3], memory=172)

    assert found.layers == ((1,),)
    # The batch, which is the first layer's input, is there in any case.
    assert found.bytes == (3 + 4 * (10 + 10 + 2 * 2) + 50,)
    # The last micro-batch keeps all: nothing else is there any more.
    assert found.busy == (4 * 63 + 3 * 1,)
    assert fit_recompute(schedule, block, [3], memory=172).has(Kind.R)
    whole = loads(block, fit_recompute(schedule, block, [3], memory=172), [3])
    assert whole[0] > list(found.busy)


def test_what_fits_as_it_is_stays_as_it_is() -> None:
    layers = [layer(n, 1, 5, reads="i") for n in range(4)]
    schedule = catalog.make("1f1b", devices=2, micro_batches=4)

    found = fit_selective(schedule, layers, [2, 2], memory=1000)

    assert found.schedule == schedule
    assert found.layers == ((), ())


def test_a_stage_of_many_layers() -> None:
    """Fifty that differ, and half of their memory."""
    draw = random.Random(5)
    layers = [
        layer(n, draw.uniform(1, 2), draw.uniform(1, 2), reads="i") for n in range(50)
    ]
    schedule = catalog.make("1f1b", devices=2, micro_batches=4)
    memory = max(loads(layers, schedule, [25, 25])[1]) * 0.7

    found = fit_selective(schedule, layers, [25, 25], memory)

    whole = loads(layers, fit_recompute(schedule, layers, [25, 25], memory), [25, 25])
    assert found.exact
    assert max(found.bytes) <= memory
    assert found.busy[0] < 0.95 * whole[0][0]


def test_what_a_stage_keeps_is_counted_once() -> None:
    """The first layer's output is the second's input, and both read it."""
    layers = [layer(0, 1, 3, reads="o"), layer(1, 1, 5, reads="i")]

    whole, second = kept(layers, ()), kept(layers, (1,))

    assert (whole.full, whole.stored, whole.rebuilt) == (2 + 3 + 2 + 5, 12, 0)
    assert (second.stored, second.rebuilt) == (2 + 3 + 2, 5)
    assert kept(layers, (0, 1)).stored == 2


@pytest.mark.parametrize("seed", range(10))
def test_what_is_left_is_no_more_than_what_is_kept(seed: int) -> None:
    """However sums of floats are rounded: it was a part of 1.0000000000000002."""
    draw = random.Random(seed)
    layers = [
        Layer(1, 2, 0, draw.random() + 1, draw.random(), output=draw.random())
        for _ in range(60)
    ]
    for size in (1, 2, 3, 5, 10):
        cost = cost_of_layers(layers, [size] * (60 // size))
        assert max(cost.weight_grad_memory) <= 1


def test_refusals() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    layers = [layer(n, 1, 5, reads="i") for n in range(2)]
    with pytest.raises(ParameterError, match="it needs at least 12 bytes, and has 5"):
        fit_selective(schedule, layers, [1, 1], memory=[100, 5])
    with pytest.raises(ParameterError, match="keeps its input of 4 bytes, and act"):
        fit_selective(schedule, [Layer(1, 1, 0, 3, 4)] * 2, [1, 1], memory=100)
