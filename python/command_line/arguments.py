"""What the parsers of the commands share: their look, and the types and names of arguments."""

import argparse
from collections.abc import Callable

import torch

from distill_kernels import divergences, problem

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in problem.DTYPES}


class Parser(argparse.ArgumentParser):
    """Without the usage, which is longer than a screen and hides the one sentence that matters."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what it takes\n")


def add_command(
    commands, name: str, run: Callable, *, summary: str, description: str, example: str, if_interrupted: str = "nothing was written"
) -> Parser:
    """The parser of a command. `run` gets the parsed arguments, and raises UserError for what the user can put right.

    if_interrupted: what is said after "interrupted; ".
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Options that are not given stay absent, so that their defaults are written once, where they are used.
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run, if_interrupted=if_interrupted)
    return parser


def device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"torch knows no device {name!r}") from error


def divergence_names() -> list[str]:
    """Those that a name is enough for."""
    return sorted(name for name, family in divergences.FAMILIES.items() if not family.parameter_names)
