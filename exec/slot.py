"""Where a tensor that autograd saved will be, once it is recomputed.

A node of the graph holds it in the tensor's place, and lets go of it as of a tensor:
when its backward has run, or when I finds that W will not read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeproof.exec.errors import ModelError


class Slot:
    """Of one saved tensor.

    Attributes:
        shape: of the tensor.
        dtype: likewise.
        tensor: it, without its graph, while it is there.
        version: how often it had been written to when it was saved.
    """

    __slots__ = ("dtype", "shape", "tensor", "version")

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.tensor: Tensor | None = None
        self.version = 0

    def read(self) -> Tensor:
        """For a backward.

        Raises:
            ModelError: it was written to after it was saved.
        """
        if self.tensor is None:
            raise RuntimeError("a saved tensor is read before it is recomputed")
        if self.tensor._version != self.version:
            raise ModelError(changed_in_place(tuple(self.shape)))
        return self.tensor


def changed_in_place(shape: tuple[int, ...]) -> str:
    """What is refused of a saved tensor."""
    return (
        f"a tensor of shape {shape} was changed in place after autograd had saved it "
        "for backward: work out of place there"
    )


TELLS = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")
"""Whether torch tells what a node's SavedTensors hold; 2.6 does not."""


def tensor_of(saved: Any) -> Tensor | None:
    """What one of torch's SavedTensors holds; None where others keep it, or unknown."""
    if not TELLS:
        return None
    if saved.unpack_hook is None:
        held: Tensor | None = saved.data
        return held
    return saved.data.tensor if isinstance(saved.data, Slot) else None
