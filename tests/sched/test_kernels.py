import dataclasses
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import near_valid, schedules, stepping, whole_language

from pipeproof.sched import Kind, Program, Schedule, catalog, check, kernels, lower
from pipeproof.sched.kernels import csr, levels
from pipeproof.sim import simulate

graphs = st.integers(1, 12).flatmap(
    lambda nodes: st.tuples(
        st.just(nodes),
        st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1))),
    )
)


def of(nodes: int, edges: list[tuple[int, int]]) -> list[int]:
    before, after = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    return levels(nodes, before, after).tolist()


def test_a_diamond_and_a_cycle_with_a_tail() -> None:
    assert of(4, [(0, 1), (0, 2), (1, 3), (2, 3)]) == [0, 1, 1, 2]
    assert of(5, [(0, 1), (1, 2), (2, 1), (2, 3)]) == [0, -1, -1, -1, 0]


@given(graph=graphs)
def test_level_is_the_longest_path(graph: tuple[int, list[tuple[int, int]]]) -> None:
    nodes, edges = graph
    drawn = nx.DiGraph(edges)
    drawn.add_nodes_from(range(nodes))
    looped = {n for ring in nx.simple_cycles(drawn) for n in ring}
    stuck = looped.union(*(nx.descendants(drawn, n) for n in looped))
    free = drawn.subgraph(set(drawn) - stuck)
    expected = {
        n: nx.dag_longest_path_length(free.subgraph(nx.ancestors(free, n) | {n}))
        for n in free
    }

    assert of(nodes, edges) == [expected.get(n, -1) for n in range(nodes)]


@settings(max_examples=20)
@given(graph=graphs)
def test_compiled_and_plain_agree(graph: tuple[int, list[tuple[int, int]]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "COMPILE_FROM", 0)
        compiled = of(*graph)
    assert compiled == of(*graph)


@settings(max_examples=20)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), max_size=12))
def test_grouped_in_the_order_given(pairs: list[tuple[int, int]]) -> None:
    row, value = np.array(pairs, dtype=np.int32).reshape(-1, 2).T
    expected = [[value for row, value in pairs if row == r] for r in range(5)]
    for limit in (kernels.COMPILE_FROM, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "COMPILE_FROM", limit)
            offsets, values = csr(5, row.copy(), value.copy())
        assert values.dtype == np.int32
        assert [part.tolist() for part in np.split(values, offsets[1:-1])] == expected


def columns_of(program: Program) -> list[list[Any]]:
    lists = program.waits_for, program.reads, program.writes, program.frees
    columns = [program.stream, program.action, program.first_op, program.op_count]
    columns += [program.message, program.messages, program.buffers]
    return [c.tolist() for c in columns] + [some.to_lists() for some in lists]


@settings(max_examples=20)
@given(
    schedule=whole_language(),
    transfers=st.sampled_from(["overlapped", "blocking"]),
    receives=st.sampled_from(["early", "late"]),
)
def test_programs_are_the_same_compiled(
    schedule: Schedule, transfers: Any, receives: Any
) -> None:
    policy = {"transfers": transfers, "receives": receives}
    plain = columns_of(lower(schedule, **policy))
    peaks = simulate(schedule).peak_activations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "COMPILE_FROM", 0)
        again = dataclasses.replace(schedule)  # without what is worked out already

        assert columns_of(lower(again, **policy)) == plain
        assert simulate(again).peak_activations == peaks


@given(
    schedule=schedules(linear=True)
    | whole_language()
    | stepping()
    | near_valid()
    | near_valid(whole_language())
    | near_valid(stepping())
)
def test_the_quick_look_and_the_rules_agree(schedule: Schedule) -> None:
    """Clean for one is clean for the other, and they tell the same levels."""
    quick = schedule.clean_levels
    judged = dataclasses.replace(schedule)
    judged.__dict__["clean_levels"] = None
    summed = len(schedule.placement.pipes) > 1 or schedule.has(Kind.REDUCE)

    if schedule.has(Kind.STEP) and (summed or schedule.ties):
        assert quick is None  # what waits for sums is left to the rules
    else:
        assert (quick is not None) == judged.report.ok
    if quick is not None:
        assert quick.tolist() == judged.level_of_node.tolist()


def test_works_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    kernels._compiled.cache_clear()
    schedule = catalog.make("1f1b", devices=3, micro_batches=5)

    assert check(schedule).ok
    assert simulate(lower(schedule)).makespan == 3 * (5 + 3 - 1)
    kernels._compiled.cache_clear()


@given(
    lengths=st.lists(st.sampled_from([0, 1, 63, 300_001]), max_size=5),
    kinds=st.lists(st.sampled_from(["i1", "i4", "f8"]), min_size=5, max_size=5),
)
def test_columns_side_by_side_do_not_touch(
    lengths: list[int], kinds: list[str]
) -> None:
    """Whether they share a piece of memory or are too small for one."""
    wanted = list(zip(lengths, kinds))
    made = kernels.columns(*wanted)
    for number, column in enumerate(made):
        column[:] = number

    assert [(len(column), column.dtype) for column in made] == [
        (length, np.dtype(kind)) for length, kind in wanted
    ]
    assert all((column == number).all() for number, column in enumerate(made))
    assert all(column.flags.aligned and column.flags.writeable for column in made)


def test_columns_of_objects_hold_objects() -> None:
    large, small = kernels.columns((10**6, np.int64), (2, object))
    small[:] = [2**100, None]

    assert small.tolist() == [2**100, None]
    assert len(large) == 10**6
