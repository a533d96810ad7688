"""The torch backend: the chunked schedule in torch operations. Any device torch has, no compiler.

Products go through the vendor's library, the row kernel between them is the readable version of what compiled kernels do. Its
temporaries are held for `Plan.row_tokens` tokens at a time, so that the workspace stays as planned.

It imports `call`, `divergences`, `estimators`, `listed`, `products` and `schedule`.
"""

import torch

from distill_kernels.backends.torch import listed
from distill_kernels.backends.torch.rows import ROW_BUFFERS, STATISTICS, Rows, Sums, row_kernel
from distill_kernels.backends.torch.swept import SweptChunk
from distill_kernels.call.problem import Problem, Tensors
from distill_kernels.call.shards import Shards
from distill_kernels.estimators import quantised
from distill_kernels.estimators.correction import correction_bytes
from distill_kernels.estimators.sampling import Library, Sampler, sampled_bytes
from distill_kernels.listed import listed_bytes
from distill_kernels.products import Products, panel_bytes
from distill_kernels.schedule import chunked
from distill_kernels.schedule.plan import Schedule, keeps_logits, make_plan

SAMPLED_TOKENS = 192  # of a chunk whose gradient columns are sampled: the more tokens share a sample, the flatter their columns are


def describe() -> str:
    return f"torch {torch.__version__}, any device"


def why_not(problem: Problem) -> str | None:
    return None


def schedule(problem: Problem) -> Schedule:
    element = problem.compute_dtype.itemsize
    row_bytes = problem.vocabulary * element
    sampled_token_bytes, sampled_fixed_bytes = sampled_bytes(problem, library=True)
    if problem.swept:
        swept_token_bytes, swept_fixed_bytes = correction_bytes(problem)
        return Schedule(
            name="swept",
            reason=keeps_logits(problem)[1],
            keeps_logits=False,
            most_tokens=SAMPLED_TOKENS,
            token_bytes=sampled_token_bytes + swept_token_bytes,
            fixed_bytes=panel_bytes(problem) + sampled_fixed_bytes + swept_fixed_bytes,
        )
    return Schedule(
        most_tokens=SAMPLED_TOKENS if problem.kept_columns else None,
        in_flight=chunked.IN_WORK if problem.group else 1,
        exchanged=(STATISTICS + len(Sums._fields)) * bool(problem.group),
        # The chunk's hidden states widened, and its d_hidden.
        token_bytes=(2 * problem.student_dim + problem.teacher_dim) * element + sampled_token_bytes + listed_bytes(problem),
        fixed_bytes=panel_bytes(problem) + sampled_fixed_bytes,
        row_bytes=(listed.LISTED_BUFFERS if problem.listed else ROW_BUFFERS) * row_bytes,
    )


def run(problem: Problem, tensors: Tensors) -> chunked.Outputs:
    largest = problem.largest_shard
    plan = make_plan(largest, schedule(largest))
    return (_run_swept if problem.swept else _run_chunked)(problem, tensors, plan)


def _run_swept(problem, tensors, plan):
    products, sampler = Products(problem, tensors.student_hidden.device), Sampler(problem, tensors, plan)
    pilot, trust = quantised.pilot(problem, tensors), quantised.Trust(problem, tensors)

    def kernel(chunk: chunked.Chunk):
        kernels = SweptChunk(problem, tensors, products, chunk, trust)
        sampler.gradients(chunk, kernels.sweep(pilot), kernels)

    return chunked.run(problem, tensors, plan, kernel)


def _run_chunked(problem, tensors, plan):
    dtype, device = problem.compute_dtype, tensors.student_hidden.device
    products = Products(problem, device)
    sampler = Sampler(problem, tensors, plan)
    shards = Shards.of(problem)
    in_work = 1 if shards is None else chunked.IN_WORK
    student_spaces, teacher_spaces = (
        torch.empty(in_work if wanted else 0, plan.chunk_tokens, problem.vocabulary, dtype=dtype, device=device)
        for wanted in (True, problem.teacher_dim)
    )
    first_entry = 0 if shards is None else shards.begin
    biases = [None if bias is None else bias.to(dtype) for bias in (tensors.student_bias, tensors.teacher_bias)]

    def kernel(chunk: chunked.Chunk):
        count, space = chunk.student_hidden.shape[0], chunk.index % in_work
        student_logits, teacher_logits = student_spaces[space, :count], None
        products.logits(chunk.student_hidden, tensors.student_weight, student_logits)
        if problem.teacher_dim:
            teacher_logits = teacher_spaces[space, :count]
            products.logits(chunk.teacher_hidden, tensors.teacher_weight, teacher_logits)
        of_tokens = chunk.labels, chunk.coefficients, chunk.terms, chunk.stats
        yield from row_kernel(problem, plan, Rows(student_logits, teacher_logits, *biases, *of_tokens, first_entry), shards)
        dz = student_logits
        if chunk.d_bias is not None:
            torch.add(0 if chunk.first else chunk.d_bias, dz.sum(0), out=chunk.d_bias)
        kernels = Library(products, tensors.student_weight, dtype, dz)
        if sampler.kept:
            sampler.gradients(chunk, torch.linalg.vector_norm(dz, dim=0), kernels)
        else:
            kernels.exact(chunk)

    return chunked.run(problem, tensors, plan, kernel)


def multiply_kept(problem: Problem, saved: chunked.Saved) -> chunked.Outputs:
    kernels = Library(Products(problem, saved.student_hidden.device), saved.student_weight, problem.compute_dtype)
    return chunked.multiply_kept(problem, saved, schedule(problem).token_alignment, kernels.multiply_scaled)


def run_listed(problem: Problem, tensors: Tensors, ids: torch.Tensor, loss) -> chunked.Outputs:
    plan = make_plan(problem, schedule(problem))
    dtype, device = problem.compute_dtype, tensors.student_hidden.device
    products = Products(problem, device)
    space = torch.empty(plan.chunk_tokens, problem.vocabulary, dtype=dtype, device=device)
    bias = None if tensors.student_bias is None else tensors.student_bias.to(dtype)

    def kernel(chunk: chunked.Chunk):
        logits = space[: len(chunk.student_hidden)]
        products.logits(chunk.student_hidden, tensors.student_weight, logits)
        rows = listed.ListedRows(logits, ids[chunk.tokens], bias)
        made, others = logits.new_empty(rows.ids.shape), logits.new_empty(len(logits), 3)
        for part, some in rows.parts(plan):
            listed.others(problem, some, made[part], others[part])
        gradients = loss(chunk, made, others)
        if not problem.gradient:
            return
        for part, some in rows.parts(plan):
            listed.gradient(problem, some, made[part], others[part], *(d[part] for d in gradients))
        if chunk.d_bias is not None:
            torch.add(0 if chunk.first else chunk.d_bias, logits.sum(0), out=chunk.d_bias)
        Library(products, tensors.student_weight, dtype, logits).exact(chunk)

    return chunked.run(problem, tensors, plan, kernel)
