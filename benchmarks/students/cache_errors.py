"""What a teacher cache loses: KL of the teacher to what is read back of it, and the probability that lists of k tokens leave out.

    python -m benchmarks.students.cache_errors            # some minutes on two cores; writes results/cache_errors.csv

SmolLM2-135M-Instruct (dequantised from 4 bits) in float32, 12 windows of 256 tokens of held-out topics of Python's manual. Every token's KL
is over the full vocabulary, in float64, at temperature 1. "int8, not turned" is what a scale for each row would cost without the Hadamard
blocks by which rows are turned before they are rounded; caches do not offer it.
"""

import sys
import tempfile

import torch

from benchmarks import record
from distill_kernels.api.cache.reading import TeacherCache
from distill_kernels.api.cache.writing import write_teacher_cache
from distill_kernels.api.models import initial_models
from distill_kernels.api.runs import corpus

WINDOWS, LENGTH = 12, 256
TOKENS_AT_ONCE = 256
HIDDEN = ("float32", "bfloat16", "float16", "int8")
LISTS = (16, 64, 256)


def written(teacher, rows, **options):
    """(all rows' outputs, bytes of a token) of a cache."""
    with tempfile.TemporaryDirectory() as folder:
        write_teacher_cache(teacher, rows, folder, progress=True, **options)
        cache = TeacherCache.open(folder)
        return cache.teacher_output(cache.collate([cache.row(row) for row in range(len(cache))])), cache.plan.token_bytes()


def not_turned(hidden):
    step = hidden.abs().amax(-1, keepdim=True) / 127
    return (hidden / step).round() * step


def divergences(hidden, read, weight):
    """(N,) KL of every token, and whether the most probable token is the same."""
    kl, same = [], []
    for live, cached in zip(hidden.split(TOKENS_AT_ONCE), read.split(TOKENS_AT_ONCE), strict=True):
        p, q = ((part.double() @ weight.double().T).log_softmax(-1) for part in (live, cached))
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(kl), torch.cat(same).double()


def main():
    teacher, tokenizer = initial_models.load("--teacher", initial_models.default_teacher())
    held_out = corpus.windows(corpus.split_documents(None, 0).held_out, tokenizer, LENGTH)
    rows = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:WINDOWS]]
    results, exact = [], None
    for dtype in HIDDEN:
        output, token_bytes = written(teacher.eval(), rows, dtype=dtype)
        exact = output.hidden.flatten(0, 1) if exact is None else exact
        kinds = {dtype: output.hidden.flatten(0, 1)} | ({"int8, not turned": not_turned(exact)} if dtype == "int8" else {})
        for name, read in kinds.items():
            kl, same = divergences(exact, read, output.head.weight)
            results.append(
                {"kind": "hidden", "dtype": name, "token_bytes": token_bytes, "kl_mean": kl.mean().item(), "kl_worst": kl.max().item(),
                 "top1_agreement": same.mean().item()}
            )  # fmt: skip
            print(results[-1])
    for k in LISTS:
        output, token_bytes = written(teacher, rows, kind="top-k", top_k=k)
        tail = output.tail_mass
        results.append(
            {"kind": f"top-{k}", "dtype": "float32", "token_bytes": token_bytes, "tail_mean": tail.mean().item(),
             "tail_worst": tail.max().item()}
        )  # fmt: skip
        print(results[-1])
    print(record.write("cache_errors", results, ("kind", "dtype")))


if __name__ == "__main__":
    sys.exit(main())
