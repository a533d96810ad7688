"""The custom ops of listed entries, with their fake implementations and gradients, as `whole_vocabulary` has those of all entries.

`terms` is a loss: if it is not deferred its gradients are made while the logits are at hand (3S in all), else backward computes the logits
again (4S) and knows what each token's terms are worth. `logprobs` are log-probabilities, of which backward knows that likewise (1S forward,
3S backward).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill_kernels import backends
from distill_kernels.call import checks
from distill_kernels.call.problem import Problem, Tensors, as_text, from_text, text_with
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR
from distill_kernels.listed import (
    Lists,
    checked,
    log_probabilities,
    log_probability_gradient,
    terms_and_gradient,
    with_labels,
    with_teacher,
)
from distill_kernels.ops.gradients import finished, keep, kept, scaled, without_autocast
from distill_kernels.schedule.chunked import Chunk, Outputs, empty_outputs


def _read(
    call: str, numbers: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, coefficients: Tensor, ids: Tensor
) -> tuple[Problem, Tensors]:
    tensors = Tensors(hidden, weight, bias, None, None, None, None, coefficients)
    problem = from_text(call, numbers, tensors, listed=ids.shape[1])
    return replace(problem, d_hidden=False, d_weight=False, d_bias=False) if problem.deferred else problem, tensors


def _run(problem: Problem, tensors: Tensors, lists: Lists, loss: backends.Loss) -> Outputs:
    with without_autocast(problem.device):
        return backends.choose(problem).run_listed(problem, tensors, lists.ids, loss)


def run_terms(
    problem: Problem,
    tensors: Tensors,
    ids: Tensor,  # (N, K) int64
    log_p: Tensor | None,  # (N, K)
    tail_mass: Tensor | None,  # (N,)
) -> tuple[Tensor, Tensor]:
    """(total (), terms (N, 3)), of which the one is differentiable that `problem.deferred` says."""
    call, numbers = as_text(problem)
    labels = tensors.labels if problem.cross_entropy else None
    made = terms(*tensors[:3], ids, log_p if problem.kd else None, tail_mass, labels, tensors.coefficients, numbers, call)
    return made[0], made[1]


@torch.library.custom_op("distill_kernels::listed_terms", mutates_args=())
def terms(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K) int64
    log_p: Tensor | None,  # (N, K); None: no divergence
    tail_mass: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,)
    coefficients: Tensor,  # (N, 3)
    numbers: Tensor | None,  # (k,) and
    call: str,  # as `as_text` makes them
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem, tensors = _read(call, numbers, hidden, weight, bias, coefficients, ids)
    checks.labels("labels", labels, problem.vocabulary)
    with without_autocast(problem.device):
        lists = checked("teacher_ids", ids, problem.vocabulary, (coefficients != 0).any(-1))
        if problem.kd:
            lists = with_teacher(lists, log_p, tail_mass, problem.options, problem.compute_dtype)
        if problem.cross_entropy:
            lists = with_labels(lists, labels)

    def loss(chunk: Chunk, listed: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        made = terms_and_gradient(problem, lists.of(chunk.tokens), chunk.coefficients, listed, others)
        chunk.terms.copy_(made[0])
        return made[1], made[2]

    outputs = _run(problem, tensors, lists, loss)
    return (coefficients * outputs.terms).sum(), outputs.terms, outputs.d_hidden, outputs.d_weight, outputs.d_bias


TERMS_TENSORS = 8  # and `numbers`


@terms.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias, ids, _, _, _, coefficients, numbers, call = arguments
    problem, _ = _read(call, numbers, hidden, weight, bias, coefficients, ids)
    outputs = empty_outputs(problem, hidden, None)
    return outputs.terms.new_empty(()), outputs.terms, outputs.d_hidden, outputs.d_weight, outputs.d_bias


def _save_terms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, numbers, call = inputs
    total, terms_, *gradients = output
    hidden, weight, bias, *_, coefficients = tensors
    problem = from_text(call, numbers, Tensors(hidden, weight, bias, None, None, None, None, coefficients))
    ctx.set_materialize_grads(False)
    ctx.call, ctx.deferred = call, problem.deferred
    ctx.wanted = problem.d_hidden, problem.d_weight, problem.d_bias
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
    ctx.mark_non_differentiable(total if ctx.deferred else terms_, *gradients)
    keep(ctx, *([*tensors, numbers] if ctx.deferred else gradients))


def _terms_backward(ctx: Any, d_total: Tensor | None, d_terms: Tensor | None, *_: Any) -> tuple[Any, ...]:
    upstream = d_terms if ctx.deferred else d_total
    if upstream is None:
        return (None,) * (TERMS_TENSORS + 2)
    if ctx.deferred:
        *inputs, _, numbers = kept(ctx)
        gradients = terms(*inputs, upstream, numbers, text_with(ctx.call, deferred=False))[2:]
    else:
        gradients = [scaled(g, upstream) if wanted else g for g, wanted in zip(kept(ctx), ctx.wanted, strict=True)]
    return finished(gradients, ctx.dtypes, ctx.wanted, TERMS_TENSORS + 2)


terms.register_autograd(_terms_backward, setup_context=_save_terms)


def run_logprobs(problem: Problem, tensors: Tensors, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log q_k (N, K), log q_rest (N,)), differentiable."""
    call, numbers = as_text(problem)
    made, rest = logprobs(*tensors[:3], ids, numbers, call)
    return made, rest


