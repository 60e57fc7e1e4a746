# ruff: noqa: E501  (certificates and refutations are drawn as they are printed)
"""Proofs of programs, against a slow second opinion in random orders."""

import dataclasses
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import computes_the_gradient
from programs import assembled, mutant, parts_of
from strategies import schedules, stepping, whole_language
from test_contract import POLICIES, each_row

from pipeproof.sched import (
    Action,
    B,
    Certificate,
    F,
    ParameterError,
    Program,
    Refutation,
    Schedule,
    catalog,
    lower,
    prove,
)
from pipeproof.sched.instructions import Stream, StreamKind
from pipeproof.sched.row import Case, Row
from pipeproof.sched.terms import Reference, Terms

dice = st.randoms(use_true_random=False)
policies = st.sampled_from(POLICIES)
anything = schedules() | whole_language() | stepping()


def two_devices() -> Program:
    return lower(catalog.make("1f1b", devices=2, micro_batches=3))


@each_row
@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 2), (3, 5), (4, 8), (4, 12)])
def test_every_schedule_of_the_catalogue_is_proved(row: Row, p: int, m: int) -> None:
    if not row.allows(Case(p, m)):
        return
    for policy in POLICIES:
        prove(lower(row.generator(p, m), **policy)).raise_if_bad()


@pytest.mark.slow
@each_row
@pytest.mark.parametrize("p", range(2, 17))
def test_every_schedule_of_the_catalogue_is_proved_in_every_size(
    row: Row, p: int
) -> None:
    for m in (p - 1, p, 2 * p, 3 * p + 1):
        if row.allows(Case(p, m)):
            for policy in POLICIES:
                prove(lower(row.generator(p, m), **policy)).raise_if_bad()


@settings(max_examples=40)
@given(schedule=anything, policy=policies, dice=dice)
def test_any_schedule_is_proved(
    schedule: Schedule, policy: dict[str, Any], dice: random.Random
) -> None:
    program = lower(schedule, **policy)
    certificate = prove(program)

    assert isinstance(certificate, Certificate), str(certificate)
    assert computes_the_gradient(program, dice)
    for tree in certificate.trees:
        every = sorted(row for chain in tree for row in chain.terms)
        micro_batches, slices = schedule.micro_batches, schedule.slices
        assert every == [(m, q) for m in range(micro_batches) for q in range(slices)]


@settings(max_examples=100)
@given(schedule=anything, policy=policies, dice=dice)
def test_a_mutant_that_is_proved_computes_the_gradient_in_any_order(
    schedule: Schedule, policy: dict[str, Any], dice: random.Random
) -> None:
    edit, edited = mutant(lower(schedule, **policy), dice)
    if prove(edited).ok:
        for _ in range(3):
            assert computes_the_gradient(edited, dice), edit


