"""The custom ops of listed entries, with their fake implementations and gradients, as `autograd` has those of whole vocabularies.

`listed_terms` is a loss: with deferred=False its gradients are made while the logits are at hand (3S in all), with deferred=True backward
computes the logits again (4S) and knows what each token's terms are worth. `listed_logprobs` are log-probabilities, of which backward
knows that likewise (1S forward, 3S backward).
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from distill_kernels import backends
from distill_kernels.call.problem import Problem, Tensors, check_labels
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR, from_parameters
from distill_kernels.listed import checked, log_probabilities, log_probability_gradient, terms_and_gradient, with_labels, with_teacher
from distill_kernels.ops.whole_vocabulary import rounded, scaled, without_autocast, without_second_derivative
from distill_kernels.schedule.chunked import empty_outputs


def _problem(hidden: Tensor, weight: Tensor, ids: Tensor, **options) -> Problem:
    fixed = {"teacher_dim": 0, "teacher_dtype": hidden.dtype, "cross_entropy": False, "z_loss": False, "divergence": None}
    return Problem(
        tokens=hidden.shape[0],
        vocabulary=weight.shape[0],
        student_dim=hidden.shape[1],
        student_dtype=hidden.dtype,
        device=hidden.device,
        listed=ids.shape[1],
        **fixed | options,
    )


def _tensors(hidden, weight, bias, coefficients) -> Tensors:
    return Tensors(hidden, weight, bias, None, None, None, None, coefficients)


def _run(problem: Problem, tensors: Tensors, ids: Tensor, loss, backend: str):
    with without_autocast(problem.device):
        return backends.choose(problem, backend).run_listed(problem, tensors, ids, loss)


def _compute_terms(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K) int64
    log_p: Tensor | None,  # (N, K); None: no divergence
    tail_mass: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,)
    coefficients: Tensor,  # (N, 3)
    divergence: str,  # "": none
    parameters: Sequence[float],
    tail: str,
    exponent: float,
    cross_entropy: bool,
    z_loss: bool,
    temperature: float,
    student_logit_scale: float,
    student_softcap: float | None,
    d_hidden: bool,
    d_weight: bool,
    d_bias: bool,
    compact: bool,
    workspace_mib: int,
    backend: str,
    deferred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = locals()
    problem = _terms_problem(**arguments)
    check_labels("labels", labels, problem.vocabulary)
    with without_autocast(problem.device):
        lists = checked("teacher_ids", ids, problem.vocabulary, (coefficients != 0).any(-1))
        if problem.divergence is not None:
            lists = with_teacher(lists, log_p, tail_mass, tail, exponent, problem.compute_dtype)
        if cross_entropy:
            lists = with_labels(lists, labels)

    def loss(chunk, listed, others):
        made = terms_and_gradient(problem, lists.of(chunk.tokens), tail, chunk.coefficients, listed, others)
        chunk.terms.copy_(made[0])
        return made[1:]

    outputs = _run(problem, _tensors(hidden, weight, bias, coefficients), lists.ids, loss, backend)
    return (coefficients * outputs.terms).sum(), outputs.terms, outputs.d_hidden, outputs.d_weight, outputs.d_bias


def _terms_problem(*, hidden, weight, ids, divergence, parameters, deferred, **arguments) -> Problem:
    names = ("cross_entropy", "z_loss", "temperature", "student_logit_scale", "student_softcap", "compact", "workspace_mib")
    wanted = {name: arguments[name] and not deferred for name in ("d_hidden", "d_weight", "d_bias")}
    made = from_parameters(divergence, parameters) if divergence else None
    return _problem(hidden, weight, ids, divergence=made, **{name: arguments[name] for name in names}, **wanted)


TERMS_ARGUMENTS = tuple(inspect.signature(_compute_terms).parameters)
TERMS_TENSORS = 8
terms = torch.library.custom_op("distill_kernels::listed_terms", _compute_terms, mutates_args=())


@terms.register_fake
def _(*args, **kwargs):
    arguments = inspect.signature(_compute_terms).bind(*args, **kwargs).arguments
    outputs = empty_outputs(_terms_problem(**arguments), arguments["hidden"], None)
    return outputs.terms.new_empty(()), outputs.terms, outputs.d_hidden, outputs.d_weight, outputs.d_bias


def _save_terms(ctx, inputs, output):
    tensors, scalars = inputs[:TERMS_TENSORS], inputs[TERMS_TENSORS:]
    total, terms_, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.scalars = dict(zip(TERMS_ARGUMENTS[TERMS_TENSORS:], scalars, strict=True))
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
    ctx.mark_non_differentiable(total if ctx.scalars["deferred"] else terms_, *gradients)
    ctx.save_for_backward(*(tensors if ctx.scalars["deferred"] else gradients))


def _terms_backward(ctx, d_total, d_terms, *_):
    upstream = d_terms if ctx.scalars["deferred"] else d_total
    if upstream is None:
        return (None,) * len(TERMS_ARGUMENTS)
    wanted = [ctx.scalars[name] for name in ("d_hidden", "d_weight", "d_bias")]
    if ctx.scalars["deferred"]:
        *inputs, _ = ctx.saved_tensors
        gradients = terms(*inputs, upstream, *(ctx.scalars | {"deferred": False}).values())[2:]
    else:
        gradients = [scaled(g, upstream) if w else g for g, w in zip(ctx.saved_tensors, wanted, strict=True)]
    return _finished(gradients, ctx.dtypes, wanted, len(TERMS_ARGUMENTS))


def _finished(gradients, dtypes, wanted, arguments):
    """What backward returns: gradients of the first three arguments, where wanted."""
    gradients = [rounded(g, dtype) if w else None for g, dtype, w in zip(gradients, dtypes, wanted, strict=True)]
    if torch.is_grad_enabled():  # create_graph=True
        gradients = [None if g is None else without_second_derivative(g) for g in gradients]
    return *gradients, *[None] * (arguments - len(gradients))


terms.register_autograd(_terms_backward, setup_context=_save_terms)


@torch.library.custom_op("distill_kernels::listed_logprobs", mutates_args=())
def logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K) int64
    logit_scale: float,
    softcap: float | None,
    d_hidden: bool,
    d_weight: bool,
    d_bias: bool,
    workspace_mib: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(log q_k (N, K), log q_rest (N,)); 0 where there is no entry, and for tokens without any."""
    problem = _logprobs_problem(hidden, weight, ids, logit_scale, softcap, False, False, False, workspace_mib)
    counts = (ids != -1).any(-1)
    lists = checked("token_ids", ids, problem.vocabulary, counts)
    made, rest = (tensor.zero_() for tensor in _empty_logprobs(problem, ids))

    def loss(chunk, listed, others):
        part = lists.of(chunk.tokens)
        log_q = log_probabilities(part.ids, listed, others, 1.0, 1)
        there, flawed = part.ids >= 0, part.flawed[:, None]
        row = torch.where(there, log_q.listed.clamp(min=LOG_PROBABILITY_FLOOR), 0).masked_fill(flawed, torch.nan)
        made[chunk.tokens] = row
        rest[chunk.tokens] = log_q.rest.clamp(min=LOG_PROBABILITY_FLOOR).masked_fill(flawed, torch.nan).squeeze(-1)
        chunk.terms.zero_()

    coefficients = counts[:, None].to(problem.compute_dtype).expand(-1, 3)
    _run(problem, _tensors(hidden, weight, bias, coefficients), lists.ids, loss, backend)
    return made, rest


