"""Grids of predictions, in one process or several, and the file they are kept in."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib import parallel_config, register_parallel_backend
from joblib.parallel import ThreadingBackend
from strategies import costs

from pipeproof.sched import (
    CATALOG,
    B,
    F,
    ParameterError,
    ParseError,
    Schedule,
    Trace,
    UnsupportedError,
    catalog,
    lower,
    recompute,
)
from pipeproof.sim import Cluster, Cost, DeadlockError, grid, simulate, sweep
from pipeproof.sim.sweep import Point, Result, columns

SLOW = Cluster(link_latency=1)

POINTS = grid(
    ["gpipe", "interleaved", "dualpipe"],
    [2, 3],
    [4],
    chunks=[2],
    clusters={"free": Cluster(), "slow": SLOW},
)


FEW = POINTS[1::3]
"""One of them refused, and some that share a program with none."""


def swept(points: list[Point], **how: Any) -> list[Result]:
    """In this process, and without a word."""
    return sweep(points, jobs=1, **{"tell": pytest.fail, **how})


class Interrupted:
    """A progress that stops a sweep once so many points are done."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, done: int, total: int) -> None:
        if done >= self.at:
            raise KeyboardInterrupt


def test_a_table() -> None:
    rows = columns(swept(POINTS))

    names = ["schedule", "devices", "options", "cluster", "makespan"]
    names += ["bubble_fraction", "peak_activations", "max_peak_activations"]
    assert list(zip(*(rows[name] for name in names))) == [
        ("gpipe", 2, "", "free", 15, 1 / 5, (4, 4), 4),
        ("gpipe", 2, "", "slow", 17, 5 / 17, (4, 4), 4),
        ("gpipe", 3, "", "free", 18, 1 / 3, (4, 4, 4), 4),
        ("gpipe", 3, "", "slow", 22, 5 / 11, (4, 4, 4), 4),
        ("interleaved", 2, "chunks=2", "free", 13.5, 1 / 9, (2.5, 1.5), 2.5),
        ("interleaved", 2, "chunks=2", "slow", 21, 3 / 7, (2.5, 1.5), 2.5),
        ("interleaved", 3, "chunks=2", "free", 18.5, 13 / 37, (4, 3, 2), 4),
        ("interleaved", 3, "chunks=2", "slow", 32, 5 / 8, (4, 3, 2), 4),
        ("dualpipe", 2, "", "free", 12, 0, (3, 3), 3),
        ("dualpipe", 2, "", "slow", 15, 1 / 5, (3, 3), 3),
        ("dualpipe", 3, "", "free", None, None, None, None),
        ("dualpipe", 3, "", "slow", None, None, None, None),
    ]
    assert rows["status"] == ["simulated"] * 10 + ["refused"] * 2
    assert rows["reason"][-1].startswith("dualpipe needs an even number of devices")


@pytest.mark.parametrize("generator", [True, False])
def test_a_backend_of_your_own_does_the_work(generator: bool) -> None:
    """As Dask's, which gives results as they come, and Ray's, which does not."""
    done: list[int] = []

    class Counting(ThreadingBackend):  # type: ignore[misc]
        supports_return_generator = generator

        def submit(self, *args: Any, **given: Any) -> Any:
            done.append(1)
            return super().submit(*args, **given)

    register_parallel_backend("counting", Counting)
    with parallel_config(backend="counting", n_jobs=2):
        found = sweep(POINTS, tell=pytest.fail)

    assert columns(found) == columns(swept(POINTS))
    assert done


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(CATALOG)),
    sizes=st.tuples(st.integers(0, 4), st.integers(1, 8)),
    cost=costs,
    policy=st.sampled_from([None, "always"]),
    late=st.booleans(),
)
def test_a_point_is_one_simulation(
    name: str, sizes: tuple[int, int], cost: Cost, policy: Any, late: bool
) -> None:
    p, m = sizes
    (point,) = grid(
        [name],
        [p],
        [m],
        recompute=[policy],
        receives=["late" if late else "early"],
        costs={"drawn": cost},
        clusters={"slow": SLOW},
    )

    (result,) = swept([point])

    def alone() -> Trace:
        schedule = catalog.make(name, devices=p, micro_batches=m)
        if policy is not None:
            schedule = recompute(schedule, policy)
        return simulate(lower(schedule, receives=point.receives), cost, SLOW)

    if result.status == "refused":
        with pytest.raises((ParameterError, UnsupportedError)) as caught:
            alone()
        assert result == Result(
            point, "refused", reason=" ".join(str(caught.value).split())
        )
        return
    trace = alone()
    assert result.status == "simulated"
    assert result.figures is not None
    for metric in ("makespan", "span", "ideal", "bubble_fraction", "bubble_ratio"):
        assert getattr(result.figures, metric) == float(getattr(trace, metric))
    assert result.figures.span_bubble == float(trace.span_bubble)
    assert result.figures.peak_activations == tuple(map(float, trace.peak_activations))


