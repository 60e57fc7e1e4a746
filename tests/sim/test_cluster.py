"""What a cluster says, and clusters from files."""

import re
import shlex
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import positive_times, schedules, times

import pipeproof.sim
from pipeproof.cli import main
from pipeproof.sched import ParameterError, ParseError, Schedule, catalog, lower
from pipeproof.sched.exact import Number
from pipeproof.sim import PRESETS, Cluster, Cost, Link, lower_bound, preset, simulate
from pipeproof.sim.cluster_file import READERS, parse
from pipeproof.sim.toml import MAX_BYTES


def test_a_link_is_that_of_the_pair_or_the_node_or_all() -> None:
    cluster = Cluster(
        link_latency=9,
        link_bandwidth=5,
        devices_per_node=2,
        within_node=Link(1, 50),
        links={(0, 1): Link(2, 40), (1, 2): Link(3)},
        nic_bandwidth=4,
    )

    assert cluster.link(0, 1) == Link(2, 40)
    assert cluster.link(1, 0) == Link(1, 50)
    assert cluster.link(2, 3) == Link(1, 50)
    assert cluster.link(0, 2) == Link(9, 4)  # the card is slower than the link
    assert cluster.link(1, 2) == Link(3, 4)
    assert cluster.own_link(1, 2) == Link(3)


@pytest.mark.parametrize(
    ("given", "alike"),
    [
        ({}, True),
        ({"link_latency": 2, "link_bandwidth": 8}, True),
        ({"devices_per_node": 2, "link_latency": 2}, True),
        ({"links": {(0, 1): Link(3)}}, False),
        ({"devices_per_node": 2, "within_node": Link(1)}, False),
        ({"devices_per_node": 2, "nic_bandwidth": 4}, False),
    ],
)
def test_one_link_stands_for_all_where_all_are_alike(
    given: dict[str, Any], alike: bool
) -> None:
    cluster = Cluster(**given)
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    different = {cluster.link(*pair) for pair in pairs}

    assert (cluster.only_link is not None) == alike == (len(different) == 1)
    assert not alike or different == {cluster.only_link}


def test_nodes_and_cards() -> None:
    by_order = Cluster(devices_per_node=4, nic_bandwidth=1, devices_per_nic=2)
    by_name = Cluster(node_of=[1, 0, 1, 1], nic_bandwidth=1, devices_per_nic=2)

    assert [by_order.node(d) for d in range(6)] == [0, 0, 0, 0, 1, 1]
    assert [by_order.nic(d) for d in range(6)] == [
        *((0, 0), (0, 0), (0, 1), (0, 1)),
        *((1, 0), (1, 0)),
    ]
    assert [by_name.nic(d) for d in range(4)] == [(1, 0), (0, 0), (1, 0), (1, 1)]
    assert [Cluster().node(d) for d in (0, 9)] == [0, 0]


