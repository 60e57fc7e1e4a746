"""Ctrl-C while the main thread waits where Python cannot raise it.

Python notes a signal at once, and raises KeyboardInterrupt when the main thread is
back from what it called: from a wait in gloo perhaps never. But the note is also a
byte in a pipe, if it is asked for, which any thread can read.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from functools import cache


class Interrupts:
    """Counts the SIGINTs of this process, from when it is made.

    It counts none where it is made in another thread than the main one, or somebody
    else has the pipe already (asyncio has).
    """

    def __init__(self) -> None:
        self._count, self._lock = 0, threading.Lock()
        self._ear: int | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        ear, mouth = os.pipe()
        self._heard = select.poll()
        os.set_blocking(ear, False)
        os.set_blocking(mouth, False)
        before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        if before == -1:
            self._ear = ear
            self._heard.register(ear, select.POLLIN)
            return
        signal.set_wakeup_fd(before)
        os.close(ear)
        os.close(mouth)

    def seen(self) -> int:
        """How many there were."""
        with self._lock:
            if self._ear is not None and self._heard.poll(0):
                self._count += os.read(self._ear, 1 << 12).count(signal.SIGINT)
            return self._count

    def count(self) -> int:
        """How many there were that end what the main thread does.

        Where they have a handler of the user's, who may want the step to go on, none.
        """
        handled = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        return 0 if handled else self.seen()


@cache
def interrupts() -> Interrupts:
    """Those of this process."""
    return Interrupts()
