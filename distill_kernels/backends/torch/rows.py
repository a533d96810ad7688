"""The row kernel: from a chunk's bare products to loss terms, stats and dz, in torch operations.

    statistics   of each token, a maximum and sums of exponentials of both models: what log-sum-exps are made of
    sums         what the loss's terms and dz ask of the whole vocabulary once those are known
    finish       terms, stats and dz

Where the vocabulary is in shards each rank does this with its own entries, and between the steps the ranks put together what they have
(`shards`). Then all tokens of a chunk take a step before any takes the next, for one exchange of many tokens' numbers is as slow as that
of one token's; without shards a few tokens go through all three, and what `sums` has made on its way is not made again.
"""

from typing import NamedTuple

import torch

from distill_kernels.call.problem import TAIL_PROBABILITY, Problem
from distill_kernels.call.shards import Shards
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR
from distill_kernels.products import apply_head
from distill_kernels.schedule.plan import Plan

STATISTICS = 6  # columns of `_statistics`
# (tokens, V) temporaries alive at the worst line of the divergences, counted: the five log-probabilities and masks below and the
# seven of jensen_shannon's mixture.
ROW_BUFFERS = 12


class Rows(NamedTuple):
    """What the row kernel works on: n tokens of one chunk, and V entries of the vocabulary, or of a rank's shard of it."""

    student_logits: torch.Tensor  # (n, V) bare products on entry, dz on return if problem.gradient
    teacher_logits: torch.Tensor | None  # (n, V) bare products; scratch on return
    student_bias: torch.Tensor | None  # (V,) compute dtype
    teacher_bias: torch.Tensor | None  # (V,) compute dtype
    labels: torch.Tensor | None  # (n,) int64, of the whole vocabulary
    coefficients: torch.Tensor  # (n, 3) compute dtype
    terms: torch.Tensor  # (n, 3) written
    stats: torch.Tensor | None  # (n, 6) written
    first_entry: int = 0  # of the whole vocabulary's, the one that is the first here

    def part(self, tokens: slice):
        per_token = {k: v[tokens] for k, v in self._asdict().items() if isinstance(v, torch.Tensor) and not k.endswith("_bias")}
        return self._replace(**per_token)


class LogSumExp(NamedTuple):
    """Of (z − reference) / temperature; in two parts, for a log-probability is as exact as the difference of large logits."""

    reference: torch.Tensor  # (n, 1)
    log_sum: torch.Tensor  # (n, 1)

    def log_softmax(self, logits, temperature=1.0):
        below = logits - self.reference
        return (below if temperature == 1.0 else below.div_(temperature)).sub_(self.log_sum)


class Statistics(NamedTuple):
    student: LogSumExp  # tempered
    bare: LogSumExp  # the student's, untempered
    teacher: LogSumExp | None  # tempered
    agreement: torch.Tensor  # (n,) whether both models' largest logits are of one entry


class Sums(NamedTuple):
    """Over the vocabulary, (n, 1) each; zero what is not wanted."""

    value: torch.Tensor  # of the divergence
    slope: torch.Tensor  # its derivatives by log q, but of entries below the floor
    label: torch.Tensor  # the label's bare log-probability
    smoothing: torch.Tensor  # bare log-probabilities, raised to the floor
    above_floor: torch.Tensor  # entries whose bare log-probability was not raised
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    tail: torch.Tensor


class Made(NamedTuple):
    """What sums were made of: (n, V) each."""

    sums: torch.Tensor  # (n, len(Sums))
    log_q: torch.Tensor  # not below the floor
    slope: torch.Tensor | None


def row_kernel(problem: Problem, plan: Plan, rows: Rows, shards: Shards | None = None):
    """A generator, which yields while numbers of other ranks are on their way; without shards it never does."""
    tokens = rows.terms.shape[0]
    parts = [rows.part(slice(begin, begin + plan.row_tokens)) for begin in range(0, tokens, plan.row_tokens)]
    if shards is None:
        for part in parts:
            statistics = _merged(problem, _statistics(problem, part)[None])
            made = _sums(problem, part, statistics)
            _finish(problem, part, statistics, _unpacked(made.sums), made)
        return
    merged = _merged(problem, (yield from shards.gather(torch.cat([_statistics(problem, part) for part in parts]))))
    of_parts = [_part(merged, plan.row_tokens, i) for i in range(len(parts))]
    sums = torch.cat([_sums(problem, *pair).sums for pair in zip(parts, of_parts, strict=True)])
    sums = (yield from shards.gather(sums)).sum(0)
    for part, statistics, of_part in zip(parts, of_parts, sums.split(plan.row_tokens), strict=True):
        made = _sums(problem, part, statistics) if problem.gradient else None
        _finish(problem, part, statistics, _unpacked(of_part), made)


