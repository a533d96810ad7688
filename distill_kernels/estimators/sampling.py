"""A chunk's gradients over a few columns of dz: drawn, gathered, multiplied. `columns` says which, and why that is right.

A backend makes dz's column norms and hands over kernels with

    draw(scores, kept, uniform)              as `columns.draw`
    gather(columns, weights, out)            out ← those columns of the chunk's dz, each times its weight, as its `multiply` wants them
    multiply(chunk, dz, columns, squares)    d_hidden ← and d_weight += of such columns; squares (2, K) ← ‖·‖² of what each column adds to
                                             d_hidden and to d_weight, or None
    exact(chunk)                             both over all of dz

`Library` has them for backends that multiply by the vendor's library.
"""

import torch

from distill_kernels.call.problem import Problem, Tensors
from distill_kernels.call.shards import Shards
from distill_kernels.call.worthwhile import FRACTIONS, kept_columns
from distill_kernels.estimators.columns import draw, philox, spread
from distill_kernels.products import Products


def sampled_bytes(problem: Problem, library: bool) -> tuple[int, int]:
    """Bytes that sampled products take for each token of a chunk, and beside: the kept columns of dz and of their draw; scores and
    probabilities. By torch's operations (`library`) also what those make on their way, and the columns' rows of head and d_weight."""
    kept, element = problem.kept_columns, problem.compute_dtype.itemsize
    if not kept:
        return 0, 0
    of_vocabulary = 48 if library or problem.options.gradient_tolerance else 16
    token_bytes, row_bytes = element * kept, 0
    if library:
        token_bytes += element * (kept + problem.student_dim)
        row_bytes = min(kept, _panel_columns(problem.student_dim, problem.student_dtype, problem.compute_dtype)) * problem.student_dim
        row_bytes *= problem.student_dtype.itemsize + element
    return token_bytes, row_bytes + 24 * kept + of_vocabulary * problem.vocabulary


ROWS_BYTES = 32 * 2**20  # of the head's rows that are gathered, and of d_weight's that are made, at a time


