"""Costs from a transformer's shape, held to the papers' formulas."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeproof.sched import ParameterError, ParseError, catalog, recompute
from pipeproof.sched.ir import Schedule
from pipeproof.sim import MODELS, Cost, Transformer, simulate
from pipeproof.sim.transformer import RECOMPUTE

GPT3 = MODELS["gpt-175b"]


@st.composite
def models(draw: st.DrawFn) -> Transformer:
    """Any that is tensor-parallel over a power of two, with f = 4h and 16 bits."""
    t = draw(st.sampled_from([1, 2, 4, 8]))
    heads = t * draw(st.integers(1, 4))
    return Transformer(
        layers=draw(st.integers(1, 9)),
        hidden=heads * draw(st.integers(1, 64)),
        heads=heads,
        sequence=t * draw(st.integers(1, 64)),
        vocabulary=t * draw(st.integers(1, 100)),
        micro_batch=draw(st.integers(1, 4)),
        tensor_parallel=t,
        sequence_parallel=draw(st.booleans()),
    )


def letters(model: Transformer) -> tuple[int, int, int, int, int, int, int]:
    """a, b, h, L, s, t, v."""
    return (
        model.heads,
        model.micro_batch,
        model.hidden,
        model.layers,
        model.sequence,
        model.tensor_parallel,
        model.vocabulary,
    )


@given(model=models())
def test_bytes_of_a_layer_are_those_of_table_2(model: Transformer) -> None:
    a, b, h, _, s, t, _ = letters(model)
    sbh = s * b * h
    core = Fraction(5 * a * s, h)
    outside = Fraction(10, t) if model.sequence_parallel else 10

    assert model.layer_bytes == sbh * (outside + Fraction(24, t) + core / t)
    selective = replace(model, recompute="selective")
    assert selective.layer_bytes == sbh * (outside + Fraction(24, t))
    full = replace(model, recompute="full")
    assert full.layer_bytes == Fraction(2 * sbh, t if model.sequence_parallel else 1)


@given(model=models())
def test_flops_are_those_of_appendix_a(model: Transformer) -> None:
    _, b, h, layers, s, _, v = letters(model)
    once = layers * (24 * b * s * h**2 + 4 * b * s**2 * h) + 2 * b * s * h * v
    whole = 72 * b * layers * s * h**2
    whole *= 1 + Fraction(s, 6 * h) + Fraction(v, 12 * h * layers)

    assert model.forward_flops == once
    assert model.forward_flops + model.backward_flops == whole
    again = {policy: replace(model, recompute=policy) for policy in RECOMPUTE}
    assert again["selective"].backward_flops == 2 * once + layers * 4 * b * s**2 * h
    assert again["full"].backward_flops == 3 * once - 2 * b * s * h * v


@given(model=models(), stages=st.integers(1, 9))
def test_stages_add_up_to_the_model(model: Transformer, stages: int) -> None:
    stages = min(stages, model.layers)
    cost = model.cost(catalog.make("1f1b", devices=stages, micro_batches=2))
    t = model.tensor_parallel

    assert total(cost.forward) * t == model.forward_flops
    assert (total(cost.input_grad) + total(cost.weight_grad)) * t == (
        model.backward_flops
    )
    copy = model.vocabulary * model.hidden if stages > 1 else 0
    whole = 2 * (model.parameters + copy)
    if t == 1:
        assert total(cost.weight_bytes) == whole
    else:  # what is not cut is there t times
        assert whole < total(cost.weight_bytes) * t <= whole * t


def total(numbers: Any) -> Any:
    return sum(numbers)


def test_parameters_of_well_known_models() -> None:
    """GPT-2 small has 124,439,808; the formula is eq. 2 of 2104.04473, and 2h."""
    gpt2 = Transformer(12, 768, 12, sequence=1024, vocabulary=50257)
    h, layers, s, v = GPT3.hidden, GPT3.layers, GPT3.sequence, GPT3.vocabulary

    assert gpt2.parameters == 124_439_808
    assert replace(gpt2, tied=False).parameters == 124_439_808 + 50257 * 768
    assert GPT3.parameters == 2 * h + 12 * layers * h**2 * (
        1 + Fraction(13, 12 * h) + Fraction(v + s, 12 * layers * h)
    )
    billions = {name: round(m.parameters / 1e9) for name, m in MODELS.items()}
    assert billions == {
        "gpt-22b": 22,
        "gpt-175b": 175,
        "gpt-530b": 530,
        "gpt-1t": 1008,
    }


@pytest.mark.parametrize(
    ("precision", "bytes_each"),
    [("bf16", (2, 4, 12)), ("fp16", (2, 2, 12)), ("fp32", (4, 4, 8))],
)
def test_bytes_a_parameter(precision: str, bytes_each: tuple[int, int, int]) -> None:
    model = Transformer(4, 64, 4, precision=precision)
    cost = model.cost(catalog.make("1f1b", devices=1, micro_batches=1))

    assert [
        total(cost.weight_bytes),
        total(cost.gradient_bytes),
        total(cost.optimizer_bytes),
    ] == [model.parameters * each for each in bytes_each]


def test_numbers_of_32_bits_double_all_but_masks_and_logits() -> None:
    """2 · 4 + 2 · 4 outside, 24 · 2 inside, masks 2 and as²b as before."""
    model = Transformer(4, 64, 4, sequence=32, precision="fp32")
    sbh = 32 * 64

    assert model.layer_bytes == sbh * (16 + 2 + 48) + 4 * 32**2 * (4 + 1 + 4)
    assert model.head_bytes == 2 * 4 * sbh + 4 * 32 * 51200


# On a schedule


def peaks(schedule: Schedule, cost: Cost, name: str) -> list[Any]:
    trace = simulate(schedule, cost)
    return [
        max(trace.memory(device).by_class[name].tolist())
        for device in range(schedule.devices)
    ]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_activations_of_175b_are_those_of_section_4(sequence_parallel: bool) -> None:
    """1F1B: stage i of p holds p - i micro-batches of L/p layers each."""
    p, m = 8, 16
    a, b, h, layers, s, t, v = letters(GPT3)
    model = replace(GPT3, sequence_parallel=sequence_parallel)
    outside = t if sequence_parallel else 1
    sbh = s * b * h
    first = sbh // outside  # a byte for the dropout mask of each embedded number
    last = 4 * sbh // outside + 4 * s * b * v // t
    schedule = catalog.make("1f1b", devices=p, micro_batches=m)
    with_r = recompute(schedule, "always")

    def expected(layer: Fraction) -> list[Fraction]:
        held = [(p - i) * layer * layers / p for i in range(p)]
        held[0] += p * first
        held[-1] += last
        return held

    whole = sbh * (Fraction(10, outside) + Fraction(24, t) + Fraction(5 * a * s, h * t))
    assert peaks(schedule, model.cost(schedule), "activations") == expected(whole)
    selective = replace(model, recompute="selective").cost(schedule)
    cut = sbh * (Fraction(10, outside) + Fraction(24, t))
    assert peaks(schedule, selective, "activations") == expected(cut)
    full = replace(model, recompute="full").cost(with_r)
    stored = Fraction(2 * sbh, outside)
    assert peaks(with_r, full, "stored_inputs") == expected(stored)
    # Beside them, the one layer that is being rebuilt, without its input.
    assert peaks(with_r, full, "activations") == [whole - stored] * p


def test_one_stage_is_first_and_last() -> None:
    """Section 4.3 for p = 1: sbhL/t (34 + 5as/h + 1/L + 4/L (1 + v/h))."""
    model = replace(MODELS["gpt-22b"], sequence_parallel=True)
    a, b, h, layers, s, t, v = letters(model)
    schedule = catalog.make("1f1b", devices=1, micro_batches=3)
    formula = 34 + Fraction(5 * a * s, h) + Fraction(1, layers)
    formula += Fraction(4, layers) * (1 + Fraction(v, h))

    (peak,) = peaks(schedule, model.cost(schedule), "activations")
    assert peak == Fraction(s * b * h * layers, t) * formula


def test_interleaving_holds_more() -> None:
    """L (1 + (p - 1) / pm) layers on the first device, with m stages a device.

    Those are 31 stages of 4 layers: at the most, 16 times the first, which embeds, 8
    times the second and 7 times the third.
    """
    model = replace(GPT3, sequence_parallel=True, recompute="selective")
    sbh_t = 2048 * 12288 // 8
    schedule = catalog.make("interleaved", devices=8, micro_batches=16, chunks=3)
    most = peaks(schedule, model.cost(schedule), "activations")[0]

    assert most == 34 * sbh_t * 96 * (1 + Fraction(7, 8 * 3)) + 16 * sbh_t


@pytest.mark.parametrize("policy", ["none", "selective"])
def test_what_w_needs_is_that_of_the_zero_bubble_paper(policy: Any) -> None:
    """Qi et al. 2023, table 1: 32sbh a layer after I, and FLOPs of F, I and W."""
    h, s = 64, 32
    model = Transformer(12, h, 4, sequence=s, vocabulary=128, recompute=policy)
    schedule = catalog.make("zb-h1", devices=4, micro_batches=8)
    cost = model.cost(schedule)
    trace = simulate(schedule, cost)
    memory = trace.memory(1)
    stash = memory.by_class["weight_grad_stash"]

    # A stage's own input stays until W is done, and counts for 2sbh of it.
    one = 3 * 32 * s * h - 2 * s * h
    assert {size % one for size in stash.tolist()} == {0}
    assert max(stash.tolist()) > 0
    assert isinstance(cost.forward, tuple)
    assert isinstance(cost.input_grad, tuple)
    assert isinstance(cost.weight_grad, tuple)
    again = 4 if policy == "selective" else 0
    assert cost.forward[1] == 3 * s * h * (24 * h + 4 * s)
    assert cost.input_grad[1] == 3 * s * h * (24 * h + (8 + again) * s)
    assert cost.weight_grad[1] == 3 * s * h * 24 * h


def test_a_v_holds_its_embedding_once() -> None:
    """First and last stage share device 0, and with it the embedding's weights."""
    model = Transformer(8, 64, 4, vocabulary=1000)
    straight = model.cost(catalog.make("1f1b", devices=8, micro_batches=8))
    bent = model.cost(catalog.make("zb-v", devices=4, micro_batches=8))

    assert total(straight.weight_bytes) - total(bent.weight_bytes) == 2 * 1000 * 64


