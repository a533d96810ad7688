"""The native backend: the chunked schedule on CPU with the row kernel compiled from csrc/cpu.

Logits are kept vocabulary-major, so that a vector register holds one vocabulary entry of sixteen tokens; see
csrc/cpu/row_kernel.inc. The extension runs on the widest instruction set of the processor at hand, on torch's threads.
"""

import math

import torch

from distill_kernels import chunked
from distill_kernels.divergences import BUILT_IN, LOG_PROBABILITY_FLOOR
from distill_kernels.plan import Plan, Schedule, make_plan
from distill_kernels.problem import TAIL_PROBABILITY, Problem, Tensors

try:
    from distill_kernels import _native
except ImportError as error:
    _native, MISSING = None, str(error)

# "" lets the extension choose; a name of instruction_sets() forces that one, for tests and benchmarks.
INSTRUCTION_SET = ""


def instruction_sets() -> list[str]:
    """Those that the build and this processor both have, widest first."""
    return [] if _native is None else _native.instruction_sets()


def why_not(problem: Problem) -> str | None:
    if _native is None:
        return f"the compiled extension is missing ({MISSING}); install a C++17 compiler and install distill_kernels again"
    if problem.device.type != "cpu":
        return f"it runs on CPU tensors, these are on {problem.device}"
    if problem.compute_dtype is not torch.float32:
        return "it computes in float32, and float64 inputs want float64"
    if problem.divergence is not None and problem.divergence.name not in _native.divergences:
        return f"it has the built-in divergences compiled in ({', '.join(BUILT_IN)}), and {problem.divergence.name} is not one of them"
    return None


def schedule(problem: Problem) -> Schedule:
    return Schedule(token_alignment=_native.token_alignment)


def run(problem: Problem, tensors: Tensors) -> chunked.Outputs:
    plan = make_plan(problem, schedule(problem))
    return chunked.run(problem, tensors, plan, row_kernel, token_stride=plan.chunk_tokens)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def row_kernel(problem: Problem, plan: Plan, rows: chunked.Rows):
    divergence = problem.divergence
    _native.row_kernel(
        tokens=rows.terms.shape[0],
        stride=plan.chunk_tokens,
        vocabulary=problem.vocabulary,
        student=_address(rows.student_logits),
        student_bias=_address(rows.student_bias),
        student_scale=problem.student_logit_scale,
        student_softcap=problem.student_softcap or 0.0,
        teacher=_address(rows.teacher_logits),
        teacher_bias=_address(rows.teacher_bias),
        teacher_scale=problem.teacher_logit_scale,
        teacher_softcap=problem.teacher_softcap or 0.0,
        labels=_address(rows.labels) if problem.cross_entropy else 0,
        coefficients=_address(rows.coefficients),
        terms=_address(rows.terms),
        stats=_address(rows.stats),
        divergence=-1 if divergence is None else _native.divergences.index(divergence.name),
        parameters=() if divergence is None else divergence.parameters,
        temperature=problem.temperature,
        label_smoothing=problem.label_smoothing,
        log_probability_floor=LOG_PROBABILITY_FLOOR,
        tail_log_probability=math.log(TAIL_PROBABILITY),
        untempered=problem.cross_entropy or problem.z_loss,
        gradient=problem.gradient,
        threads=torch.get_num_threads(),
        instruction_set=INSTRUCTION_SET,
    )
