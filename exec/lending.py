"""Memory that one rank lends another: OFFLOAD and RELOAD between processes.

    rank 0, full                           rank 3, has room: a thread of it
    0OFFLOAD2 ── "keep 2: 3 rows" ───────▶
              ── bytes ─▶ ║ 0 → 3 ║ ─────▶ keeps them
    0RELOAD2  ── "give 2" ───────────────▶
              ◀───── ║ 3 → 0 ║ ── bytes ── gives them back, and forgets them

The lender has no instructions of its own for it, as it would have none if its memory
were written to directly; so a thread serves each borrower, beside its ops. What
crosses are the rows of bytes that autograd saved, as they are. Each direction is
a communicator of its own, so that neither waits for the other, nor activations for
either. Rows are kept in the order in which they came.
"""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pipeproof.exec.errors import RankError
from pipeproof.exec.wires import Incoming, Outgoing, Pending, TextWire, Wait

LENDING = "memory"
"""Tells its communicators apart from those of messages."""


class Borrower:
    """This rank's way to another's memory.

    Args:
        out, into: the wires there and back.
        orders: texts to the lender.
        device: where this rank's tensors lie.
        wait: as `Ranks.wait`.
    """

    def __init__(
        self,
        out: Outgoing,
        into: Incoming,
        orders: TextWire,
        device: torch.device,
        wait: Wait,
    ) -> None:
        self._out, self._into, self._orders = out, into, orders
        self._device, self._wait = device, wait
        self._number = 0

    def loan(self, of: str) -> Loan:
        """A place for one stash.

        Args:
            of: what is kept there, for messages.
        """
        self._number += 1
        return Loan(self, self._number, of)

    def put(self, number: int, data: list[Tensor]) -> list[Pending]:
        """Start to send rows of bytes."""
        sizes = [len(row) for row in data]
        sent = self._orders.send(json.dumps(["keep", number, sizes]))
        return sent + [self._out.send(row) for row in data]

    def get(self, number: int, sizes: list[int]) -> list[Pending]:
        """Ask for them back."""
        self._orders.send(json.dumps(["give", number]))
        return [
            self._into.receive(
                torch.empty(size, dtype=torch.uint8, device=self._device)
            )
            for size in sizes
        ]

    def finish(self, pending: Pending, what: str) -> None:
        """Return once a row is there."""
        self._wait(pending, what)


class Loan:
    """A `Place` in another rank's memory.

    Args:
        borrower: by which it is reached.
        number: of this loan.
        of: what it holds.
    """

    def __init__(self, borrower: Borrower, number: int, of: str) -> None:
        self._borrower, self._number, self._of = borrower, number, of
        self._sizes: list[int] = []
        self._arriving: list[Pending] = []

    def put(self, data: list[Tensor]) -> None:
        """Start to send these rows; each is held until it is sent."""
        self._sizes = [len(row) for row in data]
        self._borrower.put(self._number, data)

    def get(self) -> list[Tensor]:
        """Start to receive them, into memory of their own."""
        self._arriving = self._borrower.get(self._number, self._sizes)
        rows = []
        for pending in self._arriving:
            assert pending.tensor is not None
            rows.append(pending.tensor)
        return rows

    def ready(self) -> None:
        """Wait until they are there."""
        while self._arriving:
            self._borrower.finish(self._arriving.pop(0), self._of)


class Lender:
    """The thread that keeps what one borrower gives it, during one step.

    Args:
        into, out: the wires from the borrower and back.
        orders: texts from it, whose waits are for a thread beside the step.
        count: how many orders a step has.
        device: where this rank's tensors lie.
        wait: as `Ranks.wait`, for such a thread.
    """

    def __init__(
        self,
        into: Incoming,
        out: Outgoing,
        orders: TextWire,
        count: int,
        device: torch.device,
        wait: Wait,
    ) -> None:
        self._into, self._out, self._orders = into, out, orders
        self._count, self._device, self._wait = count, device, wait
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Serve the borrower in one more step."""
        self.end()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Return when all of the step is done: given back, or given up."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        # On a GPU, waits order a stream: not the one that computes.
        stream: Any = nullcontext()
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            stream = torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
        kept: dict[int, list[Pending]] = {}
        try:
            with stream:
                for _ in range(self._count):
                    self._obey(json.loads(self._orders.receive("an order")), kept)
        except RankError:
            pass  # the step raises it too

    def _obey(self, order: list[Any], kept: dict[int, list[Pending]]) -> None:
        verb, number, *sizes = order
        if verb == "keep":
            kept[number] = [
                self._into.receive(
                    torch.empty(size, dtype=torch.uint8, device=self._device)
                )
                for size in sizes[0]
            ]
            return
        for pending in kept.pop(number):
            self._wait(pending, "what is kept for another rank")
            assert pending.tensor is not None
            self._out.send(pending.tensor)
