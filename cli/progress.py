"""How far long work has come, on standard error, for a person who watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def watched() -> bool:
    """Whether anybody sees standard error."""
    return sys.stderr.isatty()


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
