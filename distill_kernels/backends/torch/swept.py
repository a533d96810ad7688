"""A chunk's quantised sweep and its correction, in torch operations: the readable version. `quantised` has the estimator.

Logits of one model are (n, m), a token to a row, for m vocabulary entries at a time. All sums are of exp(logit − reference), with the
references that the pilot gives: a token whose logits exceed it by more than float32 has room for ends in an error that is not finite, and
its chunk is computed exactly.
"""

from typing import NamedTuple

import torch

from distill_kernels import quantised
from distill_kernels.backends.torch.rows import apply_head
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR
from distill_kernels.problem import TAIL_PROBABILITY, Problem, Tensors
from distill_kernels.products import Products
from distill_kernels.sampling import Library

PANEL = 2048  # vocabulary entries whose logits exist at a time
PANEL_BUFFERS = 24  # (n, PANEL) float32 at the worst line: logits, log-probabilities, masses and differences of two models


def swept_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes for each token of a chunk, and beside, without what sampled products take (`sampling.sampled_bytes`)."""
    dims = quantised.padded_dim(problem.student_dim) + (quantised.padded_dim(problem.teacher_dim) if problem.teacher_dim else 0)
    token_bytes = 4 * (2 * problem.kept_columns + PANEL_BUFFERS * PANEL + 4 * dims)
    return token_bytes, 4 * PANEL * 3 * dims


class Model(NamedTuple):
    """One model's chunk."""

    hidden: torch.Tensor  # (n, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,) float32
    rows: torch.Tensor  # (n, D') float32, the hidden states quantised
    row_scales: torch.Tensor  # (n, 3)
    head: torch.Tensor  # (V, D') 8-bit
    head_scales: torch.Tensor  # (V, 3)
    scale: float
    softcap: float | None

    def swept(self, entries):
        """Logits (n, m) of vocabulary entries, a slice or (m,), by the 8-bit product."""
        product = self.rows @ self.head[entries].float().T  # integers, exact in float32 up to D = 1040, and to its rounding beyond
        logits = product * self.row_scales[:, :1] * self.head_scales[entries, 0]
        return self._meant(logits, entries)

    def exact(self, entries, products):
        weight = self.weight[entries]
        logits = torch.empty(len(self.hidden), len(weight), dtype=torch.float32, device=weight.device)
        products.logits(self.hidden, weight, logits)
        return self._meant(logits, entries)

    def of_label(self, labels):
        """Exact logit (n, 1) of each token's own label."""
        logits = (self.hidden.float() * self.weight[labels].float()).sum(-1, keepdim=True)
        apply_head(logits, None if self.bias is None else self.bias[labels, None], self.scale, self.softcap)
        return logits

    def _meant(self, logits, entries):
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


