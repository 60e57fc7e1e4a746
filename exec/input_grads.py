"""The gradient of a batch whose tensors want one, put together from its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeproof.exec.batch import Value
from pipeproof.exec.step import Step
from pipeproof.exec.tensors import flat


def pass_on(inputs: Value, step: Step) -> None:
    """The gradient of the inputs, where they want one, as one backward."""
    if all(grad is None for slices in step.input_grads for grad in slices):
        return
    for place, tensor in enumerate(flat(inputs)):
        if not (isinstance(tensor, Tensor) and tensor.requires_grad):
            continue
        whole = [
            torch.cat([_grad(*pair, place).to(tensor.device) for pair in zip(*of)], 1)
            if len(of[0]) > 1
            else _grad(of[0][0], of[1][0], place).to(tensor.device)
            for of in zip(step.inputs, step.input_grads)
        ]
        torch.autograd.backward(tensor, torch.cat(whole))


def _grad(value: Value, grads: Value | None, place: int) -> Tensor:
    """Of one tensor of a slice of the inputs; zero where its loss does not count."""
    found = None if grads is None else flat(grads)[place]
    return torch.zeros_like(flat(value)[place]) if found is None else found
