"""The measured trace: the same type, the same instructions."""

from __future__ import annotations

import numpy as np
import torch
from models import mlp
from torch.nn import functional

from pipeproof.exec import Pipeline
from pipeproof.sched import Trace, catalog, recompute
from pipeproof.sim import simulate


def measured() -> Trace:
    schedule = recompute(catalog.make("1f1b", devices=3, micro_batches=4), "always")
    pipeline = Pipeline(mlp(3), schedule, functional.mse_loss)
    x = torch.ones(8, 4, dtype=torch.float64)
    pipeline.step(x, x, record=True)
    return pipeline.trace


def test_it_times_what_is_simulated() -> None:
    trace = measured()
    predicted = simulate(trace.program)

    assert trace.source == "measured"
    assert predicted.program is trace.program
    assert trace.peak_activations == predicted.peak_activations
    assert trace.notes == ("all devices share one processor",)
    assert trace.peak_bytes is None


def test_times_follow_the_program() -> None:
    trace = measured()

    assert (trace.start <= trace.end).all()
    assert (np.diff(trace.start) >= 0).all()
    assert (trace.end[:-1] <= trace.start[1:]).all()
    waits = trace.program.waits_for
    assert (trace.end[waits.values] <= trace.start[waits.owner]).all()
    assert 0 < trace.bubble_fraction < 1
    assert sum(trace.busy) <= trace.makespan


def test_a_step_that_is_not_recorded_leaves_the_trace_alone() -> None:
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    pipeline = Pipeline(mlp(2), schedule, functional.mse_loss)
    x = torch.ones(4, 4, dtype=torch.float64)
    pipeline.step(x, x, record=True)
    first = pipeline.trace
    pipeline.step(x, x)

    assert pipeline.trace is first
