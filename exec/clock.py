"""When each instruction of a step started and ended.

On a GPU instructions are only queued when the host has run them, so there the
times are those of events on the device's stream.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch


class Clock:
    """Marks the start and the end of one instruction after the other.

    Args:
        devices: that may be named; the clock starts when all of them are idle.

    Attributes:
        origin: when it started, by `perf_counter`.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._marks: list[Any] = []
        self._cuda = {d for d in devices if d.type == "cuda"}
        for device in self._cuda:
            torch.cuda.synchronize(device)
        self.origin = time.perf_counter()
        self._base = {device: self._event(device) for device in self._cuda}

    @staticmethod
    def _event(device: torch.device) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def mark(self, device: torch.device) -> None:
        """Note the time on a device, twice for each instruction."""
        self._marks.append(self._now(device))

    def _now(self, device: torch.device) -> Any:
        if device in self._cuda:
            return device, self._event(device)
        return time.perf_counter() - self.origin

    def read(self) -> tuple[list[float], list[float]]:
        """Start and end of each instruction, in seconds from the clock's start."""
        for device in self._cuda:
            torch.cuda.synchronize(device)
        times = [
            mark
            if isinstance(mark, float)
            else self._base[mark[0]].elapsed_time(mark[1]) / 1e3
            for mark in self._marks
        ]
        return times[::2], times[1::2]
