"""AmoebaNet-D, and GPipe's Table 1 counted without a device.

The network is that of Real et al. 2018 (arXiv:1802.01548) as Huang et al. 2018
(GPipe, arXiv:1811.06965) size it: L normal cells and D filters. Nothing is computed:
parameters, and the bytes that a forward keeps for its backward, are counted on
torch's meta device. Table 1 sets an 82M model without re-materialisation beside a
318M model with it; here one model is also set beside itself.

    make experiments        writes experiments/results/amoebanet.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pipeproof.sched import (
    Layer,
    ParameterError,
    Partition,
    Schedule,
    catalog,
    partition,
    recompute,
)

RESULT = Path(__file__).parent / "results" / "amoebanet.md"

STEM_FILTERS = 32
STACKS = 3
"""Of L normal cells together, with a reduction cell between one and the next."""

Shape = tuple[int, int]
Choice = tuple[int, str]
"""Which of a cell's states, and what is done to it."""

NORMAL: list[tuple[Choice, Choice]] = [
    ((1, "1x1"), (1, "max 3x3")),
    ((1, "none"), (0, "1x7 7x1")),
    ((0, "1x1"), (0, "1x7 7x1")),
    ((2, "max 3x3"), (2, "none")),
    ((1, "avg 3x3"), (5, "1x1")),
]
REDUCTION: list[tuple[Choice, Choice]] = [
    ((0, "max 2x2"), (0, "max 3x3")),
    ((2, "none"), (1, "3x3")),
    ((2, "1x7 7x1"), (2, "max 3x3")),
    ((3, "none"), (1, "max 2x2")),
    ((2, "avg 3x3"), (3, "1x1")),
]
"""State 0 is the last cell's output, 1 that of the one before, and each pair's sum
is the next state."""

REDUCTION_OUTPUT = (4, 5, 6)
UNUSED = (3, 4, 6)
"""The normal cell's states that no pair takes."""


def unit(
    inputs: int, outputs: int, kernel: Shape = (1, 1), stride: Shape = (1, 1)
) -> nn.Sequential:
    """ReLU, convolution without bias, batch norm: (rows, inputs, …) → outputs."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
    )


def bottleneck(kernels: list[Shape], channels: int, stride: int) -> nn.Sequential:
    """Convolutions on a quarter of the channels, between two of 1×1.

    One along a single dimension takes the stride in that dimension.
    """
    narrow = channels // 4
    along = [
        (stride if high > 1 else 1, stride if wide > 1 else 1) for high, wide in kernels
    ]
    inner = [unit(narrow, narrow, *of) for of in zip(kernels, along)]
    return nn.Sequential(unit(channels, narrow), *inner, unit(narrow, channels))


def unchanged(channels: int, stride: int) -> nn.Module:
    """Nothing, or a strided 1×1 where it must become smaller."""
    return nn.Identity() if stride == 1 else unit(channels, channels, stride=(2, 2))


OPS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": unchanged,
    "1x1": lambda channels, s: unit(channels, channels, stride=(s, s)),
    "3x3": partial(bottleneck, [(3, 3)]),
    "1x7 7x1": partial(bottleneck, [(1, 7), (7, 1)]),
    "avg 3x3": lambda _, s: nn.AvgPool2d(3, s, 1, count_include_pad=False),
    "max 3x3": lambda _, s: nn.MaxPool2d(3, s, 1),
    "max 2x2": lambda _, s: nn.MaxPool2d(2, s),
}


class Halved(nn.Module):
    """Half as wide and high: a strided 1×1 on the even pixels, one on the odd."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, inputs, h, w) → (rows, outputs, h / 2, w / 2)."""
        x = functional.relu(x)
        odd = functional.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        return self.norm(torch.cat([self.even(x), self.odd(odd)], 1))


