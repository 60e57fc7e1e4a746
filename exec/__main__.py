"""One rank of `pipeproof run`, started by torchrun.

    torchrun --nproc-per-node=4 -m pipeproof.exec 1f1b -p 4 -m 8 --steps 10

Arguments are those of `pipeproof run`. On one host `pipeproof run --ranks 4` does
without torchrun, and opens no port beyond the loopback interface.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module


def main() -> None:
    """Run; after a failure end at once."""
    # A library imports no front door; a program of its own may knock at it.
    front = import_module("pipeproof.cli").main
    try:
        front(["run", *sys.argv[1:]])
    except SystemExit as end:
        if not end.code:
            raise
        # Threads may be waiting for ranks that are gone, and cannot be ended.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    main()
