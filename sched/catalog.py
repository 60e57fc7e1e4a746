"""The published schedules by name.

One list of rows feeds `make`, the command line, the documentation and the tests
that all schedules share, so a new row cannot escape any of them.
"""

from __future__ import annotations

import difflib
from typing import Any

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, ratio
from pipeproof.sched.gen import gpipe, naive, one_f_one_b
from pipeproof.sched.gen.bidirectional import chimera, dualpipe, gems
from pipeproof.sched.gen.bpipe import bpipe
from pipeproof.sched.gen.building_block import v_half, v_min
from pipeproof.sched.gen.eager import eager_1f1b
from pipeproof.sched.gen.interleaved import gets_through, interleaved
from pipeproof.sched.gen.looped_bfs import looped_bfs
from pipeproof.sched.gen.pipe_offload import pipeoffload
from pipeproof.sched.gen.sliced import seq1f1b, slimpipe, terapipe
from pipeproof.sched.gen.v_shape import dualpipe_v, zb_v
from pipeproof.sched.gen.wave import hanayo
from pipeproof.sched.gen.zero_bubble import zb_h1, zb_h2
from pipeproof.sched.ir import Schedule
from pipeproof.sched.row import Case, Row


def _fill_drain(case: Case) -> Number:
    return (case.p - 1) * (case.forward + case.backward)  # type: ignore[no-any-return]


def _naive_at_most(case: Case) -> tuple[Number, Number | None]:
    """Some device is always at work."""
    return 0, (case.p - 1) * case.ideal


def _fill_drain_at_most(case: Case) -> tuple[Number, Number | None]:
    return 0, _fill_drain(case)


def _equal_times(case: Case) -> bool:
    return bool(case.forward == case.input_grad == case.weight_grad)


def _joint(case: Case) -> Any:
    """F&B."""
    return case.forward + case.backward if case.overlap is None else case.overlap


def _dualpipe_idle(case: Case) -> Any:
    """F&B + B - 3W, for each pair of devices that a direction passes."""
    return _joint(case) + case.backward - 3 * case.weight_grad


def _dualpipe_holds(case: Case) -> bool:
    f, w, b = case.forward, case.weight_grad, case.backward
    return bool(f == case.input_grad and w <= f and max(f, b) <= _joint(case) <= f + b)


def _chimera_holds(case: Case) -> bool:
    f, b = case.forward, case.backward
    return case.m % case.p == 0 and bool(b in (f, 2 * f))


def _chimera_idle(case: Case) -> Any:
    p, m, f = case.p, case.m, case.forward
    return (p - 2) * (f if case.backward == f else f * ratio(m + p, p))


def _zb_h1_idle(case: Case) -> Any:
    f, i, w = case.forward, case.input_grad, case.weight_grad
    return (case.p - 1) * max(f, i, f + i - w) + max(case.p - case.m, 0) * f


def _zb_h2_idle(case: Case) -> Any:
    f, i, w = case.forward, case.input_grad, case.weight_grad
    missing = max(2 * case.p - 1 - case.m, 0)
    return (case.p - 1) * max(0, f + i - 2 * w, i - f) + missing * f