@torch.library.custom_op("distill_kernels::listed_logprobs", mutates_args=())
def logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K) int64
    numbers: Tensor | None,  # (k,) and
    call: str,  # as `as_text` makes them
) -> tuple[Tensor, Tensor]:
    """(log q_k (N, K), log q_rest (N,)); 0 where there is no entry, and for tokens without any."""
    counts = (ids != -1).any(-1)
    coefficients = counts[:, None].expand(-1, 3)
    problem, tensors = _read(call, numbers, hidden, weight, bias, coefficients, ids)
    tensors = tensors._replace(coefficients=coefficients.to(problem.compute_dtype))
    lists = checked("token_ids", ids, problem.vocabulary, counts)
    made, rest = (tensor.zero_() for tensor in _empty_logprobs(problem, ids))

    def loss(chunk: Chunk, listed: Tensor, others: Tensor) -> None:
        part = lists.of(chunk.tokens)
        log_q = log_probabilities(part.ids, listed, others, 1.0, 1)
        there, flawed = part.ids >= 0, part.flawed[:, None]
        row = torch.where(there, log_q.listed.clamp(min=LOG_PROBABILITY_FLOOR), 0).masked_fill(flawed, torch.nan)
        made[chunk.tokens] = row
        rest[chunk.tokens] = log_q.rest.clamp(min=LOG_PROBABILITY_FLOOR).masked_fill(flawed, torch.nan).squeeze(-1)
        chunk.terms.zero_()

    _run(problem, tensors, lists, loss)
    return made, rest


def _empty_logprobs(problem: Problem, ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.shape, dtype=problem.compute_dtype), ids.new_empty(ids.shape[:1], dtype=problem.compute_dtype)


@logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, numbers: Tensor | None, call: str
) -> tuple[Tensor, Tensor]:
    problem, _ = _read(call, numbers, hidden, weight, bias, ids, ids)
    return _empty_logprobs(problem, ids)


@torch.library.custom_op("distill_kernels::listed_logprobs_gradient", mutates_args=())
def logprobs_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    d_logprobs: Tensor,  # (N, K) upstream
    d_rest: Tensor,  # (N,)
    numbers: Tensor | None,
    call: str,
) -> tuple[Tensor, Tensor, Tensor]:
    d_logprobs = torch.where(ids >= 0, d_logprobs, 0)
    d_rest = torch.where((ids != -1).any(-1), d_rest, 0)[:, None]
    # In the place of the cross entropy's: the most that a gradient of a logit can be.
    most = d_logprobs.abs().sum(-1, keepdim=True) + d_rest.abs()
    coefficients = torch.cat([torch.zeros_like(most), most, torch.zeros_like(most)], 1)
    problem, tensors = _read(call, numbers, hidden, weight, bias, coefficients, ids)
    lists = checked("token_ids", ids, problem.vocabulary, (most != 0).squeeze(-1))

    def loss(chunk: Chunk, listed: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        part = lists.of(chunk.tokens)
        made = log_probabilities(part.ids, listed, others, 1.0, 1)
        d_listed, d_others = log_probability_gradient(made, d_logprobs[chunk.tokens], d_rest[chunk.tokens])
        chunk.terms.zero_()
        flawed = part.flawed[:, None]
        return d_listed.masked_fill(flawed, torch.nan), d_others.masked_fill(flawed, torch.nan)

    outputs = _run(problem, tensors, lists, loss)
    return outputs.d_hidden, outputs.d_weight, outputs.d_bias


@logprobs_gradient.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias, ids, d_logprobs, _, numbers, call = arguments
    problem, _ = _read(call, numbers, hidden, weight, bias, d_logprobs, ids)
    outputs = empty_outputs(problem, hidden, None)
    return outputs.d_hidden, outputs.d_weight, outputs.d_bias


def _save_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, numbers, call = inputs
    hidden, weight, bias, ids = tensors
    problem = from_text(call, numbers, Tensors(hidden, weight, bias, None, None, None, None, ids))
    ctx.call = text_with(call, deferred=False)
    ctx.wanted = problem.d_hidden, problem.d_weight, problem.d_bias
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
    keep(ctx, *tensors, numbers)


def _logprobs_backward(ctx: Any, d_logprobs: Tensor, d_rest: Tensor) -> tuple[Any, ...]:
    *tensors, numbers = kept(ctx)
    gradients = logprobs_gradient(*tensors, d_logprobs, d_rest, numbers, ctx.call)
    return finished(gradients, ctx.dtypes, ctx.wanted, len(tensors) + 2)


logprobs.register_autograd(_logprobs_backward, setup_context=_save_logprobs)