class SweptChunk(Library):
    """The kernels that `sampling` asks for, and the sweep before them."""

    def __init__(self, problem: Problem, tensors: Tensors, products: Products, chunk):
        super().__init__(products, tensors.student_weight, torch.float32)
        self.problem, self.chunk, self.vocabulary = problem, chunk, problem.vocabulary

        def model(prefix, hidden):
            rows, row_scales = quantised.quantise(hidden, problem.sweep)
            weight, bias, head, head_scales = (getattr(tensors, f"{prefix}_{part}") for part in ("weight", "bias", "quantised", "scales"))
            scale, softcap = getattr(problem, f"{prefix}_logit_scale"), getattr(problem, f"{prefix}_softcap")
            bias = None if bias is None else bias.float()
            return Model(hidden, weight, bias, rows.float(), row_scales, head, head_scales, scale, softcap)

        self.student = model("student", chunk.student_hidden)
        self.teacher = None if chunk.teacher_hidden is None else model("teacher", chunk.teacher_hidden)

    def sweep(self, pilot):
        """Sums over the whole vocabulary, kept for `gather`, and the columns' scores (V,)."""
        at_pilot = [self._swept(part) for part in pilot.split(PANEL)]
        x, y = (torch.cat(logits, 1) for logits in zip(*at_pilot, strict=True))
        tempered = 1 / self.problem.temperature
        self.references = References(*((z * factor).logsumexp(-1, keepdim=True) for z, factor in ((x, tempered), (y, tempered), (x, 1.0))))
        scale, (kd, ce, z_loss) = self.problem.student_logit_scale, self.chunk.coefficients.unsqueeze(-1).unbind(1)
        divergence_weight = (scale * kd * tempered).square()
        untempered_weight = (scale * (ce.abs() + 2 * (z_loss * self.references.untempered).abs())).square()
        slope_total = self._masses(x, y).slope.sum(-1, keepdim=True)  # estimated, as the log-sum-exps are
        self.sums, scores = None, []
        for begin in range(0, self.vocabulary, PANEL):
            masses = self._masses(*self._swept(slice(begin, begin + PANEL)))
            self.sums = masses.summed() if self.sums is None else self.sums + masses.summed()
            q, p, q1 = (mass.clamp(max=1.0) for mass in (masses.student, masses.teacher, masses.untempered))
            dz = (masses.slope - masses.student * slope_total).square().clamp(max=1.0)
            squares = divergence_weight * (dz + quantised.AGREEMENT * (p + q).square()) + untempered_weight * q1.square()
            scores.append(squares.sum(0))
        scores = torch.cat(scores)
        if self.problem.cross_entropy:
            labels = self.chunk.labels
            scores.index_add_(0, labels.clamp(min=0), ((scale * ce).square().squeeze(-1) * (labels >= 0)).to(scores.dtype))
        return scores.sqrt()

    def gather(self, columns, weights, out):
        """Corrects the sums by the exact logits of the columns, writes terms, errors and stats, and the columns of dz."""
        tokens, tempered = len(self.chunk.terms), 1 / self.problem.temperature
        kept_x, kept_y, moments = [], [], 0.0
        for part, weight in zip(columns.split(PANEL), weights.split(PANEL), strict=True):
            x = self.student.exact(part, self.products)
            y = x if self.teacher is None else self.teacher.exact(part, self.products)
            difference = self._masses(x, y) - self._masses(*self._swept(part))
            self.sums = self.sums + difference.summed(weight)
            # (n, m, 5): of a column kept surely the weight is 1, and nothing is uncertain.
            parts = torch.stack(difference[:5], -1).double() * (weight.double() * (weight.double() - 1)).sqrt()[:, None]
            moments = moments + parts.transpose(1, 2) @ parts
            kept_x.append(x)
            kept_y.append(y)
        x, y = torch.cat(kept_x, 1), torch.cat(kept_y, 1)
        logs = References(self.sums.student.log(), self.sums.teacher.log(), self.sums.untempered.log())
        lse = References(*(reference + log for reference, log in zip(self.references, logs, strict=True)))
        value, slope, gradient = self._divergence(logs)
        self.chunk.errors[:, 0] = (gradient[:, None] @ moments[:, :4, :4] @ gradient[:, :, None]).clamp(min=0).sqrt().view(tokens)
        self.chunk.errors[:, 1] = (moments[:, 4, 4].sqrt() / self.sums.untempered.view(tokens)).to(self.chunk.errors.dtype)
        if not self._untempered:
            self.chunk.errors[:, 1] = 0
        sums = self.sums
        entropies = logs.student - sums.student_entropy / sums.student, logs.teacher - sums.teacher_entropy / sums.teacher
        if quantised.exceeds(self.problem, self.chunk):
            self.chunk.errors.zero_()
            self.chunk.recomputed.add_(1)
            lse, value, slope, entropies, tail, agreement = self._exactly()
        elif self.chunk.stats is not None:
            q, p = (x * tempered - lse.student).exp(), (y * tempered - lse.teacher).exp()
            tail = (q * (p < TAIL_PROBABILITY) * weights).sum(-1, keepdim=True)
            agreement = x.argmax(-1) == y.argmax(-1)
        lse = References(*(z.float() for z in lse))
        self._finish(lse, value.float())
        if self.chunk.stats is not None:
            self.chunk.stats[:, 0:1] = value
            self.chunk.stats[:, 2:3] = entropies[0]
            if self.teacher is not None:
                self.chunk.stats[:, 3:4], self.chunk.stats[:, 5:6] = entropies[1], tail
                self.chunk.stats[:, 4] = agreement
        if not self.problem.gradient:
            return
        dz = out[: tokens * len(columns)].view(tokens, -1)
        torch.mul(self._dz(x, y, columns, lse, slope.float()), weights, out=dz)
        if self.chunk.d_bias is not None:
            self.chunk.d_bias.index_add_(0, columns, dz.sum(0))

    @property
    def _untempered(self):
        return self.problem.cross_entropy or self.problem.z_loss

    def _swept(self, entries):
        x = self.student.swept(entries)
        return x, x if self.teacher is None else self.teacher.swept(entries)

    def _masses(self, x, y):
        inverse = 1 / self.problem.temperature
        log_q, log_p = x * inverse - self.references.student, y * inverse - self.references.teacher
        q, p, q1 = log_q.exp(), log_p.exp(), (x - self.references.untempered).exp()
        value = slope = torch.zeros_like(q)
        if self.problem.divergence is not None:
            value, slope = self.problem.divergence(log_p, log_q)
        return Sums(q, p, value, slope, q1, q * log_q, p * log_p)

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
        inverse = 1 / self.problem.temperature

        def logits(panel):
            x = self.student.exact(panel, self.products)
            return x, x if self.teacher is None else self.teacher.exact(panel, self.products)

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

    def _finish(self, lse, value):
        """Terms, and the label's part of what `_dz` needs."""
        chunk, problem = self.chunk, self.problem
        _, ce, z_loss = chunk.coefficients.unsqueeze(-1).unbind(1)
        chunk.terms.zero_()
        chunk.terms[:, :1] = value
        if chunk.stats is not None:
            chunk.stats.zero_()
        self.pull, self.push = 2 * z_loss * lse.untempered, None
        if self._untempered:
            chunk.terms[:, 2:] = lse.untempered.square()
        if problem.cross_entropy:
            has_label = (chunk.labels >= 0).unsqueeze(-1)
            bare = self.student.of_label(chunk.labels.clamp(min=0)) - lse.untempered
            nll = torch.where(has_label, -bare.clamp(min=LOG_PROBABILITY_FLOOR), 0)
            chunk.terms[:, 1:2] = nll
            if chunk.stats is not None:
                chunk.stats[:, 1:2] = nll
            self.push = ce * ((bare >= LOG_PROBABILITY_FLOOR) & has_label)
            self.pull = self.pull + self.push

    def _dz(self, x, y, columns, lse, slope_total):
        """(n, K): the gradient of the bare products at the kept columns, their exact logits x and y given."""
        problem, inverse = self.problem, 1 / self.problem.temperature
        dz = torch.zeros_like(x)
        if problem.divergence is not None:
            bare_q = x * inverse - lse.student
            log_q, log_p = (z.clamp(min=LOG_PROBABILITY_FLOOR) for z in (bare_q, y * inverse - lse.teacher))
            slope = torch.where(bare_q >= LOG_PROBABILITY_FLOOR, problem.divergence(log_p, log_q)[1], 0)
            dz = (slope - log_q.exp() * slope_total) * (self.chunk.coefficients[:, :1] * inverse)
        if self._untempered:
            dz = dz + self.pull * (x - lse.untempered).exp()
            if self.push is not None:
                dz = dz - self.push * (columns == self.chunk.labels[:, None])
        if problem.student_softcap is not None:
            dz = dz * (1 - (x / problem.student_softcap).square())
        return dz * problem.student_logit_scale
