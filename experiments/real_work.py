"""Real data, trained pipelined and not, to a stated quality.

Three models, each in four stages:

* a residual CNN with batch norm on scikit-learn's handwritten digits;
* a byte-level GPT on the standard library's sources;
* a U-Net that takes noise off digits. Its skips are long: what the first stage
  makes is used by the last, and goes there past the stages between.

Each is trained step by step with `Pipeline`, in two schedules, and with `reference`,
the plain loop over micro-batches. Losses of all steps, all parameters and all buffers
must be equal bit by bit. The CNN is also trained on whole batches, and with deferred
batch norm, to show what micro-batches do to it.

    make experiments        writes experiments/results/real_work.md and .svg
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import Pipeline, defer_batch_norm, reference, split_evenly
from pipeproof.exec.examples import gpt_layers, token_loss
from pipeproof.sched import Schedule, catalog, recompute

sys.path.append(str(Path(__file__).parent))
import demo

RESULT = Path(__file__).parent / "results" / "real_work.md"
SEED = 1811_06965
STAGES, MICRO_BATCHES = 4, 8

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Any, Tensor], Tensor]


class Residual(nn.Module):
    """Two 3×3 convolutions with batch norm, added to what came in."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(rows, inputs, h, w) → (rows, outputs, h / stride, w / stride)."""
        return functional.relu(self.body(x) + self.short(x))


def residual_layers() -> list[nn.Module]:
    """8×8 digits → 10 classes."""
    stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
    return [
        nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU()),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 32, 1),
        Residual(32, 64, 2),
        Residual(64, 64, 1),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    ]


def convolved(inputs: int, outputs: int) -> nn.Sequential:
    """3×3, with group norm: no row sees another."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 1, 1), nn.GroupNorm(4, outputs), nn.ReLU()
    )


class Down(nn.Module):
    """(rows, inputs, h, w) → half as wide and high; what it was goes on as a skip."""

    def __init__(self, inputs: int, outputs: int, skip: str) -> None:
        super().__init__()
        self.gives_skips = (skip,)
        self.body = convolved(inputs, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Its output, and the skip by name."""
        x = self.body(x)
        return functional.max_pool2d(x, 2), {self.gives_skips[0]: x}


