"""What only a GPU can show, in four sections of a few minutes at most together.

same      a GPT of over 1B parameters in four stages of one process, and a bare loop
          over its micro-batches: gradients bit by bit, step time
memory    peak bytes of activations with each recompute policy, predicted and measured
streams   a step on a stream of one's own, and copies to the host on theirs or not
largest   the largest GPT in 8 GiB, with recomputation and without

Each section is a process of its own with a time limit, so that none takes the others
along.

    python experiments/executor/on_gpu.py
        writes experiments/results/on_gpu.md; ends with 2 where there is no CUDA device
    python experiments/executor/on_gpu.py --device cpu --small -o /tmp/on_cpu.md
        the same code on a tiny GPT; all live bytes stand for those of the allocator
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from largest_gpt import MEMORY, Size, Way, largest, parameters  # the path first
from live_bytes import LiveBytes

from pipeproof.cli.profiling import peaks_of
from pipeproof.exec import (
    ActivationMeter,
    Pipeline,
    profile_layers,
    split_at,
    split_evenly,
    stash,
)
from pipeproof.exec.errors import StepError
from pipeproof.exec.examples import token_loss
from pipeproof.sched import POLICIES, Schedule, catalog, merge_backward, recompute
from pipeproof.sim import Cluster, cost_of_layers, simulate

RESULT = Path(__file__).parents[1] / "results" / "on_gpu.md"
STAGES, MICRO_BATCHES = 4, 8
TINY = Size(width=32, heads=2, tokens=16, vocabulary=64, rows=MICRO_BATCHES)
Table = list[list[str]]


@dataclass(frozen=True)
class Here:
    """Where a section runs, and how large.

    Attributes:
        device: of torch.
        small: a model for tests.
    """

    device: str
    small: bool

    @property
    def on_gpu(self) -> bool:
        """Whether there is an allocator to ask."""
        return self.device.startswith("cuda")

    def size(self, **full: int) -> Size:
        """Of the model, as given unless all is small."""
        return TINY if self.small else replace(Size(), **full)

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], object]) -> float:
        """Of a step, behind one that does not count."""
        found = []
        for _ in range(2 if self.small else 4):
            self.wait()
            began = time.perf_counter()
            step()
            self.wait()
            found.append(time.perf_counter() - began)
        return median(found[1:])

    @contextmanager
    def peaking(self) -> Iterator[SimpleNamespace]:
        """The most bytes at once, beyond those that there were; by `peak`."""
        found = SimpleNamespace(peak=0)
        if not self.on_gpu:
            with LiveBytes() as meter:
                yield found
            found.peak = meter.peak
            return
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.peak = torch.cuda.max_memory_allocated() - before

    def model(self, size: Size, blocks: int) -> list[nn.Module]:
        """Its layers, made on the device."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return size.layers(blocks)


def forget(stages: Sequence[nn.Module]) -> None:
    """Their gradients."""
    for stage in stages:
        stage.zero_grad(set_to_none=True)


def gradients(stages: Sequence[nn.Module]) -> list[Tensor]:
    """Of all parameters."""
    found = [p.grad for stage in stages for p in stage.parameters()]
    return [grad for grad in found if grad is not None]


def same(here: Here) -> Table:
    """Gradients and time of a step beside those of a loop over the micro-batches."""
    size = here.size(width=2048, vocabulary=32768, rows=MICRO_BATCHES)
    layers = here.model(size, 4 if here.small else 20)
    model, x, y = nn.Sequential(*layers), *size.batch(here.device)
    stages = split_evenly(layers, STAGES)
    numbers = sum(p.numel() for p in model.parameters())

    def loop() -> None:
        parts = zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES))
        for inputs, targets in parts:
            (token_loss(model(inputs), targets) * (1 / MICRO_BATCHES)).backward()

    loop()
    expected = [grad.clone() for grad in gradients(stages)]
    scale = max(float(grad.abs().max()) for grad in expected)
    bare = here.seconds(loop)
    rows = [
        ["parameters", "schedule", "recomputation", "gradients", "step, s", "loop, s"]
    ]
    for name, policy in (("1f1b", "never"), ("1f1b", "always"), ("zb-h1", "never")):
        schedule = recompute(
            catalog.make(name, devices=STAGES, micro_batches=MICRO_BATCHES), policy
        )
        pipeline = Pipeline(stages, schedule, token_loss, here.device)
        forget(stages)
        pipeline.step(x, y)
        pairs = list(zip(gradients(stages), expected, strict=True))
        off = max(float((ours - theirs).abs().max()) for ours, theirs in pairs) / scale
        equal = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        found = "equal bit by bit" if equal else f"off by {off:.1e} of the largest"
        takes = here.seconds(lambda p=pipeline: p.step(x, y))
        cells = [f"{numbers:,}", name, policy, found, f"{takes:.3f}", f"{bare:.3f}"]
        rows.append(cells)
        if not off < 1e-5:
            raise SystemExit(f"{render(rows)}\nthe gradients of {name} are wrong")
    return rows


