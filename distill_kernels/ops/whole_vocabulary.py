"""The custom op of losses over the whole vocabulary, its fake implementation and its gradient.

`terms` returns, for each token, the divergence, the cross entropy and the squared log-sum-exp, and

    total = Σ_n Σ_k coefficients[n, k] · terms[n, k]

It is differentiable through `total` or through `terms`, by the problem:

- not deferred: the gradients of `total` are made while the logits are at hand (3S + 1T in all), and backward only scales them.
- deferred: forward computes no gradient (1S + 1T); backward knows what each token's terms are worth and computes it then
  (3S + 1T more). This is what makes per-token results differentiable without storing logits.
- keeps_dz: total is of each token, (N,), and differentiable. Forward keeps the few columns of dz that sampled gradients go over
  (1S + 1T), and backward multiplies those.

Gradients are accumulated and kept in float32 and rounded to the inputs' dtype once, after the upstream gradient is multiplied in: a
float16 gradient under a loss scaler must not underflow before it is scaled.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_kernels import backends
from distill_kernels.call import checks
from distill_kernels.call.problem import Problem, Tensors, as_text, from_text, text_with
from distill_kernels.call.shards import join
from distill_kernels.estimators.quantised import KINDS, padded_dim
from distill_kernels.ops.gradients import finished, keep, kept, scaled, without_autocast
from distill_kernels.schedule.chunked import Saved, compacts, empty_outputs


class Results(NamedTuple):
    """What a call makes; all but the first two detached, and (0,) where there is no such thing: see chunked.Outputs."""

    total: Tensor  # differentiable: (), or if `deferred` that of each token, (N,)
    terms: Tensor  # (N, 3) differentiable if `total` is made of them in the end: where `deferred`, and no columns are kept for backward
    stats: Tensor  # (N, 6)
    gradient_error: Tensor  # (2,)
    errors: Tensor  # (N, 2)
    recomputed: Tensor  # (1,)


def run(problem: Problem, tensors: Tensors) -> Results:
    problem = replace(problem, keeps_dz=problem.deferred and problem.can_keep_dz)
    call, numbers = as_text(problem)
    total, terms_, _, _, _, *detached, _, _ = terms(*tensors, numbers, call)
    if problem.deferred and not problem.keeps_dz:
        total = (tensors.coefficients * terms_).sum(-1)
    return Results(total, terms_, *detached)


@torch.library.custom_op("distill_kernels::terms", mutates_args=())
def terms(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    student_bias: Tensor | None,  # (V,)
    teacher_hidden: Tensor | None,  # (N, D_t)
    teacher_weight: Tensor | None,  # (V, D_t)
    teacher_bias: Tensor | None,  # (V,)
    labels: Tensor | None,  # (N,)
    coefficients: Tensor,  # (N, 3)
    seed: Tensor | None,  # ()
    student_quantised: Tensor | None,  # (V, D_s padded)
    student_scales: Tensor | None,  # (V, 3)
    teacher_quantised: Tensor | None,  # (V, D_t padded)
    teacher_scales: Tensor | None,  # (V, 3)
    numbers: Tensor | None,  # (k,) and
    call: str,  # as `as_text` makes them
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = Tensors(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        labels,
        coefficients,
        seed,
        student_quantised,
        student_scales,
        teacher_quantised,
        teacher_scales,
    )
    problem = _of_forward(from_text(call, numbers, tensors))
    backend = backends.choose(problem)
    problem = join(problem, tensors, backends.name_of(backend))
    checks.labels("labels", labels, problem.whole_vocabulary)
    with without_autocast(problem.device):
        outputs = backend.run(problem, tensors)
    total = (coefficients * outputs.terms).sum(-1)
    return total if problem.keeps_dz else total.sum(), *outputs


def _of_forward(problem: Problem) -> Problem:
    """A deferred call asks for no gradient, if it keeps nothing to make them of."""
    if problem.deferred and not problem.keeps_dz:
        return replace(problem, d_hidden=False, d_weight=False, d_bias=False)
    return problem


@terms.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *given, numbers, call = arguments
    tensors = Tensors(*given)
    problem = _of_forward(from_text(call, numbers, tensors))
    plan = backends.plan(problem) if problem.keeps_dz else None
    total = tensors.coefficients.new_empty((problem.tokens,) if problem.keeps_dz else ())
    return total, *empty_outputs(problem, tensors.student_hidden, plan)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, numbers, call = inputs
    tensors = Tensors(*given)
    problem = from_text(call, numbers, tensors)
    total, terms_, d_hidden, d_weight, d_bias, *others, kept_dz, kept_columns = output
    others += d_hidden, d_weight, d_bias, kept_dz, kept_columns
    ctx.set_materialize_grads(False)
    ctx.call, ctx.deferred, ctx.keeps_dz = call, problem.deferred, problem.keeps_dz
    ctx.wanted = problem.d_hidden, problem.d_weight, problem.d_bias
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
    if problem.keeps_dz:
        backend = backends.name_of(backends.choose(problem))
        ctx.call = _call_of_kept(call, backend, compacts(problem))
        ctx.mark_non_differentiable(terms_, *others)
        keep(ctx, tensors.student_hidden, tensors.student_weight, tensors.coefficients, kept_dz, kept_columns, numbers)
    elif problem.deferred:
        ctx.mark_non_differentiable(total, *others)
        keep(ctx, *tensors, numbers)
    else:
        ctx.mark_non_differentiable(terms_, *others)
        keep(ctx, d_hidden, d_weight, d_bias)


def _backward(ctx: Any, d_total: Tensor | None, d_terms: Tensor | None, *_: Any) -> tuple[Any, ...]:
    inputs = len(Tensors._fields) + 2
    again = ctx.deferred and not ctx.keeps_dz
    upstream = d_terms if again else d_total
    if upstream is None:
        return (None,) * inputs
    gradients: Sequence[Tensor | None]
    if ctx.keeps_dz:
        *products, numbers = kept(ctx)
        gradients = *multiply_kept(*products, upstream, numbers, ctx.call), None
    elif again:
        *given, numbers = kept(ctx)
        tensors = Tensors(*given)._replace(coefficients=upstream)
        gradients = terms(*tensors, numbers, text_with(ctx.call, deferred=False, stats=False))[2:5]
    else:
        gradients = [scaled(g, upstream) if wanted else g for g, wanted in zip(kept(ctx), ctx.wanted, strict=True)]
    return finished(gradients, ctx.dtypes, ctx.wanted, inputs)


terms.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("distill_kernels::multiply_kept", mutates_args=())
def multiply_kept(
    student_hidden: Tensor,
    student_weight: Tensor,
    coefficients: Tensor,
    kept_dz: Tensor,
    kept_columns: Tensor,
    upstream: Tensor,
    numbers: Tensor | None,
    call: str,  # as `_call_of_kept` makes it
) -> tuple[Tensor, Tensor]:
    """d_hidden and d_weight of what a forward with Problem.keeps_dz has kept; see chunked.Saved."""
    problem = _problem_of_kept(call, numbers, student_hidden, student_weight, coefficients)
    saved = Saved(student_hidden, student_weight, coefficients, upstream, kept_dz, kept_columns, problem.compact)
    with without_autocast(problem.device):
        outputs = backends.choose(problem).multiply_kept(problem, saved)
    return outputs.d_hidden, outputs.d_weight


@multiply_kept.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    student_hidden, student_weight, coefficients, _, _, _, numbers, call = arguments
    outputs = empty_outputs(_problem_of_kept(call, numbers, student_hidden, student_weight, coefficients), student_hidden, None)
    return outputs.d_hidden, outputs.d_weight


def _call_of_kept(call: str, backend: str, compacted: bool) -> str:
    """The products of the student's kept columns; what their gradient is of does not matter any more.

    compacted: whether forward left out masked tokens.
    """
    none = {"kd": False, "cross_entropy": False, "z_loss": True, "stats": False, "deferred": False, "keeps_dz": False, "sweep": None}
    return text_with(call, backend=backend, compact=compacted, **none)


def _problem_of_kept(call: str, numbers: Tensor | None, student_hidden: Tensor, student_weight: Tensor, coefficients: Tensor) -> Problem:
    problem = from_text(call, numbers, Tensors(student_hidden, student_weight, None, None, None, None, None, coefficients))
    return replace(problem, teacher_dtype=coefficients.dtype)  # which is the forward's compute dtype


@torch.library.custom_op("distill_kernels::quantise", mutates_args=())
def quantise(weight: Tensor, sweep: str) -> tuple[Tensor, Tensor]:
    """Rows and scales of a head as a quantised sweep reads them: `quantised.quantise`, or what a backend has for it."""
    with without_autocast(weight.device):
        return backends.quantise(weight, sweep)


@quantise.register_fake
def _(weight: Tensor, sweep: str) -> tuple[Tensor, Tensor]:
    rows, dim = weight.shape
    return weight.new_empty(rows, padded_dim(dim), dtype=KINDS[sweep][0]), weight.new_empty(rows, 3, dtype=torch.float32)
