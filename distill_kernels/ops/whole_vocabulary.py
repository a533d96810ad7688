"""The one custom op, its fake implementation and its gradient: what torch's autograd, compiler and autocast see of the engine.

`terms` returns, for each token, the divergence, the cross entropy and the squared log-sum-exp, and

    total = Σ_n Σ_k coefficients[n, k] · terms[n, k]

It is differentiable through `total` or through `terms`, by `deferred`:

- deferred=False: the gradients of `total` are made while the logits are at hand (3S + 1T in all), and backward only scales them.
- deferred=True: forward computes no gradient (1S + 1T); backward knows what each token's terms are worth and computes it then
  (3S + 1T more). This is what makes per-token results differentiable without storing logits.
- Problem.keeps_dz: total is of each token, (N,), and differentiable. Forward keeps the few columns of dz that sampled gradients go over
  (1S + 1T), and backward multiplies those.

Gradients are accumulated and kept in float32 and rounded to the inputs' dtype once, after the upstream gradient is multiplied in: a
float16 gradient under a loss scaler must not underflow before it is scaled.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from distill_kernels import backends, memory
from distill_kernels.call.problem import Problem, Tensors, check_labels
from distill_kernels.call.shards import join
from distill_kernels.divergences import from_parameters
from distill_kernels.estimators.quantised import KINDS, padded_dim
from distill_kernels.schedule.chunked import Saved, compacts, empty_outputs


class Results(NamedTuple):
    """What a call makes; all but the first two detached, and (0,) where there is no such thing: see chunked.Outputs."""

    total: Tensor  # differentiable: (), or if `deferred` that of each token, (N,)
    terms: Tensor  # (N, 3) differentiable if `total` is made of them in the end: where `deferred`, and no columns are kept for backward
    stats: Tensor  # (N, 6)
    gradient_error: Tensor  # (2,)
    errors: Tensor  # (N, 2)
    recomputed: Tensor  # (1,)


def run(problem: Problem, tensors: Tensors, *, backend: str, deferred: bool) -> Results:
    problem = replace(problem, keeps_dz=deferred and problem.can_keep_dz)
    divergence = problem.divergence
    total, terms_, _, _, _, *detached, _, _ = terms(
        *tensors,
        "" if divergence is None else divergence.name,
        [] if divergence is None else list(divergence.parameters),
        *(getattr(problem, name) for name in PLAIN_FIELDS),
        backend,
        deferred,
    )
    if deferred and not problem.keeps_dz:
        total = (tensors.coefficients * terms_).sum(-1)
    return Results(total, terms_, *detached)


def _compute(
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
    divergence: str,  # "": none
    parameters: Sequence[float],
    cross_entropy: bool,
    z_loss: bool,
    temperature: float,
    label_smoothing: float,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    d_hidden: bool,
    d_weight: bool,
    d_bias: bool,
    column_fraction: float,
    gradient_tolerance: float,
    sweep: str,
    sweep_tolerance: float,
    keeps_dz: bool,
    stats: bool,
    compact: bool,
    workspace_mib: int,
    group: str,
    shares_d_hidden: bool,
    backend: str,
    deferred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem, tensors = _problem(**locals())
    chosen = backends.choose(problem, backend)
    problem = join(problem, tensors, backends.name_of(chosen))
    check_labels("labels", labels, problem.whole_vocabulary)
    with without_autocast(problem.device):
        outputs = chosen.run(problem, tensors)
    total = (coefficients * outputs.terms).sum(-1)
    return total if keeps_dz else total.sum(), *outputs


def without_autocast(device: torch.device):
    """Without autocast, which ops run under as their caller does: what was to be cast has been, and sums in float32 must not be."""
    return torch.autocast(device.type, enabled=False)


ARGUMENTS = tuple(inspect.signature(_compute).parameters)
# All that follow the tensors, the divergence and its parameters are fields of Problem, but for the last two.
PLAIN_FIELDS = ARGUMENTS[len(Tensors._fields) + 2 : -2]


def _problem(*, divergence, parameters, backend, deferred, **arguments) -> tuple[Problem, Tensors]:
    """What the op's arguments ask of a backend; a deferred call asks for no gradient, if it keeps nothing to make them of."""
    tensors = Tensors(*(arguments.pop(name) for name in Tensors._fields))
    if deferred and not arguments["keeps_dz"]:
        arguments |= {"d_hidden": False, "d_weight": False, "d_bias": False}
    teacher = tensors.teacher_hidden
    problem = Problem(
        tokens=tensors.student_hidden.shape[0],
        vocabulary=tensors.student_weight.shape[0],
        student_dim=tensors.student_hidden.shape[1],
        teacher_dim=0 if teacher is None else teacher.shape[1],
        student_dtype=tensors.student_hidden.dtype,
        teacher_dtype=(tensors.student_hidden if teacher is None else teacher).dtype,
        device=tensors.student_hidden.device,
        divergence=from_parameters(divergence, parameters) if divergence else None,
        **arguments,
    )
    return problem, tensors


