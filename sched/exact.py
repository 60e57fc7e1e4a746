"""Numbers that stay exact where they were given exact.

Costs may be ints, Fractions or floats. Arithmetic on the first two loses
nothing, so closed forms can be compared with `==`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Number = int | float | Fraction


def plain(number: Any) -> Number:  # noqa: ANN401
    """A whole Fraction as an int, a numpy number as Python's."""
    if isinstance(number, np.generic):
        number = number.item()
    whole = getattr(number, "denominator", 0) == 1
    return int(number) if whole else number  # type: ignore[no-any-return]


def ratio(part: Any, whole: Any) -> Number:  # noqa: ANN401
    """Part / whole, exact where both are; 0 where there is no whole."""
    if whole == 0:
        return 0
    if isinstance(part, int) and isinstance(whole, int):
        return plain(Fraction(part, whole))
    return plain(part / whole)


def mean(values: Sequence[Number]) -> Number:
    """The mean, exact where the values are."""
    total: Any = sum(values)
    return ratio(total, len(values))
