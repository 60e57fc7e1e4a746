"""What one forward stored for its backward, sent away and brought back.

Autograd asks where to keep each tensor that it saves; what it gets to keep here
is an entry of ours, so that the tensor itself may leave the device meanwhile::

    F         saved tensors ──▶ entries
    OFFLOAD   their memory ──copy──▶ host, or another device; the original is let go
    RELOAD    the copy ──▶ the device
    B         entries ──▶ saved tensors

Memory is copied once however many entries share it, and only as much as they
cover. Parameters, buffers and views of them stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
        data: uint8; the bytes, here or away.
    """

    entries: list[tuple[Entry, torch.Size, tuple[int, ...], int]]
    data: Tensor


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
        self._event: torch.cuda.Event | None = None

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
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        return entry.tensor

    def offload(self, place: torch.device, leaves: Iterable[Tensor]) -> None:
        """Copy everything elsewhere and let go of it here.

        Args:
            place: the host, or the device whose memory takes it.
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
        with self._copying():
            for region in self._regions:
                region.data = _copied(region.data, place)
        for region in self._regions:
            for entry, *_ in region.entries:
                nothing = torch.empty(0, dtype=entry.tensor.dtype, device=self._device)
                entry.tensor = nothing
                if entry.leaf is not None:
                    entry.leaf.data = nothing

    def reload(self) -> None:
        """Bring everything back to the device."""
        with self._copying():
            for region in self._regions:
                region.data = _copied(region.data, self._device)
        for region in self._regions:
            memory = region.data.untyped_storage()
            for entry, shape, strides, first in region.entries:
                offset = first // entry.tensor.element_size()
                entry.tensor = torch.empty(
                    0, dtype=entry.tensor.dtype, device=self._device
                ).set_(memory, offset, shape, strides)
                if entry.leaf is not None:
                    entry.leaf.data = entry.tensor
        self._regions.clear()

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """On a GPU, copy on a stream of its own, behind what is queued so far."""
        if self._device.type != "cuda":
            yield
            return
        compute = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(compute)
        if self._event is not None:
            stream.wait_event(self._event)
        before = [region.data for region in self._regions]
        with torch.cuda.stream(stream):
            yield
            self._event = stream.record_event()
        for region, earlier in zip(self._regions, before):
            if earlier.is_cuda:  # its memory is free when the copy is done
                earlier.record_stream(stream)
            if region.data.device == self._device:
                region.data.record_stream(compute)


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


def _copied(data: Tensor, place: torch.device) -> Tensor:
    """The same bytes in memory of their own, pinned where a GPU copies to the host."""
    pinned = data.is_cuda and place.type == "cpu"
    copy = torch.empty(data.shape, dtype=data.dtype, device=place, pin_memory=pinned)
    return copy.copy_(data, non_blocking=True)