terms = torch.library.custom_op("distill_kernels::terms", _compute, mutates_args=())


@torch.library.custom_op("distill_kernels::quantise", mutates_args=())
def quantise(weight: Tensor, sweep: str) -> tuple[Tensor, Tensor]:
    """Rows and scales of a head as a quantised sweep reads them: `quantised.quantise`, or what a backend has for it."""
    with without_autocast(weight.device):
        return backends.quantise(weight, sweep)


@quantise.register_fake
def _(weight, sweep):
    rows, dim = weight.shape
    return weight.new_empty(rows, padded_dim(dim), dtype=KINDS[sweep][0]), weight.new_empty(rows, 3, dtype=torch.float32)


@terms.register_fake
def _(*args, **kwargs):
    arguments = inspect.signature(_compute).bind(*args, **kwargs).arguments
    problem, tensors = _problem(**arguments)
    plan = backends.plan(problem, arguments["backend"]) if problem.keeps_dz else None
    total = tensors.coefficients.new_empty((problem.tokens,) if problem.keeps_dz else ())
    return total, *empty_outputs(problem, tensors.student_hidden, plan)


@torch.library.custom_op("distill_kernels::multiply_kept", mutates_args=())
def multiply_kept(
    student_hidden: Tensor,
    student_weight: Tensor,
    coefficients: Tensor,
    upstream: Tensor,
    kept_dz: Tensor,
    kept_columns: Tensor,
    compacted: bool,
    d_hidden: bool,
    d_weight: bool,
    column_fraction: float,
    temperature: float,
    student_logit_scale: float,
    teacher_logit_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """d_hidden and d_weight of what a forward with Problem.keeps_dz has kept; see chunked.Saved."""
    saved = Saved(student_hidden, student_weight, coefficients, upstream, kept_dz, kept_columns, compacted)
    scalars = d_hidden, d_weight, column_fraction, temperature, student_logit_scale, teacher_logit_scale
    problem = _kept_problem(student_hidden, student_weight, coefficients, *scalars)
    with without_autocast(problem.device):
        outputs = backends.choose(problem, backend).multiply_kept(problem, saved)
    return outputs.d_hidden, outputs.d_weight


@multiply_kept.register_fake
def _(student_hidden, student_weight, coefficients, upstream, kept_dz, kept_columns, compacted, *scalars_and_backend):
    problem = _kept_problem(student_hidden, student_weight, coefficients, *scalars_and_backend[:-1])
    outputs = empty_outputs(problem, student_hidden, None)
    return outputs.d_hidden, outputs.d_weight


# Of the forward's problem: which gradients there are, and how large those of logits may be.
KEPT_FIELDS = "d_hidden", "d_weight", "column_fraction", "temperature", "student_logit_scale", "teacher_logit_scale"


def _kept_problem(student_hidden, student_weight, coefficients, *scalars) -> Problem:
    """The products of the student's kept columns; what their gradient is of does not matter any more."""
    return Problem(
        tokens=student_hidden.shape[0],
        vocabulary=student_weight.shape[0],
        student_dim=student_hidden.shape[1],
        teacher_dim=0,
        student_dtype=student_hidden.dtype,
        teacher_dtype=coefficients.dtype,  # which is the forward's compute dtype
        device=student_hidden.device,
        divergence=None,
        cross_entropy=False,
        z_loss=True,
        **dict(zip(KEPT_FIELDS, scalars, strict=True)),
    )


def _save(ctx, inputs, output):
    arguments = dict(zip(ARGUMENTS, inputs, strict=True))
    tensors = Tensors(*(arguments.pop(name) for name in Tensors._fields))
    total, terms_, d_hidden, d_weight, d_bias, *others, kept_dz, kept_columns = output
    others += d_hidden, d_weight, d_bias, kept_dz, kept_columns
    ctx.set_materialize_grads(False)
    ctx.scalars = arguments
    ctx.dtypes = [None if t is None else t.dtype for t in tensors[:3]]
    if arguments["keeps_dz"]:
        problem, _ = _problem(**tensors._asdict(), **arguments)
        ctx.backend = backends.name_of(backends.choose(problem, arguments["backend"]))
        ctx.compacted = compacts(problem)
        ctx.mark_non_differentiable(terms_, *others)
        ctx.save_for_backward(tensors.student_hidden, tensors.student_weight, tensors.coefficients, kept_dz, kept_columns)
    elif arguments["deferred"]:
        ctx.mark_non_differentiable(total, *others)
        ctx.save_for_backward(*tensors)
    else:
        ctx.mark_non_differentiable(terms_, *others)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)


