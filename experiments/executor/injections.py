"""A hundred ranks that are killed, stopped or raise: does all end, and is it said why?

Each injection launches ranks of its own, takes a clean step, and then has one rank
die at a random place: in an op of a random kind, stage and micro-batch, between two
steps, before the pipeline is made, or, from outside, at a random moment. Judged are
what the launcher raises, what every other rank says, how long it takes from the
injection until all have ended, and whether a process is left.

    python experiments/executor/injections.py
        writes experiments/results/injections.md
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from pipeproof.exec import Pipeline, RankError, Ranks, launch
from pipeproof.sched import Kind, Schedule, catalog

RESULT = Path(__file__).parent.parent / "results" / "injections.md"
WIDTH, MICRO_BATCHES = 4, 4
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "chimera")
PLACES = ("an op", "an op", "an op", "between steps", "the beginning", "outside")
"""Where; ops count more. From outside nothing can raise."""
ALLOWED_S, HUNG_S = 10.0, 300.0


class InjectedError(Exception):
    """What is raised."""


@dataclass(frozen=True)
class Injection:
    """One rank's end.

    Attributes:
        how: kill, stop or raise.
        where: one of `PLACES`.
        schedule: its name.
        ranks: how many.
        victim: which of them.
        op: in which it happens, of a schedule without recomputation.
        delay_s: from the first clean step, for one from outside.
    """

    how: str
    where: str
    schedule: str
    ranks: int
    victim: int
    op: str
    delay_s: float

    def made(self) -> Schedule:
        """The schedule."""
        return catalog.make(
            self.schedule, devices=self.ranks, micro_batches=MICRO_BATCHES
        )

    def __str__(self) -> str:
        place = f"in {self.op}" if self.where == "an op" else self.where
        return (
            f"{self.how} rank {self.victim} of {self.ranks}, {self.schedule}, {place}"
        )


def drawn(number: int) -> Injection:
    """The injection of this number."""
    choose = random.Random(number)
    where = choose.choice(PLACES)
    how = ("kill", "stop", "raise")[number % 3]
    if where == "outside" and how == "raise":
        where = "an op"
    name, ranks = choose.choice(SCHEDULES), choose.choice((2, 2, 4))
    schedule = catalog.make(name, devices=ranks, micro_batches=MICRO_BATCHES)
    victim = choose.randrange(ranks)
    ops = [op for op in schedule.row(victim) if op.kind in (Kind.F, Kind.B, Kind.I)]
    op = str(choose.choice(ops))
    return Injection(how, where, name, ranks, victim, op, choose.uniform(0, 0.3))


class _Through(torch.autograd.Function):
    """Does nothing, but calls back in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return grad, None


