"""Single edits of right schedules, programs and CSV files: is each wrong one found?

Three parts, and in each a second opinion that shares no code with the first:

* schedules: every edit of an op. `check` against an interpreter of schedules;
  what `check` accepts is trained, and its gradients compared bit by bit.
* programs: edits of an instruction, all or many of each kind. `prove` against a
  player of programs in random orders (`tests/playing.py`).
* torch's CSV with communication: a sample of the edits of a cell. The reader and
  `prove` against torch's own runtime, two processes with gloo, whose gradients are
  compared with those of a step without a pipeline.

    python experiments/mutants
        writes experiments/results/mutants.md
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

if __name__ == "__main__":
    # The other opinions are the tests' and another experiment's.
    sys.path += [str(ROOT / "experiments"), str(ROOT / "tests")]
    from report import main

    main(str(__doc__))
