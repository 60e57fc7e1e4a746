import re
from fractions import Fraction
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from pipeproof.sched import (
    F,
    I,
    ParameterError,
    Placement,
    Schedule,
    Trace,
    W,
    catalog,
    overlap,
    recompute,
)
from pipeproof.sched.interop.html import draw_html
from pipeproof.sched.interop.svg import draw_svg, ticks
from pipeproof.sim import Cluster, Cost, simulate

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<script>alert('&')</script>\"x"


def predicted(name: str = "1f1b", p: int = 2, m: int = 3) -> Trace:
    schedule = catalog.make(name, devices=p, micro_batches=m)
    return simulate(recompute(schedule, "adaptive").renamed(NASTY))


def boxes(svg: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    return [rect for g in root.iter(f"{SVG}g") for rect in g.iter(f"{SVG}rect")]


def test_one_box_an_op_to_scale() -> None:
    trace = simulate(catalog.make("gpipe", devices=2, micro_batches=1), Cost(2, 1, 1))

    drawn = boxes(draw_svg(trace, width=1088))  # 1000 pixels for 8 units of time

    places = [(float(b.attrib["x"]), float(b.attrib["width"])) for b in drawn]
    assert places == [(76.5, 249), (826.5, 249), (326.5, 249), (576.5, 249)]


def test_every_op_has_its_colour_and_legend() -> None:
    svg = draw_svg(predicted())

    assert len(boxes(svg)) == len(predicted().program.schedule)
    for name in ("forward", "backward", "recompute"):
        assert f">{name}<" in svg
    assert ">input gradient<" not in svg


def test_a_group_shares_its_row() -> None:
    schedule = Schedule.of(
        [
            [
                *(F(0, 0), F(1, 0), overlap(F(0, 1), I(1, 0)), F(1, 1), I(1, 1)),
                *(W(1, 0), I(0, 0), I(0, 1), W(1, 1), W(0, 0), W(0, 1)),
            ]
        ],
        placement=Placement(((0, 0),)),
    )

    heights = [box.attrib["height"] for box in boxes(draw_svg(simulate(schedule)))]

    assert sorted(heights) == ["13.0"] * 2 + ["26.0"] * 10


def test_names_are_escaped() -> None:
    for page in (draw_svg(predicted()), draw_html(predicted())):
        assert "<script" not in page
        assert "&lt;script&gt;" in page


def test_the_page_fetches_nothing_and_closes_its_tags() -> None:
    class Reader(HTMLParser):
        open_tags: list[str]

        def handle_starttag(
            self, tag: str, attrs: list[tuple[str, str | None]]
        ) -> None:
            assert tag not in ("script", "link", "img", "iframe", "object")
            assert not {"src", "href", "onload"} & {name for name, _ in attrs}
            if tag not in ("meta", "path", "rect"):
                self.open_tags.append(tag)

        def handle_startendtag(
            self, tag: str, attrs: list[tuple[str, str | None]]
        ) -> None:
            assert tag in ("path", "rect")

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    trace = simulate(
        catalog.make("1f1b", devices=2, micro_batches=3),
        Cost(forward=Fraction(1, 3), activation_bytes=100, boundary_bytes=10),
        Cluster(link_latency=1),
    )
    page = draw_html(trace)
    reader = Reader()
    reader.open_tags = []

    reader.feed(page)

    assert reader.open_tags == []
    assert not re.search(r"url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "default-src 'none'" in page
    assert "device 1: peak" in page
    for name in ("bubble_fraction", "span_bubble", "peak_bytes", "makespan"):
        assert f"<th>{name}</th>" in page


def test_without_bytes_the_page_shows_activations() -> None:
    assert "device 0: peak 2 micro-batch activations" in draw_html(
        simulate(catalog.make("1f1b", devices=2, micro_batches=3))
    )


def test_free_ops_draw_too() -> None:
    trace = simulate(catalog.make("1f1b", devices=2, micro_batches=3), Cost(0, 0, 0))

    assert len(boxes(draw_svg(trace))) == 12
    draw_html(trace)


def test_ticks_are_round() -> None:
    assert ticks(33) == [0, 5, 10, 15, 20, 25, 30]
    assert ticks(0) == [0]
    assert max(ticks(0.007)) <= 0.007


def test_says_when_no_picture_helps() -> None:
    trace = simulate(catalog.make("gpipe", devices=4, micro_batches=7000))

    with pytest.raises(ParameterError, match="56,000 ops are too many for one picture"):
        draw_svg(trace)
    with pytest.raises(ParameterError, match="width must be at least 200 pixels"):
        draw_svg(predicted(), width=20)
