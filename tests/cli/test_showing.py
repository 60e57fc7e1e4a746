"""Colours of a grid, and the publications' own figures."""

import pytest
from click.testing import CliRunner

from pipeproof.cli import main
from pipeproof.cli.painting import painted
from pipeproof.sched import CATALOG, Schedule, catalog
from pipeproof.sched.interop.svg import COLOURS
from pipeproof.sched.ops import Kind
from pipeproof.sim import Cost, simulate

FORWARD, BACKWARD = COLOURS[Kind.F][0], COLOURS[Kind.B][0]


def spans(schedule: Schedule, cost: Cost) -> list[list[tuple[str, str]]]:
    """(text, colour) of what is coloured in each line but the legend."""
    lines = simulate(schedule, cost).grid().splitlines()
    *rows, _ = painted(lines, schedule)
    return [
        [(row.plain[span.start : span.end], str(span.style)) for span in row.spans]
        for row in rows
    ]


def test_colours_the_kinds_and_pales_the_chunks() -> None:
    schedule = catalog.make("interleaved", devices=1, micro_batches=1)
    forward, paler, *backward = spans(schedule, Cost(1, 1, 1))[0]

    assert forward == ("0F0", f"black on {FORWARD}")
    assert paler[0] == "1F0"
    assert paler[1] not in {f"black on {FORWARD}", "dim"}
    assert [text for text, _ in backward] == ["1B0", " ---", "0B0", " ---"]
    assert backward[2] == ("0B0", f"black on {BACKWARD}")


def test_gives_each_op_of_an_overlap_group_its_colour() -> None:
    schedule = Schedule.parse(
        "name: pair\ndevices: 1\nplacement: linear\nmicro-batches: 2\n"
        "device 0 | 0F0 (0F1&0B0) 0B1\n"
    )
    colours = dict(spans(schedule, Cost(1, 1, 0))[0])

    assert colours["F1"] == f"black on {FORWARD}"
    assert colours["B0"] == f"black on {BACKWARD}"


@pytest.mark.parametrize("name", CATALOG)
def test_draws_each_schedule_without_sizes(name: str) -> None:
    figure = CATALOG[name].figure
    result = CliRunner().invoke(main, ["show", name])

    assert result.exit_code == 0
    assert CATALOG[name].make(figure).summary in result.output
    assert result.output.count("device ") == figure.p
    assert "\x1b" not in result.output


def test_keeps_what_is_asked_for_beside_the_sizes() -> None:
    run = CliRunner().invoke
    sliced = run(main, ["show", "terapipe", "--slices", "2"])
    timed = run(main, ["show", "gpipe", "--backward", "3"])

    assert "slices=2" in sliced.output
    assert "B3 -- --" in timed.output


def test_colours_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = CliRunner().invoke(main, ["show", "1f1b"])
    monkeypatch.setenv("NO_COLOR", "1")
    plain = CliRunner().invoke(main, ["show", "1f1b"])

    assert "\x1b[" in coloured.output
    assert " input gradient " not in coloured.output
    assert "\x1b" not in plain.output
