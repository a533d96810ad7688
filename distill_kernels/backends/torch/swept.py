"""The quantised sweep of a chunk in torch operations: the readable version. `quantised` has the estimator, `correction` the rest."""

import torch

from distill_kernels.estimators import quantised
from distill_kernels.estimators.correction import PANEL, Correction, References


class SweptChunk(Correction):
    def swept(self, model, entries):
        """Entries (m,), or a slice."""
        # Integers, exact in float32 up to D = 1040, and to its rounding beyond.
        product = model.rows.float() @ model.head[entries].float().T
        return model.meant(product * model.row_scales[:, :1] * model.head_scales[entries, 0], entries)

    def sweep(self, pilot):
        at_pilot = [self._both(part) for part in pilot.split(PANEL)]
        x, y = (torch.cat(logits, 1) for logits in zip(*at_pilot, strict=True))
        tempered = 1 / self.problem.options.temperature
        self.references = References(*((z * factor).logsumexp(-1, keepdim=True) for z, factor in ((x, tempered), (y, tempered), (x, 1.0))))
        scale, (kd, ce, z_loss) = self.problem.options.student_logit_scale, self.chunk.coefficients.unsqueeze(-1).unbind(1)
        divergence_weight = (scale * kd * tempered).square()
        untempered_weight = (scale * (ce.abs() + 2 * (z_loss * self.references.untempered).abs())).square()
        slope_total = self.masses(x, y).slope.sum(-1, keepdim=True)  # estimated, as the log-sum-exps are
        self.sums, scores = None, []
        for begin in range(0, self.vocabulary, PANEL):
            masses = self.masses(*self._both(slice(begin, begin + PANEL)))
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

    def _both(self, entries):
        x = self.swept(self.student, entries)
        return x, x if self.teacher is None else self.swept(self.teacher, entries)
