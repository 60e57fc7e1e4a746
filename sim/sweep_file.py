"""The file that a sweep keeps its results in, and goes on from.

Rows are appended, each batch in one write, to a CSV file: the result itself, or,
beside `NAME.parquet`, `NAME.parquet.part`, since Parquet cannot be appended to.
What an interruption cuts off is the end of a line without its newline, and that
row is computed again. When all is done the result is written in the order of the
points, under another name first, then moved.

Each row ends with the digest of all that decides it (`key`), and must read back
to the letter. So a row is a point of this sweep or the file is refused.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeproof.sched.errors import ParameterError, ParseError
from pipeproof.sim.sweep_points import Point
from pipeproof.sim.sweep_results import Figures, Result

COLUMNS = (*Result(Point("", 1, 1), "refused").record(), "key")
LISTS = ("peak_activations", "peak_bytes")
COUNTS = ("devices", "micro_batches", "stages", "chunks", "slices", "ops")


def _line(values: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return ""
        return json.dumps(value) if isinstance(value, (tuple, list)) else str(value)

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(map(cell, values.values()))
    return text.getvalue()


HEADER = _line(dict(zip(COLUMNS, COLUMNS)))


def _floats(text: str) -> list[float]:
    return list(map(float, json.loads(text)))


def _kind(name: str) -> Callable[[str], Any]:
    """What a column holds, as what reads it."""
    if name in LISTS:
        return _floats
    numbers = {spec.name for spec in fields(Figures)} | {f"max_{n}" for n in LISTS}
    return int if name in COUNTS else float if name in numbers else str


KINDS = {name: _kind(name) for name in COLUMNS}


@dataclass(slots=True)
class Kept:
    """The results in a file, and how to add to them.

    Attributes:
        path: the result.
        journal: the file that rows are appended to.
        results: key → result, of all that was found.
    """

    path: Path
    journal: Path
    results: dict[str, Result]

    @classmethod
    def open(
        cls, path: Path, asked: Mapping[str, Point], tell: Callable[[str], object]
    ) -> Kept:
        """Read what is there, and make ready for more.

        Raises:
            ParameterError: neither CSV nor Parquet, or points that were not asked
                for.
            ParseError: what no sweep writes.
        """
        path = path.resolve()
        if path.suffix not in (".csv", ".parquet"):
            raise ParameterError(
                f"{path.name}: the name of a sweep's file ends in .csv or .parquet"
            )
        rows: dict[str, dict[str, Any]] = {}
        journal = path
        if path.suffix == ".parquet":
            _pyarrow(path)
            journal = path.with_name(path.name + ".part")
            if path.exists():
                rows |= _read_parquet(path)
        whole = _whole_lines(journal)
        rows |= _read_csv(journal, whole)
        _all_asked(path, rows, asked)
        results = {key: _result(rows[key], asked[key]) for key in rows}
        for key, row in rows.items():
            if _line(_row(key, results[key])) != _line(row):
                raise ParseError(
                    f"{path}: the row of {_named(row)} has been edited: give back its "
                    "old figures, or delete it"
                )
        _make_ready(journal, len(HEADER) + len(whole), tell)
        return cls(path, journal, results)

    def append(self, results: Mapping[str, Result]) -> None:
        """Add rows, all or (when interrupted) a first part of them."""
        lines = (_line(_row(key, result)) for key, result in results.items())
        with self.journal.open("ab", buffering=0) as file:
            file.write("".join(lines).encode())

    def finish(self, results: Mapping[str, Result]) -> None:
        """Replace the file with exactly these rows."""
        rows = [_row(key, result) for key, result in results.items()]
        draft = self.path.with_name(self.path.name + ".new")
        if self.path.suffix == ".parquet":
            _write_parquet(draft, rows)
        else:
            with draft.open("w", encoding="utf-8", newline="") as file:
                file.writelines([HEADER, *map(_line, rows)])
        if self.path.exists():
            shutil.copymode(self.path, draft)
        os.replace(draft, self.path)
        if self.journal != self.path:
            self.journal.unlink()


def _whole_lines(journal: Path) -> bytes:
    """All of a journal between its header and the end of its last whole line."""
    if not journal.exists():
        return b""
    if not journal.is_file():
        raise ParameterError(f"{journal}: expected a file, to go on from it")
    content = journal.read_bytes()
    header = HEADER.encode()
    if header.startswith(content):
        return b""
    if not content.startswith(header):
        raise ParseError(
            f"{journal}: line 1 is not the header of a sweep, "
            f"{HEADER[:40]!r}…: name another file"
        )
    return content[len(header) : content.rfind(b"\n") + 1]


def _make_ready(journal: Path, length: int, tell: Callable[[str], object]) -> None:
    """Leave the header and so many whole lines, for others to be added."""
    found = journal.stat().st_size if journal.exists() else 0
    if found < length:
        journal.write_text(HEADER, encoding="utf-8", newline="")
    elif found > length:
        os.truncate(journal, length)
    if found not in (0, length):
        tell(f"{journal}: its last line was cut off, and is written again")


def _read_csv(journal: Path, whole: bytes) -> dict[str, dict[str, Any]]:
    rows = {}
    # A cell lists every device, and may be longer than csv reads by default.
    bound = csv.field_size_limit(len(whole) + 1)
    try:
        for number, line in enumerate(whole.split(b"\n")[:-1], start=2):
            row = _read_line(line, f"{journal}: line {number}")
            rows[row["key"]] = row
    finally:
        csv.field_size_limit(bound)
    return rows


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        (cells,) = csv.reader([line.decode()], strict=True)
        return _typed(dict(zip(COLUMNS, cells, strict=True)))
    except (ValueError, TypeError, csv.Error) as error:
        raise ParseError(
            f"{where} is not a row of a sweep ({error}): delete it, or name another "
            "file"
        ) from None


def _typed(row: dict[str, str]) -> dict[str, Any]:
    """Cells of text → the values of `record`."""
    result: dict[str, Any] = dict(row)
    for name, kind in KINDS.items():
        if kind is not str:
            result[name] = kind(row[name]) if row[name] else None
    return result


def _row(key: str, result: Result) -> dict[str, Any]:
    return {**result.record(), "key": key}


def _result(row: Mapping[str, Any], point: Point) -> Result:
    figures = {spec.name: row[spec.name] for spec in fields(Figures)}
    for name in LISTS:
        if figures[name] is not None:
            figures[name] = tuple(figures[name])
    simulated = row["status"] == "simulated"
    return Result(
        point, row["status"], Figures(**figures) if simulated else None, row["reason"]
    )


def _all_asked(
    path: Path, rows: Mapping[str, dict[str, Any]], asked: Mapping[str, Point]
) -> None:
    """Refuse rows of another sweep."""
    others = [row for key, row in rows.items() if key not in asked]
    if not others:
        return
    descriptions = [point.described() for point in asked.values()]
    same = {name: others[0][name] for name in descriptions[0]} in descriptions
    why = (
        "it was made with another cost, cluster or generator of that name, or another "
        "version of pipeproof"
        if same
        else "this sweep does not ask for it"
    )
    raise ParameterError(
        f"{path}: {len(others)} of its {len(rows)} rows belong to another sweep. The "
        f"first is {_named(others[0])}: {why}. Nothing was changed; name another file"
    )


def _named(row: Mapping[str, Any]) -> str:
    names = ("devices", "micro_batches", "options", "recompute", "cost", "cluster")
    parts = [f"{name}={row[name]}" for name in names if row[name] not in ("", None)]
    return f"{row['schedule']}({', '.join(parts)})"


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ParameterError(
            f"{path.name}: Parquet needs pyarrow: pip install 'pipeproof[parquet]', "
            "or name a .csv file"
        ) from None
    return pyarrow, pyarrow.parquet


def _schema(arrow: Any) -> Any:
    types = {
        _floats: arrow.list_(arrow.float64()),
        int: arrow.int64(),
        float: arrow.float64(),
        str: arrow.string(),
    }
    return arrow.schema([(name, types[kind]) for name, kind in KINDS.items()])


def _read_parquet(path: Path) -> dict[str, dict[str, Any]]:
    arrow, parquet = _pyarrow(path)
    try:
        table = parquet.read_table(path)
    except arrow.ArrowException as error:
        raise ParseError(f"{path}: not Parquet ({error}): name another file") from None
    if table.schema.remove_metadata() != _schema(arrow):
        raise ParseError(f"{path}: not the columns of a sweep: name another file")
    return {row["key"]: row for row in table.to_pylist()}


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    arrow, parquet = _pyarrow(path)
    table = arrow.Table.from_pylist(rows, schema=_schema(arrow))
    parquet.write_table(table, path)
