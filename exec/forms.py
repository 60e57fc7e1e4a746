"""What a receiver must know of a value before it comes: shapes, strides and types."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeproof.exec.tensors import flat

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
        parts: its tensors.
        structure: what holds them, as lists whose first entries say what they are.
        plain: whether it holds bools, numbers or texts, which come with each
            message: they may differ in every one.
    """

    parts: tuple[Part, ...]
    structure: Any
    plain: bool

    @classmethod
    def of(cls, value: Any) -> tuple[Form, list[Tensor]]:
        """Of a value; and its tensors, each `dense`."""
        leaves = flat(value)
        tensors = [dense(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        plain = any(x is not None and not isinstance(x, Tensor) for x in leaves)
        return cls(tuple(map(Part.of, tensors)), _structure(value), plain), tensors

    def fitting(self, value: Any) -> list[Tensor] | None:
        """The tensors of such a value that needs no copy to be `dense`; else None."""
        if self.structure == TENSOR:  # nearly always
            whole = isinstance(value, Tensor) and self.parts[0].fits(value)
            return [value] if whole else None
        if self.plain or _structure(value) != self.structure:
            return None
        tensors = [leaf for leaf in flat(value) if isinstance(leaf, Tensor)]
        fit = all(part.fits(tensor) for part, tensor in zip(self.parts, tensors))
        return tensors if fit else None

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The value, with these tensors in it."""
        if self.structure == TENSOR:
            return tensors[0]
        return _filled(self.structure, iter(tensors))

    def to_text(self) -> str:
        """As JSON."""
        parts = [[p.shape, p.stride, str(p.dtype), p.wants_grad] for p in self.parts]
        return json.dumps([self.structure, self.plain, parts])

    @classmethod
    def parse(cls, text: str) -> Form:
        """The inverse of `to_text`."""
        structure, plain, parts = json.loads(text)
        return cls(
            tuple(
                Part(tuple(shape), tuple(stride), DTYPES[dtype], wants_grad)
                for shape, stride, dtype, wants_grad in parts
            ),
            structure,
            plain,
        )

    def __str__(self) -> str:
        parts = ", ".join(map(str, self.parts)) or "no tensor"
        if self.structure == TENSOR:
            return parts
        return f"{parts} in {json.dumps(self.structure)}"


TENSOR = ["tensor"]


def _structure(value: Any) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        return TENSOR
    if kind is dict:
        return ["dict", *([key, _structure(part)] for key, part in value.items())]
    if kind is tuple or kind is list:
        return [kind.__name__, *map(_structure, value)]
    return ["plain", value]


def _filled(structure: Any, tensors: Iterator[Tensor]) -> Any:
    kind, *parts = structure
    match kind:
        case "tensor":
            return next(tensors)
        case "dict":
            return {key: _filled(part, tensors) for key, part in parts}
        case "tuple":
            return tuple(_filled(part, tensors) for part in parts)
        case "list":
            return [_filled(part, tensors) for part in parts]
    return parts[0]


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
