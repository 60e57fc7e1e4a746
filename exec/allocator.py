"""What a process does with memory that its tensors free.

glibc gives it back to the system where it can, and takes it anew for the next
micro-batch, each page of it zeroed by the kernel. Which ops pay for that changes from
step to step. A process that does nothing but train keeps it.
"""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of `mallopt`, in glibc's malloc.h."""
KEPT = 1 << 30
"""Bytes; larger tensors are still given back when they are freed."""
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Have this process keep the host memory that it frees, for its next tensors.

    It then holds what it held at its most until it ends. `launch` does this in its
    ranks, and so do the commands that run a model; a training loop of your own may.
    Nothing changes where the environment sets these thresholds, or the C library is
    not glibc.

    Returns:
        Whether it will.

    Source:
        mallopt(3).
    """
    if any(name in os.environ for name in CHOSEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(TRIM_THRESHOLD, KEPT) and mallopt(MMAP_THRESHOLD, KEPT))
