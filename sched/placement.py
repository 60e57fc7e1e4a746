"""Which device holds which stage, for each pipe.

A pipe is one way through the model. Most schedules have one; bidirectional
ones have a second, in reverse, with its own replica of every stage's weights.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeproof.sched.errors import ParameterError, ParseError, at_least_one

MAX_STAGES = 1 << 20
MAX_PIPES = 1 << 15


@dataclass(frozen=True, slots=True)
class Placement:
    """A map (pipe, stage) → device. Any map is legal.

    Attributes:
        pipes: for each pipe, the device of each stage in order.

    Raises:
        ParameterError: no pipe, no stage, a device below 0, pipes that disagree
            on the number of stages, or more pipes than anyone needs.
    """

    pipes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.pipes or not self.pipes[0]:
            raise ParameterError("a placement needs at least one pipe of one stage")
        if len(self.pipes) > MAX_PIPES:
            raise ParameterError(
                f"a placement has at most {MAX_PIPES:,} pipes, got {len(self.pipes):,}"
            )
        for number, devices in enumerate(self.pipes):
            if len(devices) != len(self.pipes[0]):
                raise ParameterError(
                    f"pipe {number} places {len(devices)} stages, pipe 0 places "
                    f"{len(self.pipes[0])}: every pipe runs the same stages"
                )
            if min(devices) < 0:
                raise ParameterError(
                    f"pipe {number} places a stage on device {min(devices)}: "
                    "devices count from 0"
                )

    @property
    def stages(self) -> int:
        """Stages of the model."""
        return len(self.pipes[0])

    @property
    def devices(self) -> int:
        """Devices 0 … n-1 that the map names (an unused one between counts)."""
        return 1 + max(max(pipe) for pipe in self.pipes)

    def shares(self) -> tuple[tuple[int, ...], ...]:
        """For each (pipe, stage), how many of the pipe's stages its device holds.

        A stage is that fraction of its device's share of the model.
        """
        result = []
        for pipe in self.pipes:
            held: dict[int, int] = {}
            for device in pipe:
                held[device] = held.get(device, 0) + 1
            result.append(tuple(held[device] for device in pipe))
        return tuple(result)

    @classmethod
    def linear(cls, devices: int) -> Placement:
        """Stage s on device s."""
        return cls.looped(devices, 1)

    @classmethod
    def looped(cls, devices: int, chunks: int) -> Placement:
        """Stage k on device k mod P, `chunks` stages on each."""
        _bounded(devices, chunks)
        return cls((tuple(range(devices)) * chunks,))

    @classmethod
    def v(cls, devices: int) -> Placement:
        """Stages d and 2P-1-d on device d."""
        return cls.wave(devices, 1)

    @classmethod
    def wave(cls, devices: int, waves: int) -> Placement:
        """Down and up again, `waves` times: a V is one wave (Hanayo)."""
        _bounded(devices, 2 * waves)
        down = tuple(range(devices))
        return cls(((down + down[::-1]) * waves,))

    @classmethod
    def bidirectional(cls, devices: int) -> Placement:
        """Pipe 0 down the devices, pipe 1 up, one replica of the weights each."""
        _bounded(devices, 1)
        down = tuple(range(devices))
        return cls((down, down[::-1]))

    def __str__(self) -> str:
        """The ready-made name, or the whole map in brackets."""
        devices = self.devices
        if len(self.pipes) == 1:
            per_device, rest = divmod(self.stages, devices)
            if not rest:
                if self == Placement.looped(devices, per_device):
                    return "linear" if per_device == 1 else f"looped {per_device}"
                if per_device % 2 == 0 and self == Placement.wave(
                    devices, per_device // 2
                ):
                    return "v" if per_device == 2 else f"wave {per_device // 2}"
        elif self.stages == devices and self == Placement.bidirectional(devices):
            return "bidirectional"
        return self._map()

    def _map(self) -> str:
        return "[" + " | ".join(" ".join(map(str, pipe)) for pipe in self.pipes) + "]"

    def format(self, devices: int) -> str:
        """What `parse` reads back where there are this many devices.

        A ready-made name stands for all of them, so where some are unused the
        whole map is written.
        """
        return str(self) if self.devices == devices else self._map()

    @classmethod
    def parse(cls, text: str, devices: int) -> Placement:
        """Read what `str` writes.

        Args:
            text: `linear`, `looped V`, `v`, `wave W`, `bidirectional`, or the
                device of each stage in brackets, pipes apart by `|`.
            devices: P, for the ready-made ones.

        Raises:
            ParseError: none of these, or none that can be.
        """
        try:
            return cls._parse(text, devices)
        except ParameterError as error:
            raise ParseError(f"placement: {error}") from None

    @classmethod
    def _parse(cls, text: str, devices: int) -> Placement:
        if match := re.fullmatch(r"(looped|wave) ([1-9][0-9]{0,6})", text):
            make = cls.looped if match[1] == "looped" else cls.wave
            return make(devices, int(match[2]))
        if text in ("linear", "v", "bidirectional"):
            named = {"linear": cls.linear, "v": cls.v}
            return named.get(text, cls.bidirectional)(devices)
        if re.fullmatch(r"\[[0-9 |]*\]", text):
            pipes = [pipe.split() for pipe in text[1:-1].split("|")]
            if sum(map(len, pipes)) > MAX_STAGES:
                raise ParameterError(f"more than {MAX_STAGES:,} stages")
            for word in (word for pipe in pipes for word in pipe):
                if len(word) > 7 or (word[0] == "0" and word != "0"):
                    raise ParameterError(f"expected a device, found {word[:40]!r}")
            return cls(tuple(tuple(map(int, pipe)) for pipe in pipes))
        raise ParseError(
            f"placement: expected linear, looped V, v, wave W, bidirectional or "
            f"the device of each stage as [0 1 2 …], found {text[:60]!r}"
        )

    @classmethod
    def of(cls, pipes: Sequence[Sequence[int]]) -> Placement:
        """A placement from any sequences of device numbers."""
        return cls(tuple(tuple(map(operator.index, pipe)) for pipe in pipes))


def _bounded(devices: int, chunks: int) -> None:
    at_least_one(devices=devices, chunks=chunks)
    if devices * chunks > MAX_STAGES:
        raise ParameterError(
            f"{devices:,} devices with {chunks:,} stages each exceed the "
            f"{MAX_STAGES:,} stages a schedule may have"
        )