def test_node_of_must_name_every_device_that_sends() -> None:
    cluster = Cluster(node_of=[0, 1], nic_bandwidth=1)
    schedule = catalog.make("1f1b", devices=3, micro_batches=3)

    with pytest.raises(ParameterError, match="nodes of 2 devices; device 2 needs one"):
        simulate(schedule, Cost(boundary_bytes=1), cluster)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"streams": "both"},
            "streams must be one of dir, pair, one, sync, got 'both'",
        ),
        (
            {"speeds": {1: 0}},
            "speeds: device 1 must have a finite speed above 0, got 0",
        ),
        ({"memory": -1}, "memory must be above 0 bytes, got -1"),
        ({"host_bandwidth": 0}, "host_bandwidth must be above 0 bytes per unit of ti"),
        ({"within_node": 3}, "within_node must be a Link, got 3"),
        ({"within_node": Link()}, "within_node needs to know which devices share a n"),
        (
            {"nic_bandwidth": 1},
            "nic_bandwidth needs to know which devices share a node",
        ),
        ({"host_memory": 1}, "host_memory needs to know which devices share a node"),
        ({"node_of": [0, -1]}, "node_of must be integers of at least 0, .* got -1"),
        ({"devices_per_node": 0}, "devices_per_node must be at least 1, got 0"),
        ({"devices_per_node": 1, "node_of": [0]}, "give one of them"),
        (
            {"devices_per_node": 2, "devices_per_nic": 1},
            "devices_per_nic needs a nic_bandwidth",
        ),
        (
            {"devices_per_node": 2, "nic_bandwidth": 1, "devices_per_nic": 3},
            "devices_per_nic must be at most devices_per_node, 2, got 3",
        ),
        ({"links": {(0, 1): 3}}, r"links: expected a Link for \(0, 1\), got 3"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Cluster(**given)


@settings(max_examples=20)
@given(
    schedule=schedules(),
    latency=times,
    bandwidth=positive_times,
    per_second=st.sampled_from([1, 1000, Fraction(1, 60)]),
)
def test_another_unit_of_time_changes_nothing_else(
    schedule: Schedule, latency: Number, bandwidth: Number, per_second: Any
) -> None:
    """In milliseconds a step takes 1000 times as many."""
    seconds = Cluster(
        link_latency=latency,
        link_bandwidth=bandwidth,
        links={(0, 1): Link(1, 2)},
        devices_per_node=2,
        within_node=Link(bandwidth=5),
        nic_bandwidth=7,
        host_bandwidth=3,
        node_host_bandwidth=4,
    )
    time = Fraction(1, 3)
    one, other = (
        simulate(
            schedule,
            Cost(time * unit, time * unit, time * unit, boundary_bytes=3),
            seconds.in_units(unit),
        )
        for unit in (1, per_second)
    )

    assert other.makespan == one.makespan * per_second


@settings(max_examples=25)
@given(
    schedule=schedules(),
    speeds=st.dictionaries(st.integers(0, 3), positive_times),
    latency=times,
)
def test_no_order_beats_the_bound_on_uneven_devices(
    schedule: Schedule, speeds: dict[int, Number], latency: Number
) -> None:
    program = lower(schedule)
    cluster = Cluster(link_latency=latency, speeds=speeds)

    bound = lower_bound(program, Cost(), cluster)
    trace = simulate(program, Cost(), cluster)

    assert max(trace.busy) <= bound <= trace.makespan


WHOLE = """\
# two nodes of four devices, one of them slow
devices_per_node = 4
within_node = { latency = 2, bandwidth = 32e9 }
link_latency = 14
link_bandwidth = 20e9
nic_bandwidth = 12500000000
devices_per_nic = 2
host_bandwidth = 30e9
node_host_bandwidth = 90e9
memory = 24e9
host_memory = 1e12
buffering = 3
streams = "pair"
shared_processor = false

[speeds]
3 = 0.9

[[links]]
source = 0
target = 1
bandwidth = 16e9

[[links]]
source = 1
target = 0
latency = 1
"""


def test_a_file_says_what_the_attributes_are() -> None:
    assert parse(WHOLE) == Cluster(
        devices_per_node=4,
        within_node=Link(2, 32e9),
        link_latency=14,
        link_bandwidth=20e9,
        nic_bandwidth=12_500_000_000,
        devices_per_nic=2,
        host_bandwidth=30e9,
        node_host_bandwidth=90e9,
        memory=24e9,
        host_memory=1e12,
        buffering=3,
        streams="pair",
        speeds={3: 0.9},
        links={(0, 1): Link(0, 16e9), (1, 0): Link(1)},
    )
    assert parse("") == Cluster()
    assert parse("node_of = [0, 1, 0]") == Cluster(node_of=[0, 1, 0])
    assert list(READERS) == [spec.name for spec in fields(Cluster)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nic_bandwith = 1", "nic_bandwith: expected a key of link_latency, "),
        ("memory = '24 GB'", "memory: expected a number, found text 24 GB"),
        ("memory = true", "memory: expected a number, found bool True"),
        ("memory = -1", "memory must be above 0 bytes, got -1"),
        ("link_latency = nan", "link latency must be a finite time of at least 0"),
        ("devices_per_node = 2.0", "devices_per_node: expected an integer, found floa"),
        ("shared_processor = 1", "shared_processor: expected true or false, found int"),
        ("streams = 1", "streams: expected text in quotes, found int 1"),
        ("streams = 'two'", "streams must be one of dir, pair, one, sync, got 'two'"),
        ("buffering = 0", "buffering must be 'eager', 'rendezvous' or a number of me"),
        ("buffering = 1.5", "buffering: expected an integer, found float 1.5"),
        ("node_of = [0, '1']", r"node_of\[1\]: expected an integer, found text 1"),
        ("node_of = 0", "node_of: expected a list, found int 0"),
        ("within_node = 3", "within_node: expected a table, found int 3"),
        ("within_node.speed = 3", "within_node.speed: expected a key of latency, ba"),
        ("within_node.bandwidth = 0", "within_node: link bandwidth must be above 0"),
        ("speeds.a = 1", "speeds: expected numbers of devices as keys, .* found a"),
        ("speeds.01 = 1", "speeds: expected numbers of devices as keys, .* found 01"),
        ("speeds.1 = 'x'", "speeds.1: expected a number, found text x"),
        (
            "[[links]]\ntarget = 1",
            r"links\[0\]: expected source and target, found no s",
        ),
        (
            "[[links]]\nsource = 1\ntarget = 1",
            r"links\[0\]: expected two different devices, .* found 1 and 1",
        ),
        (
            "links = [{source=0, target=1}, {source=0, target=1}]",
            r"links\[1\]: expected each pair once; 0 to 1 is there already",
        ),
        (
            "links = [{source=0, target=1, latency='x'}]",
            r"links\[0\].latency: expected",
        ),
        ("memory = ", "expected TOML: Invalid value .at end of document"),
        ("x = " + "[" * 100_000, "expected TOML with numbers and few brackets"),
        ("memory = " + "9" * 5000, "expected TOML with numbers and few brackets"),
        (f"{'x' * 100} = 1", f"{'x' * 40}…: expected a key of"),
        ('"\\u001bc" = 1', r"'.x1bc': expected a key of"),
    ],
)
def test_a_file_that_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)

    with pytest.raises(ParseError, match=message) as caught:
        Cluster.load(path)

    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 500


