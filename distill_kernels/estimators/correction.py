"""The correction of a quantised sweep by the columns that are computed exactly: sums by difference, errors, terms, and the gradient of the
kept columns. `quantised` has the estimator.

Logits of one model are (n, m), a token to a row, for m vocabulary entries at a time. All sums are of exp(logit − reference), with the
references that the pilot gives: a token whose logits exceed it by more than float32 has room for ends in an error that is not finite, and
its chunk is computed exactly.
"""

from typing import NamedTuple

import torch

from distill_kernels.call.problem import TAIL_PROBABILITY, Problem, Tensors
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR
from distill_kernels.estimators import quantised
from distill_kernels.estimators.quantised import Trust
from distill_kernels.estimators.sampling import Library
from distill_kernels.products import Products, apply_head

PANEL = 2048  # vocabulary entries that torch's operations work on at a time
PANEL_BUFFERS = 25  # (n, PANEL) float32 at the worst line: logits, log-probabilities, masses and differences of two models


def correction_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes for each token of a chunk, and beside, without what sampled products take (`sampling.sampled_bytes`)."""
    dims = quantised.padded_dim(problem.student_dim) + (quantised.padded_dim(problem.teacher_dim) if problem.teacher_dim else 0)
    # Exact logits of two models by panels, and side by side; hidden states being turned.
    token_bytes = 4 * (4 * problem.kept_columns + PANEL_BUFFERS * PANEL + 4 * dims)
    return token_bytes, 4 * PANEL * 3 * dims


class Model(NamedTuple):
    """One model's chunk."""

    hidden: torch.Tensor  # (n, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,) float32
    rows: torch.Tensor  # (n, D') 8-bit, the hidden states quantised
    row_scales: torch.Tensor  # (n, 3)
    head: torch.Tensor  # (V, D') 8-bit
    head_scales: torch.Tensor  # (V, 3)
    scale: float
    softcap: float | None

    def exact(self, entries, products):
        weight = self.weight[entries]
        logits = torch.empty(len(self.hidden), len(weight), dtype=torch.float32, device=weight.device)
        products.logits(self.hidden, weight, logits)
        return self.meant(logits, entries)

    def of_label(self, labels):
        """Exact logit (n, 1) of each token's own label."""
        logits = (self.hidden.float() * self.weight[labels].float()).sum(-1, keepdim=True)
        apply_head(logits, None if self.bias is None else self.bias[labels, None], self.scale, self.softcap)
        return logits

    def meant(self, logits, entries):
        """In place, of bare products."""
        apply_head(logits, None if self.bias is None else self.bias[entries], self.scale, self.softcap)
        return logits


class Sums(NamedTuple):
    """Of some entries' masses relative to the references, (n, m) each, or summed over them (n, 1)."""

    student: torch.Tensor  # exp(x/τ − r_q)
    teacher: torch.Tensor  # exp(y/τ − r_p)
    value: torch.Tensor  # of the divergence, taken at log-probabilities relative to the references
    slope: torch.Tensor
    untempered: torch.Tensor  # exp(x − r_1)
    student_entropy: torch.Tensor  # student mass times its logarithm
    teacher_entropy: torch.Tensor
    below: torch.Tensor  # entries that one model has below the floor while the other gives them mass; no correction of it counts

    def summed(self, weights=1.0):
        return Sums(*((part * weights).sum(-1, keepdim=True, dtype=torch.float64) for part in self))

    def __add__(self, other):
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def __sub__(self, other):
        return Sums(*(a - b for a, b in zip(self, other, strict=True)))


class References(NamedTuple):
    """Log-sum-exps (n, 1), or what stands for them."""

    student: torch.Tensor
    teacher: torch.Tensor
    untempered: torch.Tensor


class Factors(NamedTuple):
    """What the gradient of a token's logits is made with, (n, 1) float32 each."""

    student: torch.Tensor  # log-sum-exps
    teacher: torch.Tensor
    untempered: torch.Tensor
    slope: torch.Tensor  # Σ slope
    divergence: torch.Tensor  # weights of the divergence's gradient, of the untempered softmax, and of the label
    pull: torch.Tensor
    push: torch.Tensor


