"""Cuts of layers into stages: against every other way to cut."""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from test_contract import each_row

from pipeproof.sched import (
    Action,
    BufferKind,
    Kind,
    ParameterError,
    Program,
    Schedule,
    catalog,
    lower,
    recompute,
)
from pipeproof.sched.holdings import Held
from pipeproof.sched.holdings import holdings as held_by
from pipeproof.sched.layers import Layer, Memory, kept
from pipeproof.sched.partition import loads, partition
from pipeproof.sched.program import Buffer, Instruction
from pipeproof.sched.row import Row
from pipeproof.sched.spans import LayerSpans
from pipeproof.sched.stage_bytes import stage_bytes
from pipeproof.sched.transforms import Policy
from pipeproof.sim import cost_of_layers, simulate

ROWS = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "hanayo", "chimera", "gems")


def layer(forward: float = 1, backward: float = 2, **bytes_: float) -> Layer:
    return Layer(forward, backward, **bytes_)


def some_layers(draw: random.Random, count: int) -> list[Layer]:
    """Each is called with what the one before returns."""
    layers, entry = [], draw.randint(0, 4)
    for _ in range(count):
        keeps, output = draw.random() < 0.5, draw.randint(0, 4)
        layers.append(
            Layer(
                draw.randint(0, 9),
                draw.randint(0, 9),
                draw.randint(0, 9),
                draw.randint(0, 9) + keeps * entry,
                entry,
                keeps,
                output,
            )
        )
        entry = output
    return layers


def some_schedule(draw: random.Random) -> Schedule:
    name = draw.choice(ROWS)
    devices = draw.choice((2, 4) if name in ("chimera", "gems") else (2, 3))
    micro_batches = devices * draw.choice((1, 2)) if name != "hanayo" else devices
    schedule = catalog.make(name, devices=devices, micro_batches=micro_batches)
    policy = draw.choice(("never", "always", "except-last"))
    return schedule if policy == "never" else recompute(schedule, policy)


def cut_in_all_ways(layers: int, stages: int) -> Iterator[list[range]]:
    for inner in itertools.combinations(range(1, layers), stages - 1):
        cuts = (0, *inner, layers)
        yield [range(a, b) for a, b in itertools.pairwise(cuts)]


def busy_of(
    schedule: Schedule, device: int, layers: list[Layer], stages: list[range]
) -> float:
    """Time that a device computes, op by op."""
    busy = 0.0
    for op in schedule.row(device):
        mine = [layers[i] for i in stages[op.stage]]
        if op.kind in (Kind.F, Kind.R):
            busy += sum(x.forward for x in mine)
        if op.kind in (Kind.B, Kind.W):
            busy += sum(x.backward for x in mine)
    return busy


@dataclass(frozen=True)
class Holding:
    """What a device holds, one compute instruction after the other.

    Attributes:
        moments: of each, how many buffers of each (kind, stage).
    """

    moments: set[frozenset[tuple[tuple[BufferKind, int], int]]]

    @classmethod
    def of(
        cls, program: Program, instructions: list[Instruction], device: int
    ) -> Holding:
        """Buffers come when their receive is posted, and go when they are sent.

        A receive is posted as soon as what it waits for is done.
        """
        row = [it.index for it in instructions if it.stream == program.streams[device]]
        place = {index: n for n, index in enumerate(row)}
        before = _before(program, instructions)
        born: dict[Buffer, int] = {}
        died: dict[Buffer, int] = {}
        stashes: dict[tuple[int, int, int], Buffer] = {}
        for it in instructions:
            behind = [place[n] for n in before[it.index] if n in place]
            now = place.get(it.index, 0)
            if it.action == Action.RECV:
                now = max(behind, default=-1) + 1
            elif it.action == Action.SEND:
                now = max(behind, default=0)
            for buffer in it.writes:
                if buffer.device == device and buffer.kind in COUNTED:
                    born.setdefault(buffer, now)
                    stashes[buffer.kind == WEIGHT_STASH, *owner(buffer)] = buffer
            for buffer in it.frees:
                died[buffer] = now
        for buffer in born:  # of a split backward all counts until W
            stash = stashes.get((True, *owner(buffer)))
            if buffer.kind == ACTIVATION and stash is not None:
                died[buffer] = died[stash]
        change: dict[int, Counter[tuple[BufferKind, int]]] = defaultdict(Counter)
        for buffer, moment in born.items():
            change[moment][buffer.kind, buffer.stage] += 1
            change[died[buffer] + 1][buffer.kind, buffer.stage] -= 1
        live: Counter[tuple[BufferKind, int]] = Counter()
        moments = set()
        for moment in range(len(row)):
            live.update(change[moment])
            moments.add(frozenset((of, n) for of, n in live.items() if n))
        return cls(moments)

    def most(self, layers: list[Layer], stages: list[range]) -> float:
        """Bytes, where the layers are cut so."""
        weight: dict[tuple[BufferKind, int], float] = {}
        for number, of in enumerate(stages):
            first, last = layers[of[0]], layers[of[-1]]
            entry = first.input if number else 0
            kept = sum(layers[i].activations for i in of)
            kept += 0 if first.keeps_input else first.input
            weight |= {
                (ACTIVATION, number): kept - first.input,
                (BufferKind.INPUT, number): entry,
                (BufferKind.STORED_INPUT, number): entry,
                (BufferKind.OUTPUT, number): last.output,
                (BufferKind.OUTPUT_GRAD, number): last.output,
                (BufferKind.INPUT_GRAD, number): layers[of[0] - 1].output,
            }
        return max(
            sum(count * weight.get(of, 0) for of, count in moment)
            for moment in self.moments
        )