def _logprobs_problem(hidden, weight, ids, logit_scale, softcap, d_hidden, d_weight, d_bias, workspace_mib) -> Problem:
    return _problem(
        hidden, weight, ids, student_logit_scale=logit_scale, student_softcap=softcap, d_hidden=d_hidden, d_weight=d_weight, d_bias=d_bias,
        workspace_mib=workspace_mib, compact=True,
    )  # fmt: skip


def _empty_logprobs(problem, ids):
    return ids.new_empty(ids.shape, dtype=problem.compute_dtype), ids.new_empty(ids.shape[:1], dtype=problem.compute_dtype)


@logprobs.register_fake
def _(hidden, weight, bias, ids, logit_scale, softcap, d_hidden, d_weight, d_bias, workspace_mib, backend):
    return _empty_logprobs(_logprobs_problem(hidden, weight, ids, logit_scale, softcap, False, False, False, workspace_mib), ids)


@torch.library.custom_op("distill_kernels::listed_logprobs_gradient", mutates_args=())
def logprobs_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    d_logprobs: Tensor,  # (N, K) upstream
    d_rest: Tensor,  # (N,)
    logit_scale: float,
    softcap: float | None,
    d_hidden: bool,
    d_weight: bool,
    d_bias: bool,
    workspace_mib: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _logprobs_problem(hidden, weight, ids, logit_scale, softcap, d_hidden, d_weight, d_bias, workspace_mib)
    d_logprobs = torch.where(ids >= 0, d_logprobs, 0)
    d_rest = torch.where((ids != -1).any(-1), d_rest, 0)[:, None]
    # In the place of the cross entropy's: the most that a gradient of a logit can be.
    most = d_logprobs.abs().sum(-1, keepdim=True) + d_rest.abs()
    coefficients = torch.cat([torch.zeros_like(most), most, torch.zeros_like(most)], 1)
    lists = checked("token_ids", ids, problem.vocabulary, (most != 0).squeeze(-1))

    def loss(chunk, listed, others):
        part = lists.of(chunk.tokens)
        made = log_probabilities(part.ids, listed, others, 1.0, 1)
        gradient = log_probability_gradient(made, d_logprobs[chunk.tokens], d_rest[chunk.tokens])
        chunk.terms.zero_()
        return tuple(part_.masked_fill(part.flawed[:, None], torch.nan) for part_ in gradient)

    outputs = _run(problem, _tensors(hidden, weight, bias, coefficients), lists.ids, loss, backend)
    return outputs.d_hidden, outputs.d_weight, outputs.d_bias


@logprobs_gradient.register_fake
def _(hidden, weight, bias, ids, d_logprobs, d_rest, logit_scale, softcap, d_hidden, d_weight, d_bias, workspace_mib, backend):
    problem = _logprobs_problem(hidden, weight, ids, logit_scale, softcap, d_hidden, d_weight, d_bias, workspace_mib)
    outputs = empty_outputs(problem, hidden, None)
    return outputs.d_hidden, outputs.d_weight, outputs.d_bias


def _save_logprobs(ctx, inputs, output):
    *tensors, ctx.logit_scale, ctx.softcap, d_hidden, d_weight, d_bias, ctx.workspace_mib, ctx.backend = inputs
    ctx.wanted = d_hidden, d_weight, d_bias
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
    ctx.save_for_backward(*tensors)


def _logprobs_backward(ctx, d_logprobs, d_rest):
    scalars = ctx.logit_scale, ctx.softcap, *ctx.wanted, ctx.workspace_mib, ctx.backend
    gradients = logprobs_gradient(*ctx.saved_tensors, d_logprobs, d_rest, *scalars)
    return _finished(gradients, ctx.dtypes, ctx.wanted, 11)


logprobs.register_autograd(_logprobs_backward, setup_context=_save_logprobs)
