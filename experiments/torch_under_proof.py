"""The programs that torch.distributed.pipelining lowers, proved or refuted, then run.

Each of its seven schedules is lowered by torch's own functions, by default and with
`defer_pp_recv=True`, read as its CSV with communication, and put to `prove`. Then the
same actions are run by torch's runtime, a process a rank, with gloo, in float64; the
gradients are compared with those of a step without a pipeline. Ranks that make no
progress for the deadline are ended and counted as hanging.

    python experiments/torch_under_proof.py
        writes experiments/results/torch_under_proof.md
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as theirs
from torch.nn import functional

from pipeproof.sched import catalog, check, prove
from pipeproof.sched.interop.torch_csv import read_torch_csv
from pipeproof.sched.interop.torch_program import torch_program
from pipeproof.sched.interop.torch_writer import format_torch_csv

RESULT = Path(__file__).parent / "results" / "torch_under_proof.md"
SINGLE = ("GPipe", "1F1B")
LOOPED = ("LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble")
V = ("ZBVZeroBubble", "DualPipeV")
DEADLINE_S = 45
WIDTH, ROWS = 6, 2
CLOSE = 1e-10
"""Relative to the largest gradient entry; what is wrong differs in the first digits."""


@dataclass(frozen=True)
class Case:
    """One schedule of torch's in one size.

    Attributes:
        name: torch's, without `Schedule`.
        ranks, chunks, micro_batches: sizes; chunks are stages on each rank.
        deferred: `defer_pp_recv`.
        edited: a CSV with communication to run in place of what torch lowers.
    """

    name: str
    ranks: int
    chunks: int
    micro_batches: int
    deferred: bool
    edited: str = ""

    @property
    def stages(self) -> int:
        """On all ranks."""
        return self.ranks * self.chunks

    def homes(self) -> list[int]:
        """The rank of each stage."""
        p = self.ranks
        if self.name in V:
            return [*range(p), *reversed(range(p))]
        return [stage % p for stage in range(self.stages)]


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        difference: the largest of all gradient entries, relative to the largest
            entry; None where the run did not come to its end.
        said: in place of it.
    """

    difference: float | None
    said: str

    @property
    def right(self) -> bool:
        """Whether the gradients were those of unpipelined training."""
        return self.difference is not None and self.difference < CLOSE


def cases(ranks: range, most: int) -> Iterator[Case]:
    """Every schedule in every size that it takes.

    Args:
        ranks: how many.
        most: micro-batches for each rank.
    """
    for name in (*SINGLE, *LOOPED, *V):
        for p in ranks:
            for chunks in (1,) if name in SINGLE else (2,) if name in V else (2, 3):
                for m in range(p, most * p + 1, p):
                    if name == "DualPipeV" and m < 2 * p:
                        continue  # its own bound
                    for deferred in (False, True):
                        yield Case(name, p, chunks, m, deferred)


def actions(case: Case) -> dict[int, list[Any]]:
    """What torch lowers, by torch's own functions."""
    homes = case.homes()
    rows = {
        rank: theirs._add_reduce_grad(
            theirs._add_unshard_reshard(row), case.micro_batches
        )
        for rank, row in computed(case).items()
    }
    rows = theirs._add_send_recv(rows, lambda s: homes[s], case.stages)
    return theirs._defer_recv_ops(rows, lambda s: homes[s]) if case.deferred else rows


def computed(case: Case) -> dict[int, list[Any]]:
    """The ops of each rank in torch's order.

    1F1B's own class runs a loop; the order that it shows is another (`shown`), so
    that of the loop is ours.
    """
    if case.name == "1F1B":
        ours = catalog.make(
            "1f1b", devices=case.ranks, micro_batches=case.micro_batches
        )
        lines = format_torch_csv(ours).splitlines()
        return {
            rank: [theirs._Action.from_str(word) for word in line.split(",")]
            for rank, line in enumerate(lines)
        }
    return {
        rank: [a for a in row if a is None or a.is_compute_op]
        for rank, row in shown(case).items()
    }


def shown(case: Case) -> dict[int, list[Any]]:
    """What torch's class holds as its order."""
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.submod = 0, case.ranks, None
    stage.num_stages = case.stages
    kind = getattr(theirs, f"Schedule{case.name}")
    given = stage if case.name in SINGLE else [stage] * case.chunks
    order: dict[int, list[Any]] = kind(given, case.micro_batches).pipeline_order
    return order


def text_of(rows: dict[int, list[Any]]) -> str:
    """Torch's CSV with communication."""
    return "".join(",".join(map(str, rows[rank])) + "\n" for rank in sorted(rows))


# A rank


