"""Terms: what a tensor is computed from, with no numbers in it.

A term is a function's name and the terms it was applied to, as in f(f(x)). Equal
terms are one int (hash-consing; Ershov 1958), so that a term of thousands of ops is
compared in one step. With A(s, x, kv) all that stage s's forward computes from its
input x and the keys and values of earlier slices, for one micro-batch and slice::

    batch(m, q)        a micro-batch's rows
    act(s, m, q, x, kv, …)  the forward; m and q key its randomness and its targets;
                       last comes what skip connections brought
    skip(k, act)       what it hands on over skip connection k
    out(act)           its output, the next stage's input
    loss(m, q, out)    what the last stage makes of its output and the targets
    weighed(m, q, loss)  that times the weight of the micro-batch and slice, w_m / Σw
    dloss(weighed)     the gradient of the last stage's output, which so has it once
    dx(s, act, g)      the gradient of its input, from that of its output
    dskip(k, act, g)   that of what skip connection k brought
    and(g, …)          gradients of an output and of what went over skips
    stash(old, act, g) what is left for the weights' gradient, once g is known
    grad(s, stash, x, …)  the gradient of the weights; last comes what skips brought
    add(sum, grad)     an accumulator after one more of them
    sum(chain, …)      accumulators of all replicas, reduced
    part(chain, …)     of what stages share, those of one device's stages, added up
    tie(k, part, …)    and these of all devices: the gradient of what tie k shares

A whole backward is I and W at once, so both ways of writing it are one term.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeproof.sched.ir import Schedule, Skip

Key = tuple[object, ...]

NOTHING = 0
"""The term of an operand that there is not: a first slice's keys."""


@dataclass
class Terms:
    """Every term there is, each under its number.

    Attributes:
        numbers: name and operands → term.
        keys: the reverse.
    """

    numbers: dict[Key, int] = field(default_factory=lambda: {("nothing",): NOTHING})
    keys: list[Key] = field(default_factory=lambda: [("nothing",)])

    def make(self, *key: object) -> int:
        """The term of a function applied to terms."""
        number = self.numbers.setdefault(key, len(self.keys))
        if number == len(self.keys):
            self.keys.append(key)
        return number

    def of_loss(self, micro_batch: int, part: int, act: int) -> int:
        """The gradient that a backward of the last stage starts from.

        The forward that made `act` took the loss of its output, with targets and
        weight of its own micro-batch and slice.
        """
        out = self.make("out", act)
        loss = self.make("loss", micro_batch, part, out)
        return self.make("dloss", self.make("weighed", micro_batch, part, loss))

    def chain(self, term: int) -> list[int]:
        """What an accumulator added up, in order; it may begin with what is no sum."""
        added: list[int] = []
        while term != NOTHING:
            match self.keys[term]:
                case ("add", int(rest), int(last)):
                    added.append(last)
                    term = rest
                case _:
                    added.append(term)
                    break
        return added[::-1]


