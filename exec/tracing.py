"""Any module → units: what its forward calls, one after the other.

torch.fx traces the model's forward, and into modules only where a cut is to fall
within them; all others are called whole, whatever their forwards do. Each call of a
module then is a unit, with the operations between it and the next::

    def forward(self, x, mask):          unit 0   h = embed(x)                → h
        h = self.embed(x)                         h is a skip as well: unit 2 takes it
        y = self.block(h, mask)          unit 1   y = block(h, mask)          → y
        return self.head(y) + h          unit 2   z = head(y); z + h          → output

A unit hands on, as one value, what it computed and the next one uses. What later ones
use it gives as skips (see `skips`), which go to their stages and to no others; its own
input too, where that is the model's. Inputs of the model
behind its first are keyword inputs, which every unit gets that uses them; an optional
one is there if it is named, and else has its default, since `if mask is None` is
decided when the forward is traced.

Units share the model's modules, and their state_dicts have its keys.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from torch import fx, nn

from pipeproof.exec.errors import ModelError
from pipeproof.exec.units import is_plain
from pipeproof.sched.errors import ParameterError


def trace(
    model: nn.Module,
    at: Sequence[str] = (),
    *,
    keywords: Sequence[str] = (),
    name: str = "",
) -> list[list[nn.Module]]:
    """Cut a model into stages of units, at modules given by name.

    Args:
        model: its forward calls its modules; what it does besides must not depend on
            values, nor on whether it is in training mode. Any `*args` and `**kwargs`
            get nothing.
        at: names, as in `named_modules`, of the modules that begin the second and
            later stages, in the order in which they are called.
        keywords: names of optional inputs that every step will give.
        name: of the model, in the names of its skips; default its class. Two models
            of one pipeline must have different ones.

    Returns:
        Stages for `Pipeline`, one more than names. `sum(trace(model), [])` are units
        to profile and to cut elsewhere.

    Raises:
        ModelError: a name that is none, is not called or not in that order, or a
            forward that cannot be traced.
        ParameterError: a keyword that is no optional input.
    """
    known = dict(model.named_modules())
    for name in at:
        if name not in known or not name:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"the model has no module {name!r}{hint}")
    fixed = _fixed(model, keywords)
    graph = _traced(model, at, fixed)
    starts = [i for i, node in enumerate(graph.nodes) if node.op == "call_module"]
    nodes = list(graph.nodes)
    if not starts:
        raise ModelError(f"{type(model).__name__} calls no module: nothing can be cut")
    cuts = _cuts([nodes[i].target for i in starts], at)
    called = name or type(model).__name__
    units = _Units(model, graph, called).build([0, *starts[1:], len(nodes)])
    return [units[first:last] for first, last in pairwise([0, *cuts, len(units)])]


FURTHER = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
"""Parameters for any number of inputs."""


class _Tracer(fx.Tracer):
    """Goes into modules that a cut falls within, and into plain sequences."""

    def __init__(self, at: Sequence[str]) -> None:
        super().__init__()
        self._at = at

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether it is called whole."""
        within = any(name.startswith(f"{module_qualified_name}.") for name in self._at)
        return not within and not is_plain(m)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The forward, and what stands for its inputs."""
        return super().create_args_for_root(
            _without_further(root_fn), is_module, concrete_args
        )


def _without_further(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward whose `*args` and `**kwargs` get nothing, as a pipeline gives them.

    fx would hand them to it as values that cannot be looked into.
    """
    parameters = list(inspect.signature(forward).parameters.values())
    own = [p for p in parameters if p.kind not in FURTHER]
    if len(own) == len(parameters) or parameters[1].kind in FURTHER:
        return forward
    given = [f"{p.name}={p.name}" if p.kind == p.KEYWORD_ONLY else p.name for p in own]
    heads = ", ".join(p.name for p in own)
    names: dict[str, Any] = {"__forward": forward}
    exec(f"def named({heads}): return __forward({', '.join(given)})", names)
    named: Callable[..., Any] = names["named"]
    return named


def _fixed(model: nn.Module, given: Sequence[str]) -> dict[str, Any]:
    """The optional inputs that are not given, with their defaults."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    nothing = inspect.Parameter.empty
    optional = {p.name: p.default for p in parameters if p.default is not nothing}
    for name in given:
        if name not in optional:
            raise ParameterError(
                f"{name!r} is no optional input of {type(model).__name__}: found "
                f"{', '.join(map(repr, optional)) or 'none'}"
            )
    return {name: value for name, value in optional.items() if name not in given}


def _traced(model: nn.Module, at: Sequence[str], fixed: dict[str, Any]) -> fx.Graph:
    """In both modes, which must not differ: what fx saw of them is fixed."""
    modes = [(module, module.training) for module in model.modules()]
    graphs = []
    try:
        for training in (True, False):
            model.train(training)
            graphs.append(_Tracer(at).trace(model, fixed))
    except Exception as error:
        raise ModelError(
            f"the forward of {type(model).__name__} cannot be traced: {error}\n"
            "Cut it between other modules, or give its layers as a list."
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    if str(graphs[0]) != str(graphs[1]):
        raise ModelError(
            f"the forward of {type(model).__name__} does other things in training than "
            "in eval mode, outside of the modules that it calls: have a module do "
            "that, nn.Dropout instead of functional.dropout say"
        )
    # In the order of the parameters; fx gives those that are fixed other names.
    entries = [node for node in graphs[0].nodes if node.op == "placeholder"]
    named = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in named if p.kind not in FURTHER]
    for name, node in zip(names, entries):
        if name in fixed:
            _erase(graphs[0], node)
    return graphs[0]


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """With all that uses it: of a fixed input, checks that it has that value."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _cuts(called: Sequence[str], at: Sequence[str]) -> list[int]:
    """Of each name, the unit that its first call begins."""
    cuts: list[int] = []
    for name in at:
        within = [n == name or n.startswith(f"{name}.") for n in called]
        if not any(within):
            raise ModelError(f"the model never calls its module {name!r}")
        cuts.append(within.index(True))
        if cuts[-1] == 0:
            raise ModelError(
                f"{name!r} is called first, and begins the first stage anyway: leave "
                "it out"
            )
        if len(cuts) > 1 and cuts[-1] <= cuts[-2]:
            raise ModelError(
                f"{name!r} is called before {at[len(cuts) - 2]!r}: name modules in the "
                "order in which they are called"
            )
    return cuts


