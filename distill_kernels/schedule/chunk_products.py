"""The chunked schedule of backends that leave the products to the vendor's library: logits in a reused workspace, a row kernel between.

A chunk's logits, student's and teacher's, are made by torch; the backend's rows(chunk, student_logits, teacher_logits, dz, dz_scale) turns
them into terms, stats and dz; torch multiplies that. Heads of 16 bits get a dz of 16 bits, which tensor cores multiply, in a buffer of its
own; dz of float32 takes the place of the student's logits.
"""

from collections.abc import Callable

import torch

from distill_kernels.call.problem import Problem, Tensors
from distill_kernels.estimators.sampling import Library, Sampler, sampled_bytes
from distill_kernels.products import Products, multiplies_wide, panel_bytes
from distill_kernels.schedule import chunked
from distill_kernels.schedule.plan import Plan, Schedule

SWEEP_BYTES = 32 * 2**20  # of the tile-fused schedule: thousands of tokens share each pass over the heads
SAMPLED_TOKENS = 512  # of a chunk whose gradient columns are sampled: fewer sample better, but each reads the heads again


def dz_bytes(problem: Problem) -> int:
    """Of an entry of dz, where it does not take the place of the student's logits."""
    return problem.student_dtype.itemsize if problem.gradient and problem.student_dtype.itemsize < 4 else 0


def dz_dtype(problem: Problem) -> torch.dtype:
    return problem.student_dtype if dz_bytes(problem) else torch.float32


def schedule(problem: Problem, keeps_logits: bool, reason: str, token_bytes: int, fixed_bytes: int, exchanged: int = 0) -> Schedule:
    """`token_bytes` and `fixed_bytes`: what the kernels hold, for each token of a chunk and beside them. Chunked, or tile-fused."""
    sampled_token_bytes, sampled_fixed_bytes = sampled_bytes(problem, library=True)
    # What a chunk of scattered tokens is gathered into; where torch does not make wide products, also what it widens.
    token_bytes += problem.student_dim * (problem.student_dtype.itemsize + 4) + problem.teacher_dim * problem.teacher_dtype.itemsize
    if keeps_logits:
        token_bytes += problem.vocabulary * dz_bytes(problem)
        fixed_bytes += panel_bytes(problem)
        if not multiplies_wide(problem.device):
            token_bytes += (problem.student_dim + problem.teacher_dim) * 4 + problem.vocabulary * 4 * bool(dz_bytes(problem))
    return Schedule(
        name="chunked" if keeps_logits else "tile-fused",
        reason=reason,
        keeps_logits=keeps_logits,
        most_tokens=SAMPLED_TOKENS if problem.kept_columns else None,
        in_flight=chunked.IN_WORK if problem.group else 1,
        exchanged=exchanged,
        most_bytes=None if keeps_logits else SWEEP_BYTES,
        token_bytes=token_bytes + sampled_token_bytes,
        fixed_bytes=fixed_bytes + sampled_fixed_bytes,
    )


def run(
    problem: Problem, tensors: Tensors, plan: Plan, rows: Callable, compact: bool, library: Callable[..., Library] = Library
) -> chunked.Outputs:
    device = tensors.student_hidden.device
    products = Products(problem, device)
    sampler = Sampler(problem, tensors, plan)

    def space(wanted, dtype=torch.float32):
        return torch.empty(in_work, plan.chunk_tokens, problem.vocabulary, dtype=dtype, device=device) if wanted else None

    in_work = chunked.IN_WORK if problem.group else 1
    student_space, teacher_space = space(True), space(problem.teacher_dim)
    dz_space = space(True, dz_dtype(problem)) if dz_bytes(problem) else student_space
    scale = dz_scale(problem, tensors.coefficients) if dz_space.dtype is torch.float16 else None

    def kernel(chunk: chunked.Chunk):
        count, place = chunk.student_hidden.shape[0], chunk.index % in_work
        student_logits, teacher_logits = student_space[place, :count], None
        products.logits(chunk.student_hidden, tensors.student_weight, student_logits)
        if teacher_space is not None:
            teacher_logits = teacher_space[place, :count]
            products.logits(chunk.teacher_hidden, tensors.teacher_weight, teacher_logits)
        dz = dz_space[place, :count] if problem.gradient else None
        yield from rows(chunk, student_logits, teacher_logits, dz, scale) or ()
        if chunk.d_bias is not None:
            torch.add(0 if chunk.first else chunk.d_bias, dz.sum(0, dtype=torch.float32), out=chunk.d_bias)
        kernels = library(products, tensors.student_weight, dz_space.dtype, dz, scale)
        if sampler.kept:
            sampler.gradients(chunk, torch.linalg.vector_norm(dz, dim=0, dtype=torch.float32), kernels)
        else:
            kernels.exact(chunk)

    return unscaled(chunked.run(problem, tensors, plan, kernel, compact), scale)


def multiply_kept(
    problem: Problem, saved: chunked.Saved, token_alignment: int, library: Callable[..., Library] = Library
) -> chunked.Outputs:
    """The gradients alone, from the columns of dz that a run with `problem.keeps_dz` has kept."""
    dtype = dz_dtype(problem)
    scale = dz_scale(problem, saved.coefficients * saved.upstream[:, None]) if dtype is torch.float16 else None
    kernels = library(Products(problem, saved.student_hidden.device), saved.student_weight, dtype, scale=scale)
    return unscaled(chunked.multiply_kept(problem, saved, token_alignment, kernels.multiply_scaled), scale)


def unscaled(outputs, scale):
    if scale is not None:
        for gradient in (outputs.d_hidden, outputs.d_weight, outputs.d_bias):
            gradient.div_(scale)
    return outputs


def dz_scale(problem: Problem, coefficients):
    """() float32, a power of two: brings the largest entries of dz to about 1, for float16 has little room below 1e-4 or above 1e4."""
    if not coefficients.numel():
        return coefficients.new_ones(())
    kd, ce, z_loss = coefficients.abs().amax(0).double().unbind()
    student_scale, teacher_scale = abs(problem.options.student_logit_scale), abs(problem.options.teacher_logit_scale)
    # A temperature above the scale of the logits flattens both softmaxes: the difference that is left goes with its inverse.
    flattened = min(1.0, max(1.0, student_scale, teacher_scale) / problem.options.temperature)
    largest = student_scale * torch.maximum(kd * (flattened / problem.options.temperature), torch.maximum(ce, 2 * z_loss))
    return torch.where(largest > 0, torch.exp2(-torch.ceil(torch.log2(largest)).clamp(-126, 126)), 1.0).float()
