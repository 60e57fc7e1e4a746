"""What one forward stored for its backward, sent away and brought back.

Autograd asks where to keep each tensor that it saves; what it gets to keep here
is an entry of ours, so that the tensor itself may leave the device meanwhile::

    F         saved tensors ──▶ entries
    OFFLOAD   their memory ──copy──▶ host, or another device; the original is let go
    RELOAD    the copy ──▶ the device
    B         entries ──▶ saved tensors

Memory is copied once however many entries share it, and only as much as they
cover. Parameters, buffers and views of them stay. Where it is meanwhile is a
`Place`: the host or a device of this process, or the memory of another rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pipeproof.exec.errors import ModelError

ALIGNMENT = 16
"""Bytes; no type of element is larger."""


@dataclass(slots=True, eq=False)
class Entry:
    """One saved tensor.

    Attributes:
        tensor: it, detached; without any memory while that is away.
        version: how often it had been written to when it was saved.
        leaf: a tensor of the executor's whose data goes and comes with it.
    """

    tensor: Tensor
    version: int
    leaf: Tensor | None = None


@dataclass(slots=True)
class Region:
    """A stretch of memory that several entries share.

    Attributes:
        entries: with the shape, the strides and the first byte of each.
        data: uint8; the bytes, or None while they are away.
    """

    entries: list[tuple[Entry, torch.Size, tuple[int, ...], int]]
    data: Tensor | None


class Place(Protocol):
    """Where the memory of one stash is while it is away."""

    def put(self, data: list[Tensor]) -> None:
        """Take these rows of bytes; they are held no longer than it takes."""

    def get(self) -> list[Tensor]:
        """Begin to bring them back, into memory of their own on the device."""

    def ready(self) -> None:
        """Have whoever reads what `get` gave find it there."""


class Stash:
    """What one forward stores.

    Args:
        device: of the stage.
        staying: addresses of memory that stays, of parameters and buffers.
    """

    def __init__(self, device: torch.device, staying: frozenset[int]) -> None:
        self._device = device
        self._staying = staying
        self._entries: list[Entry] = []
        self._regions: list[Region] = []
        self._place: Place | None = None

    def saving(self) -> saved_tensors_hooks:
        """A context in which autograd keeps what it saves here."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Entry:
        # Not the tensor itself: it leads to the node that holds the entry.
        entry = Entry(tensor.detach(), tensor._version)
        if _movable(tensor) and _address(tensor) not in self._staying:
            self._entries.append(entry)
        return entry

    def _unpack(self, entry: Entry) -> Tensor:
        if self._place is not None:
            self._place.ready()
        return entry.tensor

    def offload(self, place: Place, leaves: Iterable[Tensor]) -> None:
        """Copy everything elsewhere and let go of it here.

        Args:
            place: that takes it.
            leaves: the stage's inputs, whose memory their graph would hold.

        Raises:
            ModelError: a tensor was written to after it was saved.
        """
        self._entries += [
            Entry(leaf.detach(), leaf._version, leaf)
            for leaf in leaves
            if _movable(leaf)
        ]
        shared: dict[int, list[Entry]] = {}
        for entry in self._entries:
            if entry.tensor._version != entry.version:
                raise ModelError(
                    f"a tensor of shape {tuple(entry.tensor.shape)} was changed in "
                    "place after autograd had saved it for backward: work out of place "
                    "there"
                )
            shared.setdefault(_address(entry.tensor), []).append(entry)
        self._entries.clear()
        self._regions = [_region(entries) for entries in shared.values()]
        self._place = place
        place.put([region.data for region in self._regions if region.data is not None])
        for region in self._regions:
            region.data = None
            for entry, *_ in region.entries:
                nothing = torch.empty(0, dtype=entry.tensor.dtype, device=self._device)
                entry.tensor = nothing
                if entry.leaf is not None:
                    entry.leaf.data = nothing

    def reload(self) -> None:
        """Bring everything back to the device."""
        assert self._place is not None
        for region, data in zip(self._regions, self._place.get(), strict=True):
            memory = data.untyped_storage()
            for entry, shape, strides, first in region.entries:
                offset = first // entry.tensor.element_size()
                entry.tensor = torch.empty(
                    0, dtype=entry.tensor.dtype, device=self._device
                ).set_(memory, offset, shape, strides)
                if entry.leaf is not None:
                    entry.leaf.data = entry.tensor
        self._regions.clear()


class Copies:
    """A place in the memory of this process: the host's, or another device's.

    On a GPU, copies run on two streams of their own, one away and one back, each behind
    what is queued so far. All of its memory is the compute stream's, and not free while
    they use it.

    Args:
        device: of the stage.
        place: that takes the copies.
    """

    def __init__(self, device: torch.device, place: torch.device) -> None:
        self._device, self._away = device, place
        self._copies: list[Tensor] = []
        self._event: torch.cuda.Event | None = None

    def put(self, data: list[Tensor]) -> None:
        """Copy these rows of bytes there."""
        self._copies = self._copied(data, self._away)

    def get(self) -> list[Tensor]:
        """Copy them back."""
        back = self._copied(self._copies, self._device, back=True)
        self._copies.clear()
        return back

    def ready(self) -> None:
        """Have the current stream wait for the copies."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def _copied(
        self, data: list[Tensor], place: torch.device, *, back: bool = False
    ) -> list[Tensor]:
        copies = [_room(row, place) for row in data]
        if self._device.type != "cuda":
            for copy, row in zip(copies, data):
                copy.copy_(row)
            return copies
        stream = _stream(self._device, back)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        if self._event is not None:
            stream.wait_event(self._event)
        with torch.cuda.stream(stream):
            for copy, row in zip(copies, data):
                copy.copy_(row, non_blocking=True)
            self._event = stream.record_event()
        for tensor in (*data, *copies):
            if tensor.is_cuda:
                tensor.record_stream(stream)
        return copies


@cache
def _stream(device: torch.device, back: bool) -> torch.cuda.Stream:
    """Of a GPU, the stream of copies away from it, or back."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _movable(tensor: Tensor) -> bool:
    """Whether shape, strides and bytes are all there is to it."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.numel() > 0
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_quantized
    )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def addresses(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Of the memory of these."""
    return frozenset(map(_address, tensors))


def _region(entries: list[Entry]) -> Region:
    """The bytes that these cover of the memory they share."""
    low, high = [], []
    for entry in entries:
        tensor = entry.tensor
        steps = zip(tensor.shape, tensor.stride())
        last = tensor.storage_offset() + sum((n - 1) * step for n, step in steps)
        low.append(int(tensor.storage_offset()) * tensor.element_size())
        high.append((last + 1) * tensor.element_size())
    start = min(low) // ALIGNMENT * ALIGNMENT
    whole = entries[0].tensor
    data = torch.empty(0, dtype=torch.uint8, device=whole.device).set_(
        whole.untyped_storage(), start, (max(high) - start,), (1,)
    )
    return Region(
        [
            (entry, entry.tensor.shape, entry.tensor.stride(), first - start)
            for entry, first in zip(entries, low)
        ],
        data,
    )


def _room(data: Tensor, place: torch.device) -> Tensor:
    """Memory for a copy, pinned where it goes between a GPU and the host."""
    pinned = data.is_cuda and place.type == "cpu"
    return torch.empty(data.shape, dtype=data.dtype, device=place, pin_memory=pinned)
