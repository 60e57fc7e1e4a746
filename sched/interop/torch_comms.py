"""Whether the communication in a CSV of torch's is what its ops imply."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipeproof.sched.errors import ParseError
from pipeproof.sched.ir import BACKWARD_KINDS, Kind, Op


@dataclass(frozen=True, slots=True)
class Place:
    """A cell's row and column, counted from 1; row r is rank r - 1."""

    row: int
    column: int

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column}"

    def wrong(self, expected: str, found: str) -> ParseError:
        """The error for what stands here."""
        shown = ascii(found[:40]) if found else "an empty cell"
        return ParseError(f"{self}: expected {expected}, found {shown}")


@dataclass(frozen=True, slots=True)
class Cell:
    """One action.

    Attributes:
        place: where it stands.
        word: as written.
        ops: what it computes; nothing for the other actions.
        action: of those, `SEND_F`, `RECV_F`, `SEND_B`, `RECV_B`, `UNSHARD`,
            `RESHARD` or `REDUCE_GRAD`.
        stage, micro_batch: of those; -1 for none.
    """

    place: Place
    word: str
    ops: tuple[Op, ...]
    action: str
    stage: int
    micro_batch: int


Transfer = tuple[str, int, int]
"""F or B, the stage that sends, the micro-batch."""


def belong(rows: list[list[Cell]], home: list[int]) -> None:
    """Refuse actions on another rank's stages, and those on weights out of turn.

    Args:
        rows: every rank's cells, in order.
        home: the rank of each stage.

    Raises:
        ParseError: at the first cell at fault.
    """
    reduced = {c.stage for row in rows for c in row if c.action == "REDUCE_GRAD"}
    for rank, row in enumerate(rows):
        sharding = _Sharding(row)
        last: dict[int, Cell] = {}  # backward of each stage
        for cell in row:
            sharding.step(cell)
            last |= {op.stage: cell for op in cell.ops if op.kind != Kind.F}
            if not cell.ops and home[cell.stage] != rank:
                raise cell.place.wrong(
                    f"an action on a stage of rank {rank}; stage {cell.stage} is on "
                    f"rank {home[cell.stage]}",
                    cell.word,
                )
        sharding.end()
        for stage, cell in last.items():
            if reduced and stage not in reduced:
                raise cell.place.wrong(
                    f"{stage}REDUCE_GRAD behind it, as other stages have: torch scales "
                    "gradients there",
                    cell.word,
                )


def agree(rows: list[list[Cell]], home: list[int]) -> None:
    """Refuse transfers that are missing, needless, misplaced or mispaired.

    Args:
        rows: every rank's cells, in order.
        home: the rank of each stage.

    Raises:
        ParseError: at the first cell at fault.
    """
    sent: dict[Transfer, Cell] = {}
    received: dict[Transfer, Cell] = {}
    for row in rows:
        done: set[tuple[str, int, int]] = set()
        for cell in row:
            if cell.ops:
                _needs_arrived(cell, received, home)
                done |= {(_way(op), op.stage, op.micro_batch) for op in cell.ops}
            elif cell.micro_batch >= 0:
                key = transfer(cell, home)
                if cell.action.startswith("SEND"):
                    if (key[0], cell.stage, cell.micro_batch) not in done:
                        raise cell.place.wrong(
                            "a send behind the op that computes what it sends",
                            cell.word,
                        )
                    sent[key] = cell
                else:
                    if (key[0], cell.stage, cell.micro_batch) in done:
                        raise cell.place.wrong(
                            "a receive ahead of the op that needs it", cell.word
                        )
                    received[key] = cell
    _all_sent(rows, sent, home)
    _paired(sent, received, home)


def _way(op: Op) -> str:
    if op.kind == Kind.F:
        return "F"
    return "B" if op.kind in BACKWARD_KINDS else "W"


