"""Name → generator, with what its paper says of it as executable formulas.

One list of rows feeds `make`, the command line, the documentation and the tests
that all schedules share, so a new row cannot escape any of them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number
from pipeproof.sched.gen import gpipe, naive, one_f_one_b
from pipeproof.sched.ir import Schedule


@dataclass(frozen=True, slots=True)
class Row:
    """A published schedule.

    The formulas hold exactly for equal stages and free links.

    Attributes:
        name: in the catalogue.
        generator: (devices, micro_batches, options…) → Schedule.
        summary: when to use it, in a line.
        source: paper, section, arXiv id.
        constraints: what the sizes must fulfil, in words.
        bubble: `bubble_fraction`, as people write it.
        peak: `peak_activations` of device d, likewise.
        bubble_fraction: the same of (p, m), exact.
        peak_activations: the same of (p, m, d), without recomputation.
    """

    name: str
    generator: Callable[..., Schedule]
    summary: str
    source: str
    constraints: str
    bubble: str
    peak: str
    bubble_fraction: Callable[[int, int], Fraction]
    peak_activations: Callable[[int, int, int], Number]

    @property
    def options(self) -> tuple[str, ...]:
        """What the generator takes beside the two sizes."""
        return tuple(inspect.signature(self.generator).parameters)[2:]


def _fill_drain(p: int, m: int) -> Fraction:
    return Fraction(p - 1, m + p - 1)


CATALOG: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            "naive",
            naive,
            "the baseline: what a split without a pipeline costs",
            "Huang et al. 2018, 1811.06965, fig. 2(b)",
            "none",
            "(p-1)/p",
            "1",
            lambda p, m: Fraction(p - 1, p),
            lambda p, m, d: 1,
        ),
        Row(
            "gpipe",
            gpipe,
            "simplest; with recomputation, lightest on short pipelines",
            "Huang et al. 2018, 1811.06965, 2.2-2.3",
            "none",
            "(p-1)/(m+p-1)",
            "m",
            _fill_drain,
            lambda p, m, d: m,
        ),
        Row(
            "1f1b",
            one_f_one_b,
            "the default: GPipe's bubble, activations bounded by the pipeline",
            "Narayanan et al. 2021, 2104.04473, 2.2.1",
            "none",
            "(p-1)/(m+p-1)",
            "min(p-d, m)",
            _fill_drain,
            lambda p, m, d: min(p - d, m),
        ),
    )
}


def make(name: str, *, devices: int, micro_batches: int, **options: Any) -> Schedule:
    """A schedule of the catalogue by its name.

    Args:
        name: see `CATALOG`, or `pipeproof list`.
        devices: p.
        micro_batches: m, per step.
        options: what the generator takes beside; None means its default.

    Raises:
        ParameterError: an unknown name, an option the schedule does not have, or
            sizes it does not allow.
    """
    row = CATALOG.get(name)
    if row is None:
        close = difflib.get_close_matches(name.lower(), CATALOG, n=1)
        hint = f"did you mean {close[0]!r}? The" if close else "the"
        raise ParameterError(
            f"no schedule is called {name!r}: {hint} catalogue has {', '.join(CATALOG)}"
        )
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(row.options)):
        has = ", ".join(row.options) or "no options"
        raise ParameterError(f"{name} does not take {', '.join(unknown)}: it has {has}")
    return row.generator(devices, micro_batches, **given)
