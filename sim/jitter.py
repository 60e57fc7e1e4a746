"""How long steps take when ops do not always take equally long.

Each run multiplies the duration of each op by a factor of its own, of mean 1 and a
given standard deviation; and, where there are stragglers, those of a device that is
one in this run by a slowdown. Devices wait for each other, so the mean step gets
longer though the mean op does not: a makespan is convex in the durations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Program, Schedule, lower
from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.exact import Number, is_number, plain
from pipeproof.sim.cluster import Cluster
from pipeproof.sim.cost import Cost
from pipeproof.sim.many import simulate_many
from pipeproof.sim.predict import simulate
from pipeproof.sim.timing import Timing

Distribution = Literal["lognormal", "gamma", "uniform"]

QUANTILES = (0.05, 0.5, 0.95, 0.99)

DRAWN_AT_ONCE = 2**22
"""Factors, 32 MiB of them."""

WIDEST = 1 / math.sqrt(3)
"""The standard deviation of the uniform distribution from 0 to 2."""


@dataclass(frozen=True, eq=False)
class Jitter:
    """The makespans of many runs, in the cost's unit of time.

    Attributes:
        distribution: of an op's factor; its mean is 1.
        sigma: its standard deviation.
        straggler_chance, straggler_slowdown: as in `jitter`.
        seed: that was drawn from.
        usual: the makespan without jitter and stragglers.
        makespan: float64 of shape (runs,).
        idle: float64 of shape (runs, devices): makespan - busy time.
    """

    distribution: Distribution
    sigma: float
    straggler_chance: float
    straggler_slowdown: float
    seed: int
    usual: Number
    makespan: NDArray[np.float64]
    idle: NDArray[np.float64]

    @property
    def runs(self) -> int:
        """How many there were."""
        return len(self.makespan)

    def quantiles(self, at: Sequence[float] = QUANTILES) -> dict[float, float]:
        """Of the makespan, interpolated linearly between runs.

        Raises:
            ParameterError: not from 0 to 1.
        """
        _check_quantiles(at)
        return dict(zip(at, np.quantile(self.makespan, at).tolist()))

    def idle_quantiles(
        self, at: Sequence[float] = QUANTILES
    ) -> list[dict[float, float]]:
        """Likewise of each device's idle time."""
        _check_quantiles(at)
        found = np.quantile(self.idle, at, axis=0)
        return [dict(zip(at, column)) for column in found.T.tolist()]


def _check_quantiles(at: Sequence[float]) -> None:
    for q in at:
        if not is_number(q) or not 0 <= q <= 1:
            raise ParameterError(f"quantiles lie from 0 to 1, got {q!r}")


def jitter(
    schedule: Schedule | Program,
    cost: Cost | None = None,
    cluster: Cluster | None = None,
    *,
    sigma: float = 0.0,
    distribution: Distribution = "lognormal",
    straggler_chance: float = 0.0,
    straggler_slowdown: float = 1.0,
    runs: int = 1000,
    seed: int = 0,
) -> Jitter:
    """Simulate many runs of a step, each with other durations of its ops.

    Times of links do not vary. An overlap group has one factor.

    Args:
        schedule: lowered with the default policies; a Program where others are
            wanted.
        cost: the usual durations.
        cluster: as in `simulate`, without shared links.
        sigma: standard deviation of an op's factor, drawn anew for each op and run.
        distribution: of that factor: `lognormal` has a long tail, `gamma` a shorter
            one, `uniform` none.
        straggler_chance: that a device is slow in a run, each for itself.
        straggler_slowdown: how many times as long all its ops then take.
        runs: how many.
        seed: of numpy's default generator; the same one gives the same runs.

    Raises:
        ParameterError: a number out of range, or costs that do not fit.
        UnsupportedError: transfers that share links.
    """
    _check(sigma, distribution, straggler_chance, straggler_slowdown, seed)
    at_least_one(runs=runs)
    cost, cluster = cost or Cost(), cluster or Cluster()
    program = schedule if isinstance(schedule, Program) else lower(schedule)
    usual = simulate(program, cost, cluster)
    timing = Timing.of(program, cost, cluster, usual.sizes)
    durations = timing.unscaled(timing.durations)[program.computes].astype(np.float64)
    # Two streams, so that stragglers do not change the factors of ops.
    of_ops, of_devices = map(
        np.random.default_rng, np.random.SeedSequence(seed).spawn(2)
    )
    slow = of_devices.random((runs, program.schedule.devices)) < straggler_chance
    slowdown = np.where(slow, float(straggler_slowdown), 1.0)
    device = program.device[program.computes]
    makespans, idle = [], []
    for some in _blocks(runs, len(durations)):
        shape = (len(some), len(durations))
        factors = _factors(of_ops, float(sigma), distribution, shape)
        drawn = durations * factors * slowdown[some][:, device]
        batch = simulate_many(program, drawn, cost, cluster)
        makespans.append(batch.makespan)
        idle.append(batch.makespan[:, None] - batch.busy)
    return Jitter(
        distribution,
        float(sigma),
        float(straggler_chance),
        float(straggler_slowdown),
        seed,
        plain(usual.makespan),
        np.concatenate(makespans),
        np.concatenate(idle),
    )


def _blocks(runs: int, computes: int) -> Iterator[range]:
    """Runs in blocks: what is drawn does not depend on how they are cut."""
    size = max(1, DRAWN_AT_ONCE // max(1, computes))
    return (range(first, min(first + size, runs)) for first in range(0, runs, size))


def _factors(
    generator: np.random.Generator,
    sigma: float,
    distribution: Distribution,
    shape: tuple[int, int],
) -> NDArray[np.float64]:
    """Of mean 1 and standard deviation sigma."""
    if sigma == 0:
        return np.ones(shape)
    if distribution == "uniform":
        half = sigma / WIDEST
        return generator.uniform(1 - half, 1 + half, shape)
    if distribution == "gamma":
        return generator.gamma(1 / sigma**2, sigma**2, shape)
    variance = math.log1p(sigma**2)  # of the factor's logarithm
    return generator.lognormal(-variance / 2, math.sqrt(variance), shape)


def _check(
    sigma: Any, distribution: Any, chance: Any, slowdown: Any, seed: Any
) -> None:
    if not is_number(sigma) or not 0 <= sigma < math.inf:
        raise ParameterError(
            f"sigma must be a finite standard deviation of at least 0, got {sigma!r}"
        )
    if distribution not in get_args(Distribution):
        raise ParameterError(
            f"distribution must be one of {', '.join(get_args(Distribution))}, got "
            f"{distribution!r}"
        )
    if distribution == "uniform" and sigma > WIDEST:
        raise ParameterError(
            f"a uniform factor of mean 1 is never negative up to a sigma of "
            f"{WIDEST:.4g}, got {sigma!r}: take lognormal or gamma"
        )
    if not is_number(chance) or not 0 <= chance <= 1:
        raise ParameterError(
            f"straggler_chance must be a probability from 0 to 1, got {chance!r}"
        )
    if not is_number(slowdown) or not 1 <= slowdown < math.inf:
        raise ParameterError(
            f"straggler_slowdown must be a finite factor of at least 1, got "
            f"{slowdown!r}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ParameterError(f"seed must be an integer of at least 0, got {seed!r}")
