"""The row kernel: from a chunk's bare products to loss terms, stats and dz, in torch operations."""

from typing import NamedTuple

import torch

from distill_kernels.divergences import LOG_PROBABILITY_FLOOR
from distill_kernels.plan import Plan
from distill_kernels.problem import TAIL_PROBABILITY, Problem
from distill_kernels.products import apply_head

# (tokens, V) temporaries alive at the worst line of the divergences, counted: the five log-probabilities and masks below and the
# seven of jensen_shannon's mixture.
ROW_BUFFERS = 12


class Rows(NamedTuple):
    """What the row kernel works on: n tokens of one chunk."""

    student_logits: torch.Tensor  # (n, V) bare products on entry, dz on return if problem.gradient
    teacher_logits: torch.Tensor | None  # (n, V) bare products; scratch on return
    student_bias: torch.Tensor | None  # (V,) compute dtype
    teacher_bias: torch.Tensor | None  # (V,) compute dtype
    labels: torch.Tensor | None  # (n,) int64
    coefficients: torch.Tensor  # (n, 3) compute dtype
    terms: torch.Tensor  # (n, 3) written
    stats: torch.Tensor | None  # (n, 6) written

    def part(self, tokens: slice):
        per_token = {k: v[tokens] for k, v in self._asdict().items() if v is not None and not k.endswith("_bias")}
        return self._replace(**per_token)


def row_kernel(problem: Problem, plan: Plan, rows: Rows):
    for begin in range(0, rows.terms.shape[0], plan.row_tokens):
        part = slice(begin, begin + plan.row_tokens)
        _some_rows(problem, rows.part(part))


def _log_probabilities(logits, temperature):
    """Log-softmax raised to the floor, and where it did not have to be raised."""
    log_p = torch.log_softmax(logits / temperature if temperature != 1.0 else logits, -1)
    return log_p.clamp(min=LOG_PROBABILITY_FLOOR), log_p >= LOG_PROBABILITY_FLOOR


def _some_rows(problem: Problem, rows: Rows):
    z, y = rows.student_logits, rows.teacher_logits
    apply_head(z, rows.student_bias, problem.student_logit_scale, problem.student_softcap)
    log_q, kept = _log_probabilities(z, problem.temperature)
    log_p = log_q
    if y is not None:
        apply_head(y, rows.teacher_bias, problem.teacher_logit_scale, problem.teacher_softcap)
        log_p, _ = _log_probabilities(y, problem.temperature)
    kd, ce, z_loss = rows.coefficients.unsqueeze(-1).unbind(1)  # (n, 1) each
    rows.terms.zero_()

    dz = None
    if problem.divergence is not None:
        value, slope = problem.divergence(log_p, log_q)
        rows.terms[:, 0] = value.sum(-1)
        del value
        if problem.gradient:
            slope = torch.where(kept, slope, 0)
            dz = (slope - log_q.exp() * slope.sum(-1, keepdim=True)) * (kd / problem.temperature)
        del slope
    if rows.stats is not None:
        _write_stats(rows, log_p, log_q, has_teacher=y is not None)
    del log_p, log_q, kept

    if problem.cross_entropy or problem.z_loss:
        dz = _untempered_terms(problem, rows, dz, ce, z_loss)
    if problem.gradient:
        if problem.student_softcap is not None:
            dz *= 1 - (z / problem.student_softcap).square()
        torch.mul(dz, problem.student_logit_scale, out=z)


def _untempered_terms(problem, rows, dz, ce, z_loss):
    """Writes cross entropy and squared log-sum-exp, and returns dz with their gradients added."""
    z = rows.student_logits
    lse = z.logsumexp(-1, keepdim=True)
    rows.terms[:, 2:] = lse.square()
    bare = z - lse
    pull = 2 * z_loss * lse
    label_weight = smoothing = None
    if problem.cross_entropy:
        label = rows.labels.clamp(min=0).unsqueeze(-1)
        has_label = rows.labels.unsqueeze(-1) >= 0
        at_label = bare.gather(-1, label)
        nll = -at_label.clamp(min=LOG_PROBABILITY_FLOOR)
        cross_entropy = (1 - problem.label_smoothing) * nll
        label_weight = (1 - problem.label_smoothing) * ((at_label >= LOG_PROBABILITY_FLOOR) & has_label).to(z.dtype)
        pull = pull + ce * label_weight
        if problem.label_smoothing:
            smoothing = has_label.to(z.dtype) * (problem.label_smoothing / problem.vocabulary)
            kept = bare >= LOG_PROBABILITY_FLOOR
            cross_entropy = cross_entropy - smoothing * bare.clamp(min=LOG_PROBABILITY_FLOOR).sum(-1, keepdim=True)
            pull = pull + ce * smoothing * kept.sum(-1, keepdim=True)
        rows.terms[:, 1:2] = torch.where(has_label, cross_entropy, 0)
        if rows.stats is not None:
            rows.stats[:, 1:2] = torch.where(has_label, nll, 0)
    if not problem.gradient:
        return dz
    added = bare.exp().mul_(pull)
    if label_weight is not None:
        added.scatter_add_(-1, label, (-ce * label_weight).to(added.dtype))
    if smoothing is not None:
        added.sub_(kept * (ce * smoothing))
    return added if dz is None else dz.add_(added)


def _write_stats(rows, log_p, log_q, has_teacher):
    rows.stats.zero_()
    q = log_q.exp()
    rows.stats[:, 0] = rows.terms[:, 0]
    rows.stats[:, 2] = -(q * log_q).sum(-1)
    if has_teacher:
        p = log_p.exp()
        rows.stats[:, 3] = -(p * log_p).sum(-1)
        rows.stats[:, 4] = rows.student_logits.argmax(-1) == rows.teacher_logits.argmax(-1)
        rows.stats[:, 5] = q.mul_(p < TAIL_PROBABILITY).sum(-1)
