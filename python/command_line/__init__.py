"""The command `distill-kernels`: what the library does, without writing a program. Each of its commands has a module here.

It imports `cache`, `call`, `divergences`, `measuring`, `models`, `runs` and `user_error`.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version

from distill_kernels.api.command_line import bench, cache, demo, doctor, plan, train
from distill_kernels.api.command_line.arguments import Parser
from distill_kernels.api.user_error import UserError

COMMANDS = (demo, train, cache, bench, plan, doctor)
INTERRUPTED = 130  # what shells report for a process ended by SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what the user can put right, with one sentence on stderr; 130 if interrupted."""
    given = parser().parse_args(arguments)
    try:
        given.run(given)
    except UserError as error:
        print(f"distill-kernels: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"distill-kernels: interrupted; {given.if_interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0


def parser() -> Parser:
    whole = Parser(prog="distill-kernels", description="Knowledge-distillation losses that never hold the logits.")
    whole.add_argument("--version", action="version", version=version("distill_kernels"))
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return whole