def _before(program: Program, instructions: list[Instruction]) -> list[set[int]]:
    """All that must be over before each one can start, however fast others are."""
    started: list[set[int]] = []
    ended: list[set[int]] = []
    last: dict[object, int] = {}
    sends = dict(zip(program.recv_of.tolist(), program.send_of.tolist()))
    for it in instructions:
        needs = [*it.waits_for, *([last[it.stream]] if it.stream in last else [])]
        last[it.stream] = it.index
        started.append(set(needs).union(*(ended[n] for n in needs)))
        ended.append(started[-1] | {it.index})
        if it.action == Action.RECV:
            ended[-1] |= ended[sends[it.index]]
    return started


@cache
def holdings(text: str) -> list[Holding]:
    """Of each device, with this schedule."""
    program = lower(Schedule.parse(text))
    instructions = list(program)
    devices = range(program.schedule.devices)
    return [Holding.of(program, instructions, device) for device in devices]


ACTIVATION, WEIGHT_STASH = BufferKind.ACTIVATION, BufferKind.WEIGHT_STASH
COUNTED = set(BufferKind) - {BufferKind.GRADIENT, BufferKind.HOST, BufferKind.TIED}


def weights_on(schedule: Schedule, device: int) -> set[int]:
    """The stages whose weights it has."""
    pipes = schedule.placement.pipes
    return {s for pipe in pipes for s, there in enumerate(pipe) if there == device}


def owner(buffer: Buffer) -> tuple[int, int, int]:
    return buffer.stage, buffer.micro_batch, buffer.slice


def test_no_other_cuts_are_better_in_a_thousand_cases() -> None:
    draw = random.Random(7)
    fitted = 0
    for _ in range(1000):
        schedule = some_schedule(draw)
        layers = some_layers(draw, schedule.stages + draw.choice((0, 1, 1, 2)))
        devices = range(schedule.devices)
        speeds = [draw.choice((0.5, 1, 1, 2)) for _ in devices]
        memory = [draw.choice((60, 120, 250, 10**6)) for _ in devices]
        holding = holdings(schedule.format())
        weighs = [weights_on(schedule, device) for device in devices]
        possible = []
        for stages in cut_in_all_ways(len(layers), schedule.stages):
            found = [
                (
                    busy_of(schedule, d, layers, stages),
                    holding[d].most(layers, stages)
                    + sum(layers[i].weights for s in weighs[d] for i in stages[s]),
                )
                for d in devices
            ]
            if all(taken <= room for (_, taken), room in zip(found, memory)):
                busy = [time / speed for (time, _), speed in zip(found, speeds)]
                possible.append((max(busy), list(map(len, stages)), busy, found))
        if not possible:
            with pytest.raises(ParameterError, match=r"no partition of .* fits"):
                partition(layers, schedule, speeds=speeds, memory=memory)
            continue

        result = partition(layers, schedule, speeds=speeds, memory=memory)

        fitted += 1
        assert result.exact
        assert result.bottleneck == result.bound == min(possible)[0]
        assert 0 not in result.sizes
        (_, _, busy, found), *_ = [p for p in possible if p[1] == list(result.sizes)]
        assert list(result.busy) == busy
        assert list(result.bytes) == [taken for _, taken in found]
    assert 300 < fitted < 1000


LINEAR = ("naive", "gpipe", "1f1b", "zb-h1", "zb-h2", "terapipe", "seq1f1b", "bpipe")
"""Rows with one stage on each device, whose neighbours are never far ahead."""


