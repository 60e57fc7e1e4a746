"""The published rules of order, stepped through one op at a time.

Generators cut ranges out of columns; here each rule is told as its paper tells it,
as what a device does next, and the two must agree on every op.
"""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeproof.sched import Kind, Op, Schedule, catalog

small, batches, parts = st.integers(1, 6), st.integers(1, 16), st.integers(1, 3)


def follows(schedule: Schedule, device: int, rule: Iterator[Op]) -> None:
    assert list(schedule.row(device)) == list(rule)


def one_by_one(forward: list[Op], backward: list[Op], warmup: int) -> Iterator[Op]:
    """Some forwards; then one forward, one backward; then the backwards left."""
    forwards, backwards = iter(forward), iter(backward)
    for done, op in enumerate(forwards, start=1):
        yield op
        if done > warmup:
            yield next(backwards)
    yield from backwards


@given(p=small, m=batches)
def test_one_f_one_b_and_eager(p: int, m: int) -> None:
    for name, each in (("1f1b", 1), ("eager-1f1b", 2)):
        schedule = catalog.make(name, devices=p, micro_batches=m)
        for d in range(p):
            forward, backward = (
                [Op(k, d, i) for i in range(m)] for k in (Kind.F, Kind.B)
            )
            follows(schedule, d, one_by_one(forward, backward, each * (p - 1 - d)))


@given(p=small, groups=st.integers(1, 3), v=parts)
def test_interleaved(p: int, groups: int, v: int) -> None:
    """A table of groups of p, chunk by chunk; backwards with the chunks reversed."""
    m = p * groups
    schedule = catalog.make("interleaved", devices=p, micro_batches=m, chunks=v)
    table = [
        (chunk, group * p + i)
        for group in range(groups)
        for chunk in range(v)
        for i in range(p)
    ]
    for d in range(p):
        forward = [Op(Kind.F, d + p * chunk, i) for chunk, i in table]
        backward = [Op(Kind.B, d + p * (v - 1 - chunk), i) for chunk, i in table]
        warmup = (v - 1) * p + 2 * (p - 1 - d)
        follows(schedule, d, one_by_one(forward, backward, warmup))


@pytest.mark.parametrize(("name", "each"), [("seq1f1b", 1), ("slimpipe", 2)])
@given(p=small, m=batches, q=parts)
def test_slices(name: str, each: int, p: int, m: int, q: int) -> None:
    schedule = catalog.make(name, devices=p, micro_batches=m, slices=q)
    for d in range(p):
        forward = [Op(Kind.F, d, i, part) for i in range(m) for part in range(q)]
        backward = [
            Op(Kind.B, d, i, q - 1 - part) for i in range(m) for part in range(q)
        ]
        follows(schedule, d, one_by_one(forward, backward, each * (p - 1 - d) + q - 1))


def zero_bubble(d: int, m: int, warmup: int, room: int) -> Iterator[Op]:
    """F, I, and a W whenever so many forwards lack theirs; then I and W in turn."""
    done: Counter[Kind] = Counter()

    def next_(kind: Kind) -> Op:
        done[kind] += 1
        return Op(kind, d, done[kind] - 1)

    while done[Kind.F] < m:
        yield next_(Kind.F)
        if done[Kind.F] > warmup:
            yield next_(Kind.I)
            if done[Kind.F] - done[Kind.W] >= room:
                yield next_(Kind.W)
    while done[Kind.W] < m:
        if done[Kind.I] < m:
            yield next_(Kind.I)
        yield next_(Kind.W)


@given(p=small, more=st.integers(0, 10))
def test_zero_bubble(p: int, more: int) -> None:
    h1 = catalog.make("zb-h1", devices=p, micro_batches=p + more)
    h2 = catalog.make("zb-h2", devices=p, micro_batches=2 * p - 1 + more)
    for d in range(p):
        follows(h1, d, zero_bubble(d, p + more, p - 1 - d, p))
        most = 2 * p - 1
        follows(h2, d, zero_bubble(d, most + more, 2 * (p - 1 - d), most))


@given(p=small, more=st.integers(0, 10))
def test_zb_v(p: int, more: int) -> None:
    """Warm-up, three parts of it; a steady round while there are forwards; drain."""
    m = 2 * p - 1 + more
    schedule = catalog.make("zb-v", devices=p, micro_batches=m)
    for d in range(p):
        rounds = "F0 " * (2 * (p - d) - 1) + "F1 F0 " * d + "F1 I1 W1 " * (p - d)
        rounds += "F0 I0 W0 F1 I1 W1 " * (m - (2 * (p - d) - 1) - d)
        rounds += "I0 W0 F1 I1 W1 " * (p - d - 1)
        rounds += "I0 I1 " * d + "I0 W0 " * (p - d)
        rounds += "W1 " * m + "W0 " * m  # those that are left
        done: Counter[str] = Counter()
        rule = []
        for word in rounds.split():
            if done[word] < m:
                stage = d if word[1] == "0" else 2 * p - 1 - d
                rule.append(Op(Kind[word[0]], stage, done[word]))
                done[word] += 1
        follows(schedule, d, iter(rule))
