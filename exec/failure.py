"""The first failure of any rank: where all find it, and what it says."""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict, dataclass

from torch._C._distributed_c10d import Store


@dataclass(frozen=True)
class Failure:
    """Why all ranks end.

    Attributes:
        rank: whose fault it was; -1 for nobody's in particular.
        reason: what happened there: the op, the stage, the micro-batch.
        trace: the traceback, where there is one.
    """

    rank: int
    reason: str
    trace: str = ""

    def __str__(self) -> str:
        who = "" if self.rank < 0 else f"rank {self.rank} "
        return f"{who}{self.reason}" + (f"\n{self.trace}" if self.trace else "")


class Record:
    """The first failure of any rank, in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found: Failure | None = None

    @property
    def known(self) -> Failure | None:
        """What was read or written here; it costs no look into the store."""
        return self._found

    def write(self, failure: Failure) -> None:
        """Keep this one, unless there is another already."""
        if self._store.add("failures", 1) == 1:
            self._store.set("failure", json.dumps(asdict(failure)))
            self._found = failure

    def read(self) -> Failure | None:
        """The failure, if there is one."""
        if self._found is None and self._store.check(["failure"]):
            self._found = Failure(**json.loads(self._store.get("failure")))
        return self._found


def in_words(error: BaseException) -> str:
    """Its type, and what it says, if it can."""
    try:
        text = str(error)
    except Exception as other:
        text = f"its text cannot be made: {type(other).__name__}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def failure_of(error: BaseException, rank: int, what: str) -> Failure:
    """What a rank has to say of an exception, wherever it was."""
    cause = error.__cause__ or error
    lines = ""
    if not isinstance(error, KeyboardInterrupt):  # wherever that was, was chance
        lines = "".join(traceback.format_exception(cause)).rstrip()
    return Failure(rank, f"failed in {what}: {in_words(error)}", lines)