@each_row
@pytest.mark.parametrize("policy", ["never", "always", "except-last"])
@pytest.mark.parametrize("skips", [False, True])
def test_no_prediction_takes_more_bytes(row: Row, policy: Policy, skips: bool) -> None:
    """And in one line they are the predicted ones, whatever ops take."""
    draw = random.Random(f"{row.name} {policy}")
    schedule = row.generator(4, 8)
    if not schedule.has(Kind.OFFLOAD):
        schedule = recompute(schedule, policy)
    layers = some_layers(draw, 2 * schedule.stages)
    sizes = [2] * schedule.stages
    with_skips = schedule
    if skips:
        for at in range(2, len(layers)):
            sources = [n for n in range(at) if draw.random() < 0.1]
            takes = tuple((n, draw.randint(1, 9)) for n in sources)
            layers[at] = replace(layers[at], takes=takes)
        _, over = stage_bytes(layers, sizes, [()] * schedule.stages)
        with_skips = schedule.with_skips(over)
    cost = cost_of_layers(layers, sizes)

    taken = loads(layers, schedule, sizes)[1]
    for _ in range(3):
        times = [draw.randint(1, 9) for _ in sizes]
        timed = replace(cost, forward=times, input_grad=times[::-1], weight_grad=times)
        found = simulate(with_skips, timed).peak_bytes
        assert found is not None
        assert all(ours >= peak for ours, peak in zip(taken, found))
        if row.name in LINEAR and not skips:
            assert taken == list(found)


@pytest.mark.parametrize("seed", range(20))
def test_what_stages_keep_is_in_sums_over_layers(seed: int) -> None:
    """Wherever they begin and end, whatever memory their layers share."""
    draw = random.Random(seed)
    layers = sharing_layers(draw, 7)
    spans = LayerSpans.of(layers)
    for start, end in itertools.combinations(range(8), 2):
        of = kept(layers[start:end], (), start)
        ends = np.array([start]), np.array([end])
        assert spans.kept.of(*ends) == of.own
        assert spans.left.of(*ends) == of.left


def sharing_layers(draw: random.Random, count: int) -> list[Layer]:
    """Some hand on what they get, and some keep what others made."""
    layers, numbers = [], itertools.count()

    def piece() -> tuple[int, float]:
        return next(numbers), float(draw.randint(1, 9))

    outputs: list[tuple[int, float]] = []
    entry = piece()
    for at in range(count):
        output = entry if draw.random() < 0.2 else piece()
        sources = [n for n in range(at - 1) if draw.random() < 0.2]
        brought = [outputs[n] for n in sources]
        kept = [p for p in {entry, output, *brought} if draw.random() < 0.5]
        kept.append(piece())
        memory = Memory(
            (entry,),
            tuple(kept),
            tuple(p for p in kept if draw.random() < 0.5),
            tuple((p,) for p in brought),
        )
        takes = tuple((n, p[1]) for n, p in zip(sources, brought))
        layers.append(Layer(1, 2, 0, 9, entry[1], takes=takes, memory=memory))
        outputs.append(output)
        entry = output
    return layers


def test_tensors_wait_at_the_cuts() -> None:
    """Device 1 runs F2 with three activations, their inputs among them.

    Beside these are its output, the input of F3 in the fourth slot, and the gradient
    that B0 waits for.
    """
    layers = [layer(activations=10, input=1, output=1) for _ in range(4)]
    schedule = catalog.make("1f1b", devices=4, micro_batches=8)

    assert loads(layers, schedule, [1] * 4)[1] == [4 * 9 + 2, 33, 23, 12]
    free = [layer(activations=9) for _ in range(4)]
    assert loads(free, schedule, [1] * 4)[1] == [36, 27, 18, 9]


def test_a_long_layer_stands_alone() -> None:
    times = [1, 1, 1, 9, 1, 1]
    layers = [layer(forward=time, backward=0) for time in times]
    schedule = catalog.make("1f1b", devices=3, micro_batches=4)

    result = partition(layers, schedule)

    assert result.sizes == (3, 1, 2)
    assert result.busy == (12, 36, 8)


def test_the_first_device_of_1f1b_gets_fewer_layers_where_memory_is_short() -> None:
    layers = [layer(activations=10) for _ in range(8)]
    schedule = catalog.make("1f1b", devices=4, micro_batches=8)

    free = partition(layers, schedule)
    short = partition(layers, schedule, memory=60)

    assert free.sizes == (2, 2, 2, 2)
    assert free.bytes == (80, 60, 40, 20)
    assert short.sizes == (1, 2, 2, 3)
    assert short.bytes == (40, 60, 40, 30)


def test_the_turn_of_a_v_balances_what_a_line_cannot() -> None:
    """First and last layers share a device."""
    layers = [layer(forward=time, backward=0) for time in (7, 4, 4, 1)]
    schedule = catalog.make("zb-v", devices=2, micro_batches=4)

    assert partition(layers, schedule).busy == (32, 32)


