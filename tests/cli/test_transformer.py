"""Costs of a transformer from the command line, memory by class, and caps."""

import json
import shlex
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeproof.cli import main, shape
from pipeproof.cli.values import memory_size
from pipeproof.sched import catalog
from pipeproof.sim import MODELS, Transformer, simulate
from pipeproof.sim import transformer as originals

GPT3 = (
    "1f1b -p 8 -m 64 --layers 96 --hidden 12288 --heads 96 --sequence 2048 "
    "--vocabulary 51200 --micro-batch-size 1 --tensor-parallel 8"
)
A, B, H, L, S, T, V, P = 96, 1, 12288, 96, 2048, 8, 51200, 8
SBH = S * B * H


def call(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def of(command: str) -> Any:
    result = call(f"{command} --json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def at_peak(run: Any, name: str) -> list[Any]:
    return [device["by_class"][name] for device in run["memory"]]


def test_175b_has_the_papers_parameters_weights_and_optimizer() -> None:
    """12LH² (1 + 13/12H + (V + S)/12LH), and the final layer norm's 2H.

    A device has L/P layers, of which T share all but the layer norms and the biases
    of two linear layers; the first also embeddings, the last the output layer.
    """
    run = of(f"simulate {GPT3}")
    layer = (12 * H * H + 7 * H) // T + 6 * H
    held = [layer * L // P] * P
    held[0] += V * H // T + S * H
    held[-1] += V * H // T + 2 * H

    assert run["model"]["parameters"] == 2 * H + 12 * L * H**2 * (
        1 + Fraction(13, 12 * H) + Fraction(V + S, 12 * L * H)
    )
    assert at_peak(run, "weights") == [2 * number for number in held]
    assert at_peak(run, "gradients") == [4 * number for number in held]
    assert at_peak(run, "optimizer") == [12 * number for number in held]


@pytest.mark.parametrize(
    ("options", "name", "layer", "outside"),
    [
        ("", "activations", 10 + 3 + Fraction(5 * A * S, H * T), 1),
        ("--recompute-granularity selective", "activations", 10 + 3, 1),
        ("--remat always", "stored_inputs", 2, 1),
        (
            "--sequence-parallel",
            "activations",
            Fraction(34, T) + Fraction(5 * A * S, H * T),
            T,
        ),
        (
            "--sequence-parallel --recompute-granularity selective",
            "activations",
            Fraction(34, T),
            T,
        ),
    ],
)
def test_175b_keeps_the_papers_activations(
    options: str, name: str, layer: Any, outside: int
) -> None:
    """2205.05198, table 2 and section 4.3, on each device of 1F1B."""
    held = [(P - i) * (L // P) * layer * SBH for i in range(P)]
    held[0] += P * SBH // outside
    # Of the last stage's micro-batch, the final layer norm, output layer and logits.
    held[-1] += 4 * SBH // outside + 4 * S * B * V // T

    assert at_peak(of(f"simulate {GPT3} {options}"), name) == held


def test_a_preset_is_the_same_as_its_numbers() -> None:
    spelled = of(f"simulate {GPT3} --recompute-granularity selective")
    preset = of(
        "simulate 1f1b -p 8 -m 64 --model gpt-175b --recompute-granularity selective"
    )

    assert preset == spelled


def test_layers_rebuilt_together() -> None:
    run = of(f"simulate {GPT3} --remat always --recompute-layers 12")

    assert run["model"]["recompute"] == "full"
    assert at_peak(run, "stored_inputs")[1] == 7 * 2 * SBH


def test_a_file_and_what_overrides_it(tmp_path: Path) -> None:
    path = tmp_path / "gpt.toml"
    path.write_text("layers = 8\nhidden = 64\nheads = 4\nprecision = 'fp32'\n")
    run = of(
        f"simulate 1f1b -p 2 -m 4 --model {path} --hidden 128 --stage-layers 3,5 "
        "--device-flops 1e9 --efficiency .5 --unit us"
    )
    model = Transformer(8, 128, 4, precision="fp32")
    schedule = catalog.make("1f1b", devices=2, micro_batches=4)
    cost = model.cost(schedule, flops_per_s=1e3, efficiency=0.5, split=[3, 5])
    trace = simulate(schedule, cost)

    assert run["makespan"] == trace.makespan
    assert run["peak_bytes"] == trace.peak_bytes
    assert run["model"]["hidden"] == 128
    assert run["memory"][0]["held"] == [
        {"stage": one.stage, "micro_batch": one.micro_batch, "bytes": one.bytes}
        for one in trace.peak(0).held
    ]


def test_people_read_memory_by_class() -> None:
    result = call(f"simulate {GPT3} --recompute-granularity selective")
    lines = result.stdout.splitlines()
    (head,) = [line for line in lines if line.split()[:2] == ["device", "weights"]]
    row = lines[lines.index(head) + 2].split()

    assert "GB at each device's peak" in result.stdout
    assert head.split() == [
        *("device", "weights", "gradients", "optimizer", "activations", "boundary"),
        *("workspace", "all", "at", "held", "by"),
    ]
    assert row == [
        *("0", "5.645", "11.291", "33.873", "31.608", "0.050", "0.252", "82.719"),
        *("0B0", "8"),
    ]
    assert "Model: 174,615,846,912 parameters" in lines[-1]
    assert lines[-1].endswith("times are in FLOPs of a device (see --device-flops).")


def test_of_many_devices_the_fullest_are_shown() -> None:
    result = call("simulate 1f1b -p 20 -m 20 --activation-bytes 1")
    table = result.stdout[result.stdout.index("bytes at the peaks") :]
    rows = [line.split() for line in table.splitlines()]
    rows = [row for row in rows if len(row) == 5 and "F" in row[3]]

    assert "peaks of the 16 fullest of 20 devices" in " ".join(table.split())
    assert [row[0] for row in rows] == [str(device) for device in range(16)]


def test_the_command_line_knows_the_originals() -> None:
    assert tuple(originals.MODELS) == shape.MODELS
    assert tuple(originals.PRECISIONS) == shape.PRECISIONS
    assert originals.RECOMPUTE == shape.RECOMPUTE
    members = set(shape.Shape.__slots__) - {
        *("model", "granularity", "device_flops", "efficiency", "stage_layers")
    }
    assert members == {*Transformer.__slots__} - {"recompute", "tied"}


def test_the_models_are_those_of_table_3() -> None:
    same = {"sequence": 2048, "vocabulary": 51200, "tensor_parallel": 8}
    rows = {
        "gpt-22b": Transformer(48, 6144, 64, micro_batch=4),
        "gpt-175b": Transformer(96, 12288, 96),
        "gpt-530b": Transformer(105, 20480, 128),
        "gpt-1t": Transformer(128, 25600, 160),
    }

    assert {name: replace(row, **same) for name, row in rows.items()} == dict(MODELS)


# Caps


def test_a_cap_on_memory_is_a_finding() -> None:
    command = "check 1f1b -p 8 -m 64 --model gpt-175b --recompute-granularity selective"
    result = call(f"{command} --memory 80GB --json")
    report = json.loads(result.stdout)

    assert result.exit_code == 1
    assert not report["ok"]
    assert [(f["rule"], f["device"], f["op"]) for f in report["findings"]] == [
        ("memory", 0, "0B0")
    ]
    fitting = call(f"{command} --memory 80GB --sequence-parallel")
    assert fitting.exit_code == 0
    assert "complete, ordered and free of cycles; it fits\n" in fitting.stdout


def test_a_cap_on_activations_needs_no_bytes() -> None:
    assert call("check 1f1b -p 4 -m 8 --max-activations 4").exit_code == 0
    result = call("check gpipe -p 4 -m 8 --max-activations 4")

    assert result.exit_code == 1
    assert "breaks 4 rules" in result.stdout
    assert "device 0, step 7: 8 micro-batch activations at 0F7" in result.stdout


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80_000_000_000),
        ("80GiB", 80 << 30),
        ("1.5TB", 1_500_000_000_000),
        ("7", 7),
        ("7B", 7),
        ("0.3B", Fraction(3, 10)),
    ],
)
def test_bytes_are_read(text: str, size: Any) -> None:
    assert memory_size(text) == size


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (f"simulate {GPT3} --forward 2", "leave out --forward, or --layers"),
        (
            "simulate 1f1b -p 2 -m 2 --model gpt-22b --weight-bytes 3",
            "leave out --weight-bytes, or --model",
        ),
        ("simulate 1f1b -p 2 -m 2 --device-flops 3", "say which with --model"),
        ("simulate 1f1b -p 2 -m 2 --layers 4", "needs --hidden, --heads too"),
        ("simulate 1f1b -p 2 -m 2 --model gpt-4", "'gpt-4' is neither a model"),
        (
            "simulate 1f1b -p 2 -m 2 --model gpt-22b --recompute-granularity full",
            "On the command line: --remat always, or never",
        ),
        (
            "simulate 1f1b -p 2 -m 2 --model gpt-22b --remat always "
            "--recompute-granularity selective",
            "the model has recompute='selective'",
        ),
        (
            "simulate 1f1b -p 2 -m 2 --model gpt-22b --cluster dgx-a100",
            "dgx-a100 is in seconds: give --device-flops",
        ),
        ("simulate 1f1b -p 2 -m 2 --stage-layers 1,x", "expected layers of each stage"),
        ("check 1f1b -p 2 -m 2 --memory 80XB", "expected bytes: 80GB"),
        ("check 1f1b -p 2 -m 2 --memory 1GB", "no bytes are known"),
        ("check 1f1b -p 2 -m 2 --forward 3", "--forward matters only to what is alive"),
        ("check 1f1b -p 2 -m 2 --model gpt-22b", "--model matters only"),
    ],
)
def test_refusals(args: str, message: str) -> None:
    result = call(args)

    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
