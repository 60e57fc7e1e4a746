"""The front door on the command line.

Only click is imported until a command runs, so that `--help` is immediate; each
command then loads what it needs, and only `run` and `verify` load torch.
"""

from pipeproof.cli.app import main as main
