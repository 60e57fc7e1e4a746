"""Whatever a file holds, a reader gives a value or an error of ours, in bounds."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import writable

from pipeproof.cli import main
from pipeproof.sched import Program, Schedule, catalog, check, prove
from pipeproof.sched.errors import ParseError, PipeproofError
from pipeproof.sched.interop.json_form import format_json, parse_json
from pipeproof.sched.interop.torch_csv import read_torch_csv
from pipeproof.sched.interop.torch_program import torch_program
from pipeproof.sched.interop.torch_writer import format_torch_csv
from pipeproof.sim.cluster_file import load as load_cluster
from pipeproof.sim.cluster_file import parse as parse_cluster
from pipeproof.sim.cost_file import Measured, read_cost

MiB = 1 << 20

SMALL = catalog.make("zb-v", devices=2, micro_batches=2)
CHIMERA = catalog.make("chimera", devices=2, micro_batches=2)
CLUSTER = """\
devices_per_node = 4
within_node = { latency = 5.7e-6, bandwidth = 32e9 }
link_latency = 14e-6
nic_bandwidth = 12.5e9
memory = 24e9
buffering = "rendezvous"

[speeds]
3 = 0.9

[[links]]
source = 0
target = 1
bandwidth = 16e9
"""
parse_cluster(CLUSTER)
COST = """\
{"format": "pipeproof cost 1", "measured": "1f1b", "step_outside": 0.0004,
 "cost": {"forward": [0.003, 0.004], "recompute": 1, "activation_bytes": [8, 9]},
 "links": [{"source": 0, "target": 1, "latency": 0.0001, "bandwidth": 1e9}]}
"""


def read_csv(text: str) -> Schedule | Program:
    """With communication, the program too."""
    csv = read_torch_csv(text, agreeing=False)
    if csv.has_communication and csv.schedule.report.ok:
        return torch_program(csv)
    return csv.schedule


def read_cost_text(text: str) -> Measured:
    """As the file that `simulate --cost` takes."""
    with NamedTemporaryFile("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        return read_cost(file.name)


read_cost_text(COST)

Reader = Callable[[str], Any]
FORMS: dict[str, tuple[Reader, list[str]]] = {
    "text": (Schedule.parse, [SMALL.format(), CHIMERA.format()]),
    "json": (parse_json, [format_json(SMALL), format_json(CHIMERA)]),
    "csv": (
        read_csv,
        [
            format_torch_csv(SMALL),
            format_torch_csv(SMALL, communication=True),
            "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n",
        ],
    ),
    "toml": (parse_cluster, [CLUSTER]),
    "cost": (read_cost_text, [COST]),
}

PIECES = st.sampled_from(
    [
        *("0", "1", "-1", "9" * 7, "9" * 25, "1e400", "nan", "inf", "0x1F", "1_000"),
        *("F", "B", "R", "REDUCE", "OFFLOAD", "SEND_F", "UNSHARD", "&", "(", ")", "|"),
        *("[", "]", "{", "}", '"', "'", "\\", ",", ";", ":", "=", "\n", "\r", "\t"),
        *("\0", "\ufeff", "é", "１", "\u2028", "\ud7ff", "#", "null", "true", "{}"),
        *("devices: 9999999\n", '"micro_batches": 4194304,', "[" * 300, "a.b = 1\n"),
    ]
) | st.text(max_size=6)


@st.composite
def edited(draw: st.DrawFn, text: str) -> str:
    """A text after a few edits: pieces put in, left out, doubled and swapped."""
    for _ in range(draw(st.integers(1, 4))):
        low, high = sorted(draw(st.integers(0, len(text))) for _ in range(2))
        if draw(st.booleans()):  # mostly small ones: large ones leave little
            high = min(high, low + 3)
        middle, piece = text[low:high], draw(PIECES)
        new = draw(
            st.sampled_from([piece, "", middle * 2, piece + middle, middle[::-1]])
        )
        text = text[:low] + new + text[high:]
    return text


def judged(reader: Reader, text: str) -> None:
    """Read, check and prove; only errors of ours may come out."""
    try:
        found = reader(text)
        if isinstance(found, Schedule):
            assert len(found) <= len(text), "nothing is there that was not written"
            check(found)
        if isinstance(found, Program) or (
            isinstance(found, Schedule) and found.report.ok
        ):
            prove(found)
    except PipeproofError as error:
        said = str(error)
        if not 0 < len(said) < 20_000:
            raise AssertionError(f"a message of {len(said):,} characters") from error


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60)
@given(data=st.data())
def test_edited_files(form: str, data: st.DataObject) -> None:
    reader, texts = FORMS[form]

    judged(reader, data.draw(edited(data.draw(st.sampled_from(texts)))))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=5000)
@given(data=st.data())
def test_many_edited_files(form: str, data: st.DataObject) -> None:
    reader, texts = FORMS[form]

    judged(reader, data.draw(edited(data.draw(st.sampled_from(texts)))))


@settings(max_examples=60)
@given(schedule=writable(), data=st.data())
def test_edited_files_of_any_schedule(schedule: Schedule, data: st.DataObject) -> None:
    for reader, text in (
        (Schedule.parse, schedule.format()),
        (parse_json, format_json(schedule)),
    ):
        judged(reader, data.draw(edited(text)))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json"])
@settings(max_examples=30)
@given(data=st.binary(max_size=200))
def test_any_bytes(
    name: str, data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through the front door: one line, and a status that says whose fault it is."""
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(data)

    result = CliRunner().invoke(main, ["prove", str(path)])

    assert result.exit_code in (1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)


@settings(max_examples=60)
@given(data=st.binary(max_size=200))
def test_any_bytes_for_a_cluster(data: bytes) -> None:
    judged(parse_cluster, data.decode(errors="replace"))


LARGE = {
    "text": "devices: 1\nplacement: linear\nmicro-batches: 4194304\nsteps: 1\n\n"
    "device 0 | F0\n",
    "json": format_json(SMALL).replace(
        '"micro_batches": 2', '"micro_batches": 4194304'
    ),
    "csv": "0F4194303\n",
    "cost": COST.replace('"target": 1', '"target": 4194304'),
    "toml": f"nodes = [{', '.join(['0'] * 2000)}]\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_sizes_that_are_only_said_take_no_memory(form: str) -> None:
    reader, text = FORMS[form][0], LARGE[form]
    tracemalloc.start()
    try:
        judged(reader, text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 100 * MiB


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json"])
@pytest.mark.parametrize("command", ["check", "prove"])
def test_a_file_of_100_mb_is_refused_unread(
    name: str, command: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(100_000_000)  # takes no room on the disk
    tracemalloc.start()
    try:
        result = CliRunner().invoke(main, [command, str(path)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert result.exit_code == 2
    assert "expected at most 67,108,864 bytes, found 100,000,000 bytes" in (
        result.output
    )
    assert peak < 10 * MiB


def test_a_large_cluster_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(
            ParseError,
            match=r"at most 1,048,576 bytes, found [\d,]+ bytes: is this a file",
        ):
            load_cluster(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 10 * MiB
