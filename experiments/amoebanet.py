"""GPipe's Table 1 counted without a device, on AmoebaNet-D.

Nothing is computed: parameters, and the bytes that a forward keeps for its backward,
are counted on torch's meta device. Table 1 sets an 82M model without
re-materialisation beside a 318M model with it; here one model is also set beside
itself.

    make experiments        writes experiments/results/amoebanet.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from amoebanet_count import (
    ACCOUNTINGS,
    BYTES_A_PARAMETER,
    MICRO_BATCHES,
    TABLE,
    activations,
    count,
    largest,
    placed,
    planned,
    total,
)
from amoebanet_model import PUBLISHED, UNUSED, Reading, amoebanet

RESULT = Path(__file__).parent / "results" / "amoebanet.md"


def table(titles: list[str], rows: Iterator[list[str]]) -> list[str]:
    """In Markdown."""
    head = [titles, ["-"] * len(titles)]
    return ["| " + " | ".join(cells) + " |" for cells in (*head, *rows)] + [""]


def of_parameters() -> Iterator[list[str]]:
    """Counted beside published."""
    for row in TABLE:
        found = total(count(row.cells, row.filters), "parameters")
        yield [
            row.size,
            f"{row.parameters / 1e6:,.0f}M",
            f"{found:,}",
            f"{found / row.parameters - 1:+.1%}",
            f"{row.model}",
            f"{BYTES_A_PARAMETER * found / 1e9:.2f}",
        ]


READINGS = {
    "as in the authors' code": PUBLISHED,
    "normal cell puts only its unused states, 3, 4, 6, side by side": Reading(UNUSED),
    "stem of D/4, D/2, D filters": Reading(stem=(None, 1 / 2, 1.0)),
    "1,001 classes": Reading(classes=1001),
}


def of_readings() -> Iterator[list[str]]:
    """How far each reading is from the published parameters."""
    for name, reading in READINGS.items():
        off = []
        for row in TABLE:
            with torch.device("meta"):
                model = amoebanet(row.cells, row.filters, reading)
            found = sum(parameter.numel() for parameter in model.parameters())
            off.append(f"{found / row.parameters - 1:+.1%}")
        yield [name, *off]


def of_activations() -> Iterator[list[str]]:
    """The table's own rows, counted."""
    for row in TABLE:
        size = row.cells, row.filters
        cells = [f"{row.name} {row.size}", f"{row.activations}"]
        for accounting in ACCOUNTINGS:
            for m in MICRO_BATCHES:
                if row.name == "Naive-1" and m > 1:
                    cells.append("")
                    continue
                schedule = planned(row.devices, m, row.name != "Naive-1")
                found = placed(size, schedule, accounting)
                cells.append(f"{activations(size, found):.2f}")
        yield cells


def between() -> str:
    """Where the published activations lie, for each M."""
    inside = dict.fromkeys(MICRO_BATCHES, 0)
    for row in TABLE:
        size = row.cells, row.filters
        for m in MICRO_BATCHES:
            schedule = planned(row.devices, m, row.name != "Naive-1")
            found = [activations(size, placed(size, schedule, a)) for a in ACCOUNTINGS]
            inside[m] += min(found) < row.activations < max(found)
    best = max(inside, key=inside.__getitem__)
    others = ", ".join(f"in {n} at M={m}" for m, n in inside.items() if m != best)
    return (
        f"At M={best} the published number lies between the two accountings in "
        f"{inside[best]} of {len(TABLE)} rows;\n{others}. None of them is reproduced: "
        "neither accounting is that of\nthe paper's compiler, and M is not known.\n"
    )


def of_one_model() -> Iterator[list[str]]:
    """One model with and without, on one device and on eight."""
    for row in TABLE[:2]:
        size = row.cells, row.filters
        for devices in (1, 8):
            for accounting in ACCOUNTINGS:
                cells = [row.size, str(devices), accounting.name]
                without = activations(
                    size, placed(size, planned(devices, 32, False), accounting)
                )
                cells.append(f"{without:.2f}")
                for m in MICRO_BATCHES:
                    found = placed(size, planned(devices, m, True), accounting)
                    cells.append(
                        f"{activations(size, found):.2f} "
                        f"({without / activations(size, found):.1f}×)"
                    )
                yield cells