@given(schedule=schedules() | whole_language())
def test_each_gradient_has_the_weight_of_its_own_loss_once(schedule: Schedule) -> None:
    """A backward starts from a loss that is weighed, and nothing is weighed again."""
    terms = Terms()
    reference = Reference.of(terms, schedule)
    backward = {"dx", "dskip", "stash", "grad", "with", "and"}
    found: list[set[tuple[int, int]]] = []
    for term, key in enumerate(terms.keys):  # each stands behind its operands
        found.append(set())
        if key[0] == "dloss":
            name, m, q, loss = terms.keys[key[1]]
            assert (name, terms.keys[loss][:3]) == ("weighed", ("loss", m, q))
            found[-1] = {(m, q)}
        elif key[0] in backward:
            # Numbers of stages are those of early terms too, which weigh nothing.
            found[-1] = set().union(*(found[n] for n in key[1:] if n < term))
    for place, gradient in enumerate(reference.gradients):
        m, q = divmod(place // schedule.stages, schedule.slices)
        later = range(q, schedule.slices)  # whose keys and values are of this one
        assert found[gradient] == {(m, part) for part in later}


def test_a_loss_with_another_weight_is_refuted_in_words() -> None:
    """What a forward of the last stage is called says whose targets and weight."""
    program = two_devices()
    parts = parts_of(program)
    forward = parts[label(program, "1F1")]
    forward.first_op = list(program.schedule.ops).index(F(1, 2))
    refuted = str(prove(assembled(program, parts)))

    assert (
        "1F2 reads input 1:1, which holds the input of stage 1 for micro-b" in refuted
    )
    assert "its loss would count with targets and weight of micro-batch 2" in refuted
    assert "the gradient of stage 1 lacks micro-batch 1" in refuted


def label(program: Program, text: str) -> int:
    """The number of the instruction with this label."""
    (found,) = [i for i in range(len(program)) if program.label(i) == text]
    return found


def test_a_certificate_in_words() -> None:
    certificate = prove(catalog.make("chimera", devices=2, micro_batches=4))
    assert isinstance(certificate, Certificate)
    digest = certificate.schedule.digest

    assert str(certificate).splitlines() == [
        "chimera(devices=2, micro_batches=4): proved: the gradient is that of unpipelined training",
        f"  schedule {digest[:16]}, program {certificate.program[:16]}",
        "  without deadlock under any buffering (streams 'dir'), without races",
        "assuming",
        "  rows of a batch are independent: a stage's output for a row depends on no other",
        "  the loss is a sum, or a weighted mean, over micro-batches",
        "  the last stage's forward takes the loss of its own output and targets times its own weight w/Σw (rows, 1, or what its targets say), a backward starts from that, and nothing else is scaled",
        "  micro-batches share no state but the weights, which only a STEP changes",
        "  a stage is a deterministic function of weights, input, and random numbers keyed by micro-batch and slice",
        "adding up micro-batches, per parameter and in this order",
        "  stage 0: Σ(0 2) of device 0 + Σ(1 3) of device 1",
        "  stage 1: Σ(1 3) of device 0 + Σ(0 2) of device 1",
        "tensors alive at once, at most",
        "  5 5",
    ]
    again = json.loads(certificate.to_json())
    assert again["reduction"][0] == [
        {"device": chain.device, "terms": [list(row) for row in chain.terms]}
        for chain in certificate.trees[0]
    ]
    assert (again["ok"], again["program"]) == (True, certificate.program)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([0, 1], "0 1"),
        ([0, 1, 2], "0…2"),
        ([3, 2, 1, 0], "3…0"),
        ([0, 1, 2, 5, 3, 4, 6], "0…2 5 3 4 6"),
        ([0, 2, 4, 6, 1, 3, 5, 7], "0 2 4 6 1 3 5 7"),
        ([0, 2, 4, 6, 8, 1, 3, 5, 7], "0 2 4 6 8 1 3 … 7"),
    ],
)
def test_the_order_of_adding_up_in_words(order: list[int], words: str) -> None:
    """Neighbours that rise or fall by 1 are one word, and so are alike stages."""
    m = len(order)
    rows = [[F(s, range(m)), B(s, order)] for s in range(3)]

    lines = str(prove(Schedule.of(rows))).splitlines()
    assert lines[10] == f"  stages 0–2: Σ({words})"


def test_a_sliced_certificate_says_where_keys_and_values_stay() -> None:
    said = "keys and values of a micro-batch's slices, and their gradients, stay on"
    for slices, there in ((1, False), (2, True)):
        schedule = catalog.make("seq1f1b", devices=2, micro_batches=2, slices=slices)
        certificate = prove(schedule)
        assert isinstance(certificate, Certificate)
        assert any(words.startswith(said) for words in certificate.assumptions) == there


def test_the_digest_is_of_the_program() -> None:
    """Two programs of one schedule, on the same streams, are told apart."""
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    programs = [lower(schedule, receives=r) for r in ("early", "late", "early")]
    digests = [prove(program).to_dict()["program"] for program in programs]

    assert digests[0] == digests[2] != digests[1]
    one = lower(schedule)
    unused = Stream(StreamKind.TO_HOST, 0)
    more = dataclasses.replace(one, streams=(*one.streams, unused))
    assert prove(more).to_dict()["program"] != digests[0]


