"""Weights that stages share, on one device or on several ranks."""

from __future__ import annotations

import pytest
import torch
from jobs import Do, Tied, tied

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "job",
    [
        Tied(),
        Tied("zb-h1", told=(0,)),
        Tied("interleaved", 2, told=(0, 1)),
        Tied("interleaved", 4, told=(2,)),
        Tied("zb-v", 2, told=()),
    ],
    ids=str,
)
def test_tied_ranks_train_as_one_process(job: Tied, do: Do) -> None:
    """Copies drifted apart, and a tied weight counted twice (faults 17 and 18)."""
    found = do(tied, job, job.devices)

    expected = tied(False, job)
    last = len(expected.weights) - 1
    copies = [x.weights[n] for x in found for n in (0, last) if n in x.weights]
    assert len(copies) == 2
    assert torch.equal(*copies)
    for of_rank in found:
        assert of_rank.norms == found[0].norms
        assert of_rank.norms == expected.norms
        for stage, weight in of_rank.weights.items():
            assert torch.equal(weight, expected.weights[stage])
