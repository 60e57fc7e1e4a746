"""Files whoever wrote them: bounded before they are read, and text."""

from __future__ import annotations

import os
from io import UnsupportedOperation
from typing import BinaryIO

from pipeproof.sched.errors import ParseError


def text_of(file: BinaryIO, where: str, most: int, hint: str) -> str:
    """All that a file holds.

    A larger one is refused unread; of a pipe or a device, which tell no size, no more
    than `most` bytes are read.

    Args:
        file: to read from.
        where: it is, for messages.
        most: bytes that it may have.
        hint: what to do about a larger one.

    Raises:
        ParseError: it is larger, or no text in UTF-8.
    """
    size = _size(file)
    data = b"" if size > most else file.read(most + 1)
    if max(size, len(data)) > most:
        found = f"{size:,} bytes" if size > most else "more"
        raise ParseError(
            f"{where}: expected at most {most:,} bytes, found {found}: {hint}"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ParseError(
            f"{where}: expected text in UTF-8, found byte "
            f"0x{data[error.start]:02x} at {error.start:,}"
        ) from None


def _size(file: BinaryIO) -> int:
    """In bytes, as far as it is told."""
    try:
        return os.fstat(file.fileno()).st_size
    except (OSError, UnsupportedOperation):
        return 0
