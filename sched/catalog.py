"""The published schedules by name.

One list of rows feeds `make`, the command line, the documentation and the tests
that all schedules share, so a new row cannot escape any of them.
"""

from __future__ import annotations

import difflib
from typing import Any

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.gen.bidirectional import CHIMERA, GEMS
from pipeproof.sched.gen.bpipe import BPIPE
from pipeproof.sched.gen.building_block import V_HALF, V_MIN
from pipeproof.sched.gen.dualpipe import DUALPIPE, DUALPIPE_V
from pipeproof.sched.gen.eager import EAGER_1F1B
from pipeproof.sched.gen.gpipe import GPIPE
from pipeproof.sched.gen.interleaved import INTERLEAVED
from pipeproof.sched.gen.looped_bfs import LOOPED_BFS
from pipeproof.sched.gen.naive import NAIVE
from pipeproof.sched.gen.one_f_one_b import ONE_F_ONE_B
from pipeproof.sched.gen.pipe_offload import PIPEOFFLOAD
from pipeproof.sched.gen.sliced import SEQ1F1B, SLIMPIPE, TERAPIPE
from pipeproof.sched.gen.wave import HANAYO
from pipeproof.sched.gen.zb_v import ZB_V
from pipeproof.sched.gen.zero_bubble import ZB_H1, ZB_H2
from pipeproof.sched.ir import Schedule
from pipeproof.sched.row import Row

CATALOG: dict[str, Row] = {
    row.name: row
    for row in (
        NAIVE,
        GPIPE,
        ONE_F_ONE_B,
        EAGER_1F1B,
        ZB_H1,
        ZB_H2,
        BPIPE,
        INTERLEAVED,
        LOOPED_BFS,
        PIPEOFFLOAD,
        TERAPIPE,
        SEQ1F1B,
        SLIMPIPE,
        ZB_V,
        V_HALF,
        V_MIN,
        DUALPIPE_V,
        GEMS,
        CHIMERA,
        DUALPIPE,
        HANAYO,
    )
}


def make(name: str, *, devices: int, micro_batches: int, **options: Any) -> Schedule:
    """A schedule of the catalogue by its name.

    Args:
        name: see `CATALOG`, or `pipeproof list`.
        devices: p.
        micro_batches: m, per step.
        options: what the generator takes beside; None means its default.

    Raises:
        ParameterError: an unknown name, an option the schedule does not have, or
            sizes it does not allow.
    """
    row = CATALOG.get(name)
    if row is None:
        raise ParameterError(f"no schedule is called {name!r}: {known_instead(name)}")
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(row.options)):
        has = ", ".join(row.options) or "no options"
        raise ParameterError(f"{name} does not take {', '.join(unknown)}: it has {has}")
    return row.generator(devices, micro_batches, **given)


def known_instead(name: str) -> str:
    """The name that may have been meant, and all that there are."""
    close = difflib.get_close_matches(name.lower(), CATALOG, n=1)
    hint = f"did you mean {close[0]!r}? The" if close else "the"
    return f"{hint} catalogue has {', '.join(CATALOG)}"