class Up(nn.Module):
    """Twice as wide and high, with the skip of that size."""

    def __init__(self, inputs: int, beside: int, outputs: int, skip: str) -> None:
        super().__init__()
        self.takes_skips = {"skip": skip}
        self.body = convolved(inputs + beside, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(rows, inputs, h, w), (rows, beside, 2h, 2w) → (rows, outputs, 2h, 2w)."""
        x = functional.interpolate(x, scale_factor=2.0)
        return self.body(torch.cat([x, skip], 1))


def u_net_layers() -> list[nn.Module]:
    """Noisy 8×8 digits → clean ones, in pairs of layers for each of four stages.

    The outer skip is made in the first stage and used in the last, the inner one in
    the third.
    """
    return [
        Down(1, 16, "outer"),
        Down(16, 32, "inner"),
        convolved(32, 32),
        convolved(32, 32),
        Up(32, 32, 32, "inner"),
        convolved(32, 32),
        Up(32, 16, 16, "outer"),
        nn.Conv2d(16, 1, 1),
    ]


@dataclass(frozen=True)
class Task:
    """A model, its data, and how good it must become.

    Attributes:
        name: in the tables.
        model: its layers; the same weights at every call.
        data: the batches to train on.
        loss_fn: a mean over rows.
        held_out: what is asked about at the end.
        quality: of the trained model's outputs, and the targets; a number.
        measure: what that number is.
        reached: whether it is good enough.
        stated: what is good enough, in words.
        rate: AdamW's learning rate.
        normed: whether it has batch norms.
    """

    name: str
    model: Callable[[], list[nn.Module]]
    data: list[Batch]
    loss_fn: Loss
    held_out: Batch
    quality: Callable[[Tensor, Tensor], float]
    measure: str
    reached: Callable[[float], bool]
    stated: str
    rate: float
    normed: bool = False


def seeded(layers: Callable[[], list[nn.Module]]) -> list[nn.Module]:
    """The same weights at every call."""
    torch.manual_seed(SEED)
    return layers()


def drawn(inputs: Tensor, targets: Tensor, rows: int, steps: int) -> list[Batch]:
    """Batches of rows at random."""
    source = torch.Generator().manual_seed(SEED)
    found = []
    for _ in range(steps):
        which = torch.randint(len(inputs), (rows,), generator=source)
        found.append((inputs[which], targets[which]))
    return found


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Images (1797, 1, 8, 8) from 0 to 1, labels, and an order to split them in."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    return images[order], torch.tensor(found.target)[order], order


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The part that is right."""
    return float((outputs.argmax(1) == targets).double().mean())


def classify(steps: int) -> Task:
    """The CNN."""
    images, labels, _ = digits()
    kept = len(images) - 360
    return Task(
        "residual CNN, digits",
        lambda: seeded(residual_layers),
        drawn(images[:kept], labels[:kept], 64, steps),
        functional.cross_entropy,
        (images[kept:], labels[kept:]),
        accuracy,
        "accuracy on 360 digits held out",
        lambda found: found >= 0.95,
        "at least 0.95",
        3e-3,
        normed=True,
    )


def denoise(steps: int) -> Task:
    """The U-Net."""
    images, _, _ = digits()
    source = torch.Generator().manual_seed(SEED)
    noisy = images + 0.3 * torch.randn(images.shape, generator=source)
    kept = len(images) - 360
    before = float(functional.mse_loss(noisy[kept:], images[kept:]))
    return Task(
        "U-Net, noise off digits",
        lambda: seeded(u_net_layers),
        drawn(noisy[:kept], images[:kept], 64, steps),
        functional.mse_loss,
        (noisy[kept:], images[kept:]),
        lambda outputs, targets: float(functional.mse_loss(outputs, targets)) / before,
        "squared error on 360 digits held out, over that of the noise",
        lambda found: found <= 0.3,
        "at most 0.3",
        3e-3,
    )


def predict_bytes(steps: int) -> Task:
    """The GPT."""
    text = demo.corpus()
    kept = len(text) * 9 // 10
    parts = text[kept:].unfold(0, demo.TOKENS + 1, demo.TOKENS + 1)
    tail = parts[:: len(parts) // 256][:256]

    def bits(outputs: Tensor, targets: Tensor) -> float:
        return float(token_loss(outputs, targets)) / math.log(2)

    def layers() -> list[nn.Module]:
        return gpt_layers(tokens=demo.TOKENS, width=96, layers=4, heads=4)

    return Task(
        "GPT, Python's sources",
        lambda: seeded(layers),
        list(demo.batches(text[:kept], steps)),
        token_loss,
        (tail[:, :-1].contiguous(), tail[:, 1:].contiguous()),
        bits,
        "bits a byte, 256 pieces of the last tenth held out",
        lambda found: found <= 3.6,
        "at most 3.6",
        3e-3,
    )


@dataclass
class Run:
    """One way of training, and what came of it.

    Attributes:
        losses: of each step.
        state: all parameters and buffers at the end.
        quality: of the held-out data.
        seconds: of all steps.
    """

    losses: list[float]
    state: list[Tensor]
    quality: float
    seconds: float

    def equals(self, other: Run) -> bool:
        """Bit by bit, the curve and what was trained."""
        same = all(map(torch.equal, self.state, other.state))
        return self.losses == other.losses and same


Step = Callable[[Tensor, Tensor], Tensor]


def train(task: Task, stages: list[nn.Sequential], step: Step) -> Run:
    """AdamW over the batches."""
    model = nn.Sequential(*stages)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate)
    losses = []
    torch.manual_seed(SEED)
    start = time.process_time()
    for inputs, targets in task.data:
        optimizer.zero_grad()
        losses.append(float(step(inputs, targets)))
        optimizer.step()
    seconds = time.process_time() - start
    alone = catalog.make("gpipe", devices=1, micro_batches=1)
    outputs = Pipeline([model], alone, task.loss_fn).predict(task.held_out[0])
    assert isinstance(outputs, Tensor)
    found = task.quality(outputs, task.held_out[1])
    return Run(losses, [t.clone() for t in model.state_dict().values()], found, seconds)


def pipelined(task: Task, schedule: Schedule, *, defer: bool = False) -> Run:
    """As the schedule says."""
    stages = split_evenly(task.model(), STAGES)
    if defer:
        defer_batch_norm(nn.ModuleList(stages))
    pipeline = Pipeline(stages, schedule, task.loss_fn)
    return train(task, stages, pipeline.step)


def looped(task: Task, schedule: Schedule) -> Run:
    """The plain loop over micro-batches, summing in the schedule's order."""
    stages = split_evenly(task.model(), STAGES)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        return reference(stages, schedule, task.loss_fn, inputs, targets)

    return train(task, stages, step)


def whole(task: Task) -> Run:
    """No micro-batches: batch norm normalises by the whole batch."""
    stages = split_evenly(task.model(), STAGES)
    model = nn.Sequential(*stages)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = task.loss_fn(model(inputs), targets)
        loss.backward()
        return loss.detach()

    return train(task, stages, step)


def schedules() -> dict[str, Schedule]:
    """Both orders of summation, one of them with recomputation."""
    sizes = {"devices": STAGES, "micro_batches": MICRO_BATCHES}
    return {
        "1f1b": catalog.make("1f1b", **sizes),
        "gpipe, recomputing": recompute(catalog.make("gpipe", **sizes), "always"),
    }


def curve(losses: list[float]) -> list[float]:
    """Means over tenths of the steps."""
    size = len(losses) // 10
    return [sum(losses[i * size : (i + 1) * size]) / size for i in range(10)]


def svg(curves: dict[str, list[float]]) -> str:
    """Losses by step, one panel a task."""
    wide, high, gap = 260, 150, 30
    parts = []
    for place, (name, losses) in enumerate(curves.items()):
        left, top = gap + place * (wide + gap), gap
        most = max(losses)
        points = " ".join(
            f"{left + wide * step / (len(losses) - 1):.1f},"
            f"{top + high * (1 - loss / most):.1f}"
            for step, loss in enumerate(losses)
        )
        parts += [
            f'<text x="{left}" y="{top - 8}">{name}, from 0 to {most:.2f}</text>',
            f'<rect x="{left}" y="{top}" width="{wide}" height="{high}" fill="none" '
            'stroke="#ccc"/>',
            f'<polyline points="{points}" fill="none" stroke="#06c"/>',
        ]
    size = f'width="{gap + len(curves) * (wide + gap)}" height="{high + 2 * gap}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
        'font-size="12">\n' + "\n".join(parts) + "\n</svg>\n"
    )


