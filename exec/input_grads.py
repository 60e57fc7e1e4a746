"""The gradient of a batch whose tensors want one, put together from its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeproof.exec.batch import Value, unmarked
from pipeproof.exec.step import Step
from pipeproof.exec.tensors import flat


def pass_on(inputs: Value, step: Step) -> None:
    """The gradient of the inputs, where they want one, as one backward.

    Args:
        inputs: as the step was given them.
        step: that is through.
    """
    if not step.input_grads:
        return
    for place, tensor in enumerate(flat(unmarked(inputs))):
        if not (isinstance(tensor, Tensor) and tensor.requires_grad):
            continue
        whole = []
        for micro_batch, slices in enumerate(step.inputs):
            parts = [
                _grad(part, step.input_grads.get((micro_batch, number)), place)
                for number, part in enumerate(slices)
            ]
            there = [part.to(tensor.device) for part in parts]
            whole.append(torch.cat(there, 1) if len(there) > 1 else there[0])
        torch.autograd.backward(tensor, torch.cat(whole))


def _grad(value: Value, grads: Value | None, place: int) -> Tensor:
    """Of one tensor of a slice of the inputs; zero where its loss does not count."""
    found = None if grads is None else flat(grads)[place]
    return torch.zeros_like(flat(value)[place]) if found is None else found