def test_a_refutation_names_the_first_operand_that_differs() -> None:
    """The stage's input is that of another micro-batch."""
    program = two_devices()
    parts = parts_of(program)
    one, two = (label(program, f"send activation 0→1:{m}") for m in (0, 1))
    parts[one].reads, parts[two].reads = parts[two].reads, parts[one].reads
    parts[one].frees, parts[two].frees = parts[two].frees, parts[one].frees
    parts[one].waits = [label(program, "0F1")]
    parts[one:two] = [*parts[one + 1 : two], parts[one]]
    refutation = prove(assembled(program, parts))

    assert isinstance(refutation, Refutation)
    assert str(refutation).splitlines() == [
        "1f1b(devices=2, micro_batches=3) breaks 3 rules:",
        "  device 1, step 0: 1F0 reads input 1:0, which holds the input of stage 1 for micro-batch 1, from 0F1 (2, device 0, compute) → send activation 0→1:0 (3, device 0, send to 1) → recv activation 0→1:0 (1, device 1, receive from 0); its loss would count with targets and weight of micro-batch 0",
        "    device 1 | F0 B0 F1 B1 F2 B2",
        "               ^^",
        "    expected: the input of stage 1 for micro-batch 0",
        "    Look at instruction 6 and at what it reads; all before it is as in unpipelined training.",
        "  device 0: the gradient of stage 0 lacks micro-batch 0, 1, has 2 terms that unpipelined training has not",
        "    expected: the gradient of each micro-batch, once",
        "    See the first finding for where it goes wrong.",
        "  device 1: the gradient of stage 1 lacks micro-batch 0, 1, has 2 terms that unpipelined training has not",
        "    expected: the gradient of each micro-batch, once",
        "    See the first finding for where it goes wrong.",
    ]
    found = json.loads(refutation.to_json())["findings"]
    assert [one["rule"] for one in found] == ["operand", "gradient", "gradient"]


@pytest.mark.parametrize(
    ("op", "other", "found"),
    [
        ("0B0", None, "0B0 finds no activation among the buffers it reads"),
        ("0B1", "activation 0:0", "0B1 reads activation 0:0, which 0B0 (10, device 0"),
        (
            "0B0",
            "activation 0:2",
            "0B0 reads activation 0:2, which nothing has written",
        ),
    ],
)
def test_an_operand_that_is_not_there(op: str, other: str | None, found: str) -> None:
    program = two_devices()
    buffers = {str(program.buffer_at(b)): b for b in range(len(program.buffers))}
    parts = parts_of(program)
    part = parts[label(program, op)]
    own = buffers[f"activation 0:{op[-1]}"]
    part.reads = [b for b in part.reads if b != own]
    if other is not None:
        part.reads.insert(0, buffers[other])

    first, *_ = prove(assembled(program, parts)).findings
    assert first.rule == "operand"
    assert first.found.startswith(found)


def test_an_operand_that_is_overwritten() -> None:
    program = two_devices()
    buffers = {str(program.buffer_at(b)): b for b in range(len(program.buffers))}
    pair = {buffers["activation 0:1"]: buffers["activation 0:0"]}

    first, *_ = prove(assembled(program, parts_of(program), pair)).findings
    assert first.found == (
        "0B0 reads activation 0:0, which activation 0:1 has overwritten"
    )


def test_a_slot_that_is_not_waited_for_is_a_race() -> None:
    program = two_devices()
    parts = parts_of(program)
    parts[label(program, "recv activation 0→1:2")].waits = []

    (finding,) = prove(assembled(program, parts)).findings
    assert finding.rule == "race"
    assert finding.found == (
        "nothing orders recv activation 0→1:2, which writes input 1:2, behind 1B0, "
        "which frees input 1:0, in the same slot"
    )


