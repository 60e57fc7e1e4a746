"""AmoebaNet-D counted on torch's meta device: parameters, FLOPs, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from amoebanet_model import STACKS, amoebanet
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
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