def _panel_columns(dim, dtype, compute_dtype) -> int:
    return max(1, ROWS_BYTES // (dim * (dtype.itemsize + compute_dtype.itemsize)))


TRIAL_FRACTION = 0.08  # what a tolerance is measured at
MOST_CHUNKS = 2**24  # of a call, for the numbers of a rank not to be another's


class Sampler:
    """Draws the columns that each chunk's gradients go over.

    With a tolerance, the first chunk is multiplied on trial, which gives the error of its gradients; from that and from how the columns'
    norms are spread follows the smallest of `FRACTIONS` that is good enough, and it serves the whole call.
    """

    def __init__(self, problem: Problem, tensors: Tensors, plan):
        self.kept, self.tolerance, self.vocabulary = problem.kept_columns, problem.options.gradient_tolerance, problem.vocabulary
        self.exact = False  # no fraction was good enough for the tolerance
        self.space = None
        if self.kept:
            device = tensors.student_hidden.device
            shards = Shards.of(problem)
            # Another rank draws by other numbers, so that the errors of alike shards do not add up.
            rank = 0 if shards is None else shards.rank
            self.uniforms = philox(tensors.seed, torch.arange(plan.chunks, device=device) + rank * MOST_CHUNKS)
            if not problem.keeps_dz:
                self.space = torch.empty(plan.chunk_tokens * self.kept, dtype=problem.compute_dtype, device=device)

    def gradients(self, chunk, scores, kernels):
        """d_hidden ← and d_weight += of a chunk, or, if they are made in backward, what that needs. scores (V,): norms of dz's columns, or
        what stands for them."""
        if self.tolerance and chunk.first and self._tried(chunk, scores, kernels):
            return
        if self.exact:
            kernels.exact(chunk)
        else:
            self._sample(chunk, scores, kernels, self.kept, chunk.variance)

    def _sample(self, chunk, scores, kernels, kept, variance):
        """Adds to `variance` (2,), if there is one, and then returns the columns drawn and ‖·‖² of what they added to d_weight."""
        columns, weights = kernels.draw(scores, kept, self.uniforms[chunk.index])
        dz = chunk.kept_dz if self.space is None else self.space
        kernels.gather(columns, weights, dz)
        if self.space is None:
            chunk.kept_columns.copy_(columns)
            return None
        if chunk.d_hidden is None and chunk.d_weight is None:  # what a quantised sweep needs of the columns is done
            return None
        squares = None if variance is None else scores.new_zeros(2, kept)
        kernels.multiply(chunk, dz, columns, squares)
        if variance is None:
            return None
        # Σ over all columns of (1/π − 1)·‖·‖², itself estimated from those kept: their weight 1/π is squared in dz already.
        left_out = 1 - 1 / weights
        if chunk.d_hidden is not None:
            variance[0] += (left_out * squares[0]).sum()
        if chunk.d_weight is not None:
            variance[1] += (left_out * squares[1]).sum()
        return columns, squares[1].sum()

    def _tried(self, chunk, scores, kernels) -> bool:
        """Settles how many columns to keep for the tolerance, or `exact`. Returns whether the trial will do for the first chunk."""
        trial = kept_columns(self.vocabulary, TRIAL_FRACTION)
        variance = scores.new_zeros(2)
        columns, made = self._sample(chunk, scores, kernels, trial, variance)
        squares = torch.stack([made.new_zeros(()) if chunk.d_hidden is None else chunk.d_hidden.square().sum(), made])
        choices = [kept_columns(self.vocabulary, fraction) for fraction in FRACTIONS]
        spreads = torch.stack([spread(scores, kept) for kept in choices])
        errors = relative_error(variance, squares).max().double() * (spreads / spread(scores, trial)).sqrt()
        # Not `>`: where there is nothing to estimate, or NaN, the trial says nothing. The one time that a device is waited for.
        fits = (errors <= self.tolerance).tolist()
        self.exact = True not in fits
        self.kept = trial if self.exact else choices[fits.index(True)]
        if self.kept == trial and not self.exact:
            if chunk.variance is not None:
                chunk.variance.add_(variance)
            return True
        if chunk.d_weight is not None:
            chunk.d_weight.index_fill_(0, columns, 0.0)  # this is the first chunk: nothing else was there
        return False


def relative_error(variance, squares):
    """Of estimated gradients (2,), by the predicted squared error and their own squares, which exceed the truth's by it in expectation."""
    return (variance / (squares - variance).clamp(min=torch.finfo(squares.dtype).tiny)).sqrt()


class Library:
    """The kernels by torch's operations, for dz (n, V) with a token to a row; kept columns are (n, K) at the beginning of their memory."""

    def __init__(self, products: Products, weight, dtype: torch.dtype, dz=None, scale=None):
        self.products, self.weight = products, weight
        self.dtype = dtype  # of dz in products
        self.dz = dz  # (n, V) of the chunk at hand; None: there are kept columns only
        self.scale = scale  # () of `dz` and of the gradients, which the caller divides by it; kept columns have none

    def draw(self, scores, kept, uniform):
        return draw(scores, kept, uniform)

    def gather(self, columns, weights, out):
        if self.scale is not None:
            weights = weights / self.scale
        kept = out[: len(self.dz) * len(columns)].view(len(self.dz), -1)
        torch.mul(self.dz.index_select(1, columns), weights, out=kept)

    def narrowed(self, dz, tokens, kept):
        """What `gather` has made, (n, K) of the products' dtype and scale."""
        dz = dz.view(-1)[: tokens * kept].view(tokens, kept)
        if self.scale is not None:
            dz = dz * self.scale
        return dz.to(self.dtype)

    def rows(self, columns):
        """Of the head, (m, D)."""
        return self.weight.index_select(0, columns)

    def add_rows(self, d_weight, columns, rows):
        """d_weight (V, D)[columns] += rows (m, D)"""
        d_weight.index_add_(0, columns, rows)

    def multiply(self, chunk, dz, columns, squares):
        dz = self.narrowed(dz, len(chunk.student_hidden), len(columns))
        panel = _panel_columns(self.weight.shape[1], self.weight.dtype, self.products.dtype)
        for begin in range(0, len(columns), panel):
            part = slice(begin, begin + panel)
            rows = self.rows(columns[part])
            if chunk.d_hidden is not None:
                share = chunk.d_hidden if begin == 0 else torch.empty_like(chunk.d_hidden)
                self.products.d_hidden(dz[:, part], rows, share)
                if begin > 0:
                    chunk.d_hidden.add_(share)
            if squares is not None:
                squares[0, part] = rows.to(squares.dtype).square().sum(1) * dz[:, part].to(squares.dtype).square().sum(0)
            if chunk.d_weight is not None:
                made = chunk.d_weight.new_empty(rows.shape)
                self.products.d_weight(dz[:, part], chunk.student_hidden, made, first=True)
                self.add_rows(chunk.d_weight, columns[part], made)
                if squares is not None:
                    squares[1, part] = made.square().sum(1)

    def multiply_scaled(self, chunk, upstream):
        """`multiply` of what the chunk has kept, each token's times its upstream (n,)."""
        tokens, kept = len(upstream), len(chunk.kept_columns)
        self.multiply(chunk, chunk.kept_dz[: tokens * kept].view(tokens, kept) * upstream[:, None], chunk.kept_columns, None)

    def exact(self, chunk):
        if chunk.d_hidden is not None:
            self.products.d_hidden(self.dz, self.weight, chunk.d_hidden)
        if chunk.d_weight is not None:
            self.products.d_weight(self.dz, chunk.student_hidden, chunk.d_weight, chunk.first)