def _backward(ctx, d_total, d_terms, *_):
    again = ctx.scalars["deferred"] and not ctx.scalars["keeps_dz"]
    upstream = d_terms if again else d_total
    if upstream is None:
        return (None,) * len(ARGUMENTS)
    wanted = [ctx.scalars[name] for name in ("d_hidden", "d_weight", "d_bias")]
    if ctx.scalars["keeps_dz"]:
        *inputs, kept_dz, kept_columns = ctx.saved_tensors
        scalars = (ctx.scalars[name] for name in KEPT_FIELDS)
        gradients = *multiply_kept(*inputs, upstream, kept_dz, kept_columns, ctx.compacted, *scalars, ctx.backend), None
    elif again:
        tensors = Tensors(*ctx.saved_tensors)._replace(coefficients=upstream)
        gradients = terms(*tensors, *{**ctx.scalars, "deferred": False, "stats": False}.values())[2:5]
    else:
        gradients = [scaled(g, upstream) if w else g for g, w in zip(ctx.saved_tensors, wanted, strict=True)]
    gradients = [rounded(g, dtype) if w else None for g, dtype, w in zip(gradients, ctx.dtypes, wanted, strict=True)]
    if torch.is_grad_enabled():  # create_graph=True
        gradients = [None if g is None else without_second_derivative(g) for g in gradients]
    return *gradients, *[None] * (len(ARGUMENTS) - len(gradients))


def scaled(gradient, upstream):
    """gradient · upstream: in place where this backward is the last that will read it, so that no second copy is ever held.

    A backward that keeps the graph hands out copies, even at upstream 1: the caller may overwrite what it gets. Under a tracer tensors
    are of other types, and the compiler decides what is done in place.
    """
    traced = type(gradient) is not Tensor or type(upstream) is not Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * upstream
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradient
    return gradient.mul_(upstream)


def without_second_derivative(gradient):
    """The gradient as a function of the inputs that cannot be differentiated again: an error in place of a silent zero."""
    return _NoSecondDerivative.apply(gradient, gradient.new_zeros((), requires_grad=True))


class _NoSecondDerivative(torch.autograd.Function):

    @staticmethod
    def forward(ctx, gradient, anchor):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError("losses and log-probabilities have no second derivatives here: call them without create_graph=True")


def rounded(gradient, dtype):
    return gradient if gradient.dtype == dtype else memory.empty(*gradient.shape, like=gradient, dtype=dtype).copy_(gradient)


terms.register_autograd(_backward, setup_context=_save)
