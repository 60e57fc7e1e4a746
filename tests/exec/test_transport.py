"""Messages between ranks: what is sent is known to have gone, and forms are texts."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeproof.exec.communicators import TorchWire
from pipeproof.exec.forms import Form
from pipeproof.exec.transport import taken_before
from pipeproof.sched import catalog, lower


def test_a_gradient_tells_which_activations_were_taken() -> None:
    """1F1B on two ranks::

    rank 0 | F0 F1 .. B0 F2 B1 .. B2
    rank 1 | .. F0 B0 F1 B1 F2 B2 ..
    """
    program = lower(catalog.make("1f1b", devices=2, micro_batches=3))
    found = taken_before(program)

    messages = [program.message_at(i) for i in range(len(program.recv_of))]
    by_send = {message.send: str(message) for message in messages}
    assert {str(m): by_send.get(found[m.index]) for m in messages} == {
        "activation 0→1:0": None,
        "activation 0→1:1": None,
        "activation 0→1:2": "gradient 1→0:0",
        "gradient 1→0:0": "activation 0→1:0",
        "gradient 1→0:1": "activation 0→1:1",
        "gradient 1→0:2": "activation 0→1:2",
    }


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 3),
        torch.ones(2, 3).t(),
        torch.ones(1, 3)[:, ::1].requires_grad_(),
        (torch.ones(2), None, torch.ones(0, 2)),
        {"a": [torch.ones(2)], "b": (torch.ones((), dtype=torch.int32),)},
    ],
)
def test_a_value_fits_the_form_that_was_announced(value: object) -> None:
    form, tensors = Form.of(value)
    again = Form.parse(form.to_text())

    assert again == form
    fitting = again.fitting(value)
    assert fitting is not None
    assert all(a is b for a, b in zip(fitting, tensors, strict=True))
    assert Form.of(again.filled(fitting))[0] == form


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(3, 2),
        torch.ones(3, 2).t(),
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, 3, requires_grad=True),
        torch.ones(1, 3).expand(2, 3),
        (torch.ones(2, 3),),
        None,
    ],
)
def test_another_value_does_not(other: object) -> None:
    form, _ = Form.of(torch.ones(2, 3))

    assert form.fitting(other) is None


def test_what_has_gaps_is_sent_without_them() -> None:
    form, (tensor,) = Form.of(torch.arange(12).view(3, 4)[:, ::2])

    assert isinstance(tensor, Tensor)
    assert tensor.stride() == form.parts[0].stride == (2, 1)
    assert form.parts[0].contiguous
    assert tensor.tolist() == [[0, 2], [4, 6], [8, 10]]


@pytest.mark.skipif(not hasattr(os, "sched_yield"), reason="a core is not given here")
@pytest.mark.parametrize(
    ("blocks", "calls"),
    [
        (True, ["turn", "send", "turn", "turn", "recv", "turn"]),
        (False, ["send", "recv"]),
    ],
)
def test_gloos_thread_has_its_turn_when_no_link_is_locked(
    blocks: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a sender that it kept from running it spun for the sender's lock."""
    called: list[str] = []
    monkeypatch.setattr(os, "sched_yield", lambda: called.append("turn"))
    group: Any = SimpleNamespace(
        send=lambda *_: called.append("send"), recv=lambda *_: called.append("recv")
    )
    wire = TorchWire(group, 1, 1, blocks)

    wire.send(torch.ones(2), followed=False)
    wire.receive(torch.ones(2))

    assert called == calls
