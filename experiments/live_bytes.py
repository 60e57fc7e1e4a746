"""Bytes of all tensors that are alive: an allocator's peak where there is none to ask.

It sees each storage that an operation returns, and, through a weak reference, sees it
die. So temporaries count, as they do for a GPU's allocator; what an operation takes
and frees within itself does not, nor what was made before.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered, in this thread.

    Attributes:
        live: bytes now, of what was made since.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
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
        identity, size = id(storage), storage.nbytes()
        if identity in self._seen:
            return
        self._seen.add(identity)
        weakref.finalize(storage, self._gone, identity, size).atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.live -= size
