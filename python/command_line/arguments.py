"""What the parsers of the commands share: their look, and the types and names of arguments."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, Literal, NoReturn, Protocol

import torch

from distill_kernels import divergences
from distill_kernels.call import checks
from distill_kernels.call.options import DEFAULTS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in checks.DTYPES}


class Parser(argparse.ArgumentParser):
    """Without the usage, which is longer than a screen and hides the one sentence that matters."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what it takes\n")


class Commands(Protocol):
    """What a parser's add_subparsers returns."""

    def add_parser(self, *names: Any, **options: Any) -> Parser: ...


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    summary: str,
    description: str,
    example: str,
    if_interrupted: str = "nothing was written",
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


def add_loss_options(parser: Parser, leave_out: Collection[str] = ()) -> None:
    """Options of distillation_loss by their own names, with its own defaults."""
    group = parser.add_argument_group("the loss", "as in help(distill_kernels.distillation_loss)")
    for name, (kind, words) in LOSS_OPTIONS.items():
        if name in leave_out:
            continue
        default, flag = getattr(DEFAULTS, name), name.replace("_", "-")
        if kind is bool:
            group.add_argument(f"--no-{flag}", dest=name, action="store_false", help=words)
        else:
            shown = f"{words}; default: {'none' if default is None else default}"
            group.add_argument(f"--{flag}", type=kind, metavar={int: "INT", str: "NAME", divergence: "NAME"}.get(kind, "FLOAT"), help=shown)


def loss_options(given: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in vars(given).items() if name in LOSS_OPTIONS}


def divergence(text: str) -> divergences.Divergence:
    """`NAME` or `NAME(parameter=number, ...)`."""
    name, parenthesis, inside = text.strip().partition("(")
    try:
        if not parenthesis:
            return divergences.resolve(name)
        if name not in divergences.FAMILIES or not inside.endswith(")"):
            raise ValueError(f"no divergence {text!r}; there are {', '.join(sorted(divergences.FAMILIES))}")
        pairs = [pair.partition("=") for pair in inside[:-1].split(",") if pair.strip()]
        return divergences.FAMILIES[name](**{key.strip(): float(value) for key, _, value in pairs})
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def fraction(text: str) -> float | Literal["auto"]:
    return "auto" if text == "auto" else float(text)


def speaking_json(wanted: bool) -> AbstractContextManager[object]:
    """What is printed within goes to stderr, if stdout is for JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


LOSS_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "divergence": (divergence, "a name, or for instance 'jensen_shannon(beta=0.1)'"),
    "temperature": (float, "of both distributions of the divergence"),
    "temperature_squared": (bool, "do not multiply the divergence by temperature²"),
    "kd_weight": (float, "of the divergence"),
    "ce_weight": (float, "of the cross entropy of the text"),
    "z_loss_weight": (float, "of the squared log-sum-exp"),
    "label_smoothing": (float, "of the cross entropy"),
    "vocab_mismatch": (str, "'truncate': compare the shared prefix of vocabularies of different size"),
    "column_fraction": (fraction, "of the vocabulary that the gradient products go over, or 'auto'"),
    "gradient_tolerance": (float, "relative error of the gradients, with --column-fraction auto"),
    "sweep": (str, "'int8' or 'fp8': logits from 8-bit products, corrected by those columns"),
    "sweep_tolerance": (float, "standard error, in nats, above which a sweep's sums are made exactly"),
    "backend": (str, "one of those that `distill-kernels doctor` lists"),
    "workspace_mib": (int, "memory for logits, MiB"),
}


def device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"torch knows no device {name!r}") from error


def divergence_names() -> list[str]:
    """Those that a name is enough for."""
    return sorted(name for name, family in divergences.FAMILIES.items() if not family.parameter_names)
