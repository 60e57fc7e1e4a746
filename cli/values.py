"""How the command line reads the values of its options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

import click

Number = int | float | Fraction

LONGEST_NUMBER = 40
MAX_SIZES = 10_000

_NUMBER = re.compile(
    r"[+-]?(?:(?P<whole>[0-9]+)|(?P<top>[0-9]+)/(?P<bottom>[0-9]+)"
    r"|(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=e))(?:e[+-]?[0-9]{1,3})?)",
    re.ASCII | re.IGNORECASE,
)

_BYTES = {"": 1, "B": 1} | {
    f"{prefix}{infix}B": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("kMGT", start=1)
}
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?)([kMGT]?i?B?)", re.ASCII)


def number(text: str) -> Number:
    """An int, a float or, written 1/3, a Fraction: exact where the text is."""
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > LONGEST_NUMBER:
        raise click.BadParameter(f"expected a number: 3, 1.5 or 1/3; found {text!r}")
    if match["whole"]:
        return int(text)
    if match["top"]:
        if not int(match["bottom"]):
            raise click.BadParameter(f"{text!r} divides by 0")
        return Fraction(text)
    return float(text)


def memory_size(text: str) -> Number:
    """Bytes: 80000000000, 80GB (of 1000³) or 80GiB (of 1024³)."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _BYTES:
        raise click.BadParameter(
            f"expected bytes: 80GB, 1.5TB, 24GiB or a number; found {text!r}"
        )
    size = Fraction(match[1]) * _BYTES[match[2]]
    return int(size) if size.denominator == 1 else size


def per_stage(text: str) -> Number | tuple[Number, ...]:
    """One number, or one per stage with commas between."""
    numbers = tuple(map(number, text.split(",")))
    return numbers if len(numbers) > 1 else numbers[0]


def sizes(text: str) -> tuple[int, ...]:
    """Several sizes, each once: 2,4,8; 2:64 (doubling); 2:16:2 (in steps of 2)."""
    result: list[int] = []
    for word in text.split(","):
        if not re.fullmatch(r"[0-9]{1,9}(:[0-9]{1,9}){0,2}", word, re.ASCII):
            raise click.BadParameter(
                "expected sizes: 2,4,8, or 2:64 (doubling), or 2:16:2 (in steps of "
                f"2); found {word!r}"
            )
        first, *more = map(int, word.split(":"))
        result += _range(word, first, *more) if more else [first]
    if len(result) > MAX_SIZES:
        raise click.BadParameter(f"{len(result):,} sizes exceed {MAX_SIZES:,}")
    return tuple(dict.fromkeys(result))


def _range(word: str, first: int, last: int, step: int | None = None) -> Sequence[int]:
    if first < 1 or last < first or step == 0:
        raise click.BadParameter(f"{word} must rise, from at least 1")
    if step is not None:
        if (last - first) // step >= MAX_SIZES:
            raise click.BadParameter(f"{word} has more than {MAX_SIZES:,} sizes")
        return range(first, last + 1, step)
    return [first << i for i in range((last // first).bit_length())]


def buffering(text: str) -> str | int:
    """`eager`, `rendezvous`, or a number of messages."""
    if text in ("eager", "rendezvous"):
        return text
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        raise click.BadParameter(
            f"expected eager, rendezvous or a number of messages; found {text!r}"
        )
    return int(text)