class Fragile(nn.Module):
    """A layer that ends its rank in the forward or the backward of one micro-batch."""

    def __init__(self, end: Callable[[], None], micro_batch: int, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.end, self.micro_batch, self.kind = end, micro_batch, kind
        self.armed = False

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, but for the last column, which goes through as it is."""
        # Every entry of the batch says which micro-batch it is of.
        here = self.armed and int(x.detach()[0, -1].item()) == self.micro_batch
        if here and self.kind == "F":
            self.end()
        y = torch.cat([self.linear(x)[:, :-1], x[:, -1:]], 1)
        if here and self.kind != "F":
            y = _Through.apply(y, self.end)  # type: ignore[no-untyped-call]
        return y


def squares(output: Tensor, targets: Tensor) -> Tensor:
    """A loss."""
    return (output - targets).square().mean()


def victim_of(ranks: Ranks, injection: Injection, folder: str) -> None:
    """A rank's part: the victim's, or another's."""
    me = ranks.rank == injection.victim
    Path(folder, f"pid {ranks.rank}").write_text(str(os.getpid()))

    def end() -> None:
        Path(folder, "injected").write_text(repr(time.time()))
        if injection.how == "raise":
            raise InjectedError(f"as injected: {injection}")
        number = signal.SIGKILL if injection.how == "kill" else signal.SIGSTOP
        os.kill(os.getpid(), number)

    if me and injection.where == "the beginning":
        end()
    schedule = injection.made()
    stage, kind, micro_batch = re.fullmatch(  # type: ignore[union-attr]
        r"(\d+)([FBI])(\d+)", injection.op
    ).groups()
    torch.manual_seed(0)  # replicas start alike
    stages: list[nn.Module] = [
        Fragile(end, int(micro_batch), kind) for _ in range(schedule.stages)
    ]
    pipeline = Pipeline(stages, schedule, squares, ranks=ranks)
    x = torch.randn(MICRO_BATCHES, WIDTH)
    x[:, -1] = torch.arange(MICRO_BATCHES)
    x.requires_grad_()
    pipeline.step(x, x.detach())
    Path(folder, f"ready {ranks.rank}").write_text("")
    if me and injection.where == "between steps":
        end()
    stages[int(stage)].armed = me and injection.where == "an op"  # type: ignore[assignment]
    for _ in range(1000000):
        pipeline.step(x, x.detach())


def from_outside(injection: Injection, folder: Path) -> None:
    """Wait until all are in their steps, and a little, and send the signal."""
    while len(list(folder.glob("ready *"))) < injection.ranks:
        time.sleep(0.01)
        if not folder.exists():
            return
    time.sleep(injection.delay_s)
    pid = int((folder / f"pid {injection.victim}").read_text())
    (folder / "injected").write_text(repr(time.time()))
    os.kill(pid, signal.SIGKILL if injection.how == "kill" else signal.SIGSTOP)


@dataclass(frozen=True)
class Outcome:
    """What came of one.

    Attributes:
        seconds: from the injection until the launcher raised, all ranks ended.
        faults: what was not as it must be; empty for none.
        said: the launcher's message, its first line.
    """

    seconds: float
    faults: Sequence[str]
    said: str


def tried(injection: Injection) -> Outcome:
    """Do it, and judge."""
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile("w+") as errors:
        folder = Path(name)
        if injection.where == "outside":
            threading.Thread(
                target=from_outside, args=(injection, folder), daemon=True
            ).start()
        kept = os.dup(2)
        os.dup2(errors.fileno(), 2)
        message, faults = "", []
        try:
            launch(victim_of, injection.ranks, injection, name)
        except RankError as error:
            message = str(error)
        finally:
            ended = time.time()
            os.dup2(kept, 2)
            os.close(kept)
        if not (folder / "injected").exists():
            raise RuntimeError(f"{injection}: ended before it was injected: {message}")
        seconds = ended - float((folder / "injected").read_text())
        pids = [int(path.read_text()) for path in folder.glob("pid *")]
        errors.seek(0)
        faults = judged(injection, message, errors.read())
        if seconds > ALLOWED_S:
            faults.append(f"took {seconds:.1f} s")
        children = psutil.Process().children(recursive=True)
        ranks = [c for c in children if "resource_tracker" not in " ".join(c.cmdline())]
        if ranks or any(map(psutil.pid_exists, pids)):
            faults.append("left a process")
        return Outcome(seconds, faults, message.partition("\n")[0])


def judged(injection: Injection, message: str, errors: str) -> list[str]:
    """What the launcher's message and the ranks' own words lack."""
    victim = f"rank {injection.victim} "
    if injection.how == "kill":
        wanted = [f"{victim}was ended by SIGKILL"]
    elif injection.how == "stop":
        wanted = [f"{victim}has not been heard of"]
    else:
        wanted = [f"{victim}failed in ", "InjectedError: as injected", "in end\n"]
        if injection.where == "an op":
            stage, micro_batch = re.findall(r"\d+", injection.op)
            wanted.append(
                f"at {injection.op} (stage {stage}, micro-batch {micro_batch},"
            )
    faults = [f"not said: {text!r}" for text in wanted if text not in message]
    for rank in range(injection.ranks):
        if rank != injection.victim and f"rank {rank} ends: {wanted[0]}" not in errors:
            faults.append(f"rank {rank} did not say why")
    return faults


def main() -> None:
    """Try all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=102)
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows: dict[tuple[str, str], list[Outcome]] = {}
    wrong = []
    injections = list(map(drawn, range(arguments.count)))
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        outcomes = pool.map(_within, injections)
        for number, (injection, outcome) in enumerate(zip(injections, outcomes)):
            rows.setdefault((injection.how, injection.where), []).append(outcome)
            said = f"{number} {injection}: {outcome.seconds:.2f} s {outcome.said}"
            print(said, flush=True)
            if outcome.faults:
                wrong.append(f"* {number}: {injection}: {'; '.join(outcome.faults)}")
                print(wrong[-1], flush=True)
    arguments.output.write_text(told(rows, wrong))


def _within(injection: Injection) -> Outcome:
    """Its outcome; a hang ends this process, and says so."""
    watch = threading.Timer(HUNG_S, _hung, args=(injection,))
    watch.daemon = True
    watch.start()
    try:
        return tried(injection)
    finally:
        watch.cancel()


def _hung(injection: Injection) -> None:
    print(f"hung: {injection}", file=sys.stderr, flush=True)
    os._exit(1)


def told(rows: dict[tuple[str, str], list[Outcome]], wrong: Sequence[str]) -> str:
    """The table."""
    count = sum(map(len, rows.values()))
    text = [
        "# Ranks that are killed, stopped or raise",
        "",
        f"{count} injections into launches of 2 or 4 ranks on one shared x86-64 "
        f"machine of {os.cpu_count()} cores, with {', '.join(SCHEDULES)}, torch "
        f"{torch.__version__}.",
        "Named: the launcher and every other rank name the rank and why it ended; of "
        "one that raised also the op, its stage and micro-batch, and the original "
        "traceback. Seconds are from the injection until every rank has ended and the "
        f"launcher has raised; allowed are {ALLOWED_S:g}. None hung.",
        "",
        f"| what | where | injections | over {ALLOWED_S:g} s | left a process | named "
        "| median, s | longest, s |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for (how, where), outcomes in sorted(rows.items()):
        seconds = [outcome.seconds for outcome in outcomes]
        late = sum(time > ALLOWED_S for time in seconds)
        left = sum("left a process" in o.faults for o in outcomes)
        unnamed = sum(
            any("say" in f or "said" in f for f in o.faults) for o in outcomes
        )
        text.append(
            f"| {how} | {where} | {len(outcomes)} | {late} | {left} | "
            f"{len(outcomes) - unnamed} | {statistics.median(seconds):.1f} | "
            f"{max(seconds):.1f} |"
        )
    text += ["", "Not as it must be:", "", *wrong] if wrong else []
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
