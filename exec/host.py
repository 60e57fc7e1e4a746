"""What processes of one host can know of each other: whose clock, and who runs."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def host_clock() -> str:
    """Whose `perf_counter` this process reads; empty if that cannot be told.

    On Linux all processes of one boot and one time namespace read the same clock.
    """
    return _of_this_boot("time")


def process_here() -> str:
    """This process, by a name that others on its host can look it up by."""
    return f"{_of_this_boot('pid')} {os.getpid()}"


def runs(process: str) -> bool:
    """Whether a process, as `process_here` named it, is seen to run.

    One that was stopped does not, nor one that has ended; of one on another host
    nothing is seen.
    """
    host, _, pid = process.rpartition(" ")
    if not host or host != _of_this_boot("pid"):
        return False
    try:
        status = psutil.Process(int(pid)).status()
    except psutil.NoSuchProcess:
        return False
    ended = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED)
    return status not in ended


def _of_this_boot(namespace: str) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns', namespace).readlink()}"
    except OSError:
        return ""