def test_a_cost_made_for_each_schedule(tmp_path: Path) -> None:
    """Of a model that is cut finer, a device has less to do."""

    def whole(schedule: Schedule) -> Cost:
        if schedule.devices > 4:
            raise ParameterError("the model has four layers")
        return Cost(*[Fraction(12, schedule.devices)] * 3)

    points = grid(["1f1b"], [1, 2, 4, 5], [3], costs={"whole": whole})

    results = swept(points, file=tmp_path / "rows.csv")

    times = [result.figures and result.figures.makespan for result in results]
    assert times == [36 * 3, 18 * 4, 9 * 6, None]
    assert results[-1].reason == "the model has four layers"
    assert swept(points, file=tmp_path / "rows.csv") == results


def test_options_go_to_the_schedules_that_have_them() -> None:
    points = grid(["1f1b", "interleaved"], [2], [4], chunks=[None, 2, 3])

    assert [(p.name, p.options) for p in points] == [
        ("1f1b", {}),
        ("interleaved", {}),
        ("interleaved", {"chunks": 2}),
        ("interleaved", {"chunks": 3}),
    ]


def test_processes_find_what_one_process_finds(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.csv", tmp_path / "together.csv"

    def mine(devices: int, micro_batches: int) -> Schedule:
        return catalog.make("gpipe", devices=devices, micro_batches=micro_batches)

    points = [*POINTS, *grid([mine], [2], [1])]

    one = swept(points, file=alone)
    two = sweep(points, file=together, jobs=2)

    assert one == two
    assert alone.read_bytes() == together.read_bytes()


def test_a_repeated_point_is_simulated_once() -> None:
    assert swept([*POINTS, *POINTS]) == swept(POINTS)


# What interruptions leave behind.


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Result], Path]:
    """A whole sweep and its file."""
    path = tmp_path_factory.mktemp("sweep") / "fresh.csv"
    return swept(FEW, file=path), path


