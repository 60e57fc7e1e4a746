"""The discrete-event simulation: one SimPy process for each stream.

A process walks its stream's instructions. Each waits for those it must, then
takes its duration. All times come from SimPy's clock, which only ever adds a
duration to the time at which the last condition was met: every end is
max(ready times) + duration, never a difference of two readings. So the engine
works in any number type, and ints and Fractions stay exact.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import simpy
from pipeproof.sched import Action, Program
from pipeproof.sched.errors import PipeproofError
from pipeproof.sched.exact import Number
from pipeproof.sim.cluster import Cluster

Process = Generator[simpy.Event, Any, None]


class DeadlockError(PipeproofError):
    """A simulated program in which nothing can go on."""


def play(
    program: Program, durations: Sequence[Number], cluster: Cluster
) -> tuple[list[Any], list[Any]]:
    """Start and end of each instruction.

    Args:
        program: what to play.
        durations: per instruction; for a SEND, how long it occupies its link.
        cluster: latencies, buffering, and whether devices share a processor.

    Raises:
        DeadlockError: naming the instructions that wait for each other.
    """
    engine = _Engine(program, durations, cluster)
    for members in _processes(program, cluster):
        engine.env.process(engine.stream(members))
    engine.env.run()
    if engine.left:
        raise DeadlockError(engine.explain())
    return engine.start, engine.end


def _processes(program: Program, cluster: Cluster) -> list[list[int]]:
    """Instructions that run one after the other, process by process."""
    streams = [members.tolist() for members in program.by_stream]
    if not cluster.shared_processor:
        return streams
    devices = program.schedule.devices
    computes = sorted(index for members in streams[:devices] for index in members)
    return [computes, *streams[devices:]]


class _Engine:
    def __init__(
        self, program: Program, durations: Sequence[Number], cluster: Cluster
    ) -> None:
        count = len(program)
        self.program = program
        self.env = simpy.Environment(initial_time=0)
        self.start: list[Any] = [None] * count
        self.end: list[Any] = [None] * count
        self.left = count
        self._durations = durations
        self._action = program.action.tolist()
        self._waits = program.waits_for.to_lists()
        self._sender = _of_message(program, program.send_of, Action.RECV)
        self._latency = _latencies(program, cluster)
        self._before_send = _sends_wait(program, cluster)
        # The event that a waiting process sleeps on, made only when one does.
        self._done: dict[int, simpy.Event] = {}
        self._posted: dict[int, simpy.Event] = {}
        self._arrival: dict[int, simpy.Event] = {}
        self._rendezvous = cluster.buffering == "rendezvous"

    def stream(self, members: Sequence[int]) -> Process:
        env, start, end, waits = self.env, self.start, self.end, self._waits
        done, durations, action = self._done, self._durations, self._action
        for index in members:
            for other in waits[index]:
                if end[other] is None:
                    yield self._asleep(done, other)
            start[index] = env._now
            kind = action[index]
            if kind == Action.RECV:
                if self._rendezvous and index in self._posted:
                    self._posted.pop(index).succeed()
                yield from self._receive(index)
            else:
                if kind == Action.SEND and index in self._before_send:
                    yield from self._admitted(index)
                duration = durations[index]
                if duration:
                    yield env.timeout(duration)
            end[index] = env._now
            self.left -= 1
            if kind == Action.SEND:
                self._depart(index)
            if index in done:
                done.pop(index).succeed()

    def _asleep(self, events: dict[int, simpy.Event], index: int) -> simpy.Event:
        event = events.get(index)
        if event is None:
            event = events[index] = self.env.event()
        return event

    def _depart(self, send: int) -> None:
        """The message is off; it arrives a latency later."""
        latency = self._latency[send]
        arrival = self._arrival.get(send)
        if not latency:
            if arrival is not None:
                arrival.succeed()
            return
        timeout = self.env.timeout(latency)
        if arrival is None:
            self._arrival[send] = timeout
        else:
            waiting = arrival
            timeout.callbacks.append(lambda _: waiting.succeed())

    def _receive(self, index: int) -> Process:
        send = self._sender[index]
        if self.end[send] is None:
            yield self._asleep(self._arrival, send)
        elif (arrival := self._arrival.get(send)) is not None:
            if not arrival.processed:
                yield arrival
        self._arrival.pop(send, None)

    def _admitted(self, index: int) -> Process:
        """Wait for what the transport's buffers make a send wait for."""
        recv = self._before_send[index]
        if self._rendezvous:
            if self.start[recv] is None:
                yield self._asleep(self._posted, recv)
        elif self.end[recv] is None:
            yield self._asleep(self._done, recv)

    def explain(self) -> str:
        """Which instructions wait for which, along one cycle."""
        import networkx as nx

        graph = nx.DiGraph()
        for members in self.program.by_stream:
            waiting = [i for i in members.tolist() if self.end[i] is None]
            graph.add_edges_from(zip(waiting[1:], waiting))
            for index in waiting:
                needs = list(self._waits[index])
                if index in self._sender:
                    needs.append(self._sender[index])
                if index in self._before_send:
                    needs.append(self._before_send[index])
                graph.add_edges_from(
                    (index, other) for other in needs if self.end[other] is None
                )
        ring = [edge[0] for edge in nx.find_cycle(graph)]
        names = [
            f"{self.program.label(i)} (device {self.program.device[i]})"
            for i in [*ring, ring[0]]
        ]
        return (
            f"{self.program.schedule.summary}: deadlock, {self.left:,} instructions "
            f"never run: " + " waits for ".join(names)
        )


def _of_message(program: Program, column: np.ndarray, action: Action) -> dict[int, int]:
    """For the instructions with this action, another one of the same message."""
    where = np.flatnonzero(program.action == action)
    return dict(zip(where.tolist(), column[program.message[where]].tolist()))


def _latencies(program: Program, cluster: Cluster) -> dict[int, Number]:
    sends = np.flatnonzero(program.action == Action.SEND)
    by_stream = {
        number: cluster.link(stream.device, stream.peer).latency
        for number, stream in enumerate(program.streams)
        if stream.peer is not None
    }
    streams = program.stream[sends].tolist()
    return {i: by_stream[stream] for i, stream in zip(sends.tolist(), streams)}


def _sends_wait(program: Program, cluster: Cluster) -> dict[int, int]:
    """SEND → the RECV that must be posted (rendezvous) or done (k buffers)."""
    if cluster.buffering == "eager":
        return {}
    if cluster.buffering == "rendezvous":
        return _of_message(program, program.recv_of, Action.SEND)
    result: dict[int, int] = {}
    recv = program.recv_of[program.message]
    for members in program.by_stream:
        if len(members) and program.action[members[0]] == Action.SEND:
            late = members[cluster.buffering :]
            result |= zip(late.tolist(), recv[members[: len(late)]].tolist())
    return result
