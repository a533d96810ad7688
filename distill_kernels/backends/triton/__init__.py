"""The triton backend: GPU kernels, and the same kernels on CPU tensors in Triton's interpreter.

Chunked: products by the vendor's library into a reused workspace, `rows` between them; 16-bit heads get a 16-bit dz, which tensor cores
multiply. Tile-fused: `sweep`, where no gradient is asked for. Swept: `quantised_sweep`,
whose 8-bit logits are corrected by a few exact ones. Triton is imported where it is needed first.
"""

import torch

from distill_kernels import chunked, quantised
from distill_kernels.correction import correction_bytes
from distill_kernels.plan import Schedule, keeps_logits, make_plan
from distill_kernels.problem import Problem, Tensors
from distill_kernels.products import Products, multiplies_wide, panel_bytes
from distill_kernels.sampling import Library, Sampler, sampled_bytes

MOST_VOCABULARY = 2**24  # places of maxima are kept as float32
SWEEP_BYTES = 32 * 2**20  # of the tile-fused schedule: thousands of tokens share each pass over the heads
SAMPLED_TOKENS = 512  # of a chunk whose gradient columns are sampled: fewer sample better, but each reads the heads again
OLDEST_CAPABILITY = (8, 0)
OLDEST_FLOAT8 = (8, 9)  # whose tensor cores multiply it


def describe() -> str:
    import triton

    return f"triton {triton.__version__}" + (" in the interpreter" if _interprets() else "")


def _interprets() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def why_not(problem: Problem) -> str | None:
    if problem.compute_dtype is not torch.float32:
        return "it computes in float32, and float64 inputs want float64"
    if problem.vocabulary > MOST_VOCABULARY:
        return f"its vocabularies have at most {MOST_VOCABULARY} entries"
    if problem.device.type not in ("cpu", "cuda"):
        return f"it runs on GPU tensors, these are on {problem.device}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install 'distill_kernels[triton]'"
    if problem.device.type == "cpu" and not _interprets():
        return "it runs on GPU tensors, these are on cpu (TRITON_INTERPRET=1 in the environment runs it there, for tests)"
    if problem.device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        if torch.version.hip is None and torch.cuda.get_device_capability(problem.device) < OLDEST_CAPABILITY:
            return f"it needs a GPU of compute capability {'.'.join(map(str, OLDEST_CAPABILITY))} or later"
        if problem.sweep == "fp8" and torch.version.hip is not None:
            return "AMD's gfx942 multiplies another float8 than e4m3; int8 runs there"
        if problem.sweep == "fp8" and torch.cuda.get_device_capability(problem.device) < OLDEST_FLOAT8:
            return f"float8 wants a GPU of compute capability {'.'.join(map(str, OLDEST_FLOAT8))} or later; int8 runs on older ones"
    if problem.divergence is not None:
        from distill_kernels.backends.triton.elementwise import why_no_device_function

        return why_no_device_function(problem.divergence.body)
    return None


def schedule(problem: Problem) -> Schedule:
    from distill_kernels.backends.triton import launch

    keeps, reason = keeps_logits(problem)
    sampled_token_bytes, sampled_fixed_bytes = sampled_bytes(problem, library=True)
    if problem.swept:
        return _swept_schedule(problem, reason, sampled_token_bytes, sampled_fixed_bytes)
    token_bytes, fixed_bytes = launch.partial_bytes(problem, keeps)
    # What a chunk of scattered tokens is gathered into; where torch does not make wide products, also what it widens.
    token_bytes += problem.student_dim * (problem.student_dtype.itemsize + 4) + problem.teacher_dim * problem.teacher_dtype.itemsize
    if keeps:
        token_bytes += problem.vocabulary * _dz_bytes(problem)
        fixed_bytes += panel_bytes(problem)
        if not multiplies_wide(problem.device):
            token_bytes += (problem.student_dim + problem.teacher_dim) * 4 + problem.vocabulary * 4 * bool(_dz_bytes(problem))
    return Schedule(
        name="chunked" if keeps else "tile-fused",
        reason=reason,
        keeps_logits=keeps,
        most_tokens=SAMPLED_TOKENS if problem.kept_columns else None,
        most_bytes=None if keeps else SWEEP_BYTES,
        token_bytes=token_bytes + sampled_token_bytes,
        fixed_bytes=fixed_bytes + sampled_fixed_bytes,
    )


def _swept_schedule(problem: Problem, reason, sampled_token_bytes, sampled_fixed_bytes) -> Schedule:
    from distill_kernels.backends.triton import launch

    token_bytes, fixed_bytes = (a + b for a, b in zip(launch.swept_bytes(problem), correction_bytes(problem), strict=True))
    hidden_bytes = problem.student_dim * (problem.student_dtype.itemsize + 4) + problem.teacher_dim * problem.teacher_dtype.itemsize
    return Schedule(
        name="swept",
        reason=reason,
        keeps_logits=False,
        most_tokens=SAMPLED_TOKENS,
        token_bytes=hidden_bytes + token_bytes + sampled_token_bytes,
        fixed_bytes=panel_bytes(problem) + fixed_bytes + sampled_fixed_bytes,
    )


def _dz_bytes(problem: Problem) -> int:
    """Of an entry of dz, where it does not take the place of the student's logits."""
    return problem.student_dtype.itemsize if problem.gradient and problem.student_dtype.itemsize < 4 else 0