def _bpipe_peak(case: Case, d: int) -> int:
    """A device's own, up to the most; its partner's own and what it takes over."""
    most = (case.p + 3) // 2
    own, others = min(case.p - d, case.m), min(d + 1, case.m)
    if own > most or others <= most:
        return min(own, most)
    # Of any others - 2 micro-batches in turn, others - most are away. One more is
    # while the one that leaves next has left and the one back next is not back: two
    # that are others - 2 apart, the first of them e or later.
    e = -(-(most - 2) // (others - most))
    return own + others - most + (case.m >= others - 1 + e)


def _chunks(case: Case) -> int:
    return int(case.options.get("chunks", 2))


def _group(case: Case) -> int:
    return int(case.options.get("group") or case.p)


def _interleaved_idle(case: Case) -> Number:
    return ratio(_fill_drain(case), _chunks(case))


def _whole_group(case: Case) -> int:
    return min(_group(case), case.m)


def _pipeoffload_idle(case: Case) -> Number:
    p, n, v = case.p, _whole_group(case), _chunks(case)
    f, i = case.forward, case.input_grad
    turn = (p - n) * f + max(0, p * i - n * case.backward)
    return ratio((p - 1) * (f + i) + (v - 1) * turn, v)


def _pipeoffload_peak(case: Case, d: int) -> Number:
    p, m, n, v = case.p, case.m, _whole_group(case), _chunks(case)
    given = case.options.get("offload")
    k = v // 2 if given is None else given
    if k == 0:
        return ratio(min((v - 1) * n + p - d, m * v), v)
    if k == v:  # what the last chunk keeps goes only where it stays away a while
        return ratio(2 if v > 1 else min(2, p - d, m), v)
    # On the way: one chunk whose forward runs, one that is back.
    kept = (v - k - 1) * n + min(p - d, n + 2 * (m > n))
    return ratio(max(kept, 2), v)


def _pipeoffload_steady(case: Case) -> bool:
    """Whether a group lasts until its first micro-batch has been round."""
    p, n = case.p, _whole_group(case)
    f, i, w = case.forward, case.input_grad, case.weight_grad
    round_trip = n * (f + i + w) >= p * max(f, i)
    first_turn = (p - 1 - n) * w <= (n - 1) * f + n * i
    return n == case.m or bool(round_trip and first_turn)


def _pipeoffload_bounds(case: Case) -> tuple[Number, Number | None]:
    """No idler than with a whole last group, whose order it keeps."""
    low = ratio((case.p - 1) * (case.forward + case.input_grad), _chunks(case))
    if not _pipeoffload_steady(case):
        return low, (case.p - 1) * case.ideal
    missing = -case.m % _whole_group(case)
    return low, _pipeoffload_idle(case) + missing * (case.forward + case.backward)


def _slices(case: Case) -> int:
    return int(case.options.get("slices", 2))


def _sliced_idle(case: Case) -> Number:
    return ratio(_fill_drain(case), _slices(case))


CATALOG: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            name="naive",
            generator=naive,
            summary="the baseline: what a split without a pipeline costs",
            source="Huang et al. 2018, 1811.06965, fig. 2(b)",
            constraints="none",
            bubble="(p-1)/p",
            peak="1",
            idle=lambda case: (case.p - 1) * case.ideal,
            peak_of=lambda case, d: 1,
            figure=Case(4, 1),
        ),
        Row(
            name="gpipe",
            generator=gpipe,
            summary="simplest; with recomputation, lightest on short pipelines",
            source="Huang et al. 2018, 1811.06965, 2.2-2.3",
            constraints="none",
            bubble="(p-1)/(m+p-1)",
            peak="m",
            idle=_fill_drain,
            peak_of=lambda case, d: case.m,
            figure=Case(4, 4, input_grad=1, weight_grad=0),
        ),
        Row(
            name="1f1b",
            generator=one_f_one_b,
            summary="the default: GPipe's bubble, activations bounded by the pipeline",
            source="Narayanan et al. 2021, 2104.04473, 2.2.1",
            constraints="none",
            bubble="(p-1)/(m+p-1)",
            peak="min(p-d, m)",
            idle=_fill_drain,
            peak_of=lambda case, d: min(case.p - d, case.m),
        ),
        Row(
            name="eager-1f1b",
            generator=eager_1f1b,
            summary="1F1B where links are slow: messages have time to arrive",
            source="Zhuang et al. 2022, 2211.05322",
            constraints="none",
            bubble="(p-1)/(m+p-1)",
            peak="min(2(p-1-d)+1, m)",
            idle=_fill_drain,
            peak_of=lambda case, d: min(2 * (case.p - 1 - d) + 1, case.m),
        ),
        Row(
            name="zb-h1",
            generator=zb_h1,
            summary="a third of 1F1B's bubble, at the peak of its first device",
            source="Qi et al. 2023, 2401.10241",
            constraints="none",
            bubble="(p-1)/(3m+p-1), m >= p",
            peak="min(p, m)",
            idle=_zb_h1_idle,
            peak_of=lambda case, d: min(case.p, case.m),
            holds=lambda case: case.m >= case.p or _equal_times(case),
            bounds=_fill_drain_at_most,
        ),
        Row(
            name="zb-h2",
            generator=zb_h2,
            summary="no bubble in a device's span, for twice 1F1B's activations",
            source="Qi et al. 2023, 2401.10241",
            constraints="none",
            bubble="0 of a device's span at F=I=W, m >= 2p-1",
            peak="min(2p-1, m)",
            idle=_zb_h2_idle,
            peak_of=lambda case, d: min(2 * case.p - 1, case.m),
            idle_of="span",
            holds=lambda case: case.m >= 2 * case.p - 1 or _equal_times(case),
            bounds=_fill_drain_at_most,
        ),
        Row(
            name="bpipe",
            generator=bpipe,
            summary="1F1B's bubble; the first devices' activations kept by the last",
            source="Kim et al. 2023, BPipe, ICML 2023",
            constraints="none",
            bubble="(p-1)/(m+p-1)",
            peak="at most ceil((p+2)/2)",
            idle=_fill_drain,
            peak_of=_bpipe_peak,
        ),
        Row(
            name="interleaved",
            generator=interleaved,
            summary="v chunks a device: a shorter bubble for more messages",
            source="Narayanan et al. 2021, 2104.04473, 2.2; 2407.21783, 3.3.2",
            constraints="groups of n = p or more whose last has p-2 or more, or n >= m",
            bubble="(p-1)/(vm+p-1), last group >= p",
            peak="min((v-1)n+2(p-1-d)+1, vm)/v",
            idle=_interleaved_idle,
            peak_of=lambda case, d: ratio(
                min(
                    (_chunks(case) - 1) * _group(case) + 2 * (case.p - 1 - d) + 1,
                    case.m * _chunks(case),
                ),
                _chunks(case),
            ),
            holds=lambda case: (
                min(case.m, _group(case), case.m % _group(case) or case.m) >= case.p
            ),
            bounds=lambda case: (_interleaved_idle(case), (case.p - 1) * case.ideal),
            allows=lambda case: gets_through(
                case.p, case.m, _chunks(case), _group(case)
            ),
        ),
        Row(
            name="looped-bfs",
            generator=looped_bfs,
            summary="interleaved with sharded weights: a gather for each chunk pass",
            source="Lamy-Poirier 2022, 2211.05953",
            constraints="none",
            bubble="(p-1)/(vm+p-1), m >= p",
            peak="m",
            idle=lambda case: ratio(
                ((_chunks(case) - 1) * max(case.p - case.m, 0) + case.p - 1)
                * (case.forward + case.backward),
                _chunks(case),
            ),
            peak_of=lambda case, d: case.m,
        ),
        Row(
            name="pipeoffload",
            generator=pipeoffload,
            summary="activations on the host: a few chunks stay on each device",
            source="Wan et al. 2025, 2503.01328",
            constraints="groups of n from half of p, rounded up, to p",
            bubble="2(p-1)/(3vm+2(p-1)), n=p",
            peak="max((v-k-1)n+p-d, 2)/v, k chunks away",
            idle=_pipeoffload_idle,
            peak_of=_pipeoffload_peak,
            holds=lambda case: (
                case.m % _whole_group(case) == 0 and _pipeoffload_steady(case)
            ),
            bounds=_pipeoffload_bounds,
            allows=lambda case: case.p <= 2 * _group(case) <= 2 * case.p,
        ),
        Row(
            name="terapipe",
            generator=terapipe,
            summary="long sequences: GPipe's bubble divided by the slices",
            source="Li et al. 2021, 2102.07988",
            constraints="none",
            bubble="(p-1)/(qm+p-1)",
            peak="m",
            idle=_sliced_idle,
            peak_of=lambda case, d: case.m,
            figure=Case(4, 2, {"slices": 4}),
        ),
        Row(
            name="seq1f1b",
            generator=seq1f1b,
            summary="long sequences: 1F1B's bubble and activations divided by slices",
            source="Sun et al. 2024, 2406.03488",
            constraints="none",
            bubble="(p-1)/(qm+p-1)",
            peak="min(q+p-1-d, mq)/q",
            idle=_sliced_idle,
            peak_of=lambda case, d: ratio(
                min(_slices(case) + case.p - 1 - d, case.m * _slices(case)),
                _slices(case),
            ),
            figure=Case(4, 4),
        ),
        Row(
            name="slimpipe",
            generator=slimpipe,
            summary="as seq1f1b, where links are slow",
            source="SlimPipe 2025, 2504.14519",
            constraints="none",
            bubble="(p-1)/(qm+p-1)",
            peak="min(q+2(p-1-d), mq)/q",
            idle=_sliced_idle,
            peak_of=lambda case, d: ratio(
                min(_slices(case) + 2 * (case.p - 1 - d), case.m * _slices(case)),
                _slices(case),
            ),
            figure=Case(4, 2, {"slices": 4}),
        ),
        Row(
            name="zb-v",
            generator=zb_v,
            summary="1F1B's memory without a bubble in a device's span; F, I, W alike",
            source="Qi et al. 2023, 2401.10241, 6",
            constraints="none",
            bubble="0 of a device's span at F=I=W",
            peak="p",
            idle=lambda case: (
                (case.p - 1) * (max(case.forward, case.input_grad) - case.weight_grad)
            ),
            peak_of=lambda case, d: case.p,
            idle_of="span",
            holds=lambda case: (
                case.m >= 2 * case.p - 1
                and bool(case.forward <= case.input_grad)
                and bool(2 * case.weight_grad <= case.forward + case.input_grad)
            ),
            bounds=_fill_drain_at_most,
        ),
        Row(
            name="v-half",
            generator=v_half,
            summary="half of 1F1B's activations; times for F and I far apart",
            source="Qi et al. 2024, 2405.15362",
            constraints="none",
            bubble="(3p-7)/(6m+3p-7); p odd: 4 for 7",
            peak="floor(p/2)+1",
            idle=lambda case: ratio(
                (3 * case.p - (4 if case.p % 2 else 7)) * case.forward, 2
            ),
            peak_of=lambda case, d: case.p // 2 + 1,
            holds=lambda case: (
                case.p >= 3 and case.m >= 2 * case.p and _equal_times(case)
            ),
            bounds=_naive_at_most,
        ),
        Row(
            name="v-min",
            generator=v_min,
            summary="a third of 1F1B's activations; W no shorter than F and I",
            source="Qi et al. 2024, 2405.15362",
            constraints="none",
            bubble="(4p-5)/(6m+4p-5); 3 divides p: 7 for 5",
            peak="floor((p+4)/3); d=0, p mod 3 = 2: 1/2 less",
            idle=lambda case: ratio(
                (4 * case.p - (5 if case.p % 3 else 7)) * case.forward, 2
            ),
            peak_of=lambda case, d: ratio(
                2 * ((case.p + 4) // 3) - (d == 0 and case.p % 3 == 2), 2
            ),
            holds=lambda case: (
                case.p >= 2 and case.m >= 2 * case.p and _equal_times(case)
            ),
            bounds=_naive_at_most,
        ),
        Row(
            name="dualpipe-v",
            generator=dualpipe_v,
            summary="hides communication behind the other chunk's computation",
            source="DeepSeek-AI 2025, github.com/deepseek-ai/DualPipe",
            constraints="m >= 2p",
            bubble="(p-1)/(3m+p-1)",
            peak="p+1/2",
            idle=lambda case: ratio((case.p - 1) * _dualpipe_idle(case), 2),
            peak_of=lambda case, d: ratio(2 * case.p + 1, 2),
            idle_of="most",
            holds=_dualpipe_holds,
            bounds=_naive_at_most,
            allows=lambda case: case.m >= 2 * case.p,
            figure=Case(4, 10),
        ),
        Row(
            name="gems",
            generator=gems,
            summary="the least activations; two replicas, hardly any parallelism",
            source="Jain et al. 2020, GEMS, SC 2020",
            constraints="none",
            bubble="(p-1)(2m+1)/((p-1)(2m+1)+3m)",
            peak="1",
            idle=lambda case: (
                (case.p - 1)
                * (
                    case.forward
                    + case.backward
                    + (case.m - 1) * max(case.forward, case.backward)
                )
            ),
            peak_of=lambda case, d: 1,
            figure=Case(4, 4),
        ),
        Row(
            name="chimera",
            generator=chimera,
            summary="two replicas; half of 1F1B's bubble where m is about p",
            source="Li and Hoefler 2021, 2107.06925, 3.1",
            constraints="p even",
            bubble="(p-2)/(2m+p-2) at F=B",
            peak="p/2+1 outside to p inside",
            idle=_chimera_idle,
            peak_of=lambda case, d: case.p // 2 + 1 + min(d, case.p - 1 - d),
            holds=_chimera_holds,
            bounds=_naive_at_most,
            allows=lambda case: case.p % 2 == 0,
            figure=Case(4, 4),
        ),
        Row(
            name="dualpipe",
            generator=dualpipe,
            summary="two replicas; hides communication behind the other direction",
            source="DeepSeek-AI 2024, 2412.19437, 3.2.1",
            constraints="p and m even, m >= 2p",
            bubble="(p-2)/(3m+p-2)",
            peak="p+1",
            idle=lambda case: ratio((case.p - 2) * _dualpipe_idle(case), 2),
            peak_of=lambda case, d: case.p + 1,
            idle_of="most",
            holds=_dualpipe_holds,
            bounds=_naive_at_most,
            allows=lambda case: (
                case.p % 2 == 0 and case.m % 2 == 0 and case.m >= 2 * case.p
            ),
            figure=Case(8, 20),
        ),
        Row(
            name="hanayo",
            generator=hanayo,
            summary="Chimera's overlap with one replica, for m up to p",
            source="Liu et al. 2023, 2308.15762",
            constraints="none",
            bubble="(3p-m-2)/(2m+3p-2), m <= p, one wave",
            peak="(m+min(m, floor(3d/2)+1))/2",
            idle=lambda case: (
                (case.p - 1) * (case.forward + case.backward)
                - (case.m - 1) * case.forward
            ),
            peak_of=lambda case, d: ratio(case.m + min(case.m, 3 * d // 2 + 1), 2),
            holds=lambda case: (
                case.m <= case.p
                and case.options.get("waves", 1) == 1
                and bool(case.backward >= 2 * case.forward)
            ),
            bounds=_naive_at_most,
            figure=Case(4, 4),
        ),
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
        close = difflib.get_close_matches(name.lower(), CATALOG, n=1)
        hint = f"did you mean {close[0]!r}? The" if close else "the"
        raise ParameterError(
            f"no schedule is called {name!r}: {hint} catalogue has {', '.join(CATALOG)}"
        )
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(row.options)):
        has = ", ".join(row.options) or "no options"
        raise ParameterError(f"{name} does not take {', '.join(unknown)}: it has {has}")
    return row.generator(devices, micro_batches, **given)
