"""Bytes of all tensors that are alive: an allocator's peak where there is none to ask.

It sees each storage that an operation returns, and, through a weak reference, sees it
die. So temporaries count, as they do for a GPU's allocator; what an operation takes
and frees within itself does not, nor what was made before.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered, in this thread.

    Attributes:
        where: what is made now counts for this device, or whatever it is.
        live, peak: bytes now, of what was made since, and the most there were.
        live_of, peak_of: the same for each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.where = 0
        self.live = self.peak = 0
        self.live_of: Counter[int] = Counter()
        self.peak_of: Counter[int] = Counter()
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = {
            id(leaf.untyped_storage())
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in before:
                    self._see(storage)
        return result

    def _see(self, storage: Any) -> None:
        identity = id(storage)
        if identity in self._seen:
            return
        self._seen.add(identity)
        made = identity, storage.nbytes(), self.where
        weakref.finalize(storage, self._gone, *made).atexit = False
        self._add(storage.nbytes(), self.where)

    def _gone(self, identity: int, size: int, where: int) -> None:
        self._seen.discard(identity)
        self._add(-size, where)

    def _add(self, size: int, where: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self.live_of[where] += size
        self.peak_of[where] = max(self.peak_of[where], self.live_of[where])