@given(data=st.data())
def test_a_file_cut_anywhere_is_gone_on_with(
    fresh: tuple[list[Result], Path], data: st.DataObject
) -> None:
    results, path = fresh
    header, *rows = path.read_bytes().splitlines(keepends=True)
    content = header + b"".join(data.draw(st.permutations(rows)))
    cut = content[: data.draw(st.integers(0, len(content)))]
    torn = path.with_name("torn.csv")
    torn.write_bytes(cut)
    told: list[str] = []
    done: list[int] = []

    again = swept(
        FEW,
        file=torn,
        tell=told.append,
        progress=lambda some, total: done.append(some),
    )

    assert again == results
    assert torn.read_bytes() == path.read_bytes()
    assert done[0] == max(cut.count(b"\n") - 1, 0)
    assert len(told) == (cut != b"" and not cut.endswith(b"\n"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_an_interrupted_sweep_goes_on(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(KeyboardInterrupt):
        swept(POINTS, file=path, progress=Interrupted(at=4))
    done: list[int] = []

    results = swept(POINTS, file=path, progress=lambda some, total: done.append(some))

    assert done[0] == 4
    assert results == swept(POINTS)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert swept(POINTS, file=path, progress=Interrupted(at=99)) == results


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_larger_sweep_starts_from_a_smaller(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    swept(POINTS[5:7], file=path)

    assert swept(POINTS, file=path) == swept(POINTS)


def test_parquet_has_columns_of_numbers(tmp_path: Path) -> None:
    import pyarrow.parquet

    swept(POINTS, file=tmp_path / "rows.parquet")

    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pydict()
    assert table["devices"][:4] == [2, 2, 3, 3]
    assert table["bubble_fraction"][:2] == [0.2, 5 / 17]
    assert table["peak_activations"][4] == [2.5, 1.5]
    assert table["makespan"][-1] is None


def test_a_row_longer_than_a_reader_of_csv_expects(tmp_path: Path) -> None:
    """csv bounds a cell at 131,072 characters; one lists every device."""
    reader = importlib.import_module("csv")
    bound = reader.field_size_limit(20)
    try:
        swept(POINTS, file=tmp_path / "rows.csv")
        assert swept(POINTS, file=tmp_path / "rows.csv") == swept(POINTS)
        assert reader.field_size_limit() == 20
    finally:
        reader.field_size_limit(bound)


# What is refused, and what is wrong.


def put(old: str, new: str) -> Callable[[str], str]:
    """A change to a file's text, of the first place."""
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda text: "a,b\n1,2\n", ParseError, "line 1 is not the header of a sweep"),
        (put("devices", "p"), ParseError, "line 1 is not the header of a sweep"),
        (put("\ngpipe", "\ngpipe,1"), ParseError, "line 2 is not a row of a sweep"),
        (put(",17.0,", ",seventeen,"), ParseError, "line 2 is not a row of a sweep"),
        (put('"[4.0', '"{4.0'), ParseError, "line 2 is not a row of a sweep"),
        (put(",4.0,", ",5.0,"), ParseError, r"row of gpipe\(devices=2.* edited"),
        (put("simulated", "done"), ParseError, r"row of gpipe\(devices=2.* edited"),
        (put("simulated", "refused"), ParseError, r"row of gpipe\(devices=2.* edited"),
    ],
)
def test_a_file_that_no_sweep_wrote(
    fresh: tuple[list[Result], Path],
    change: Callable[[str], str],
    error: type[Exception],
    message: str,
) -> None:
    text = change(fresh[1].read_text())
    path = fresh[1].with_name("changed.csv")
    path.write_text(text)

    with pytest.raises(error, match=message):
        swept(FEW, file=path)
    assert path.read_text() == text


def test_a_file_of_another_sweep(fresh: tuple[list[Result], Path]) -> None:
    path = fresh[1].with_name("other.csv")
    before = fresh[1].read_bytes() + b"half a li"
    path.write_bytes(before)

    with pytest.raises(ParameterError) as caught:
        swept(FEW[2:], file=path)
    assert str(caught.value) == (
        f"{path}: 2 of its 4 rows belong to another sweep. The first is "
        "gpipe(devices=2, micro_batches=4, cost=default, cluster=slow): this sweep "
        "does not ask for it. Nothing was changed; name another file"
    )
    assert path.read_bytes() == before


def test_another_cost_under_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    swept(grid(["1f1b"], [2], [4], costs={"mine": Cost(forward=2)}), file=path)

    with pytest.raises(ParameterError, match="another cost, cluster or generator"):
        swept(grid(["1f1b"], [2], [4], costs={"mine": Cost(forward=3)}), file=path)


def test_a_generator_whose_code_has_changed(tmp_path: Path) -> None:
    def before(devices: int, micro_batches: int) -> Schedule:
        return catalog.make("gpipe", devices=devices, micro_batches=micro_batches)

    def after(devices: int, micro_batches: int) -> Schedule:
        return catalog.make("1f1b", devices=devices, micro_batches=micro_batches)

    path = tmp_path / "rows.csv"
    swept(grid([before], [2], [4]), file=path)
    before.__name__, after.__name__ = "after", "before"

    with pytest.raises(ParameterError, match="another cost, cluster or generator"):
        swept(grid([after], [2], [4]), file=path)


def test_parquet_of_something_else(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    path.write_text("nothing of the kind")
    with pytest.raises(ParseError, match="not Parquet"):
        swept(POINTS, file=path)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), path)
    with pytest.raises(ParseError, match="not the columns of a sweep"):
        swept(POINTS, file=path)


