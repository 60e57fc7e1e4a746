"""What `check` says: findings, and the report of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeproof.sched.errors import ScheduleError
from pipeproof.sched.ir import Op, Schedule
from pipeproof.sched.text import words_of

SHOWN = 20
"""Findings that a message spells out before it only counts them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule.

    Attributes:
        rule: short name of the rule.
        device: whose row, or None where no one device is at fault.
        step: position in that row, counted from 0; None for an op that is missing.
        op: the op at fault, or the one that is missing.
        expected: what the rule asks.
        found: what the schedule has.
        remedy: what to do.
        picture: lines that draw it, where the row of one device does not show it.
    """

    rule: str
    device: int | None
    step: int | None
    op: Op | None
    expected: str
    found: str
    remedy: str
    picture: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Device and step, as far as they are known."""
        if self.device is None:
            return "schedule"
        return f"device {self.device}" + (
            "" if self.step is None else f", step {self.step}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, in types that JSON has."""
        return {
            "rule": self.rule,
            "device": self.device,
            "step": self.step,
            "op": None if self.op is None else str(self.op),
            "expected": self.expected,
            "found": self.found,
            "remedy": self.remedy,
        }

    def __str__(self) -> str:
        return f"{self.where}: {self.found}; expected {self.expected}. {self.remedy}."


@dataclass(frozen=True)
class Report:
    """Everything `check` found.

    Attributes:
        schedule: what was judged.
        findings: in order of rule, device and step; empty when all is well.
        verdict: what is true of the schedule when there are none.
    """

    schedule: Schedule
    findings: tuple[Finding, ...]
    verdict: str = "complete, ordered and free of cycles"

    @property
    def ok(self) -> bool:
        """Whether the schedule keeps every rule."""
        return not self.findings

    def raise_if_bad(self) -> None:
        """Raise what `str` says, if there is a finding.

        Raises:
            ScheduleError: any rule is broken.
        """
        if self.findings:
            raise ScheduleError(str(self))

    def __str__(self) -> str:
        if not self.findings:
            return f"{self.schedule.summary}: {self.verdict}"
        count = len(self.findings)
        lines = [
            f"{self.schedule.summary} breaks {count:,} rule{'s' if count > 1 else ''}:"
        ]
        for finding in self.findings[:SHOWN]:
            lines.append(f"  {finding.where}: {finding.found}")
            lines += self._picture(finding)
            lines.append(f"    expected: {finding.expected}")
            lines.append(f"    {finding.remedy}.")
        if count > SHOWN:
            lines.append(f"  … and {count - SHOWN:,} more")
        return "\n".join(lines)

    def _picture(self, finding: Finding) -> list[str]:
        """Its own, or the stretch of the device's row around the op, marked."""
        if finding.picture:
            return [f"    {line}" for line in finding.picture]
        if finding.device is None or finding.step is None:
            return []
        row = self.schedule.row(finding.device)
        first, last = max(0, finding.step - 5), min(len(row), finding.step + 6)
        while row.joined[first]:  # a group is one word: show all of it
            first -= 1
        while last < len(row) and row.joined[last]:
            last += 1
        stretch = row[first:last]
        at = int(np.cumsum(~stretch.joined)[finding.step - first]) - 1
        stage = self.schedule.only_stage[finding.device]
        words = words_of(stretch, short=bool((stretch.stage == stage).all()))
        left = "… " if first else ""
        right = " …" if last < len(row) else ""
        head = f"    device {finding.device} | {left}"
        offset = len(head) + sum(len(word) + 1 for word in words[:at])
        return [
            head + " ".join(words) + right,
            " " * offset + "^" * len(words[at]),
        ]
