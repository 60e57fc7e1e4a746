"""Stages with skip connections, and a job that counts what crosses."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from jobs import WIDTH, Job, part
from torch import Tensor, nn

from pipeproof.exec import transport
from pipeproof.exec.group import Ranks
from pipeproof.exec.tensors import flat
from pipeproof.sched.instructions import Message


class Gives(nn.Module):
    """Gives what it makes, and an int, to stages further on."""

    gives_skips = ("fine", "scale")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        fine = self.first(x).tanh()
        return self.second(fine) * fine, {"fine": fine, "scale": 3}


class Takes(nn.Module):
    """Uses that twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, fine: Tensor, scale: int) -> Tensor:
        return self.linear(x) + fine * fine.sigmoid() / scale


def skipping(number: int) -> nn.Module:
    """The first stage gives, the second takes, and so do those from the fourth on."""
    layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)]
    if number == 0:
        layers.insert(1, Gives())
    elif number != 2:
        layers.append(Takes())
    return nn.Sequential(*layers)


def sent(ranks: Ranks, job: Job) -> list[tuple[str, int]]:
    """The messages that this rank sends, with the bytes of their tensors."""
    found: list[tuple[str, int]] = []
    send = transport.Across.send

    def counted(self: Any, message: Message, value: Any) -> None:
        tensors = [x for x in flat(value) if isinstance(x, Tensor)]
        found.append((str(message), sum(tensor.nbytes for tensor in tensors)))
        send(self, message, value)

    with patch.object(transport.Across, "send", counted):
        part(ranks, job)
    return found