def test_an_answer_orders_what_came_before_the_question() -> None:
    """Device 2 answers what device 1 has sent behind 1B0: so that is done."""
    program = lower(catalog.make("1f1b", devices=3, micro_batches=3))
    parts = parts_of(program)
    send = parts[label(program, "send gradient 1→0:0")]
    send.waits = [label(program, "recv gradient 2→1:2")]
    answered = assembled(program, parts)
    send.waits = []

    prove(answered).raise_if_bad()
    (finding,) = prove(assembled(program, parts)).findings
    assert finding.found == (
        "nothing orders 1B0, which writes input_grad 1:0, behind "
        "send gradient 1→0:0, which frees input_grad 1:0, in the same slot"
    )


def test_what_is_dropped_or_doubled_is_named() -> None:
    program = two_devices()
    parts = parts_of(program)
    last = parts[label(program, "0B2")]
    last.first_op = parts[label(program, "0B1")].first_op
    twice = assembled(program, parts)
    dropped = [p for p in parts_of(program) if p.key != label(program, "0B2")]

    assert prove(twice).ok, "a backward is what it reads, whatever it is called"
    assert [f.found for f in prove(assembled(program, dropped)).findings] == [
        "the gradient of stage 0 lacks micro-batch 2"
    ]


def test_what_a_slice_lacks_is_named_by_both_numbers() -> None:
    program = lower(catalog.make("seq1f1b", devices=2, micro_batches=2, slices=2))
    last = label(program, "0B1")
    dropped = [part for part in parts_of(program) if part.key != last]

    assert [f.found for f in prove(assembled(program, dropped)).findings] == [
        "the gradient of stage 0 lacks micro-batch 1.0"
    ]


def test_of_many_that_are_lacking_some_are_named() -> None:
    for m, named in (
        (8, "0, 1, 2, 3, 4, 5, 6, 7"),
        (9, "0, 1, 2, 3, 4, 5, 6, 7, … (9 in all)"),
    ):
        program = lower(catalog.make("gpipe", devices=2, micro_batches=m))
        every = {f"0B{number}" for number in range(m)}
        left = [p for p in parts_of(program) if program.label(p.key) not in every]
        (finding,) = prove(assembled(program, left)).findings
        assert finding.found == f"the gradient of stage 0 lacks micro-batch {named}"


def test_a_micro_batch_that_counts_twice_is_named() -> None:
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    program = lower(schedule, receives="late")  # no slot is used again
    parts = parts_of(program)
    one, two = (parts[label(program, op)] for op in ("0B0", "0B1"))
    two.reads, two.frees, one.frees = one.reads, one.frees, []

    _, gradient = prove(assembled(program, parts)).findings
    assert gradient.found == (
        "the gradient of stage 0 lacks micro-batch 1, has micro-batch 0 twice or more"
    )


def test_a_reduction_before_the_last_backward_is_refuted() -> None:
    program = lower(catalog.make("chimera", devices=2, micro_batches=2))
    parts = parts_of(program)
    reducing = [p for p in parts if p.action == Action.REDUCE]
    parts = [p for p in parts if p.action != Action.REDUCE]
    for part in reducing:
        part.waits = []
    found = prove(assembled(program, [*reducing, *parts])).findings
    none = prove(assembled(program, parts)).findings

    assert {finding.rule for finding in found} == {"race"}
    assert [finding.rule for finding in none] == ["gradient"] * 2


def test_what_one_device_adds_after_its_reduction_is_refuted() -> None:
    program = lower(catalog.make("chimera", devices=2, micro_batches=2))
    parts = parts_of(program)
    late = parts[label(program, "0B1")]
    reduce = next(
        part
        for part in parts
        if program.label(part.key) == "0REDUCE" and program.device[part.key] == 1
    )
    reduce.waits = []
    late.waits.append(reduce.key)
    parts.remove(late)

    (finding,) = prove(assembled(program, [*parts, late])).findings
    assert (finding.rule, finding.device) == ("gradient", 0)
    assert finding.expected == "the sum over devices 0, 1, and nothing added after it"


