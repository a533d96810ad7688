"""A chunk's products between hidden states, heads and gradients of logits, by the vendor's library through torch.

Logits are always of the compute dtype: 16-bit ones would cost a gradient error of several percent. Where torch multiplies 16-bit
matrices into float32 (CUDA) it is asked to; elsewhere a 16-bit head is widened a panel of rows at a time.
"""

import torch

from distill_kernels.columns import FRACTIONS, TRIAL_FRACTION, draw, kept_columns, philox, spread
from distill_kernels.problem import Problem, Tensors

PANEL_BYTES = 2 * 2**20  # of a 16-bit head, widened at a time: stays in a core's share of L3 between widening and product


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


def panel_bytes(problem: Problem) -> int:
    return panel_rows(problem) * max(problem.student_dim, problem.teacher_dim) * problem.compute_dtype.itemsize


def sampled_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes that sampled products take for each token of a chunk, and beside: the kept columns of dz; of the head and d_weight; scores,
    probabilities and their sums."""
    kept = problem.kept_columns
    return 8 * kept, kept * (problem.student_dim * (problem.student_dtype.itemsize + 4) + 24) + 48 * problem.vocabulary * bool(kept)


class Sampler:
    """Draws the columns that each chunk's gradients go over, and multiplies them; see `columns`.

    With a tolerance, the first chunk is multiplied on trial, which gives the error of its gradients; from that and from how the columns'
    norms are spread follows the smallest of `FRACTIONS` that is good enough, and it serves the whole call.
    """

    def __init__(self, problem: Problem, tensors: Tensors, products: "Products", chunks: int):
        self.kept, self.tolerance = problem.kept_columns, problem.gradient_tolerance
        self.weight, self.products = tensors.student_weight, products
        if self.kept:
            self.uniforms = philox(tensors.seed, torch.arange(chunks, device=tensors.seed.device))

    def gradients(self, chunk, scores, gather, dz):
        """d_hidden ← and d_weight += of a chunk.

        scores (V,): norms of the columns of dz (n, V). gather(columns, inverse): those columns of it, each times its weight, (n, K).
        """
        if self.tolerance and chunk.first:
            self.kept = self._fitting(chunk, scores, gather)
        if self.kept == len(self.weight):
            if chunk.d_hidden is not None:
                self.products.d_hidden(dz, self.weight, chunk.d_hidden)
            if chunk.d_weight is not None:
                self.products.d_weight(dz, chunk.student_hidden, chunk.d_weight, chunk.first)
            return
        columns, inverse = draw(scores, self.kept, self.uniforms[chunk.index])
        made = self._multiply(chunk, gather(columns, inverse), columns, inverse, chunk.variance)
        if made is not None:
            chunk.d_weight.index_add_(0, columns, made)

    def _multiply(self, chunk, dz, columns, inverse, variance):
        """Writes d_hidden; returns d_weight's rows (K, D), or None; adds to `variance` (2,), if there is one."""
        rows = self.weight.index_select(0, columns)
        made = None
        if chunk.d_hidden is not None:
            self.products.d_hidden(dz, rows, chunk.d_hidden)
        if chunk.d_weight is not None:
            made = chunk.d_weight.new_empty(rows.shape)
            self.products.d_weight(dz, chunk.student_hidden, made, first=True)
        if variance is not None:
            # Σ over all columns of (1/π − 1)·‖·‖², itself estimated from those kept, whose weights are squared in dz already.
            left_out = 1 - 1 / inverse
            if chunk.d_hidden is not None:
                variance[0] += (left_out * dz.float().square().sum(0) * rows.float().square().sum(1)).sum()
            if made is not None:
                variance[1] += (left_out * made.square().sum(1)).sum()
        return made

    def _fitting(self, chunk, scores, gather) -> int:
        """The columns to keep for the tolerance; all, if no fraction is good enough."""
        vocabulary = len(self.weight)
        trial = kept_columns(vocabulary, TRIAL_FRACTION)
        columns, inverse = draw(scores, trial, self.uniforms[chunk.index])
        variance = scores.new_zeros(2)
        made = self._multiply(chunk, gather(columns, inverse), columns, inverse, variance)
        squares = torch.stack([scores.new_zeros(()) if x is None else x.square().sum() for x in (chunk.d_hidden, made)])
        error = relative_error(variance, squares).max().double()
        for fraction in FRACTIONS:
            kept = kept_columns(vocabulary, fraction)
            # Not `>`: where there is nothing to estimate, or NaN, the trial says nothing.
            if error * (spread(scores, kept) / spread(scores, trial)).sqrt() <= self.tolerance:
                return kept
        return vocabulary


def relative_error(variance, squares):
    """Of estimated gradients (2,), by the predicted squared error and their own squares, which exceed the truth's by it in expectation."""
    return (variance / (squares - variance).clamp(min=torch.finfo(squares.dtype).tiny)).sqrt()


class Products:
    """The three products of a chunk; `dz` is of the compute dtype, or of the head's where 16-bit products are wide."""

    def __init__(self, problem: Problem, device: torch.device):
        self.dtype = problem.compute_dtype
        self.wide = multiplies_wide(device)
        self.panel_rows = panel_rows(problem)
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
            else:
                torch.addmm(out, dz.T, hidden, out_dtype=self.dtype, out=out)
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
