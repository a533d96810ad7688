"""`distill-kernels doctor`."""

import argparse
import contextlib
import io
import json

from distill_kernels.api.command_line.arguments import Commands, add_command
from distill_kernels.api.measuring import diagnosis


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        run,
        summary="which backends run here, and why the others do not",
        description="Says what this installation can run, and why it cannot run the rest.",
        example="distill-kernels doctor --json",
    )
    parser.add_argument("--json", action="store_true", default=False, help="print only JSON: null for what runs, else the reason")


def run(given: argparse.Namespace) -> None:
    if not given.json:
        diagnosis.doctor()
        return
    with contextlib.redirect_stdout(io.StringIO()):
        reasons = diagnosis.doctor()
    print(json.dumps(reasons, indent=1))