def transfer(cell: Cell, home: Sequence[int]) -> Transfer:
    """Which tensor a SEND or a RECV is about.

    Raises:
        ParseError: there is no transfer between these stages.
    """
    verb, way = cell.action.split("_")
    down = way == "F"
    if verb == "SEND":
        source, target = cell.stage, cell.stage + (1 if down else -1)
    else:
        source, target = cell.stage - (1 if down else -1), cell.stage
    for stage in (source, target):
        if not 0 <= stage < len(home):
            raise cell.place.wrong(
                f"transfers between stages 0 … {len(home) - 1}; there is no stage "
                f"{stage}",
                cell.word,
            )
    if home[source] == home[target]:
        raise cell.place.wrong(
            f"no transfer between stages {source} and {target}, both on rank "
            f"{home[source]}",
            cell.word,
        )
    return way, source, cell.micro_batch


def _needs_arrived(cell: Cell, received: dict[Transfer, Cell], home: list[int]) -> None:
    """What an op needs from another rank is received ahead of it."""
    for op in cell.ops:
        way = _way(op)
        source = op.stage + {"F": -1, "B": 1, "W": 0}[way]
        if not 0 <= source < len(home) or home[source] == home[op.stage]:
            continue
        if (way, source, op.micro_batch) not in received:
            raise cell.place.wrong(
                f"{op.stage}RECV_{way}{op.micro_batch} ahead of {op}", cell.word
            )


def _all_sent(
    rows: list[list[Cell]], sent: dict[Transfer, Cell], home: list[int]
) -> None:
    """What another rank needs is sent."""
    for cell in (cell for row in rows for cell in row):
        for op in cell.ops:
            way = _way(op)
            target = op.stage + {"F": 1, "B": -1, "W": 0}[way]
            if not 0 <= target < len(home) or home[target] == home[op.stage]:
                continue
            if (way, op.stage, op.micro_batch) not in sent:
                raise cell.place.wrong(
                    f"{op.stage}SEND_{way}{op.micro_batch} behind {op}", cell.word
                )


def _paired(
    sent: dict[Transfer, Cell], received: dict[Transfer, Cell], home: list[int]
) -> None:
    """The k-th send from one rank to another is the k-th receive."""
    queues: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for key in sent:
        queues[_ends(key, home)].append(key)
    taken: dict[tuple[int, int], int] = defaultdict(int)
    for key, cell in received.items():
        ends = _ends(key, home)
        place = taken[ends]
        taken[ends] += 1
        if place >= len(queues[ends]):
            raise cell.place.wrong("a receive of something that is sent", cell.word)
        if queues[ends][place] != key:
            other = sent[queues[ends][place]]
            raise cell.place.wrong(
                f"the receive of {other.word} ({other.place}), number {place + 1} "
                f"that rank {ends[0]} sends to rank {ends[1]}: they pair up in order",
                cell.word,
            )
    for ends, queue in queues.items():
        if taken[ends] < len(queue):
            cell = sent[queue[taken[ends]]]
            raise cell.place.wrong(
                f"a receive on rank {ends[1]} of what is sent", cell.word
            )


def _ends(key: Transfer, home: list[int]) -> tuple[int, int]:
    way, source, _ = key
    return home[source], home[source + (1 if way == "F" else -1)]


class _Sharding:
    """UNSHARD and RESHARD of a stage take turns; REDUCE_GRAD ends its backwards."""

    def __init__(self, row: list[Cell]) -> None:
        self._sharded = {cell.stage for cell in row if cell.action == "UNSHARD"}
        self._open: dict[int, Cell] = {}
        self._reduced: set[int] = set()

    def step(self, cell: Cell) -> None:
        for op in cell.ops:
            if op.stage in self._sharded and op.stage not in self._open:
                raise cell.place.wrong(f"{op.stage}UNSHARD ahead of {op}", cell.word)
            if op.stage in self._reduced and op.kind != Kind.F:
                raise cell.place.wrong(
                    f"{op.stage}REDUCE_GRAD behind all its backwards", cell.word
                )
        if cell.action == "REDUCE_GRAD":
            self._reduced.add(cell.stage)
        elif cell.action == "UNSHARD":
            if cell.stage in self._open:
                raise cell.place.wrong(
                    f"a RESHARD since {self._open[cell.stage].place}", cell.word
                )
            self._open[cell.stage] = cell
        elif cell.action == "RESHARD" and self._open.pop(cell.stage, None) is None:
            raise cell.place.wrong("an UNSHARD ahead of it", cell.word)

    def end(self) -> None:
        for cell in self._open.values():
            raise cell.place.wrong("a RESHARD behind it", cell.word)