HEAD = """\
# Real data, pipelined and not

Four stages, eight micro-batches, AdamW, one CPU thread. *equal*: the losses of all
steps, all parameters and all buffers (running statistics included) after the last one
are bit by bit those of `reference`, a plain loop over micro-batches that sums in the
schedule's order.

| task | parameters | steps | schedule | equal | quality | stated | reached |
|-|-|-|-|-|-|-|-|
"""
CURVES = """
Quality is: {measures}.

## Curves

Mean training loss over tenths of the steps; they are the unpipelined ones too, where
*equal* says yes. [As a picture](real_work.svg).

| | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 |
|-|-|-|-|-|-|-|-|-|-|-|
"""
NORM = """
## What batch norm does

It normalises each micro-batch by itself (Huang et al. 2018, 2.3). So a pipeline equals
the loop over the same micro-batches, recomputing or not, and neither equals training on
whole batches. `defer_batch_norm` changes the running statistics alone, to those of the
whole batch: gradients and losses stay those of micro-batches.

| residual CNN, digits | last tenth's loss | {measure} |
|-|-|-|
"""
SKIPS = """
The U-Net's skips go straight from the first stage to the last two, past stages that do
not use them. Its norm is a group norm, so nothing in it looks across rows.
"""


def cells(*values: object) -> str:
    """A row in Markdown."""
    return "| " + " | ".join(map(str, values)) + " |\n"


def report(tasks: list[Task], tell: Callable[[str], None]) -> tuple[str, str, bool]:
    """The tables, the picture, and whether all is equal and as good as stated."""
    lines, curves, fine, norms = "", {}, True, ""
    for task in tasks:
        count = sum(p.numel() for layer in task.model() for p in layer.parameters())
        for name, schedule in schedules().items():
            tell(f"{task.name}, {name}")
            run, plain = pipelined(task, schedule), looped(task, schedule)
            equal, reached = run.equals(plain), task.reached(run.quality)
            fine = fine and equal and reached
            lines += cells(
                task.name,
                f"{count:,}",
                len(task.data),
                name,
                "yes" if equal else "NO",
                f"{run.quality:.4f}",
                task.stated,
                "yes" if reached else "NO",
            )
            curves[f"{task.name}, {name}"] = run.losses
            if task.normed:
                norms += cells(
                    name, f"{curve(run.losses)[-1]:.5f}", f"{run.quality:.4f}"
                )
        if task.normed:
            tell(f"{task.name}, deferred and whole")
            deferred = pipelined(task, schedules()["1f1b"], defer=True)
            same = deferred.losses == curves[f"{task.name}, 1f1b"]
            fine = fine and same
            for name, run in (
                (
                    f"1f1b, deferred (losses {'equal' if same else 'NOT equal'})",
                    deferred,
                ),
                ("whole batches, no pipeline", whole(task)),
            ):
                norms += cells(
                    name, f"{curve(run.losses)[-1]:.5f}", f"{run.quality:.4f}"
                )
    measures = "; ".join(f"{task.name}: {task.measure}" for task in tasks)
    text = HEAD + lines
    text += CURVES.format(measures=measures)
    for name, losses in curves.items():
        text += cells(name, *(f"{mean:.4f}" for mean in curve(losses)))
    for task in tasks:
        if task.normed:
            text += NORM.format(measure=task.measure) + norms
    first = {name: of for name, of in curves.items() if name.endswith("1f1b")}
    return text + SKIPS, svg(first), fine


def main() -> int:
    """Train all, write the tables; 1 where a curve differs or a quality is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    parser.add_argument("--steps", type=int, help="of each; default as committed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tasks = [
        make(arguments.steps or steps)
        for make, steps in ((classify, 160), (denoise, 160), (predict_bytes, 200))
    ]
    start = time.process_time()
    text, picture, fine = report(tasks, lambda what: print(what, flush=True))
    arguments.output.write_text(text)
    arguments.output.with_suffix(".svg").write_text(picture)
    print(text)
    print(f"{time.process_time() - start:.0f} s of CPU")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
