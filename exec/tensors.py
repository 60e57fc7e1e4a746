"""The few things a runtime does to what crosses a boundary of stages or slices.

That is a value: a tensor, a bool, an int, a float, a str or None, or a tuple, list
or dict of values. All of these functions keep to its structure; in the structure of
its gradients None stands for what has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pipeproof.exec.errors import ModelError
from pipeproof.exec.split import Root

PLAIN = (bool, int, float, str, type(None))
"""What crosses besides tensors, as it is."""
CONTAINERS = (tuple, list, dict)

RELEASED_FROM = 1 << 16
"""Bytes of an output from which on letting go of it early is worth 10 µs."""


def flat(value: Any) -> list[Any]:
    """The leaves, in order."""
    kind = type(value)
    if kind is tuple or kind is list:
        return [leaf for part in value for leaf in flat(part)]
    if kind is dict:
        return [leaf for part in value.values() for leaf in flat(part)]
    return [value]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure, with what a function makes of each leaf."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([mapped(function, part) for part in value])
    if kind is dict:
        return {key: mapped(function, part) for key, part in value.items()}
    return function(value)


def check(value: Any, whose: str) -> Any:
    """What a stage returned, if it can cross to the next.

    Raises:
        ModelError: it is none of what can.
    """
    for where, leaf in _places(value):
        if not isinstance(leaf, Tensor) and type(leaf) not in PLAIN:
            there = f" at {where}" if where else ""
            raise ModelError(
                f"{whose} returned {_named(leaf)}{there}: a tensor, a bool, an int, a "
                "float, a str or None can cross to the next stage, and tuples, lists "
                "and dicts of these, with keys that are str or int"
            )
    return value


def _places(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Of each leaf, its place; a dict with other keys is a leaf."""
    kind = type(value)
    if kind is dict and all(type(key) in (str, int) for key in value):
        pairs: Any = value.items()
    elif kind is tuple or kind is list:
        pairs = enumerate(value)
    else:
        yield where, value
        return
    for key, part in pairs:
        yield from _places(part, f"{where}[{key!r}]")


def _named(leaf: Any) -> str:
    if type(leaf) is dict:
        key = next(key for key in leaf if type(key) not in (str, int))
        return f"a dict with a key of type {type(key).__name__}"
    return type(leaf).__name__


def learning(value: Any) -> list[Tensor]:
    """Those of its tensors that want a gradient."""
    return [x for x in flat(value) if isinstance(x, Tensor) and x.requires_grad]


def wants_grad(value: Any) -> bool:
    """Whether any of it requires a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    return bool(learning(value))


def versions(value: Any) -> Any:
    """Counters that an in-place change of any of it raises.

    What is made in inference mode counts none.
    """
    if isinstance(value, Tensor):
        return 0 if value.is_inference() else value._version
    return [versions(leaf) for leaf in flat(value) if isinstance(leaf, Tensor)]


def handed_on(value: Any, wants_grad: bool | None = None) -> Any:
    """What the next stage, or the next slice, starts with: the leaves of its graph.

    Args:
        value: an output, or a carry.
        wants_grad: whether it may need a gradient, where the output itself does
            not know because it was made without a graph.
    """
    if not isinstance(value, Tensor):
        if type(value) not in CONTAINERS:
            return value
        return mapped(lambda leaf: handed_on(leaf, wants_grad), value)
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


def placed(value: Any, device: torch.device) -> Any:
    """With its tensors on a device."""
    return mapped(lambda x: copied(x, device) if isinstance(x, Tensor) else x, value)


def moved(value: Any, device: torch.device) -> Any:
    """A copy on another device, a leaf where the original wants a gradient."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return copied(leaf.detach(), device).requires_grad_(leaf.requires_grad)

    return mapped(move, value)


def grads(value: Any) -> Any:
    """The gradients that a backward left in it."""
    if isinstance(value, Tensor):
        return value.grad
    return mapped(lambda x: x.grad if isinstance(x, Tensor) else None, value)


def root(output: Any) -> Any:
    """Where a backward starts; None where the output wants no gradient.

    The output's own data has been handed on and is needed here no more, so what
    is worth it is let go: its edge in the graph is enough.
    """
    if not isinstance(output, Tensor):
        return mapped(root, output) if type(output) in CONTAINERS else None
    if not output.requires_grad:
        return None
    return output if output.nbytes < RELEASED_FROM else get_gradient_edge(output)


def ends(roots: Any, gradients: Any) -> tuple[list[Root], list[Tensor]]:
    """Where a backward starts, and with what; what wants or gets none is left out."""
    if type(roots) not in CONTAINERS:  # nearly always, and worth a microsecond
        there = roots is not None and gradients is not None
        return ([roots], [gradients]) if there else ([], [])
    pairs = [
        (root, gradient)
        for root, gradient in zip(flat(roots), flat(gradients))
        if root is not None and gradient is not None
    ]
    return [root for root, _ in pairs], [gradient for _, gradient in pairs]


def like(value: Any, found: Iterator[Any]) -> Any:
    """These in the places of the tensors that want a gradient; None elsewhere."""

    def take(leaf: Any) -> Any:
        return next(found) if isinstance(leaf, Tensor) and leaf.requires_grad else None

    return mapped(take, value)