def test_that_a_tensor_has_arrived_does_not_end_its_send() -> None:
    """Device 0 knows by the answer that it is there; the link may still read it."""
    program = lower(catalog.make("1f1b", devices=2, micro_batches=1))
    parts = parts_of(program)
    send = parts[label(program, "send activation 0→1:0")]
    parts[label(program, "0B0")].frees.append(send.frees.pop())

    (finding,) = prove(assembled(program, parts)).findings
    assert finding.found == (
        "nothing orders 0B0, which frees output 0:0, behind send activation 0→1:0, "
        "which reads output 0:0, in the same slot"
    )


def test_a_broken_schedule_is_refuted_and_other_things_refused() -> None:
    broken = Schedule.of([[B(0, 0), F(0, 0)]])

    assert prove(broken).findings == broken.report.findings
    with pytest.raises(ParameterError, match="prove takes a Program, or a Schedule"):
        prove("1f1b")  # type: ignore[arg-type]


def test_slots_in_a_ring_are_refuted() -> None:
    program = two_devices()
    inputs = {str(program.buffer_at(b)): b for b in range(len(program.buffers))}
    one, two = inputs["input 1:0"], inputs["input 1:1"]

    ring = assembled(program, parts_of(program), {one: two, two: one})
    assert {finding.rule for finding in prove(ring).findings} == {"slot"}
    (first,) = prove(assembled(program, parts_of(program), {0: 0})).findings
    assert first.found == "activation 0:0 takes over from itself"
    with pytest.raises(ValueError, match="input 1:0 is in a ring of slots"):
        computes_the_gradient(ring, random.Random(0))


def test_a_buffer_of_another_device_is_out_of_reach() -> None:
    program = two_devices()
    parts = parts_of(program)
    there = parts[label(program, "0F0")].writes[0]
    parts[label(program, "1B0")].reads[0] = there

    (finding,) = prove(assembled(program, parts)).findings
    assert finding.found == (
        "1B0 (7, device 1, compute) uses activation 0:0 of device 0"
    )


def test_what_a_send_reads_is_not_touched_before_it_ends() -> None:
    """A send that returned at once let its tensor be overwritten under way."""
    program = two_devices()
    parts = parts_of(program)
    send = parts[label(program, "send activation 0→1:0")]
    forward = parts[label(program, "0F1")]
    forward.frees.append(send.frees.pop())

    (finding,) = prove(assembled(program, parts)).findings
    assert finding.rule == "race"
    assert finding.found == (
        "nothing orders 0F1, which frees output 0:0, behind send activation 0→1:0, "
        "which reads output 0:0, in the same slot"
    )


def test_an_accumulated_gradient_shares_its_slot_with_nothing() -> None:
    """It is added to from step to step; what lay there before would be in it."""
    program = two_devices()
    buffers = {str(program.buffer_at(b)): b for b in range(len(program.buffers))}
    pair = {buffers["gradient 1"]: buffers["activation 1:0"]}

    (finding,) = prove(assembled(program, parts_of(program), pair)).findings
    assert finding.found == "gradient 1 shares its slot"


def test_a_slot_is_on_one_device() -> None:
    program = two_devices()
    buffers = {str(program.buffer_at(b)): b for b in range(len(program.buffers))}
    pair = {buffers["activation 1:0"]: buffers["activation 0:0"]}

    (finding,) = prove(assembled(program, parts_of(program), pair)).findings
    assert finding.found == "activation 1:0 takes over a slot of device 0"
    looped = lower(catalog.make("interleaved", devices=2, micro_batches=2))
    of = {str(looped.buffer_at(b)): b for b in range(len(looped.buffers))}
    pair = {of["activation 2:0"]: of["activation 0:0"]}
    found = prove(assembled(looped, parts_of(looped), pair)).findings
    assert {finding.rule for finding in found} == {"operand", "gradient"}


def test_an_op_runs_on_the_compute_stream() -> None:
    program = two_devices()
    parts = parts_of(program)
    receives = parts[label(program, "recv activation 0→1:0")]
    parts[label(program, "1F0")].stream = receives.stream

    (finding,) = prove(assembled(program, parts)).findings
    assert finding.rule == "stream"
    assert finding.expected == "a COMPUTE on a stream 'compute'"
