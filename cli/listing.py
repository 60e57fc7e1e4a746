"""`pipeproof list`."""

from __future__ import annotations

from pipeproof.cli.output import emit_json, emit_table
from pipeproof.sched import CATALOG
from pipeproof.sched.row import Row

FLAGS = {
    "chunks": "-v",
    "slices": "--slices",
    "waves": "--waves",
    "group": "--group",
    "offload": "--offload",
    "backward": "--backward-order",
    "times": "--times",
}
"""How the command line calls the generators' options."""


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
