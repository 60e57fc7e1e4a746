"""Operations, bound to tensors: one function for each.

The output of a stage is detached, and marked as wanting a gradient where the
output did: it is the leaf of the next stage's graph. So each stage has a graph
of its own, and a backward needs nothing but the two ends of it.

What a slice carries on to the next crosses that boundary in the same way: it is
a second output of F(m,q) and a second leaf of F(m,q+1), whose gradient B(m,q+1)
leaves for B(m,q). What goes over a skip connection does likewise: it is one more
output of F(s,m), and one more leaf of F(t,m).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeproof.exec.backwards import Backwards
from pipeproof.exec.forwards import Forwards
from pipeproof.exec.replicas import Run
from pipeproof.exec.workspace import Workspace
from pipeproof.sched import Kind, Op
from pipeproof.sched.instructions import Instruction


class Binder:
    """Makes the functions.

    Args:
        space: where they find what they work on, and leave what they make.
        loss_fn: (output of the last stage, targets) → scalar.
    """

    def __init__(self, space: Workspace, loss_fn: Callable[[Any, Any], Any]) -> None:
        self._forwards, self._backwards = Forwards(space, loss_fn), Backwards(space)

    def bind(self, op: Op, instruction: Instruction) -> Run:
        """What an op does."""
        match op.kind:
            case Kind.F:
                return self._forwards.bind(op, instruction)
            case Kind.R:
                return self._forwards.bind_recompute(op, instruction)
            case Kind.B:
                return self._backwards.bind(op, instruction)
            case Kind.I:
                return self._backwards.bind_input_grad(op, instruction)
            case Kind.W:
                return self._backwards.bind_weight_grad(op, instruction)
        raise AssertionError(f"not bound: {op}")

    def bind_output(self, op: Op, instruction: Instruction) -> Run:
        """What a forward does if no backward follows."""
        return self._forwards.bind_output(op, instruction)
