"""Skip connections: what a stage hands straight to a later one."""

import pytest
from hypothesis import given
from programs import assembled, parts_of
from strategies import whole_language

from pipeproof.sched import (
    B,
    Certificate,
    F,
    ParameterError,
    ParseError,
    Placement,
    Schedule,
    ScheduleError,
    UnsupportedError,
    catalog,
    check,
    lower,
    prove,
)
from pipeproof.sched.interop.json_form import format_json, parse_json
from pipeproof.sched.interop.torch_writer import format_torch_csv
from pipeproof.sched.lower import POLICIES


def three_devices(micro_batches: int = 2) -> Schedule:
    return catalog.make("1f1b", devices=3, micro_batches=micro_batches)


def touched(schedule: Schedule) -> set[str]:
    """Messages and buffers of the program that are the skips', in words."""
    return {
        f"{instruction.label} ({instruction.stream.device}): {verb} {buffer}"
        for instruction in lower(schedule)
        for verb in ("reads", "writes", "frees")
        for buffer in getattr(instruction, verb)
        if buffer.skip is not None
    }


def test_a_skip_goes_past_the_stages_between() -> None:
    assert touched(three_devices(1).with_skips([(0, 2)])) == {
        "0F0 (0): writes output 0→2:0",
        "send activation 0→2:0 (0): reads output 0→2:0",
        "send activation 0→2:0 (0): frees output 0→2:0",
        "recv activation 0→2:0 (2): writes input 0→2:0",
        "2F0 (2): reads input 0→2:0",
        "2B0 (2): reads input 0→2:0",
        "2B0 (2): frees input 0→2:0",
        "2B0 (2): writes input_grad 0→2:0",
        "send gradient 2→0:0 (2): reads input_grad 0→2:0",
        "send gradient 2→0:0 (2): frees input_grad 0→2:0",
        "recv gradient 2→0:0 (0): writes output_grad 0→2:0",
        "0B0 (0): reads output_grad 0→2:0",
        "0B0 (0): frees output_grad 0→2:0",
    }


def test_on_one_device_it_is_handed_over() -> None:
    row = [F(0, 0), F(1, 0), F(2, 0), B(2, 0), B(1, 0), B(0, 0)]
    schedule = Schedule.of([row], placement=Placement(((0, 0, 0),)), skips=[(0, 2)])
    labels = [instruction.label for instruction in lower(schedule)]

    assert "local output 0→2:0" in labels
    assert "local input_grad 0→2:0" in labels
    assert lower(schedule).message_count == 0


@given(schedule=whole_language())
def test_both_forms_keep_them(schedule: Schedule) -> None:
    for again in (Schedule.parse(schedule.format()), parse_json(format_json(schedule))):
        assert again == schedule
        assert again.skips == schedule.skips


def test_they_are_part_of_what_a_schedule_is() -> None:
    plain = three_devices()
    skipping = plain.with_skips([(0, 2)])

    assert skipping != plain == skipping.with_skips([])
    assert skipping.digest != plain.digest
    assert "skips: 0>2\n" in skipping.format()
    assert "skips" not in plain.format()
    assert skipping.with_rows([skipping.row(d) for d in range(3)]) == skipping


def test_skips_alone_change_nothing_else() -> None:
    """Where bytes are free, every op runs when it did."""
    from pipeproof.sim import Cost, simulate

    for name in ("gpipe", "1f1b", "zb-h1", "interleaved"):
        plain = catalog.make(name, devices=4, micro_batches=8)
        skips = [(0, plain.stages - 1), (1, 3)]
        cost = Cost(forward=2, input_grad=3, weight_grad=1)
        grids = [simulate(one, cost).grid() for one in (plain, plain.with_skips(skips))]
        assert grids[0] == grids[1]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-v", "interleaved"])
