"""Options that describe a transformer, from which its costs follow."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any

import click

from pipeproof.cli import options
from pipeproof.cli.options import Conditions, Function, collect
from pipeproof.cli.values import Number, number

# Spelled out again, as in `options`; a test holds them to the originals.
MODELS = ("gpt-22b", "gpt-175b", "gpt-530b", "gpt-1t")
PRECISIONS = ("bf16", "fp16", "fp32")
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class Shape:
    """A transformer and what runs it; None where nothing was said.

    Attributes:
        model: one of `MODELS`, or the path of a TOML file.
        layers … recompute_layers: as in `Transformer`, over what `model` says;
            `granularity` is its `recompute`.
        device_flops, efficiency, stage_layers: as `Transformer.cost` takes them.
    """

    model: str | None
    layers: int | None
    hidden: int | None
    heads: int | None
    sequence: int | None
    vocabulary: int | None
    micro_batch: int | None
    feed_forward: int | None
    precision: str | None
    tensor_parallel: int | None
    sequence_parallel: bool | None
    granularity: str | None
    recompute_layers: int | None
    device_flops: Number | None
    efficiency: Number | None
    stage_layers: tuple[int, ...] | None


def _layers(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and len(word) < 9 for word in words):
        raise click.BadParameter(
            f"expected layers of each stage: 12,13,13,12; found {text!r}"
        )
    return tuple(map(int, words))


def _size(flag: str, text: str) -> Any:
    return click.option(flag, type=int, metavar="N", help=text)


_SHAPE = [
    click.option(
        "--model",
        metavar="NAME|FILE",
        help=f"Costs of a transformer: {', '.join(MODELS)}, or a TOML file. What "
        "follows overrides it.",
    ),
    _size("--layers", "Layers of the transformer."),
    _size("--hidden", "Its hidden size."),
    _size("--heads", "Its attention heads."),
    _size("--sequence", "Tokens of a sample; default 2048."),
    _size("--vocabulary", "Rows of the embedding; default 51200."),
    click.option(
        "--micro-batch-size",
        "micro_batch",
        type=int,
        metavar="N",
        help="Samples of a micro-batch; default 1.",
    ),
    _size("--feed-forward", "Width of the feed-forward network; default 4 × hidden."),
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        help="16 bits with gradients in 32 (bf16, the default) or 16, or all in 32.",
    ),
    _size("--tensor-parallel", "Devices that share each stage; default 1."),
    click.option(
        "--sequence-parallel/--no-sequence-parallel",
        default=None,
        help="They share what lies between attention and feed-forward too.",
    ),
    click.option(
        "--recompute-granularity",
        "granularity",
        type=click.Choice(RECOMPUTE),
        help="What backwards compute again: nothing, the attention's matrix, or "
        "layers, in the ops that --remat adds (default with those: full).",
    ),
    _size("--recompute-layers", "With full, layers rebuilt together; default 1."),
    click.option(
        "--device-flops",
        type=number,
        metavar="X",
        help="FLOP/s of a device, so that times are seconds; else they are FLOPs.",
    ),
    click.option(
        "--efficiency",
        type=number,
        metavar="X",
        help="Part of them that is achieved; default 1.",
    ),
    click.option(
        "--stage-layers",
        type=_layers,
        metavar="N,N…",
        help="Layers of each stage; default even, the first stages taking one more.",
    ),
]


@dataclass(frozen=True, slots=True)
class Described(Conditions):
    """Conditions whose costs may be those of a transformer.

    Attributes:
        shape: its options, or None where none was given.
    """

    shape: Shape | None = field(default=None, metadata={"said_by": "model"})


def takes_conditions(function: Function) -> Function:
    """As `options.takes_conditions`, with these options too."""

    @wraps(function)
    def merged(*, conditions: Conditions, shape: Shape, **rest: Any) -> None:
        both = {
            spec.name: getattr(conditions, spec.name) for spec in fields(conditions)
        }
        said = any(getattr(shape, spec.name) is not None for spec in fields(shape))
        described = Described(**both, shape=shape if said else None)
        function(conditions=described, **rest)

    return collect(options.takes_conditions(merged), Shape, "shape", _SHAPE)


def takes_shape(function: Function) -> Function:
    """Give a command these options alone, collected as `shape`."""
    return collect(function, Shape, "shape", _SHAPE)
