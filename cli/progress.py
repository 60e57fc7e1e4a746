"""How far long work has come, on standard error, for a person who watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def watched() -> bool:
    """Whether anybody sees standard error."""
    return sys.stderr.isatty()


def tracked(items: list[T], what: str) -> Iterable[T]:
    """The items, with a bar while they are gone through."""
    if not watched():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, what, console=Console(file=sys.stderr), transient=True)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, and what moves it: (done, total) → None."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def move(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield move