def test_parquet_without_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(ParameterError, match=r"pip install 'pipeproof\[parquet\]'"):
        swept(POINTS, file=tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid(["nope"], [2], [4]), "no schedule is called 'nope'"),
        (lambda: grid("1f1b", [2], [4]), r"schedules takes several values: \['1f1b'\]"),
        (
            lambda: grid(["1f1b"], 2, [4]),  # type: ignore[arg-type]
            r"devices takes several values: \[2\], got 2",
        ),
        (
            lambda: grid(["1f1b", "gpipe"], [2], [4], chunks=[2]),
            "chunks: none of these schedules takes it",
        ),
        (
            lambda: swept(
                grid(["1f1b"], [2], [4], costs={"a": Cost()})
                + grid(["gpipe"], [2], [4], costs={"a": Cost(forward=2)})
            ),
            "two of the sweep's costs are called 'a'",
        ),
        (
            lambda: swept(grid(["1f1b"], [2], [4], costs={"a\nb": Cost()})),
            "name must be printable",
        ),
        (lambda: swept(POINTS, file="rows.txt"), "ends in .csv or .parquet"),
        (
            lambda: swept([Point("1f1b", 2, 4, {"of": object()})]),
            "a sweep cannot tell <object object",
        ),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        call()


def test_a_result_beyond_floating_point_is_a_refusal() -> None:
    (result,) = swept(grid(["1f1b"], [2], [4], costs={"huge": Cost(forward=10**308)}))

    assert result.status == "refused"
    assert "beyond the range of floating point" in result.reason


def test_a_broken_schedule_is_told_apart_from_a_refused_one() -> None:
    def backwards(devices: int, micro_batches: int) -> Schedule:
        return Schedule.of([[B(0, 0), F(0, 0)]])

    (result,) = swept(grid([backwards], [1], [1]))

    assert (result.status, result.figures) == ("broken", None)
    assert "B0 runs before its own F0" in result.reason
    assert "\n" not in result.reason


def test_so_is_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object) -> None:
        raise DeadlockError("nothing can go on")

    module = importlib.import_module("pipeproof.sim.sweep")
    monkeypatch.setattr(module, "simulate", hang)

    (result,) = swept(grid(["1f1b"], [2], [4]))

    assert (result.status, result.reason) == ("broken", "nothing can go on")


def test_a_fault_says_at_which_point() -> None:
    def faulty(devices: int, micro_batches: int) -> Schedule:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        swept(grid([faulty], [2], [4]))
    assert "'schedule': 'faulty', 'devices': 2" in caught.value.__notes__[0]


WORKERS = """
import signal

from joblib import Parallel, delayed

from pipeproof.sim.sweep import _interrupts_later


def blocked():
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


if __name__ == "__main__":
    parallel = Parallel(n_jobs=2, return_as="generator_unordered")
    with _interrupts_later():
        answers = parallel(delayed(blocked)() for _ in range(4))
    print(*answers, blocked())
"""


def test_workers_never_hear_control_c(tmp_path: Path) -> None:
    """In a process of its own, whose first workers they are."""
    path = tmp_path / "workers.py"
    path.write_text(WORKERS)
    ran = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=60
    )

    assert ran.stdout.split() == ["True"] * 4 + ["False"], ran.stderr
