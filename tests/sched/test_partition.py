"""Cuts of layers into stages: against every other way to cut."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator

import pytest

from pipeproof.sched import Kind, ParameterError, Schedule, catalog, recompute
from pipeproof.sched.in_flight import in_flight
from pipeproof.sched.layers import Layer
from pipeproof.sched.partition import partition

ROWS = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "hanayo", "chimera", "gems")


def layer(forward: float = 1, backward: float = 2, **bytes_: float) -> Layer:
    return Layer(forward, backward, **bytes_)


def some_layers(draw: random.Random, count: int) -> list[Layer]:
    return [
        Layer(
            draw.randint(0, 9),
            draw.randint(0, 9),
            draw.randint(0, 9),
            draw.randint(0, 9),
            draw.randint(0, 4),
            draw.random() < 0.5,
        )
        for _ in range(count)
    ]


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


def walked(
    schedule: Schedule, device: int, layers: list[Layer], stages: list[range]
) -> tuple[float, float]:
    """Busy time and most bytes of a device, op by op."""
    again = {op[1:] for op in schedule.ops if op.kind == Kind.R}
    busy, live = 0.0, {}
    held = {
        stage
        for pipe in schedule.placement.pipes
        for stage, there in enumerate(pipe)
        if there == device
    }
    weights = sum(layers[i].weights for s in held for i in stages[s])
    most = weights
    for op in schedule.row(device):
        mine = [layers[i] for i in stages[op.stage]]
        kept = sum(x.activations for x in mine)
        kept += 0 if mine[0].keeps_input else mine[0].input
        if op.kind in (Kind.F, Kind.R):
            busy += sum(x.forward for x in mine)
            recomputed = op.kind == Kind.F and op[1:] in again
            live[op[1:]] = mine[0].input if recomputed else kept
        if op.kind in (Kind.B, Kind.W):
            busy += sum(x.backward for x in mine)
        most = max(most, weights + sum(live.values()))
        if op.kind in (Kind.B, Kind.W):
            del live[op[1:]]
    return busy, most


def test_no_other_cuts_are_better_in_a_thousand_cases() -> None:
    draw = random.Random(7)
    fitted = 0
    for _ in range(1000):
        schedule = some_schedule(draw)
        layers = some_layers(draw, schedule.stages + draw.choice((0, 1, 1, 2)))
        devices = range(schedule.devices)
        speeds = [draw.choice((0.5, 1, 1, 2)) for _ in devices]
        memory = [draw.choice((60, 120, 250, 10**6)) for _ in devices]
        possible = []
        for stages in cut_in_all_ways(len(layers), schedule.stages):
            found = [walked(schedule, d, layers, stages) for d in devices]
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
    # The package's own name for it is the function.
    module = sys.modules["pipeproof.sched.partition"]
    monkeypatch.setattr(module, "MOST_STATES", 3)

    some = partition(layers, schedule)

    assert not some.exact
    assert some.bound <= best.bottleneck <= some.bottleneck


def test_what_is_in_flight_follows_from_the_order() -> None:
    counts = in_flight(catalog.make("1f1b", devices=3, micro_batches=5))
    one = catalog.make("gpipe", devices=1, micro_batches=3)
    again = in_flight(recompute(one, "always"))

    assert [peak[:, 0].max() for peak in counts.peaks] == [3, 2, 1]
    assert counts.forwards.tolist() == [[5, 0, 0], [0, 5, 0], [0, 0, 5]]
    assert again.peaks[0].tolist() == [[[0], [3], [1]], [[0], [3], [0]]]
    assert again.forwards.tolist() == [[6]]


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


def test_fewer_layers_than_stages_are_refused() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    with pytest.raises(ParameterError, match="1 layers cannot fill 2 stages"):
        partition([layer()], schedule)
    with pytest.raises(ParameterError, match="layer 1: forward must be a finite"):
        partition([layer(), layer(forward=-1)], schedule)