def run(problem: Problem, tensors: Tensors) -> chunked.Outputs:
    with torch.cuda.device_of(tensors.student_hidden):
        plan = make_plan(problem, schedule(problem))
        return RUN[plan.schedule](problem, tensors, plan, chunked.compacts(problem))


def _run_tile_fused(problem, tensors, plan, compact):
    from distill_kernels.backends.triton import launch

    launcher = launch.Launcher(problem, tensors)
    return chunked.run(problem, tensors, plan, launcher.sweep, compact)


def _run_chunked(problem, tensors, plan, compact):
    from distill_kernels.backends.triton import launch

    launcher = launch.Launcher(problem, tensors)
    device = tensors.student_hidden.device
    products = Products(problem, device)
    sampler = Sampler(problem, tensors, plan)

    def space(wanted, dtype=torch.float32):
        return torch.empty(plan.chunk_tokens, problem.vocabulary, dtype=dtype, device=device) if wanted else None

    student_space, teacher_space = space(True), space(problem.teacher_dim)
    dz_space = space(True, problem.student_dtype) if _dz_bytes(problem) else student_space
    dz_scale = _dz_scale(problem, tensors.coefficients) if dz_space.dtype is torch.float16 else None

    def kernel(chunk: chunked.Chunk):
        count = chunk.student_hidden.shape[0]
        student_logits, teacher_logits = student_space[:count], None
        products.logits(chunk.student_hidden, tensors.student_weight, student_logits)
        if teacher_space is not None:
            teacher_logits = teacher_space[:count]
            products.logits(chunk.teacher_hidden, tensors.teacher_weight, teacher_logits)
        dz = dz_space[:count] if problem.gradient else None
        launcher.rows(chunk, student_logits, teacher_logits, dz, dz_scale)
        if chunk.d_bias is not None:
            torch.add(0 if chunk.first else chunk.d_bias, dz.sum(0, dtype=torch.float32), out=chunk.d_bias)
        kernels = Library(products, tensors.student_weight, dz_space.dtype, dz, dz_scale)
        if sampler.kept:
            sampler.gradients(chunk, torch.linalg.vector_norm(dz, dim=0, dtype=torch.float32), kernels)
        else:
            kernels.exact(chunk)

    return _unscaled(chunked.run(problem, tensors, plan, kernel, compact), dz_scale)


def _run_swept(problem, tensors, plan, compact):
    from distill_kernels.backends.triton.launch import Launcher
    from distill_kernels.backends.triton.swept import SweptChunk

    launcher, products = Launcher(problem, tensors), Products(problem, tensors.student_hidden.device)
    sampler = Sampler(problem, tensors, plan)
    pilot, trust = quantised.pilot(problem, tensors), quantised.Trust(problem, tensors)
    dtype = problem.student_dtype if _dz_bytes(problem) else torch.float32
    dz_scale = _dz_scale(problem, tensors.coefficients) if dtype is torch.float16 else None

    def kernel(chunk: chunked.Chunk):
        counts = None
        if problem.compact and not compact:  # tokens that count for nothing are here, and may hold anything
            counts = (chunk.coefficients != 0).any(-1, keepdim=True)
            hidden = (None if h is None else torch.where(counts, h, 0) for h in (chunk.student_hidden, chunk.teacher_hidden))
            chunk = chunk._replace(**dict(zip(("student_hidden", "teacher_hidden"), hidden, strict=True)))
        kernels = SweptChunk(launcher, problem, tensors, products, chunk, trust, dtype, dz_scale)
        sampler.gradients(chunk, kernels.sweep(pilot), kernels)
        for written in () if counts is None else (chunk.terms, chunk.stats, chunk.errors):
            if written is not None:
                written.masked_fill_(~counts, 0.0)

    return _unscaled(chunked.run(problem, tensors, plan, kernel, compact), dz_scale)


RUN = {"chunked": _run_chunked, "tile-fused": _run_tile_fused, "swept": _run_swept}


def multiply_kept(problem: Problem, saved: chunked.Saved) -> chunked.Outputs:
    with torch.cuda.device_of(saved.student_hidden):
        dtype = problem.student_dtype if _dz_bytes(problem) else torch.float32
        scale = _dz_scale(problem, saved.coefficients * saved.upstream[:, None]) if dtype is torch.float16 else None
        kernels = Library(Products(problem, saved.student_hidden.device), saved.student_weight, dtype, scale=scale)
        outputs = chunked.multiply_kept(problem, saved, schedule(problem).token_alignment, kernels.multiply_scaled)
        return _unscaled(outputs, scale)


def _unscaled(outputs, scale):
    if scale is not None:
        for gradient in (outputs.d_hidden, outputs.d_weight, outputs.d_bias):
            gradient.div_(scale)
    return outputs


def _dz_scale(problem: Problem, coefficients):
    """() float32, a power of two: brings the largest entries of dz to about 1, for float16 has little room below 1e-4 or above 1e4."""
    if not coefficients.numel():
        return coefficients.new_ones(())
    kd, ce, z_loss = coefficients.abs().amax(0).double().unbind()
    student_scale, teacher_scale = abs(problem.student_logit_scale), abs(problem.teacher_logit_scale)
    # A temperature above the scale of the logits flattens both softmaxes: the difference that is left goes with its inverse.
    flattened = min(1.0, max(1.0, student_scale, teacher_scale) / problem.temperature)
    largest = student_scale * torch.maximum(kd * (flattened / problem.temperature), torch.maximum(ce, 2 * z_loss))
    return torch.where(largest > 0, torch.exp2(-torch.ceil(torch.log2(largest)).clamp(-126, 126)), 1.0).float()