def work(rank: int, ranks: int, folder: str) -> None:
    """Run the cases on standard input, and say what came of each.

    Each runs in a process forked off this one, so that torch is loaded once, and one
    that raises or hangs takes no other with it.
    """
    torch.set_num_threads(1)
    for number, line in enumerate(sys.stdin):
        given = json.loads(line)
        deadline_s = given.pop("deadline_s")
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            store = dist.FileStore(f"{folder}/{number}", ranks)
            os.write(write, _said(Case(**given), rank, ranks, store).encode())
            os._exit(0)
        os.close(write)
        if select.select([read], [], [], deadline_s)[0]:
            said = os.read(read, 1 << 16).decode() or '"ends"'
        else:
            said = f'"hangs, ended after {deadline_s} s"'
        os.close(read)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(said, flush=True)


def _said(case: Case, rank: int, ranks: int, store: dist.Store) -> str:
    """What came of a case: the largest difference on any rank, or words."""
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        difference = torch.tensor(differs(case, rank))
        dist.all_reduce(difference, dist.ReduceOp.MAX)
        return json.dumps(difference.item())
    except Exception as error:
        return json.dumps(f"rank {rank} raises {type(error).__name__}")


def differs(case: Case, rank: int) -> float:
    """How far this rank's gradients are from those of a step without a pipeline."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()
        for _ in range(case.stages)
    ]
    x, y = torch.randn(2, ROWS * case.micro_batches, WIDTH).double()
    functional.mse_loss(nn.Sequential(*stages)(x), y).backward()
    wanted = [[p.grad for p in stage.parameters()] for stage in stages]
    largest = max(float(g.abs().max()) for row in wanted for g in row)
    for stage in stages:
        stage.zero_grad()
    mine = [s for s, home in enumerate(case.homes()) if home == rank]
    step = _runtime(case, stages, mine)
    step(x if 0 in mine else None, y if case.stages - 1 in mine else None)
    return max(
        float((p.grad - g).abs().max()) / largest
        for s in mine
        for p, g in zip(stages[s].parameters(), wanted[s])
    )


def _runtime(case: Case, stages: list[nn.Module], mine: list[int]) -> Any:
    parts = [
        PipelineStage(stages[s], s, case.stages, torch.device("cpu")) for s in mine
    ]
    loss, rows = functional.mse_loss, actions(case)
    if case.edited:
        lines = case.edited.splitlines()
        rows = {
            rank: [theirs._Action.from_str(word) for word in line.split(",")]
            for rank, line in enumerate(lines)
        }
    if case.edited or case.name in SINGLE:  # the classes of these communicate otherwise
        runtime = theirs._PipelineScheduleRuntime(
            parts, case.micro_batches, loss_fn=loss
        )
        runtime._prepare_schedule_with_comms(rows, format="compute_comms")
    else:
        runtime = getattr(theirs, f"Schedule{case.name}")(
            parts, case.micro_batches, loss_fn=loss, defer_pp_recv=case.deferred
        )
    lowered = text_of(runtime.pipeline_order_with_comms)
    assert lowered == text_of(rows), "what runs is what was proved"

    def step(x: Tensor | None, y: Tensor | None) -> None:
        args = [] if x is None else [x]
        runtime.step(*args, **({} if y is None else {"target": y}))

    return step


# All ranks


class Company:
    """Processes, one a rank, that run cases."""

    def __init__(self, ranks: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, __file__, "--work"]
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), self._folder.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(ranks)
        ]

    def run(self, case: Case, deadline_s: float = DEADLINE_S) -> Outcome:
        """What one case comes to on all ranks, which may stand still for so long."""
        for process in self._processes:
            assert process.stdin is not None
            given = {**asdict(case), "deadline_s": deadline_s}
            process.stdin.write(json.dumps(given) + "\n")
            process.stdin.flush()
        said = [json.loads(p.stdout.readline()) for p in self._processes if p.stdout]
        if words := [one for one in said if isinstance(one, str)]:
            # Whoever waits for a rank that raised lost its link, or hangs.
            return Outcome(None, min(words, key=lambda one: "Runtime" in one))
        return Outcome(said[0], "")

    def end(self) -> None:
        """Let every process end."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
        self._folder.cleanup()


def ran(every: list[Case]) -> dict[Case, Outcome]:
    """What came of each case, on as many ranks as it wants."""
    result: dict[Case, Outcome] = {}
    for ranks in sorted({case.ranks for case in every}):
        company = Company(ranks)
        for case in (case for case in every if case.ranks == ranks):
            result[case] = company.run(case)
            print(case, result[case], file=sys.stderr, flush=True)
        company.end()
    return result


# The table


@dataclass(frozen=True)
class Judged:
    """What was said of a case without running it.

    Attributes:
        ok: whether it was proved.
        why: else, the first finding.
        serial: whether it also runs through where all transfers between two ranks
            share a stream, and where all of a rank do.
    """

    ok: bool
    why: str
    serial: tuple[bool, bool]


