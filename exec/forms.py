"""What a receiver must know of a value before it comes: shapes, strides and types."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


class Part:
    """What a receiver must know of a tensor.

    Attributes:
        shape, stride: it arrives with the strides it was sent with, because
            kernels, and so the last bits of results, may depend on them.
        dtype: its type.
        wants_grad: whether it is to be a leaf that requires a gradient.
        contiguous: whether it is sent as it lies.
        empty: whether nothing is sent at all.
    """

    __slots__ = ("contiguous", "dtype", "empty", "shape", "stride", "wants_grad")

    def __init__(
        self,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        wants_grad: bool,
    ) -> None:
        self.shape, self.stride = shape, stride
        self.dtype, self.wants_grad = dtype, wants_grad
        self.empty = 0 in shape
        expected = 1
        self.contiguous = True
        for length, step in zip(reversed(shape), reversed(stride)):
            self.contiguous &= length == 1 or step == expected
            expected *= length

    @classmethod
    def of(cls, tensor: Tensor) -> Part:
        """Of a tensor as `dense` gives it."""
        shape, stride = tuple(tensor.shape), tensor.stride()
        return cls(shape, stride, tensor.dtype, tensor.requires_grad)

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor is such a one, and has its memory to itself."""
        return (
            tensor.shape == self.shape
            and tensor.stride() == self.stride
            and tensor.dtype is self.dtype
            and tensor.requires_grad is self.wants_grad
            and not tensor.is_neg()
            and not tensor.is_conj()
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    def _all(self) -> tuple[Any, ...]:
        return self.shape, self.stride, self.dtype, self.wants_grad

    def __str__(self) -> str:
        return f"{list(self.shape)} of {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Form:
    """What a receiver must know of a value.

    Attributes:
        parts: its tensors; None for a gradient that there is not.
        several: whether it is a tuple.
    """

    parts: tuple[Part | None, ...]
    several: bool

    @classmethod
    def of(cls, value: Any) -> tuple[Form, tuple[Tensor | None, ...]]:
        """Of a tensor, a tuple of them, or None; and its tensors, each `dense`."""
        several = isinstance(value, tuple)
        tensors = tuple(
            None if t is None else dense(t) for t in (value if several else (value,))
        )
        parts = tuple(None if t is None else Part.of(t) for t in tensors)
        return cls(parts, several), tensors

    def fits(self, value: Any) -> bool:
        """Whether a value is such a one, and needs no copy to be `dense`."""
        if not self.several:
            part = self.parts[0]
            if part is None or value is None:
                return part is value
            return isinstance(value, Tensor) and part.fits(value)
        return isinstance(value, tuple) and (
            len(value) == len(self.parts)
            and all(
                part is tensor if part is None or tensor is None else part.fits(tensor)
                for part, tensor in zip(self.parts, value)
            )
        )

    def to_text(self) -> str:
        """As JSON."""
        parts = [
            None
            if part is None
            else [part.shape, part.stride, str(part.dtype), part.wants_grad]
            for part in self.parts
        ]
        return json.dumps([self.several, parts])

    @classmethod
    def parse(cls, text: str) -> Form:
        """The inverse of `to_text`."""
        several, parts = json.loads(text)
        return cls(
            tuple(
                None
                if part is None
                else Part(tuple(part[0]), tuple(part[1]), DTYPES[part[2]], part[3])
                for part in parts
            ),
            several,
        )

    def __str__(self) -> str:
        return ", ".join("None" if part is None else str(part) for part in self.parts)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it has gaps, overlaps or is not materialised."""
    plain = tensor.resolve_conj().resolve_neg()
    like = torch.empty_like(plain, device="meta", memory_format=torch.preserve_format)
    if like.stride() == plain.stride():
        return plain
    copy = torch.empty_like(plain, memory_format=torch.preserve_format)
    copy.copy_(plain.detach())
    return copy.requires_grad_(tensor.requires_grad)


def as_bytes(tensor: Tensor) -> Tensor:
    """A dense tensor's memory, as one contiguous row of bytes."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8)
