"""Batch norm whose running statistics are those of the whole batch.

As it stands, a batch norm in a pipeline sees one micro-batch after the other, and
moves its running statistics by each. Deferred, it still normalises each micro-batch
by its own statistics (as GPipe does), but adds these up, and moves the running ones
once, at the end of the step::

    micro-batches     count, mean, M2 ─┐
    of one step       count, mean, M2 ─┼─▶ mean, M2 / (count − 1) ─▶ running statistics
                      count, mean, M2 ─┘

M2 is the sum of squares of what is left after the mean is taken off; two such triples
make one as in Chan, Golub and LeVeque 1979 (Stanford STAN-CS-79-773), in float64. All
is counted from the first micro-batch's mean, so a large mean cancels nothing.

What is added up is an attribute of the module, which is another object each time, so
that recomputation is undone to it as to any, and no micro-batch counts twice. Buffers
are those of any batch norm.

Source: Huang et al. 2018, arXiv:1811.06965, 2.3, for what is normalised; Kim et al.
2020, arXiv:2004.09910, for deferring.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from pipeproof.exec.errors import ModelError


class Sums(NamedTuple):
    """What some micro-batches add up to.

    Attributes:
        seen: how many numbers of each channel.
        origin: the first one's means, from which all is counted.
        mean, squares: of what is left, and M2.
    """

    seen: Tensor
    origin: Tensor
    mean: Tensor
    squares: Tensor


class Deferred(_BatchNorm):
    """What the deferred batch norms have in common."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    sums: Sums | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the micro-batch's own statistics, and add these up."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self._add(input.detach())
        return functional.batch_norm(
            input, None, None, self.weight, self.bias, True, 0.0, self.eps
        )

    def _add(self, input: Tensor) -> None:
        dims = [dim for dim in range(input.dim()) if dim != 1]
        count = input.numel() // max(input.shape[1], 1)
        if not count:
            return
        if self.sums is None:
            origin = input.mean(dims).to(self.running_mean.dtype)
            nothing = torch.zeros_like(origin, dtype=torch.float64)
            before = Sums(nothing.new_zeros(()), origin, nothing, nothing)
        else:
            before = self.sums
        # Of numbers close to each other the difference is exact.
        shape = [-1 if dim == 1 else 1 for dim in range(input.dim())]
        from_origin = input - before.origin.view(shape)
        var, mean = torch.var_mean(from_origin, dims, correction=0)
        total = before.seen + count
        apart = mean.double() - before.mean
        squares = var.double() * count + apart**2 * (before.seen * count / total)
        self.sums = Sums(
            total,
            before.origin,
            before.mean + apart * (count / total),
            before.squares + squares,
        )

    def forget(self) -> None:
        """Nothing is added up."""
        self.sums = None

    def move(self) -> None:
        """Move the running statistics, by all that was added up, once."""
        if self.sums is None:
            return
        seen, origin, mean, squares = self.sums
        self.num_batches_tracked += 1
        by = self.momentum
        if by is None:
            by = 1.0 / float(self.num_batches_tracked)
        variance = squares / (seen - 1)
        for running, found in (
            (self.running_mean, origin + mean),
            (self.running_var, variance),
        ):
            running.mul_(1 - by).add_(found.to(running.dtype), alpha=by)
        self.forget()


class DeferredBatchNorm1d(Deferred, nn.BatchNorm1d):
    """`nn.BatchNorm1d`, deferred."""


class DeferredBatchNorm2d(Deferred, nn.BatchNorm2d):
    """`nn.BatchNorm2d`, deferred."""


class DeferredBatchNorm3d(Deferred, nn.BatchNorm3d):
    """`nn.BatchNorm3d`, deferred."""


_DEFERRED: dict[type[_BatchNorm], type[Deferred]] = {
    nn.BatchNorm1d: DeferredBatchNorm1d,
    nn.BatchNorm2d: DeferredBatchNorm2d,
    nn.BatchNorm3d: DeferredBatchNorm3d,
}


def defer_batch_norm(module: nn.Module) -> nn.Module:
    """Have the running statistics of every batch norm in a module be the whole batch's.

    The modules stay the same objects, with the same parameters, hooks and keys of the
    state_dict, and those without running statistics as they are. A step that fails
    leaves the running statistics as they were.

    Args:
        module: a model or a part of it; changed.

    Returns:
        The same module.

    Raises:
        ModelError: a batch norm of another class, whose statistics are its own affair.
    """
    found = [
        norm
        for norm in module.modules()
        if isinstance(norm, _BatchNorm)
        and norm.track_running_stats
        and not isinstance(norm, Deferred)
    ]
    for norm in found:
        if type(norm) not in _DEFERRED:
            raise ModelError(
                f"{type(norm).__name__} cannot be deferred: nn.BatchNorm1d, 2d and 3d "
                "can; leave it out, or replace it"
            )
    for norm in found:
        norm.__class__ = _DEFERRED[type(norm)]
    return module


def deferred(modules: Iterable[nn.Module]) -> list[Deferred]:
    """Those of these modules that are deferred batch norms."""
    return [module for module in modules if isinstance(module, Deferred)]
