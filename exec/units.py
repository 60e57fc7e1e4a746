"""Units, the smallest pieces a partition may cut between: what each takes and gives.

A stage is a module, or a sequence of them, nested as it likes; its units are what is
left when every plain sequence is taken apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pipeproof.exec import tensors
from pipeproof.exec.batch import Value
from pipeproof.exec.errors import ModelError
from pipeproof.exec.skips import Offer, gives_of, said_to_take

StageModule = nn.Module | list[nn.Module] | tuple[nn.Module, ...]


def units_of(stage: StageModule) -> list[nn.Module]:
    """The smallest pieces that a partition may cut between.

    A sequence of modules and an `nn.Sequential` are taken apart, all the way
    down. A Sequential with a forward or hooks of its own is one unit: only
    calling it whole runs them.
    """
    if isinstance(stage, nn.Module) and not is_plain(stage):
        return [stage]
    return [unit for part in parts_of(stage) for unit in units_of(part)]


def parts_of(stage: StageModule) -> list[nn.Module]:
    """What a stage is a sequence of; of one that is none, itself."""
    if not isinstance(stage, nn.Module):
        return list(stage)
    if not is_plain(stage):
        return [stage]
    # Not children(), which has a module that is called twice once.
    return [part for part in stage._modules.values() if part is not None]


def taken_apart(stage: StageModule) -> list[tuple[StageModule, list[nn.Module]]]:
    """Each sequence that `units_of` takes apart, and what is in it."""
    if isinstance(stage, nn.Module) and not is_plain(stage):
        return []
    parts = parts_of(stage)
    return [(stage, parts), *(pair for part in parts for pair in taken_apart(part))]


def is_still(stage: StageModule, parts: list[nn.Module]) -> bool:
    """Whether a sequence that was taken apart has these parts, and no hooks."""
    if isinstance(stage, nn.Module) and not is_plain(stage):
        return False
    return parts_of(stage) == parts


def modules_of(number: int, stage: StageModule | None) -> list[nn.Module]:
    """The modules that a stage was given as.

    Raises:
        ModelError: None, or something that is no module.
    """
    if stage is None:
        raise ModelError(f"stage {number} is None: only other ranks' may be")
    modules = list(stage) if isinstance(stage, (list, tuple)) else [stage]
    for part in modules:
        if not isinstance(part, nn.Module):
            raise ModelError(
                f"stage {number} must be a module or a sequence of modules, found "
                f"{type(part).__name__}"
            )
    return modules


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a sequence of others, and calling it does nothing else."""
    if isinstance(module, nn.ModuleList):
        return True
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and not module._parameters
        and not module._buffers
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def takes_carry(unit: nn.Module) -> bool:
    """Whether a unit needs what the earlier slices of a micro-batch computed.

    One says so with an attribute `takes_carry = True`. Where micro-batches are cut
    into slices it is called with its input and a carry, `()` for the first slice,
    and returns its output and the carry for the next: a tensor, or a tuple of
    tensors, nested if it likes. Where they are whole it is called as any other.
    """
    return bool(getattr(unit, "takes_carry", False))


def check_sliced(units: Sequence[nn.Module]) -> None:
    """Refuse units that would see a slice and take it for the whole sequence.

    Raises:
        ModelError: one that takes a carry inside one that does not, or one that is
            known to mix positions.
    """
    mixing = nn.MultiheadAttention, nn.RNNBase, nn.modules.batchnorm._BatchNorm
    for number, unit in enumerate(units):
        if takes_carry(unit):
            continue
        for part in unit.modules():
            if takes_carry(part):
                raise ModelError(
                    f"unit {number}, {type(unit).__name__}, holds "
                    f"{type(part).__name__}, which takes a carry: a unit that does "
                    "must stand in the stage's sequence itself, or be given its carry "
                    "by one that takes it"
                )
            if isinstance(part, mixing):
                raise ModelError(
                    f"unit {number}, {type(unit).__name__}, has {type(part).__name__}, "
                    "which mixes positions, and a slice holds only some: give it a "
                    "carry (takes_carry = True), or use a schedule without slices"
                )


def keywords_of(unit: nn.Module) -> frozenset[str]:
    """The keyword inputs that a unit takes: parameters of its forward, by name.

    Not the first one, which is its input, nor the carry, nor what `**kwargs` would
    take without a name.
    """
    return frozenset(parameter.name for parameter in _named(unit))


def keywords_needed(unit: nn.Module) -> frozenset[str]:
    """Those without which its forward cannot be called; a hook may give it some."""
    if unit._forward_pre_hooks:
        return frozenset()
    return frozenset(p.name for p in _named(unit) if p.default is p.empty)


def _named(unit: nn.Module) -> list[inspect.Parameter]:
    # torch.compile's wrapper takes anything, and hands it on.
    forward = getattr(unit, "_orig_mod", unit).forward
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):  # a forward written in C
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    positional = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    own = {p.name for p in positional[: 2 if takes_carry(unit) else 1]}
    return [p for p in parameters if p.kind in named and p.name not in own]


def takes_of(unit: nn.Module) -> dict[str, str]:
    """The skip that each of a unit's keyword parameters takes, if any gives it.

    That of its own name, unless the unit says another in its `takes_skips`, a dict.

    Raises:
        ModelError: it says so of what is no parameter of its forward.
    """
    names, said = sorted(keywords_of(unit)), said_to_take(unit)
    for name in said:
        if name not in names:
            raise ModelError(
                f"{type(unit).__name__} has takes_skips with {name!r}: expected "
                "parameters of its forward behind its first, found "
                f"{', '.join(map(repr, names)) or 'none'}"
            )
    return {name: said.get(name, name) for name in names}


def offers_of(stage: StageModule) -> list[Offer]:
    """Of each unit, the skips that it gives, takes if they are given, and needs.

    Raises:
        ModelError: as `gives_of` and `takes_of`.
    """
    return [
        (gives_of(unit), [*takes_of(unit).values()], [*said_to_take(unit).values()])
        for unit in units_of(stage)
    ]


def carried_on(
    unit: nn.Module,
    call: Callable[..., Any],
    value: Value,
    carry: Any,
    keywords: Mapping[str, Any],
) -> tuple[Value, Any]:
    """A unit on a slice, with the carry that it takes and the one that it leaves.

    Args:
        unit: to be called.
        call: what is called in its place.
        value: its input.
        carry: what it left of the slice before.
        keywords: its keyword inputs.

    Raises:
        ModelError: it returns something else than an output and a carry.
    """
    found = call(value, carry, **keywords)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ModelError(
            f"{type(unit).__name__} takes a carry: called with (input, carry) it must "
            f"return (output, carry), returned {type(found).__name__}"
        )
    output, left = found
    _check_carry(unit, left)
    return output, tensors.aside(left)


def _check_carry(unit: nn.Module, left: Any) -> None:
    if type(left) is tuple:
        for part in left:
            _check_carry(unit, part)
    elif not isinstance(left, Tensor):
        raise ModelError(
            f"{type(unit).__name__} leaves a {type(left).__name__} in its carry: a "
            "carry is a tensor, or a tuple of tensors, nested or not"
        )
