"""REDUCE between ranks: every holder gets every other's sums, and adds in one order.

    rank 0   B0 + B2 ──▶ rank 3          both: (B0 + B2) + (B1 + B3) ──▶ .grad
    rank 3   B1 + B3 ──▶ rank 0

The sum is that of one process, bit by bit: in the order of the devices. Each holder
sends its own gradients to each other, which for the two replicas of bidirectional
schedules is as little as any all-reduce would send.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeproof.exec.forms import as_bytes
from pipeproof.exec.replicas import Sums, add_up
from pipeproof.exec.wires import TextWire, Wait, Wire


class Reducer:
    """One rank's part in the reductions of one pipeline.

    Args:
        rank: this one.
        out: the wire to each other holder of a stage that this rank holds.
        into: the wire from each.
        headers: texts to and from each.
        wait: as `Ranks.wait`.
    """

    def __init__(
        self,
        rank: int,
        out: Mapping[int, Wire],
        into: Mapping[int, Wire],
        headers: Mapping[int, TextWire],
        wait: Wait,
    ) -> None:
        self._rank, self._out, self._into = rank, out, into
        self._headers, self._wait = headers, wait

    def reduce(self, stage: int, holders: Sequence[int], sums: Sums) -> None:
        """Add the sums of all holders to `.grad`, in the order of the devices.

        Args:
            stage: whose gradients.
            holders: the ranks that have some, in ascending order.
            sums: of this one; used up.
        """
        what = f"the gradients of stage {stage}"
        others = [rank for rank in holders if rank != self._rank]
        pairs = zip(sums.grads, sums.stage.parameters)
        ours = [None if grad is None else laid_out(grad, like) for grad, like in pairs]
        under_way = []
        for peer in others:
            there = [grad is not None for grad in ours]
            under_way += self._headers[peer].send(json.dumps(there))
            for grad in ours:
                if grad is not None and grad.numel():
                    under_way.append(
                        self._out[peer].send(as_bytes(grad), followed=False)
                    )
        parts = {self._rank: sums}
        for peer in others:
            parts[peer] = self._received(peer, sums, what)
        # Only then, since what is being sent is added to.
        for pending in under_way:
            self._wait(pending, what)
        add_up([parts[rank] for rank in holders])

    def _received(self, peer: int, like: Sums, what: str) -> Sums:
        there = json.loads(self._headers[peer].receive(what))
        result = Sums(like.stage)
        pending = []
        for number, parameter in enumerate(like.stage.parameters):
            if there[number]:
                grad = torch.empty_like(parameter, requires_grad=False)
                result.grads[number] = grad
                if grad.numel():
                    pending.append(self._into[peer].receive(as_bytes(grad)))
        for each in pending:
            self._wait(each, what)
        return result


def laid_out(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient laid out as its parameter, so that the other side knows how."""
    if grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter, requires_grad=False).copy_(grad)
