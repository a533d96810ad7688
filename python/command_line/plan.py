"""`distill-kernels plan`."""

import argparse
import json
from dataclasses import asdict

from distill_kernels.api.command_line.arguments import DTYPES, Commands, add_command, device, divergence_names
from distill_kernels.api.measuring import diagnosis
from distill_kernels.api.user_error import UserError


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plan",
        run,
        summary="memory and flops of one call of the loss; nothing runs",
        description="Chunks, workspace, peak memory and flops of one call of the loss. Nothing runs and nothing is allocated.",
        example="distill-kernels plan --tokens 8192 --vocabulary 128256 --student-dim 2048 --teacher-dim 4096 --dtype bfloat16",
    )
    parser.add_argument("--tokens", type=int, required=True, metavar="N", help="tokens of a call")
    parser.add_argument("--vocabulary", type=int, required=True, metavar="V", help="rows of the heads")
    parser.add_argument("--student-dim", type=int, required=True, metavar="D", help="hidden size of the student")
    parser.add_argument("--teacher-dim", type=int, required=True, metavar="D", help="hidden size of the teacher; 0: no teacher")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of hidden states and heads; default: %(default)s")
    parser.add_argument("--device", type=device, default="cpu", help="default: %(default)s")
    parser.add_argument("--divergence", choices=divergence_names(), default="forward_kl", help="default: %(default)s", metavar="NAME")
    parser.add_argument("--frozen-head", action="store_true", default=False, help="the student's head gets no gradient")
    parser.add_argument("--column-fraction", type=float, default=None, metavar="F", help="of the vocabulary that gradient products go over")
    parser.add_argument("--sweep", choices=("int8", "fp8"), default=None, help="logits from 8-bit products, corrected by those columns")
    parser.add_argument("--ranks", type=int, default=1, metavar="P", help="over which the vocabulary is divided; default: %(default)s")
    parser.add_argument("--workspace-mib", type=int, default=None, metavar="MIB", help="for all but gradients")
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")


def run(given: argparse.Namespace) -> None:
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
            ranks=given.ranks,
            workspace_mib=given.workspace_mib,
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    print(json.dumps({**asdict(result), "peak_bytes": result.peak_bytes}, indent=1) if given.json else result)