def of_largest() -> Iterator[list[str]]:
    """What fits, on as many devices and with as many cells as in the table."""
    for row in TABLE:
        ways: list[tuple[str, int, bool]] = [("without", 1, False)]
        if row.name != "Naive-1":
            ways = [("without", 32, False)]
            ways += [(f"with, M={m}", m, True) for m in (4, 32)]
        for way, m, again in ways:
            cells = [f"{row.name}, {way}", row.size]
            for accounting in ACCOUNTINGS:
                found = largest(row.cells, planned(row.devices, m, again), accounting)
                if found is None:
                    cells += ["none", "", ""]
                    continue
                filters, cuts = found
                parameters = total(count(row.cells, filters), "parameters")
                cells += [
                    f"({row.cells}, {filters})",
                    f"{parameters / 1e6:,.0f}M",
                    f"{max(cuts.bytes) / 1e9:.2f}",
                ]
            yield cells


def report() -> str:
    """All tables."""
    lines = [HEAD]
    lines += table(
        ["(L, D)", "published", "counted", "off", "model GB, published", "at 12 bytes"],
        of_parameters(),
    )
    lines += [MODEL_MEMORY, CHOICES]
    lines += table(["reading", *(row.size for row in TABLE)], of_readings())
    lines += [ACTIVATIONS]
    ms = [f"M={m}" for m in MICRO_BATCHES]
    titles = [f"{a.name}, {m}" for a in ACCOUNTINGS for m in ms]
    lines += table(["", "published", *titles], of_activations())
    lines += [between(), ONE_MODEL]
    lines += table(
        ["model", "devices", "accounting", "without", *ms],
        of_one_model(),
    )
    lines += [LARGEST]
    titles = [
        f"{a.name}: {what}"
        for a in ACCOUNTINGS
        for what in ("largest", "parameters", "GB")
    ]
    lines += table(["", "published", *titles], of_largest())
    return "\n".join(lines)


HEAD = """\
# GPipe's Table 1, counted without a device

AmoebaNet-D (L, D) on images of 224×224, batches of 128, 12 bytes a parameter with its
gradient and RMSProp's state, 8 GB (8e9 bytes) a device, as in Huang et al. 2018
(arXiv:1811.06965). Parameters, and what a forward keeps for its backward, are those
of torch's meta device; nothing is computed, nothing fitted.

## Parameters
"""
CHOICES = """\
## What the papers leave open

The text of Real et al. 2018 has a cell put those of its states side by side that no
pair takes. The authors' code (tensorflow/tpu, models/official/amoeba_net) adds state 0
to them in the normal cell; only with it do the parameters come out. From that code are
also the stem (32 filters, then reduction cells of D/4 and D/2) and that convolutions
other than 1×1 run on a quarter of the channels. The auxiliary classifier is left out.
A strided shortcut has two 1×1 convolutions. Off the published parameters by:
"""
MODEL_MEMORY = """\
Of the first and the last row the paper prints more model memory, 1.05 and 24.62 GB,
than its 12 bytes for each of their 82M and 1.8B parameters, 0.98 and 21.6 GB; the count
agrees with the parameters.
"""
ACTIVATIONS = """\
## Activations of the table's models, GB on all devices

*torch, float32*: what torch keeps, max pools' int64 indices included. *floor, 16 bits*:
the outputs of the convolutions alone, in two bytes, as a compiler must keep that
recomputes every ReLU, norm, sum and pool inside the backward; boundaries in two bytes.
The paper says neither what its numbers take nor M. Pipeline-k: stages balance FLOPs,
everything is re-materialised, and a device holds M stored inputs and one micro-batch's
activations when it has most. Transient gradients are in neither. Naive-1 keeps all.
"""
ONE_MODEL = """\
## One model, with and without

The paper's 6.26 → 3.46 GB sets an 82M model without re-materialisation beside a 318M
one with it. Here each is set beside itself: GB of activations on all devices, and how
many times less that is.
"""
LARGEST = """\
## The largest model in 8 GB a device

L and devices as in the table; D is the largest multiple of 16, to 1,024, for which some
cut into stages fits. *GB*: the fullest device, weights included.
"""


def main() -> None:
    """Count, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    text = report()
    arguments.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
