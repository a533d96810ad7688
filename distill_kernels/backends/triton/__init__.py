"""The triton backend: GPU kernels, and the same kernels on CPU tensors in Triton's interpreter.

Chunked: products by the vendor's library into a reused workspace, `rows` between them; 16-bit heads get a 16-bit dz, which tensor cores
multiply. Tile-fused: `sweep`, where no gradient is asked for. Swept: `quantised_sweep`,
whose 8-bit logits are corrected by a few exact ones. Triton is imported where it is needed first.

It imports `call`, `divergences`, `estimators`, `listed`, `products` and `schedule`.
"""

import torch

from distill_kernels.call.problem import Problem, Tensors
from distill_kernels.estimators import quantised
from distill_kernels.estimators.correction import correction_bytes
from distill_kernels.estimators.sampling import Sampler, sampled_bytes
from distill_kernels.listed import listed_bytes
from distill_kernels.products import Products, panel_bytes
from distill_kernels.schedule import chunk_products, chunked
from distill_kernels.schedule.chunk_products import SAMPLED_TOKENS
from distill_kernels.schedule.plan import Schedule, keeps_logits, make_plan

MOST_VOCABULARY = 2**24  # places of maxima are kept as float32
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
        if problem.options.sweep == "fp8" and torch.version.hip is not None:
            return "AMD's gfx942 multiplies another float8 than e4m3; int8 runs there"
        if problem.options.sweep == "fp8" and torch.cuda.get_device_capability(problem.device) < OLDEST_FLOAT8:
            return f"float8 wants a GPU of compute capability {'.'.join(map(str, OLDEST_FLOAT8))} or later; int8 runs on older ones"
    if problem.divergence is not None:
        from distill_kernels.backends.triton.elementwise import why_no_device_function

        return why_no_device_function(problem.divergence.body)
    return None


def schedule(problem: Problem) -> Schedule:
    from distill_kernels.backends.triton import launch

    keeps, reason = keeps_logits(problem)
    if problem.swept:
        return _swept_schedule(problem, reason)
    if problem.listed:
        token_bytes, fixed_bytes = launch.partial_bytes(problem, True)
        reason = "what tokens list is taken out of a chunk's logits"
        return chunk_products.schedule(problem, True, reason, token_bytes + listed_bytes(problem), fixed_bytes)
    return chunk_products.schedule(problem, keeps, reason, *launch.partial_bytes(problem, keeps), launch.exchanged(problem, keeps))


def _swept_schedule(problem: Problem, reason) -> Schedule:
    from distill_kernels.backends.triton import launch

    sampled_token_bytes, sampled_fixed_bytes = sampled_bytes(problem, library=True)
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


def run(problem: Problem, tensors: Tensors) -> chunked.Outputs:
    with torch.cuda.device_of(tensors.student_hidden):
        largest = problem.largest_shard
        plan = make_plan(largest, schedule(largest))
        return RUN[plan.schedule](problem, tensors, plan, chunked.compacts(problem))


def _run_tile_fused(problem, tensors, plan, compact):
    from distill_kernels.backends.triton import launch

    launcher = launch.Launcher(problem, tensors)
    return chunked.run(problem, tensors, plan, launcher.sweep, compact)


def _run_chunked(problem, tensors, plan, compact):
    from distill_kernels.backends.triton import launch

    return chunk_products.run(problem, tensors, plan, launch.Launcher(problem, tensors).rows, compact)


def _run_swept(problem, tensors, plan, compact):
    from distill_kernels.backends.triton.launch import Launcher
    from distill_kernels.backends.triton.swept import SweptChunk

    launcher, products = Launcher(problem, tensors), Products(problem, tensors.student_hidden.device)
    sampler = Sampler(problem, tensors, plan)
    pilot, trust = quantised.pilot(problem, tensors), quantised.Trust(problem, tensors)
    dtype = chunk_products.dz_dtype(problem)
    dz_scale = chunk_products.dz_scale(problem, tensors.coefficients) if dtype is torch.float16 else None

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

    return chunk_products.unscaled(chunked.run(problem, tensors, plan, kernel, compact), dz_scale)


RUN = {"chunked": _run_chunked, "tile-fused": _run_tile_fused, "swept": _run_swept}


def multiply_kept(problem: Problem, saved: chunked.Saved) -> chunked.Outputs:
    with torch.cuda.device_of(saved.student_hidden):
        return chunk_products.multiply_kept(problem, saved, schedule(problem).token_alignment)


def run_listed(problem: Problem, tensors: Tensors, ids: torch.Tensor, loss) -> chunked.Outputs:
    from distill_kernels.backends.triton import launch

    launcher = launch.Launcher(problem, tensors)

    def rows(chunk, logits, _, dz, dz_scale):
        own = ids[chunk.tokens].contiguous()
        listed, others = launcher.listed(logits, own)
        gradients = loss(chunk, listed, others)
        if dz is not None:
            launcher.listed_gradient(logits, own, listed, others, *gradients, dz, dz_scale)

    with torch.cuda.device_of(tensors.student_hidden):
        return chunk_products.run(problem, tensors, make_plan(problem, schedule(problem)), rows, chunked.compacts(problem))