@dataclass(frozen=True)
class Reference:
    """The terms of an unpipelined step, from the chain of stages alone.

    Attributes:
        inputs, activations, output_grads, stashes, gradients: at
            (micro-batch · slices + slice) · stages + stage, the term of it.
        skips: the schedule's.
        skip_inputs, skip_grads: of each skip, at micro-batch · slices + slice, what it
            brings, and the gradient of that.
    """

    stages: int
    slices: int
    inputs: list[int]
    activations: list[int]
    output_grads: list[int]
    stashes: list[int]
    gradients: list[int]
    skips: tuple[Skip, ...]
    skip_inputs: list[list[int]]
    skip_grads: list[list[int]]

    @classmethod
    def of(cls, terms: Terms, schedule: Schedule) -> Reference:
        """Of a step with this many stages, micro-batches and slices."""
        stages, slices = schedule.stages, schedule.slices
        size = stages * slices * schedule.all_micro_batches
        inputs, activations, output_grads, stashes, gradients = (
            [NOTHING] * size for _ in range(5)
        )
        rows = [NOTHING] * (slices * schedule.all_micro_batches)
        brought, back = ([list(rows) for _ in schedule.skips] for _ in range(2))
        columns = inputs, activations, output_grads, stashes, gradients
        result = cls(stages, slices, *columns, schedule.skips, brought, back)
        for micro_batch in range(schedule.all_micro_batches):
            for part in range(slices):
                result._forward(terms, micro_batch, part)
            for part in reversed(range(slices)):
                result._backward(terms, micro_batch, part)
        return result

    def at(self, stage: int, micro_batch: int, part: int) -> int:
        """The place of a micro-batch and slice at a stage, in each list."""
        return (micro_batch * self.slices + part) * self.stages + stage

    def row(self, micro_batch: int, part: int) -> int:
        """The place of a micro-batch and slice in lists of skips."""
        return micro_batch * self.slices + part

    def leaving(self, stage: int) -> list[int]:
        """The skips that begin at a stage."""
        return [k for k, (source, _) in enumerate(self.skips) if source == stage]

    def coming(self, stage: int) -> list[int]:
        """Those that end there."""
        return [k for k, (_, target) in enumerate(self.skips) if target == stage]

    def _forward(self, terms: Terms, micro_batch: int, part: int) -> None:
        row = self.row(micro_batch, part)
        x = terms.make("batch", micro_batch, part)
        for stage in range(self.stages):
            place = self.at(stage, micro_batch, part)
            kv = self.activations[place - self.stages] if part else NOTHING
            brought = [self.skip_inputs[k][row] for k in self.coming(stage)]
            act = terms.make("act", stage, micro_batch, part, x, kv, *brought)
            self.inputs[place], self.activations[place] = x, act
            x = terms.make("out", act)
            for k in self.leaving(stage):
                self.skip_inputs[k][row] = terms.make("skip", k, act)

    def _backward(self, terms: Terms, micro_batch: int, part: int) -> None:
        row = self.row(micro_batch, part)
        last = self.activations[self.at(self.stages - 1, micro_batch, part)]
        g = terms.of_loss(micro_batch, part, last)
        for stage in reversed(range(self.stages)):
            place = self.at(stage, micro_batch, part)
            act = self.activations[place]
            self.output_grads[place] = g
            if leaving := self.leaving(stage):
                g = terms.make("and", g, *(self.skip_grads[k][row] for k in leaving))
            if part + 1 < self.slices:
                g = terms.make("with", g, self._passed_on(terms, place + self.stages))
            self.stashes[place] = terms.make("stash", act, act, g)
            coming = self.coming(stage)
            brought = [self.skip_inputs[k][row] for k in coming]
            self.gradients[place] = terms.make(
                "grad", stage, self.stashes[place], self.inputs[place], *brought
            )
            for k in coming:
                self.skip_grads[k][row] = terms.make("dskip", k, act, g)
            g = terms.make("dx", stage, act, g)

    def _passed_on(self, terms: Terms, later: int) -> int:
        """What the backward of a later slice leaves for the keys and values."""
        _, _, act, g = terms.keys[self.stashes[later]]
        return terms.make("dx", later % self.stages, act, g)

    def names(self) -> dict[int, str]:
        """What each of its terms is, in words."""
        result = {NOTHING: "nothing"}
        for what, column in (
            ("the gradient of stage {}'s weights", self.gradients),
            ("what stage {} keeps for its weights' gradient", self.stashes),
            ("stage {}'s activations", self.activations),
            ("the gradient of stage {}'s output", self.output_grads),
            ("the input of stage {}", self.inputs),
        ):
            for place, term in enumerate(column):
                if term == NOTHING:
                    continue
                row, stage = divmod(place, self.stages)
                result[term] = f"{what.format(stage)} for {self.of_row(row)}"
        for what, columns in (
            ("the gradient of what goes from stage {} to {}", self.skip_grads),
            ("what goes from stage {} to {}", self.skip_inputs),
        ):
            for skip, terms_of in zip(self.skips, columns):
                for row, term in enumerate(terms_of):
                    result[term] = f"{what.format(*skip)} for {self.of_row(row)}"
        return result

    def of_row(self, row: int) -> str:
        """A micro-batch, with its slice where there are several."""
        micro_batch, part = divmod(row, self.slices)
        where = f", slice {part}" if self.slices > 1 else ""
        return f"micro-batch {micro_batch}{where}"