def test_layers_that_do_not_divide_go_to_the_first_stages() -> None:
    model = Transformer(10, 64, 4)
    schedule = catalog.make("1f1b", devices=4, micro_batches=4)
    forward = model.cost(schedule, split=[1, 3, 3, 3]).forward

    assert model.split(4) == [3, 3, 2, 2]
    assert isinstance(forward, tuple)
    assert forward[1] == 3 * forward[0]


def test_several_layers_rebuilt_together() -> None:
    """5 layers in groups of 2: 3 inputs are stored, 2 layers rebuilt at a time."""
    model = Transformer(10, 64, 4, sequence=32, recompute="full", recompute_layers=2)
    schedule = recompute(catalog.make("1f1b", devices=2, micro_batches=4), "always")
    cost = model.cost(schedule)
    entry, layer = 2 * 32 * 64, replace(model, recompute="none", recompute_layers=1)

    assert isinstance(cost.stored_bytes, tuple)
    assert cost.stored_bytes[0] == 3 * entry + model.embedding_bytes
    assert cost.rebuilt_bytes == (2 * layer.layer_bytes - entry,) * 2


def test_a_rate_makes_seconds() -> None:
    schedule = catalog.make("1f1b", devices=1, micro_batches=1)
    model = Transformer(4, 64, 4)
    flops = simulate(schedule, model.cost(schedule)).makespan
    cost = model.cost(schedule, flops_per_s=1000, efficiency=Fraction(1, 4))

    assert flops == model.forward_flops + model.backward_flops
    assert simulate(schedule, cost).makespan == Fraction(flops) / 250


