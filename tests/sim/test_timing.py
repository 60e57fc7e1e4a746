"""One number type for all times of a program, and none of them rounded."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pipeproof.sched import Action, ParameterError, catalog, lower
from pipeproof.sim import Cluster, Cost, Link, simulate
from pipeproof.sim.timing import Timing

PROGRAM = lower(catalog.make("gpipe", devices=2, micro_batches=2))


def timing(cost: Cost, cluster: Cluster) -> Timing:
    return Timing.of(PROGRAM, cost, cluster, cost.sizes(PROGRAM))


@pytest.mark.parametrize(
    ("forward", "latency", "dtype", "scale"),
    [
        (2, 1, np.int32, 1),
        (Fraction(1, 6), Fraction(3, 4), np.int32, 12),
        (2**30, 1, np.int64, 1),
        (2**62, 1, object, 1),
        (Fraction(1, 2**63), 1, object, 2**63),
        (2, 0.5, np.float64, None),
        (0.5, Fraction(1, 4), np.float64, None),
    ],
)
def test_exact_times_are_whole_multiples(
    forward: Any, latency: Any, dtype: Any, scale: int | None
) -> None:
    found = timing(Cost(forward=forward), Cluster(link_latency=latency))
    takes = found.unscaled(found.durations)[PROGRAM.computes[0]]

    assert (found.durations.dtype, found.latencies.dtype) == (dtype, dtype)
    assert found.scale == scale
    assert takes == forward
    assert set(found.unscaled(found.latencies).tolist()) == {latency}


def test_numbers_that_nothing_uses_do_not_count() -> None:
    """A recompute that never runs, a link that carries nothing."""
    cost = Cost(recompute=0.5)
    unused = Cluster(links={(0, 3): Link(0.5)})

    assert timing(cost, unused).durations.dtype == np.int32


def test_sends_and_copies_take_the_time_of_their_bytes() -> None:
    found = timing(Cost(boundary_bytes=[6, 1]), Cluster(link_bandwidth=4))
    sends = PROGRAM.action == Action.SEND

    assert found.unscaled(found.durations)[sends].tolist() == [Fraction(3, 2)] * 4
    with pytest.raises(ParameterError, match="a link bandwidth needs bytes to send"):
        timing(Cost(), Cluster(link_bandwidth=4))


def test_times_beyond_floating_point_are_exact() -> None:
    """One was once turned into a float to see whether it is finite."""
    one = catalog.make("gpipe", devices=1, micro_batches=2)
    time = 10**400

    assert simulate(one, Cost(time, time, 0)).makespan == 4 * time
