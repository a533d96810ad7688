"""A chunk's listed entries in torch operations: the readable version. `listed` says what is made of its logits, and why."""

from typing import NamedTuple

import torch

from distill_kernels.call.problem import Problem
from distill_kernels.products import apply_head
from distill_kernels.schedule.plan import Plan

LISTED_BUFFERS = 5  # (tokens, V) temporaries alive at the worst line: two softmaxes, a product, a ratio and a mask


class ListedRows(NamedTuple):
    """n tokens of one chunk."""

    logits: torch.Tensor  # (n, V) bare products on entry; meant ones, −∞ where listed, on return of `others`; dz on that of `gradient`
    ids: torch.Tensor  # (n, K) int64, negative where there is none
    bias: torch.Tensor | None  # (V,) compute dtype

    def parts(self, plan: Plan):
        """(slice of tokens, their rows), few enough to bound the temporaries."""
        for begin in range(0, len(self.ids), plan.row_tokens):
            part = slice(begin, begin + plan.row_tokens)
            yield part, self._replace(logits=self.logits[part], ids=self.ids[part])

    def put(self, values):
        """Adds values (n, K) to the logits at the listed entries; where there is none, to no entry."""
        self.logits.scatter_add_(1, self.ids.clamp(min=0), torch.where(self.ids >= 0, values, 0))


def others(problem: Problem, rows: ListedRows, listed, out):
    """Writes meant logits (n, K) of the listed entries, and the sums (n, 3) of the others."""
    z = rows.logits
    apply_head(z, rows.bias, problem.options.student_logit_scale, problem.options.student_softcap)
    torch.gather(z, 1, rows.ids.clamp(min=0), out=listed)
    rows.put(torch.full_like(listed, -torch.inf))
    highest = z.amax(-1, keepdim=True)
    reference = torch.where(highest == -torch.inf, 0, highest)
    out[:, :1] = reference
    below = z - reference
    out[:, 2] = below.logsumexp(-1)
    out[:, 1] = out[:, 2] if problem.options.temperature == 1.0 else below.div_(problem.options.temperature).logsumexp(-1)


def gradient(problem: Problem, rows: ListedRows, listed, others, d_listed, d_others):
    """Writes the gradient of the bare products over the logits."""
    z = rows.logits
    reference, tempered, untempered = others.unsqueeze(-1).unbind(1)
    below = z - reference
    dz = d_others[:, :1] * (below / problem.options.temperature - tempered).exp()
    if problem.cross_entropy or problem.z_loss:
        dz += d_others[:, 1:] * (below - untempered).exp()
    if problem.options.student_softcap is not None:
        dz *= 1 - (z / problem.options.student_softcap).square()
        d_listed = d_listed * (1 - (listed / problem.options.student_softcap).square())
    z.copy_(torch.where(z == -torch.inf, 0, dz * problem.options.student_logit_scale))
    rows.put(d_listed * problem.options.student_logit_scale)
