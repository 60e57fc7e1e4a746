"""Why devices idled in a measured step."""

from __future__ import annotations

import pytest
import torch
from models import mlp
from torch.nn import functional

from pipeproof.exec import Pipeline
from pipeproof.sched import Trace, catalog
from pipeproof.sched.gaps import Cause


def measured() -> Trace:
    schedule = catalog.make("1f1b", devices=3, micro_batches=4)
    pipeline = Pipeline(mlp(3), schedule, functional.mse_loss)
    x = torch.ones(8, 4, dtype=torch.float64)
    pipeline.step(x, x, record=True)
    return pipeline.trace


def test_gaps_and_work_fill_the_measured_time() -> None:
    trace = measured()

    for device in range(3):
        gaps = trace.gaps(device)
        idle = float(sum(gap.duration for gap in gaps))
        assert trace.busy[device] + idle == pytest.approx(trace.makespan)
        assert sum(trace.gaps().blame()[device].values()) == pytest.approx(idle)
        assert all(gap.explain(trace) for gap in gaps)
    assert float(sum(trace.critical_parts.by_name().values())) == pytest.approx(
        trace.makespan
    )


def test_stages_on_one_processor_wait_for_it() -> None:
    """Device 1 begins when device 0 lets go of the processor, not before."""
    trace = measured()
    first = trace.gaps(1)[0]

    assert first.cause == Cause.FILL
    assert trace.program.label(first.waits_for).startswith("0F")
    causes = set(trace.gaps().cause.tolist())
    assert Cause.PROCESSOR in causes
    assert not causes & {Cause.SEND, Cause.RELOAD, Cause.REDUCE, Cause.PARTNER}
