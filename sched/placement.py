"""Which device holds which stage, for each pipe.

A pipe is one way through the model. Most schedules have one; bidirectional
ones have a second, in reverse, with its own replica of every stage's weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeproof.sched.errors import ParameterError, ParseError, at_least_one

MAX_STAGES = 1 << 20


@dataclass(frozen=True, slots=True)
class Placement:
    """A map (pipe, stage) → device. Any map is legal.

    Attributes:
        pipes: for each pipe, the device of each stage in order.

    Raises:
        ParameterError: no pipe, no stage, a device below 0, or pipes that
            disagree on the number of stages.
    """

    pipes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.pipes or not self.pipes[0]:
            raise ParameterError("a placement needs at least one pipe of one stage")
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

    def share(self, pipe: int, stage: int) -> int:
        """How many stages of this pipe the stage's device holds.

        A stage is that fraction of its device's share of the model.
        """
        return self.pipes[pipe].count(self.pipes[pipe][stage])

    def shares(self) -> tuple[tuple[int, ...], ...]:
        """`share` of every (pipe, stage)."""
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
        return "[" + " | ".join(" ".join(map(str, pipe)) for pipe in self.pipes) + "]"

    @classmethod
    def parse(cls, text: str, devices: int) -> Placement:
        """Read what `str` writes.

        Args:
            text: `linear`, `looped V`, `v`, `wave W`, `bidirectional`, or the
                device of each stage in brackets, pipes apart by `|`.
            devices: P, for the ready-made ones.

        Raises:
            ParseError: none of these.
        """
        if match := re.fullmatch(r"(looped|wave) ([1-9][0-9]{0,6})", text):
            make = cls.looped if match[1] == "looped" else cls.wave
            return make(devices, int(match[2]))
        if text in ("linear", "v", "bidirectional"):
            named = {"linear": cls.linear, "v": cls.v}
            return named.get(text, cls.bidirectional)(devices)
        if re.fullmatch(r"\[[0-9 |]*\]", text):
            pipes = [pipe.split() for pipe in text[1:-1].split("|")]
            words = [word for pipe in pipes for word in pipe]
            if len(words) > MAX_STAGES or any(len(word) > 7 for word in words):
                raise ParseError(f"placement: more than {MAX_STAGES:,} stages")
            return cls(tuple(tuple(map(int, pipe)) for pipe in pipes))
        raise ParseError(
            f"placement: expected linear, looped V, v, wave W, bidirectional or "
            f"the device of each stage as [0 1 2 …], found {text[:60]!r}"
        )

    @classmethod
    def of(cls, pipes: Sequence[Sequence[int]]) -> Placement:
        """A placement from any sequences of device numbers."""
        return cls(tuple(tuple(int(device) for device in pipe) for pipe in pipes))


def _bounded(devices: int, chunks: int) -> None:
    at_least_one(devices=devices, chunks=chunks)
    if devices * chunks > MAX_STAGES:
        raise ParameterError(
            f"{devices:,} devices with {chunks:,} stages each exceed the "
            f"{MAX_STAGES:,} stages a schedule may have"
        )
