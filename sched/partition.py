"""Where to cut a model's layers, so that the busiest device is least busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeproof.sched.cut_loads import Question
from pipeproof.sched.cut_search import MOST_STATES, Search
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.ir import Schedule
from pipeproof.sched.layers import Layer


@dataclass(frozen=True, slots=True)
class Partition:
    """A model's layers in stages.

    Attributes:
        sizes: layers in each stage.
        busy: time that each device computes in a step.
        bytes: weights, activations and tensors on their way, on each device when it
            has most.
        exact: whether no partition has a smaller bottleneck; False only where more
            than `MOST_STATES` ways to cut had to be compared.
        bound: time of the busiest device below which no partition comes: the
            bottleneck itself where that is exact.
    """

    sizes: tuple[int, ...]
    busy: tuple[float, ...]
    bytes: tuple[float, ...]
    exact: bool
    bound: float

    @property
    def bottleneck(self) -> float:
        """Time that the busiest device computes in a step."""
        return max(self.busy)


def partition(
    layers: Sequence[Layer],
    schedule: Schedule,
    *,
    speeds: Sequence[float] | None = None,
    memory: float | Sequence[float] | None = None,
) -> Partition:
    """The cuts into stages with the least busy busiest device.

    A device is busy with all its stages: with its share of the forwards,
    recomputations and backwards that the schedule gives it. Its memory is that of
    its stages' weights and of as many activations and stored inputs of each as the
    schedule keeps at once, and of the tensors that wait at the cuts, or for the end of
    a skip connection: as many as the schedule's program has receives posted, and sends
    not done, at once, however soon other devices are. So no simulation with free links
    takes more, whatever ops take. What another device offloads here is there for as
    long as it may be. Where each device has one stage of a model without skips, they
    take as much; with several, what waits may be less, for that depends on all cuts.
    `fit_recompute` says what given cuts take. The batch is not counted, nor what an op
    needs only while it runs.

    Where each device has one stage, time and space grow little faster than the
    schedule's ops: with 1F1B, 256 devices and 512 micro-batches take 2 seconds, 1024
    and 1024 half a minute and 2 GiB. With several on each, more cuts are compared.

    Args:
        layers: in order, at least as many as stages.
        schedule: which device runs what, and how often.
        speeds: of each device, relative to that of the layers' times; default all 1.
        memory: bytes of each device, or of each single one; default no limit.

    Raises:
        ParameterError: fewer layers than stages, numbers that are none or negative,
            speeds or memory for another number of devices, or no partition fits.
        UnsupportedError: a schedule that is not lowered to a program yet.
    """
    question = Question(layers, schedule, speeds, memory)
    cuts, exact = Search(
        question.time, question.caps, question.least, question.work
    ).best()
    if cuts is None and not exact:
        raise ParameterError(
            f"more than {MOST_STATES:,} ways to cut {len(layers)} layers would have to "
            "be compared, and none was found that fits: join layers, or give the "
            "devices more memory"
        )
    if cuts is None:
        raise ParameterError(_too_small(question))
    sizes = tuple(int(size) for size in np.diff(cuts))
    busy = tuple(float(x) for x in question.time.of(cuts).max(axis=1))
    taken = tuple(float(x) for x in question.bytes.of(cuts).max(axis=1))
    return Partition(sizes, busy, taken, exact, max(busy) if exact else question.least)


def loads(
    layers: Sequence[Layer], schedule: Schedule, sizes: Sequence[int]
) -> tuple[list[float], list[float]]:
    """What given cuts ask of each device: its time in a step, and most bytes at once.

    Args:
        layers: as for `partition`.
        schedule: likewise.
        sizes: layers in each stage.

    Raises:
        ParameterError: sizes that are not those of the layers in the stages.
    """
    check_sizes(sizes, layers, schedule)
    question = Question(layers, schedule, None, None)
    cuts = np.concatenate([[0], np.cumsum(sizes)])
    busy, taken = question.time.of(cuts), question.bytes.of(cuts)
    return busy.max(axis=1).tolist(), taken.max(axis=1).tolist()


def check_sizes(
    sizes: Sequence[int], layers: Sequence[Layer], schedule: Schedule
) -> None:
    """Refuse sizes of other stages than the schedule's, or of other layers.

    Raises:
        ParameterError: says what they must be.
    """
    if len(sizes) != schedule.stages or sum(sizes) != len(layers) or min(sizes) < 1:
        raise ParameterError(
            f"sizes must be {schedule.stages} numbers of at least 1, one for each "
            f"stage, that sum to {len(layers)} layers, got {list(sizes)}"
        )


def _too_small(question: Question) -> str:
    """Why no partition fits, with what would."""
    assert question.caps is not None
    asked, limits = question.caps
    relative = asked.relative_to(limits)
    cuts, _ = Search(relative, None, 1.0, None).best()
    assert cuts is not None
    share = relative.of(cuts).max(axis=1)
    device = int(np.argmax(share))
    needed = float(asked.of(cuts)[device].max())
    return (
        f"no partition of {asked.layers} layers fits: the one that "
        f"comes closest needs {needed:,.0f} bytes on device {device}, which has "
        f"{limits[device]:,.0f}: use more devices, recomputation, or a schedule "
        "with fewer activations at once"
    )