def test_a_file_that_is_no_text_or_too_long(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"memory = \xff")
    with pytest.raises(
        ParseError, match="expected text in UTF-8, found byte 0xff at 9"
    ):
        Cluster.load(path)

    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(
        ParseError, match=r"expected at most 1,048,576 bytes, found [\d,]+ bytes"
    ):
        Cluster.load(path)


def test_presets_have_numbers_and_sources() -> None:
    for name, one in PRESETS.items():
        assert preset(name) is one.cluster
        assert one.name == name
        assert one.source
        assert one.cluster.memory
        assert one.cluster.nic_bandwidth

    with pytest.raises(ParameterError, match="no cluster is called 'dgx': there are "):
        preset("dgx")


def test_a_message_on_a_preset_in_milliseconds() -> None:
    """25 MB cross NVLink in 3.4 µs + 25e6 / 300e9 s, the network in 14 µs + 1 ms."""
    cluster = preset("dgx-a100").in_units(1000)
    near, far = cluster.link(0, 1), cluster.link(7, 8)

    assert near.latency + near.occupied(25e6) == pytest.approx(0.0034 + 0.25 / 3)
    assert far.latency + far.occupied(25e6) == pytest.approx(0.014 + 1)


def test_the_chapter_shows_what_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chapter = Path(pipeproof.sim.__file__).with_name("CLUSTER.md").read_text("utf-8")
    (file,) = re.findall(r"```toml\n(.*?)```", chapter, flags=re.DOTALL)
    blocks = re.findall(r"```console\n(.*?)```", chapter, flags=re.DOTALL)

    assert parse(file).speeds == {3: 0.9}
    assert len(blocks) == 4
    for block in blocks:
        parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:]
        for command, shown in zip(parts[::2], parts[1::2]):
            program, *arguments = shlex.split(command)
            if program == "cat":
                Path(arguments[0]).write_text(shown, encoding="utf-8")
            else:
                assert program == "pipeproof"
                assert CliRunner().invoke(main, arguments).stdout == shown
