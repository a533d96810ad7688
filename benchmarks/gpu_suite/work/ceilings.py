"""What the machine reaches in a copy and in large products, and the row kernels beside the copy."""

from collections.abc import Callable

import torch

from benchmarks.gpu_suite.journal import emit
from benchmarks.gpu_suite.work.machine import card, device, in_turns, name_of, quartiles
from distill_kernels import backends
from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem, Tensors
from distill_kernels.schedule import chunked

ROW_SIZES = ((1024, 128256), (128, 151936), (8, 151936))  # tokens, vocabulary
DRY_ROW_SIZES = ((4, 300),)


def ceilings(dry: bool) -> None:
    """TFLOP/s of products and GB/s of a copy, of random data: zeros are faster, and nobody has them."""
    size, count = (256, 2**16) if dry else (8192, 2**30)
    budget = 0.1 if dry else 1.5

    def median_of(step: Callable) -> float:
        step()
        _, median, _ = quartiles(in_turns({"": step}, budget)[""])
        return median

    source, target = torch.randn(count, device=device()), torch.empty(count, device=device())
    median = median_of(lambda: target.copy_(source))
    emit(kind="rate", what="copy", gbps=2 * source.nbytes / median / 1e9, seconds=median, **card())  # read and written
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
        median = median_of(lambda a=a, b=b: a @ b)
        emit(kind="rate", what=f"products, {name_of(dtype)}", tflops=2 * size**3 / median / 1e12, seconds=median, **card())


def row_kernels(backend: str, dry: bool) -> None:
    """GB/s on a chunk of bfloat16 models: both logits of an entry read twice, 16 bytes, or once where the kernel holds the row, and dz
    written, 2."""
    for tokens, vocabulary in DRY_ROW_SIZES if dry else ROW_SIZES:
        new = {"device": device(), "dtype": torch.float32}
        student, teacher = (torch.randn(tokens, vocabulary, **new) * 3 for _ in range(2))
        dz = torch.empty(tokens, vocabulary, device=device(), dtype=torch.bfloat16)
        coefficients = torch.full((tokens, 3), 1.0 / tokens, **new)
        hidden, weight = (torch.randn(count, 8, device=device()).bfloat16() for count in (tokens, vocabulary))
        written = {"coefficients": coefficients, "terms": torch.empty(tokens, 3, **new)}
        chunk = chunked.Chunk(**dict.fromkeys(chunked.Chunk._fields) | written)
        tensors = Tensors(hidden, weight, None, hidden, weight, None, None, coefficients)
        problem = Problem.of(tensors, Options())
        if (reason := backends.load(backend).why_not(problem)) is not None and not (dry and backend == "triton"):
            emit(kind="rate", what=f"row kernels, {backend}", why=reason)
            return
        launcher, held = _launcher(backend, problem, tensors)

        def step(launcher=launcher, chunk=chunk, student=student, teacher=teacher, dz=dz):
            return list(launcher.rows(chunk, student, teacher, dz, None) or ())

        step()
        _, median, _ = quartiles(in_turns({"rows": step}, 0.1 if dry else 1.0)["rows"])
        moved = tokens * vocabulary * (8 * (1 if held else 2) + 2)
        emit(
            kind="rate", what=f"row kernels, {backend}, {tokens} x {vocabulary}", bytes=moved, seconds=median,
            gbps=moved / median / 1e9, **card(),
        )  # fmt: skip


def _launcher(backend: str, problem: Problem, tensors: Tensors):
    """A launcher, and whether its kernel holds a row between its passes."""
    if backend == "triton":
        from distill_kernels.backends.triton.launch import Launcher

        return Launcher(problem, tensors), False
    from distill_kernels.backends.cuda.launch import Launcher as CudaLauncher
    from distill_kernels.backends.cuda.launch import row_shape

    launcher = CudaLauncher(problem, tensors)
    return launcher, row_shape(problem.tokens, problem.vocabulary, 2, launcher.limits).held_vectors > 0
