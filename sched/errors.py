"""What can be wrong with what a user hands us, each under its own name.

Every message says where, what was expected, what was found and what to do.
"""

from __future__ import annotations


class PipeproofError(Exception):
    """Anything pipeproof refuses, so that one `except` catches it all."""


class ParameterError(PipeproofError, ValueError):
    """An argument outside its range, or an option that does not apply."""


class ParseError(PipeproofError, ValueError):
    """A text, JSON or CSV schedule that does not follow its grammar."""


class ScheduleError(PipeproofError, ValueError):
    """A schedule that breaks a rule of `check`."""


class UnsupportedError(PipeproofError, NotImplementedError):
    """A legal request that this version does not carry out."""


def at_least_one(**sizes: int) -> None:
    """Refuse sizes that are not integers of at least 1.

    Raises:
        ParameterError: naming the first argument that is not.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ParameterError(
                f"{name} must be an integer of at least 1, got {value!r}"
            )
        if value < 1:
            raise ParameterError(f"{name} must be at least 1, got {value}")
