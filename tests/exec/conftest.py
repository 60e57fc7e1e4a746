"""A pool of ranks for all tests: processes take long to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pool import Do, pool


@pytest.fixture(scope="session")
def do() -> Iterator[Do]:
    with pool() as working:
        yield working


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks have: sums over threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