def _part(statistics, count, index):
    """Of some tokens, whatever the statistics are made of."""
    if statistics is None or isinstance(statistics, torch.Tensor):
        return None if statistics is None else statistics[index * count : (index + 1) * count]
    return type(statistics)(*(_part(field, count, index) for field in statistics))


def _statistics(problem: Problem, rows: Rows):
    """(n, STATISTICS): maximum and Σ exp of the student's logits, tempered and not, those of the teacher's, and whether both maxima are of
    one entry. Makes the logits the meant ones."""
    z, y = rows.student_logits, rows.teacher_logits
    apply_head(z, rows.student_bias, problem.options.student_logit_scale, problem.options.student_softcap)
    columns = [*_maximum_and_sums(z, problem.options.temperature, problem.cross_entropy or problem.z_loss)]
    if y is not None:
        apply_head(y, rows.teacher_bias, problem.options.teacher_logit_scale, problem.options.teacher_softcap)
        columns += _maximum_and_sums(y, problem.options.temperature, False)[:2]
        if rows.stats is not None:
            columns.append((z.argmax(-1) == y.argmax(-1)).to(z.dtype))
    zeros = z.new_zeros(len(z))
    return torch.stack([*columns, *[zeros] * (STATISTICS - len(columns))], -1)


def _maximum_and_sums(logits, temperature, untempered):
    """Of each token: the maximum, Σ exp((z − maximum) / temperature), and Σ exp(z − maximum) if wanted, else 0."""
    maximum = logits.amax(-1)
    below = logits - torch.where(maximum == -torch.inf, 0, maximum)[:, None]
    bare = below.exp().sum(-1) if untempered or temperature == 1.0 else torch.zeros_like(maximum)
    return maximum, bare if temperature == 1.0 else below.div_(temperature).exp_().sum(-1), bare


def _merged(problem: Problem, statistics) -> Statistics:
    """Of (ranks, n, STATISTICS), in the order of ranks."""
    student_maxima, tempered, bare, teacher_maxima, teacher, agreement = statistics.unbind(-1)

    def merged(maxima, sums, temperature):
        top = maxima.amax(0)
        reference = torch.where(top == -torch.inf, 0, top)
        log_sum = (((maxima - reference) / temperature).exp() * sums).sum(0).log()
        return LogSumExp(reference[:, None], log_sum[:, None])

    has_teacher = problem.teacher_dim > 0
    best = student_maxima.argmax(0, keepdim=True)  # the first of equal ones, as in a whole vocabulary
    return Statistics(
        merged(student_maxima, tempered, problem.options.temperature),
        merged(student_maxima, bare, 1.0),
        merged(teacher_maxima, teacher, problem.options.temperature) if has_teacher else None,
        agreement.gather(0, best)[0] * (best == teacher_maxima.argmax(0, keepdim=True))[0],
    )


def _sums(problem: Problem, rows: Rows, statistics: Statistics) -> Made:
    z, y = rows.student_logits, rows.teacher_logits
    log_q = statistics.student.log_softmax(z, problem.options.temperature)
    kept = log_q >= LOG_PROBABILITY_FLOOR  # a log-probability that is raised to the floor is a constant
    log_q = log_q.clamp_(min=LOG_PROBABILITY_FLOOR)
    log_p = log_q if y is None else statistics.teacher.log_softmax(y, problem.options.temperature).clamp_(min=LOG_PROBABILITY_FLOOR)
    sums, slope = {}, None
    if problem.divergence is not None:
        value, slope = problem.divergence(log_p, log_q)
        sums["value"] = value.sum(-1)
        del value
        slope = torch.where(kept, slope, 0) if problem.gradient else None
        if slope is not None:
            sums["slope"] = slope.sum(-1)
    del kept
    if rows.stats is not None:
        q = log_q.exp()
        sums["student_entropy"] = -(q * log_q).sum(-1)
        if y is not None:
            p = log_p.exp()
            sums["teacher_entropy"] = -(p * log_p).sum(-1)
            sums["tail"] = q.mul_(p < TAIL_PROBABILITY).sum(-1)
    del log_p
    if problem.cross_entropy:
        place, here = _places(rows)
        at_label = z.gather(-1, place)
        sums["label"] = torch.where(here, statistics.bare.log_softmax(at_label), 0).squeeze(-1)
        if problem.options.label_smoothing:
            bare = statistics.bare.log_softmax(z)
            sums["above_floor"] = (bare >= LOG_PROBABILITY_FLOOR).sum(-1).to(z.dtype)
            sums["smoothing"] = bare.clamp_(min=LOG_PROBABILITY_FLOOR).sum(-1)
    zeros = z.new_zeros(len(z))
    return Made(torch.stack([sums.get(name, zeros) for name in Sums._fields], -1), log_q, slope)


