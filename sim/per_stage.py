"""Tables of one number for each stage."""

from __future__ import annotations

from fractions import Fraction

from pipeproof.sched.exact import Number, plain

Table = list[list[Number]]
"""(pipe, stage) → number."""


def divide(number: Number, by: int) -> Number:
    """Number / by, exact where the number is."""
    if by == 1:
        return number
    return plain(Fraction(number, by) if isinstance(number, int) else number / by)
