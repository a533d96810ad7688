"""The chunked schedule: products by torch, one chunk of tokens at a time, and a backend's row kernel between them.

    for each chunk of tokens:
        student and teacher logits  ←  hidden · weightᵀ            into a workspace that every chunk reuses
        row kernel                      terms (and stats); the student's logits become dz, the gradient of the bare product
        d_hidden  ←  dz · weight        d_weight += dzᵀ · hidden   accumulated in the compute dtype

so that the loss and both gradients cost 3S + 1T, S and T being one student- and one teacher-head product. Tokens whose
coefficients are all zero are left out before anything is multiplied.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from distill_kernels.plan import Plan
from distill_kernels.problem import STATS, TERMS, Problem, Tensors


class Outputs(NamedTuple):
    terms: torch.Tensor  # (N, 3)
    d_hidden: torch.Tensor  # (N, D_s), or (0,) where not asked for
    d_weight: torch.Tensor  # (V, D_s), likewise
    d_bias: torch.Tensor  # (V,), likewise
    stats: torch.Tensor  # (N, 6), likewise


class Rows(NamedTuple):
    """What a row kernel works on: n tokens of one chunk."""

    student_logits: torch.Tensor  # (n, V) bare products on entry, dz on return if problem.gradient
    teacher_logits: torch.Tensor | None  # (n, V) bare products; scratch on return
    student_bias: torch.Tensor | None  # (V,) compute dtype
    teacher_bias: torch.Tensor | None  # (V,) compute dtype
    labels: torch.Tensor | None  # (n,) int64
    coefficients: torch.Tensor  # (n, 3) compute dtype
    terms: torch.Tensor  # (n, 3) written
    stats: torch.Tensor | None  # (n, 6) written


def empty_outputs(problem: Problem, like: torch.Tensor) -> Outputs:
    """Tensors of the outputs' shapes and dtypes, unwritten."""

    def new(wanted, *shape):
        return like.new_empty(shape if wanted else (0,), dtype=problem.compute_dtype)

    return Outputs(
        new(True, problem.tokens, len(TERMS)),
        new(problem.d_hidden, problem.tokens, problem.student_dim),
        new(problem.d_weight, problem.vocabulary, problem.student_dim),
        new(problem.d_bias, problem.vocabulary),
        new(problem.stats, problem.tokens, len(STATS)),
    )


class Products:
    """The three products of a chunk, with 16-bit operands and accumulation in the compute dtype.

    A GPU multiplies 16-bit operands with float32 results. Elsewhere a 16-bit head is widened a panel of rows at a time, for torch
    would otherwise round the logits to 16 bits, which costs a gradient error of several percent.
    """

    def __init__(self, problem: Problem, plan: Plan, device):
        self.dtype = problem.compute_dtype
        self.panel_rows = plan.panel_rows
        dim = max(problem.student_dim, problem.teacher_dim)
        self.panel = torch.empty(plan.panel_rows * dim, dtype=self.dtype, device=device)

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

    def logits(self, hidden, weight, out):
        """out (n, V) ← hidden (n, D) · weightᵀ"""
        if self._native_mixed(weight):
            torch.mm(hidden, weight.T, out_dtype=self.dtype, out=out)
            return
        wide_hidden = hidden.to(self.dtype)
        for rows, wide in self._panels(weight):
            torch.mm(wide_hidden, wide.T, out=out[:, rows])

    def d_hidden(self, dz, weight, out):
        """out (n, D) ← dz (n, V) · weight"""
        if self._native_mixed(weight):
            torch.mm(dz.to(weight.dtype), weight, out_dtype=self.dtype, out=out)
            return
        for i, (rows, wide) in enumerate(self._panels(weight)):
            torch.addmm(out, dz[:, rows], wide, beta=float(i > 0), out=out)

    def d_weight(self, dz, hidden, out, first):
        """out (V, D) ← or += dzᵀ · hidden (n, D)"""
        if self._native_mixed(hidden):
            product = torch.mm(dz.to(hidden.dtype).T, hidden, out_dtype=self.dtype)
            out.copy_(product) if first else out.add_(product)
            return
        torch.addmm(out, dz.T, hidden.to(self.dtype), beta=float(not first), out=out)

    def _native_mixed(self, operand):
        return operand.is_cuda and operand.dtype.itemsize == 2 and self.dtype is torch.float32


def run(
    problem: Problem, tensors: Tensors, plan: Plan, row_kernel: Callable[[Problem, Plan, Rows], None], *, token_stride: int | None = None
) -> Outputs:
    """Runs `row_kernel` over every chunk.

    token_stride: if given, logits are kept vocabulary-major, (V, token_stride) with the tokens of one entry side by side.
    """
    dtype, device = problem.compute_dtype, tensors.student_hidden.device
    outputs = empty_outputs(problem, tensors.student_hidden)
    if problem.compact:
        active = (tensors.coefficients != 0).any(-1).nonzero().squeeze(-1)
        for written in (outputs.terms, outputs.d_hidden, outputs.stats):
            written.zero_()
    count = active.numel() if problem.compact else problem.tokens
    for total in (outputs.d_weight, outputs.d_bias) if count == 0 else (outputs.d_bias,):
        total.zero_()

    products = Products(problem, plan, device)
    shape = (plan.chunk_tokens, problem.vocabulary) if token_stride is None else (problem.vocabulary, token_stride)

    def workspace():
        # Zeroed where lanes beyond the last token are computed on too: they must hold numbers.
        new = torch.empty if token_stride is None else torch.zeros
        logits = new(shape, dtype=dtype, device=device)
        return logits if token_stride is None else logits.T

    student_space = workspace()
    teacher_space = workspace() if problem.teacher_dim else None
    biases = [None if bias is None else bias.to(dtype).contiguous() for bias in (tensors.student_bias, tensors.teacher_bias)]

    for begin in range(0, count, plan.chunk_tokens):
        end = min(begin + plan.chunk_tokens, count)
        tokens = active[begin:end] if problem.compact else slice(begin, end)
        hidden = tensors.student_hidden[tokens]
        student_logits = student_space[: end - begin]
        products.logits(hidden, tensors.student_weight, student_logits)
        teacher_logits = None
        if teacher_space is not None:
            teacher_logits = teacher_space[: end - begin]
            products.logits(tensors.teacher_hidden[tokens], tensors.teacher_weight, teacher_logits)
        terms = outputs.terms.new_empty(end - begin, len(TERMS))
        stats = outputs.stats.new_empty(end - begin, len(STATS)) if problem.stats else None
        labels = None if tensors.labels is None else tensors.labels[tokens].contiguous()
        coefficients = tensors.coefficients[tokens].contiguous()
        row_kernel(problem, plan, Rows(student_logits, teacher_logits, *biases, labels, coefficients, terms, stats))

        outputs.terms[tokens] = terms
        if stats is not None:
            outputs.stats[tokens] = stats
        dz = student_logits
        if problem.d_hidden:
            if problem.compact:
                d_hidden = outputs.d_hidden.new_empty(end - begin, problem.student_dim)
                products.d_hidden(dz, tensors.student_weight, d_hidden)
                outputs.d_hidden[tokens] = d_hidden
            else:
                products.d_hidden(dz, tensors.student_weight, outputs.d_hidden[tokens])
        if problem.d_weight:
            products.d_weight(dz, hidden, outputs.d_weight, first=begin == 0)
        if problem.d_bias:
            outputs.d_bias.add_(dz.sum(0))
    return outputs