@pytest.mark.parametrize(
    ("name", "devices", "micro_batches", "chunks", "measured"),
    [("gpt-22b", 1, 1, None, 1.42 / 1.10), ("gpt-175b", 8, 64, 3, 18.13 / 13.75)],
)
def test_what_full_recomputation_costs(
    name: str, devices: int, micro_batches: int, chunks: int | None, measured: float
) -> None:
    """Table 5 of 2205.05198; see experiments/recomputation.py for all four."""
    plain = catalog.make(
        "interleaved" if chunks else "1f1b",
        devices=devices,
        micro_batches=micro_batches,
        chunks=chunks,
    )
    with_r = recompute(plain, "always")
    full = replace(MODELS[name], recompute="full").cost(with_r)
    selective = replace(MODELS[name], recompute="selective").cost(plain)
    ratio = simulate(with_r, full).makespan / simulate(plain, selective).makespan

    assert float(ratio) == pytest.approx(measured, rel=0.05)


# Refusals


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"heads": 5}, "heads must divide hidden, got heads=5 and hidden=64"),
        ({"tensor_parallel": 3}, "tensor_parallel must divide hidden, got .*=3"),
        ({"vocabulary": 50257, "tensor_parallel": 2}, "divide vocabulary"),
        ({"sequence_parallel": 1}, "sequence_parallel must be True or False, got 1"),
        (
            {"sequence": 3, "tensor_parallel": 2, "sequence_parallel": True},
            "tensor_parallel must divide sequence",
        ),
        ({"precision": "fp8"}, "precision must be one of bf16, fp16, fp32, got 'fp8'"),
        ({"recompute": ["full"]}, "recompute must be one of none, selective, full"),
        ({"recompute_layers": 2}, "needs recompute='full', got 'none'"),
        ({"feed_forward": 7, "tensor_parallel": 2}, "must divide feed_forward"),
    ],
)
def test_refuses_a_shape(given_: dict[str, Any], message: str) -> None:
    shape: dict[str, Any] = {"layers": 4, "hidden": 64, "heads": 4}
    with pytest.raises(ParameterError, match=message):
        Transformer(**(shape | given_))