def memory(here: Here) -> Table:
    """Activations: as predicted from single layers, as counted, and with all else."""
    size = here.size(rows=2 * MICRO_BATCHES)
    layers = here.model(size, 2 if here.small else 14)
    x, y = size.batch(here.device)
    rows = size.rows // MICRO_BATCHES
    profile = profile_layers(
        layers, x[:rows], loss_fn=token_loss, targets=y[:rows], repeats=1
    )
    table = [["schedule", "recomputation", "predicted, MB", "counted, MB", "off"]]
    table[0].append(f"{'allocator' if here.on_gpu else 'all live bytes'}, MB")
    for name in ("gpipe", "1f1b", "zb-h1"):
        for policy in POLICIES:
            bare = catalog.make(name, devices=STAGES, micro_batches=MICRO_BATCHES)
            schedule = merge_backward(recompute(bare, policy))
            stages = split_evenly(layers, STAGES)
            pipeline = Pipeline(stages, schedule, token_loss, here.device)
            cost = cost_of_layers(profile, [len(stage) for stage in stages])
            shared = Cluster(shared_processor=True)
            trace = simulate(pipeline.program, cost, shared)
            (predicted,) = peaks_of(trace, shared=True)
            pipeline.step(x, y)
            with here.peaking() as found:
                pipeline.step(x, y)
            with ActivationMeter(stages) as meter:
                meter.ignore(x, y)
                pipeline.step(x, y)
            cells = [f"{size / 1e6:.2f}" for size in (predicted, meter.peak)]
            off = f"{predicted / meter.peak - 1:+.2%}"
            table.append([name, policy, *cells, off, f"{found.peak / 1e6:.2f}"])
    return table


def streams(here: Here) -> Table:
    """Steps, and copies, on the default stream and on others."""
    size = here.size(rows=2 * MICRO_BATCHES)
    layers = here.model(size, 6 if here.small else 14)
    x, y = size.batch(here.device)

    def own() -> AbstractContextManager[Any]:
        if not here.on_gpu:
            return nullcontext()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)

    def copying(device: torch.device, back: bool) -> Any:
        return torch.cuda.current_stream(device)

    in_turn = patch.object(stash, "_stream", copying)
    bare = catalog.make("1f1b", devices=STAGES, micro_batches=MICRO_BATCHES)
    away, kept = (
        catalog.make(
            "pipeoffload", devices=STAGES, micro_batches=MICRO_BATCHES, **options
        )
        for options in ({}, {"offload": 0})
    )
    cases: list[tuple[str, Schedule, AbstractContextManager[Any]]] = [
        ("1f1b on the default stream", bare, nullcontext()),
        ("1f1b on a stream of one's own", bare, own()),
        ("pipeoffload without copies", kept, nullcontext()),
        ("pipeoffload, copies behind the ops", away, in_turn),
        ("pipeoffload, copies on streams of their own", away, nullcontext()),
    ]
    table = [["case", "step, s", "sequences/s", "peak, MB"]]
    for case, schedule, around in cases:
        stages = split_evenly(layers, schedule.stages)
        pipeline = Pipeline(stages, schedule, token_loss, here.device)
        with around:
            takes = here.seconds(lambda p=pipeline: p.step(x, y))
            with here.peaking() as found:
                pipeline.step(x, y)
                here.wait()
        cells = [f"{takes:.3f}", f"{size.rows / takes:.1f}", f"{found.peak / 1e6:.2f}"]
        table.append([case, *cells])
    return table


WAYS = (
    Way(1, "gpipe", 1, "never"),
    Way(1, "gpipe", 16, "never"),
    Way(1, "gpipe", 16, "always"),
    Way(1, "1f1b", 16, "never"),
)