def test_all_at_once_are_proved_under_every_policy(name: str) -> None:
    schedule = catalog.make(name, devices=4, micro_batches=4)
    last = schedule.stages
    every = [(a, b) for a in range(last) for b in range(a + 2, last)]
    for transfers in POLICIES["transfers"]:
        for receives in POLICIES["receives"]:
            program = lower(
                schedule.with_skips(every),
                transfers=transfers,  # type: ignore[arg-type]
                receives=receives,  # type: ignore[arg-type]
            )
            assert isinstance(prove(program), Certificate)
            for streams in ("pair", "dir", "one", "sync"):
                assert check(program, streams=streams).ok  # type: ignore[arg-type]


def test_says_which_skips_cannot_be() -> None:
    wrong = [(0, 1), (1, 1), (2, 0), (1, 3)]
    with pytest.raises(ScheduleError) as caught:
        check(three_devices().with_skips(wrong)).raise_if_bad()

    expected = "    expected: skips from a stage to one of 0 … 2 that is at least two "
    expected += "further on"
    assert str(caught.value).splitlines() == [
        "1f1b(devices=3, micro_batches=2) breaks 4 rules:",
        "  schedule: 0>1: it leads to the next stage",
        expected,
        "    Drop it: the stage's output goes there.",
        "  schedule: 1>1: it leads nowhere",
        expected,
        "    Drop it: a stage keeps its own.",
        "  schedule: 1>3: there is no stage 3",
        expected,
        "    Name stages of the schedule, or drop it.",
        "  schedule: 2>0: it leads back",
        expected,
        "    Let it lead forward, 0>2.",
    ]


@pytest.mark.parametrize(
    ("skips", "message"),
    [
        ([(0, 2), (0, 2)], "skips name 0>2 twice: what one stage hands to another is"),
        ([(0, 2.0)], r"skips: expected pairs of stages, as \(0, 3\), found \(0, 2.0\)"),
        ([3], r"skips: expected pairs of stages, as \(0, 3\), found 3"),
        ([(0, n + 2) for n in range(1025)], "skips: at most 1,024, got more"),
    ],
)
def test_says_what_is_no_skip(skips: list, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        three_devices().with_skips(skips)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("0-2", r"line 7: skips: expected skips as 0>3, found '0-2'"),
        ("0>2 0>2", r"line 7: skips name 0>2 twice"),
        ("0>99999999999", r"line 7: skips: expected skips as 0>3"),
        ("0>9999999999", r"line 7: skips: expected pairs of stages"),
    ],
)
def test_says_where_the_text_is_wrong(written: str, message: str) -> None:
    text = three_devices().with_skips([(0, 2)]).format()
    with pytest.raises(ParseError, match=message):
        Schedule.parse(text.replace("0>2", written))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("3", r"\$.skips: expected a list of pairs of stages, found 3"),
        ("[0, 2]", r"\$.skips\[0\]: expected a pair of stages, as \[0, 3\], found 0"),
        ("[[0, true]]", r"\$.skips: expected pairs of stages"),
    ],
)
def test_says_where_the_json_is_wrong(written: str, message: str) -> None:
    text = format_json(three_devices().with_skips([(0, 2)]))
    with pytest.raises(ParseError, match=message):
        parse_json(text.replace("[[0, 2]]", written))


def test_torch_has_none() -> None:
    with pytest.raises(UnsupportedError, match="no skip connections, found 0>2; the"):
        format_torch_csv(three_devices().with_skips([(0, 2)]))


def test_a_weights_gradient_needs_what_a_skip_brought() -> None:
    """It was read behind what had overwritten it, and the gradient's term had it not.

    Found by a mutant: the forward's activations in the slot of what came over.
    """
    program = lower(three_devices().with_skips([(0, 2)]))
    buffers = {str(program.buffer_at(n)): n for n in range(len(program.buffers))}
    over, kept = buffers["input 0→2:1"], buffers["activation 2:1"]
    refuted = prove(assembled(program, parts_of(program), {over: kept}))

    assert "2B1 reads input 0→2:1, which activation 2:1 has overwritten" in str(refuted)
