"""How results leave: one JSON object, or tables for people; files whole or not."""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TextIO

import click

from pipeproof.sched.exact import Number, plain, rounded

if TYPE_CHECKING:
    from rich.text import Text

PIPED_WIDTH = 160
"""Columns of a table where no terminal says how many it has."""


def emit_json(value: dict[str, Any]) -> None:
    """Print one JSON object."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def full(number: Any) -> int | float:
    """As JSON has it: whole ones as ints, others as floats with all digits.

    Raises:
        ParameterError: beyond the range of a float.
    """
    number = plain(number)
    if isinstance(number, int):
        return number
    return rounded(number)


def shown(number: Number) -> str:
    """For people: short, and with the fraction where it is exact."""
    if isinstance(number, int):
        return f"{number:,}"
    if isinstance(number, Fraction):
        exact = str(number)
        about = f"{full(number):,.6g}"
        return f"{about} ({exact})" if len(exact) < 16 else about
    return f"{full(number):,.6g}"


def shown_all(numbers: Iterable[Number], most: int = 16) -> str:
    """A list for people; of a long one, as much as is readable."""
    words = [shown(number) for number in numbers]
    if len(set(words)) == 1 and len(words) > 1:
        return f"{words[0]} on each of {len(words)}"
    if len(words) > most:
        return f"{' '.join(words[:most])} … ({len(words)} in all)"
    return " ".join(words)


def emit_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
) -> None:
    """Print a table.

    Args:
        title: above it.
        columns: their names.
        rows: plain text; nothing in it is taken for markup.
        right: the columns that hold numbers.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for number, name in enumerate(columns):
        table.add_column(
            Text(name),
            justify="right" if name in right else "left",
            overflow="fold",
            no_wrap=name in right or number == 0,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console = _console()
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().rstrip().splitlines()
    click.echo("\n".join(line.rstrip() for line in lines))


def has_colours() -> bool:
    """Whether standard output takes them: a terminal, or FORCE_COLOR; not NO_COLOR."""
    console = _console()
    return console.color_system is not None and not console.no_color


def emit_text(lines: Iterable[Text]) -> None:
    """Print styled lines, each as long as it is."""
    console = _console()
    for line in lines:
        console.print(line, soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def write_file(path: str, write: Callable[[TextIO], object]) -> None:
    """Write a file as a whole: under another name first, then moved.

    Args:
        path: where; `-` is standard output. What is there and is no regular file
            (`/dev/null`, a pipe) is written to directly.
        write: is given the open file.
    """
    if path == "-":
        write(sys.stdout)
        return
    mode = None
    if os.path.exists(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            with open(path, "w", encoding="utf-8") as file:
                write(file)
            return
    target = os.path.realpath(path)
    draft = f"{target}.{secrets.token_hex(4)}.part"
    try:
        with open(draft, "x", encoding="utf-8") as file:
            if mode is not None:
                os.chmod(draft, stat.S_IMODE(mode))
            write(file)
        os.replace(draft, target)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = path  # the draft's name says nothing to the user
        if os.path.exists(draft):
            os.unlink(draft)
        raise
