"""What `prove` hands back: a certificate, or a refutation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeproof.sched.findings import Finding, Report
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.ties import named

ASSUMPTIONS = (
    "rows of a batch are independent: a stage's output for a row depends on no other",
    "the loss is a sum, or a weighted mean, over micro-batches",
    "the last stage's forward takes the loss of its own output and targets times its "
    "own weight w/Σw (rows, 1, or what its targets say), a backward starts from that, "
    "and nothing else is scaled",
    "micro-batches share no state but the weights, which only a STEP changes",
    "a stage is a deterministic function of weights, input, and random numbers keyed "
    "by micro-batch and slice",
)
OF_TIES = (
    "what tied stages share starts with the same values on all devices, and is updated "
    "alike there",
)
OF_SLICES = (
    "keys and values of a micro-batch's slices, and their gradients, stay on the "
    "device from its first slice to its last backward",
)

OF_STEPS = (
    "what a STEP makes of a stage's weights depends on these, on their gradient and on "
    "what its optimizer keeps of them, and on no other stage",
)

SHOWN = 8
"""Micro-batches that a line spells out."""


@dataclass(frozen=True, slots=True)
class Chain:
    """In what order one device adds up a stage's gradient.

    Attributes:
        device: which.
        terms: (micro-batch, slice) of each term, the first one first.
    """

    device: int
    terms: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Share:
    """What one device adds to the gradient of parameters that stages share.

    Attributes:
        device: which.
        stages: whose chains it adds up, the first one first.
    """

    device: int
    stages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """That a program computes the gradient of unpipelined training, and how.

    Attributes:
        schedule: what was lowered.
        program: sha256 of all columns of the program that was proved.
        assumptions: about the model and the loss, under which it holds.
        trees: for each stage the chains that add up its gradient; where there are
            several devices, their sum is taken in this order. Each term is that of
            its own micro-batch's (and slice's) loss, times its weight in the batch's.
        peak_buffers: for each device the most tensors alive at once when every
            instruction runs as early as it can and takes one tick; without
            accumulated gradients and what lies on the host.
        ties: for each of the schedule's ties what the devices add up, each the chains
            of its stages in this order, and then these sums in the order of devices.
    """

    schedule: Schedule
    program: str
    assumptions: tuple[str, ...]
    trees: tuple[tuple[Chain, ...], ...]
    peak_buffers: tuple[int, ...]
    ties: tuple[tuple[Share, ...], ...] = ()

    @property
    def ok(self) -> bool:
        """True, as of a report without findings."""
        return True

    @property
    def findings(self) -> tuple[Finding, ...]:
        """None, as of a report without findings."""
        return ()

    def raise_if_bad(self) -> None:
        """Nothing: it is proved."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, in types that JSON has."""
        ties = {
            "ties": [
                [{"device": s.device, "stages": list(s.stages)} for s in shares]
                for shares in self.ties
            ]
        }
        return {
            "ok": True,
            "schedule": self.schedule.name,
            "digest": self.schedule.digest,
            "program": self.program,
            "assumptions": list(self.assumptions),
            "reduction": [
                [
                    {"device": chain.device, "terms": list(map(list, chain.terms))}
                    for chain in tree
                ]
                for tree in self.trees
            ],
            **(ties if self.ties else {}),
            "peak_buffers": list(self.peak_buffers),
        }

    def to_json(self) -> str:
        """`to_dict` as a JSON object."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        stepped = self.schedule.has(Kind.STEP)
        lines = [
            f"{self.schedule.summary}: proved: the gradient is that of unpipelined "
            f"training{', and each STEP updates by it' if stepped else ''}",
            f"  schedule {self.schedule.digest[:16]}, program {self.program[:16]}",
            "  without deadlock under any buffering (streams 'dir'), without races",
            "assuming",
            *(f"  {assumption}" for assumption in self.assumptions),
            "adding up micro-batches, per parameter and in this order",
            *(f"  {line}" for line in self._trees()),
            *self._ties(),
            "tensors alive at once, at most",
            f"  {_counted(self.peak_buffers)}",
        ]
        return "\n".join(lines)

    def _trees(self) -> Iterator[str]:
        words = [
            " + ".join(self._chain(chain, len(tree) > 1) for chain in tree)
            for tree in self.trees
        ]
        low = 0
        while low < len(words):
            high = low
            while high + 1 < len(words) and words[high + 1] == words[low]:
                high += 1
            what = f"stage {low}" if low == high else f"stages {low}–{high}"
            yield f"{what}: {words[low]}"
            low = high + 1

    def _ties(self) -> Iterator[str]:
        """What stages share, as sums of their chains."""
        if not self.ties:
            return
        yield "and of what stages share"
        for tie, shares in zip(self.schedule.ties, self.ties):
            yield f"  tie {named(tie)}: {' + '.join(map(_of_device, shares))}"

    def _chain(self, chain: Chain, several: bool) -> str:
        sliced = self.schedule.slices > 1
        if sliced:
            words = [f"{m}.{q}" for m, q in chain.terms]
        else:
            words = _runs([m for m, _ in chain.terms])
        if len(words) > SHOWN:
            words = [*words[: SHOWN - 1], "…", words[-1]]
        text = f"Σ({' '.join(words)})"
        return f"{text} of device {chain.device}" if several else text


@dataclass(frozen=True)
class Refutation(Report):
    """Why a program does not compute the gradient of unpipelined training."""

    verdict: str = "refuted"

    def to_dict(self) -> dict[str, Any]:
        """All of it, in types that JSON has."""
        return {
            "ok": False,
            "schedule": self.schedule.name,
            "digest": self.schedule.digest,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def to_json(self) -> str:
        """`to_dict` as a JSON object."""
        return json.dumps(self.to_dict())


def _runs(numbers: list[int]) -> list[str]:
    """Numbers in words, neighbours that rise or fall by 1 as one: 0…7, 7…0."""
    words: list[str] = []
    low = 0
    while low < len(numbers):
        high = low + 1
        step = numbers[high] - numbers[low] if high < len(numbers) else 0
        while abs(step) == 1 and numbers[high : high + 1] == [numbers[high - 1] + step]:
            high += 1
        if high - low > 2:
            words.append(f"{numbers[low]}…{numbers[high - 1]}")
        else:
            high = low + 1
            words.append(str(numbers[low]))
        low = high
    return words


def _of_device(share: Share) -> str:
    stages = " + ".join(f"stage {stage}" for stage in share.stages)
    words = f"({stages})" if len(share.stages) > 1 else stages
    return f"{words} of device {share.device}"


def _counted(peaks: Sequence[int]) -> str:
    if len(peaks) > 2 * SHOWN:
        return f"{max(peaks)} (device {peaks.index(max(peaks))})"
    return " ".join(map(str, peaks))
