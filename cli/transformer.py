"""What the options of a shape mean to `sim`."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

from pipeproof.cli.output import full, shown
from pipeproof.cli.shape import Described, Shape
from pipeproof.sched import Kind, ParameterError, Schedule
from pipeproof.sim import Cost
from pipeproof.sim.per_stage import divide
from pipeproof.sim.transformer import MODELS, Transformer

OF_RUNNING = ("device_flops", "efficiency", "stage_layers")
SIZES = ("layers", "hidden", "heads")
"""What a transformer cannot do without."""
WORDS = {
    "none": "nothing",
    "selective": "the attention's matrix",
    "full": "whole layers",
}


def model_of(conditions: object, schedule: Schedule) -> Transformer | None:
    """The transformer that was asked for, or None.

    Without --recompute-granularity, one that recomputes nothing by itself
    recomputes whole layers where the schedule has R.

    Raises:
        ParameterError: no such model, one that is not fully described, or numbers
            that contradict each other.
        ParseError: a file that does not describe one.
    """
    if not isinstance(conditions, Described) or conditions.shape is None:
        return None
    given = _given(conditions.shape)
    described = [name for name in given if name not in OF_RUNNING]
    if not described:
        raise ParameterError(
            f"{_flag(next(iter(given)))} is about a transformer: say which with "
            "--model, or with --layers, --hidden and --heads"
        )
    if surplus := [
        spec.name
        for spec in fields(Cost)
        if getattr(conditions, spec.name, None) is not None
    ]:
        raise ParameterError(
            "a transformer's costs follow from its shape: leave out "
            f"{', '.join(map(_flag, surplus))}, or {_flag(described[0])}"
        )
    base = _named(given["model"]) if "model" in given else None
    changes = {name: given[name] for name in described if name != "model"}
    if "granularity" in changes:
        changes["recompute"] = changes.pop("granularity")
    elif base is None or base.recompute == "none":
        rebuilds = (schedule.ops.kind == Kind.R).any()
        changes["recompute"] = "full" if rebuilds else "none"
    if base is not None:
        return replace(base, **changes)
    if missing := [size for size in SIZES if size not in changes]:
        raise ParameterError(
            f"a transformer needs {', '.join(map(_flag, missing))} too, or a "
            f"--model: {', '.join(MODELS)}, or a TOML file"
        )
    return Transformer(**changes)


def cost_of_transformer(
    conditions: Described, schedule: Schedule, per_second: int
) -> Cost:
    """Its costs; times in the command line's unit, or in FLOPs.

    Raises:
        ParameterError: as `Transformer.cost`, or times in FLOPs on a cluster whose
            times are in seconds.
    """
    shape, model = conditions.shape, model_of(conditions, schedule)
    assert shape is not None
    assert model is not None
    rate = shape.device_flops
    if rate is None and conditions.cluster is not None:
        raise ParameterError(
            f"--cluster {conditions.cluster} is in seconds: give --device-flops, the "
            "FLOP/s of a device, so that the ops are too"
        )
    efficiency = 1 if shape.efficiency is None else shape.efficiency
    try:
        return model.cost(
            schedule,
            flops_per_s=None if rate is None else divide(rate, per_second),
            efficiency=efficiency,
            split=shape.stage_layers,
        )
    except ParameterError as error:
        if "recompute(schedule" not in str(error):
            raise
        raise ParameterError(
            f"{error}. On the command line: --remat always, or never"
        ) from None


def _given(shape: Shape) -> dict[str, Any]:
    every = {spec.name: getattr(shape, spec.name) for spec in fields(shape)}
    return {name: value for name, value in every.items() if value is not None}


def _flag(name: str) -> str:
    names = {"micro_batch": "micro-batch-size", "granularity": "recompute-granularity"}
    return f"--{names.get(name, name.replace('_', '-'))}"


def _named(name: str) -> Transformer:
    if name in MODELS:
        return MODELS[name]
    if not os.path.exists(name):
        raise ParameterError(
            f"{name!r} is neither a model ({', '.join(MODELS)}) nor a file"
        )
    return Transformer.load(name)


def as_json_of(model: Transformer) -> dict[str, Any]:
    """A model as `--json` has it."""
    return {
        **{spec.name: getattr(model, spec.name) for spec in fields(model)},
        "feed_forward": model.width,
        "parameters": model.parameters,
        "forward_flops": model.forward_flops,
        "backward_flops": model.backward_flops,
        "layer_bytes": full(model.layer_bytes),
        "embedding_bytes": full(model.embedding_bytes),
        "head_bytes": full(model.head_bytes),
    }


def in_words(model: Transformer, conditions: object) -> str:
    """What it is, and what its times are in."""
    assert isinstance(conditions, Described)
    assert conditions.shape is not None
    timed = conditions.shape.device_flops is not None
    unit = conditions.unit if timed else "FLOPs of a device (see --device-flops)"
    return (
        f"Model: {model.parameters:,} parameters; a micro-batch takes "
        f"{shown(float(model.forward_flops))} FLOPs forward and "
        f"{shown(float(model.backward_flops))} backward, recomputing "
        f"{WORDS[model.recompute]}; times are in {unit}."
    )
