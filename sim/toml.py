"""TOML files of a few keys, whoever wrote them.

Nothing in a file is executed, and its size is bounded before it is read.
"""

from __future__ import annotations

import tomllib
from os import PathLike, fspath
from typing import Any

from pipeproof.sched.errors import ParseError
from pipeproof.sched.reading import text_of

MAX_BYTES = 1 << 20


def read(path: str | PathLike[str], what: str) -> dict[str, Any]:
    """What is in a file.

    Args:
        path: of it.
        what: it describes, for messages.

    Raises:
        ParseError: naming the file, and the place where it is no TOML.
        OSError: it cannot be read.
    """
    where, hint = fspath(path), f"is this a file that describes {what}?"
    with open(path, "rb") as file:
        text = text_of(file, where, MAX_BYTES, hint)
    try:
        return parsed(text)
    except ParseError as error:
        raise ParseError(f"{where}: {error}") from None


def parsed(text: str) -> dict[str, Any]:
    """What a text says.

    Raises:
        ParseError: with the place where it is no TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ParseError(f"expected TOML: {error}") from None
    except (RecursionError, ValueError):  # nested too deeply, or a number too long
        raise ParseError("expected TOML with numbers and few brackets") from None