def test_refuses_what_contradicts_the_schedule() -> None:
    plain = catalog.make("zb-h1", devices=2, micro_batches=4)
    with_r = recompute(plain, "always")
    model = Transformer(4, 64, 4)

    def refused(message: str, schedule: Schedule, **changes: Any) -> None:
        given_ = {name: changes.pop(name) for name in list(changes) if name in OF_COST}
        with pytest.raises(ParameterError, match=message):
            replace(model, **changes).cost(schedule, **given_)

    refused(r"has none: give it some with recompute\(", plain, recompute="full")
    refused("the model has recompute='none'", with_r)
    refused("the model has recompute='selective'", with_r, recompute="selective")
    refused("of all 2 layers of a stage", with_r, recompute="full")
    refused("1 layers do not fill 2 stages", plain, layers=1)
    refused("split must give 2 stages 4 layers in all", plain, split=[1, 2])
    refused("flops_per_s must be a number above 0, got 0", plain, flops_per_s=0)
    refused("efficiency is .* at most 1, got 2", plain, flops_per_s=1, efficiency=2)
    refused("efficiency=0.5 is a part of flops_per_s", plain, efficiency=0.5)
    both = replace(model, recompute="full", recompute_layers=2)
    assert both.cost(with_r).weight_grad_memory


OF_COST = ("split", "flops_per_s", "efficiency")


def test_reads_toml(tmp_path: Path) -> None:
    path = tmp_path / "gpt.toml"
    path.write_text("layers = 4\nhidden = 64\nheads = 4\nrecompute = 'selective'\n")
    assert Transformer.load(path) == Transformer(4, 64, 4, recompute="selective")

    for text, message in [
        ("layers = 4\nhidden = 64\n", "heads is missing"),
        ("layers = 4\nhidden = 64\nheads = 4\nwide = 1\n", "found 'wide'"),
        ("layers = ", "expected TOML"),
        ("a = " + "[" * 3000, "expected TOML with numbers and few brackets"),
        ("layers = 4\nhidden = 'x'\nheads = 4\n", "gpt.toml: hidden must be"),
        ("#" * 1_100_000, "at most 1,048,576 bytes, found 1,100,000 bytes: is this"),
    ]:
        path.write_text(text)
        with pytest.raises(ParseError, match=message):
            Transformer.load(path)
