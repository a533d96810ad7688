"""`distill-kernels train`."""

import argparse
import json
from dataclasses import MISSING, fields
from pathlib import Path

from distill_kernels.api.command_line.arguments import Commands, add_command, add_loss_options, device, loss_options, speaking_json
from distill_kernels.api.runs import training_run
from distill_kernels.api.runs.inputs import PRECISIONS, Settings
from distill_kernels.call.options import TAILS


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        run,
        summary="train a local student on a local text, from a teacher or from its cache",
        description=(
            "Trains a student with the divergence from a teacher, the cross entropy of the text, or both. Into --output go\n"
            "  log.jsonl      a line of JSON for each step: loss, learning rate, and what was measured on held-out text\n"
            "  student/       the trained model, a folder that transformers loads\n"
            "  train.json     settings, versions, curves and a table of held-out quantities; curves.png shows them\n"
            "and, until it is finished, the last checkpoint. Stop it or kill it at any moment: the same command with --resume goes\n"
            "on from there and ends with the same student as if it had never stopped. Nothing is downloaded."
        ),
        example="distill-kernels train --teacher models/teacher --student models/student --text corpus.jsonl --ce-weight 0.1 --output run1",
    )
    model = "a local Hugging Face folder or .gguf file"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--student", type=Path, metavar="PATH", help=f"{model}; default: cut from the teacher's layers, its head frozen")
    parser.add_argument("--student-layers", type=_numbers, metavar="I,J,...", help="layers to cut it from; default: evenly spaced ones")
    parser.add_argument("--teacher", type=Path, metavar="PATH", help=f"{model}; none with --kd-weight 0")
    parser.add_argument("--teacher-cache", type=Path, metavar="DIR", help="in its place, with its text: what `cache` wrote")
    parser.add_argument("--tail", choices=TAILS, help="what becomes of the tokens that a cache of kind top-k has not kept")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text, or JSON lines (.jsonl) of a document each")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="the same to measure on; default: the last fifth of --text")
    defaults = {entry.name: entry.default for entry in fields(Settings) if entry.default is not MISSING}
    for flag, kind, what in (
        ("--text-field", str, "of a line of JSON that holds the text"),
        ("--steps", int, "optimizer steps"),
        ("--sequence-length", int, "tokens in a window of text"),
        ("--batch-size", int, "windows in a step"),
        ("--at-once", int, "windows that are held at a time"),
        ("--learning-rate", float, "at its peak"),
        ("--seed", int, "of the order of the windows"),
        ("--evaluate-every", int, "steps between measurements on held-out text"),
        ("--held-out-tokens", int, "tokens to measure on, at most"),
        ("--checkpoint-every", int, "steps between checkpoints"),
    ):
        default = defaults[flag[2:].replace("-", "_")]
        shown = f"{what}; default: {'all' if default is None else default}"
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=shown)
    parser.add_argument("--precision", choices=PRECISIONS, help="bfloat16: autocast, parameters stay float32; default: float32")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="layers are run again in backward, which saves memory")
    parser.add_argument("--device", type=device, help="default: the accelerator, or cpu if there is none")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, if there is one")
    parser.add_argument("--json", action="store_true", default=False, help="print only what train.json holds")
    add_loss_options(parser)


def run(given: argparse.Namespace) -> None:
    given.if_interrupted = f"the last checkpoint in {given.output} is whole, and the same command with --resume goes on from it"
    options = {name: value for name, value in vars(given).items() if name in Settings.__dataclass_fields__}
    if "device" in options:
        options["device"] = str(options["device"])
    with speaking_json(given.json):
        report = training_run.run(Settings(**options, loss=loss_options(given)))
    if given.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