class _Unit(fx.GraphModule):
    """A unit, which says of skips what it gives and takes. Its copies say it too."""

    gives_skips: tuple[str, ...] = ()
    takes_skips: Mapping[str, str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Unit:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, _Unit)
        twin.gives_skips, twin.takes_skips = self.gives_skips, self.takes_skips
        return twin


@dataclass(frozen=True)
class _Plan:
    """A unit to be made.

    Attributes:
        nodes: what it computes.
        before, after: what the unit before hands on to it, and it to the next.
        gives, takes: what goes to units further on, and comes from such.
    """

    nodes: list[fx.Node]
    before: list[fx.Node]
    after: list[fx.Node]
    gives: list[fx.Node]
    takes: list[fx.Node]


class _Units:
    """Makes units of a graph.

    Args:
        model: that was traced.
        graph: of it.
        name: in front of the names of skips.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, name: str) -> None:
        self._model, self._name = model, name
        self._nodes = list(graph.nodes)
        entries = [node for node in self._nodes if node.op == "placeholder"]
        if not entries:
            raise ModelError(f"{type(model).__name__} takes no input")
        self._entry, self._keywords = entries[0], entries[1:]
        for node in entries:
            if str(node.target).startswith("*"):
                raise ModelError(
                    f"the forward of {type(model).__name__} takes {node.target}: give "
                    "its inputs names"
                )

    def build(self, starts: Sequence[int]) -> list[nn.Module]:
        """One unit from each of these nodes to the next."""
        unit_of: dict[fx.Node, int] = {self._entry: -1}
        for unit, (first, last) in enumerate(pairwise(starts)):
            for node in self._nodes[first:last]:
                if node.op not in ("placeholder", "get_attr"):
                    unit_of[node] = unit
        # The model's own input is handed on by the first unit, which gets it.
        given_by = {node: max(unit, 0) for node, unit in unit_of.items()}
        used_in = {
            node: {unit_of[user] for user in node.users} - {given_by[node]}
            for node in unit_of
        }
        units: list[nn.Module] = []
        for unit, (first, last) in enumerate(pairwise(starts)):
            near = [
                n for n in unit_of if given_by[n] == unit and unit + 1 in used_in[n]
            ]
            before = [
                n for n in unit_of if given_by[n] == unit - 1 and unit in used_in[n]
            ]
            plan = _Plan(
                [n for n in self._nodes[first:last] if n in given_by],
                before if unit else [self._entry],
                near,
                [
                    n
                    for n in unit_of
                    if given_by[n] == unit and any(u > unit + 1 for u in used_in[n])
                ],
                [n for n in unit_of if given_by[n] < unit - 1 and unit in used_in[n]],
            )
            units.append(self._unit(plan, is_last=last == len(self._nodes)))
        return units

    def _unit(self, plan: _Plan, *, is_last: bool) -> nn.Module:
        """One that takes what was computed before, and gives what is used after."""
        graph = fx.Graph()
        value = graph.placeholder(self._own_name())
        copies: dict[fx.Node, fx.Node] = {}
        for node in self._keywords:
            if any(user in plan.nodes for user in node.users):
                copies[node] = graph.placeholder(str(node.target))
        for node in plan.takes:
            copies[node] = graph.placeholder(node.name)
        for place, node in enumerate(plan.before):
            copies[node] = value
            if len(plan.before) > 1:
                copies[node] = graph.call_function(operator.getitem, (value, place))

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:  # of the model's own: no value that crosses
                assert node.op == "get_attr"
                copies[node] = graph.node_copy(node)
            return copies[node]

        for node in plan.nodes:
            if node.op not in ("output", "placeholder"):
                copies[node] = graph.node_copy(node, copied)
            elif node.op == "output":
                graph.output(fx.map_arg(node.args[0], copied))
        if not is_last:
            parts = list(map(copied, plan.after))
            output: Any = (
                tuple(parts) if len(parts) > 1 else parts[0] if parts else None
            )
            given = {self._skip(node): copied(node) for node in plan.gives}
            graph.output((output, given) if given else output)
        unit = _Unit(self._model, graph)
        unit.gives_skips = tuple(map(self._skip, plan.gives))
        unit.takes_skips = {node.name: self._skip(node) for node in plan.takes}
        return unit

    def _skip(self, node: fx.Node) -> str:
        return f"{self._name}.{node.name}"

    def _own_name(self) -> str:
        """For what is handed on, unlike any keyword's."""
        name, taken = "value", {str(node.target) for node in self._keywords}
        taken |= {node.name for node in self._nodes}
        while name in taken:
            name = f"_{name}"
        return name
