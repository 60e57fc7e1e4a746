"""Many runs of one step with other durations."""

import math
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import schedules, sizes

from pipeproof.sched import ParameterError, Schedule, UnsupportedError, catalog, lower
from pipeproof.sim import Cluster, Cost, jitter, simulate, simulate_many


def one_f_one_b(p: int, m: int) -> Schedule:
    return catalog.make("1f1b", devices=p, micro_batches=m)


# Pictures


def test_a_straggler_in_every_run() -> None:
    """All devices twice as slow, links as before."""
    cluster = Cluster(link_latency=1)
    found = jitter(
        one_f_one_b(2, 3),
        cluster=cluster,
        straggler_chance=1,
        straggler_slowdown=2,
        runs=2,
    )
    slow = simulate(one_f_one_b(2, 3), Cost(2, 2, 2), cluster)

    assert found.usual == simulate(one_f_one_b(2, 3), Cost(), cluster).makespan
    assert found.makespan.tolist() == [slow.makespan] * 2
    assert found.idle.tolist() == [[slow.makespan - busy for busy in slow.busy]] * 2


def test_each_device_is_slow_for_itself() -> None:
    """So four makespans occur: none slow, either, or both."""
    found = jitter(
        one_f_one_b(2, 3), straggler_chance=0.5, straggler_slowdown=3, runs=64
    )
    costs = [Cost([f, s], [f, s], [f, s]) for f in (1, 3) for s in (1, 3)]
    expected = {simulate(one_f_one_b(2, 3), cost).makespan for cost in costs}

    assert set(found.makespan.tolist()) == expected


def test_the_mean_step_is_longer_though_the_mean_op_is_not() -> None:
    found = jitter(one_f_one_b(4, 8), Cost(3, 2, 1), sigma=0.2, runs=300)

    assert found.usual < found.makespan.mean()
    assert list(found.quantiles()) == [0.05, 0.5, 0.95, 0.99]
    assert sorted(found.quantiles().values()) == list(found.quantiles().values())


# Laws


@settings(max_examples=20)
@given(
    schedule=schedules(micro_batches=3),
    distribution=st.sampled_from(["lognormal", "gamma", "uniform"]),
)
def test_no_jitter_is_what_simulate_says(schedule: Schedule, distribution: Any) -> None:
    """Whole numbers, however a device's share of them is cut, are exact floats."""
    cost = Cost(360, 240, 120)
    cluster = Cluster(link_latency=2, speeds={0: 0.5})
    run = simulate(schedule, cost, cluster)
    found = jitter(schedule, cost, cluster, distribution=distribution, runs=3)

    assert found.runs == 3
    assert found.makespan.tolist() == [run.makespan] * 3
    idle = [run.makespan - busy for busy in run.busy]
    assert found.idle.tolist() == [idle] * 3
    assert set(found.quantiles().values()) == {run.makespan}
    assert [q[0.5] for q in found.idle_quantiles()] == idle


@settings(max_examples=20)
@given(seed=st.integers(0, 2**64), p=sizes)
def test_a_seed_draws_the_same_runs(seed: int, p: int) -> None:
    some = {"sigma": 0.3, "straggler_chance": 0.5, "straggler_slowdown": 2}
    first = jitter(one_f_one_b(p, 3), seed=seed, runs=4, **some)  # type: ignore[arg-type]
    again = jitter(one_f_one_b(p, 3), seed=seed, runs=4, **some)  # type: ignore[arg-type]
    other = jitter(one_f_one_b(p, 3), seed=seed + 1, runs=4, **some)  # type: ignore[arg-type]

    assert first.makespan.tolist() == again.makespan.tolist()
    assert first.idle.tolist() == again.idle.tolist()
    assert first.makespan.tolist() != other.makespan.tolist()


def test_runs_do_not_depend_on_how_many_are_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["pipeproof.sim.jitter"]  # by name it is the function
    many = jitter(one_f_one_b(2, 3), sigma=0.3, runs=10)
    monkeypatch.setattr(module, "DRAWN_AT_ONCE", 30)
    few = jitter(one_f_one_b(2, 3), sigma=0.3, runs=10)

    assert few.makespan.tolist() == many.makespan.tolist()


@pytest.mark.parametrize("distribution", ["lognormal", "gamma", "uniform"])
@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_factors_have_mean_one_and_the_standard_deviation(
    distribution: Any, sigma: float
) -> None:
    """One device, one op a run: its makespan is the factor."""
    runs = 20_000
    found = jitter(
        one_f_one_b(1, 1),
        Cost(1, 0, 0),
        sigma=sigma,
        distribution=distribution,
        runs=runs,
    )

    # Five standard errors of each; of the deviation roughly.
    near = 5 * sigma / math.sqrt(runs)
    assert found.makespan.mean() == pytest.approx(1, abs=near)
    assert found.makespan.std() == pytest.approx(sigma, abs=4 * near)
    assert (found.makespan > 0).all()


def test_each_run_is_one_simulation() -> None:
    program = lower(one_f_one_b(2, 3))
    found = jitter(program, sigma=0.3, runs=3)
    generator = np.random.default_rng(np.random.SeedSequence(0).spawn(2)[0])
    variance = math.log1p(0.3**2)
    factors = generator.lognormal(-variance / 2, math.sqrt(variance), (3, 12))
    usual = np.array(Cost().durations(program), dtype=float)

    batch = simulate_many(program, usual * factors)
    assert found.makespan.tolist() == batch.makespan.tolist()


# Refusals


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"sigma": -1}, "sigma must be a finite standard deviation of at least 0, got"),
        ({"sigma": math.inf}, "sigma must be a finite standard deviation"),
        ({"distribution": "normal"}, "lognormal, gamma, uniform, got 'normal'"),
        (
            {"sigma": 0.6, "distribution": "uniform"},
            r"up to a sigma of 0.5774, got 0.6: take lognormal or gamma",
        ),
        ({"straggler_chance": 1.1}, "a probability from 0 to 1, got 1.1"),
        ({"straggler_slowdown": 0.5}, "a finite factor of at least 1, got 0.5"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": True}, "seed must be an integer of at least 0, got True"),
    ],
)
def test_refuses(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        jitter(one_f_one_b(2, 2), **given_)


def test_refuses_a_quantile() -> None:
    found = jitter(one_f_one_b(2, 2), runs=1)
    for ask in (found.quantiles, found.idle_quantiles):
        with pytest.raises(ParameterError, match=r"from 0 to 1, got 50"):
            ask([50])


def test_refuses_links_that_are_shared() -> None:
    cluster = Cluster(link_bandwidth=1, nic_bandwidth=1, devices_per_node=2)
    schedule = catalog.make("interleaved", devices=4, micro_batches=4, chunks=2)
    with pytest.raises(UnsupportedError, match="share a network card"):
        jitter(schedule, Cost(boundary_bytes=1), cluster)
