"""The few things a runtime does to what crosses a boundary of stages or slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pipeproof.exec.split import Root

RELEASED_FROM = 1 << 16
"""Bytes of an output from which on letting go of it early is worth 10 µs."""


def flat(value: Any) -> list[Any]:
    """The tensors of nested tuples, in order; None counts as a tensor."""
    if type(value) is not tuple:
        return [value]
    return [tensor for part in value for tensor in flat(part)]


def wants_grad(value: Any) -> bool:
    """Whether any of it requires a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    return any(map(wants_grad, value))


def versions(value: Any) -> Any:
    """Counters that an in-place change of any of it raises."""
    if isinstance(value, Tensor):
        return value._version
    return tuple(map(versions, value))


def handed_on(value: Any, wants_grad: bool | None = None) -> Any:
    """What the next stage, or the next slice, starts with: the leaves of its graph.

    Args:
        value: an output, or a carry.
        wants_grad: whether it may need a gradient, where the output itself does
            not know because it was made without a graph.
    """
    if not isinstance(value, Tensor):
        return tuple(handed_on(part, wants_grad) for part in value)
    if wants_grad is None:
        wants_grad = value.requires_grad
    elif wants_grad:
        wants_grad = value.is_floating_point() or value.is_complex()
    return value.detach().requires_grad_(wants_grad)


def aside(carry: Any) -> Any:
    """A carry, each tensor with a node of its own at the end of its graph.

    A backward that starts there comes upon the tensor's other uses in the same
    order whether these lie in this stage or in the next.
    """
    if isinstance(carry, Tensor):
        return carry.view_as(carry) if carry.requires_grad else carry
    return tuple(map(aside, carry))


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; itself where it is there already.

    A copy to the host must be waited for: nothing orders the host's reads behind
    it. Copies between devices are ordered by their streams.
    """
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu")


def moved(value: Any, device: torch.device) -> Any:
    """A copy on another device, a leaf where the original wants a gradient."""

    def move(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        copy = copied(tensor.detach(), device)
        return copy.requires_grad_(tensor.requires_grad)

    return tuple(map(move, value)) if isinstance(value, tuple) else move(value)


def grads(value: Any) -> Any:
    """The gradients that a backward left in it; None where there are none."""
    if isinstance(value, Tensor):
        return value.grad
    return tuple(map(grads, value))


def root(output: Any) -> Any:
    """Where a backward starts; None where the output wants no gradient.

    The output's own data has been handed on and is needed here no more, so what
    is worth it is let go: its edge in the graph is enough.
    """
    if not isinstance(output, Tensor):
        return tuple(map(root, output))
    if not output.requires_grad:
        return None
    return output if output.nbytes < RELEASED_FROM else get_gradient_edge(output)


def ends(roots: Any, gradients: Any) -> tuple[list[Root], list[Tensor]]:
    """Where a backward starts, and with what; what wants or gets none is left out."""
    if type(roots) is not tuple:  # nearly always, and worth a microsecond
        there = roots is not None and gradients is not None
        return ([roots], [gradients]) if there else ([], [])
    pairs = [
        (root, gradient)
        for root, gradient in zip(flat(roots), flat(gradients))
        if root is not None and gradient is not None
    ]
    return [root for root, _ in pairs], [gradient for _, gradient in pairs]


def like(value: Any, tensors: Iterator[Any]) -> Any:
    """These in the places of a value's tensors, None where one wants no gradient."""
    if isinstance(value, Tensor):
        return next(tensors) if value.requires_grad else None
    return tuple(like(part, tensors) for part in value)
