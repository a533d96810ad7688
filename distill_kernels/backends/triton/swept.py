"""A chunk whose logits are swept in 8 bits: `correction` with the kernels of `quantised_sweep`; no logits but those of a few columns."""

import torch

from distill_kernels.backends.triton.kept_columns import CORRECTED
from distill_kernels.backends.triton.launch import Launcher
from distill_kernels.estimators.correction import Correction, References, Sums

# Of the moments that `difference_kernel` writes, which stands where in the matrix.
MATRIX = (0, 1, 2, 3, 1, 4, 5, 6, 2, 5, 7, 8, 3, 6, 8, 9)


class SweptChunk(Correction):
    def __init__(self, launcher: Launcher, *arguments):
        super().__init__(*arguments)
        self.launcher = launcher

    def sweep(self, pilot):
        self.relative_to = self.launcher.references(*self._both(pilot))
        self.references = References(*self.relative_to[:3].unsqueeze(-1))
        sums, squares = self.launcher.quantised_sweep(self.chunk, self.student, self.teacher, self.relative_to)
        self.sums = Sums(*sums.sum(-1, keepdim=True, dtype=torch.float64))
        return squares.sum(0).sqrt()

    def swept(self, model, entries):
        return self.launcher.swept_logits(model, entries)

    def differences(self, x, y, columns, weights):
        y = None if self.teacher is None else y
        made = self.launcher.differences(x, y, *self._both(columns), weights, self.relative_to).sum(-1, dtype=torch.float64)
        *four, untempered = made[CORRECTED:]
        moments = torch.stack([four[i] for i in MATRIX], -1).view(-1, 4, 4)
        return Sums(*made[:CORRECTED].unsqueeze(-1), below=0.0), moments, untempered

    def gradient(self, x, y, columns, weights, out):
        y = None if self.teacher is None else y
        factors = torch.cat(self.factors, 1).T.contiguous()
        self.launcher.kept_gradient(self.chunk, x, y, columns, weights, factors, out)

    def _both(self, entries):
        """Logits (n, m) of student and teacher, None where there is none."""
        return self.swept(self.student, entries), None if self.teacher is None else self.swept(self.teacher, entries)