class Correction(Library):
    """The kernels that `sampling` asks for, where the chunk's logits are swept. A backend adds the sweep:

        sweep(pilot)             returns the columns' scores (V,); sets `references`, and `sums` over the whole vocabulary
        swept(model, entries)    (n, m) the sweep's logits of some entries, (m,)

    and may have its own `differences` and `gradient`.
    """

    def __init__(self, problem: Problem, tensors: Tensors, products: Products, chunk, trust: Trust, dtype=torch.float32, scale=None):
        super().__init__(products, tensors.student_weight, dtype, scale=scale)
        self.problem, self.chunk, self.trust, self.vocabulary = problem, chunk, trust, problem.vocabulary

        def model(prefix, hidden):
            rows, row_scales = quantised.quantise(hidden, problem.options.sweep)
            weight, bias, head, head_scales = (getattr(tensors, f"{prefix}_{part}") for part in ("weight", "bias", "quantised", "scales"))
            scale, softcap = getattr(problem.options, f"{prefix}_logit_scale"), getattr(problem.options, f"{prefix}_softcap")
            bias = None if bias is None else bias.float()
            return Model(hidden, weight, bias, rows, row_scales, head, head_scales, scale, softcap)

        self.student = model("student", chunk.student_hidden)
        self.teacher = None if chunk.teacher_hidden is None else model("teacher", chunk.teacher_hidden)

    def sweep(self, pilot):
        raise NotImplementedError

    def swept(self, model, entries):
        raise NotImplementedError

    def gather(self, columns, weights, out):
        """Corrects the sums by the exact logits of the columns, writes terms, errors and stats, and the columns of dz."""
        tokens, tempered = len(self.chunk.terms), 1 / self.problem.options.temperature
        parts = [self._exact(part) for part in columns.split(PANEL)]
        x, y = (torch.cat(kept, 1) for kept in zip(*parts, strict=True))
        y = x if self.teacher is None else y
        del parts
        # A clamped entry's slope is 0, and the clamp is relative to the log-sum-exps: no sum relative to other references knows either.
        beyond_correction = self.sums.below > 0
        added, moments, untempered_moment = self.differences(x, y, columns, weights)
        self.sums = self.sums + added
        logs = References(self.sums.student.log(), self.sums.teacher.log(), self.sums.untempered.log())
        lse = References(*(reference + log for reference, log in zip(self.references, logs, strict=True)))
        value, slope, gradient = self._divergence(logs)
        self.chunk.errors[:, 0] = (gradient[:, None] @ moments @ gradient[:, :, None]).clamp(min=0).sqrt().view(tokens)
        self.chunk.errors[:, 1] = (untempered_moment.sqrt() / self.sums.untempered.view(tokens)).to(self.chunk.errors.dtype)
        if not self._untempered:
            self.chunk.errors[:, 1] = 0
        self.chunk.errors.add_(torch.where(beyond_correction, torch.inf, 0.0))  # a NaN stays one
        sums = self.sums
        entropies = logs.student - sums.student_entropy / sums.student, logs.teacher - sums.teacher_entropy / sums.teacher
        if self.trust.exceeds(self.chunk, *(None if model is None else model.row_scales for model in (self.student, self.teacher))):
            self.chunk.errors.zero_()
            self.chunk.recomputed.add_(1)
            lse, value, slope, entropies, tail, agreement = self._exactly()
        elif self.chunk.stats is not None:
            q, p = (x * tempered - lse.student).exp(), (y * tempered - lse.teacher).exp()
            tail = (q * (p < TAIL_PROBABILITY) * weights).sum(-1, keepdim=True)
            agreement = x.argmax(-1) == y.argmax(-1)
        lse = References(*(z.float() for z in lse))
        self._finish(lse, value.float(), slope.float())
        if self.chunk.stats is not None:
            self.chunk.stats[:, 0:1] = value
            self.chunk.stats[:, 2:3] = entropies[0]
            if self.teacher is not None:
                self.chunk.stats[:, 3:4], self.chunk.stats[:, 5:6] = entropies[1], tail
                self.chunk.stats[:, 4] = agreement
        if not self.problem.gradient:
            return
        dz = out[: tokens * len(columns)].view(tokens, -1)
        self.gradient(x, y, columns, weights, dz)
        if self.chunk.d_bias is not None:
            self.chunk.d_bias.index_add_(0, columns, dz.sum(0) if self.scale is None else dz.sum(0) * self.scale)

    def differences(self, x, y, columns, weights):
        """From exact logits (n, K) of the columns kept: what corrects the sums, and M over the first four and over the untempered one,
        (n, 4, 4) and (n,)."""
        added, moments, untempered_moment = None, 0.0, 0.0
        for begin in range(0, len(columns), PANEL):
            part = slice(begin, begin + PANEL)
            late_x = self.swept(self.student, columns[part])
            late_y = late_x if self.teacher is None else self.swept(self.teacher, columns[part])
            difference = self.masses(x[:, part], y[:, part]) - self.masses(late_x, late_y)
            here = difference.summed(weights[part])
            added = here if added is None else added + here
            # Of a column kept surely the weight is 1, and nothing is uncertain.
            uncertain = (weights[part].double() * (weights[part].double() - 1)).sqrt()
            four = torch.stack(difference[:4], -1).double() * uncertain[:, None]
            moments = moments + four.transpose(1, 2) @ four
            untempered_moment = untempered_moment + (difference.untempered * uncertain).square().sum(-1)
        return added, moments, untempered_moment

    def gradient(self, x, y, columns, weights, out):
        """out (n, K) ← the gradient of the bare products at the columns kept, each times its weight; `factors` are known by now."""
        for begin in range(0, len(columns), PANEL):
            part = slice(begin, begin + PANEL)
            torch.mul(self._dz(x[:, part], y[:, part], columns[part]), weights[part], out=out[:, part])

    def _exact(self, entries):
        x = self.student.exact(entries, self.products)
        return x, x[:, :0] if self.teacher is None else self.teacher.exact(entries, self.products)

    @property
    def _untempered(self):
        return self.problem.cross_entropy or self.problem.z_loss

    def masses(self, x, y):
        """Of logits (n, m)."""
        inverse = 1 / self.problem.options.temperature
        log_q, log_p = x * inverse - self.references.student, y * inverse - self.references.teacher
        q, p, q1 = log_q.exp(), log_p.exp(), (x - self.references.untempered).exp()
        value = slope = torch.zeros_like(q)
        below = torch.zeros_like(q, dtype=torch.int8)
        if self.problem.divergence is not None:
            below = ((log_q < LOG_PROBABILITY_FLOOR) & (p > 0) | (log_p < LOG_PROBABILITY_FLOOR) & (q > 0)).to(torch.int8)
        log_q, log_p = (log.clamp(min=LOG_PROBABILITY_FLOOR) for log in (log_q, log_p))
        if self.problem.divergence is not None:
            value, slope = self.problem.divergence(log_p, log_q)
        return Sums(q, p, value, slope, q1, q * log_q, p * log_p, below)

    def _divergence(self, logs):
        """Σ value and Σ slope (n, 1) of the corrected sums, and the value's gradient (n, 4) with respect to the first four."""
        if self.problem.divergence is None:
            return torch.zeros_like(logs.student), torch.zeros_like(logs.student), logs.student.new_zeros(len(logs.student), 4)
        renormalise = self.problem.divergence.body.renormalise
        sums, step = self.sums, 1e-5  # of a logarithm: in float64 a central difference has ten digits
        value, slope = renormalise(sums.value, sums.slope, logs.teacher, logs.student)

        def difference(p, q):
            ends = [renormalise(sums.value, sums.slope, logs.teacher + sign * p, logs.student + sign * q)[0] for sign in (1, -1)]
            return (ends[0] - ends[1]) / (2 * step)

        one, none = torch.ones_like(value), torch.zeros_like(value)
        gradient = (
            difference(0, step) / sums.student,
            difference(step, 0) / sums.teacher,
            renormalise(one, none, logs.teacher, logs.student)[0],  # it is linear in both sums
            renormalise(none, one, logs.teacher, logs.student)[0],
        )
        return value, slope, torch.cat(gradient, 1)

    def _exactly(self):
        """The same without a sweep: log-sum-exps over exact logits, a panel at a time, and then the sums of log-probabilities."""
        panels = [slice(begin, begin + PANEL) for begin in range(0, self.vocabulary, PANEL)]
        inverse = 1 / self.problem.options.temperature

        def logits(panel):
            x, y = self._exact(panel)
            return x, x if self.teacher is None else y

        lse, best = None, [(torch.full_like(self.sums.student, -torch.inf), None)] * 2
        for panel in panels:
            x, y = logits(panel)
            here = [(z * factor).logsumexp(-1, keepdim=True).double() for z, factor in ((x, inverse), (y, inverse), (x, 1.0))]
            lse = here if lse is None else [torch.logaddexp(a, b) for a, b in zip(lse, here, strict=True)]
            for i, z in enumerate((x, y)):
                top, place = z.max(-1, keepdim=True)
                ahead = top > best[i][0]
                place = panel.start + place
                best[i] = torch.maximum(best[i][0], top), place if best[i][1] is None else torch.where(ahead, place, best[i][1])
        lse = References(*lse)
        totals = [0.0] * 5
        for panel in panels:
            x, y = logits(panel)
            bare_q = x * inverse - lse.student.float()
            log_q, log_p = (z.clamp(min=LOG_PROBABILITY_FLOOR) for z in (bare_q, y * inverse - lse.teacher.float()))
            value = slope = torch.zeros_like(x)
            if self.problem.divergence is not None:
                value, slope = self.problem.divergence(log_p, log_q)
            q, p = log_q.exp(), log_p.exp()
            parts = value, torch.where(bare_q >= LOG_PROBABILITY_FLOOR, slope, 0), -q * log_q, -p * log_p, q * (p < TAIL_PROBABILITY)
            totals = [total + part.sum(-1, keepdim=True, dtype=torch.float64) for total, part in zip(totals, parts, strict=True)]
        value, slope, *entropies, tail = totals
        return lse, value, slope, entropies, tail, (best[0][1] == best[1][1]).squeeze(-1)

    def _finish(self, lse, value, slope):
        """Terms, and `factors`."""
        chunk, problem = self.chunk, self.problem
        kd, ce, z_loss = chunk.coefficients.unsqueeze(-1).unbind(1)
        chunk.terms.zero_()
        chunk.terms[:, :1] = value
        if chunk.stats is not None:
            chunk.stats.zero_()
        pull, push = 2 * z_loss * lse.untempered, torch.zeros_like(ce)
        if self._untempered:
            chunk.terms[:, 2:] = lse.untempered.square()
        if problem.cross_entropy:
            has_label = (chunk.labels >= 0).unsqueeze(-1)
            bare = self.student.of_label(chunk.labels.clamp(min=0)) - lse.untempered
            nll = torch.where(has_label, -bare.clamp(min=LOG_PROBABILITY_FLOOR), 0)
            chunk.terms[:, 1:2] = nll
            if chunk.stats is not None:
                chunk.stats[:, 1:2] = nll
            push = ce * ((bare >= LOG_PROBABILITY_FLOOR) & has_label)
            pull = pull + push
        self.factors = Factors(*lse, slope, kd / problem.options.temperature, pull, push)

    def _dz(self, x, y, columns):
        problem, factors, inverse = self.problem, self.factors, 1 / self.problem.options.temperature
        dz = torch.zeros_like(x)
        if problem.divergence is not None:
            bare_q = x * inverse - factors.student
            log_q, log_p = (z.clamp(min=LOG_PROBABILITY_FLOOR) for z in (bare_q, y * inverse - factors.teacher))
            slope = torch.where(bare_q >= LOG_PROBABILITY_FLOOR, problem.divergence(log_p, log_q)[1], 0)
            dz = (slope - log_q.exp() * factors.slope) * factors.divergence
        if self._untempered:
            dz = dz + factors.pull * (x - factors.untempered).exp()
            if problem.cross_entropy:
                dz = dz - factors.push * (columns == self.chunk.labels[:, None])
        if problem.options.student_softcap is not None:
            dz = dz * (1 - (x / problem.options.student_softcap).square())
        return dz * problem.options.student_logit_scale
