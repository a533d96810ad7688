"""`distill-kernels bench`."""

import argparse
import json

from distill_kernels.api.command_line.arguments import (
    LOSS_OPTIONS,
    Commands,
    add_command,
    add_loss_options,
    device,
    loss_options,
    speaking_json,
)
from distill_kernels.api.measuring import bench

OPTIONS = ("divergence", "column_fraction", "gradient_tolerance", "sweep", "sweep_tolerance", "backend", "workspace_mib")


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "bench",
        run,
        summary="time and memory of the loss on your shapes, beside eager torch's",
        description=(
            "Loss and both gradients at temperature 1 on random hidden states and heads of these sizes, by this library, by eager torch,\n"
            "and by Liger and TRL where they are installed: gradients are compared first, then every variant has its turn in every round.\n"
            "Peak memory is what is above the inputs, gradients included, in a process of its own."
        ),
        example="distill-kernels bench --tokens 1024 --vocabulary 49152 --student-dim 576 --teacher-dim 576 --dtype bfloat16",
    )
    parser.add_argument("--tokens", type=int, required=True, metavar="N", help="tokens of a call")
    parser.add_argument("--vocabulary", type=int, required=True, metavar="V", help="rows of the heads")
    parser.add_argument("--student-dim", type=int, required=True, metavar="D", help="hidden size of the student")
    parser.add_argument("--teacher-dim", type=int, required=True, metavar="D", help="hidden size of the teacher")
    parser.add_argument("--dtype", choices=bench.TIGHT, help=f"of hidden states and heads; default: {bench.Settings.dtype}")
    parser.add_argument("--device", type=device, help=f"default: {bench.Settings.device}")
    parser.add_argument("--rounds", type=int, metavar="INT", help=f"default: {bench.Settings.rounds}")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the measurement of memory")
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    add_loss_options(parser, leave_out=set(LOSS_OPTIONS) - set(OPTIONS))


def run(given: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(given).items() if name in bench.Settings.__dataclass_fields__}
    if "device" in options:
        options["device"] = str(options["device"])
    with speaking_json(given.json):
        report = bench.run(bench.Settings(**options, loss=loss_options(given)))
    print(json.dumps(report, indent=1) if given.json else bench.table(report))