def test_a_thousand_layers_on_64_devices() -> None:
    draw = random.Random(1)
    layers = [layer(draw.random(), draw.random()) for _ in range(1000)]
    schedule = catalog.make("1f1b", devices=64, micro_batches=64)

    result = partition(layers, schedule)

    assert result.exact
    assert sum(result.sizes) == 1000
    mean = 64 * sum(x.forward + x.backward for x in layers) / 64
    assert mean <= result.bottleneck < 1.1 * mean


def test_too_many_ways_give_an_answer_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = random.Random(2)
    layers = [layer(draw.random(), draw.random()) for _ in range(20)]
    schedule = catalog.make("zb-v", devices=4, micro_batches=8)
    best = partition(layers, schedule)
    module = sys.modules["pipeproof.sched.cut_search"]
    monkeypatch.setattr(module, "MOST_STATES", 3)

    some = partition(layers, schedule)

    assert not some.exact
    assert some.bound <= best.bottleneck <= some.bottleneck


def test_what_is_in_flight_follows_from_the_order() -> None:
    def kept(schedule: Schedule) -> list[float]:
        return [of.held[:, Held.KEPT].max() for of in held_by(schedule)]

    (one,) = held_by(
        recompute(catalog.make("gpipe", devices=1, micro_batches=3), "always")
    )

    assert kept(catalog.make("1f1b", devices=3, micro_batches=5)) == [3, 2, 1]
    assert (one.held[:, Held.STORED].max(), one.held[:, Held.AGAIN].max()) == (3, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speeds": [1, 0]}, "speeds must be finite and above 0"),
        ({"speeds": [1, 1, 1]}, "speeds must be one number for each of 2 devices"),
        ({"memory": -1.0}, "memory must be finite and above 0"),
        (
            {"memory": 5},
            "the one that comes closest needs 20 bytes on device 0, which has 5",
        ),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    with pytest.raises(ParameterError, match=message):
        partition([layer(activations=10)] * 2, schedule, **options)


def test_what_cannot_be_is_refused() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    with pytest.raises(ParameterError, match="1 layers cannot fill 2 stages"):
        partition([layer()], schedule)
    with pytest.raises(ParameterError, match="layer 1: forward must be a finite"):
        partition([layer(), layer(forward=-1)], schedule)
    with pytest.raises(ParameterError, match="layer 0 of its stage keeps its input of"):
        partition([layer(input=2), layer()], schedule)


def test_what_a_skip_brings_is_held_where_it_is_taken() -> None:
    """Layer 3 takes 5 bytes from layer 0, which count if that is in another stage."""
    layers = [layer(activations=10) for _ in range(3)]
    layers.append(Layer(1, 2, activations=10, takes=((0, 5),)))
    schedule = catalog.make("1f1b", devices=3, micro_batches=4)

    def bytes_of(*sizes: int) -> list[float]:
        return loads(layers, schedule, sizes)[1]

    # Of four gradients of it two have come, and four of it itself.
    assert bytes_of(1, 1, 2) == [30 + 10, 20, 20 + 20]
    assert bytes_of(1, 2, 1) == [30 + 10, 40, 10 + 20]
    one = catalog.make("1f1b", devices=1, micro_batches=4)
    assert loads(layers, one, [4])[1] == [40]
    with pytest.raises(ParameterError, match="no partition of 4 layers fits"):
        partition(layers, schedule, memory=24)


@pytest.mark.parametrize("name", ["1f1b", "zb-v", "interleaved", "bpipe"])
def test_skips_and_parked_activations_are_counted_in_the_search(name: str) -> None:
    draw = random.Random(name)
    devices = 4 if name == "bpipe" else 2
    schedule = catalog.make(name, devices=devices, micro_batches=4)
    for _ in range(20):
        count = schedule.stages + 2
        layers = [
            Layer(
                draw.randint(1, 9),
                draw.randint(1, 9),
                activations=draw.randint(2, 9),
                takes=tuple((n, draw.randint(1, 9)) for n in range(at) if n % 2),
            )
            for at in range(count)
        ]
        found = {
            tuple(map(len, stages)): loads(layers, schedule, list(map(len, stages)))
            for stages in cut_in_all_ways(count, schedule.stages)
        }
        memory = draw.choice([max(taken) for _, taken in found.values()])
        if name == "bpipe":  # where one has less, for itself and what others park
            memory = [memory, memory, memory, 0.8 * memory]
        fits = [b for b, taken in found.values() if np.all(np.array(taken) <= memory)]
        if not fits:
            with pytest.raises(ParameterError, match=r"no partition of .* fits"):
                partition(layers, schedule, memory=memory)
            continue

        result = partition(layers, schedule, memory=memory)

        assert result.bottleneck == min(map(max, fits))
        assert np.all(np.array(result.bytes) <= memory)