def largest_that_fits(here: Here) -> Table:
    """Blocks of a GPT with Adam, for which the allocator has room."""
    size = replace(TINY, rows=16) if here.small else Size()
    budget = (3 << 18) if here.small else MEMORY
    if here.on_gpu:
        total = torch.cuda.get_device_properties(here.device).total_memory
        torch.cuda.set_per_process_memory_fraction(budget / total)
    table = [["schedule", "M", "recomputation", "blocks", "parameters", "peak, GiB"]]
    table[0].append("blocks predicted, without temporaries")
    for way in WAYS:
        fit = largest(size, way, budget)
        guess, peak = 0 if fit is None else fit[0], None
        blocks = guess
        while blocks > 0 and (peak := _fits(here, size, way, blocks, budget)) is None:
            blocks -= max(1, blocks // 16)
        while peak is not None:  # may be more after a long step down
            more = _fits(here, size, way, blocks + 1, budget)
            if more is None:
                break
            blocks, peak = blocks + 1, more
        cells = [way.schedule, f"{way.micro_batches}", way.policy]
        numbers = f"{parameters(size, blocks) / 1e6:,.1f} M" if peak else "none"
        cells += [f"{blocks}", numbers, f"{(peak or 0) / (1 << 30):.4f}"]
        table.append([*cells, f"{guess}"])
    return table


def _fits(here: Here, size: Size, way: Way, blocks: int, budget: int) -> int | None:
    """The most bytes in two steps with Adam; None where there is no room for them."""
    gc.collect()
    if here.on_gpu:
        torch.cuda.empty_cache()
    try:
        with here.peaking() as found:
            _train(here, size, way, blocks)
    except (torch.OutOfMemoryError, StepError) as error:
        if isinstance(error.__cause__ or error, torch.OutOfMemoryError):
            return None
        raise
    return found.peak if found.peak <= budget else None


def _train(here: Here, size: Size, way: Way, blocks: int) -> None:
    layers = here.model(size, blocks)
    stages = split_at(layers, [len(layers)])
    pipeline = Pipeline(stages, way.planned(), token_loss, here.device)
    # Neither makes copies of all parameters meanwhile.
    how = {"fused": True} if here.on_gpu else {"foreach": False}
    optimizer = torch.optim.Adam(stages[0].parameters(), lr=1e-4, **how)
    for _ in range(2):
        pipeline.step(*size.batch(here.device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    here.wait()


SECTIONS: dict[str, tuple[Callable[[Here], Table], str, int]] = {
    "same": (same, "A GPT in four stages, and a loop over its micro-batches", 150),
    "memory": (memory, "Peak of activations, by recompute policy", 100),
    "streams": (streams, "Streams", 80),
    "largest": (largest_that_fits, "The largest GPT within a budget of memory", 150),
}
"""What each does, its title, and its limit in seconds."""


def render(table: Table) -> str:
    """In Markdown."""
    head, *rows = table
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def in_process(name: str, arguments: argparse.Namespace) -> tuple[str, bool]:
    """A section, run by a process of its own; and whether it came to its end."""
    title, limit_s = SECTIONS[name][1:]
    command = [sys.executable, __file__, "--only", name, "--device", arguments.device]
    command += ["--small"] * arguments.small
    # Before CUDA starts: products that are the same each time.
    around = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, env=around, timeout=limit_s, text=True, stdout=subprocess.PIPE
        )
        found, well = done.stdout, done.returncode == 0
        if not well:
            found += f"\n**It ended with exit status {done.returncode}.**\n"
    except subprocess.TimeoutExpired:
        found, well = f"**It took more than its {limit_s} s, and was ended.**\n", False
    took = time.monotonic() - began
    return f"## {title}\n\n{found}\n{took:.0f} s with its start.\n", well


def section(name: str, here: Here) -> None:
    """Run one in this process, and print its table."""
    run = SECTIONS[name][0]
    # Some kernels that a GPU takes otherwise add in the order in which they come.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(name == "same")
    try:
        table = run(here)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        print(f"Not by deterministic kernels alone: {error}\n")
        torch.use_deterministic_algorithms(False)
        table = run(here)
    print(render(table), flush=True)


def main() -> None:
    """Run the sections, and write what they found as they come."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, for tests")
    parser.add_argument("--only", choices=SECTIONS, help="one section, printed")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    here = Here(arguments.device, arguments.small)
    if here.on_gpu and not torch.cuda.is_available():
        print(
            "on_gpu.py: there is no CUDA device here; --device cpu --small runs the "
            "same code on a tiny model",
            file=sys.stderr,
        )
        sys.exit(2)
    if arguments.only is not None:
        section(arguments.only, here)
        return
    what = torch.cuda.get_device_name() if here.on_gpu else "a CPU, and a tiny model"
    text = f"# On {what}\n\ntorch {torch.__version__}, float32.\n"
    all_well = True
    for name in SECTIONS:
        found, well = in_process(name, arguments)
        all_well &= well
        text += f"\n{found}"
        print(found, flush=True)
        arguments.output.write_text(text, encoding="utf-8")
    sys.exit(0 if all_well else 1)


if __name__ == "__main__":
    main()