def _unpacked(sums) -> Sums:
    return Sums(*sums.unsqueeze(-1).unbind(1))


def _places(rows: Rows):
    """(n, 1) both: where the labels are among the entries here, and whether they are."""
    labels = rows.labels.unsqueeze(-1)
    place = labels - rows.first_entry
    here = (labels >= 0) & (place >= 0) & (place < rows.student_logits.shape[-1])
    return torch.where(here, place, 0), here


def _finish(problem: Problem, rows: Rows, statistics: Statistics, sums: Sums, made: Made | None):
    """Writes terms and stats and, over the student's logits, dz."""
    z = rows.student_logits
    kd, ce, z_loss = rows.coefficients.unsqueeze(-1).unbind(1)  # (n, 1) each
    rows.terms.zero_()
    if problem.divergence is not None:
        rows.terms[:, :1] = sums.value
    if rows.stats is not None:
        rows.stats.copy_(torch.cat([sums.value, torch.zeros_like(kd), *sums[5:7], statistics.agreement[:, None], sums.tail], -1))
    dz = None
    if problem.gradient and problem.divergence is not None:
        dz = made.log_q.exp().mul_(sums.slope)
        dz = torch.sub(made.slope, dz, out=dz).mul_(kd / problem.options.temperature)
        made = None
    if problem.cross_entropy or problem.z_loss:
        dz = _untempered_terms(problem, rows, statistics.bare, sums, dz, ce, z_loss)
    if problem.gradient:
        if problem.options.student_softcap is not None:
            dz *= 1 - (z / problem.options.student_softcap).square()
        torch.mul(dz, problem.options.student_logit_scale, out=z)


def _untempered_terms(problem: Problem, rows: Rows, bare: LogSumExp, sums: Sums, dz, ce, z_loss):
    """Writes cross entropy and squared log-sum-exp, and returns dz with their gradients added."""
    z = rows.student_logits
    lse = bare.reference + bare.log_sum
    rows.terms[:, 2:] = lse.square()
    pull = 2 * z_loss * lse
    label_weight = smoothing = None
    if problem.cross_entropy:
        has_label = rows.labels.unsqueeze(-1) >= 0
        nll = -sums.label.clamp(min=LOG_PROBABILITY_FLOOR)
        cross_entropy = (1 - problem.options.label_smoothing) * nll
        label_weight = (1 - problem.options.label_smoothing) * ((sums.label >= LOG_PROBABILITY_FLOOR) & has_label).to(z.dtype)
        pull = pull + ce * label_weight
        if problem.options.label_smoothing:
            smoothing = has_label.to(z.dtype) * (problem.options.label_smoothing / problem.whole_vocabulary)
            cross_entropy = cross_entropy - smoothing * sums.smoothing
            pull = pull + ce * smoothing * sums.above_floor
        rows.terms[:, 1:2] = torch.where(has_label, cross_entropy, 0)
        if rows.stats is not None:
            rows.stats[:, 1:2] = torch.where(has_label, nll, 0)
    if not problem.gradient:
        return dz
    log_q = bare.log_softmax(z)
    kept = None if smoothing is None else log_q >= LOG_PROBABILITY_FLOOR
    added = log_q.exp_().mul_(pull)
    if label_weight is not None:
        place, here = _places(rows)
        added.scatter_add_(-1, place, torch.where(here, -ce * label_weight, 0).to(added.dtype))
    if smoothing is not None:
        added.sub_(kept * (ce * smoothing))
    return added if dz is None else dz.add_(added)
