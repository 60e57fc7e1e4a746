"""Links through shared memory: what goes in comes out, in order, and no more stays."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore, Store

from pipeproof.exec import RankError, neighbours
from pipeproof.exec.neighbours import AT, MET, Meeting, ring_from, ring_to
from pipeproof.exec.rings import (
    FIRST_SIZE,
    KEPT,
    LARGE,
    LINE,
    Passing,
    RingIn,
    RingOut,
    Shared,
)
from pipeproof.sched import ParameterError

pytestmark = pytest.mark.skipif(
    not hasattr(os, "eventfd"), reason="this system has no memory of several processes"
)
RINGS: list[Callable[[Meeting], Any]] = [ring_to, ring_from]


def never() -> None:
    pytest.fail("what is there needs no waiting for")


def connected() -> tuple[RingOut, RingIn]:
    """Both ends, in this process."""
    here, there = socket.socketpair()
    return RingOut(Shared.new(here), 1), RingIn(Shared.receive(there), 0)


def numbered(number: int, size: int) -> torch.Tensor:
    return (torch.arange(size) + number).to(torch.uint8)


sizes = st.one_of(
    st.integers(1, 4 * LINE),
    st.integers(1, 3 * FIRST_SIZE),
    st.sampled_from([FIRST_SIZE // 2 - LINE, FIRST_SIZE - 2 * LINE, FIRST_SIZE]),
)
SEND, POST, WAIT = range(3)


@given(st.lists(st.tuples(st.sampled_from([SEND, SEND, POST, WAIT]), sizes)))
def test_what_is_sent_arrives_in_order(steps: list[tuple[int, int]]) -> None:
    """Whatever is under way, posted, or waited for out of turn."""
    out, into = connected()
    under_way: list[int] = []
    most = 0
    sent: list[torch.Tensor] = []
    posted: list[tuple[torch.Tensor, Passing]] = []

    for what, size in steps:
        if what == SEND:
            sent.append(numbered(len(sent), size))
            assert out.send(sent[-1]).ended > 0
        elif what == POST and len(posted) < len(sent):
            row = torch.empty_like(sent[len(posted)])
            posted.append((row, into.receive(row)))
        elif posted:
            posted[size % len(posted)][1].wait(never)
        arrived = sum(passing.ended > 0 for _, passing in posted)
        under_way = [LINE + -(-len(row) // LINE) * LINE for row in sent[arrived:]]
        most = max(most, sum(under_way))
    for _, passing in posted[::-1]:
        passing.wait(never)

    for row, (found, passing) in zip(sent, posted):
        assert torch.equal(found, row)
        assert passing.error is None
    assert into._size <= out._size <= max(FIRST_SIZE, 4 * (most + 2 * LINE))


def test_a_ring_is_used_again_and_grows_with_what_is_under_way() -> None:
    """Four messages at a time, of which three fill the first ring."""
    out, into = connected()
    size = FIRST_SIZE // 4
    for step in range(5):
        rows = [torch.empty(size, dtype=torch.uint8) for _ in range(4)]
        for number in range(4):
            out.send(numbered(step + number, size))
        for number, row in enumerate(rows):
            into.receive(row).wait(never)
            assert torch.equal(row, numbered(step + number, size))

    assert out._size == into._size == 2 * FIRST_SIZE
    assert os.fstat(out._shared.memory).st_size == 3 * FIRST_SIZE
    kept = os.fstat(out._shared.memory).st_blocks * 512
    assert kept <= 2 * FIRST_SIZE, "the first ring's memory was given back"


def test_a_large_ring_keeps_only_what_is_under_way() -> None:
    """After steps of many large messages all of them stayed in memory."""
    out, into = connected()
    size = 2 * LARGE + 3
    for _ in range(2):
        for number in range(KEPT // LARGE):
            out.send(numbered(number, size))
        for number in range(KEPT // LARGE):
            row = torch.empty(size, dtype=torch.uint8)
            into.receive(row).wait(never)
            assert torch.equal(row, numbered(number, size))

        kept = os.fstat(out._shared.memory).st_blocks * 512
        assert into._size > KEPT
        assert kept <= KEPT // LARGE * 2 * mmap.PAGESIZE


def test_the_receiver_learns_when_a_message_was_there() -> None:
    """The sender writes it down, by the clock that both read."""
    out, into = connected()
    row = torch.empty(8)

    sent = out.send(torch.arange(8.0))
    received = into.receive(row)
    received.wait(never)

    assert sent.ended == received.ended > 0
    assert row.tolist() == list(range(8))


def test_who_waits_looks_for_failures() -> None:
    _, into = connected()

    def check() -> None:
        raise RankError("rank 0 ends: rank 1 fell silent")

    with pytest.raises(RankError, match="fell silent"):
        into.receive(torch.empty(1)).wait(check)


def test_what_came_before_the_end_is_taken_and_no_more_waited_for() -> None:
    out, into = connected()
    row, none = torch.empty(2), torch.empty(2)
    first, second = into.receive(row), into.receive(none)
    out.send(torch.ones(2))
    out.close(1.0)

    second.wait(never)

    assert first.error is None
    assert row.tolist() == [1, 1]
    assert str(second.error) == "the process at the other end has ended"


def test_another_size_than_was_expected() -> None:
    out, into = connected()
    out.send(torch.ones(2))

    passing = into.receive(torch.empty(3))
    passing.wait(never)

    assert str(passing.error) == "8 bytes came for 12"


def meet(*ends: Callable[[Meeting], Any], store: Store | None = None) -> list[Any]:
    """What both make of each other, in two threads."""
    place, found = store or HashStore(), [None, None]

    def run(number: int) -> None:
        meeting = Meeting(place, 1 - number, lambda: None, 30.0)
        found[number] = ends[number](meeting)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_neighbours_meet_again_at_the_same_place() -> None:
    store = HashStore()
    for _ in range(2):
        out, into = meet(*RINGS, store=store)
        row = torch.empty(3)

        out.send(torch.arange(3.0))
        into.receive(row).wait(never)

        assert row.tolist() == [0, 1, 2]
        assert (out.peer, into.peer) == (1, 0)


def test_who_ends_before_it_hands_over_anything() -> None:
    here, there = socket.socketpair()
    here.close()

    with pytest.raises(ConnectionError, match="at the other end has ended"):
        Shared.receive(there)


def test_who_may_open_no_more_files() -> None:
    """The kernel then hands over fewer than were sent."""
    here, there = socket.socketpair()
    with here:
        socket.send_fds(here, [b"."], [here.fileno(), here.fileno()])

        with pytest.raises(OSError, match="Too many open files"):
            Shared.receive(there)


def test_who_has_another_clock_is_no_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter(["one", "one", "another"])
    monkeypatch.setattr(neighbours, "host_clock", lambda: next(clocks, "another"))

    assert meet(*RINGS) == [None, None]


def test_nobody_is_a_neighbour_where_links_are_gloos(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(neighbours.VARIABLE, "gloo")

    assert meet(*RINGS) == [None, None]


def test_a_name_that_nobody_listens_to() -> None:
    """As on another host of the same boot and time namespace, of another network."""
    store = HashStore()
    store.set(AT, f"pipeproof-nobody {neighbours.host_clock()}")

    assert ring_from(Meeting(store, 0, never, 0.0)) is None
    assert store.get(MET) == b"no"


@pytest.mark.parametrize("end", RINGS)
def test_who_does_not_come(end: Callable[[Meeting], Any]) -> None:
    with pytest.raises(RankError, match="rank 3 has not come to its link with this"):
        end(Meeting(HashStore(), 3, never, 0.0))


def test_a_word_that_is_none_of_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(neighbours.VARIABLE, "shm")

    with pytest.raises(ParameterError, match=r'PIPEPROOF_LINKS is "gloo".* got .shm.'):
        ring_to(Meeting(HashStore(), 1, never, 0.0))


def test_a_stranger_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of another user may see the name, and be the first to connect."""
    users = iter([os.getuid() + 1])
    monkeypatch.setattr(neighbours.os, "getuid", lambda: next(users, os.geteuid()))
    store = HashStore()
    met: list[Any] = []
    source = threading.Thread(
        target=lambda: met.append(ring_to(Meeting(store, 1, lambda: None, 30.0)))
    )
    source.start()
    meeting = Meeting(store, 0, lambda: None, 30.0)
    name = meeting.hear(AT).split()[0]
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(f"\0{name}")
        friend = socket.socket(socket.AF_UNIX)
        friend.connect(f"\0{name}")
        store.set(MET, "yes")
        source.join()
        into, row = RingIn(Shared.receive(friend), 0), torch.empty(1)
        met[0].send(torch.ones(1))
        into.receive(row).wait(never)

        assert row.item() == 1
        assert stranger.recv(1) == b"", "it was hung up on"
