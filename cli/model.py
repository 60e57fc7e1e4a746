"""`--model`: an example of ours, or the user's own MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeproof.sched import ParameterError, Schedule, UnsupportedError

if TYPE_CHECKING:
    from pipeproof.exec import Example

ROWS = 4
"""Of each micro-batch, where nothing else is said."""


def require_torch() -> None:
    """Refuse in one line where torch is not installed.

    Raises:
        UnsupportedError: it is not.
    """
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UnsupportedError(
            "running a schedule needs torch: pip install 'pipeproof[exec]'"
        ) from None


def load_example(
    model: str, schedule: Schedule, batch: int | None, dtype: str, seed: int
) -> Example:
    """Stages, a batch and a loss for a schedule.

    Args:
        model: `mlp`, `gpt` or MODULE:FUNCTION.
        schedule: says how many stages there are to be.
        batch: rows; default `ROWS` for each micro-batch.
        dtype: a name in torch.
        seed: of the model's parameters and data.

    Raises:
        ParameterError: no such model, or one that fails or returns something else.
    """
    import torch

    from pipeproof.exec import EXAMPLES

    rows = ROWS * schedule.all_micro_batches if batch is None else batch
    if rows < 1:
        raise ParameterError(f"batch must be at least 1, got {rows}")
    make = EXAMPLES.get(model) or _own(model, list(EXAMPLES))
    if model in EXAMPLES:
        make = partial(make, slices=schedule.slices)
    try:
        made = make(
            stages=schedule.stages, batch=rows, dtype=getattr(torch, dtype), seed=seed
        )
    except Exception as error:
        if model in EXAMPLES:
            raise
        raise ParameterError(_blame(model, error)) from error
    return _example(model, made)


def _own(model: str, ours: list[str]) -> Callable[..., Any]:
    name, colon, function = model.rpartition(":")
    if not colon or not name or not function:
        raise ParameterError(
            f"model must be one of {', '.join(ours)}, or MODULE:FUNCTION, got {model!r}"
        )
    try:
        made = getattr(_module(name), function, None)
    except Exception as error:
        raise ParameterError(_blame(name, error)) from error
    if not callable(made):
        raise ParameterError(f"{name} has no function {function!r}")
    return made  # type: ignore[no-any-return]


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        # Behind all else: in some directories, what lies around would hide the
        # standard library.
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def _blame(model: str, error: Exception) -> str:
    """The error and its place, since the user sees no traceback."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"--model {model}: {type(error).__name__}: {error} "
        f"({frame.filename}, line {frame.lineno})"
    )


def _example(model: str, made: Any) -> Example:
    from torch import nn

    from pipeproof.exec import Example

    names = ("stages", "inputs", "targets", "loss_fn")
    if all(hasattr(made, name) for name in names):
        parts = [getattr(made, name) for name in names]
    elif isinstance(made, tuple) and len(made) == len(names):
        parts = list(made)
    else:
        raise ParameterError(
            f"--model {model} must return {', '.join(names)}, returned "
            f"{type(made).__name__}"
        )
    stages = [
        nn.Sequential(*stage) if isinstance(stage, (list, tuple)) else stage
        for stage in parts[0]
    ]
    return Example(stages, *parts[1:])
