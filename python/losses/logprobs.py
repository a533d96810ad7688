"""Log-probabilities of chosen tokens and entropies, differentiable, without logits: what on-policy losses are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill_kernels.api.losses import per_token, vocabulary_shards
from distill_kernels.api.losses.inputs import Inputs
from distill_kernels.call import checks
from distill_kernels.call.options import Options
from distill_kernels.divergences import STUDENT_ENTROPY
from distill_kernels.ops import listed_entries, whole_vocabulary


def token_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_mib: int | None = None,
    process_group: Any = None,  # a torch.distributed.ProcessGroup or DeviceMesh
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of chosen tokens and entropies of their distributions, both differentiable, without logits.

    q = softmax(softcap(logit_scale · (hidden · weightᵀ + bias)) / temperature); returns (log q_id (...), −Σ q·log q (...)) in nats,
    float32 (float64 for float64 inputs). Costs 1S forward and 3S backward. Arguments and errors as in `distillation_loss`; positions
    whose id is `ignore_index` give 0 and cost nothing.

    Example
        >>> hidden, head = torch.randn(2, 8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> logprobs, entropies = token_logprobs(hidden, head, torch.randint(1000, (2, 8)))
        >>> (-logprobs - 0.01 * entropies).mean().backward()
    """
    options = _options(temperature, logit_scale, softcap, backend, workspace_mib, ignore_index=ignore_index, process_group=process_group)
    checks.matrix("weight", weight, 2)
    inputs, spread = vocabulary_shards.localised(Inputs(hidden, weight, labels=token_ids, student_bias=bias), options)
    if spread.tokens:
        raise NotImplementedError("token_logprobs wants all tokens on every rank; gather hidden and token_ids, whose tokens are divided")
    checks.head("", hidden, inputs.student_head, inputs.student_bias)
    checks.tokens("token_ids", token_ids, hidden.shape[:-1], (torch.int64,), "int64")
    checks.devices({"hidden": hidden, "weight": inputs.student_head, "bias": inputs.student_bias, "token_ids": token_ids})
    valid = token_ids != ignore_index
    token_ids = per_token.marked("token_ids", token_ids, valid, None if spread.group else len(inputs.student_head))
    factor = valid.reshape(-1)
    coefficients = torch.stack((factor, factor, torch.zeros_like(factor)), -1).to(inputs.compute_dtype)
    tensors = per_token.flat(inputs, token_ids, coefficients, teacher=False)
    problem = per_token.problem(tensors, options, cross_entropy=True, compact=True, group=spread.group)
    terms = whole_vocabulary.run(problem, tensors).terms
    terms = terms * coefficients  # so that no gradient reaches a masked position, whatever the caller does with its 0
    return -terms[:, 1].view(token_ids.shape), terms[:, 0].view(token_ids.shape)


def selected_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (..., K)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_mib: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of several chosen tokens at each position, and of all others together, both differentiable, without logits.

    q = softmax(softcap(logit_scale · (hidden · weightᵀ + bias)) / temperature); returns (log q_id (..., K), log Σ_{v not chosen} q_v (...))
    in nats, float32 (float64 for float64 inputs), none below −10⁴. The others are summed as they are, not as 1 − Σ q_id, so that the
    second is right where next to nothing is left. What `token_logprobs` is for one id, at the same cost: 1S forward and 3S backward. For
    losses of the teacher's or the student's own top k, for instance on-policy reverse KL, whose teacher is asked for ids that the student
    chose.

    Arguments
        token_ids (..., K) int64: none twice in a row; -1 where a row has fewer than K, which gives 0. A row of none gives 0 for the others,
            too, and costs nothing. On CPU ids out of range raise ValueError, elsewhere their row is NaN.
        All others as in `token_logprobs`.

    Example
        >>> hidden, head = torch.randn(2, 8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> top = (hidden @ head.T).topk(16).indices
        >>> logprobs, rest = selected_logprobs(hidden, head, top)
        >>> (logprobs.exp() * logprobs).sum().backward()
    """
    options = _options(temperature, logit_scale, softcap, backend, workspace_mib)
    checks.head("", hidden, weight, bias)
    check_lists("token_ids", token_ids, hidden.shape[:-1])
    checks.devices({"hidden": hidden, "weight": weight, "bias": bias, "token_ids": token_ids})
    inputs = Inputs(hidden, weight, student_bias=bias)
    tensors = per_token.flat(inputs, None, hidden.new_empty(0), teacher=False)
    problem = per_token.problem(tensors, options, kd=False, compact=True)
    logprobs, rest = listed_entries.run_logprobs(problem, tensors, token_ids.reshape(-1, token_ids.shape[-1]))
    return logprobs.view(token_ids.shape), rest.view(token_ids.shape[:-1])


def _options(
    temperature: float, logit_scale: float, softcap: float | None, backend: str, workspace_mib: int | None, **others: Any
) -> Options:
    """Those under which the student's logits are z / temperature: softcap(scale · a) / τ = cap/τ · tanh((scale/τ) · a / (cap/τ))."""
    checks.finite_number("temperature", temperature, above=0)
    checks.finite_number("logit_scale", logit_scale)
    checks.finite_number("softcap", softcap, above=0, optional=True)
    checks.finite_number("logit_scale / temperature", logit_scale / temperature)
    checks.finite_number("softcap / temperature", None if softcap is None else softcap / temperature, above=0, optional=True)
    return Options(
        divergence=STUDENT_ENTROPY,
        student_logit_scale=logit_scale / temperature,
        student_softcap=None if softcap is None else softcap / temperature,
        reduction="none",
        backend=backend,
        workspace_mib=workspace_mib,
        **others,
    )


def check_lists(name: str, ids: Any, tokens: torch.Size) -> None:
    """Raises unless ids (..., K) have at least one place for each token (...)."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype is not torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}")
    if ids.shape[:-1] != tokens or ids.dim() == len(tokens) or ids.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one place for each token, shape {(*tokens, 'K')}, got {tuple(ids.shape)}")
