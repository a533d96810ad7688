"""The cuda backend: kernels in CUDA C++, compiled when the package is installed where nvcc is.

Chunked: products by the vendor's library into a reused workspace, csrc/cuda/rows.cuh between them; 16-bit heads get a 16-bit dz. Sampled
gradients go over columns that csrc/cuda/columns.cu gathers. Tile-fused: csrc/cuda/sweep.cu, where no gradient is asked for and heads are of
16 bits. Nothing of it has been run on a GPU yet: the tests run the same source on CPU tensors, in an emulation that they put in the
extension's place.

It imports `call`, `divergences`, `estimators` and `schedule`.
"""

import functools

import torch

from distill_kernels.backends.cuda import extension, sweep
from distill_kernels.call.problem import Problem, Tensors
from distill_kernels.divergences import BUILT_IN
from distill_kernels.schedule import chunk_products, chunked
from distill_kernels.schedule.plan import Schedule, keeps_logits, make_plan

OLDEST_CAPABILITY = (8, 0)
MOST_VOCABULARY = 2**31 - 1024  # entries are counted in 32 bits, a block beyond the last


def describe() -> str:
    return "compiled CUDA kernels" + (" in an emulation" if extension.kernels.emulated else " for sm_80, sm_90a and sm_100")


def why_not(problem: Problem) -> str | None:
    kernels = extension.kernels
    if problem.compute_dtype is not torch.float32:
        return "it computes in float32, and float64 inputs want float64"
    if problem.vocabulary > MOST_VOCABULARY:
        return f"its vocabularies have at most {MOST_VOCABULARY} entries"
    if kernels is None:
        return f"its compiled extension is missing ({extension.MISSING}); install CUDA's nvcc, 12.8 or later, and distill_kernels again"
    if not (kernels.emulated and problem.device.type == "cpu"):
        reason = _why_not_there(problem.device)
        if reason is not None:
            return reason
    if problem.options.sweep:
        return "it has no quantised sweep; the triton and torch backends have"
    if problem.group:
        return "its kernels go over whole vocabularies; those of the triton and torch backends over shards, too"
    if problem.divergence is not None and problem.divergence.name not in kernels.divergences:
        return f"it has the built-in divergences compiled in ({', '.join(BUILT_IN)}), and {problem.divergence.name} is not one of them"
    return None


def _why_not_there(device: torch.device) -> str | None:
    if device.type != "cuda":
        # To ask CUDA starts its driver, with which a process can no longer fork.
        missing = None if torch.cuda.is_available() else extension.kernels.why_no_device()
        return f"it runs on GPU tensors, these are on {device}" + (f", and CUDA finds no GPU here: {missing}" if missing else "")
    if torch.version.hip is not None:
        return "it runs on NVIDIA's GPUs, and this torch is made for AMD's"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"it needs a GPU of compute capability {'.'.join(map(str, OLDEST_CAPABILITY))} or later"
    return None


def schedule(problem: Problem) -> Schedule:
    keeps, reason = keeps_logits(problem)
    if keeps:
        return chunk_products.schedule(problem, True, reason, 0, 0)
    why_not_swept = sweep.why_not_swept(problem)
    if why_not_swept is not None:
        return chunk_products.schedule(problem, True, why_not_swept, 0, 0)
    return chunk_products.schedule(problem, False, reason, *sweep.workspace_bytes(problem))


def run(problem: Problem, tensors: Tensors) -> chunked.Outputs:
    from distill_kernels.backends.cuda.columns import Columns
    from distill_kernels.backends.cuda.launch import Launcher

    with torch.cuda.device_of(tensors.student_hidden):
        plan = make_plan(problem, schedule(problem))
        if plan.schedule == "tile-fused":
            return chunked.run(problem, tensors, plan, sweep.Sweeper(problem, tensors).sweep, chunked.compacts(problem))
        library = functools.partial(Columns, narrow=not problem.keeps_dz)
        return chunk_products.run(problem, tensors, plan, Launcher(problem, tensors).rows, chunked.compacts(problem), library)


def multiply_kept(problem: Problem, saved: chunked.Saved) -> chunked.Outputs:
    from distill_kernels.backends.cuda.columns import Columns

    with torch.cuda.device_of(saved.student_hidden):
        return chunk_products.multiply_kept(problem, saved, schedule(problem).token_alignment, functools.partial(Columns, narrow=False))
