"""Numbers that stay exact where they were given exact.

Costs may be ints, Fractions or floats. Arithmetic on the first two loses
nothing, so closed forms can be compared with `==`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError

Number = int | float | Fraction


def plain(number: Any) -> Number:
    """A whole Fraction as an int, a numpy number as Python's."""
    if isinstance(number, np.generic):
        number = number.item()
    whole = getattr(number, "denominator", 0) == 1
    result: Number = int(number) if whole else number
    return result


def is_number(value: object) -> bool:
    """Whether it is a Number: a truth value is none, nor is numpy's."""
    return isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)


def rounded(number: Number) -> float:
    """The nearest float.

    Raises:
        ParameterError: there is none, as it is beyond their range.
    """
    try:
        result = float(number)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ParameterError(
            "a result is beyond the range of floating point: give costs in a "
            "larger unit"
        )
    return result


def ratio(part: Any, whole: Any) -> Number:
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


def column(numbers: Sequence[Any]) -> NDArray[Any]:
    """An array that keeps them as they are: int64, float64, or objects."""
    kinds = set(map(type, numbers))
    if any(issubclass(kind, float) for kind in kinds):
        return np.array([float(number) for number in numbers])
    whole = all(issubclass(kind, int) for kind in kinds)
    if whole and max(map(abs, numbers), default=0) < 2**62:
        return np.array(numbers, dtype=np.int64)
    return np.array(numbers, dtype=object)


def whole(numbers: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """Fractions as multiples of 1 / n, and n; 1 for what holds none."""
    if numbers.dtype != object:
        return numbers, 1
    given = numbers.tolist()
    parts = math.lcm(*{number.denominator for number in given})
    return column([n.numerator * (parts // n.denominator) for n in given]), parts
