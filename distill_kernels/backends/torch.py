"""The torch backend: the chunked schedule with a row kernel of torch operations. Any device torch has, no compiler.

The readable version of what the compiled kernels do; see `chunked.Rows` for the arguments. Temporaries of the row kernel are held
for `Plan.row_tokens` tokens at a time, so that the workspace stays as planned.
"""

import torch

from distill_kernels import chunked
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR
from distill_kernels.plan import Plan, Schedule, make_plan
from distill_kernels.problem import TAIL_PROBABILITY, Problem, Tensors

# (tokens, V) temporaries alive at the worst line of the divergences, counted: the five log-probabilities and masks below and the
# seven of jensen_shannon's mixture.
ROW_BUFFERS = 12


def why_not(problem: Problem) -> str | None:
    return None


def schedule(problem: Problem) -> Schedule:
    return Schedule(row_buffers=ROW_BUFFERS)


def run(problem: Problem, tensors: Tensors) -> chunked.Outputs:
    return chunked.run(problem, tensors, make_plan(problem, schedule(problem)), row_kernel)


def row_kernel(problem: Problem, plan: Plan, rows: chunked.Rows):
    for begin in range(0, rows.terms.shape[0], plan.row_tokens):
        part = slice(begin, begin + plan.row_tokens)

        def cut(tensor, part=part):
            return None if tensor is None else tensor[part]

        _some_rows(
            problem,
            rows._replace(
                student_logits=rows.student_logits[part],
                teacher_logits=cut(rows.teacher_logits),
                labels=cut(rows.labels),
                coefficients=rows.coefficients[part],
                terms=rows.terms[part],
                stats=cut(rows.stats),
            ),
        )


def _apply_head(logits, bias, scale, softcap):
    """In place: softcap(scale · (product + bias))."""
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


def _log_probabilities(logits, temperature):
    """Log-softmax raised to the floor, and where it did not have to be raised."""
    log_p = torch.log_softmax(logits / temperature if temperature != 1.0 else logits, -1)
    return log_p.clamp(min=LOG_PROBABILITY_FLOOR), log_p >= LOG_PROBABILITY_FLOOR


def _some_rows(problem: Problem, rows: chunked.Rows):
    z, y = rows.student_logits, rows.teacher_logits
    _apply_head(z, rows.student_bias, problem.student_logit_scale, problem.student_softcap)
    log_q, kept = _log_probabilities(z, problem.temperature)
    log_p = log_q
    if y is not None:
        _apply_head(y, rows.teacher_bias, problem.teacher_logit_scale, problem.teacher_softcap)
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
        label_weight = (1 - problem.label_smoothing) * ((at_label >= LOG_PROBABILITY_FLOOR) & has_label)
        pull = pull + ce * label_weight
        if problem.label_smoothing:
            smoothing = has_label * (problem.label_smoothing / problem.vocabulary)
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