class Cell(nn.Module):
    """(last output, the one before) → (its output, last output)."""

    def __init__(
        self, before: int, last: int, channels: int, output: tuple[int, ...]
    ) -> None:
        super().__init__()
        reduction = output == REDUCTION_OUTPUT
        self.pairs = REDUCTION if reduction else NORMAL
        self.output = output
        self.last = unit(last, channels)
        self.before: nn.Module = nn.Identity()
        if before != channels:
            self.before = unit(before, channels)
        self.ops = nn.ModuleList(
            OPS[name](channels, 2 if reduction and state < 2 else 1)
            for pair in self.pairs
            for state, name in pair
        )

    def halve(self, before: int, channels: int) -> None:
        """The one before is twice as wide and high as the last."""
        self.before = Halved(before, channels)

    def extra_repr(self) -> str:
        """What the modules do not show."""
        return f"{self.pairs}, {self.output}"

    def forward(self, states: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The states in turn, then the output's side by side."""
        last, before = states if isinstance(states, tuple) else (states, states)
        found = [self.last(last), self.before(before)]
        ops = iter(self.ops)
        for (left, _), (right, _) in self.pairs:
            found.append(next(ops)(found[left]) + next(ops)(found[right]))
        return torch.cat([found[state] for state in self.output], 1), last


class Head(nn.Module):
    """Mean over pixels, and one linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, states: tuple[Tensor, Tensor]) -> Tensor:
        """→ (rows, classes)."""
        return self.linear(functional.relu(states[0]).mean((2, 3)))


class Reading(NamedTuple):
    """What the papers leave open.

    Attributes:
        output: the states that a normal cell puts side by side.
        stem: filters of the first convolution, and of the two reduction cells behind
            it over D.
        classes: of the last layer.
    """

    output: tuple[int, ...] = (0, *UNUSED)
    stem: tuple[int | None, float, float] = (STEM_FILTERS, 1 / 4, 1 / 2)
    classes: int = 1000


PUBLISHED = Reading()
"""That of the authors' own code (tensorflow/tpu, models/official/amoeba_net)."""


def amoebanet(cells: int, filters: int, reading: Reading = PUBLISHED) -> nn.Sequential:
    """AmoebaNet-D (L, D), as layers: (rows, 3, h, w) → (rows, classes).

    Args:
        cells: L, the normal cells, in three stacks of as many.
        filters: D, of the first stack; the second has twice, the third four times
            as many. Every bottleneck is on a quarter, in the stem of a quarter.
        reading: of what the papers leave open.

    Raises:
        ParameterError: cells that make no three stacks, or filters that the stem
            cannot quarter twice.
    """
    if cells < 1 or cells % STACKS:
        raise ParameterError(
            f"cells must be a multiple of {STACKS}, for as many stacks of equal "
            f"length, got {cells}"
        )
    if filters < 1 or filters % 16:
        raise ParameterError(
            f"filters must be a multiple of 16, since bottlenecks in the stem have a "
            f"sixteenth of them, got {filters}"
        )
    first, *shares = reading.stem
    stem = filters // 4 if first is None else first
    layers: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem))
    ]
    kinds = [(int(filters * share), REDUCTION_OUTPUT) for share in shares]
    for stack in range(STACKS):
        channels = filters * 2**stack
        if stack:
            kinds.append((channels, REDUCTION_OUTPUT))
        kinds += [(channels, reading.output)] * (cells // STACKS)
    before = last = stem
    halve = False
    for channels, output in kinds:
        cell = Cell(before, last, channels, output)
        if halve:
            cell.halve(before, channels)
        layers.append(cell)
        before, last = last, channels * len(output)
        halve = output == REDUCTION_OUTPUT
    layers.append(Head(last, reading.classes))
    return nn.Sequential(*layers)


@dataclass(frozen=True, slots=True)
class Count:
    """A layer, for the rows that it was given; sizes in bytes, of float32.

    Attributes:
        parameters: how many.
        flops: of its forward, two for a multiplication and addition.
        kept: what torch keeps for its backward; without the input, and without what
            has one dimension (the statistics of batch norms: they do not grow with
            the rows).
        indices: the part of it that is in int64: where a max pool found what.
        convolved: of the outputs of its convolutions.
        input: of what it is called with.
        keeps_input: whether that is kept too.
    """

    parameters: int
    flops: int
    kept: int
    indices: int
    convolved: int
    input: int
    keeps_input: bool


def tensors(value: Any) -> list[Tensor]:
    """In nested tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)]


def apart(value: Any) -> Any:
    """The same, as leaves of the next layer's graph."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_()
    return tuple(apart(part) for part in value)


def count_layer(layer: nn.Module, value: Any) -> tuple[Count, Any]:
    """Run its forward on the meta device, or another, and look."""
    own = {id(t.untyped_storage()) for t in (*layer.parameters(), *layer.buffers())}
    entry = {id(t.untyped_storage()): t.nbytes for t in tensors(value)}
    saved: dict[int, Tensor] = {}
    convolved = 0

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() > 1 and id(tensor.untyped_storage()) not in own:
            saved[id(tensor.untyped_storage())] = tensor  # alive, so its id stays its
        return tensor

    def behind(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal convolved
        convolved += output.nbytes

    hooks = [
        module.register_forward_hook(behind)
        for module in layer.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with saved_tensors_hooks(pack, lambda t: t), FlopCounterMode(display=False) as ran:
        output = layer(value)
    for hook in hooks:
        hook.remove()
    new = [tensor for at, tensor in saved.items() if at not in entry]
    return Count(
        parameters=sum(p.numel() for p in layer.parameters()),
        flops=ran.get_total_flops(),
        kept=sum(t.untyped_storage().nbytes() for t in new),
        indices=sum(t.nbytes for t in new if t.dtype == torch.int64),
        convolved=convolved,
        input=sum(entry.values()),
        keeps_input=bool(entry.keys() & saved.keys()),
    ), output


def counted(model: nn.Sequential, pixels: int = 224) -> list[Count]:
    """Each layer of a model on the meta device, for one image."""
    value: Any = torch.empty(1, 3, pixels, pixels, device="meta")
    found = []
    for layer in model:
        one, output = count_layer(layer, value)
        found.append(one)
        value = apart(output)
    return found


SHOWN = 3 * STACKS
"""Normal cells to look at: from the third on, those of a stack are alike."""
STACK_ENDS = (6, 10, 14)
"""Of a model with so many, the layers behind each stack."""


@cache
def shown(cells: int, filters: int) -> list[Count]:
    """Each layer of a small model, for one image."""
    with torch.device("meta"):
        return counted(amoebanet(cells, filters))


def count(cells: int, filters: int) -> list[Count]:
    """Each layer of AmoebaNet-D (L, D), for one image, alike cells looked at once."""
    found = list(shown(min(cells, SHOWN), filters))
    if cells > SHOWN:
        for end in reversed(STACK_ENDS):
            found[end:end] = [found[end - 1]] * ((cells - SHOWN) // STACKS)
    return found


def total(counts: list[Count], name: str) -> int:
    """Of all layers."""
    return sum(getattr(one, name) for one in counts)


class Accounting(NamedTuple):
    """What of a forward counts as kept, and how many bytes a number takes.

    Attributes:
        name: in the tables.
        kept: bytes of a layer's.
        size: of a boundary tensor, over that in float32.
    """

    name: str
    kept: Callable[[Count], float]
    size: float

    def layer(self, one: Count, rows: float) -> Layer:
        """For `partition`, which compares times: here, FLOPs."""
        entry = one.input * self.size * rows
        return Layer(
            forward=one.flops * rows,
            backward=2 * one.flops * rows,
            weights=BYTES_A_PARAMETER * one.parameters,
            activations=self.kept(one) * rows + entry * one.keeps_input,
            input=entry,
            keeps_input=one.keeps_input,
        )


BYTES_A_PARAMETER = 12
"""With its gradient and RMSProp's state, as the paper says."""
DEVICE = 8e9
BATCH = 128
MOST_FILTERS = 1024
TORCH = Accounting("torch, float32", lambda one: one.kept, 1.0)
FLOOR = Accounting("floor, 16 bits", lambda one: one.convolved / 2, 0.5)
ACCOUNTINGS = (TORCH, FLOOR)


class Row(NamedTuple):
    """A column of GPipe's Table 1; bytes in GB, `activations` of all devices."""

    name: str
    devices: int
    cells: int
    filters: int
    parameters: float
    model: float
    activations: float

    @property
    def size(self) -> str:
        """As the paper writes it."""
        return f"({self.cells}, {self.filters})"


TABLE = (
    Row("Naive-1", 1, 18, 208, 82e6, 1.05, 6.26),
    Row("Pipeline-1", 1, 18, 416, 318e6, 3.8, 3.46),
    Row("Pipeline-2", 2, 18, 544, 542e6, 6.45, 8.11),
    Row("Pipeline-4", 4, 36, 544, 1.05e9, 12.53, 15.21),
    Row("Pipeline-8", 8, 72, 512, 1.8e9, 24.62, 26.24),
)


MICRO_BATCHES = (1, 4, 32, 128)


def planned(devices: int, micro_batches: int, again: bool) -> Schedule:
    """GPipe's schedule, with re-materialisation or without."""
    schedule = catalog.make("gpipe", devices=devices, micro_batches=micro_batches)
    return recompute(schedule, "always") if again else schedule


def placed(
    size: tuple[int, int],
    schedule: Schedule,
    accounting: Accounting,
    memory: float | None = None,
) -> Partition:
    """The cuts of AmoebaNet-D (L, D) that balance FLOPs, within the memory."""
    rows = BATCH / schedule.micro_batches
    layers = [accounting.layer(one, rows) for one in count(*size)]
    return partition(layers, schedule, memory=memory)


def activations(size: tuple[int, int], found: Partition) -> float:
    """GB on all devices, each when it has most."""
    weights = BYTES_A_PARAMETER * total(count(*size), "parameters")
    return (sum(found.bytes) - weights) / 1e9


def largest(
    cells: int, schedule: Schedule, accounting: Accounting
) -> tuple[int, Partition] | None:
    """The most filters, in steps of 16, with which each device has room.

    Found by halving: so many fit, and 16 more do not, or are above `MOST_FILTERS`.
    """

    def fits(steps: int) -> Partition | None:
        try:
            return placed((cells, 16 * steps), schedule, accounting, DEVICE)
        except ParameterError:
            return None

    low, high, best = 0, MOST_FILTERS // 16, None
    while high - low > 1:
        middle = (low + high) // 2
        found = fits(middle)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return (16 * low, best) if best is not None else None


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
    """Where the published activations lie, at the M that is likest them."""
    inside = 0
    for row in TABLE:
        schedule = planned(row.devices, 4, row.name != "Naive-1")
        size = row.cells, row.filters
        low, high = (activations(size, placed(size, schedule, a)) for a in ACCOUNTINGS)
        inside += min(low, high) < row.activations < max(low, high)
    return (
        f"At M=4 the published number lies between the two accountings in {inside} of "
        f"{len(TABLE)} rows.\nNone of them is reproduced: neither accounting is that "
        "of the paper's compiler.\n"
    )


def of_one_model() -> Iterator[list[str]]:
    """One model with and without, on one device and on two."""
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
Of the last row the paper prints more model memory than its 12 bytes for each of its
1.8B parameters; the count agrees with the parameters.
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