def judged(case: Case) -> Judged:
    """Prove what torch lowers."""
    csv = read_torch_csv(text_of(actions(case)), name=case.name, agreeing=False)
    program = torch_program(csv)
    verdict = prove(program)
    if not verdict.ok:
        return Judged(False, verdict.findings[0].found, (False, False))
    pair, one = (check(program, streams=model).ok for model in ("pair", "one"))
    return Judged(True, "", (pair, one))


def size(case: Case) -> str:
    """Its sizes, in a cell."""
    return f"P={case.ranks}, {case.chunks} chunks, M={case.micro_batches}"


def report(verdicts: dict[Case, Judged], outcomes: dict[Case, Outcome]) -> list[str]:
    """The tables, as lines of Markdown."""
    agree = Counter((verdicts[c].ok, outcomes[c].right) for c in outcomes)
    lines = [
        "# torch.distributed.pipelining under proof",
        "",
        f"What torch {torch.__version__} lowers for its seven schedules, by default "
        "and with `defer_pp_recv=True`, read as CSV with communication and put to "
        "`prove`. "
        "GPipe and 1F1B: their ops in torch's runtime for schedules; their own classes "
        "run a loop of their own.",
        "",
        f"{len(verdicts)} programs were judged. {len(outcomes)} of them were run, a "
        "process a rank with gloo, float64, and their gradients compared with those of "
        f"a step without a pipeline (equal: within {CLOSE:g} of the largest entry):",
        "",
        "| | gradients right | gradients wrong, or no end |",
        "|-|-|-|",
        f"| proved | {agree[True, True]} | {agree[True, False]} |",
        f"| refuted | {agree[False, True]} | {agree[False, False]} |",
        "",
        "The last two columns: of the proved, how many also run through under "
        "rendezvous if all transfers between two ranks share a stream (a communicator "
        "made for each pair when first used), and if all of a rank do (one "
        "communicator). That is a statement of the model; no GPU was there to run it.",
        "",
        "| schedule | receives | judged | proved | refuted | stream a pair | one |",
        "|-|-|-|-|-|-|-|",
    ]
    for name in (*SINGLE, *LOOPED, *V):
        for deferred in (False, True):
            of = [
                v
                for c, v in verdicts.items()
                if (c.name, c.deferred) == (name, deferred)
            ]
            proved = [v for v in of if v.ok]
            pair, one = (sum(v.serial[n] for v in proved) for n in (0, 1))
            lines.append(
                f"| {name} | {'deferred' if deferred else 'default'} | {len(of)} | "
                f"{len(proved)} | {len(of) - len(proved)} | {pair} of {len(proved)} | "
                f"{one} of {len(proved)} |"
            )
    lines += [
        "",
        "## Refuted",
        "",
        "All with `defer_pp_recv=True`."
        if all(c.deferred for c, v in verdicts.items() if not v.ok)
        else "",
        "",
        "| schedule | size | the message in the wrong place | what torch's run gave |",
        "|-|-|-|-|",
    ]
    for case, verdict in verdicts.items():
        if verdict.ok:
            continue
        gave = "not run"
        if case in outcomes:
            found = outcomes[case]
            gave = found.said or f"gradients off by {found.difference:.2g}, no error"
        lines.append(f"| {case.name} | {size(case)} | {verdict.why} | {gave} |")
    return [*lines, "", *about_1f1b()]


def about_1f1b() -> list[str]:
    """What the order that torch shows for 1F1B is."""
    case = Case("1F1B", 2, 1, 4, False)
    row = [a for a in shown(case)[1] if a is not None and a.is_compute_op]
    return [
        "The order that torch's 1F1B class shows (`pipeline_order`, which its "
        "visualiser draws) is not the one that it runs: for P=2, M=4 it gives rank 1 "
        f"`{','.join(map(str, row))}`, without a forward of micro-batch 0. Judged "
        "here is the order that it runs.",
    ]


def main() -> None:
    """Judge all, run some, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=8, help="at most, to be judged")
    parser.add_argument("--run", type=int, default=4, help="ranks at most, to be run")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.work:
        rank, ranks, store = arguments.work
        work(int(rank), int(ranks), store)
        return
    verdicts = {c: judged(c) for c in cases(range(2, arguments.ranks + 1), 4)}
    print(Counter(v.ok for v in verdicts.values()), file=sys.stderr)
    some = [
        c
        for c, verdict in verdicts.items()
        if c.ranks <= arguments.run
        and (not verdict.ok or c.micro_batches <= 2 * c.ranks)
    ]
    lines = report(verdicts, ran(some))
    lines += ["", f"One shared x86-64 machine of {os.cpu_count()} cores; repeat with"]
    lines += ["`python experiments/torch_under_proof.py`."]
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
