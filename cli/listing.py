"""`pipeproof list`."""

from __future__ import annotations

from pipeproof.cli.output import emit_json, emit_table
from pipeproof.sched import CATALOG

FLAGS = {
    "chunks": "-v",
    "slices": "--slices",
    "waves": "--waves",
    "group": "--group",
    "backward": "--backward-order",
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
                        "bubble_fraction": row.bubble,
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
        ("name", "bubble_fraction", "peak_activations", "options", "for; source"),
        (
            (
                row.name,
                row.bubble,
                row.peak,
                "\n".join(FLAGS.get(name, name) for name in row.options),
                f"{row.summary}\n{row.source}",
            )
            for row in CATALOG.values()
        ),
        right=("bubble_fraction", "peak_activations"),
    )
