"""`pipeproof list`."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pipeproof.cli.options import FLAGS
from pipeproof.cli.output import emit_json, emit_table
from pipeproof.sched import CATALOG
from pipeproof.sched.row import Row

if TYPE_CHECKING:
    from pipeproof.sim import Preset


def show_catalogue(*, as_json: bool) -> None:
    """Print the catalogue."""
    if as_json:
        emit_json(
            {
                "schedules": [
                    {
                        "name": row.name,
                        "summary": row.summary,
                        "bubble": row.bubble,
                        "bubble_of": row.idle_of,
                        "peak_activations": row.peak,
                        "constraints": row.constraints,
                        "options": list(row.options),
                        "source": row.source,
                    }
                    for row in CATALOG.values()
                ]
            }
        )
        return
    emit_table(
        "p devices, m micro-batches, device d; equal stages, free links",
        ("name", "bubble", "peak_activations", "options", "for; constraints; source"),
        (
            (
                row.name,
                row.bubble,
                row.peak,
                "\n".join(FLAGS.get(name, name) for name in row.options),
                "\n".join(_about(row)),
            )
            for row in CATALOG.values()
        ),
        right=("bubble", "peak_activations"),
    )


def _about(row: Row) -> list[str]:
    """When to use it, what it demands, and who says so."""
    demands = [] if row.constraints == "none" else [f"needs {row.constraints}"]
    return [row.summary, *demands, row.source]


def show_clusters(*, as_json: bool) -> None:
    """Print the clusters that have names."""
    from pipeproof.sim import PRESETS

    if as_json:
        emit_json({"clusters": [_in_full(preset) for preset in PRESETS.values()]})
        return
    emit_table(
        "in bytes and seconds; bandwidths are peaks of one direction",
        ("name", "what it is; source", "numbers"),
        (
            (
                preset.name,
                f"{preset.summary}\n{preset.source}",
                "\n".join(f"{key} {value}" for key, value in _numbers(preset).items()),
            )
            for preset in PRESETS.values()
        ),
    )


def _in_full(preset: Preset) -> dict[str, Any]:
    about = {"name": preset.name, "summary": preset.summary, "source": preset.source}
    return about | _numbers(preset)


def _numbers(preset: Preset) -> dict[str, Any]:
    """What its cluster says, by the names that a file has for it."""
    result: dict[str, Any] = {}
    for spec in fields(preset.cluster):
        value = getattr(preset.cluster, spec.name)
        if value in (None, {}, (), spec.default):
            continue
        if spec.name == "within_node":
            result["within_node.latency"] = value.latency
            result["within_node.bandwidth"] = value.bandwidth
        else:
            result[spec.name] = value
    return result
