"""The user's object: a model in stages, a schedule and a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from pipeproof.exec import clipping, scaling
from pipeproof.exec.agreement import routes_of
from pipeproof.exec.alone import Alone
from pipeproof.exec.assembly import alone, among
from pipeproof.exec.bandwidth import Rates, link_rates
from pipeproof.exec.batch import (
    NO_KEYWORDS,
    Batch,
    LossFn,
    LossScale,
    Value,
    check_needed,
    check_scale,
)
from pipeproof.exec.errors import BatchError, ModelError
from pipeproof.exec.evaluation import evaluating, joined
from pipeproof.exec.grid import Grid
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import (
    check_count,
    torch_devices,
)
from pipeproof.exec.input_grads import pass_on
from pipeproof.exec.losses import Loss
from pipeproof.exec.processes import Along
from pipeproof.exec.ranked import Ranked
from pipeproof.exec.recomputed import Recomputed
from pipeproof.exec.rng import generators, step_seed
from pipeproof.exec.step import Losses, Step, ToldLosses
from pipeproof.exec.ties import shares_of
from pipeproof.exec.timetable import Ends, measured
from pipeproof.exec.training import Training
from pipeproof.exec.units import StageModule
from pipeproof.exec.updating import (
    WHOLE_FIRST,
    Optimizers,
    check_optimizers,
)
from pipeproof.sched import (
    ParameterError,
    Program,
    Schedule,
    Trace,
    lower,
    reduce_gradients,
)
from pipeproof.sched.lower import Messages


class Pipeline:
    """Trains a model in stages as a schedule says.

    In one process, or in one for each device of the schedule (`ranks`).

    `step` does what this does, for one batch::

        loss = loss_fn(model(inputs), targets)
        loss.backward()

    Stage s of the schedule is `stages[s]`. What a stage returns is what the next
    one is called with, as one argument: a tensor, a bool, an int, a float, a str or
    None, or a tuple, list or dict of these, nested as it likes. A stage may
    be a sequence of units, the smallest pieces a partition may cut between (an
    `nn.Sequential` is one); dropout and other randomness depends on the unit,
    the micro-batch and the slice, not on the schedule or on where the cuts fall.

    Where the schedule cuts micro-batches into slices along the sequence, dimension
    1, a unit is called on one slice after the other, and must work position by
    position. One that needs what earlier slices computed, as causal attention does
    keys and values, says `takes_carry = True`: it is called as `unit(x, carry)`, with
    `()` for the first slice, and returns `(y, carry)`; the carry, a tensor or a
    nested tuple of tensors, goes to its call on the next slice.

    A unit that says `gives_skips = ("fine",)` returns `(output, {"fine": value})`,
    and a later one whose forward has a parameter `fine` is called with the value,
    which goes there past all stages between; so is one that says that its parameter
    takes it, `takes_skips = {"skip": "fine"}`.

    Where several devices hold a stage (two pipes), each sums the gradients of its
    micro-batches, and REDUCE adds the sum over the devices to `.grad` once.

    Args:
        stages: one for each stage of the schedule; moved to their devices.
        schedule: checked before anything runs.
        loss_fn: (output of the last stage, targets) → scalar; or of the output alone,
            or None if the output is the loss: steps then take no targets.
        devices: one for all, or one for each device of the schedule. On torch's `meta`
            device nothing is computed, and what is kept can be counted.
        loss_scale: how the micro-batches' losses add up to the batch's. `rows`:
            `loss_fn` is a mean over rows, and each counts with its rows; where the
            schedule has slices it is a mean over rows and positions, and each slice
            counts with its share of both. `sum`: it is a sum. A callable gives the
            weight of a micro-batch, or of a slice, from its targets (how many tokens
            count, for a mean that ignores some).
        messages: as for `lower`: `grouped` posts what two ranks exchange between two
            ops as one, and the next op waits for both directions, as with torch's
            `batch_isend_irecv`. Within one process nothing waits for it.
        ranks: run one device of the schedule in this process, and the others in
            those of a process group: a `Ranks`, a group, a mesh of one dimension,
            or True for all processes. Rank r is device r. Each makes the same
            pipeline; a rank needs its own stages only, and others may be None.
        data_parallel: replicas of the whole pipeline, each with rows of its own: the
            group, or the mesh, of the ranks that run the same device in each, as in
            `ranks=mesh["pp"], data_parallel=mesh["dp"]`; or how many there are, where
            `ranks` are those of all, one replica after the other. Each stage then has
            a REDUCE behind its last backward: its gradient is summed over the
            replicas once a step, while the pipeline drains. Losses are scaled as if
            the replicas' rows were one batch, so replicas may have different numbers
            of them. Buffers (running statistics) are each replica's own.
        check_finite: end a step with the first op that makes a loss, an output of a
            stage or a gradient that is not finite, instead of letting NaN spread. It
            looks at every one of them, for which each op waits for its device: for
            finding out, not for every day. What REDUCE adds up is not looked at, nor,
            with a scaler, gradients; `evaluate` and `predict` look at nothing.
        optimizers: where the schedule has STEPs (`with_steps`), one for each stage, of
            its own parameters; None for a stage that learns nothing, and for other
            ranks'. As soon as a stage's gradient is whole, its optimizer's `step` is
            called, then its `zero_grad`. What stages share is in each one's, with the
            same numbers.
        recomputed: what of a stage an R of the schedule runs again, where that is not
            all of it, while the rest keeps its activations: a function of a module,
            as `lambda module: isinstance(module, Block)`; or for each stage the
            places of its layers, as `fit_selective` chooses them.

    Attributes:
        optimizers: as given.
        schedule: what is run, with the skips and ties of the stages.
        program: of it.
        routes: of the skips, by name.

    Raises:
        ScheduleError: `check` has findings.
        ModelError: another number of stages than the schedule's, an empty one, or
            one that shares a parameter across devices; with slices, a unit that
            mixes positions and takes no carry.
        ParameterError: another number of devices, an unknown loss scale, or
            recomputed layers that are not there or that no R runs again.
        UnsupportedError: ops that are not lowered to a program yet.
        RankError: the ranks were given different things, or another one failed.

    Source:
        Huang et al. 2018, arXiv:1811.06965 (synchronous micro-batches).
    """

    def __init__(
        self,
        stages: Sequence[StageModule | None] | nn.Sequential,
        schedule: Schedule,
        loss_fn: LossFn | None,
        devices: str | torch.device | Sequence[str | torch.device] = "cpu",
        *,
        loss_scale: LossScale = "rows",
        messages: Messages = "single",
        ranks: Ranks | Along | bool = False,
        data_parallel: Along | int = 1,
        check_finite: bool = False,
        optimizers: Optimizers | None = None,
        recomputed: Recomputed | None = None,
    ) -> None:
        self.optimizers = optimizers
        self._loss = Loss.of(loss_fn)
        self._ends: Ends | None = None
        self._trace: Trace | None = None
        self._losses: Losses | ToldLosses | None = None
        self._company: Alone | Ranked
        grid = _grid_of(ranks, data_parallel)
        if grid is not None and len(grid.rows) > 1:
            schedule = reduce_gradients(schedule)
        self.schedule = schedule
        with nullcontext() if grid is None else grid.ranks.together("its beginning"):
            check_scale(loss_scale)
            check_optimizers(optimizers, schedule)
            if isinstance(devices, (str, torch.device)):
                devices = [devices]
            self._shared = len(devices) == 1 and grid is None
            check_count(len(stages), schedule)
            self.routes = routes = routes_of(list(stages), grid)
            shares = shares_of(list(stages), grid)
            self.schedule = schedule = shares.onto(routes.onto(schedule))
            # On one device nothing is under way: a boundary tensor is handed over
            # when its consumer is next, and lies nowhere meanwhile but in one place.
            self.program: Program = lower(
                schedule,
                receives="late" if self._shared else "early",
                messages=messages,
            )
            self._devices = torch_devices(devices, schedule)
            self._sources = generators(*self._devices)
            training = Training(
                list(stages),
                self._loss,
                loss_scale,
                messages,
                check_finite,
                optimizers,
                recomputed,
                routes,
                shares,
            )
            self._company, self._runtime = (
                alone(training, self.program, self._devices)
                if grid is None
                else among(grid, training, self.program, self._devices)
            )

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise ModelError(
            "a Pipeline can be neither copied nor pickled: copy its stages, and make "
            "another of them"
        )

    @property
    def trace(self) -> Trace:
        """The measured trace of the last recorded step, in seconds.

        Raises:
            ParameterError: no step was recorded.
        """
        if self._ends is None:
            raise ParameterError("no step was recorded: call step(…, record=True)")
        if self._trace is None:
            self._trace = measured(self.program, *self._ends(), shared=self._shared)
        return self._trace

    def step(
        self,
        inputs: Value | None,
        targets: Value | None = None,
        *,
        keywords: Mapping[str, Any] = NO_KEYWORDS,
        scaler: GradScaler | None = None,
        record: bool = False,
        accumulate: bool = False,
    ) -> Tensor:
        """Forward and backward of one batch, micro-batch by micro-batch.

        The batch is cut along its first dimension as `torch.tensor_split` does, so
        it need not divide. Gradients add up in `.grad`, as with `loss.backward()`;
        there is no optimizer step, unless the schedule has STEPs.

        Args:
            inputs: shape (rows, …), or tuples, lists and dicts of such, with ints
                and the like among them, which every micro-batch gets; (rows,
                positions, …) where the schedule has slices, cut likewise along
                positions. A tensor that is not to be cut is marked `Whole`. From
                pinned memory a GPU copies when it comes to it: leave it as it is
                until the loss is known.
            targets: likewise, of as many rows (and positions); none if the loss takes
                none.
            keywords: further inputs by name, for every unit of any stage whose
                forward has a parameter of that name behind its first. A tensor must
                have the batch's rows, and is cut as it is, or be marked `Whole`.
            scaler: scales the losses for their backwards. If any gradient of any
                stage then is not finite, all are set to infinity, so that the scalers
                of all optimizers on all ranks skip their steps alike.
            record: measure a `trace`.
            accumulate: leave out the schedule's STEPs, so that gradients add up to
                those of the next step.

        Of several ranks all call it. Those that run a first stage need the inputs,
        those that run a last one the targets, and those with a unit that takes a
        keyword that keyword; elsewhere they are ignored. A rank's failure ends the
        step on all that are not through with it, and whatever these others begin next.

        Returns:
            The batch's loss, a detached scalar; the same on every rank.

        Raises:
            BatchError: fewer rows than micro-batches or positions than slices,
                targets of other ones, or keywords that no unit takes or that are
                neither cut nor marked `Whole`.
            LossError: a loss that is not a scalar, or weights that are none.
            ModelError: a stage that changes its input in place, or returns what
                cannot cross to the next.
            StepError: the model or the loss raised; the cause is chained. Or, with
                `check_finite`, something is not finite: op, stage and micro-batch.
            RankError: another rank failed, is lost, or no rank moves any more.
            ParameterError: called inside `torch.inference_mode`, or with a scaler
                though the schedule has STEPs.
        """
        if torch.is_inference_mode_enabled():
            raise ParameterError(
                "step computes gradients, and torch.inference_mode forbids them: call "
                "it outside"
            )
        if scaler is not None and self.optimizers is not None:
            raise ParameterError(WHOLE_FIRST.format("give no scaler"))
        if inputs is None and isinstance(self._company, Alone):
            raise BatchError("got no batch: only other ranks' parts may be None")
        batch = Batch(inputs, targets, keywords, scaler, accumulate)
        company, runtime = self._company, self._runtime
        with (
            company.together("the step"),
            torch.enable_grad(),
            step_seed(self._sources) as seed,
        ):
            check_needed(runtime.needs_keywords, keywords)
            if record:
                step, self._ends = company.timed_step(runtime, seed, batch)
                self._trace = None
            else:
                step = company.step(runtime, seed, batch)
            pass_on(inputs, step)
            if scaler is not None and company.overflowed(runtime, scaler):
                scaling.overflow(runtime.parameters)
        self._losses = step.all_losses
        return self._losses.total

    @property
    def instructions_s(self) -> float:
        """Seconds that the instructions of the last step took here.

        Of the last that was not recorded. What else a step takes is the ranks'
        agreement and the cutting of the batch.
        """
        return self._runtime.ran_s

    def link_rates(self) -> Rates:
        """Bytes per second between the ranks' devices; of several ranks all call it.

        Empty in one process.
        """
        if isinstance(self._company, Alone):
            return {}
        grid = self._company.grid
        with grid.ranks.together("the measurement of its links"):
            return link_rates(grid, self.program, self._devices[grid.device])

    @property
    def losses(self) -> list[Tensor]:
        """What each micro-batch added to the loss of the last step or `evaluate`.

        They sum to it, in this order; where there are slices, one for each of these.

        Raises:
            ParameterError: there was none.
        """
        if self._losses is None:
            raise ParameterError("there are no losses yet: call step or evaluate")
        return list(self._losses.parts)

    def evaluate(
        self,
        inputs: Value | None,
        targets: Value | None = None,
        *,
        keywords: Mapping[str, Any] = NO_KEYWORDS,
    ) -> Tensor:
        """The loss of one batch, without gradients and without recomputation.

        All modules are in eval mode meanwhile. Of several ranks all call it, with
        what they give to `step`.

        Args:
            inputs: as for `step`.
            targets: likewise.
            keywords: likewise.

        Returns:
            The batch's loss, as `step` would have it.

        Raises:
            BatchError, LossError, ModelError, StepError, RankError: as `step`.
        """
        alone = isinstance(self._company, Alone)
        if alone and targets is None and self._loss.needs_targets:
            raise BatchError("evaluate needs targets; predict does without")
        done = self._forward(Batch(inputs, targets, keywords), with_loss=True)
        self._losses = done.all_losses
        return self._losses.total

    def predict(
        self, inputs: Value | None, *, keywords: Mapping[str, Any] = NO_KEYWORDS
    ) -> Value | None:
        """What the last stage makes of one batch, as `evaluate` runs it.

        Args:
            inputs: as for `step`.
            keywords: likewise.

        Returns:
            The outputs of all micro-batches, joined: tensors by rows, scalars to one
            number for each, and of what is no tensor a list of each one's. None on
            ranks without the last stage; where several have it, of their own
            micro-batches.

        Raises:
            BatchError, ModelError, StepError, RankError: as `step`.
        """
        done = self._forward(Batch(inputs, None, keywords), with_loss=False)
        return joined(done.outputs) if done.outputs else None

    def _forward(self, batch: Batch, *, with_loss: bool) -> Step:
        """The forwards alone."""
        if batch.inputs is None and isinstance(self._company, Alone):
            raise BatchError("got no inputs: only other ranks' may be None")
        stages = self._runtime.stages
        modules = [module for stage in stages for module in stage.modules]
        with (
            self._company.together("the evaluation"),
            evaluating([*modules, *self._loss.modules]),
            torch.no_grad(),
            step_seed(self._sources) as seed,
        ):
            check_needed(self._runtime.needs_keywords, batch.keywords)
            return self._company.forward(
                self._runtime, seed, batch, with_loss=with_loss
            )

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The entries of `model.state_dict()` that belong to the stages here.

        For checkpoints: all ranks' together are the model's, under its own keys, and
        load into any other partition of it, or into the model itself.

        Args:
            model: whose modules the stages are made of.
        """
        here = {
            id(tensor)
            for stage in self._runtime.stages
            for module in stage.original.modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
        }
        entries = model.state_dict(keep_vars=True)
        return {key: x.detach() for key, x in entries.items() if id(x) in here}

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> float:
        """Clip the norm of all gradients of the model, those of other ranks included.

        As `torch.nn.utils.clip_grad_norm_` on the whole model: each parameter counts
        once, however many stages, replicas or ranks hold it. Of several ranks all call
        it.

        Args:
            max_norm: what the norm is at most afterwards.
            norm_type: 2 for the Euclidean, `math.inf` for the largest entry.

        Returns:
            The norm before, the same on every rank.

        Raises:
            ParameterError: a norm that is not above 0, or a schedule with STEPs.
            RankError: as `step`.
        """
        clipping.check_norm(max_norm, norm_type)
        if self.optimizers is not None:
            raise ParameterError(WHOLE_FIRST.format("clip no norm"))
        with self._company.together("clipping"):
            found = self._company.norms(self._runtime, norm_type)
        norm = clipping.total(found, norm_type)
        clipping.scale(self._runtime.parameters, norm, max_norm)
        return norm


def _grid_of(ranks: Ranks | Along | bool, data_parallel: Along | int) -> Grid | None:
    if ranks is not False:
        return Grid.of(ranks, data_parallel)
    if data_parallel != 1:
        raise ParameterError("data_parallel needs ranks: replicas are processes")
    return None
