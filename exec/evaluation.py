"""Forwards without training: modules in eval mode, outputs of micro-batches joined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeproof.exec.batch import Value
from pipeproof.exec.step import Slice


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have modules in eval mode, and then each in the mode that it was in."""
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def joined(parts: Mapping[Slice, Value]) -> Value:
    """The outputs of micro-batches' slices → that of the batch.

    Tensors are joined by rows, those of slices by positions before, and scalars become
    one tensor with a number for each; in place of what is no tensor stands a list of
    what each micro-batch gave, its first slice.
    """
    slices: dict[int, list[Value]] = {}
    for where in sorted(parts):
        slices.setdefault(where[0], []).append(parts[where])
    return _together([_together(of, 1) for of in slices.values()], 0)


def _together(parts: list[Any], dim: int) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        same = [part.to(first.device) for part in parts]
        if first.dim() > dim:
            return torch.cat(same, dim)
        return torch.stack(same) if dim == 0 else first
    kind = type(first)
    if kind is dict:
        return {key: _together([part[key] for part in parts], dim) for key in first}
    if kind is tuple or kind is list:
        return kind(_together(list(of), dim) for of in zip(*parts))
    return parts if dim == 0 else first
