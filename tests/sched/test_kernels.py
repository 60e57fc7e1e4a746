import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeproof.sched import catalog, check, kernels, lower
from pipeproof.sched.kernels import gathered, levels, numbered
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


pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), max_size=12)


@settings(max_examples=20)
@given(blocks=st.lists(pairs, min_size=1, max_size=3))
def test_grouped_in_the_order_given(blocks: list[list[tuple[int, int]]]) -> None:
    """Compiled and plain, from blocks of pairs of any length."""
    columns = [
        tuple(np.array(block, dtype=np.int32).reshape(-1, 2).T) for block in blocks
    ]
    every = [pair for block in blocks for pair in block]
    expected = [[value for row, value in every if row == r] for r in range(5)]
    for limit in (kernels.COMPILE_FROM, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "COMPILE_FROM", limit)
            offsets, values = gathered(5, columns, np.int32)
        assert values.dtype == np.int32
        assert [part.tolist() for part in np.split(values, offsets[1:-1])] == expected


@given(keys=st.lists(st.integers(0, 9) | st.integers(0, 999)))
def test_numbered_as_unique_does(keys: list[int]) -> None:
    different, place = numbered(np.array(keys, dtype=np.int64))

    assert different.tolist() == sorted(set(keys))
    assert different[place].tolist() == keys


def test_works_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COMPILE_FROM", 0)
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    kernels._compiled.cache_clear()
    schedule = catalog.make("1f1b", devices=3, micro_batches=5)

    assert check(schedule).ok
    assert simulate(lower(schedule)).makespan == 3 * (5 + 3 - 1)
    kernels._compiled.cache_clear()
