"""Many predictions at once: a grid of schedules, sizes, costs and clusters.

Points that differ only in cost or cluster share one lowered program. joblib runs
them: on all cores of this machine, or wherever a `joblib.parallel_config` of the
caller says (Dask, Ray), so nothing is distributed here. A file keeps what is
done, and the same sweep goes on from there.

    sweep_points.py    what is asked
    sweep_results.py   what is answered
    sweep_file.py      the file
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

from pipeproof.sched import Program, lower
from pipeproof.sched.errors import PipeproofError, ScheduleError
from pipeproof.sim.engine import DeadlockError, Progress
from pipeproof.sim.predict import simulate
from pipeproof.sim.sweep_file import Kept
from pipeproof.sim.sweep_points import Point as Point
from pipeproof.sim.sweep_points import grid as grid
from pipeproof.sim.sweep_points import keyed, noted, one_meaning_each
from pipeproof.sim.sweep_results import Figures as Figures
from pipeproof.sim.sweep_results import Result as Result
from pipeproof.sim.sweep_results import Status as Status
from pipeproof.sim.sweep_results import columns as columns


class SweepError(PipeproofError, RuntimeError):
    """A sweep that could not be carried through."""


def sweep(
    points: Iterable[Point],
    *,
    file: str | Path | None = None,
    jobs: int | None = -1,
    progress: Progress | None = None,
    tell: Callable[[str], object] = warnings.warn,
) -> list[Result]:
    """Simulate every point.

    Args:
        points: see `grid`; a repeated one is simulated once.
        file: keeps the results, one row each, as CSV or Parquet by its name's
            end. What is in it is not computed again, so that an interrupted sweep
            goes on and a larger one starts from a smaller. In the end its rows
            are in the order of the points.
        jobs: processes, as joblib counts them: -1, one per core; 1, this one;
            None, what `joblib.parallel_config` says.
        progress: called with how many of how many points are done.
        tell: is given a sentence about anything odd but harmless in the file.

    Returns:
        A result for each point, each once, in their order; refusals included.

    Raises:
        ParameterError: one name for two costs, clusters or generators, or a file
            that holds anything but points of this sweep.
        ParseError: a file that no sweep wrote.
        SweepError: a worker process was killed.
    """
    points = list(points)
    one_meaning_each(points)
    asked, programs = keyed(points)
    kept = None if file is None else Kept.open(Path(file), asked, tell)
    found = {} if kept is None else kept.results
    report = progress or (lambda done, total: None)
    report(len(found), len(asked))
    work = _work({k: p for k, p in asked.items() if k not in found}, programs)
    with closing(_answers(work, jobs)) as answers:
        for answer in answers:
            new = {key: Result(asked[key], *how) for key, how in answer.items()}
            if kept is not None:
                kept.append(new)
            found |= new
            report(len(found), len(asked))
    results = {key: found[key] for key in asked}
    if kept is not None:
        kept.finish(results)
    return list(results.values())


Batch = dict[str, Point]
"""Key → point, of points that share a program."""

Answer = tuple[Status, Figures | None, str]
"""A Result without its point, which need not travel back."""


def _work(points: Batch, programs: Mapping[str, str]) -> list[Batch]:
    """What is to be done, the largest first so that none is left over at the end."""
    batches: dict[str, Batch] = {}
    for key, point in points.items():
        batches.setdefault(programs[key], {})[key] = point
    return sorted(
        batches.values(), key=lambda batch: -max(p.size for p in batch.values())
    )


def _answers(
    work: list[Batch], jobs: int | None
) -> Generator[dict[str, Answer], None, None]:
    """The answers as they come."""
    if not work:
        return
    from concurrent.futures.process import BrokenProcessPool

    from joblib import Parallel, delayed, effective_n_jobs
    from joblib.parallel import get_active_backend

    call = delayed(_answer)
    try:
        if get_active_backend()[0].supports_return_generator:
            parallel = Parallel(n_jobs=jobs, return_as="generator_unordered")
            with _interrupts_later():
                answers = parallel(map(call, work))
            yield from answers
        else:  # Ray's
            left, at_once = iter(work), 8 * effective_n_jobs(jobs)
            while some := list(islice(left, at_once)):
                yield from Parallel(n_jobs=jobs)(map(call, some))
    except BrokenProcessPool:
        raise SweepError(
            "a worker process was killed, probably for lack of memory: fewer jobs "
            "need less; what is done is in the file, if there is one"
        ) from None


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C is put off; processes that start meanwhile never hear it.

    The terminal sends it to all of them. This one ends the others, who would each
    print where they were.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # where it starts, Python lets signals in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(batch: Batch) -> dict[str, Answer]:
    first = next(iter(batch.values()))
    try:
        with noted(first):
            program = lower(
                first.make(),
                transfers=first.transfers,
                receives=first.receives,
                messages=first.messages,
            )
    except PipeproofError as error:
        return dict.fromkeys(batch, _without(error))
    return {key: _simulated(program, point) for key, point in batch.items()}


def _simulated(program: Program, point: Point) -> Answer:
    try:
        with noted(point):
            cost = point.cost_of(program.schedule)
            trace = simulate(program, cost, point.cluster)
        return "simulated", Figures.of(trace), ""
    except PipeproofError as error:
        return _without(error)


def _without(error: PipeproofError) -> Answer:
    broken = isinstance(error, (ScheduleError, DeadlockError))
    # One line, whatever the report looked like: a row of a file holds it.
    return "broken" if broken else "refused", None, " ".join(str(error).split())
