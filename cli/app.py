"""The group of all commands, and how errors leave it.

Exit status: 0 all well; 1 findings (a broken schedule, a deadlock, gradients
that differ); 2 usage, parameters, unreadable input; 130 interrupted; 141 the
reader of our output went away.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click

from pipeproof.cli import commands

FINDINGS, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


class Refusal(click.ClickException):
    """A message for the user about what was asked for."""

    exit_code = USAGE


class Broken(click.ClickException):
    """A message about a schedule that is wrong."""

    exit_code = FINDINGS


class Front(click.Group):
    """A group whose commands' errors become messages, never tracebacks."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; see the module for the exit status."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except MemoryError:
            message = "out of memory: fewer devices or micro-batches need less"
            raise Refusal(message) from None
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise Refusal(_of_file(error)) from None
            # What is still buffered has nowhere to go, nor has a complaint.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(BROKEN_PIPE) from None
        except Exception as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            raise refusal from None


def _refusal(error: Exception) -> click.ClickException | None:
    """What to say to the user; None if the fault is ours."""
    from pipeproof.sched.errors import PipeproofError, ScheduleError

    if not isinstance(error, PipeproofError):
        return None
    # Simulating may not have been loaded, and then it has not failed either.
    engine = sys.modules.get("pipeproof.sim.engine")
    finding = isinstance(error, ScheduleError) or (
        engine is not None and isinstance(error, engine.DeadlockError)
    )
    return Broken(str(error)) if finding else Refusal(str(error))


def _of_file(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


@click.group(
    cls=Front,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
    epilog="`pipeproof COMMAND --help` has an example of each.",
)
@click.version_option(package_name="pipeproof")
def main() -> None:
    """Write, check, predict and run pipeline-parallel training schedules.

    Data goes to standard output, progress to standard error. Exit status 0: all
    well; 1: findings; 2: usage, parameters or unreadable input.
    """


for _command in commands.ALL:
    main.add_command(_command)
