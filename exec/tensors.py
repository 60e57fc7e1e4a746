"""The few things a runtime does to what crosses a boundary between stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pipeproof.exec.batch import Value
from pipeproof.exec.split import Splitter

RELEASED_FROM = 1 << 16
"""Bytes of an output from which on letting go of it early is worth 10 µs."""


def wants_grad(value: Value) -> bool:
    """Whether any of it requires a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    return any(tensor.requires_grad for tensor in value)


def versions(value: Value) -> Any:
    """Counters that an in-place change of any of it raises."""
    if isinstance(value, Tensor):
        return value._version
    return [tensor._version for tensor in value]


def handed_on(value: Value, wants_grad: bool | None = None) -> Value:
    """An output as the next stage's input: the leaf of that stage's graph.

    Args:
        value: the output.
        wants_grad: whether it may need a gradient, where the output itself does
            not know because it was made without a graph.
    """
    if not isinstance(value, Tensor):
        return tuple(handed_on(tensor, wants_grad) for tensor in value)  # type: ignore[misc]
    if wants_grad is None:
        wants_grad = value.requires_grad
    elif wants_grad:
        wants_grad = value.is_floating_point() or value.is_complex()
    return value.detach().requires_grad_(wants_grad)


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


def grads(value: Value) -> Any:
    """The gradients that a backward left in it; None where there are none."""
    if isinstance(value, Tensor):
        return value.grad
    return tuple(tensor.grad for tensor in value)


def root(output: Value) -> Any:
    """Where a backward starts; None where the output wants no gradient.

    The output's own data has been handed on and is needed here no more, so what
    is worth it is let go: its edge in the graph is enough.
    """
    if not isinstance(output, Tensor):
        return tuple(map(root, output))
    if not output.requires_grad:
        return None
    return output if output.nbytes < RELEASED_FROM else get_gradient_edge(output)


def backward(root: Any, gradient: Any) -> None:
    """Autograd from a stage's output down; what wants no gradient gets none."""
    if type(root) is not tuple:
        if root is not None and gradient is not None:
            torch.autograd.backward(root, gradient)
        return
    pairs = [(r, g) for r, g in zip(root, gradient) if r is not None and g is not None]
    if pairs:
        roots, gradients = zip(*pairs)
        torch.autograd.backward(roots, gradients)


def halved(splitter: Splitter, root: Any, gradient: Any, value: Value) -> Any:
    """The gradients of a stage's input, as `grads` has them, and what W has left."""
    roots, gradients = _as_tuple(root), _as_tuple(gradient)
    pairs = [
        (r, g) for r, g in zip(roots, gradients) if r is not None and g is not None
    ]
    if not pairs:
        return None if isinstance(value, Tensor) else (None,) * len(value), None
    inputs = _as_tuple(value)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    roots, gradients = zip(*pairs)
    found, rest = splitter.input_grads(roots, gradients, leaves)
    by_leaf = iter(found)
    result = tuple(next(by_leaf) if t.requires_grad else None for t in inputs)
    return result if isinstance(value, tuple) else result[0], rest


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if type(value) is tuple else (value,)
