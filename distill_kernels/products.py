"""A chunk's products between hidden states, heads and gradients of logits, by the vendor's library through torch.

Logits are always of the compute dtype: 16-bit ones would cost a gradient error of several percent. Where torch multiplies 16-bit
matrices into float32 (CUDA) it is asked to; elsewhere a 16-bit head is widened a panel of rows at a time.
"""

import torch

from distill_kernels.call.problem import Problem

PANEL_BYTES = 2 * 2**20  # of a 16-bit head, widened at a time: stays in a core's share of L3 between widening and product
# Whether a float32 product of 16-bit matrices can be added to a float32 matrix: torch 2.8 and 2.9 want that to be of 16 bits as well.
ADDS_WIDE = torch.__version__ >= (2, 10)
SUM_BYTES = 32 * 2**20  # of d_weight, multiplied apart and then added, at a time: stays in the L2 of a GPU in between


def multiplies_wide(device: torch.device) -> bool:
    """Whether torch makes float32 products of 16-bit matrices on this device."""
    return device.type == "cuda"


def panel_rows(problem: Problem) -> int:
    """Rows of a 16-bit head that are widened at a time; 0 if none need to be."""
    element = problem.compute_dtype.itemsize
    narrow = [
        dim
        for dim, dtype in ((problem.student_dim, problem.student_dtype), (problem.teacher_dim, problem.teacher_dtype))
        if dim and dtype.itemsize < element
    ]
    if not narrow:
        return 0
    return max(1, min(problem.vocabulary, PANEL_BYTES // (max(narrow) * element)))


def sum_rows(problem: Problem) -> int:
    """Rows of d_weight that are multiplied apart at a time; 0 if products add to it."""
    narrow = problem.student_dtype.itemsize < problem.compute_dtype.itemsize
    if ADDS_WIDE or not (narrow and problem.d_weight and multiplies_wide(problem.device)):
        return 0
    return max(1, min(problem.vocabulary, SUM_BYTES // (problem.student_dim * problem.compute_dtype.itemsize)))


def panel_bytes(problem: Problem) -> int:
    """Of what products are made from or in, beside the tensors of the call."""
    widened = panel_rows(problem) * max(problem.student_dim, problem.teacher_dim)
    return max(widened, sum_rows(problem) * problem.student_dim) * problem.compute_dtype.itemsize


def apply_head(logits, bias, scale, softcap):
    """In place: softcap(scale · (product + bias))."""
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


class Products:
    """The three products of a chunk; `dz` is of the compute dtype, or of the head's where 16-bit products are wide."""

    def __init__(self, problem: Problem, device: torch.device):
        self.dtype = problem.compute_dtype
        self.wide = multiplies_wide(device)
        self.panel_rows, self.sum_rows = panel_rows(problem), sum_rows(problem)
        self.panel = torch.empty(panel_bytes(problem) // self.dtype.itemsize, dtype=self.dtype, device=device)

    def logits(self, hidden, weight, out):
        """out (n, V) ← hidden (n, D) · weightᵀ"""
        if self._directly(weight):
            torch.mm(hidden, weight.T, out_dtype=self.dtype, out=out)
            return
        wide_hidden = hidden.to(self.dtype)
        for rows, wide in self._panels(weight):
            torch.mm(wide_hidden, wide.T, out=out[:, rows])

    def d_hidden(self, dz, weight, out):
        """out (n, D) ← dz (n, V) · weight"""
        if self._directly(weight) and dz.dtype == weight.dtype:
            torch.mm(dz, weight, out_dtype=self.dtype, out=out)
            return
        for i, (rows, wide) in enumerate(self._panels(weight)):
            torch.addmm(out, dz[:, rows].to(self.dtype), wide, beta=float(i > 0), out=out)

    def d_weight(self, dz, hidden, out, first):
        """out (V, D) ← or += dzᵀ · hidden (n, D)"""
        if self._directly(hidden) and dz.dtype == hidden.dtype:
            if first:
                torch.mm(dz.T, hidden, out_dtype=self.dtype, out=out)
            elif ADDS_WIDE:
                torch.addmm(out, dz.T, hidden, out_dtype=self.dtype, out=out)
            else:
                for rows, columns in zip(out.split(self.sum_rows), dz.split(self.sum_rows, 1), strict=True):
                    made = self.panel[: rows.numel()].view(rows.shape)
                    rows.add_(torch.mm(columns.T, hidden, out_dtype=self.dtype, out=made))
            return
        torch.addmm(out, dz.to(self.dtype).T, hidden.to(self.dtype), beta=float(not first), out=out)

    def _directly(self, matrix) -> bool:
        return self.wide and matrix.dtype.itemsize == 2 and self.dtype is torch.float32

    def _panels(self, weight):
        """(slice of rows, those rows in the compute dtype)"""
        if weight.dtype == self.dtype:
            yield slice(None), weight
            return
        for begin in range(0, weight.shape[0], self.panel_rows):
            rows = weight[begin : begin + self.panel_rows]
            wide = self.panel[: rows.numel()].view(rows.shape)
            wide.copy_(rows)
            yield slice(begin, begin + rows.shape[0]), wide
