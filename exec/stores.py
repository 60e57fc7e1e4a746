"""Clients of the store at which processes meet, for older torch too."""

from __future__ import annotations

import torch
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from pipeproof.sched import ParameterError


def another(store: Store) -> Store:
    """Another client of the same store.

    Raises:
        ParameterError: a store that this torch makes no other client of.
    """
    if hasattr(store, "clone"):  # torch 2.6 has none
        clone: Store = store.clone()
        return clone
    match store:
        case PrefixStore():
            return another(store.underlying_store)
        case TCPStore():
            return TCPStore(store.host, store.port, is_master=False)
        case FileStore():
            return FileStore(store.path, -1)  # type: ignore[attr-defined]
    raise ParameterError(
        f"ranks meet in a {type(store).__name__}, of which torch {torch.__version__} "
        "makes no other client: initialise torch.distributed with a TCPStore or a "
        "FileStore"
    )
